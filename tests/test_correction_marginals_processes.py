"""Several processes build one set: each its shards, no file with two writers, whatever is killed and when."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from test_correction_marginals import data, small
from test_storage_shards import Crash, M, X, crashing_operations

from fmjax import correction
from fmjax.storage import shards

BACKWARD = {"direction": "backward", "count": None, "shape": None, "data": data(90, 3)}
SHARDS = [f"shard-{i:05d}-of-00006.array_record" for i in range(6)]


def stored(directory, m):
    """Return all examples of a set in memory."""
    return shards.StoredArray(directory, m).load()


def part(folder, i, processes, **changes):
    return small(folder, shard_size=16, process_index=i, process_count=processes, **changes)


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).glob("shard-*.array_record")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    part(folder, 0, 1)
    return folder


@pytest.mark.parametrize("order", [(0, 1), (2, 0, 1), (3, 2, 1, 0, 6, 5, 4)])  # the last: one process too many
def test_processes_in_any_order_make_the_files_of_one(alone, tmp_path, order):
    """A set is unfinished until the last has returned; the last one's manifest names all shards."""
    seen, sizes = [], {}
    for i in order:
        assert len(list(tmp_path.glob("manifest*"))) == len({*seen} - {6})  # the seventh has nothing to name
        if i < 6 and seen:
            with pytest.raises(RuntimeError, match=f"unfinished: .* first {SHARDS[min({*order} - {*seen})]}"):
                correction.read_marginals(tmp_path)
        m = part(tmp_path, i, len(order), progress=lambda done, total, i=i: sizes.__setitem__(i, (done, total)))
        seen.append(i)
    assert contents(tmp_path) == contents(alone)
    assert sum(total for _, total in sizes.values()) == 90 and all(done == total for done, total in sizes.values())
    result = correction.read_marginals(tmp_path)
    np.testing.assert_array_equal(result.x, correction.read_marginals(alone).x)
    assert m == result.manifest


def test_a_complete_share_solves_nothing_and_others_are_left_alone(tmp_path):
    def no_velocity(params):
        raise AssertionError("solved again")

    part(tmp_path, 1, 2, **BACKWARD)
    m = part(tmp_path, 1, 2, velocity=no_velocity, **BACKWARD)
    assert [shard.file for shard in m.shards] == SHARDS[1::2]
    with pytest.raises(ValueError, match="process_index=2.*process_count=2"):
        part(tmp_path, 2, 2, **BACKWARD)
    with pytest.raises(ValueError, match="flow: 'a' stored, 'b' requested"):
        part(tmp_path, 0, 2, flow="b", **BACKWARD)


def test_manifests_of_two_sets_in_one_folder_are_refused(alone, tmp_path):
    """Two processes that began at the same moment with different flows."""
    m = correction.read_marginals(alone).manifest
    shards.write_manifest(tmp_path, m, {}, process_index=0, process_count=2)
    shards.write_manifest(tmp_path, m._replace(flow="b"), {}, process_index=1, process_count=2)
    with pytest.raises(ValueError, match="flow: 'b' stored, 'a' requested"):
        correction.read_marginals(tmp_path)


def write_part(folder, i, count, x=X):
    """``build`` without the solve: four examples a shard of ten."""
    names = shards.own(M, i, count)
    good = shards.resume(folder, M, names)
    shards.write_manifest(folder, M, good, process_index=i, process_count=count)
    for name, (start, stop) in names.items():
        if name not in good:
            good[name] = shards.write_shard(folder, name, (example.tobytes() for example in x[start:stop]))
            shards.write_manifest(folder, M, good, process_index=i, process_count=count)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_any_file_operation_loses_one_unfinished_shard(tmp_path, monkeypatch, when):
    """The other process ends unharmed; the same or another number of processes goes on to the same set."""
    for at in range(1, 100):
        folder = tmp_path / str(at)
        with crashing_operations(monkeypatch, when, at):
            try:
                write_part(folder, 0, 2)
                break
            except Crash:
                pass
        write_part(folder, 1, 2)
        m = shards.read_manifest(folder)
        assert SHARDS[1].replace("06", "03") in {shard.file for shard in m.shards}
        if len(m.shards) < 3:
            with pytest.raises(RuntimeError, match="unfinished"):
                shards.StoredArray(folder, m).load()
        now = random.Random(at).choice([2, 1, 3])
        for i in range(now):
            write_part(folder, i, now)
        np.testing.assert_array_equal(shards.StoredArray(folder, shards.read_manifest(folder)).load(), X)
    assert at > 20


