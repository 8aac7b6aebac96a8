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

from fmjax.storage import checkpoint

CONFIG = f"--config={Path(__file__).parent / 'tiny.py'}"
NUMBERS = ("metrics.json", "metrics.jsonl", "config.json", "stage.json", "manifest.json")


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


empty, half, zeros = overwrite(lambda raw: b""), overwrite(lambda raw: raw[: len(raw) // 2]), overwrite(lambda r: bytes(len(r)))
array, number, empty_object = (overwrite(lambda raw, text=text: text) for text in (b"[]", b"3", b"{}"))
first_line = overwrite(lambda raw: raw.split(b"\n")[0] + b"\n")
letters = overwrite(lambda raw: raw.replace(b'"step": 2', b'"step": 1'))
CKPT, BEST = "flow/checkpoints/4", "correctors/classifier/best/checkpoints/4"
DATA, ARRAY = f"{CKPT}/state/ocdbt.process_0/d/*", "samples/rk4--2-steps-6*/1.npy"
SHARD = "marginals/forward/shard-00000-of-00001.array_record"
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
    (f"{CKPT}/metadata/metadata", array), (DATA, flip), (DATA, empty), ("flow/checkpoints", swap, "flow_map/checkpoints"),
    ("flow/checkpoints", delete), (BEST, delete), (BEST, copy_step), (f"{BEST}/metadata/metadata", half),
    (BEST, swap, "correctors/classifier/checkpoints/4"), ("correctors/classifier/best", delete),
    ("marginals/forward/manifest.json", delete), ("marginals/forward/manifest.json", edit(seed=1)),
    ("marginals/forward/manifest.json", number), ("marginals/forward", swap, "marginals/backward"),
    (SHARD, half), (SHARD, flip), (SHARD, delete), (SHARD, copy_over, "marginals/backward/shard-00000-of-00001.array_record"),
    (SHARD, loop), (ARRAY, delete), (ARRAY, empty), (ARRAY, flip), (ARRAY, zeros), (ARRAY, folder),
    (ARRAY, swap, "samples/rk4--2-steps-6*/2.npy"), (ARRAY, copy_over, "samples/flow-map*/1.npy"),
    ("metrics.json", delete), ("metrics.json", edit(lines=["Best: ours"])), ("metrics.json", array), ("metrics.json", half),
    ("report.html", delete), ("report.html", flip), ("report.html", folder), ("comparison/stage.json", zeros),
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "w"
    launch("launch.pipeline", CONFIG, f"--workdir={path}")
    return path, numbers(path)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_damaged_file_is_refused_by_name_or_made_again_and_said(case, finished, tmp_path, capfd, caplog):
    whole, before = finished
    path = Path(shutil.copytree(whole, tmp_path / "w"))
    place, damage, *other = case
    target = next(iter(sorted(path.glob(place))))
    damage(target, *(next(iter(sorted(path.glob(o)))) for o in other))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            launch("launch.pipeline", f"--workdir={path}")
            refused = None
        except SystemExit as end:
            refused = str(end.code)
    captured = capfd.readouterr()
    said = captured.out + captured.err + caplog.text + "\n".join(str(w.message) for w in caught)
    named = str(target if target.name in NUMBERS or "metadata" not in place else target.parents[1])
    named = str(path / CKPT) if place == DATA else named
    if refused is not None:
        assert refused.startswith("error: ") and "\n" not in refused and named in refused, refused
        return
    assert "Traceback" not in said and named in said, said
    assert numbers(path) == before
    assert [p for p in path.rglob("*") if p.is_symlink()] == []
