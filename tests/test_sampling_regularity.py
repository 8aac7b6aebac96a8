"""The shape of trajectories and mean shift, against arcs, Gaussian flows and kernel densities in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import correction, oracles, paths, sampling
from fmjax.oracles import geometry

ROWS = np.random.default_rng(0).normal(size=(20, 3))


def test_an_arc_has_its_sagitta_its_length_and_two_components(x64):
    angle = np.linspace(0, np.pi / 2, 2001)
    plane = np.stack([np.cos(angle), np.sin(angle)], -1)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(7, 7)))[0][:2]
    xs = jnp.asarray(3 * plane @ turn)[:, None]
    np.testing.assert_allclose(sampling.chord_deviation(xs).max(), (1 - 0.5**0.5) / 2**0.5, rtol=1e-6)
    np.testing.assert_allclose(sampling.length_ratio(xs), np.pi / 2 / 2**0.5, rtol=1e-6)
    fractions = sampling.component_fractions(xs[::50], count=3)
    np.testing.assert_allclose(fractions[0, :2].sum(), 1, rtol=1e-12)
    values = np.linalg.eigvalsh(np.cov(plane[::50].T))[::-1]
    np.testing.assert_allclose(fractions[0, :2], values / values.sum(), rtol=1e-10)


def test_a_gaussian_flow_bends_as_its_closed_form(x64):
    """``x_t = beta_t m + sqrt(C_t) x_0``: the deviation of each point, by hand."""
    oracle, x0 = oracles.gaussian(jnp.zeros(2), jnp.array([0.1, 2.0])), jnp.array([[1.0, -0.5], [0.3, 1.2]])
    ts = jnp.linspace(0, 1, 9)
    xs = jnp.stack([oracle.flow_map(x0, 0.0, t) for t in ts])
    scale = np.sqrt((1 - ts)[:, None] ** 2 + ts[:, None] ** 2 * np.array([0.01, 4.0]))
    for i in range(2):
        a = (scale - 1) * np.asarray(x0[i])
        want = abs(a[:, 0] * a[-1, 1] - a[:, 1] * a[-1, 0]) / (a[-1] ** 2).sum()
        np.testing.assert_allclose(sampling.chord_deviation(xs)[:, i], want, atol=1e-7)
    early = sampling.jump_distance(oracle.velocity, xs, ts)
    data = np.stack([ts[:-1, None] * s**2 for s in (np.array([0.1, 2.0]),)])[0] / scale[:-1] * np.asarray(x0)[:, None]
    want = np.sqrt((((data - np.asarray(xs[-1])[:, None]) ** 2).sum(-1)).mean(0))
    np.testing.assert_allclose(early, want, rtol=1e-6)


def test_the_denoiser_of_a_finite_set_is_a_mean_shift_step(x64):
    points = jnp.asarray(ROWS)
    x, sigma = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3))), 0.7
    shift = geometry.kernel_mean(x, points, sigma) - x
    density = lambda x: jax.nn.logsumexp(-jnp.sum((x[:, None] - points) ** 2, -1) / (2 * sigma**2), 1).sum()
    np.testing.assert_allclose(shift, sigma**2 * jax.grad(density)(x), rtol=1e-12)
    t = 1 / (1 + sigma)
    data = x * t + (1 - t) * oracles.finite(points).velocity(t * x, t)
    np.testing.assert_allclose(geometry.kernel_mean(x, points, sigma), data, rtol=1e-10)
    sides = np.random.default_rng(5).normal(size=(3, 50))
    assert (np.asarray(data @ sides).max(0) <= np.asarray(points @ sides).max(0)).all()  # in the convex hull


def test_an_euler_step_is_annealed_mean_shift(x64):
    """On the path ``ve`` from ``sigma`` to ``sigma'``: DDIM, and ``(s'/s) x + (1 - s'/s) D``."""
    points = jnp.asarray(ROWS)
    path, s, t = paths.ve(sigma_min=0.01, sigma_max=10.0), 0.3, 0.6
    a, b = (float(path.coefficients(jnp.float64(time))[0]) for time in (s, t))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))
    step = sampling.ddim(oracles.finite(points, path=path).velocity, path=path)
    want = b / a * x + (1 - b / a) * geometry.kernel_mean(x, points, a)
    np.testing.assert_allclose(step(x, s, t), want, rtol=1e-9)


def test_mean_shift_as_a_corrector_ends_in_the_data(x64):
    points = jnp.asarray(ROWS)
    fix = correction.marginal_matching(geometry.mean_shift(points, bandwidth=0.05), alpha=1.0)
    x = points[:8] + 0.04 * jnp.asarray(np.random.default_rng(3).normal(size=(8, 3)))
    y, _ = fix(jax.random.key(0), x, 1.0)
    np.testing.assert_allclose(y, points[:8], atol=1e-6)


def test_memorisation_is_zero_for_the_finite_set_and_known_for_a_gaussian(x64):
    points = jnp.asarray(ROWS)
    x, t = jnp.asarray(np.random.default_rng(4).normal(size=(6, 3))), 0.8
    assert float(geometry.memorisation(oracles.finite(points).velocity, x, t, points).max()) < 1e-9
    smooth = oracles.gaussian(0.0, 1.0)
    data = x * t / ((1 - t) ** 2 + t**2)
    want = np.linalg.norm(data - geometry.kernel_mean(x / t, points, (1 - t) / t), axis=1)
    spread = np.sqrt(np.var(np.asarray(points), 0).sum())
    np.testing.assert_allclose(geometry.memorisation(smooth.velocity, x, t, points), want / spread, rtol=1e-9)


@pytest.mark.parametrize(
    ("field", "run"),
    {
        "bandwidth": lambda: geometry.mean_shift(jnp.asarray(ROWS), bandwidth=0.0),
        "count": lambda: sampling.component_fractions(jnp.zeros((2, 1, 3)), count=3),
        "ts": lambda: sampling.jump_distance(lambda x, t, cond=None: x, jnp.zeros((2, 1, 3)), [1.0, 0.0]),
    }.items(),
)
def test_what_cannot_work_is_refused(field, run):
    with pytest.raises(ValueError, match=f"^{field}="):
        run()
