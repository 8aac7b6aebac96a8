"""What a refusal advises works; a full disk, absurd sizes, paths with ``~`` and seeds out of range end in one line."""

import contextlib
import importlib
import multiprocessing
import os
import resource
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from plans import plan

from fmjax import correction, data, metrics, training
from fmjax.experiments import build, workdir
from fmjax.storage import checkpoint, files
from fmjax.training import logs

CONFIG = f"--config={Path(__file__).parent / 'tiny.py'}"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["launch.train"])


def launch(module, *arguments):
    importlib.import_module(module).main([str(a) for a in arguments])


def refusal(module, *arguments):
    with pytest.raises(SystemExit) as end:
        launch(module, *arguments)
    line = str(end.value.code)
    assert line.startswith("error: ") and "\n" not in line and len(line) < 1000, line
    return line


def digest(path, stage="flow"):
    step, _, metadata = checkpoint.restore(path / stage / "checkpoints")
    return step, metadata["digest"]


def records(path):
    lines = files.read_jsonl(path / "flow" / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    path = tmp_path_factory.mktemp("short") / "w"
    launch("launch.train", CONFIG, f"--workdir={path}")
    return path


def test_a_finished_run_is_trained_longer_by_its_own_command(short, tmp_path):
    path, planned = Path(shutil.copytree(short, tmp_path / "w")), tmp_path / "planned"
    launch("launch.train", f"--workdir={path}", "--config.steps=9")
    launch("launch.train", CONFIG, f"--workdir={planned}", "--config.steps=9")
    assert digest(path) == digest(planned) and records(path) == records(planned)
    launch("launch.train", f"--workdir={path}", "--config.steps=12")
    assert digest(path)[0] == 12 and [r["step"] for r in records(path)] == [2, 4, 6, 8, 10, 12]


LOST = ([], ["config.json"], ["flow/stage.json"], ["config.json", "flow/stage.json"])
CHANGES = ("--config.seed=7", "--config.learning_rate=0.1", "--config.steps=3")


@pytest.mark.parametrize(
    ("start", "change", "lost"),
    [([], change, lost) for change in CHANGES for lost in LOST]
    + [([f"--config.{f}"], "--config.steps=9", []) for f in ("schedule=cosine", "method=alpha_flow")],
)
def test_another_config_is_refused_whatever_file_is_lost(start, change, lost, short, tmp_path):
    """The stage's record and each of its checkpoints know what the stage was begun with."""
    path = tmp_path / "w"
    if start:
        launch("launch.train", CONFIG, f"--workdir={path}", *start)
    else:
        shutil.copytree(short, path)
    for name in lost:
        (path / name).unlink()
    before = digest(path)
    field = change.partition("=")[0].removeprefix("--config.")
    line = refusal("launch.train", CONFIG, f"--workdir={path}", *start, change)
    assert f"{field} is " in line and "--fork" in line and digest(path) == before


def test_the_fork_that_a_refusal_names_goes_on_from_the_whole_state(short, tmp_path):
    changes = ["--config.learning_rate=0.001", "--config.steps=8"]
    line = refusal("launch.train", f"--workdir={short}", *changes)
    fork = f"--fork={short}"
    assert "--fork" in line
    new = tmp_path / "new"
    launch("launch.train", CONFIG, f"--workdir={new}", fork, *changes)
    assert digest(new)[0] == 8 and records(new)[:2] == records(short)
    assert [r["step"] for r in records(new)] == [2, 4, 6, 8]
    assert records(new)[-1]["learning_rate"] == pytest.approx(0.001)
    launch("launch.train", f"--workdir={new}", "--config.steps=10")  # the config of the fork is its own
    assert digest(new)[0] == 10
    clipped = tmp_path / "clipped"
    launch("launch.train", CONFIG, f"--workdir={clipped}", fork, "--config.steps=6", "--config.clip=0.5")
    assert digest(clipped)[0] == 6


def test_an_optimiser_has_one_state_with_and_without_a_clip():
    params, options = {"w": np.zeros((2, 2))}, {"learning_rate": 0.1, "steps": 2}
    one, other = (build.optimiser(clip=clip, **options).init(params) for clip in (None, 1.0))
    assert checkpoint.digest(one) == checkpoint.digest(other)


def test_a_fork_that_cannot_work_writes_nothing_and_names_a_way(short, tmp_path):
    path = tmp_path / "w"
    longer = "--config.steps=8"
    assert "Give more steps" in refusal("launch.train", CONFIG, f"--workdir={path}", f"--fork={short}")
    line = refusal("launch.train", CONFIG, f"--workdir={path}", f"--fork={short}", longer, "--config.weight_decay=0.1")
    assert "weight_decay" in line and "by init" in line and not (path / "flow" / "checkpoints").exists()
    launch("launch.train", CONFIG, f"--workdir={path}", longer, "--config.weight_decay=0.1", f"--config.init={short}")
    assert digest(path)[0] == 8
    assert "no checkpoint" in refusal("launch.train", CONFIG, f"--workdir={tmp_path / 'v'}", f"--fork={tmp_path}")
    marginals = ("launch.train", CONFIG, f"--workdir={short}", "--stage=marginals", f"--fork={short}")
    assert "fork=" in refusal(*marginals)


def test_a_flow_that_others_are_made_from_is_trained_longer_as_advised(short, tmp_path):
    path = Path(shutil.copytree(short, tmp_path / "w"))
    launch("launch.train", f"--workdir={path}", "--stage=marginals")
    line = refusal("launch.train", f"--workdir={path}", "--config.steps=6")
    assert "steps=6: marginals" in line and "Delete their folders" in line
    shutil.rmtree(path / "marginals")
    launch("launch.train", f"--workdir={path}", "--config.steps=6")
    launch("launch.train", f"--workdir={path}", "--stage=marginals")
    launch("launch.train", f"--workdir={path}", "--stage=correctors.score")
    assert digest(path)[0] == 6 and digest(path, "correctors/score")[0] == 4


def test_marginals_of_another_flow_are_built_again_as_advised(short, tmp_path):
    path, other = Path(shutil.copytree(short, tmp_path / "w")), tmp_path / "other"
    launch("launch.train", f"--workdir={path}", "--stage=marginals")
    launch("launch.train", CONFIG, f"--workdir={other}", "--config.seed=1")
    shutil.rmtree(path / "flow")
    shutil.copytree(other / "flow", path / "flow")
    train = ("launch.train", f"--workdir={path}", "--config.seed=1", "--stage=marginals")
    assert "seed is 0 there, 1 here" in refusal(*train)
    assert "seed is 1 there, 0 here" in refusal("launch.train", f"--workdir={path}", "--stage=marginals")
    shutil.rmtree(path / "marginals")
    launch(*train)


def test_a_folder_deleted_while_its_run_works_ends_with_one_line(tmp_path, monkeypatch):
    path, close = tmp_path / "w", logs.Window.close

    def delete(window):
        shutil.rmtree(path)
        return close(window)

    monkeypatch.setattr(logs.Window, "close", delete)
    line = refusal("launch.train", CONFIG, f"--workdir={path}")
    assert str(path) in line and not path.exists()


def limited(limit, arguments, log):
    """Train where no file may grow beyond a limit; the output is in a file."""
    jax.config.update("jax_enable_compilation_cache", False)
    with open(log, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        os.dup2(out.fileno(), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            launch("launch.train", *arguments)
        except SystemExit as end:
            print(end.code)
            sys.exit(1)


@pytest.mark.slow
def test_a_full_disk_is_one_line_with_the_path_and_costs_no_checkpoint(tmp_path):
    path, log = tmp_path / "w", tmp_path / "log"
    wide = [CONFIG, f"--workdir={path}", "--config.net.width=128"]
    launch("launch.train", *wide)
    before = digest(path)
    process = SERVER.Process(target=limited, args=(40_000, [*wide, "--config.steps=40"], str(log)))
    process.start()
    process.join(120)
    said = log.read_text()
    assert process.exitcode == 1 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert str(path) in line and len(said.splitlines()) <= 3, said  # the data, the start, the error
    assert digest(path) == before
    launch("launch.train", *wide, "--config.steps=40")
    assert digest(path)[0] == 40


def test_a_disk_that_fills_while_a_run_writes_json_is_one_line(short, tmp_path, monkeypatch):
    path = Path(shutil.copytree(short, tmp_path / "w"))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = refusal("launch.train", f"--workdir={path}", "--config.steps=6")
    assert str(path) in line and "No space left" in line
    monkeypatch.undo()
    assert digest(path)[0] == 4 and workdir.read_config(path)["steps"] == 4


@pytest.mark.parametrize(
    ("module", "change"),
    [
        ("launch.train", "net.width=60000"), ("launch.train", "keep=1000000000"),
        ("launch.pipeline", "forward_examples=1000000000"), ("launch.pipeline", "solver_steps=100000"),
        ("launch.pipeline", "sampling.seeds=1000000"), ("launch.reflow", "straighten.examples=1000000000"),
    ],
)  # fmt: skip
def test_absurd_sizes_are_refused_before_any_work(module, change, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    line = refusal(module, CONFIG, f"--workdir={tmp_path / 'w'}", f"--config.{change}")
    assert "disk too small" in line and str(tmp_path / "w") in line and not (tmp_path / "w").exists()


def test_too_little_memory_is_one_line(tmp_path, monkeypatch):
    def greedy(*args, **kwargs):
        raise MemoryError("Unable to allocate 8 EiB")

    monkeypatch.setattr("fmjax.experiments.build.data", greedy)
    assert "memory" in refusal("launch.train", CONFIG, f"--workdir={tmp_path / 'w'}")


@pytest.mark.slow
def test_a_tilde_is_the_home_folder_in_every_path(short, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(short, tmp_path / "w")
    shutil.copy(Path(__file__).parent / "tiny.py", tmp_path / "tiny.py")
    launch("launch.sample", "--workdir=~/w", "--count=4", "--out=~/x.npz", "--solver=euler")
    launch("launch.marginals", "--workdir=~/w", "--out=~/sets", "--direction=forward")
    launch("launch.train", "--config=~/tiny.py", "--workdir=~/a", "--config.init=~/w")
    launch("launch.train", CONFIG, "--workdir=~/b", "--fork=~/w", "--config.steps=6")
    launch("launch.convert", "--workdir=~/w", "--to=~/w.safetensors")
    launch("launch.convert", "--workdir=~/c", "--source=~/w.safetensors")
    teacher = ["--config.teacher=~/w", "--config.target=frozen", "--config.method=lagrangian"]
    launch("launch.train", CONFIG, "--workdir=~/d", *teacher)
    np.savez(tmp_path / "points.npz", x=np.random.default_rng(0).standard_normal((40, 2)).astype(np.float32))
    assert data.arrays(path="~/points.npz").train.count == 32
    for folder in ("a", "b", "c", "d", "sets", "x.npz"):
        assert (tmp_path / folder).exists()
    for field in ("source_dir", "data_dir"):
        with pytest.raises((ValueError, FileNotFoundError), match=f"{field}="):
            data.mnist(**{"source_dir": "~/none", field: "s3://none" if field == "data_dir" else "~/none"})
    assert not (tmp_path / "~").exists() and not list(tmp_path.rglob("*~*"))


def marginals(seed):
    still = lambda params: lambda x, t, cond=None: x
    options = {"directory": "/none", "direction": "forward", "flow": "x", "count": 2, "shape": (2,)}
    return correction.build_marginals(still, None, [0.0, 1.0], seed=seed, **options)


def pairs(seed):
    fields = {"ts": (0.0, 1.0), "steps": (0, 1), "flow": "", "solver": "", "shape": (2,), "cond": None}
    ts = np.array([0.0, 1.0], np.float32)
    one = correction.Marginals(np.zeros((8, 2, 2), np.float32), ts, types.SimpleNamespace(**fields))
    return correction.marginal_pairs(one, one, batch_size=2, seed=seed)(0)


POINTS = {"train": 8, "validation": 4, "test": 4}
SEEDED = {
    "training": lambda seed: training.initial_parameters(plan(seed=seed)),
    "marginals": marginals,
    "checkerboard": lambda seed: data.checkerboard(**POINTS, seed=seed),
    "digits": lambda seed: data.digits(seed=seed),
    "batches": lambda seed: data.batches(np.zeros((8, 2), np.float32), batch_size=4, seed=seed)(0),
    "in_memory": lambda seed: data.in_memory(data.checkerboard(**POINTS), train=2, validation=2, test=2, seed=seed),
    "sliced_w2": lambda seed: metrics.sliced_w2(np.zeros((8, 2)), np.ones((8, 2)), seed=seed),
    "random_features": lambda seed: metrics.random_features((8, 8, 1), seed=seed),
    "pairs": pairs,
}  # fmt: skip


@pytest.mark.parametrize("seed", [2**32, -1, 2**70])
@pytest.mark.parametrize("name", SEEDED)
def test_seeds_that_would_be_taken_for_others_are_refused(name, seed):
    with pytest.raises(ValueError, match=f"seed={seed}"):
        SEEDED[name](seed)
    SEEDED[name](2**32 - 1) if name != "marginals" else None


def test_sample_refuses_seeds_out_of_range(short, tmp_path):
    line = refusal("launch.sample", f"--workdir={short}", f"--out={tmp_path / 'x.npz'}", f"--seed={2**32}")
    assert f"seed={2**32}" in line


def test_names_that_a_flag_cannot_set_are_refused_with_a_sentence(tmp_path):
    line = refusal("launch.reflow", CONFIG, f"--workdir={tmp_path / 'w'}", "--config.straighten.parts.data half=(0,)")
    assert "data half: a flag cannot set a name with a space" in line
    config = (Path(__file__).parent / "tiny.py").read_text().replace('"score": base', '"my score": base')
    (tmp_path / "spaced.py").write_text(config)
    line = refusal("launch.train", f"--config={tmp_path / 'spaced.py'}", f"--workdir={tmp_path / 'w'}")
    assert "correctors.my score" in line and "letters, digits and _" in line
