"""Fifty kinds of damage, one at a time, to the files of a finished run: refused by name, or made again and said.

``launch.pipeline`` then finds a finished run. Whatever was damaged, its numbers are those of before, or it ends with
one line that names the file.
"""

import importlib
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from fmjax.experiments import networks, stages
from fmjax.storage import checkpoint

# tensorstore calls an event loop back that Orbax has closed after a file it could not read
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CONFIG = f"--config={Path(__file__).parent / 'tiny.py'}"


def launch(module, *arguments):
    importlib.import_module(module).main([str(a) for a in arguments])


def delete(path, *_):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def overwrite(content):
    def damage(path, *_):
        path.write_bytes(content(path.read_bytes()))

    return damage


def flip(path, *_):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def swap(path, other):
    third = path.with_name("third")
    path.rename(third), other.rename(path), third.rename(other)


def copy_over(path, other):
    shutil.copy(other, path)


def copy_step(path, *_):
    shutil.copytree(path, path.with_name("6"))


def folder(path, *_):
    path.unlink()
    path.mkdir()


def loop(path, *_):
    path.unlink()
    path.symlink_to(path.name)


def pipe(path, *_):
    path.unlink()
    os.mkfifo(path)


def edit(**changes):
    def damage(path, *_):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


empty, zeros = overwrite(lambda raw: b""), overwrite(lambda raw: bytes(len(raw)))
half = overwrite(lambda raw: raw[: len(raw) // 2])
array, number, empty_object = (overwrite(lambda raw, text=text: text) for text in (b"[]", b"3", b"{}"))
first_line = overwrite(lambda raw: raw.split(b"\n")[0] + b"\n")
letters = overwrite(lambda raw: raw.replace(b'"step": 2', b'"step": 1'))
CKPT, BEST = "flow/checkpoints/4", "correctors/classifier/best/checkpoints/4"
DATA, ARRAY = f"{CKPT}/state/**/d/*", "samples/rk4--2-steps-[0-9a-f]*/1.npy"
NEXT = "samples/rk4--2-steps-[0-9a-f]*/2.npy"
SHARD, OTHER = (f"marginals/{way}/shard-00000-of-00001.array_record" for way in ("forward", "backward"))
CASES = [
    ("config.json", delete), ("config.json", empty), ("config.json", half), ("config.json", edit(seed=7)),
    ("config.json", array), ("config.json", number), ("config.json", empty_object), ("config.json", folder),
    ("config.json", loop), ("config.json", pipe), ("config.json", copy_over, "flow/stage.json"),
    ("environment.json", delete), ("environment.json", zeros), ("environment.json", array),
    ("flow/stage.json", delete), ("flow/stage.json", half), ("flow/stage.json", number), ("flow/stage.json", loop),
    ("flow/stage.json", edit(fields={})), ("flow/stage.json", swap, "flow_map/stage.json"),
    ("marginals/stage.json", delete), ("marginals/stage.json", flip), ("correctors/score/stage.json", empty_object),
    ("flow/metrics.jsonl", delete), ("flow/metrics.jsonl", empty), ("flow/metrics.jsonl", half),
    ("flow/metrics.jsonl", zeros), ("flow/metrics.jsonl", first_line), ("flow/metrics.jsonl", letters),
    ("flow/metrics.jsonl", loop), ("flow/metrics.jsonl", folder),
    ("correctors/score/metrics.jsonl", swap, "correctors/classifier/metrics.jsonl"),
    (CKPT, delete), (CKPT, copy_step), (CKPT, swap, "flow/checkpoints/2"), (f"{CKPT}/metadata/metadata", flip),
    (f"{CKPT}/metadata/metadata", array), (DATA, flip), (DATA, empty), ("flow/checkpoints", delete),
    ("flow/checkpoints", swap, "flow_map/checkpoints"), (BEST, delete), (BEST, copy_step),
    (f"{BEST}/metadata/metadata", half), (BEST, swap, "correctors/classifier/checkpoints/4"),
    ("correctors/classifier/best", delete), ("marginals/forward/manifest.json", delete),
    ("marginals/forward/manifest.json", edit(seed=1)), ("marginals/forward/manifest.json", number),
    ("marginals/forward", swap, "marginals/backward"), (SHARD, half), (SHARD, flip), (SHARD, delete),
    (SHARD, copy_over, OTHER), (SHARD, loop), (ARRAY, delete), (ARRAY, empty), (ARRAY, flip), (ARRAY, zeros),
    (ARRAY, folder), (ARRAY, swap, NEXT), (ARRAY, copy_over, "samples/flow-map*/1.npy"),
    ("metrics.json", delete), ("metrics.json", edit(lines=["Best: ours"])), ("metrics.json", array),
    ("metrics.json", half), ("report.html", delete), ("report.html", flip), ("report.html", folder),
    ("comparison/stage.json", zeros),
]  # fmt: skip


def name_of(case):
    damage = next(k for k, v in globals().items() if v is case[1]) if case[1] in globals().values() else "edit"
    return f"{damage}-{case[0]}".replace("/", ".")


def numbers(path):
    """All that a person reads of a run, and the digests of what the numbers came from."""
    found = json.loads((path / "metrics.json").read_text())
    kept = {name: found[name] for name in ("rows", "verdicts", "auc", "gaps", "lines")}
    speeds = ("steps_per_s", "examples_per_s")
    for log in sorted(path.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        kept[str(log.relative_to(path))] = [{k: v for k, v in r.items() if k not in speeds} for r in lines]
    for folder in ("flow", "flow_map", "correctors/score", "correctors/classifier/best"):
        kept[folder] = checkpoint.restore(path / folder / "checkpoints", part="ema", fallback=True)[2]["digest"]["ema"]
    for draw in sorted(path.glob("samples/*/*.npy")):
        kept[str(draw.relative_to(path))] = np.load(draw).tobytes()
    return kept


def outcome(path, capfd, caplog, *arguments):
    """Run the pipeline: the line with which it ends (or ``None``), and all that it says."""
    refused = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            launch("launch.pipeline", f"--workdir={path}", *arguments)
        except SystemExit as end:
            refused = str(end.code)
    captured = capfd.readouterr()
    return refused, captured.out + captured.err + caplog.text + "".join(f"\n{w.message}" for w in caught)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run and its numbers; later runs of its config take the checked plans of this one."""
    path, made = tmp_path_factory.mktemp("finished") / "w", {}
    original = networks.plans

    def once(settings, data):
        key = json.dumps(settings.config, sort_keys=True, default=str)
        return made[key] if key in made else made.setdefault(key, original(settings, data))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "plans", once)
        launch("launch.pipeline", CONFIG, f"--workdir={path}")
        patch.setattr(stages, "check_stages", lambda every: None)
        yield path, numbers(path)


def cases():
    """All damages; those of every third case run in the fast suite too."""
    for i, case in enumerate(CASES):
        yield pytest.param(case, id=name_of(case), marks=() if i % 3 == 0 else pytest.mark.slow)


@pytest.mark.parametrize("case", cases())
def test_a_damaged_file_is_refused_by_name_or_made_again_and_said(case, finished, tmp_path, capfd, caplog):
    whole, before = finished
    path = Path(shutil.copytree(whole, tmp_path / "w"))
    place, damage, *other = case
    size = lambda file: file.stat().st_size
    target = max(path.glob(place), key=size)
    damage(target, *(max(path.glob(o), key=size) for o in other))
    refused, said = outcome(path, capfd, caplog)
    at = target.relative_to(path)
    if "checkpoints" in at.parts:  # checkpoints are named by their folders, lost ones by the folder of all
        at = Path(*at.parts[: at.parts.index("checkpoints") + (1 if damage in (delete, copy_step) else 2)])
    if refused is not None:
        near = f"/{Path(path.name, at.parent)}" in refused and at.name in refused  # the beginning of a long path is cut
        named = f"{path.name}/{at}" in refused or near
        assert refused.startswith("error: ") and "\n" not in refused and named, refused
        return
    assert "Traceback" not in said and str(path / at) in said, said
    assert numbers(path) == before
    assert not [p for p in path.rglob("*") if p.is_symlink()]
