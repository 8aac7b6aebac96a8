"""Marginals of known flows against their closed forms, through the real files; kills, damage and other sets."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from fmjax import correction, oracles, sampling
from fmjax.correction import trajectories
from fmjax.keys import example_keys, normal
from fmjax.sampling import grids
from fmjax.storage import files, shards

S = 0.5  # the data are N(0, S^2 I) unless said otherwise
EPS = 0.3
FILE = "shard-00001-of-00003.array_record"


def wrong(error):
    """The exact velocity of ``N(0, S^2 I)`` plus an error field: every marginal has a closed form."""
    return lambda params: lambda x, t, cond=None: oracles.gaussian(0.0, S).velocity(x, t) + error(params, x)


SCALED = wrong(lambda eps, x: eps * x)
SHIFTED = wrong(lambda b, x: b)


def spread(t):
    """The standard deviation of ``I_t``."""
    return np.sqrt((1 - t) ** 2 + t**2 * S**2)


def data(m, *shape):
    return S * np.random.default_rng(1).standard_normal((m, *shape)).astype(np.float32)


def build_read(directory, *args, **kwargs):
    correction.build_marginals(*args, directory=directory, flow="a", **kwargs)
    return correction.read_marginals(directory)


def small(directory, velocity=SCALED, params=0.1, ts=None, **changes):
    """90 examples in 3 shards of 32, 32 and 26, in batches of 16: the last one is padded.

    Without ``solver`` in ``changes``, Euler steps of the velocity as a flow map, which compile fast.
    """
    view = velocity if "solver" in changes else lambda params: sampling.euler(velocity(params))
    options = {"direction": "forward", "flow": "a", "count": 90, "shape": (3,), "solver": "flow_map", "batch": 16}
    options = options | {"shard_size": 32} | changes
    ts = grids.uniform_grid(4) if ts is None else ts
    return correction.build_marginals(view, jnp.float32(params), ts, directory=directory, **options)


def contents(directory):
    return {p.name: p.read_bytes() for p in sorted(Path(directory).iterdir())}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reference")
    small(directory)
    return contents(directory)


@pytest.fixture
def built(reference, tmp_path):
    """A fresh copy of the small set."""
    for name, content in reference.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.fixture(scope="module")
def gaussians(tmp_path_factory):
    """Forward, reverse and inverse marginals of the scaling error on a coarse Euler and a fine RK4 grid."""
    m, d, sets = 2000, 4, {}
    for solver, n in (("euler", 8), ("rk4", 20)):
        options = {"ts": grids.uniform_grid(n), "solver": solver, "direction": "backward", "data": data(m, d)}
        ways = {"forward": {"direction": "forward", "count": m, "shape": (d,), "data": None}}
        for way, more in (ways | {"reverse": {}, "inverse": {"backward_map": "inverse"}}).items():
            directory = tmp_path_factory.mktemp(way)
            sets[solver, way] = build_read(directory, SCALED, jnp.float32(EPS), **options | more)
    return sets


@pytest.mark.parametrize("way", ["forward", "reverse", "inverse"])
def test_scaling_error(gaussians, way):
    """std of p_t is sqrt(V_t) e^{eps t}, of q_t sqrt(V_t) e^{-eps (1 - t)}, at every step.

    The flow is linear, so that the ratio of two sample deviations along the trajectories is exact up to the solver.
    """
    result = gaussians["rk4", way]
    m, steps, d = result.x.shape
    ts, start = grids.uniform_grid(20), 0 if way == "forward" else -1
    assert steps == 21
    np.testing.assert_array_equal(result.ts, np.float32(ts))
    exact = spread(ts) * np.exp(EPS * (ts - ts[start]))
    std = np.sqrt((result.x**2).mean((0, 2)))
    assert np.abs(np.log(std / exact)).max() < 4.5 / np.sqrt(2 * m * d)
    np.testing.assert_allclose(std / std[start], exact / exact[start], rtol=2e-5)
    if way != "forward":
        np.testing.assert_array_equal(result.x[:, -1], data(m, d))


def test_shift_error(tmp_path):
    """m^f_t = b sqrt(V_t) int_0^t V_r^{-1/2} dr and m^b_t = -b sqrt(V_t) int_t^1 V_r^{-1/2} dr."""
    from scipy.integrate import quad

    m, ts, b = 2000, grids.uniform_grid(20), np.array([1.0, -0.5], np.float32)
    p = build_read(tmp_path / "p", SHIFTED, jnp.asarray(b), ts, direction="forward", count=m, shape=(2,))
    q = build_read(tmp_path / "q", SHIFTED, jnp.asarray(b), ts, direction="backward", data=data(m, 2))
    v = spread(ts)[:, None]
    time = np.array([[quad(lambda r: 1 / spread(r), 0, t)[0]] for t in ts])
    for result, exact, start in ((p, b * v * time, 0), (q, -b * v * (time[-1] - time), -1)):
        mean = result.x.mean(0)
        assert np.abs((mean - exact) * np.sqrt(m) / v).max() < 4.5
        np.testing.assert_allclose(mean, exact + mean[start] * v / v[start], atol=2e-5)


def kl(p, q):
    """KL of the centred isotropic Gaussians fitted to ``p`` and ``q: [M, steps, d]``, per step."""
    r2 = (p.x**2).mean((0, 2)) / (q.x**2).mean((0, 2))
    return p.x.shape[-1] * (r2 - 1 - np.log(r2)) / 2


def test_inverse_keeps_the_divergence(gaussians):
    """KL(p_n || q_n) is one number for all n when backward steps invert forward ones, whatever the solver's error.

    On a fine grid it is ``d ((e^{2 eps} - 1) / 2 - eps)``. Reverse steps of a coarse Euler solver do not keep it.
    """
    for solver in ("euler", "rk4"):
        constant = kl(gaussians[solver, "forward"], gaussians[solver, "inverse"])
        np.testing.assert_allclose(constant, constant[0], rtol=1e-4)
    assert np.ptp(kl(gaussians["euler", "forward"], gaussians["euler", "reverse"])) > 0.05 * constant[0]
    m, _, d = gaussians["rk4", "forward"].x.shape
    r = np.exp(EPS)
    error = d * (r - 1 / r) * r / np.sqrt(m * d)  # of the sample's KL, through the error of the ratio of deviations
    assert np.abs(constant - d * ((r**2 - 1) / 2 - EPS)).max() < 4 * error


def test_record_is_the_example(tmp_path, built):
    """Record i is the trajectory of example i, whose noise is drawn from its own key; steps= stores columns of it."""
    ts = grids.uniform_grid(10)
    options = {"direction": "forward", "count": 90, "shape": (3,), "batch": 16, "shard_size": 32, "seed": 5}
    m = build_read(tmp_path / "exact", SCALED, jnp.float32(0), ts, **options)
    x0 = normal(example_keys(jax.random.key(5), jnp.arange(90)), (3,))
    np.testing.assert_array_equal(m.x[:, 0], x0)
    np.testing.assert_allclose(m.x, x0[:, None] * spread(ts)[:, None], rtol=1e-4, atol=1e-5)
    small(tmp_path / "some", steps=(4, 0, 3))
    part, full = correction.read_marginals(tmp_path / "some"), correction.read_marginals(built)
    np.testing.assert_array_equal(part.x, full.x[:, [0, 3, 4]])
    np.testing.assert_array_equal(part.ts, full.ts[[0, 3, 4]])


def mlp(params):
    """A velocity with matrices, so that the partitioner has something to gather."""
    return lambda x, t, cond=None: jnp.tanh(x @ params["a"] + t[:, None]) @ params["b"]


MLP = {"a": jax.random.normal(jax.random.key(1), (6, 32)) / 3, "b": jax.random.normal(jax.random.key(2), (32, 6)) / 6}
BACKWARD = {"direction": "backward", "data": data(90, 3), "count": None, "shape": None}
WAYS = {
    "forward": {"direction": "forward", "count": 90, "shape": (6,)},
    "reverse": {"direction": "backward", "data": data(90, 6)},
    "inverse": {"direction": "backward", "data": data(90, 6), "backward_map": "inverse"},
}


@pytest.mark.parametrize("way", WAYS)
def test_eight_devices(tmp_path, way, monkeypatch):
    """The same numbers on 1 and 8 devices, and no communication in the program."""
    lower, programs, result = trajectories.lower_solve, [], []
    monkeypatch.setattr(trajectories, "lower_solve", lambda *args: programs.append(lower(*args)) or programs[-1])
    for n in (1, 8):
        options = {"mesh": Mesh(np.array(jax.devices()[:n]), ("data",)), "batch": 32, "shard_size": 50} | WAYS[way]
        result.append(build_read(tmp_path / str(n), mlp, MLP, grids.uniform_grid(4), **options).x)
    np.testing.assert_allclose(*result, atol=2e-6)
    program = programs[1].compile().as_text()
    assert "num_partitions=8" in program
    for word in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "custom-call"):
        assert word not in program, f"{word} in the program of {way}"


CHILD = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import test_correction_marginals as t
kill = lambda done, total: done == 48 and os.kill(os.getpid(), signal.SIGKILL)
t.small({directory!r}, progress=kill)
"""