def test_a_shard_that_was_built_twice_is_the_one_on_disk(tmp_path):
    """Other numbers for it, as of another machine: two manifests name it, and either file is whole."""
    for i in range(2):
        write_part(tmp_path, i, 2)
    name = next(iter(shards.own(M, 1, 2)))
    first = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(first[:-1])
    write_part(tmp_path, 0, 1, X + 1)
    assert len(shards.read_manifest(tmp_path).shards) == 4
    np.testing.assert_array_equal(
        stored(tmp_path, shards.read_manifest(tmp_path))[3:9], np.r_[X[3:4], X[4:8] + 1, X[8:9]]
    )
    (tmp_path / name).write_bytes(first)
    np.testing.assert_array_equal(stored(tmp_path, shards.read_manifest(tmp_path)), X)
    (tmp_path / name).write_bytes(first[:-1])
    with pytest.raises(RuntimeError, match=f"{name} is torn or was changed .*not \\w+, \\w+"):
        stored(tmp_path, shards.read_manifest(tmp_path))


def test_processes_at_the_same_time(tmp_path):
    for n in range(30):
        threads = [threading.Thread(target=write_part, args=(tmp_path / str(n), i, 3)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        np.testing.assert_array_equal(stored(tmp_path / str(n), shards.read_manifest(tmp_path / str(n))), X)


def test_a_process_that_looks_while_another_starts_is_not_misled(tmp_path, monkeypatch):
    """The other's manifest and shard come just after this one found no manifest."""
    real, calls = shards.read_manifest, []

    def load(folder):
        result = real(folder)
        calls.append(result)
        if len(calls) == 1:
            write_part(folder, 1, 2)
        return result

    monkeypatch.setattr(shards, "read_manifest", load)
    write_part(tmp_path, 0, 2)
    assert calls[0] is None
    np.testing.assert_array_equal(stored(tmp_path, real(tmp_path)), X)


CHILD = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from fmjax import correction
from fmjax.training import sharding
sharding.start()
import jax
import test_correction_marginals as t
assert jax.process_count() == 2 and jax.device_count() == 2
kill = lambda done, total: done == {at} and os.kill(os.getpid(), signal.SIGKILL)
# the mesh of all processes, parameters on all of it, one device each
mesh = sharding.make_mesh()
params = jax.make_array_from_callback((), sharding.replicated(mesh), lambda _: t.np.float32(0.1))
t.correction.build_marginals(
    lambda eps: t.sampling.euler(t.SCALED(eps)), params, t.grids.uniform_grid(4), directory={folder!r},
    direction="forward", flow="a", count=90, shape=(3,), solver="flow_map", batch=16, shard_size=16, mesh=mesh,
    progress=kill,
)
sys.stdin.read()  # the first one is what the other is connected to: it stays until its input is closed
os._exit(0)  # without waiting for the other, which may be dead
"""


@pytest.mark.slow
def test_two_real_processes_killed_in_turn_end_with_the_files_of_one(alone, tmp_path):
    """jax.distributed on loopback; SIGKILL of the one in its second shard, then in its last, then a whole run."""
    tests = Path(__file__).parent

    def pair(*at):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        names = {"FMJAX_DISTRIBUTED": "1", "FMJAX_COORDINATOR": f"127.0.0.1:{port}", "FMJAX_PROCESSES": "2"}
        names |= {"XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
        started = []
        for i in range(2):
            code = CHILD.format(root=str(tests.parent), tests=str(tests), folder=str(tmp_path), at=at[i])
            env = os.environ | names | {"FMJAX_PROCESS": str(i)}
            pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([sys.executable, "-c", code], env=env, **pipes))
        try:
            ends = [p.communicate(timeout=240)[1][-2000:] for p in reversed(started)]
            return [p.returncode for p in started], ends
        finally:
            for p in started:
                p.kill()

    status, ends = pair(None, 32)
    assert status == [0, -signal.SIGKILL], ends
    result = {shard.file for shard in shards.read_manifest(tmp_path).shards}
    assert result == {*SHARDS[::2], SHARDS[1]}
    status, ends = pair(None, 42)
    assert status == [0, -signal.SIGKILL], ends
    (tmp_path / SHARDS[2]).unlink()
    status, ends = pair(None, None)
    assert status == [0, 0], ends
    assert contents(tmp_path) == contents(alone)
    np.testing.assert_array_equal(correction.read_marginals(tmp_path).x, correction.read_marginals(alone).x)
