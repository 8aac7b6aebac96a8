"""Shards and manifests: what survives a crash at each file operation, and what is refused."""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from fmjax.storage import files, shards

M = shards.Manifest(
    version=shards.VERSION, direction="backward", flow="a", solver="rk4", backward_map="reverse", ts=(0.0, 1.0),
    steps=(0, 1), dtype="float32", shape=(3,), count=10, seed=None, data="d", shard_size=4,
)  # fmt: skip
X = np.random.default_rng(0).standard_normal((10, 2, 3)).astype(np.float32)


class Crash(BaseException):
    """Not an Exception, as a kill is not: nothing may catch it and tidy up."""


def stored(directory, m):
    """Return all examples of a set in memory."""
    return shards.StoredArray(directory, m).load()


def write_all(directory):
    good = shards.resume(directory, M, shards.ranges(M))
    shards.write_manifest(directory, M, good)
    for name, (start, stop) in shards.ranges(M).items():
        if name not in good:
            good[name] = shards.write_shard(directory, name, (x.tobytes() for x in X[start:stop]))
            shards.write_manifest(directory, M, good)


def contents(directory):
    """All but the hidden temporaries that a kill leaves."""
    return {p.name: p.read_bytes() for p in sorted(Path(directory).iterdir()) if p.name[0] != "."}


def test_round_trip(tmp_path):
    write_all(tmp_path)
    np.testing.assert_array_equal(stored(tmp_path, shards.read_manifest(tmp_path)), X)
    assert [s.count for s in shards.read_manifest(tmp_path).shards] == [4, 4, 2]
    assert list(shards.ranges(M).values()) == [(0, 4), (4, 8), (8, 10)]


@contextlib.contextmanager
def crashing_operations(monkeypatch, when, at):
    """The ``at``-th file operation raises ``Crash``, before or after it was done."""
    calls = {"n": 0}

    def crashing(name, real):
        def call(*args, **kwargs):
            calls["n"] += 1
            if when == "after":
                result = real(*args, **kwargs)
            if calls["n"] == at:
                raise Crash(name)
            return real(*args, **kwargs) if when == "before" else result

        return call

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "replace"), (tempfile, "mkstemp"), (files, "file_digest")):
            patch.setattr(owner, name, crashing(name, getattr(owner, name)))
        yield


@pytest.mark.parametrize("when", ["before", "after"])
def test_crash_at_every_file_operation(tmp_path, monkeypatch, when):
    """However often and wherever it dies, a build ends with the bytes of one that did not, or says it is unfinished."""
    write_all(tmp_path / "whole")
    whole, seen = contents(tmp_path / "whole"), set()
    for at in range(1, 100):
        directory = tmp_path / str(at)
        with crashing_operations(monkeypatch, when, at):
            try:
                write_all(directory)
                break
            except Crash as crash:
                seen.add(str(crash))
        m = shards.read_manifest(directory)
        if m is not None and len(m.shards) < 3:
            with pytest.raises(RuntimeError, match="unfinished"):
                stored(directory, m)
        for shard in m.shards if m else ():
            assert (directory / shard.file).read_bytes() == whole[shard.file]
        write_all(directory)
        assert contents(directory) == whole
    assert at > 20 and seen == {"fsync", "replace", "mkstemp", "file_digest"}


def test_version_and_rubbish_are_refused(tmp_path):
    for text in ("{", "[]", "{}", '{"version": 1}', '{"version": 2}'):
        (tmp_path / shards.MANIFEST).write_text(text)
        with pytest.raises(ValueError, match="manifest.json cannot be used .*remove .* build the marginals again"):
            shards.read_manifest(tmp_path)


def test_grids_agree_in_float32_whatever_precision_they_come_in(tmp_path):
    grid = np.linspace(0, 1, 11)
    m = M._replace(ts=tuple(grid.tolist()), steps=tuple(range(11)))
    for ts in (grid, grid.astype(np.float32), list(grid)):
        shards.check_manifest(tmp_path, m, {"ts": ts, "steps": range(11)})
        shards.check_manifest(tmp_path, m._replace(ts=tuple(grid.astype(np.float32).tolist())), {"ts": ts})
    with pytest.raises(ValueError, match=r"ts: \(0.0, .* stored, .* requested"):
        shards.check_manifest(tmp_path, m, {"ts": np.linspace(0, 0.9, 11)})
