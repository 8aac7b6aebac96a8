"""Parts of the time axis: grids with their bounds, piecewise steps, trajectories of a Gaussian flow, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import correction, oracles, sampling
from fmjax.sampling import grids
from fmjax.straightening import segments

BOUNDS = (0.0, 0.5, 1.0)
LAW = oracles.gaussian(jnp.array([0.75, -0.5]), jnp.array([0.5, 1.5]))


def test_a_grid_has_its_steps_in_each_segment_and_holds_the_bounds():
    ts = segments.segment_grid((0.0, 0.3, 0.7, 1.0), (1, 9, 2))
    assert len(ts) == 13 and {np.float32(b) for b in (0, 0.3, 0.7, 1)} <= set(ts)
    assert ((ts > np.float32(0.3)) & (ts < np.float32(0.7))).sum() == 8
    np.testing.assert_allclose(np.diff(ts)[1:10], 0.4 / 9, rtol=1e-5)
    np.testing.assert_array_equal(segments.segment_grid((0.0, 1.0), (4,)), grids.uniform_grid(4))


@pytest.mark.parametrize("n", [3, 10, 18, 40])
def test_bounds_are_points_of_the_teachers_grid(n):
    """The original stored the state a step late: here the index points to the bound, to the bit."""
    bounds = (0.0, 0.3, 0.5, 1.0)
    ts, at = segments.inserted(grids.uniform_grid(n), bounds)
    np.testing.assert_array_equal(ts[list(at)], np.float32(bounds))
    assert (np.diff(ts) > 0.05 / n).all() and len(ts) <= n + 3


def test_a_piecewise_step_takes_the_segment_where_each_example_starts():
    add = lambda a: lambda x, s, t, cond=None, key=None: x + a * (t - s)[:, None]
    step = segments.piecewise([add(1.0), add(10.0)], BOUNDS)
    s = jnp.array([0.0, 0.49, 0.5, 0.9])
    np.testing.assert_allclose(step(jnp.zeros((4, 1)), s, s + 0.1)[:, 0], [0.1, 0.1, 1.0, 1.0], rtol=1e-5)


def test_one_step_for_all_segments_is_that_step_to_the_bit():
    """Gated with nothing straightened is the teacher."""
    x0, ts = jax.random.normal(jax.random.key(0), (32, 2)), segments.segment_grid(BOUNDS, (3, 5))
    euler = sampling.euler(LAW.velocity)
    ours = sampling.sample(segments.piecewise([euler, euler], BOUNDS), x0, ts)
    np.testing.assert_array_equal(ours, sampling.sample(euler, x0, ts))


def test_a_step_that_nobody_takes_is_not_computed():
    calls = []

    def counted(name):
        def step(x, s, t, cond=None, key=None):
            jax.debug.callback(lambda: calls.append(name))
            return x

        return step

    step = segments.piecewise([counted("early"), counted("late")], BOUNDS)
    jax.block_until_ready(
        jax.jit(lambda x: sampling.sample(step, x, segments.segment_grid(BOUNDS, (2, 3))))(jnp.zeros((4, 1)))
    )
    jax.effects_barrier()
    assert sorted(calls) == ["early"] * 2 + ["late"] * 3


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories")
    ts, at = segments.inserted(grids.uniform_grid(20), (0.0, 0.45, 1.0))
    settings = {"flow": "gaussian", "direction": "forward", "count": 256, "shape": (2,), "steps": at}
    correction.build_marginals(lambda params: LAW.velocity, {}, ts, directory=folder, **settings)
    return correction.read_marginals(folder)


def test_batches_hold_the_states_of_one_trajectory_at_the_bounds(trajectories):
    """``x1`` is the exact flow of ``x0`` over its segment, to the teacher's solver."""
    batch = segments.segment_batches(trajectories, (0.0, 0.45, 1.0), batch_size=512, seed=0)(3)
    ends = np.where(batch.t == 0, np.float32(0.45), np.float32(1))
    assert set(np.unique(batch.t)) == {np.float32(0), np.float32(0.45)}
    np.testing.assert_allclose(batch.x1, LAW.flow_map(jnp.asarray(batch.x0), batch.t, ends), atol=1e-4)
    assert abs((batch.t == 0).mean() - 0.5) < 3 * 0.5 / np.sqrt(512)


def test_kept_segments_get_noised_real_data_in_a_fraction_of_the_batch(trajectories):
    real = np.full((10, 2), 5, np.float32)
    make = lambda step: segments.segment_batches(
        trajectories, (0.0, 0.45, 1.0), batch_size=4096, seed=0, keep=(1,), real=real, kept_fraction=0.25
    )(step)
    batch = make(0)
    kept = batch.t >= np.float32(0.45)
    assert kept.sum() == 1024 and (batch.t[~kept] == 0).all()
    t, x = batch.t[kept][:, None], batch.x1[kept]
    z = (x - 5 * t) / np.maximum(1 - t, 1e-3)
    z = z[t[:, 0] < 0.99]
    assert abs(z.mean()) < 4 / np.sqrt(z.size) and abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
    assert t.min() < 0.46 and t.max() > 0.99
    again = make(0)
    assert all(np.array_equal(a, b) for a, b in zip(batch, again, strict=True) if a is not None)
    assert not np.array_equal(batch.x1, make(1).x1)
    assert np.bincount(np.flatnonzero(kept) * 8 // 4096).tolist() == [128] * 8  # equal fractions for eight devices


def test_straightness_of_the_gaussian_flow_is_its_closed_form():
    """Of a line it is 0. Of ``v = x``, ``x_r = e^r x``: ``int e^{2r} / (e - 1)^2 - 1``, at Euler's order."""
    x = jax.random.normal(jax.random.key(1), (512, 2))
    line = lambda x, t, cond=None: jnp.ones_like(x)
    assert float(segments.segment_straightness(line, x, 0.2, 0.7)) < 1e-10
    exact = (np.e**2 - 1) / 2 / (np.e - 1) ** 2 - 1
    grow = lambda x, t, cond=None: x
    error = [abs(float(segments.segment_straightness(grow, x, 0.0, 1.0, steps=n)) - exact) for n in (64, 128)]
    assert error[0] < 0.05 * exact and 1.8 < error[0] / error[1] < 2.2


def test_the_jump_at_a_bound_is_the_mean_square_difference():
    x = jax.random.normal(jax.random.key(1), (512, 2))
    jumped = segments.velocity_jump(lambda x, t, cond=None: x, lambda x, t, cond=None: x + t[:, None], x, 0.5)
    np.testing.assert_allclose(jumped, 0.25, rtol=1e-5)


def test_what_cannot_work_is_refused(trajectories):
    with pytest.raises(ValueError, match=r"counts=\(1,\).*2 segments"):
        segments.segment_grid(BOUNDS, (1,))
    with pytest.raises(ValueError, match=r"bounds=\(0.0, 0.5, 1.0\).*from 0 to 0.9"):
        segments.inserted(grids.uniform_grid(4, stop=0.9), BOUNDS)
    with pytest.raises(ValueError, match="steps=1 steps.*2 segments"):
        segments.piecewise([sampling.euler(LAW.velocity)], BOUNDS)
    with pytest.raises(ValueError, match="bounds=0.5"):
        segments.segment_batches(trajectories, BOUNDS, batch_size=8, seed=0)
    with pytest.raises(ValueError, match=r"keep=\(1,\)"):
        segments.segment_batches(trajectories, (0.0, 0.45, 1.0), batch_size=8, seed=0, keep=(1,))
