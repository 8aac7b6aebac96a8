"""Every config as a user starts it: complete, documented, and trained for 20 steps on small files of its formats."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import originals
import pytest
from ml_collections import config_dict

from fmjax.experiments import assemble, build, command_line, networks, reflow, settings
from fmjax.storage import checkpoint, files
from fmjax.training import loop, sharding

ROOT = Path(__file__).parents[1]
if not (ROOT / "configs").is_dir():
    pytest.skip("needs the repository's configs", allow_module_level=True)
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "base")
OWN = {"images": "folder", "table": "arrays", "series": "arrays"}  # trained by test_experiments_own.py
STRAIGHTENED = {"half_straightening_digits": "digits", "half_straightening_mnist": "mnist"}
DATA = STRAIGHTENED | {"data_to_data": "eight_gaussians"}  # of configs with another name
SETS = ("mnist", "fashion_mnist", "cifar10", "imagenet64")
WRITE = {"cifar10": originals.cifar10, "imagenet64": originals.imagenet_npz}
SMALL = ["net.channels=8", "net.blocks=1", "net.multipliers=(1,)", "net.attention=()", "batch_size=8", "log_every=1"]
SHRUNK = dict.fromkeys(SETS, SMALL) | dict.fromkeys(("checkerboard", "data_to_data"), ["net.width=16", "log_every=1"])


def get(name):
    return importlib.import_module(f"configs.{name}").get_config()


def read(name, *overrides):
    """The settings of a command line, as launch.train reads them."""
    arguments = [f"--config={ROOT / 'configs' / name}.py", *(f"--config.{o}" for o in overrides)]
    return settings.read(command_line._read_config(arguments, Path("unused")))


def tiny(name, folder):
    """A set's files in small, and the overrides that name them."""
    if name not in SETS:
        return []
    source = folder / "source"
    source.mkdir()
    WRITE.get(name, originals.idx)(source)
    return [
        f"data.source_dir={source}",
        f"data.data_dir={folder / 'records'}",
        "data.verify=False",
        "data.validation=4",
    ]


def one_device(plan):
    """What is tested does not depend on the mesh, and one device compiles faster."""
    return plan.replace(mesh=sharding.make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_locked_and_states_its_command(name):
    c = get(name)
    assert c.is_locked
    documented = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    launcher = "reflow" if name in STRAIGHTENED else "train"
    assert re.search(rf"^python -m launch\.{launcher} --config=configs/{name}\.py --workdir=\S+", documented, re.M)
    assert c.data.name == (DATA | OWN).get(name, name)
    assert set(c) == set(get("base")), "every field is stated in configs/base.py"
    checked = settings.read(c)
    assert checked.correctors and checked.flow_map and checked.samplers, "every config can be corrected and compared"


def test_every_field_of_the_base_config_has_a_comment():
    text = (ROOT / "configs" / "base.py").read_text()
    lines = re.findall(r"^    c\.(\w+) = (.*)$", text[: text.index("return c")], re.M)
    assert {name for name, _ in lines} == set(get("base"))
    assert not [name for name, rest in lines if "  # " not in rest]


# test_launch.py trains on the digits
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("digits", *STRAIGHTENED, *OWN)])
def test_a_config_trains_on_its_data_from_the_first_step(name, tmp_path):
    """The network starts at zero, so the first loss is the mean of ``|x1 - x0|^2``, known from the batch."""
    middle = ["net.middle=False"] if name in ("cifar10", "imagenet64") else []  # attention over all pixels
    chosen = read(name, "steps=4", *SHRUNK[name], *tiny(name, tmp_path), *middle)
    plan = one_device(assemble.flow_plan(chosen, build.data(chosen.common.data)))
    state = loop.train(plan, tmp_path / "w")
    records = files.read_jsonl(tmp_path / "w" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 5)) and int(state.step) == 4
    assert checkpoint.latest_step(tmp_path / "w" / "checkpoints") == 4
    batch = plan.data.batch(0)
    if batch.x0 is None:  # then N(0, I) is drawn in the loss: a mean over d numbers u^2 of variance below 8
        assert records[0]["loss"] == pytest.approx(1 + np.mean(batch.x1**2), abs=4.5 * np.sqrt(8 / batch.x1.size))
    else:
        assert records[0]["loss"] == pytest.approx(np.mean((batch.x1 - batch.x0) ** 2), rel=1e-5)


