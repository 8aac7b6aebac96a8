"""EDM's loss and preconditioning as published, its view as a velocity, and predictions of noise, data and v."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from fmjax import oracles, paths, sampling, times
from fmjax.keys import as_keys, split
from fmjax.methods import common as c
from fmjax.methods import denoising, edm, flow_matching, lagrangian
from fmjax.methods.denoising import PREDICTS
from fmjax.nets import preconditioning
from fmjax.sampling import diffusion, grids
from fmjax.types import Batch, expand

SD = 0.5


def raw(params, x, s, t, cond=None, key=None):
    """Any function of its input and of its noise input."""
    return jnp.sin(params * x + 3 * expand(s, x)) + (0 if cond is None else expand(cond, x))


def denoising_net(net=raw, **options):
    return preconditioning.preconditioned(net, preconditioning.edm(sigma_data=SD, **options))


def published(params, y, sigma, cond=None):
    """``D(y; sigma)`` of arXiv 2206.00364, table 1."""
    level = expand(sigma, y)
    skip, out = SD**2 / (level**2 + SD**2), level * SD / jnp.sqrt(level**2 + SD**2)
    noise_input = jnp.log(sigma) / 4
    return skip * y + out * raw(params, y / jnp.sqrt(level**2 + SD**2), noise_input, noise_input, cond)


def test_the_velocity_is_that_of_the_published_denoiser(x64, key):
    sigma, y = jnp.geomspace(0.002, 80, 7), jax.random.normal(key, (7, 3))
    cond = jnp.linspace(-1, 1, 7)
    method = edm(denoising_net())
    y = y * expand(sigma, y)
    denoise = jax.jit(sampling.denoiser(method.velocity(2.0)))
    for labels in (None, cond):
        np.testing.assert_allclose(denoise(y, sigma, labels), published(2.0, y, sigma, labels), rtol=1e-9, atol=1e-10)
    # (D - x) / (1 - t) itself, and the score (D - y) / sigma^2 of the linear path's own scale
    t = 1 / (1 + sigma)
    x = y * expand(t, y)
    v = (published(2.0, y, sigma) - x) / expand(1 - t, x)
    np.testing.assert_allclose(method.velocity(2.0)(x, t), v, rtol=1e-8)
    expected = (published(2.0, y, sigma) - y) / expand(sigma, y) ** 2 / expand(t, y)
    np.testing.assert_allclose(method.score(2.0)(x, t), expected, rtol=1e-7, atol=1e-7)


def test_the_loss_is_the_published_one_at_the_levels_drawn(x64, key):
    """``lambda |D - x1|^2``, also with a coupling's source; the levels are distributed as in EDM by default."""
    x1, x0 = jax.random.normal(key, (2, 512, 3))
    keys = as_keys(key, 512)
    _, aux = jax.jit(edm(denoising_net()).loss)(2.0, 2.0, Batch(x1, x0=x0), keys)
    t = aux["t"]
    sigma = (1 - t) / t
    error = c.mse(published(2.0, x1 + expand(sigma, x0) * x0, sigma), x1)
    np.testing.assert_allclose(aux["per_example"], (sigma**2 + SD**2) / (sigma * SD) ** 2 * error, rtol=1e-5)
    np.testing.assert_allclose(aux["residual"], error / (1 - t) ** 2, rtol=1e-5)
    assert stats.kstest(np.log(sigma), stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3
    law = functools.partial(times.noise_level, mean=-1.2, std=1.2)
    np.testing.assert_allclose(t, law(split(keys, 3)[0]), rtol=1e-14)
    below = special.ndtr(-1.2 / 1.2)  # P(sigma > 1) = 0.159: the noise half
    assert abs((t < 0.5).mean() - below) < 4 * np.sqrt(below * (1 - below) / 512)


def test_gaussian_data_of_that_deviation_leave_the_network_nothing_to_do(x64, key):
    law = oracles.gaussian(jnp.zeros(2), SD)
    x, t = jax.random.normal(key, (9, 2)), jnp.linspace(0.02, 0.99, 9)
    still = edm(denoising_net(lambda params, x, s, t, cond=None, key=None: 0 * x), sigma_data=SD)
    np.testing.assert_allclose(still.velocity(None)(x, t), law.velocity(x, t), atol=1e-12)
    n = 40_000
    _, aux = jax.jit(lambda key: still.loss(None, None, Batch(law.sample(key, n)), as_keys(key, n)))(key)
    each = np.asarray(aux["per_example"])  # of F*, as F is zero
    for part in (each, each[aux["t"] < 0.5], each[aux["t"] > 0.9]):
        assert abs(part.mean() - 1) < 4 * part.std() / len(part) ** 0.5


def test_on_another_path_it_is_the_changed_velocity(x64, key):
    path, x, t = paths.vp(), jax.random.normal(key, (3, 2)), jnp.array([0.2, 0.5, 0.9])
    expected = paths.change(edm(denoising_net()).velocity(2.0), paths.linear(), path)(x, t)
    np.testing.assert_allclose(edm(denoising_net(), path=path).velocity(2.0)(x, t), expected, rtol=1e-12)
    batch, keys = Batch(x), as_keys(key, 3)
    ours, theirs = (m.loss(2.0, 2.0, batch, keys)[0] for m in (edm(denoising_net()), edm(denoising_net(), path=path)))
    assert ours == theirs


def test_its_parameters_start_flows_and_flow_maps_that_are_it(x64, key):
    """The same network, under any method; it trains on from there."""
    net, velocity = denoising_net(), edm(denoising_net()).velocity(2.0)
    x, s, t = jax.random.normal(key, (3, 2)), jnp.array([0.1, 0.4, 0.6]), jnp.array([0.3, 0.5, 0.9])
    np.testing.assert_array_equal(flow_matching(net).velocity(2.0)(x, s), velocity(x, s))
    jump = lagrangian(net).flow_map(2.0)(x, s, t)
    np.testing.assert_allclose(jump, x + expand(t - s, x) * velocity(x, s), rtol=1e-12)
    method, batch, keys = flow_matching(net), Batch(x), as_keys(key, 3)
    assert jax.grad(lambda p: method.loss(p, p, batch, keys)[0])(2.0) != 0


def test_it_is_sampled_by_edms_sampler_between_the_levels_it_is_told(key):
    """The network that a Gaussian of another deviation needs: the exact map."""
    law = oracles.gaussian(jnp.array([0.4, -0.1]), jnp.array([0.6, 0.3]))

    def exact(params, y, s, t, cond=None, key=None):
        at = expand(jax.nn.sigmoid(-4 * s), y)
        var = (1 - at) ** 2 + (SD * at) ** 2
        x = y * jnp.sqrt(var)
        return (law.velocity(x, at[:, 0]) - (SD**2 * at - (1 - at)) / var * x) * jnp.sqrt(var) / SD

    grid, velocity = grids.edm_grid(160), edm(denoising_net(exact)).velocity(None)
    x0 = (1 - grid[0]) * jax.random.normal(key, (64, 2))
    end = jax.jit(lambda x: sampling.sample(diffusion.edm_heun(velocity), x, grid))(x0)
    # second order: 6 percent at 18 levels, 80 times less here; and float32
    np.testing.assert_allclose(end, law.flow_map(x0, grid[0], 1.0), atol=3e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma_data": 0.0}, "sigma_data=0.0"),
        ({"path": paths.two_sided()}, "edm.*latent"),
    ],
)
def test_what_edm_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        edm(raw, **options)