def test_killed_and_resumed(tmp_path, reference):
    """SIGKILL in the middle of the second shard: reading is refused, the build goes on, the bytes are the same."""
    tests = Path(__file__).parent
    code = CHILD.format(root=str(tests.parent), tests=str(tests), directory=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / f"{FILE}.tmp").exists()
    with pytest.raises(RuntimeError, match=f"unfinished: 2 of 3 shards.*{FILE}.*same build again"):
        correction.read_marginals(tmp_path)
    first = tmp_path / "shard-00000-of-00003.array_record"
    before, seen = first.stat().st_mtime_ns, []
    small(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert contents(tmp_path) == reference
    assert first.stat().st_mtime_ns == before
    assert seen == [(32, 90), (48, 90), (64, 90), (80, 90), (90, 90)]


def test_complete_set_solves_nothing(built, reference):
    def no_velocity(params):
        raise AssertionError("solved again")

    stamp = {p.name: p.stat().st_mtime_ns for p in built.iterdir()}
    m = small(built, velocity=no_velocity)
    assert m == correction.read_marginals(built).manifest
    assert stamp == {p.name: p.stat().st_mtime_ns for p in built.iterdir()}


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGE = {
    "one bit": (flip, "is torn or was changed"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "is torn or was changed"),
    "gone": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_shard(built, reference, damage, caplog):
    """Named and refused by read, named and rebuilt by build, alone."""
    harm, text = DAMAGE[damage]
    harm(built / FILE)
    with pytest.raises(RuntimeError, match=f"{FILE} {text}.*rebuilds this shard alone"):
        correction.read_marginals(built)
    seen = []
    small(built, progress=lambda done, total: seen.append(done))
    assert f"{FILE} {text}" in caplog.text
    assert contents(built) == reference
    assert seen == [58, 74, 90]


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"flow": "b"}, ["flow: 'a' stored, 'b' requested"]),
        ({"solver": "rk4"}, ["solver: 'flow_map' stored, 'rk4' requested"]),
        ({"ts": grids.uniform_grid(5)}, ["ts: ", "steps: "]),
        ({"ts": np.linspace(0, 1, 5) ** 2}, ["ts: "]),
        (
            {"seed": 1, "dtype": "float16"},
            ["seed: 0 stored, 1 requested", "dtype: 'float32' stored, 'float16' requested"],
        ),
        ({"count": 91}, ["count: "]),
        ({"shard_size": 16}, ["shard_size: "]),
        (
            {"direction": "backward", "data": data(90, 3), "count": None, "shape": None},
            ["direction: ", "data: ", "seed: "],
        ),
    ],
)
def test_other_set_is_refused(built, reference, changes, names):
    with pytest.raises(ValueError, match="another directory") as e:
        small(built, **changes)
    result = str(e.value)
    assert all(name in result for name in names) and result.count(" requested;") == len(result.split("; ")) - 2, result
    assert contents(built) == reference


