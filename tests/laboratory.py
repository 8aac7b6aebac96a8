"""Small runs of the laboratory: configs that differ from ``configs/base.py`` by dotted names; commands in process."""

from __future__ import annotations

import copy
import functools
import importlib
import json
from pathlib import Path

import jax
import pytest

from fmjax.experiments import pipeline, settings, workdir
from fmjax.storage import checkpoint, files
from fmjax.training import sharding

base = pytest.importorskip("configs.base")
ROOT = Path(__file__).parents[1]
SPEEDS = ("steps_per_s", "examples_per_s")
POINTS = {"name": "eight_gaussians", "train": 240, "validation": 80, "test": 120}
PLAIN = {"name": "plain", "width": 8, "depth": 1, "waves": 0, "times": 0}  # few operations: traced fast
SMALL = {
    "data": POINTS, "net": PLAIN, "batch_size": 32, "steps": 8, "warmup": 2, "log_every": 4, "save_every": 4,
    "sample_every": 0, "ema": 0.9, "schedule": "constant", "coupling": "independent", "solver_steps": 2,
    "forward_examples": 64, "sampling": {"seeds": 2, "samples": 40}, "samplers": {"euler": (2,), "rk4": (2,)},
}  # fmt: skip
SCORE = {"method": {"name": "score_corrector", "sigma": 0.2}}
CLASSIFIER = {
    "net": PLAIN | {"logit": True}, "method": {"name": "classifier_corrector", "eps": 0.5, "steps": 1},
}  # fmt: skip
MAP = {"method": {"name": "lagrangian", "diagonal": 0.75}}

RK4, JUMP = {"solver": "rk4", "steps": 2}, {"solver": "flow_map", "steps": 2}
CORRECTIONS = {
    "end": {**RK4, "at": (2,), "by": "score", "alpha": 0.5, "beta": 0.1},
    "apart": {**RK4, "at": (1, 2), "by": "classifier", "alpha": 0.1},
    "drift": {**JUMP, "at": (2,), "by": "drift", "alpha": 0.5, "bandwidth": 1.0},
    "restart": {**JUMP, "at": (1,), "by": "restart", "to": 0.25},
}
WHOLE = {
    "correctors": {"score": SCORE, "classifier": CLASSIFIER}, "flow_map": MAP, "corrections": CORRECTIONS,
    "samplers": {"euler": (2,), "rk4": (2,), "flow_map": (1, 2)},
}  # fmt: skip


def config(*, correctors=None, flow_map=None, **changes):
    """Return a small config of points; dotted names change fields, and stages get the fields of the flow."""
    c = base.get_config()
    with c.unlocked(), c.ignore_type():
        for name, value in copy.deepcopy(SMALL | changes).items():
            *parents, last = name.split(".")
            functools.reduce(lambda node, part: node[part], parents, c)[last] = value
        c.correctors = {name: base.stage(c, **part) for name, part in (correctors or {}).items()}
        c.flow_map = base.stage(c, **flow_map) if flow_map else {}
    return c.lock()


def read(**changes) -> settings.Settings:
    """Return the settings of a small config."""
    return settings.read(config(**changes))


def whole_run(factory: pytest.TempPathFactory) -> Path:
    """Run the pipeline on points once a process; tests copy the folder, or only read it."""
    path = factory.getbasetemp() / "whole-pipeline"
    if not path.exists():
        pipeline.main(read(**WHOLE), path)
    return path


def config_file(folder: Path, **changes) -> Path:
    """Write a config file for a command line."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config_of_a_test.py"
    file.write_text(f"import laboratory\n\n\ndef get_config():\n    return laboratory.config(**{changes!r})\n")
    return file


def run(command: str, *arguments: str) -> None:
    """Run a command of ``launch`` in this process."""
    importlib.import_module(f"launch.{command}").main([str(a) for a in arguments])


def refused(command: str, *arguments: str) -> str:
    """Run a command that is refused, and return its one line."""
    with pytest.raises(SystemExit) as end:
        run(command, *arguments)
    line = str(end.value.code)
    assert line.startswith("error: ") and "\n" not in line and len(line) <= 400, line
    return line.removeprefix("error: ")


def digest(folder: Path) -> str:
    """Return the digest of the averaged parameters in the folder of a stage."""
    return checkpoint.restore(folder / "checkpoints", part="ema")[2]["digest"]["ema"]


def records(folder: Path) -> list[dict]:
    """Return the records of a training without its speeds."""
    return [{k: v for k, v in r.items() if k not in SPEEDS} for r in files.read_jsonl(folder / "metrics.jsonl")]


def numbers(path: Path, name: str = "metrics.json") -> dict:
    """Return what a run measured, without what it ran on and how long it took, which the page shows too."""
    record = json.loads((path / name).read_text())
    return {k: v for k, v in record.items() if k not in ("environment", "digest", "costs", "page", "sha256")}


def stamps(path: Path) -> dict[Path, int]:
    """Return when each file was written."""
    return {p.relative_to(path): p.stat().st_mtime_ns for p in sorted(path.rglob("*")) if p.is_file()}


def no_checkpoint(path: Path) -> bool:
    """Return whether nothing was trained in a folder."""
    return not list(path.rglob("checkpoints"))


PIXEL = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x00\x00\x00\x00:~\x9bU\x00\x00\x00\n"
    b"IDATx\x9cc`\x00\x00\x00\x02\x00\x01H\xaf\xa4q\x00\x00\x00\x00IEND\xaeB`\x82"
)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """One device, charts of one pixel (tests of the report draw them), and a cache of its own."""
    make_mesh = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda devices=None: make_mesh(devices or jax.devices()[:1]))
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: file.write(PIXEL))
        patch.setattr(workdir, "_commit", lambda package: "0" * 40)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
