"""A package outside the repository adds a network, a method, data, a metric and a corrector by a config alone."""

import re
import sys
import textwrap

import numpy as np
import pytest
from laboratory import ROOT, config_file, numbers, records, refused, run
from laboratory import laboratory as laboratory  # a fixture

import fmjax
from fmjax.experiments import workdir

pytestmark = pytest.mark.usefixtures("laboratory")
PACKAGE = {
    "__init__.py": "",
    "nets.py": """
        import flax.linen as nn
        import jax.numpy as jnp
        from fmjax.checks import Positive

        class Shift(nn.Module):
            width: Positive = 4

            @nn.compact
            def __call__(self, x, s, t, cond=None, *, train=False):
                hidden = jnp.tanh(nn.Dense(self.width)(jnp.concatenate([x, t[:, None]], 1)))
                return nn.Dense(x.shape[1], name="out")(hidden)
        """,
    "losses.py": """
        from fmjax.checks import PositiveFloat
        from fmjax.methods import flow_matching

        def scaled(net, *, scale: PositiveFloat = 1.0):
            '''Flow matching with a loss times a number.'''
            inner = flow_matching(net)

            def loss(params, target, batch, key):
                value, aux = inner.loss(params, target, batch, key)
                return scale * value, aux | {"per_example": scale * aux["per_example"]}

            return inner._replace(loss=loss)
        """,
    "sets.py": """
        import numpy as np
        from fmjax.checks import Positive
        from fmjax.data import Examples, dataset

        def ring(*, count: Positive = 60):
            angle = np.linspace(0, 2 * np.pi, 3 * count, endpoint=False)
            x = np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)
            return dataset(*(Examples(x[i::3]) for i in range(3)), name="ring")
        """,
    "distances.py": """
        import numpy as np
        from fmjax.metrics import Metric

        def radius_to(data, reference, *, power: float = 1.0):
            mean = lambda x: float((np.linalg.norm(x, axis=1) ** power).mean())
            return Metric("radius", lambda x: abs(mean(x) - mean(np.asarray(reference.x))), {"power": str(power)})
        """,
    "fixes.py": """
        def shrink(velocity, *, alpha: float):
            return lambda key, x, t, cond=None: (x * (1 - alpha), {})
        """,
}
CHANGES = {
    "net": {"name": "outside_of_fmjax.nets:Shift", "width": 5},
    "method": {"name": "outside_of_fmjax.losses:scaled", "scale": 4.0},
    "data": {"name": "outside_of_fmjax.sets:ring", "count": 60},
    "metrics": ({"name": "outside_of_fmjax.distances:radius_to", "power": 2.0}, "sliced_w2_to"),
    "corrections": {
        "shrunk": {"solver": "euler", "steps": 2, "at": (2,), "by": "outside_of_fmjax.fixes:shrink", "alpha": 0.5}
    },
    "samplers": {"euler": (2,)},
}


