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

from fmjax.experiments import assemble, command_line, reflow, specs, workdir
from fmjax.storage import checkpoint, files
from fmjax.training import loop, sharding

ROOT = Path(__file__).parents[1]
if not (ROOT / "configs").is_dir():
    pytest.skip("needs the repository's configs", allow_module_level=True)
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
STRAIGHTENED = {"half_straightening_digits": "digits", "half_straightening_mnist": "mnist"}
SETS = ("mnist", "fashion_mnist", "cifar10", "imagenet64")
WRITE = {"cifar10": originals.cifar10, "imagenet64": originals.imagenet_npz}
SMALL = ["net.channels=8", "net.blocks=1", "net.multipliers=(1,)", "net.attention=()", "batch_size=8", "log_every=1"]
SHRUNK = dict.fromkeys(SETS, SMALL) | {"checkerboard": ["net.width=16", "log_every=1"]}


def get(name):
    return importlib.import_module(f"configs.{name}").get_config()


def parse(monkeypatch, name, *overrides):
    """The config of a command line, as launch.train parses it."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, lock_config=True)
    argv = ["train", f"--config={ROOT / 'configs' / name}.py", *(f"--config.{o}" for o in overrides)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(flags, "FLAGS", values)
    command_line.parse_flags(argv)
    return values.config


def tiny(name, folder):
    """A set's files in small, and the overrides that name them."""
    if name not in SETS:
        return []
    source = folder / "source"
    source.mkdir()
    WRITE.get(name, originals.idx)(source)
    return [f"data.source_dir={source}", f"data.data_dir={folder / 'records'}", "data.verify=False"]


def one_device(plan):
    """What is tested does not depend on the mesh, and one device compiles faster."""
    return plan.replace(mesh=sharding.make_mesh(jax.devices()[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_locked_flat_and_tells_its_command(name):
    c = get(name)
    assert c.is_locked
    documented = ast.get_docstring(ast.parse((ROOT / "configs" / f"{name}.py").read_text()))
    launcher = "reflow" if name in STRAIGHTENED else "train"
    assert re.search(rf"^python -m launch\.{launcher} --config=configs/{name}\.py --workdir=\S+", documented, re.M)
    assert c.data.name == STRAIGHTENED.get(name, name)
    # fields of the flow are those of the digits: no config lacks one, none has one of its own
    stages = {"correctors", "flow_map", "corrections", "solver", "solver_steps", "backward_map", "straighten"}
    assert set(c) - stages == set(get("digits")) - stages


# test_launch.py trains on the digits
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("digits", *STRAIGHTENED)])
def test_a_config_trains_on_its_data_from_the_first_step(name, tmp_path, monkeypatch):
    """The network starts at zero, so the first loss is the mean of ``|x1 - x0|^2``, known from the batch."""
    conditions = ["classes=10"] if name == "imagenet64" else []
    cfg = parse(monkeypatch, name, "steps=20", *SHRUNK[name], *tiny(name, tmp_path), *conditions)
    if name in SETS:
        with cfg.unlocked():
            cfg.net.middle = False  # attention over all pixels of the only level
    plan = one_device(assemble.assemble(cfg))
    state = loop.train(plan, tmp_path / "w")
    records = files.read_jsonl(tmp_path / "w" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 21)) and int(state.step) == 20
    assert checkpoint.latest_step(tmp_path / "w" / "checkpoints") == 20
    batch = plan.data.batch(0)
    if batch.x0 is None:  # then N(0, I) is drawn in the loss: a mean over d numbers u^2 of variance below 8
        assert records[0]["loss"] == pytest.approx(1 + np.mean(batch.x1**2), abs=4.5 * np.sqrt(8 / batch.x1.size))
    else:
        assert records[0]["loss"] == pytest.approx(np.mean((batch.x1 - batch.x0) ** 2), rel=1e-5)


@pytest.mark.parametrize("name", sorted(STRAIGHTENED))
def test_a_comparison_of_straightened_flows_is_complete(name, tmp_path, monkeypatch):
    """What is checked before any work: teacher, students, grids and numbers; and the flow alone can be trained."""
    overrides = ["batch_size=8", "straighten.batch_size=8", "sampling.samples=5"]
    cfg = parse(monkeypatch, name, *overrides, *tiny(STRAIGHTENED[name], tmp_path))
    ready = reflow.setup(cfg)
    assert len(ready.models) == 2 + 3 * len(cfg.straighten.sharing) and ready.flow.steps == cfg.steps
    parts = {"noise half", "data half", "both halves"}
    assert {m.part for m in ready.models} == {"none", "all as one", *parts} and set(cfg.straighten.parts) == parts
    assert [tuple(a) for a in cfg.straighten.allocations] == [(1, 1), (1, 9), (9, 1), (9, 9)]


def test_the_network_of_cifar10_is_torchcfms(key):
    """35,746,307 parameters beside those of the second time, as torchcfm's network has."""
    c = get("cifar10")
    params = jax.eval_shape(specs.net(c.net).init, key, np.zeros((1, 32, 32, 3), np.float32))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(params) - count(params["TwoTimes_0"]["jump"]) == 35_746_307


class Interrupt(Exception):
    pass


def test_a_run_that_streams_resumes_to_the_same_bits_and_refuses_another_batch_size(tmp_path, monkeypatch):
    overrides = ["steps=7", "save_every=3", "classes=0", "label_dropout=0.0", *SHRUNK["imagenet64"]]
    cfg = parse(monkeypatch, "imagenet64", *overrides, *tiny("imagenet64", tmp_path))
    with cfg.unlocked(), cfg.ignore_type():
        cfg.net = {"name": "mlp", "width": 8, "depth": 1}
    whole = loop.train(one_device(assemble.assemble(cfg)), tmp_path / "whole")

    def kill(n, state):
        if n == 5:
            raise Interrupt

    with pytest.raises(Interrupt):
        loop.train(one_device(assemble.assemble(cfg)), tmp_path / "parts", hooks=[kill])
    assert checkpoint.latest_step(tmp_path / "parts" / "checkpoints") == 3
    resumed = loop.train(
        one_device(assemble.assemble(cfg)), tmp_path / "parts"
    )  # all that a new process has is the step
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True))
    workdir.open_workdir(tmp_path / "w", cfg.to_dict())
    cfg.batch_size = 16
    with pytest.raises(workdir.WorkdirError, match="batch_size is 8 there, 16 here"):
        assemble.fit(cfg, tmp_path / "w")


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
    losses = [r["loss"] for r in files.read_jsonl(tmp_path / "w" / "metrics.jsonl")]
    assert losses[-1] < losses[0]
