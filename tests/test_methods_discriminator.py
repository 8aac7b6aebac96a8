"""Discriminator guidance: with the exact density ratio the guided velocity is the velocity of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling
from fmjax.keys import as_keys
from fmjax.methods.discriminator import discriminator
from fmjax.sampling import grids, guidance
from fmjax.types import Batch, expand

PATHS = {
    "linear": paths.linear(),
    "trigonometric": paths.trigonometric(),
    "vp": paths.vp(),
    "target_conditional": paths.target_conditional(sigma_min=0.1),
    "latent": paths.two_sided(),
}


def pair(name, path):
    """Laws of the data and of a model's samples: two Gaussians, or two mixtures."""
    if name == "gaussian":
        real, generated = (
            (jnp.array([0.5, -1.0]), jnp.array([0.5, 1.5])),
            (jnp.array([0.2, 0.1]), jnp.array([0.9, 1.0])),
        )
        return tuple(oracles.gaussian(*law, path=path) for law in (real, generated))
    real, generated = jnp.array([[2.0, 0.0], [-1.0, 1.5]]), jnp.array([[1.6, 0.4], [-1.2, 1.0]])
    return oracles.mixture(real, jnp.array([0.3, 0.5]), path=path), oracles.mixture(generated, 0.6, path=path)


def exact(real, generated, path):
    """The direction of the method at its optimum: the gradient of ``log p_t - log p~_t``."""
    logit = lambda params, x, s, t, cond=None, key=None: real.log_density(x, s) - generated.log_density(x, s)
    return discriminator(logit, path=path).direction(None)


@pytest.mark.parametrize(("name", "law"), [("linear", "mixture"), *((name, "gaussian") for name in PATHS)])
def test_the_exact_ratio_turns_the_models_velocity_into_that_of_the_data(name, law, x64, key):
    """And a fraction of it into what lies between the two."""
    path = PATHS[name]
    real, generated = pair(law, path)
    x, t = jax.random.normal(key, (9, 2), jnp.float64), jnp.linspace(0.02, 0.98, 9)
    model, data = generated.velocity(x, t), real.velocity(x, t)
    for scale in (1.0, lambda t: t**2 / 2):
        guided = guidance.density_ratio(generated.velocity, exact(real, generated, path), scale=scale, path=path)
        w = expand(scale(t), x) if callable(scale) else scale
        np.testing.assert_allclose(jax.jit(guided)(x, t), (1 - w) * model + w * data, rtol=1e-8, atol=1e-9)
    assert np.abs(model - data).max() > 0.1


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()])
def test_a_guided_sampler_ends_on_the_data(path, x64, key):
    """Of one mean and another spread, where the correction vanishes at ``t = 0`` as it is taken to."""
    real, generated = (oracles.gaussian(0.0, std, path=path) for std in (0.5, 0.9))
    guided = guidance.density_ratio(generated.velocity, exact(real, generated, path), path=path)
    x = jnp.linspace(-2, 2, 7)[:, None]
    end = sampling.sample(sampling.rk4(guided), x, grids.uniform_grid(40))
    np.testing.assert_allclose(end, real.flow_map(x, 0.0, 1.0), rtol=1e-4)
    assert np.abs(generated.flow_map(x, 0.0, 1.0) - end).max() > 0.5


def test_at_the_ends_of_the_path_it_is_the_velocity_itself(x64):
    """At t = 0 nothing is added, whatever the gradient, and derivatives stay finite; at t = 1 nothing is to be."""
    velocity, gradient = lambda x, t, cond=None: 2 * x, lambda x, t, cond=None: jnp.sin(x)
    guided = guidance.density_ratio(velocity, gradient)
    x, t = jnp.ones((3, 2)), jnp.array([0.0, 1.0, 0.25])
    expected = 2 + np.array([0, 0, 3 * np.sin(1)])[:, None] * np.ones((3, 2))  # (1 - t) / t at a quarter
    np.testing.assert_allclose(guided(x, t), expected, rtol=1e-12)
    slope = jax.grad(lambda x: guided(x, t).sum())(x)
    np.testing.assert_allclose(slope, 2 + np.array([0, 0, 3 * np.cos(1)])[:, None] * np.ones((3, 2)), rtol=1e-12)


def test_no_scale_is_the_very_same_function_and_a_bad_one_is_refused():
    velocity = lambda x, t, cond=None: x
    assert guidance.density_ratio(velocity, velocity, scale=0.0) is velocity
    for scale in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"{scale}"):
            guidance.density_ratio(velocity, velocity, scale=scale)


def test_real_and_generated_examples_get_noise_of_their_own_and_one_time(key):
    """Residuals ``(x - t x1) / (1 - t)`` of both are N(0, I), independent of each other and of the time."""
    n, seen = 20_000, []

    def net(params, x, s, t, cond=None, key=None):
        seen.append((x, s))
        return x.sum(1)

    batch = Batch(jnp.full((n, 2), 3.0), x0=jnp.full((n, 2), -5.0), cond=jnp.arange(n))
    _, aux = discriminator(net).loss(None, None, batch, as_keys(key, n))
    ((x, t),) = seen
    np.testing.assert_array_equal(t[:n], t[n:])
    np.testing.assert_array_equal(aux["t"], t[:n])
    keep = np.asarray(t[:n]) < 0.9
    z = [(x[:n] - t[:n, None] * 3) / (1 - t[:n, None]), (x[n:] + t[n:, None] * 5) / (1 - t[n:, None])]
    a, b = (np.asarray(side, np.float64)[keep] for side in z)
    for product in (a, b, a**2 - 1, b**2 - 1, a * b, a[:, :1] * a[:, 1:], a * (np.asarray(t[:n])[keep, None] - 0.45)):
        assert (np.abs(product.mean(0)) < 4.5 * product.std(0) / len(product) ** 0.5).all()


def test_a_batch_without_generated_examples_is_refused(key):
    with pytest.raises(ValueError, match="batch.x0=None"):
        discriminator(lambda *a: None).loss(None, None, Batch(jnp.ones((2, 2))), as_keys(key, 2))
