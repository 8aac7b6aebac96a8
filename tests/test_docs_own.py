"""The pages about own data and networks: their Python runs, and their commands name fields that exist."""

import json
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laboratory import ROOT, config_file, run
from laboratory import laboratory as laboratory  # a fixture

from fmjax.data import digits
from fmjax.experiments import command_line, settings

PAGE, NETWORKS = (ROOT / "docs" / "howto" / f"own_{name}.md" for name in ("data", "network"))
if not PAGE.exists():
    pytest.skip("needs the repository's docs", allow_module_level=True)
blocks = lambda kind: re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def names(laboratory, tmp_path_factory):
    """The names of the page, after all its Python, for a run of labelled 8x8 digits."""
    folder = tmp_path_factory.mktemp("own")
    small = {"name": "mlp", "width": 8, "depth": 1}
    fields = {"data": "digits", "net": small, "conditional": True, "label_dropout": 0.1, "samplers": {"euler": (2,)}}
    run("train", f"--config={config_file(folder, **fields)}", f"--workdir={folder / 'w'}")
    names = {"W": str(folder / "w")}
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), names)
    for block in re.findall(r"```python\n(.*?)```", NETWORKS.read_text(), re.DOTALL):
        exec(compile(block, str(NETWORKS), "exec"), names)
    return names


def test_the_samples_of_the_page_are_samples_of_the_run(names):
    x = names["x"]
    assert x.shape == (16, 8, 8, 1)
    np.testing.assert_allclose(names["one"][0], x[9], atol=1e-5)
    np.testing.assert_allclose(names["back"], x[:2], atol=1e-2)
    assert names["between"].shape == (5, 8, 8, 1) and np.isfinite(names["nats"]).all()


def test_bits_per_dimension_of_digits_count_their_levels(names):
    """A flow of eight steps hardly moves noise: nearly the bits of N(0, 1) at 17 levels in [-1, 1]."""
    run("likelihood", f"--workdir={names['W']}", "--count=8")
    result = json.loads((Path(names["W"]) / "likelihood.json").read_text())
    x = digits().test.x[:8]
    nats = 0.5 * (x.astype(np.float64) ** 2).mean() + 0.5 * np.log(2 * np.pi)
    assert (result["unit"], result["count"]) == ("bits per dimension", 8)
    assert result["mean"] == pytest.approx(nats / np.log(2) + 3, abs=0.4) and result["standard_error"] < 0.3


def test_the_example_of_inpainting_keeps_what_is_known(names):
    painted, x = np.asarray(names["painted"]), names["x"]
    np.testing.assert_array_equal(painted[:, :, :4], np.broadcast_to(x[:1, :, :4], painted[:, :, :4].shape))
    assert painted[:, :, 4:].std(0).min() > 0.1


def test_the_network_of_the_page_trains_its_dropout_and_statistics(names):
    model, x = names["own"], jnp.asarray(names["x"])
    params = model.init(jax.random.key(0), x)
    assert sorted(params) == ["params", "state"]
    gradient = jax.grad(lambda p: (model.net(p, x, 0.5, 0.5, None, jax.random.key(0)) ** 2).sum())(params)
    assert max(np.abs(a).max() for a in jax.tree.leaves(gradient["state"])) > 0


COMMANDS = [c for block in blocks("bash") for c in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_names_fields_that_exist(command):
    words = shlex.split(command, comments=True)
    assert words[:2] == ["python", "-m"] and (ROOT / (words[2].replace(".", "/") + ".py")).exists()
    arguments = [w for w in words[3:] if w.startswith("--config")]
    if arguments:
        arguments[0] = arguments[0].replace("configs/", f"{ROOT / 'configs'}/")
        read = settings.read(command_line._read_config(arguments, Path("unused")))
        assert read.config["data"]["path"] in ("FOLDER", "table.npz", "series.npz")
    else:
        text = (ROOT / (words[2].replace(".", "/") + ".py")).read_text()
        options = [w.removeprefix("--").split("=")[0] for w in words[3:]]
        assert all(f'"{o}"' in text for o in options if o != "workdir")