def test_data_are_part_of_the_set(tmp_path):
    options = {"direction": "backward", "count": None, "shape": None}
    small(tmp_path, data=data(90, 3), **options)
    other = data(90, 3)
    other[17, 1] += 1e-3
    for changed, name in ((other, "data: "), (data(91, 3), "count: 90 stored, 91 requested")):
        with pytest.raises(ValueError, match=name):
            small(tmp_path, data=changed, **options)
    with pytest.raises(ValueError, match="backward_map: 'reverse' stored, 'inverse' requested"):
        small(tmp_path, data=data(90, 3), backward_map="inverse", **options)


def test_read_expects(built):
    expect = {"flow": "a", "solver": "flow_map", "ts": grids.uniform_grid(4), "steps": [0, 1, 2, 3, 4], "shape": [3]}
    assert correction.read_marginals(built, expect=expect).x.shape == (90, 5, 3)
    with pytest.raises(ValueError, match="flow: 'a' stored, 'b' requested; ts: .* requested"):
        correction.read_marginals(built, expect={"flow": "b", "solver": "flow_map", "ts": grids.uniform_grid(5)})
    with pytest.raises(ValueError, match="no field 'solvr'; did you mean 'solver'"):
        correction.read_marginals(built, expect={"solvr": "euler"})
    with pytest.raises(FileNotFoundError, match="directory=.*nowhere: no manifest.json"):
        correction.read_marginals(built / "nowhere")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ts": grids.uniform_grid(4)[::-1]}, r"ts=1 \.\. 0.*Give ts\[::-1\]"),
        ({"ts": [0.0, 0.5, 0.5, 1.0]}, "strictly"),
        ({"ts": [0.0, 0.5, 1.5]}, r"1\.5"),
        ({"steps": (0, 5)}, r"steps=\(0, 5\).* 0 \.\. 4"),
        ({"direction": "sideways"}, "direction='sideways'"),
        ({"direction": "backward"}, "direction='backward'.*Give data"),
        ({"direction": "backward", "data": np.zeros((9, 3), np.uint8), "count": None, "shape": None}, "data=uint8"),
        ({"data": data(9, 3)}, "direction='forward'.*no data"),
        (BACKWARD | {"start": lambda keys, shape: 0}, "direction='backward'.*no count, shape or start"),
        ({"start": lambda keys, shape: normal(keys, (2,))}, r"start=.*\(16, 2\).*\(16, 3\)"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16'"),
        ({"batch": 15, "mesh": Mesh(np.array(jax.devices()), ("data",))}, "batch=15.* 8 devices"),
        ({"mesh": Mesh(np.array(jax.devices()), ("x",))}, r"mesh axes=\('x',\)"),
        ({"solver": "rk5"}, "rk5.*rk4"),
        ({"velocity": lambda params: lambda x, t, cond=None: x[:, :2], "solver": "rk4"}, "velocity of x .*shape"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"cond": np.zeros(89, int)}, "cond rows=89.* 90 examples"),
        ({"cond": [0] * 90}, "cond=list"),
        ({"cond": np.array(["a"] * 90)}, "cond dtype=<U1"),
    ],
)
def test_bad_arguments_leave_no_file(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small(tmp_path, **changes)
    assert not any(tmp_path.iterdir())


def test_directory_that_cannot_be_used(built, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write to .*choose a directory"):
        small(tmp_path / "file")
    manifest = json.loads((built / "manifest.json").read_text())
    files.write_json(built / "manifest.json", {k: v for k, v in manifest.items() if k != files.SEAL} | {"version": 0})
    with pytest.raises(ValueError, match="format version 0"):
        correction.read_marginals(built)
    (built / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds shard-00000-of-00003.array_record but no manifest.json"):
        small(built)


def test_failed_solves_name_the_examples(tmp_path):
    """A bad example is named (padding is not), and what was done before it is kept."""
    x = data(90, 3)
    x[[37, 41]] = 20
    options = {"direction": "backward", "count": None, "shape": None, "data": x}
    broken = lambda params: lambda x, t, cond=None: jnp.where((x > 9).any(1, keepdims=True), jnp.nan, 0 * x)
    with pytest.raises(
        RuntimeError, match="has non-finite values at step [34] in examples 37, 41; check the parameters"
    ):
        small(tmp_path / "a", velocity=broken, **options)
    assert [s.count for s in shards.read_manifest(tmp_path / "a").shards] == [32]
    steep = lambda params: lambda x, t, cond=None: jnp.where((x > 9).any(1, keepdims=True), 8 * jnp.sin(9 * x), 0.1 * x)
    with pytest.raises(RuntimeError, match="did not converge in examples 37, 41: .* backward_map='reverse'"):
        small(tmp_path / "b", velocity=steep, solver="euler", backward_map="inverse", **options)
    with pytest.raises(RuntimeError, match="examples 37, 41; .*dtype='float32'"):
        small(tmp_path / "c", dtype="float16", **options | {"data": 10000 * x})


def test_half_precision(tmp_path, built):
    small(tmp_path / "half", dtype="float16")
    half, full = correction.read_marginals(tmp_path / "half"), correction.read_marginals(built)
    np.testing.assert_array_equal(half.x, full.x.astype(np.float16))


def test_straightness_defect(gaussians):
    """s_n = |(1 - t) + t c_1 - c_t| rms(x_0) where x_t = c_t x_0, and zero for constant motion."""
    m, ts = gaussians["rk4", "forward"], grids.uniform_grid(20)
    c = spread(ts) * np.exp(EPS * ts)
    exact = np.abs(1 - ts + ts * c[-1] - c) * np.sqrt((m.x[:, 0] ** 2).sum(-1).mean())
    np.testing.assert_allclose(correction.straightness_defect(m), exact, atol=1e-4)
    straight = m._replace(x=m.x[:, :1] + 2 * ts[:, None])
    np.testing.assert_allclose(correction.straightness_defect(straight), 0, atol=1e-5)
    part = m._replace(x=m.x[:, :5], ts=m.ts[:5], manifest=m.manifest._replace(steps=(0, 1, 2, 3, 4)))
    with pytest.raises(ValueError, match=r"steps=\(0, 1, 2, 3, 4\).*0 and 20"):
        correction.straightness_defect(part)
