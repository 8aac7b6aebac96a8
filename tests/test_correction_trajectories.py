"""Marginals of flow maps, network evaluations as they are counted, straightness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_correction_marginals import EPS, MLP, SCALED, build_read, data, kl, mlp, small, spread

from fmjax import correction, sampling
from fmjax.correction import marginals, trajectories
from fmjax.sampling import grids
from fmjax.storage import shards


def exact(eps):
    """The flow map of the scaling error: ``x`` times the ratio of its deviations."""
    deviation = lambda t: jnp.sqrt((1 - t) ** 2 + t**2 * 0.25)
    return lambda x, s, t, cond=None, key=None: x * (deviation(t) / deviation(s) * jnp.exp(eps * (t - s)))[:, None]


WAYS = {
    "forward": {"direction": "forward", "count": 2000, "shape": (4,)},
    "reverse": {"direction": "backward", "data": data(2000, 4)},
    "inverse": {"direction": "backward", "data": data(2000, 4), "backward_map": "inverse"},
}


def test_two_jumps_of_an_exact_map_have_the_marginals_of_its_flow(tmp_path):
    """The deviations are the same as with the velocity; backward jumps of a map that goes both ways are its inverse."""
    ts, result = grids.uniform_grid(2), {}
    for way, inputs in WAYS.items():
        result[way] = build_read(tmp_path / way, exact, jnp.float32(EPS), ts, solver="flow_map", **inputs)
        start = 0 if way == "forward" else -1
        expected = spread(ts) * np.exp(EPS * (ts - ts[start]))
        std = np.sqrt((result[way].x ** 2).mean((0, 2)))
        np.testing.assert_allclose(std / std[start], expected / expected[start], rtol=2e-5)
    np.testing.assert_allclose(result["inverse"].x, result["reverse"].x, atol=2e-6)
    assert result["inverse"].manifest.solver == "flow_map" and result["inverse"].manifest.backward_map == "inverse"
    constant = kl(result["forward"], result["inverse"])
    np.testing.assert_allclose(constant, constant[0], rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_jumps_that_are_euler_steps_are_those_of_the_euler_solver(tmp_path, way):
    """Forward, ``X_{t,s}`` and the inverse of ``X_{s,t}``, of which the last two differ."""
    inputs = {name: value[:64] if name == "data" else value for name, value in WAYS[way].items()}
    inputs |= {"count": 64} if way == "forward" else {}
    params, ts = {"a": MLP["a"][:4], "b": MLP["b"][:, :4]}, grids.uniform_grid(3)
    jump = build_read(tmp_path / "map", lambda p: sampling.euler(mlp(p)), params, ts, solver="flow_map", **inputs)
    step = build_read(tmp_path / "step", mlp, params, ts, solver="euler", **inputs)
    np.testing.assert_allclose(jump.x, step.x, atol=2e-6)
    if way == "inverse":
        start = jnp.asarray(step.x[:, 0])
        for n in range(3):
            start = sampling.euler(mlp(params))(start, ts[n], ts[n + 1])
        np.testing.assert_allclose(start, step.x[:, -1], atol=2e-6)


def test_a_jump_with_an_inverse_is_inverted_and_another_is_refused(tmp_path):
    """One jump that stretches by 4 and by 0.1, where the plain fixed point diverges and creeps; one that saturates."""
    scale = jnp.array([4.0, 0.1, 1.0])
    stretch = lambda params: lambda x, s, t, cond=None, key=None: x * scale ** (t - s)[:, None]
    options = {"direction": "backward", "count": None, "shape": None, "solver": "flow_map", "ts": grids.uniform_grid(1)}
    options |= {"data": data(90, 3), "backward_map": "inverse"}
    small(tmp_path / "a", velocity=stretch, **options)
    np.testing.assert_allclose(correction.read_marginals(tmp_path / "a").x[:, 0], data(90, 3) / scale, atol=1e-4)
    trip = {"solver": "flow_map", "backward_map": "inverse"}
    assert correction.round_trip(stretch, 0.0, jnp.asarray(data(90, 3)), grids.uniform_grid(1), **trip) < 1e-5
    far = data(90, 3)
    far[[37, 41]] = 20
    saturated = lambda params: lambda x, s, t, cond=None, key=None: 5 * jnp.tanh(x / 5)
    with pytest.raises(RuntimeError, match="inverse steps did not converge in examples 37, 41: .* a larger tol"):
        small(tmp_path / "b", velocity=saturated, **options | {"data": far})
    with pytest.raises(ValueError, match="flow map of x .*shape"):
        small(tmp_path / "c", velocity=lambda p: lambda x, s, t, cond=None, key=None: x[:, :2], **options)


def counted(view, calls):
    def counting(params):
        def bound(x, *args, **kwargs):
            jax.debug.callback(lambda: calls.append(0))
            return view(params)(x, *args, **kwargs)

        return bound

    return counting


@pytest.mark.parametrize(
    ("solver", "direction", "backward_map"),
    [
        ("rk4", "forward", "reverse"),
        ("heun", "backward", "reverse"),
        ("Tsit5", "forward", "reverse"),
        ("Bosh3", "backward", "reverse"),
        ("rk4", "backward", "inverse"),
        ("flow_map", "forward", "reverse"),
        ("flow_map", "backward", "reverse"),
        ("flow_map", "backward", "inverse"),
    ],
)
def test_the_counted_evaluations_are_those_that_are_made(solver, direction, backward_map):
    calls, ts = [], grids.uniform_grid(3)
    view = counted(exact if solver == "flow_map" else SCALED, calls)
    options = {"direction": direction, "solver": solver, "backward_map": backward_map}
    run = jax.jit(lambda eps, x: trajectories.carry(view(eps), x, ts, **options))
    jax.block_until_ready(run(jnp.float32(EPS), jnp.ones((2, 4))))
    jax.effects_barrier()
    assert len(calls) == trajectories.solve_nfe(3, **options)


def test_the_cost_of_a_set_is_estimated_before_it_is_built(tmp_path):
    """Bytes from above, within two blocks a shard, for records small and large; evaluations; none if unknown."""
    zero, still = lambda params: lambda x, t, cond=None: 0 * x, lambda params: lambda x, s, t, cond=None, key=None: x
    for view, solver, nfe, shape, count, shard_size, steps in (
        (zero, "rk4", 12, (2,), 90, 32, None),
        (still, "flow_map", 3, (16, 16, 3), 300, 128, (0, 3)),
        (still, "flow_map", 3, (3000,), 40, 7, None),
    ):
        options = {"direction": "forward", "count": count, "shape": shape, "shard_size": shard_size, "steps": steps}
        options |= {"solver": solver}
        estimate = correction.estimate_cost(view, 0.0, grids.uniform_grid(3), **options)
        folder = tmp_path / str(count)
        m = correction.build_marginals(view, 0.0, grids.uniform_grid(3), directory=folder, flow="a", **options)
        size = sum((folder / shard.file).stat().st_size for shard in m.shards)
        assert size <= estimate.bytes <= size + 2 * shards.BLOCK * len(m.shards)
        assert (estimate.count, estimate.nfe, estimate.evaluations) == (count, nfe, nfe * count)
        assert estimate.seconds > 0
    options |= {"direction": "backward", "solver": "Kvaerno3"}
    assert correction.estimate_cost(zero, 0.0, grids.uniform_grid(3), **options)[2:] == (None, None, None)


def test_a_disk_without_space_for_missing_shards_is_refused(tmp_path, monkeypatch):
    estimate = correction.estimate_cost(
        SCALED, 0.1, grids.uniform_grid(4), direction="forward", count=90, shape=(3,), shard_size=32
    )
    room = {"free": estimate.bytes - 1}
    monkeypatch.setattr(marginals.shutil, "disk_usage", lambda path: type("Usage", (), room))
    never = lambda params: pytest.fail("solved")
    with pytest.raises(OSError, match=r"directory=.* need 0.000\d+ GB, 0.000\d+ GB are free"):
        small(tmp_path, velocity=never)
    assert not any(tmp_path.iterdir())
    room["free"] += 1
    small(tmp_path)
    (tmp_path / "shard-00001-of-00003.array_record").unlink()
    room["free"] = estimate.bytes // 2  # enough for one shard of three
    small(tmp_path)
    assert correction.read_marginals(tmp_path).x.shape == (90, 5, 3)
