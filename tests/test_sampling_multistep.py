"""Steps with a memory: their orders on EDM's grid, their published formulas, and how a sampler carries them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fmjax import oracles, paths, sampling
from fmjax.experiments import specs
from fmjax.sampling import grids
from fmjax.training import sharding

LAW = oracles.gaussian(jnp.array([0.3, -0.2]), jnp.array([0.5, 0.3]))
MIXTURE = oracles.mixture(jnp.array([[2.0, 0.5], [-1.5, 1.0], [0.3, -2.0]]), jnp.array([0.3, 0.4, 0.6]))
ORDERS = {
    "ddim": (1, sampling.ddim),
    "edm_heun": (2, sampling.edm_heun),
    "dpmpp_2s": (2, sampling.dpmpp_2s),
    "dpmpp_2m": (2, sampling.dpmpp_2m),
    "dpmpp_2m, heun": (2, lambda v: sampling.dpmpp_2m(v, solver_type="heun")),
    "dpmpp_3m as published": (2, sampling.dpmpp_3m),
    "dpmpp_3m": (3, lambda v: sampling.dpmpp_3m(v, exact=True)),
    **{f"unipc-{k}": (k + 1, lambda v, k=k: sampling.unipc(v, order=k)) for k in (1, 2, 3)},
    "unipc-2, bh1": (3, lambda v: sampling.unipc(v, order=2, solver_type="bh1")),
    **{f"ipndm-{k}": (k, lambda v, k=k: sampling.ipndm(v, order=k, even=False)) for k in (1, 2, 3, 4)},
    "ipndm-4 as published": (2, sampling.ipndm),
}
EACH = {n: getattr(sampling, n) for n in ("dpmpp_2m", "dpmpp_3m", "unipc", "ipndm", "initial_noise")}
each = pytest.mark.parametrize("make", EACH.values(), ids=EACH)


@pytest.mark.parametrize("name", ORDERS)
def test_every_deterministic_step_has_its_order_on_edms_grid(name, x64):
    """Down to ``sigma_min``; against the closed flow map of a Gaussian."""
    order, make = ORDERS[name]
    step, x = make(LAW.velocity), jnp.array([[1.0, -0.5], [0.2, 2.0]])

    def error(n):
        grid = grids.edm_grid(n + 1)[:-1].astype(float)
        end = jax.jit(lambda x: sampling.sample(step, x, grid))(x)
        return float(jnp.abs(end - LAW.flow_map(x, grid[0], grid[-1])).max())

    assert abs(np.log2(error(200) / error(400)) - order) < 0.15


def levels_and_states(step, grid, x):
    """``sigma`` and ``x / beta`` along a sample on the linear path."""
    xs = jax.jit(lambda x: sampling.sample(step, x, grid, trajectory=True))(x)
    return (1 - grid) / grid, xs / grid[:, None, None]


def test_dpm_solver_is_its_published_recursion(x64, key):
    """Algorithm 2 of arXiv 2211.01095 in ``lambda``, for a variance exploding path: alpha 1, noise sigma."""
    grid = grids.edm_grid(7).astype(float)
    sigma, y = levels_and_states(sampling.dpmpp_2m(MIXTURE.velocity), grid, jax.random.normal(key, (3, 2)))
    data = jax.jit(sampling.denoiser(MIXTURE.velocity))
    for i in range(1, 6):
        h, before = np.log(sigma[i] / sigma[i + 1]), np.log(sigma[i - 1] / sigma[i])
        r = before / h
        bent = (1 + 1 / (2 * r)) * data(y[i], sigma[i]) - data(y[i - 1], sigma[i - 1]) / (2 * r)
        np.testing.assert_allclose(y[i + 1], sigma[i + 1] / sigma[i] * y[i] - np.expm1(-h) * bent, rtol=1e-8)
    first = sigma[1] / sigma[0] * y[0] + (1 - sigma[1] / sigma[0]) * data(y[0], sigma[0])
    np.testing.assert_allclose(y[1], first, rtol=1e-8)
    np.testing.assert_allclose(y[7], data(y[6], sigma[6]), rtol=1e-8)


ADAMS = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@pytest.mark.parametrize("order", ADAMS)
def test_ipndm_has_the_weights_of_adams_and_bashforth_and_warms_up(order, x64, key):
    grid, x = grids.edm_grid(8).astype(float), jax.random.normal(key, (3, 2))
    sigma, y = levels_and_states(sampling.ipndm(MIXTURE.velocity, order=order), grid, x)
    data = jax.jit(sampling.denoiser(MIXTURE.velocity))
    slope = [(y[i] - data(y[i], sigma[i])) / sigma[i] for i in range(8)]
    for i in range(8):
        move = sum(w * slope[i - j] for j, w in enumerate(ADAMS[min(order, i + 1)]))
        np.testing.assert_allclose(y[i + 1], y[i] + (sigma[i + 1] - sigma[i]) * move, rtol=1e-8)
    even = 1 / (1 + np.linspace(8, 1, 6))  # equal steps in sigma, where both kinds of weights are one
    published, fitted = (
        sampling.sample(sampling.ipndm(MIXTURE.velocity, order=order, even=e), x, even) for e in (True, False)
    )
    np.testing.assert_allclose(fitted, published, atol=1e-6)  # even is float32's


@pytest.mark.parametrize("order", [2, 4])
def test_ipndm_counts_a_start_in_pure_noise_as_a_step(order, x64, key):
    """From t = 0 it is the limit of starts at large noise levels: its second step has the weights (3, -1) / 2."""
    x, rest = jax.random.normal(key, (3, 2)), np.linspace(0, 1, 6)[1:]
    run = jax.jit(lambda ts: sampling.sample(sampling.ipndm(MIXTURE.velocity, order=order), x, ts))
    np.testing.assert_allclose(*(run(jnp.concatenate([jnp.array([t]), rest])) for t in (0.0, 1e-9)), atol=1e-6)
    late = jax.jit(lambda ts: sampling.sample(sampling.ipndm(MIXTURE.velocity, order=1), x, ts))(np.array([0, *rest]))
    assert np.abs(late - run(jnp.array([0, *rest]))).max() > 0.01


def test_weights_of_uneven_steps_integrate_polynomials_exactly(x64):
    """A noise prediction that is a cubic of ``sigma`` is integrated without error, once four are known."""
    cubic = lambda sigma: 1 - sigma + 0.3 * sigma**2 - 0.05 * sigma**3
    grid = grids.edm_grid(9, sigma_min=0.1, sigma_max=5.0)[:-1].astype(float)

    def velocity(x, t, cond=None):  # x = t D + (1 - t) E, v = D - E
        noise = cubic((1 - t) / t)[:, None]
        return (x - noise) / t[:, None]

    sigma, y = levels_and_states(sampling.ipndm(velocity, even=False), grid, jnp.ones((1, 1)))
    whole = np.polynomial.Polynomial([1, -1, 0.3, -0.05]).integ()
    for i in range(8):
        exact = np.isclose(y[i + 1] - y[i], whole(sigma[i + 1]) - whole(sigma[i]), rtol=1e-9, atol=1e-12).all()
        assert exact == (i >= 3)


@each
def test_the_scan_compiles_one_step_and_asks_the_network_once_a_step(make, key):
    traces, seen = [], []

    def velocity(x, t, cond=None):
        traces.append(1)
        jax.debug.callback(lambda: seen.append(1))
        return MIXTURE.velocity(x, t)

    run = jax.jit(lambda x: sampling.sample(make(velocity), x, grids.edm_grid(12)))
    jax.block_until_ready(run(jax.random.normal(key, (4, 2))))
    jax.effects_barrier()
    assert len(traces) <= 2 and len(seen) == 12


@each
def test_every_example_has_a_memory_of_its_own_and_devices_do_not_matter(make, key):
    x, ts = jax.random.normal(key, (16, 2)), grids.uniform_grid(5)
    run = lambda x: sampling.sample(make(MIXTURE.velocity), x, ts)
    whole = jax.jit(run)(x)
    np.testing.assert_allclose(jax.jit(run)(x[3:5]), whole[3:5], rtol=1e-5, atol=1e-6)
    local = jax.shard_map(run, mesh=sharding.make_mesh(), in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_allclose(jax.jit(local)(x), whole, rtol=1e-5, atol=1e-6)


@each
@pytest.mark.parametrize("parallel", [False, True])
def test_corrections_come_between_its_steps(make, parallel, x64, key):
    """The memory is of what the network saw; against a loop."""
    step, x, ts = make(LAW.velocity), jax.random.normal(key, (3, 2)), grids.uniform_grid(4)
    push = lambda key, x, t, cond=None: (x + 0.1, {"noised": x})
    options = {"key": key, "corrector": push, "at": (1, 2, 4), "parallel": parallel, "trajectory": True}
    got = jax.jit(lambda x: sampling.sample(step, x, ts, **options))(x)
    move, memory, states = jax.jit(step.step), step.init(x), []
    for i in range(5):
        pushed = x + 0.1 * (i in (1, 2, 4))
        states.append(pushed)
        if i < 4:
            moved, memory = move(memory, x if parallel else pushed, float(ts[i]), float(ts[i + 1]))
            x = moved + (pushed - x if parallel else 0)
    np.testing.assert_allclose(got, np.stack(states), rtol=1e-9)


PATHS = {f.__name__: f() for f in (paths.linear, paths.trigonometric, paths.vp, paths.sub_vp, paths.ve)}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
heun = pytest.mark.parametrize("heun", [False, True])


@every_path
@heun
def test_with_the_initial_noise_a_straight_flow_is_exact_on_any_grid(path, heun, x64, key):
    """The reflow of ``x1 = m + S x0``: every state on the line of its pair, which is DDIM's too."""
    mean, std = np.array([0.75, -0.5]), np.array([0.5, 1.5])

    def velocity(x, t, cond=None):
        alpha, beta, *_ = paths.coefficients(path, x, t)
        x0 = (x - beta * mean) / (alpha + beta * std)
        return paths.with_velocity(path, x0, mean + std * x0, t)[1]

    x0, step = jax.random.normal(key, (4, 2)), sampling.initial_noise(velocity, path=path, heun=heun)
    for ts in (np.array([0.1, 0.95]), np.array([0.05, 0.2, 0.3, 0.7, 0.9])):
        line = [paths.with_velocity(path, x0, mean + std * x0, jnp.full(4, np.float32(t)))[0] for t in ts]
        got = sampling.sample(step, line[0], ts, trajectory=True)
        np.testing.assert_allclose(got, np.stack(line), rtol=1e-6, atol=1e-6)
        same = sampling.sample(sampling.ddim(velocity, path=path), line[0], ts)
        np.testing.assert_allclose(got[-1], same, rtol=1e-6, atol=1e-6)