@pytest.mark.parametrize("path", [paths.vp(), paths.linear()])
def test_errors_of_predictions_are_the_noises_times_the_stated_weights(path, x64, key):
    """Of one wrong noise prediction, seen as each of the others."""
    x1, keys = jax.random.normal(key, (16, 3)), as_keys(key, 16)
    inner = functools.partial(times.uniform, low=0.05, high=0.95)

    def predicting(what):
        def net(params, x, s, t, cond=None, key=None):
            return paths.convert(path, x, jnp.sin(x) + expand(s, x), s, kind="noise", to=what)

        method = denoising(net, path=path, time=inner, predict=what)
        return jax.jit(lambda x1, keys: method.loss(None, None, Batch(x1), keys)[1])(x1, keys)

    noise = predicting("noise")
    alpha, beta = path.coefficients(noise["t"])
    ratio = (alpha / beta) ** 2
    for what, weight in (("data", ratio), ("v_prediction", beta**2 * (ratio + 1) ** 2)):
        np.testing.assert_allclose(predicting(what)["per_example"], weight * noise["per_example"], rtol=1e-8)
    straight = flow_matching(
        lambda params, x, s, t, cond=None, key=None: paths.convert(
            path, x, jnp.sin(x) + expand(s, x), s, kind="noise", to="velocity"
        ),
        path=path, time=inner,
    ).loss(None, None, Batch(x1), keys)[1]  # fmt: skip
    if path.coefficients(jnp.asarray(0.25))[0] == 0.75:  # linear: (1 + alpha / beta)^2
        np.testing.assert_allclose(straight["per_example"], (1 + alpha / beta) ** 2 * noise["per_example"], rtol=1e-8)


@pytest.mark.parametrize("predict", PREDICTS)
def test_every_prediction_is_read_as_the_velocity_and_the_score(predict, x64, key):
    path = paths.vp()
    law = oracles.gaussian(jnp.array([0.4, -0.1]), jnp.array([0.6, 0.3]), path=path)
    net = lambda params, x, s, t, cond=None, key=None: paths.convert(
        path, x, law.velocity(x, s), s, kind="velocity", to=predict
    )
    method = denoising(net, path=path, predict=predict)
    x, t = jax.random.normal(key, (4, 2)), jnp.array([0.05, 0.4, 0.7, 0.99])
    np.testing.assert_allclose(method.velocity(None)(x, t), law.velocity(x, t), rtol=1e-8)
    np.testing.assert_allclose(method.score(None)(x, t), law.score(x, t), rtol=1e-8)


def test_on_vp_the_loss_is_finite_at_the_data_where_the_velocity_is_not(key):
    net = lambda params, x, s, t, cond=None, key=None: x
    end = lambda key: jnp.ones(key.shape)
    x1, keys = jax.random.normal(key, (4, 2)), as_keys(key, 4)
    for predict in PREDICTS:
        loss, _ = denoising(net, path=paths.vp(), time=end, predict=predict).loss(None, None, Batch(x1), keys)
        assert np.isfinite(loss)
    loss, _ = flow_matching(net, path=paths.vp(), time=end).loss(None, None, Batch(x1), keys)
    assert not np.isfinite(loss)


def test_what_denoising_cannot_do_is_refused():
    with pytest.raises(ValueError, match="predict='nose'.*'noise'"):
        denoising(raw, predict="nose")
    with pytest.raises(ValueError, match="denoising.*latent"):
        denoising(raw, path=paths.two_sided())
