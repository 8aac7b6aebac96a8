"""Log-densities against closed forms; Hutchinson's estimate against its mean and its variance."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fmjax import oracles, paths
from fmjax.keys import as_keys
from fmjax.sampling import likelihood
from fmjax.types import expand, over_batch


def exact(velocity, x, cond=None, key=None, **options):
    """The log-density to nine digits."""
    run = functools.partial(likelihood.log_density, velocity, rtol=1e-9, atol=1e-9, max_steps=512, **options)
    return jax.jit(run)(x, cond, key)


MIXTURE = {
    "means": np.array([[-1.5, 0.3], [0.2, -0.8], [2.0, 1.0]]),
    "std": np.array([0.5, 0.8, 0.4]),
    "weights": np.array([0.3, 0.5, 0.2]),
}


def mixture(path=paths.linear()):
    return oracles.mixture(*map(jnp.asarray, MIXTURE.values()), path=path)


def gaussian(shape, path=paths.linear()):
    """Means and deviations of their own for each coordinate."""
    n = np.arange(math.prod(shape)).reshape(shape)
    return oracles.gaussian(jnp.asarray(np.sin(n)), jnp.asarray(0.6 + 0.1 * n), path=path)


def linear(matrix):
    """``v(x, t) = (1 + t) A x``: its divergence is ``(1 + t) tr A``."""
    return lambda x, t, cond=None: expand(1 + over_batch(t, x), x) * (x @ jnp.asarray(matrix).T)


MATRIX = np.array([[0.3, 0.9, -0.2], [-0.4, -0.5, 0.6], [0.1, 0.5, 0.8]])


def test_the_density_of_a_gaussian_is_the_closed_form(x64, key):
    """Images ``[B, 2, 2, 1]``, at the data and on the way; the noise found is the one that flows there."""
    oracle = gaussian((2, 2, 1), paths.trigonometric())
    x = oracle.sample(key, 5)
    for t in (1.0, 0.6):
        found = exact(oracle.velocity, x, ts=(t, 0.0))
        np.testing.assert_allclose(likelihood.checked_density(found), oracle.log_density(x, t), atol=1e-7)
        np.testing.assert_allclose(oracle.flow_map(found.x0, 0.0, t), x, atol=1e-7)


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()])
def test_the_density_of_a_mixture_is_the_closed_form(path, x64, key):
    oracle = mixture(path)
    x = jnp.concatenate([oracle.sample(key, 6), jnp.array([[4.0, -3.0]])])  # and one far out
    np.testing.assert_allclose(exact(oracle.velocity, x).log_p, oracle.log_density(x, 1.0), atol=1e-7)


def test_the_default_solver_keeps_its_tolerance_in_float32(key):
    oracle = mixture()
    x = oracle.sample(key, 32).astype(jnp.float32)
    found = jax.jit(lambda x: likelihood.log_density(oracle.velocity, x))(x)
    assert found.log_p.dtype == jnp.float32
    np.testing.assert_allclose(likelihood.checked_density(found), oracle.log_density(x, 1.0), atol=2e-3)


def test_conditions_reach_the_velocity(x64):
    mean = jnp.array([-1.0, 2.0])
    law = lambda cond: oracles.gaussian(mean[cond][:, None], 0.5)
    cond = jnp.array([0, 1, 0])
    x = jnp.array([[-1.2], [1.0], [0.3]])
    found = exact(lambda x, t, cond=None: law(cond).velocity(x, t), x, cond)
    np.testing.assert_allclose(found.log_p, law(cond).log_density(x, 1.0), atol=1e-7)


def test_the_gradient_of_the_density_is_the_score(x64, key):
    oracle = mixture()
    x = oracle.sample(key, 3)
    got = jax.jit(jax.grad(lambda x: exact(oracle.velocity, x).log_p.sum()))(x)
    np.testing.assert_allclose(got, oracle.score(x, 1.0), atol=1e-6)


def test_the_gradient_in_a_parameter_is_that_of_the_closed_form(x64):
    """``d log N(x; 0, s^2) / ds = x^2 / s^3 - 1 / s``."""
    x, s = jnp.array([[0.4], [-1.5]]), 0.7
    got = jax.jit(jax.jacrev(lambda s: exact(oracles.gaussian(0.0, s).velocity, x).log_p))(s)
    np.testing.assert_allclose(got, x[:, 0] ** 2 / s**3 - 1 / s, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), (70,)])
def test_the_exact_divergence_is_the_trace_of_the_jacobian(shape, x64, key):
    """A coupled nonlinear field; 70 coordinates are more than are taken side by side."""
    d = math.prod(shape)
    mix = jax.random.normal(jax.random.key(1), (d, d), jnp.float64)

    def velocity(x, t, cond=None):
        flat = x.reshape(x.shape[0], -1)
        return (jnp.sin(flat @ mix) * (1 + expand(t, flat)) + flat[:, ::-1] * flat).reshape(x.shape)

    x, t = jax.random.normal(key, (4, *shape), jnp.float64), jnp.linspace(0, 1, 4)
    v, div = jax.jit(functools.partial(likelihood.divergence, velocity))(x, t)
    one = lambda x, t: velocity(x[None], t[None])[0].reshape(-1)
    jacobian = jax.jit(jax.vmap(jax.jacrev(one)))(x, t).reshape(4, d, d)
    np.testing.assert_allclose(v, velocity(x, t), rtol=1e-12)
    np.testing.assert_allclose(div, jnp.trace(jacobian, axis1=1, axis2=2), rtol=1e-10)


@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_hutchinsons_estimate_has_its_mean_and_variance(law, key):
    """Mean ``tr A``; variance ``2 (|S|_F^2 - [Rademacher] |diag S|^2)``, ``S`` the symmetric part, over ``k``."""
    n, k = 20_000, 2
    x = jnp.ones((n, 3))
    probes = likelihood.draw_probes(as_keys(key, n), k, (3,), distribution=law)
    _, div = likelihood.hutchinson(linear(MATRIX), x, 0.0, probes)
    div = np.asarray(div, np.float64)
    sym = (MATRIX + MATRIX.T) / 2
    var = 2 * ((sym**2).sum() - (law == "rademacher") * (np.diag(sym) ** 2).sum()) / k
    assert abs(div.mean() - np.trace(MATRIX)) < 4.5 * (var / n) ** 0.5
    spread = (div - np.trace(MATRIX)) ** 2
    assert abs(spread.mean() - var) < 4.5 * spread.std() / n**0.5


def test_only_signs_are_exact_for_a_diagonal_jacobian(x64, key):
    oracle = gaussian((2, 2, 1))
    x = oracle.sample(key, 5)
    want = oracle.log_density(x, 1.0)
    np.testing.assert_allclose(exact(oracle.velocity, x, None, key, probes=1).log_p, want, atol=1e-7)
    rough = exact(oracle.velocity, x, None, key, probes=1, distribution="gaussian").log_p
    assert (abs(rough - want) > 1e-3).all()


def test_probes_are_fixed_over_the_solve_and_belong_to_the_example(x64, key):
    """A linear field: ``log p`` is off by ``-int (1 + t) dt (<e, A e> - tr A)`` with the probes of the keys."""
    keys = as_keys(key, 6)
    x = jax.random.normal(jax.random.key(1), (6, 3), jnp.float64)
    velocity = linear(MATRIX)
    sure, found = exact(velocity, x), exact(velocity, x, None, keys, probes=3)
    e = np.asarray(likelihood.draw_probes(keys, 3, (3,), dtype=jnp.float64))
    estimate = np.einsum("kbi,ij,kbj->b", e, MATRIX, e) / 3
    np.testing.assert_allclose(found.log_p - sure.log_p, -1.5 * (estimate - np.trace(MATRIX)), atol=1e-7)
    assert len(np.unique(np.round(estimate, 9))) > 3
    part = exact(velocity, x[2:4], None, keys[2:4], probes=3)
    np.testing.assert_allclose(part.log_p, found.log_p[2:4], atol=1e-7)


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()], ids=["linear", "trigonometric"])
def test_the_density_by_one_jump_of_the_exact_map_is_the_closed_form(path, x64, key):
    """A Gaussian at the data and on the way; the noise found flows back to ``x``; ``bits_per_dim`` takes it."""
    oracle = gaussian((2, 2, 1), path)
    x = oracle.sample(key, 5)
    for t in (1.0, 0.6):
        found = likelihood.flow_map_log_density(oracle.flow_map, x, ts=(0.0, t))
        log_p = likelihood.checked_density(found)
        np.testing.assert_allclose(log_p, oracle.log_density(x, t), atol=1e-12)
        np.testing.assert_allclose(oracle.flow_map(found.x0, 0.0, t), x, atol=1e-6)
    bits = likelihood.bits_per_dim(likelihood.flow_map_log_density(oracle.flow_map, x), level=0.5)
    np.testing.assert_allclose(bits, 1 - oracle.log_density(x, 1.0) / (4 * math.log(2)), rtol=1e-12)


def test_the_density_of_a_map_that_mixes_coordinates_has_its_determinant(x64, key):
    """``X(z) = A z + sin(A z) / 2``, inverted by iteration: ``log|det A| + sum log(1 + cos(y) / 2)``, y = A z."""
    a = jnp.asarray(MATRIX + np.eye(3))

    def flow_map(x, s, t, cond=None, key=None):
        if t > s:
            y = x @ a.T
            return y + jnp.sin(y) / 2 + cond
        y = x
        for _ in range(60):  # contracts by 1/2
            y = x - cond - jnp.sin(y) / 2
        return y @ jnp.linalg.inv(a).T

    z, shift = jax.random.normal(key, (4, 3), jnp.float64), jnp.arange(4.0)[:, None]
    y = z @ a.T
    found = likelihood.flow_map_log_density(flow_map, flow_map(z, 0.0, 1.0, shift), cond=shift)
    log_det = jnp.log(abs(jnp.linalg.det(a))) + jnp.log(1 + jnp.cos(y) / 2).sum(1)
    want = -0.5 * (z**2 + math.log(2 * math.pi)).sum(1) - log_det
    np.testing.assert_allclose(found.log_p, want, rtol=1e-10)
    np.testing.assert_allclose(found.x0, z, atol=1e-12)


def test_a_map_that_is_not_its_own_inverse_has_no_density(x64, key):
    """Back by the wrong speed: ``x`` returns as ``1.02 x``, off by 2 %; one bad example of many is enough."""
    wrong = lambda x, s, t, cond=None, key=None: 1.02 * x if t > s else x
    x = jax.random.normal(key, (6, 2), jnp.float64)
    size = jnp.sqrt((x**2).mean(1).max() / (x**2).mean())
    with pytest.raises(ValueError, match=f"tolerance=.*: .*off by {0.02 * size:.3g} of its size.*flow_map_matching"):
        likelihood.flow_map_log_density(wrong, x)
    found = likelihood.flow_map_log_density(wrong, x, tolerance=0.021 * float(size))
    np.testing.assert_allclose(found.log_p, -0.5 * (x**2 + math.log(2 * math.pi)).sum(1), rtol=1e-12)
    one = lambda x, s, t, cond=None, key=None: x.at[-1].add(1.0) if t > s else x
    for broken in (one, lambda x, s, t, cond=None, key=None: x * jnp.nan):
        with pytest.raises(ValueError, match="tolerance="):
            likelihood.flow_map_log_density(broken, jnp.tile(x, (100, 1)))
    for ts in ((0.1, 1.0), (1.0, 0.0), (0.0, 0.5, 1.0)):
        with pytest.raises(ValueError, match="ts="):
            likelihood.flow_map_log_density(wrong, x, ts=ts)


def test_few_fixed_steps_are_refused_unless_asked(key):
    oracle = mixture()
    x = oracle.sample(key, 64).astype(jnp.float32)
    fixed = functools.partial(likelihood.log_density, oracle.velocity, rtol=None, atol=None)
    few = jax.jit(functools.partial(fixed, ts=np.linspace(1, 0, 9), solver="euler"))(x)
    many = jax.jit(functools.partial(fixed, ts=np.linspace(1, 0, 33), solver="rk4"))(x)
    with pytest.raises(RuntimeError, match="tolerance=0.01: .* bits/dim"):
        likelihood.bits_per_dim(few, level=1.0)
    off = (few.log_p - oracle.log_density(x, 1.0)).mean()
    assert abs(off) / (2 * math.log(2)) > 0.01  # and it is wrong indeed
    asked = likelihood.bits_per_dim(few, level=1.0, tolerance=math.inf)
    np.testing.assert_allclose(asked, -few.log_p / (2 * math.log(2)), rtol=1e-6)
    np.testing.assert_allclose(likelihood.checked_density(many), oracle.log_density(x, 1.0), atol=0.02)


def test_halved_steps_are_the_solve_on_the_refined_grid(x64, key):
    """One Euler step: ``l = -h div``, closed for a linear field; two of ``h / 2`` on the halved grid."""
    x = jax.random.normal(key, (3, 3), jnp.float64)
    found = likelihood.log_density(linear(MATRIX), x, ts=(1.0, 0.0), solver="euler", rtol=None, atol=None)
    log_normal = lambda x: -0.5 * (x**2 + np.log(2 * np.pi)).sum(1)
    one, trace = x - 2 * x @ MATRIX.T, np.trace(MATRIX)
    np.testing.assert_allclose(found.log_p, log_normal(one) - 2 * trace, rtol=1e-12)
    half = x - 0.5 * 2 * x @ MATRIX.T
    two = half - 0.5 * 1.5 * half @ MATRIX.T
    np.testing.assert_allclose(found.halved, log_normal(two) - 1.75 * trace, rtol=1e-12)


def test_a_failed_solve_is_an_error_and_not_a_number(key):
    oracle = mixture()
    x = oracle.sample(key, 4)
    with pytest.raises(RuntimeError, match="solve of the log-density failed"):
        likelihood.checked_density(likelihood.log_density(oracle.velocity, x, max_steps=2))
    broken = likelihood.log_density(oracle.velocity, x)._replace(log_p=jnp.array([0.0, jnp.nan, 0.0, 0.0]))
    with pytest.raises(RuntimeError, match="non-finite values"):
        likelihood.bits_per_dim(broken, level=1.0)


@pytest.mark.parametrize(("scale", "offset"), [(128, 7.0), (127.5, 6.994353436858858)])
def test_bits_per_dim_are_those_of_the_density_per_grey_level(scale, offset, x64, key):
    """``x = u / scale - 1`` with ``u`` Gaussian: the bits of ``u`` itself, whose levels have size one."""
    mean, std = 120.0, 30.0
    u = mean + std * jax.random.normal(key, (4, 6), jnp.float64)
    law = oracles.gaussian(mean / scale - 1, std / scale)
    found = exact(law.velocity, u / scale - 1)
    want = (0.5 * ((u - mean) / std) ** 2 + 0.5 * np.log(2 * np.pi * std**2)).mean(1) / np.log(2)
    np.testing.assert_allclose(likelihood.bits_per_dim(found, level=1 / scale), want, atol=1e-6)
    shift = likelihood.bits_per_dim(found, level=1 / scale) - likelihood.bits_per_dim(found, level=1.0)
    np.testing.assert_allclose(shift, offset, rtol=1e-12)


def test_dequantised_data_bound_the_code_length_from_above(key):
    """Levels of a Gaussian as wide as its deviation: ``E[-log2 p(k + U)]``, with ``E (k + U)^2 = k^2 + k + 1/3``."""
    level = 1 / 4
    law = oracles.gaussian(0.0, level)
    x = level * jnp.arange(-3, 3, dtype=jnp.float32)[:, None]
    many = jnp.repeat(x, 4000, 0)
    noisy = likelihood.dequantise(key, many, level=level)
    part = (noisy - many) / level
    assert part.min() >= 0 and part.max() <= 1  # float32 may round the last sum up
    assert abs(float(part.mean()) - 0.5) < 4.5 / (12 * part.size) ** 0.5
    assert len(np.unique(part)) > 0.95 * part.size
    bits = -np.asarray(law.log_density(noisy, 1.0), np.float64).reshape(6, -1) / np.log(2) - np.log2(level)
    k = np.arange(-3, 3)
    want = (0.5 * (k**2 + k + 1 / 3) + 0.5 * np.log(2 * np.pi)) / np.log(2)
    assert (abs(bits.mean(1) - want) < 4.5 * bits.std(1) / 4000**0.5).all()
    assert (want > -np.log2(stats.norm.cdf(k + 1) - stats.norm.cdf(k))).all()
    first = likelihood.dequantise(as_keys(key, 5)[2:4], many[2:4], level=level)
    np.testing.assert_array_equal(first, likelihood.dequantise(key, many[:5], level=level)[2:4])


def test_bad_options_are_refused(key):
    velocity, x = mixture().velocity, jnp.ones((2, 2))
    for ts in ((0.0, 1.0), (1.0, 0.1), (0.0, -1.0)):
        with pytest.raises(ValueError, match="ts="):
            likelihood.log_density(velocity, x, ts=ts)
    for options in ({"probes": 2}, {"key": key}):
        with pytest.raises(ValueError, match="=None: "):
            likelihood.log_density(velocity, x, **options)
    with pytest.raises(ValueError, match="probes=0: "):
        likelihood.log_density(velocity, x, None, key, probes=0)
    with pytest.raises(ValueError, match="distribution='normal'"):
        likelihood.log_density(velocity, x, None, key, probes=1, distribution="normal")
    found = likelihood.Density(jnp.zeros(2), x, None, None)
    for level in (0.0, -0.1):
        with pytest.raises(ValueError, match=f"level={level}: "):
            likelihood.bits_per_dim(found, level=level)
    with pytest.raises(TypeError, match="typed PRNG key"):
        likelihood.dequantise(None, x, level=0.1)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve"])
def test_the_density_knows_the_noise_and_the_span_of_its_path(name, key):
    """Of a Gaussian: ``ve`` starts from ``N(0, 50^2)``, and the velocity of ``vp`` is infinite at the data."""
    path = getattr(paths, name)()
    oracle = oracles.gaussian(jnp.array([0.3, -0.2]), jnp.array([0.5, 0.8]), path=path)
    x = oracle.sample(key, 6)
    density = jax.jit(lambda x: likelihood.log_density(oracle.velocity, x, path=path))(x)
    at_end = oracle.log_density(x, path.span[1])
    np.testing.assert_allclose(
        likelihood.checked_density(density), at_end, atol=0.05
    )  # ve keeps the data at its start: 0.3 / 50 of it
    wrong = likelihood.log_density(oracle.velocity, x, ts=path.span[::-1]).log_p
    assert name != "ve" or np.abs(wrong - at_end).min() > 2


@pytest.mark.usefixtures("as_users_call")
def test_no_example_and_no_grey_level_have_no_density(key):
    still = lambda x, t, cond=None: 0 * x
    for density in (likelihood.log_density, lambda v, x: likelihood.flow_map_log_density(lambda x, s, t, c=None: x, x)):
        with pytest.raises(ValueError, match=r"^x=float32\[0, 2\]"):
            density(still, jnp.zeros((0, 2)))
        with pytest.raises(TypeError, match="^x=int"):
            density(still, jnp.zeros((1, 2), int))
    for level in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="^level="):
            likelihood.dequantise(key, jnp.zeros((1, 2)), level=level)
    with pytest.raises(TypeError, match="^x="):
        likelihood.dequantise(key, jnp.zeros((1, 2), jnp.uint8), level=1.0)