@pytest.fixture(scope="module")
def trained(laboratory, tmp_path_factory):
    """A flow of nothing but foreign parts, trained, evaluated and sampled by commands."""
    folder = tmp_path_factory.mktemp("outside")
    assert ROOT not in folder.parents
    (folder / "outside_of_fmjax").mkdir()
    for name, text in PACKAGE.items():
        (folder / "outside_of_fmjax" / name).write_text(textwrap.dedent(text))
    file = config_file(folder, **CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        path = folder / "w"
        run("train", f"--config={file}", f"--workdir={path}")
        run("evaluate", "--trust", f"--workdir={path}")
        run("sample", "--trust", f"--workdir={path}", "--count=40", f"--out={folder / 'x.npz'}", "--solver=euler",
            "--solver_steps=2")  # fmt: skip
        yield path
    for name in [name for name in sys.modules if name.split(".")[0] == "outside_of_fmjax"]:
        del sys.modules[name]


def test_a_foreign_package_trains_evaluates_and_samples(trained):
    rows = {r["name"]: r["distances"] for r in numbers(trained, "evaluation.json")["rows"]}
    assert list(rows["training data"]) == ["radius", "sliced W2"]
    assert rows["training data"]["radius"][0] == pytest.approx(0, abs=1e-6)  # on the unit circle
    x = np.load(trained.parent / "x.npz")["x"]
    run_ = fmjax.load(trained, trust=True)
    assert run_.params["out"]["kernel"].shape == (5, 2)
    np.testing.assert_allclose(run_.sample(40, solver="euler", steps=2), x, atol=1e-6)
    fix = CHANGES["corrections"]["shrunk"]
    np.testing.assert_allclose(run_.sample(40, solver="euler", steps=2, corrections=fix), x / 2, atol=1e-6)
    # two runs: seed 0 of run 0 is what was sampled
    fix = "outside_of_fmjax.fixes:shrink"
    plain, half = (rows[f"euler, 2 steps{words}"]["radius"][0] for words in ("", f", {fix} at 2"))
    assert plain > 0 and half == pytest.approx(1 - (1 + plain) / 4, abs=0.1)


def test_the_loss_of_a_foreign_method_is_its_own(trained, tmp_path):
    plain = config_file(tmp_path, **CHANGES | {"method": {"name": "outside_of_fmjax.losses:scaled", "scale": 1.0}})
    run("train", f"--config={plain}", f"--workdir={tmp_path / 'w'}")
    four, one = (records(path / "flow")[0]["loss"] for path in (trained, tmp_path / "w"))
    assert four == pytest.approx(4 * one, rel=0.05)  # Adam hardly sees the scale


@pytest.mark.parametrize("command", ["train", "evaluate", "marginals", "sample", "tune", "pipeline", "reflow"])
def test_a_folder_that_names_foreign_code_needs_trust(command, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "outside_of_fmjax.nets", None)  # an import would fail
    line = refused(command, f"--workdir={trained}")
    assert line.startswith("corrections.shrunk.by='outside_of_fmjax.fixes:shrink'") and "--trust" in line
    assert len(line) <= 300


def test_loading_foreign_code_needs_trust(trained):
    with pytest.raises(workdir.WorkdirError, match="^corrections.shrunk.by=.*trust=True"):
        fmjax.load(trained)
    with pytest.raises(workdir.WorkdirError, match=r"^corrections\.shrunk\.by="):
        workdir.read_config(trained)
    assert workdir.read_config(trained, trust=True)["net"] == CHANGES["net"]


def test_code_named_by_a_flag_is_the_users_own_and_the_folders_is_not(trained):
    """What the user types is trusted; what the folder brings is not."""
    line = refused("evaluate", f"--workdir={trained}", "--config.corrections.shrunk.alpha=0.25")
    assert line.startswith("corrections.shrunk.by=")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("net", {"name": "outside_of_fmjax.nets:Shift", "width": 0}, "net.width=0"),
        ("net", {"name": "outside_of_fmjax.nets:Shift", "witdh": 3}, "net.witdh=3: .*did you mean 'width'"),
        ("net", {"name": "outside_of_fmjax.nets:Shfit"}, "net='outside_of_fmjax.nets:Shfit': .*did you mean 'Shift'"),
        ("net", {"name": "outside_of_fmjax.netz:Shift"}, "net='outside_of_fmjax.netz:Shift': cannot be imported"),
        ("net", "outside_of_fmjax.losses:scaled", "net="),
        ("method", {"name": "outside_of_fmjax.losses:scaled", "scale": -1.0}, "method.scale=-1.0"),
        ("method", "outside_of_fmjax.sets:ring", "method='outside_of_fmjax.sets:ring'"),
        ("data", {"name": "outside_of_fmjax.sets:ring", "count": 0}, "data.count=0"),
        ("data", "outside_of_fmjax.nets:Shift", "data="),
        ("metrics", ("outside_of_fmjax.distances:far_to",), "metrics='outside_of_fmjax.distances:far_to'"),
        ("metrics", ("outside_of_fmjax.sets:ring",), "metrics='outside_of_fmjax.sets:ring'"),
    ],
)
def test_foreign_parts_that_cannot_work_are_one_line(field, value, message, trained, tmp_path):
    file = config_file(tmp_path, **CHANGES | {field: value})
    line = refused("pipeline", f"--config={file}", f"--workdir={tmp_path / 'w'}")
    assert re.match(message, line) and len(line) <= 300, line
    assert not (tmp_path / "w").exists()
