"""Paths against their published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import paths

ALL = {
    "linear": paths.linear(),
    "trigonometric": paths.trigonometric(),
    "vp": paths.vp(),
    "sub_vp": paths.sub_vp(),
    "ve": paths.ve(),
    "target_conditional": paths.target_conditional(sigma_min=0.02),
}


def per_time(f, t):
    """``f`` and its derivative at every time of ``t``."""
    return jax.jit(lambda t: jax.jvp(f, (t,), (jnp.ones_like(t),)))(t)


def snr(path, t):
    alpha, beta = path.coefficients(jnp.asarray(t, float))
    return beta / alpha


# what every schedule is at its ends: (alpha_0, beta_0), (alpha_1, beta_1), worked out from the published formulas
ENDS = {
    "linear": ((1, 0), (0, 1)),
    "trigonometric": ((1, 0), (0, 1)),
    "vp": ((np.sqrt(1 - np.exp(-10.05)), np.exp(-5.025)), (0, 1)),
    "sub_vp": ((1 - np.exp(-10.05), np.exp(-5.025)), (0, 1)),
    "ve": ((50, 1), (0.01, 1)),
    "target_conditional": ((1, 0), (0.02, 1)),
}


@pytest.mark.parametrize("name", ALL)
def test_a_schedule_has_the_stated_ends(name, x64):
    for t, expected in zip((0.0, 1.0), ENDS[name], strict=True):
        np.testing.assert_allclose(ALL[name].coefficients(jnp.asarray(t)), expected, rtol=1e-13, atol=1e-15)
    ratio = snr(ALL[name], np.linspace(0, 1, 101)[:-1])
    assert np.all(np.diff(ratio) > 0)


def test_the_defaults_are_the_published_values(x64):
    t = jnp.linspace(0.1, 0.9, 5)
    for default, written in [
        (paths.vp(), paths.vp(beta_min=0.1, beta_max=20.0)),
        (paths.sub_vp(), paths.sub_vp(beta_min=0.1, beta_max=20.0)),
        (paths.ve(), paths.ve(sigma_min=0.01, sigma_max=50.0)),
    ]:
        np.testing.assert_array_equal(default.coefficients(t), written.coefficients(t))
    alpha, _ = paths.target_conditional().coefficients(t)
    np.testing.assert_allclose(alpha, 1 - (1 - 1e-4) * t, rtol=1e-15)


@pytest.mark.parametrize("name", ["vp", "sub_vp"])
def test_the_noise_level_is_precise_near_the_data_in_float32(name):
    tau = 2.0 ** -np.arange(4, 21, 4)  # 1 - tau is exact in float32
    one_minus_square = -np.expm1(-(tau**2) * 19.9 / 2 - tau * 0.1)
    expected = np.sqrt(one_minus_square) if name == "vp" else one_minus_square
    alpha, _ = ALL[name].coefficients(jnp.asarray(1 - tau, jnp.float32))
    np.testing.assert_allclose(alpha, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["vp", "sub_vp", "ve"])
def test_coefficients_solve_the_moment_equations_of_the_sde(name, x64):
    # dx = f x d tau + g dW: mean' = f mean and variance' = 2 f variance + g^2, in tau = 1 - t
    tau = jnp.linspace(0.01, 1.0, 12)
    nu = 0.1 + tau * 19.9
    f, g2 = {
        "vp": (-nu / 2, nu),
        "sub_vp": (-nu / 2, nu * (1 - jnp.exp(-0.2 * tau - 19.9 * tau**2))),
        "ve": (0 * tau, (0.01 * 5000**tau) ** 2 * 2 * jnp.log(5000)),
    }[name]
    (alpha, mean), (d_alpha, d_mean) = per_time(lambda tau: ALL[name].coefficients(1 - tau), tau)
    np.testing.assert_allclose(d_mean, f * mean, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(2 * alpha * d_alpha, 2 * f * alpha**2 + g2, rtol=1e-11)


def test_the_target_conditional_velocity_is_the_published_one(x64, key):
    x0, x1 = jax.random.normal(key, (2, 5, 3))
    t = jnp.linspace(0.0, 1.0, 5)
    x, u = paths.with_velocity(ALL["target_conditional"], x0, x1, t)
    expected = (x1 - 0.98 * x) / (1 - 0.98 * t[:, None])  # arXiv 2210.02747, eq. 21
    np.testing.assert_allclose(u, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (paths.vp, {"beta_min": 0.0}, "beta_min=0.0"),
        (paths.sub_vp, {"beta_min": 3.0, "beta_max": 2.0}, "beta_max=2.0: .* at least 3"),
        (paths.ve, {"sigma_min": 0.0}, "sigma_min=0.0"),
        (paths.ve, {"sigma_min": 2.0, "sigma_max": 2.0}, "sigma_max=2.0: .* above 2"),
        (paths.target_conditional, {"sigma_min": 1.0}, "sigma_min=1.0"),
        (paths.target_conditional, {"sigma_min": -0.1}, "sigma_min=-0.1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("name", ALL)
def test_the_velocity_is_finite_on_the_span_of_a_path(name):
    """In float32; just beyond the span of ``vp``, at its end, the derivative of the noise level is infinite."""
    path = ALL[name]
    values, derivatives = per_time(path.coefficients, jnp.asarray(path.span))
    assert np.isfinite(values).all() and np.isfinite(derivatives).all()
    assert path.span == ((0.0, 1 - 1e-3) if name == "vp" else (0.0, 1.0))
    end = per_time(path.coefficients, jnp.ones(1))[1]
    assert np.isfinite(end).all() == (name != "vp")


@pytest.mark.parametrize("name", ALL)
def test_the_source_scale_is_the_noise_level_at_the_start(name):
    scale = ALL[name].source_scale
    assert isinstance(scale, float) and scale == pytest.approx(ENDS[name][0][0], rel=1e-5)
    assert jax.jit(lambda x: x * ALL[name].source_scale)(1.0) == pytest.approx(scale)  # a number under jit, too


def test_equal_paths_share_what_is_compiled():
    assert paths.linear() == paths.linear() and paths.trigonometric() == paths.trigonometric()
    assert paths.linear() != paths.trigonometric()
