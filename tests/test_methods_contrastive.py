"""Contrastive flow matching against its exact minimiser, with and without the correction at sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling
from fmjax.keys import as_keys
from fmjax.methods.contrastive import contrastive
from fmjax.methods.flow_matching import flow_matching
from fmjax.sampling import grids
from fmjax.types import Batch, expand, over_batch

WEIGHT = 0.3
MEANS, STDS = jnp.array([-1.0, 2.0]), jnp.array([0.5, 0.8])  # two classes of equal mass
MEAN = 0.5


def draw(key, n):
    """Classes, data of one coordinate, and the data of other examples, of whatever class."""
    k_own, k_class, k_other, k_noise = jax.random.split(key, 4)
    cond, other = (jax.random.bernoulli(k, shape=(n,)).astype(int) for k in (k_own, k_other))
    z = jax.random.normal(k_noise, (2, n))
    return Batch(
        (MEANS[cond] + STDS[cond] * z[0])[:, None], None, cond, None, (MEANS[other] + STDS[other] * z[1])[:, None]
    )


def linear_net(params, x, s, t, cond=None, key=None):
    """For each class a line in ``x``: where the least-squares fit of Gaussian classes lies, at one time."""
    return params[cond, 0][:, None] * x + params[cond, 1][:, None]


def class_line(label, t):
    """Slope and intercept of ``v(x, t | label)``: two values of the oracle, since it is a line."""
    low, high = oracles.gaussian(MEANS[label], STDS[label]).velocity(jnp.array([[0.0], [1.0]]), t)[:, 0]
    return float(high - low), float(low)


@pytest.mark.parametrize("t", [0.2, 0.6, 0.9])
def test_the_least_squares_fit_is_the_published_minimiser(t, x64):
    """The loss is a parabola in the two lines; its minimum, solved for, is ``(v - weight T) / (1 - weight)``."""
    n, shape = 200_000, (2, 2)
    at = lambda key: jnp.full(key.shape, t)
    batch, keys = draw(jax.random.key(0), n), as_keys(jax.random.key(1), n)
    loss = contrastive(linear_net, mean=MEAN, weight=WEIGHT, time=at).loss
    each = lambda p, b, k: loss(p.reshape(shape), None, jax.tree.map(lambda a: a[None], b), k[None])[0]
    zero = jnp.zeros(4)
    gradients = jax.jit(jax.vmap(jax.grad(each), (None, 0, 0)))(zero, batch, keys)
    curvature = jax.jit(jax.vmap(jax.hessian(each), (None, 0, 0)))(zero, batch, keys).mean(0)
    fitted = np.linalg.solve(curvature, -gradients.mean(0))
    residual = gradients + np.asarray(jax.jit(jax.vmap(jax.hessian(each), (None, 0, 0)))(zero, batch, keys)) @ fitted
    error = np.sqrt(np.diag(np.linalg.solve(curvature, np.linalg.solve(curvature, np.cov(residual.T)).T)) / n)
    expected = []
    for label in (0, 1):
        slope, intercept = class_line(label, t)
        expected += [slope / (1 - WEIGHT), (intercept - WEIGHT * MEAN) / (1 - WEIGHT)]
    assert (np.abs(fitted - np.array(expected)) < 4.5 * error).all(), (fitted, expected, error)
    plain = np.array([class_line(0, t), class_line(1, t)]).ravel()
    assert (np.abs(fitted - plain) > 4.5 * error).any()  # it is not the velocity


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()])
def test_only_the_corrected_ode_ends_in_the_data(path, x64, key):
    laws = [oracles.gaussian(m, s, path=path) for m, s in zip(MEANS.astype(float), STDS.astype(float), strict=True)]

    def biased(params, x, s, t, cond=None, key=None):
        v = jnp.where(cond[:, None] == 0, laws[0].velocity(x, t), laws[1].velocity(x, t))
        return (v - WEIGHT * paths.coefficients(path, x, t)[3] * MEAN) / (1 - WEIGHT)

    x0, cond = jax.random.normal(key, (8, 1)), jnp.arange(8) % 2
    run = lambda velocity: sampling.sample(sampling.rk4(velocity), x0, grids.uniform_grid(60), cond=cond)
    ends = jnp.where(cond[:, None] == 0, laws[0].flow_map(x0, 0.0, 1.0), laws[1].flow_map(x0, 0.0, 1.0))
    method = contrastive(biased, mean=MEAN, weight=WEIGHT, path=path)
    np.testing.assert_allclose(run(method.velocity(None)), ends, atol=1e-6)
    off = run(flow_matching(biased, path=path).velocity(None)) - ends
    assert (jnp.abs(off) > 0.1).all()
    at = jnp.linspace(0.1, 0.9, 8)
    expected = jnp.where(cond[:, None] == 0, laws[0].score(x0, at), laws[1].score(x0, at))
    np.testing.assert_allclose(method.score(None)(x0, at, cond), expected, rtol=1e-9, atol=1e-9)


def test_without_weight_it_is_flow_matching_and_the_default_is_the_sources(key):
    batch, keys = draw(key, 64), as_keys(key, 64)
    params = jnp.array([[0.3, -0.2], [0.1, 0.5]])
    aux = contrastive(linear_net, mean=0.0, weight=0.0).loss(params, None, batch, keys)[1]
    np.testing.assert_array_equal(aux["per_example"], aux["matching"])
    x = jnp.linspace(-1, 1, 64)[:, None]
    plain = flow_matching(linear_net).velocity(params)(x, 0.4, batch.cond)
    np.testing.assert_allclose(
        contrastive(linear_net, mean=9.0, weight=0.0).velocity(params)(x, 0.4, batch.cond), plain
    )
    aux = contrastive(linear_net, mean=0.0).loss(params, None, batch, keys)[1]
    np.testing.assert_allclose(aux["per_example"], aux["matching"] - 0.05 * aux["contrast"], rtol=1e-6)


def test_the_mean_of_images_is_an_image(key):
    mean = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 2, 3)
    x = jax.random.normal(key, (5, 2, 2, 3))
    net = lambda params, x, s, t, cond=None, key=None: expand(over_batch(t, x), x) * x
    actual = contrastive(net, mean=mean, weight=0.25, path=paths.trigonometric()).velocity(None)(x, 0.4)
    expected = 0.75 * 0.4 * x + 0.25 * np.pi / 2 * np.cos(np.pi / 2 * 0.4) * mean
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_an_examples_negative_touches_its_own_loss_alone(key):
    batch, keys = draw(key, 16), as_keys(key, 16)
    loss = functools.partial(contrastive(linear_net, mean=MEAN).loss, jnp.ones((2, 2)), None)
    first = np.asarray(loss(batch, keys)[1]["per_example"])
    moved = batch._replace(negative=batch.negative.at[3].add(1.0))
    assert (np.flatnonzero(np.asarray(loss(moved, keys)[1]["per_example"]) != first) == [3]).all()


@pytest.mark.parametrize("weight", [1.0, 1.5, -0.1, float("nan")])
def test_a_weight_without_a_minimum_is_refused(weight):
    with pytest.raises(ValueError, match=f"weight={weight}"):
        contrastive(linear_net, mean=MEAN, weight=weight)


def test_missing_negatives_and_infinite_ends_are_refused(key):
    with pytest.raises(ValueError, match="batch.negative=None"):
        contrastive(linear_net, mean=MEAN).loss(jnp.ones((2, 2)), None, Batch(jnp.ones((2, 1))), as_keys(key, 2))
    with pytest.raises(ValueError, match="time=times.uniform.*times.interior"):
        contrastive(linear_net, mean=MEAN, path=paths.schroedinger_bridge())
