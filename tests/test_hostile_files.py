"""Hostile files of every kind end soon, in little memory, with one line, and nothing in them is executed.

``hostile.py`` generates them and reads each in a process of its own. The bounds: 2 CPU seconds, and four times the size
of the file plus 64 MB of memory. A refusal is one printable line of at most 300 characters that names the file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import hostile
import pytest

TWINS = ("weights: archive, ", "stream: ", "arrays: npz, ", "array: npy, ", "weights: safetensors, a ", "edm: pkl, ")
TWINS += ("weights: pt, ", "convert: pt, ", "weights: pickle, a million ", "arrays: npy, a ")  # others are like them
ALONE = [name for name in hostile.FILES if not name.startswith(TWINS) or "pipe" in name or "twice" in name]
NAMES = {"quick": ALONE[::3], "slow": [name for name in hostile.FILES if name not in ALONE[::3]]}


def measured(folder, names):
    command = [sys.executable, hostile.__file__, str(folder), *names]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    results = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, done.stderr[-2000:]
    return results


def faults(row):
    """What a reading got wrong, as text."""
    message, path = row.get("message", ""), Path(row["path"])
    harmless = any(row["name"].endswith(name) for name in hostile.HARMLESS)
    checks = {
        f"{row['cpu']:.1f} CPU seconds": row["cpu"] > 2,
        f"{row['bytes'] / 2**20:.0f} MB for {row['size']} bytes": row["bytes"] > 4 * row["size"] + 2**26,
        "something in it was executed": row["ran"],
        "it was read": "type" not in row and not harmless,
        f"a traceback: {row.get('trace')}": row.get("trace") is not None,
        f"a message of {len(message)} characters": len(message) > 300,
        f"a message that is not one line: {message!r}": bool(message) and not message.isprintable(),
        f"a message without the file: {message}": bool(message) and path.name not in message,
    }
    return [fault for fault, present in checks.items() if present]


@pytest.mark.parametrize("speed", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
def test_hostile_files_end_soon_in_little_memory_with_one_line(speed, tmp_path):
    results = measured(tmp_path, NAMES[speed])
    assert set(results) == set(NAMES[speed]), "a reader was killed: " + ", ".join(set(NAMES[speed]) - set(results))
    wrong = {name: bad for name, row in results.items() if (bad := faults(row))}
    assert not wrong, json.dumps(wrong, indent=1)


def test_the_corpus_has_every_reader():
    assert {name.partition(":")[0] for name in hostile.FILES} == {
        "weights", "metadata", "edm", "convert", "arrays", "stream", "array", "json", "jsonl",
        "pictures", "cifar10", "idx", "npzs",
    }  # fmt: skip
    assert len(hostile.FILES) > 500