@every_path
def test_the_first_step_with_the_initial_noise_is_ddims_without_a_key(path, x64, key):
    x = jax.random.normal(key, (4, 2))
    v = oracles.mixture(jnp.array([[2.0, 0.5], [-1.5, 1.0]]), jnp.array([0.3, 0.4]), path=path).velocity
    for ts in ([0.0, 0.6], [0.3, 0.6]):
        ours, theirs = (
            sampling.sample(f(v, path=path), x, np.array(ts)) for f in (sampling.initial_noise, sampling.ddim)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    plain = specs.build(specs.SOLVER, {"name": "initial_noise", "heun": True}, v, field="solver", path=path)
    keyed = [sampling.sample(plain, x, [0.1, 0.4, 0.9], key=k) for k in (None, jax.random.key(1))]
    np.testing.assert_array_equal(*keyed)


@heun
def test_the_initial_noise_is_kept_as_2_rectified_flow_keeps_it(heun, x64, key):
    """The published recursion, out of pure noise; Heun's averages velocities, and the last step is Euler's."""
    x0, ts = jax.random.normal(key, (4, 2)), grids.uniform_grid(4).astype(float)
    v = jax.jit(MIXTURE.velocity)
    z, seen = x0, []
    for s, t in zip(ts, ts[1:], strict=False):
        slope = v(z, s)
        ahead = t * (z + (1 - s) * slope) + (1 - t) * x0
        if heun and t < 1:
            slope = (slope + v(ahead, t)) / 2
            ahead = t * (z + (1 - s) * slope) + (1 - t) * x0
        z = ahead

    def counted(x, t, cond=None):
        jax.debug.callback(lambda: seen.append(1))
        return MIXTURE.velocity(x, t)

    step = sampling.initial_noise(counted, heun=heun)
    got = jax.jit(lambda x: sampling.sample(step, x, ts))(x0)
    jax.effects_barrier()
    np.testing.assert_allclose(got, z, rtol=1e-9)
    assert len(seen) == (7 if heun else 4)


def test_the_initial_noise_is_no_solver_of_a_curved_flow(x64, key):
    x = jax.random.normal(key, (4, 2))
    gap = lambda make, n: np.abs(
        sampling.sample(make(LAW.velocity), x, grids.uniform_grid(n)) - LAW.flow_map(x, 0.0, 1.0)
    ).max()
    assert gap(sampling.ddim, 400) < 0.01 and gap(sampling.initial_noise, 400) > 0.1
