"""Grids fitted to a teacher, against exact integrals and every other choice."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from fmjax import oracles, sampling
from fmjax.sampling import grid_search, grids

STD = 0.2


def bend(t):
    """``d^2/dt^2`` of ``sqrt(C_t)``, ``C = (1 - t)^2 + STD^2 t^2``: trajectories of N(0, STD^2) are multiples of it."""
    c, c1, c2 = (1 - t) ** 2 + STD**2 * t**2, -2 * (1 - t) + 2 * STD**2 * t, 2 + 2 * STD**2
    return c2 / (2 * np.sqrt(c)) - c1**2 / (4 * c**1.5)


@pytest.fixture(scope="module")
def teacher():
    law = oracles.gaussian(jnp.zeros(2), STD)
    ts, z = grids.uniform_grid(200), jax.random.normal(jax.random.key(0), (512, 2))
    return law, ts, jax.vmap(lambda t: law.flow_map(z, 0.0, t))(jnp.asarray(ts)), np.asarray(z)


def test_curvature_is_the_squared_second_derivative_of_trajectories(teacher):
    law, ts, xs, z = teacher
    want = bend(ts.astype(float)) ** 2 * np.mean((z**2).sum(1))
    np.testing.assert_allclose(sampling.curvature(law.velocity, xs, ts), want, rtol=1e-3)


def test_steps_of_an_even_grid_have_equal_parts(teacher):
    law, ts, xs, _ = teacher
    found = sampling.curvature(law.velocity, xs, ts)
    for power, density in ((1.0, lambda t: bend(t) ** 2), (0.25, lambda t: np.sqrt(abs(bend(t))))):
        grid = sampling.even_grid(7, ts, found**power)
        shares = np.array([integrate.quad(density, a, b)[0] for a, b in itertools.pairwise(grid)])
        np.testing.assert_allclose(shares, shares.mean(), rtol=0.02)  # the teacher has 200 steps
        assert (grid[0], grid[-1], len(grid)) == (0, 1, 8)
    start = xs[0]
    miss = lambda grid: float(jnp.abs(sampling.sample(sampling.euler(law.velocity), start, grid) - xs[-1]).mean())
    assert miss(sampling.even_grid(7, ts, found**0.25)) < miss(grids.uniform_grid(7))


def test_a_straight_flow_gets_even_times_and_bad_densities_are_refused():
    np.testing.assert_allclose(sampling.even_grid(4, [0, 0.3, 1], np.zeros(3)), grids.uniform_grid(4), atol=1e-7)
    falling = sampling.even_grid(2, [1.0, 0.5, 0.0], np.array([0.0, 1.0, 2.0]))
    assert falling[0] == 1 and falling[-1] == 0 and falling[1] < 0.5
    for density in (np.ones(2), np.array([1, -1, 1]), np.array([1, np.nan, 1])):
        with pytest.raises(ValueError, match="density="):
            sampling.even_grid(4, [0, 0.3, 1], density)
    with pytest.raises(ValueError, match="n=0: "):
        sampling.even_grid(0, [0, 1], np.ones(2))


def every_path(costs, n, growth, through=()):
    """The least total and its indices over all subsets of inner points."""
    last = len(costs) - 1
    found = []
    for inner in itertools.combinations(range(1, last), n - 1):
        index = (0, *inner, last)
        if set(through) <= set(index):
            found.append((sum(growth**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise(index))), index))
    return min(found)


@pytest.mark.parametrize("growth", [0.7, 1.0, 1.15])
@pytest.mark.parametrize("through", [(), (4,), (2, 6)])
def test_dynamic_programming_finds_the_best_of_all_subsets(growth, through):
    rng = np.random.default_rng(0)
    for _ in range(5):
        costs = rng.normal(1, 1, (10, 10))  # some negative, as GITS's may be
        for n in range(len(through) + 1, 10):
            total, index = every_path(costs, n, growth, through)
            got = sampling.best_steps(costs, n, growth=growth, through=through)
            assert got == index, (total, n)
            counts = sampling.steps_per_segment(got, through)
            edges = (0, *through, 9)
            assert counts == tuple(sum(a <= i < b for i in got[:-1]) for a, b in itertools.pairwise(edges))


def test_what_dynamic_programming_cannot_do_is_refused():
    costs = np.ones((5, 5))
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"n={n}: .*1 to 4"):
            sampling.best_steps(costs, n)
    with pytest.raises(ValueError, match=r"n=2: .*\(1, 2\).*3 to 4"):
        sampling.best_steps(costs, 2, through=(1, 2))
    with pytest.raises(ValueError, match=r"through=\(9,\): "):
        sampling.best_steps(costs, 3, through=(9,))
    with pytest.raises(ValueError, match="growth=0.0: "):
        sampling.best_steps(costs, 2, growth=0.0)
    for bad in (np.ones((4, 5)), np.full((5, 5), np.nan)):
        with pytest.raises(ValueError, match=r"costs=\("):
            sampling.best_steps(bad, 2)
    with pytest.raises(ValueError, match="cost='chrod'.*chord"):
        sampling.jump_costs(lambda *a: a[0], jnp.zeros((3, 2, 1)), [0, 0.5, 1], cost="chrod")


def test_costs_are_those_of_single_jumps_and_cost_one_evaluation_a_time(key, x64):
    """In state space of three coordinates, written out for every pair."""
    law = oracles.mixture(jnp.array([[2.0, 0.5, 0], [-1.5, 1, 1], [0.3, -2, -1]]), 0.3)
    seen = []

    def velocity(x, t, cond=None):
        jax.debug.callback(lambda: seen.append(1))
        return law.velocity(x, t)

    ts = np.array([0.0, 0.2, 0.5, 0.8, 1.0])
    xs = sampling.sample(sampling.rk4(law.velocity), jax.random.normal(key, (4, 3)), ts, trajectory=True)
    step = sampling.ddim(velocity)
    got = {cost: sampling.jump_costs(step, xs, ts, cost=cost) for cost in grid_search.COSTS}
    jax.effects_barrier()
    assert len(seen) == 2 * len(ts)
    direction = (xs[-1] - xs[0]) / np.linalg.norm(xs[-1] - xs[0], axis=1, keepdims=True)

    def off(x):
        return np.linalg.norm(np.cross(x - xs[0], direction), axis=1)

    for i, j in itertools.product(range(5), range(5)):
        if j <= i:
            assert got["chord"][i, j] == got["distance"][i, j] == np.inf
            continue
        s, t = ts[[i, j]]
        jump = xs[i] + (t - s) * law.velocity(xs[i], s)
        np.testing.assert_allclose(got["distance"][i, j], np.linalg.norm(jump - xs[j], axis=1).mean(), rtol=1e-7)
        np.testing.assert_allclose(got["chord"][i, j], (off(jump) - off(xs[j])).mean(), rtol=1e-6, atol=1e-9)


def test_the_best_steps_of_a_teacher_beat_its_even_ones(key):
    """Paired end-point error of DDIM on a mixture, six steps, by both costs."""
    law = oracles.mixture(jnp.array([[1.0, 0.2], [-0.7, 0.5], [0.1, -1.0]]), 0.15)
    ts = grids.edm_grid(40)
    x0 = (1 - ts[0]) * jax.random.normal(key, (256, 2))
    xs = jax.jit(lambda x: sampling.sample(sampling.edm_heun(law.velocity), x, ts, trajectory=True))(x0)
    step = sampling.ddim(law.velocity)
    miss = lambda grid: float(
        jnp.linalg.norm(jax.jit(lambda x: sampling.sample(step, x, grid))(x0) - xs[-1], axis=1).mean()
    )
    plain = miss(grids.edm_grid(6))
    for cost in grid_search.COSTS:
        best = sampling.best_steps(sampling.jump_costs(step, xs, ts, cost=cost), 6, growth=1.15)
        assert miss(ts[list(best)]) < 0.9 * plain