def test_every_stage_of_the_digits_assembles():
    chosen = read("digits", "correctors.score.batch_size=128")
    plans = networks.plans(chosen, build.data(chosen.common.data))
    assert set(plans) == {"flow", "score", "classifier", "flow_map"}


@pytest.mark.parametrize("name", sorted(STRAIGHTENED))
def test_a_comparison_of_straightened_flows_is_complete(name, tmp_path):
    """What is checked before any work: teacher, students, grids and numbers."""
    overrides = ["batch_size=8", "straighten.batch_size=8", "sampling.samples=5"]
    chosen = read(name, *overrides, *tiny(STRAIGHTENED[name], tmp_path))
    stages, students, models = reflow.student_stages(chosen, build.data(chosen.common.data))
    _, straighten = chosen.straighten
    assert len(models) == 2 + 3 * len(straighten.sharing) and len(stages) == 2 + len(students)
    parts = {"noise half", "data half", "both halves"}
    assert {m.part for m in models} == {"none", "all as one", *parts} and set(straighten.parts) == parts
    assert [tuple(a) for a in straighten.allocations] == [(1, 1), (1, 9), (9, 1), (9, 9)]


def test_the_network_of_cifar10_is_torchcfms(key):
    """35,746,307 parameters beside those of the second time, as torchcfm's network has."""
    params = jax.eval_shape(build.net(get("cifar10").net).init, key, np.zeros((1, 32, 32, 3), np.float32))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(params) - count(params["TwoTimes_0"]["jump"]) == 35_746_307


class Interrupt(Exception):
    pass


def test_a_run_that_streams_resumes_to_the_same_bits(tmp_path):
    overrides = ["steps=7", "save_every=3", "conditional=False", "label_dropout=0.0", *SHRUNK["imagenet64"]]
    chosen = read("imagenet64", *overrides, *tiny("imagenet64", tmp_path))
    small = chosen._replace(flow=settings.dataclasses.replace(chosen.flow, net={"name": "mlp", "width": 8, "depth": 1}))
    data = build.data(small.common.data)
    plan = lambda: one_device(assemble.flow_plan(small, data))
    whole = loop.train(plan(), tmp_path / "whole")

    def kill(n, state):
        if n == 5:
            raise Interrupt

    with pytest.raises(Interrupt):
        loop.train(plan(), tmp_path / "parts", hooks=[kill])
    assert checkpoint.latest_step(tmp_path / "parts" / "checkpoints") == 3
    resumed = loop.train(plan(), tmp_path / "parts")  # all that a new process has is the step
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_real_sets_train_with_their_whole_network(name, tmp_path):
    source = originals.SHARED / name
    if not source.is_dir():
        pytest.skip(f"needs the original files of {name} in ../shared/data")
    fields = {"steps": 20, "log_every": 5, "data.source_dir": source, "data.data_dir": tmp_path / "records"}
    command = [sys.executable, "-m", "launch.train", f"--config=configs/{name}.py", f"--workdir={tmp_path / 'w'}"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1200)
    losses = [r["loss"] for r in files.read_jsonl(tmp_path / "w" / "flow" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_no_two_fields_of_a_config_share_their_value(name):
    """Two fields with one placeholder would both change where one is set."""
    c, references = get(name), []

    def visit(tree):
        for value in tree._fields.values():
            if hasattr(value, "_fields"):
                visit(value)
            elif isinstance(value, config_dict.FieldReference):
                references.append(id(value))

    visit(c)
    assert len(set(references)) == len(references)
