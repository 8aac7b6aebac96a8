"""Consistency models against their published formulas in noise levels, and in continuous time against their limit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import MEAN, STD, assert_same_method
from test_methods import mlp, mlp_params

from fmjax import oracles, paths, times
from fmjax.keys import example_keys
from fmjax.methods.align_your_flow import GAP, align_your_flow
from fmjax.methods.alpha_flow import alpha_flow
from fmjax.methods.consistency import consistency, consistency_cost
from fmjax.methods.consistency_trajectory import consistency_trajectory
from fmjax.methods.continuous_consistency import angular, continuous_consistency
from fmjax.methods.eulerian import eulerian
from fmjax.methods.lagrangian import lagrangian
from fmjax.nets.adapters import trigonometric_velocity
from fmjax.sampling import heun
from fmjax.types import Batch, Network

pytestmark = pytest.mark.usefixtures("x64")
at = lambda a: a[:, None]
square = lambda a: np.asarray((a**2).mean(1))


@pytest.fixture
def draw():
    """A batch with its source and progress, keys, and parameters of a student and of a target."""
    x0, x1 = np.random.default_rng(3).standard_normal((2, 16, 2))
    params, target = (jax.tree.map(lambda a: a.astype(jnp.float64), mlp_params(seed)) for seed in (0, 1))
    batch = Batch(jnp.asarray(MEAN + STD * x1), x0=jnp.asarray(x0), progress=jnp.linspace(0, 1, 16, endpoint=False))
    return batch, example_keys(jax.random.key(2), jnp.arange(16)), params, target


def denoiser(params, batch, sigma):
    """``D(x1 + sigma x0, sigma)``: in noise levels the map to the data."""
    t = 1 / (1 + sigma)
    x = at(t) * (batch.x1 + at(sigma) * batch.x0)
    return x + at(1 - t) * mlp(params, x, t, jnp.ones_like(t))


def test_easy_consistency_tuning_is_the_published_loss_in_noise_levels(draw):
    """``sqrt(|D - D'|^2 + c^2) - c`` over ``sigma - sigma'``, the same noise, ``D = x1`` where ``sigma' = 0``."""
    batch, keys, params, _ = draw
    aux = consistency(mlp, scale=1e-3).loss(params, None, batch, keys)[1]
    sigma = (1 - aux["s"]) / aux["s"]
    stage = np.floor(8 * np.asarray(batch.progress))
    after = sigma * np.maximum(0, 1 - 2.0 ** -(stage + 1) * (1 + 8 / (1 + np.exp(sigma))))
    assert (aux["t"] == 1).all() and (after == 0).any() and (after > 0).any() and (stage.max(), stage.min()) == (7, 0)
    apart = denoiser(params, batch, sigma) - jnp.where(at(after == 0), batch.x1, denoiser(params, batch, after))
    expected = (np.sqrt(square(apart) + 1e-6) - 1e-3) / (sigma - after)
    np.testing.assert_allclose(aux["per_example"], expected, rtol=1e-8)


def test_consistency_training_compares_neighbours_of_the_grid(draw):
    """Level ``i`` of ``N``: ``(80^(1/7) + i / N (0.002^(1/7) - 80^(1/7)))^7``; its neighbour is level ``i + 1``."""
    batch, keys, params, target = draw
    n = 10 * 2.0 ** np.floor(8 * np.asarray(batch.progress))
    i = np.floor(n * np.linspace(0, 1, 16))  # the last is the end of the grid, whose neighbour is the data
    level = lambda i: (80 ** (1 / 7) + i / n * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    law = lambda key: jnp.asarray(1 / (1 + level(i)))
    method = consistency(
        mlp, time=law, fraction=times.level_fraction, distance="squared", weight="none", bootstrap="target"
    )
    aux = method.loss(params, target, batch, keys)[1]
    after = jnp.asarray(np.where(i < n, level(np.minimum(i + 1, n)), 0))
    end = jnp.where(at(after == 0), batch.x1, denoiser(target, batch, after))
    expected = square(denoiser(params, batch, jnp.asarray(level(i))) - end)
    np.testing.assert_allclose(aux["per_example"], expected, rtol=1e-6)


def test_consistency_distillation_takes_a_heun_step_of_the_teacher(draw):
    batch, keys, params, target = draw
    method = consistency(
        mlp, velocity="own", solver="heun", distance="squared", weight="none", fraction=times.level_fraction
    )
    aux = method.loss(params, target, batch, keys)[1]
    s = aux["s"]
    m = s + times.level_fraction(s, aux["t"], batch.progress) * (1 - s)
    x = at(1 - s) * batch.x0 + at(s) * batch.x1
    step, jump = heun(method.velocity(target)), method.flow_map(params)
    apart = jump(x, s, 1.0) - jump(step(x, s, m), m, 1.0)
    np.testing.assert_allclose(aux["per_example"], square(apart), rtol=1e-9)


def test_what_consistency_cannot_do_is_refused():
    for options, message in (
        ({"distance": "lpips"}, "distance='lpips'.*pseudo_huber.*squared"),
        ({"weight": "snr"}, "weight='snr'.*gap.*none"),
        ({"scale": -1.0}, "scale=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            consistency_cost(**options)
    for options, message in (
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"normalise": -0.1}, "normalise=-0.1"),
        ({"velocity": "chord"}, "velocity='chord'.*own.*conditional"),
        ({"warmup": 2.0}, "warmup=2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            continuous_consistency(mlp, **options)


@pytest.mark.parametrize("velocity", ["conditional", "own"])
def test_the_continuous_gradient_is_eulerian_times_a_positive_factor(velocity, draw):
    """``(4 / pi^2) cos(a) / (sinc(a) sigma)``: ``g = (2 / pi) cos(a) g_E``, ``dF = -(1 - s) du / (sigma sin(a))``."""
    batch, keys, params, target = draw
    sigma, path, net = 0.5, paths.trigonometric(), trigonometric_velocity(Network(mlp), sigma=0.5)
    options = {"velocity": velocity, "path": path, "diagonal": 0.0}
    law = functools.partial(times.to_data, time=functools.partial(times.noise_angle, sigma=0.5))
    ours = continuous_consistency(net, normalise=0.0, sigma=sigma, warmup=0.0, **options)
    theirs = eulerian(net, pair=law, tangent=velocity, stop="all", **options)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(method):
        s = method.loss(params, target, batch, keys)[1]["s"]
        return s, jax.jacrev(lambda p: method.loss(p, target, batch, keys)[1]["per_example"])(params)

    (s, actual), (same, expected) = gradients(ours), gradients(theirs)
    angle = np.pi / 2 * (1 - np.asarray(s))
    factor = 4 / np.pi**2 * np.cos(angle) * angle / np.sin(angle) / sigma
    assert (s == same).all() and (factor > 0).all()
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, factor.reshape((-1,) + (1,) * (b.ndim - 1)) * b, rtol=1e-8, atol=1e-10)


def test_the_warm_up_begins_at_the_velocity_and_the_tangent_is_normalised(draw):
    """``r = 0``: ``g = -cos^2(a) (sigma F - x')``; its gradient is ``-2 g / (|g| + c) / d``, times ``grad F``."""
    batch, keys, params, _ = draw
    batch, path = batch._replace(progress=jnp.zeros(16)), paths.trigonometric()
    method = continuous_consistency(trigonometric_velocity(Network(mlp)), warmup=0.5, normalise=0.1)
    aux = method.loss(params, None, batch, keys)[1]
    s = aux["s"]
    x, v = paths.with_velocity(path, batch.x0, batch.x1, s)
    f = lambda params: mlp(params, x, s, jnp.ones_like(s))
    g = -(jnp.cos(np.pi / 2 * at(1 - s)) ** 2) * (f(params) + 2 / np.pi * v)
    np.testing.assert_allclose(aux["residual"], square(g), rtol=1e-9)
    unit = g / (jnp.linalg.norm(g, axis=1, keepdims=True) + 0.1)
    np.testing.assert_allclose(aux["per_example"], square(unit), rtol=1e-9)
    actual = jax.grad(lambda p: method.loss(p, None, batch, keys)[0])(params)
    expected = jax.grad(lambda p: -(unit * f(p)).sum(1).mean())(params)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_the_derivative_vanishes_at_the_exact_map_of_a_gaussian(draw):
    batch, keys, _, _ = draw
    path = paths.trigonometric()
    exact = oracles.average_velocity(oracles.gaussian(jnp.asarray(MEAN), jnp.asarray(STD), path=path))
    residual = lambda net: continuous_consistency(net, velocity="own", warmup=0.0).loss(None, None, batch, keys)[1][
        "residual"
    ]
    wrong = lambda params, x, s, t, *a: exact(params, x, s, t) + at(t - s)  # of the right velocity
    assert np.max(residual(exact)) < 1e-12 < 1e-3 < np.mean(residual(wrong))


def test_a_trigonometric_network_is_its_map_and_is_read_back_from_it(key):
    """``X_{s,t}(x) = cos(a) x - sin(a) sigma F``, ``v = -(pi / 2) sigma F``, with derivatives through ``s = t``."""
    params, sigma = jax.tree.map(lambda a: a.astype(jnp.float64), mlp_params()), 0.5
    x, s = 0.5 * jax.random.normal(key, (8, 2), jnp.float64), jnp.linspace(0, 0.7, 8)
    net, gap = trigonometric_velocity(Network(mlp), sigma=sigma), jnp.array([0, 0, 1e-9, 1e-4, 0.1, 0.2, 0.25, 0.3])
    u, f, a = net(params, x, s, s + gap), mlp(params, x / sigma, s, s + gap), at(np.pi / 2 * gap)
    np.testing.assert_allclose(x + at(gap) * u, np.cos(a) * x - np.sin(a) * sigma * f, atol=1e-14)
    np.testing.assert_allclose(u[:2], -np.pi / 2 * sigma * f[:2], atol=1e-14)
    np.testing.assert_allclose(angular(u, x, gap), sigma * f, rtol=1e-12, atol=1e-14)
    end = lambda t: net(params, x, s, t)
    _, du = jax.jvp(end, (s,), (jnp.ones(8),))
    np.testing.assert_allclose(du, (end(s + 1e-5) - end(s - 1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="sigma=0"):
        trigonometric_velocity(Network(mlp), sigma=0.0)


def test_align_your_flows_lagrangian_form_stops_the_tangent(draw):
    other = lagrangian(mlp, stop="tangent", diagonal=0.0, pair=GAP)
    assert_same_method(align_your_flow(mlp, form="lagrangian"), other, *draw)
    with pytest.raises(ValueError, match="form='lmd'.*eulerian.*lagrangian"):
        align_your_flow(mlp, form="lmd")


def test_trajectories_that_end_in_the_data_are_compared_there(draw):
    """``t = 1``: nothing is left to map on, and CTM is CD: ``|X_{s,1} - X_{m,1}|^2 = (1 - s)^2 |d|^2``."""
    batch, keys, params, target = draw
    options = {"diagonal": 0.0, "pair": times.to_data, "velocity": "own", "solver": "heun", "bootstrap": "target"}
    options |= {"fraction": times.exponential_fraction, "power": 1.0}
    ours = consistency_trajectory(mlp, **options).loss(params, target, batch, keys)[1]
    theirs = alpha_flow(mlp, **options).loss(params, target, batch, keys)[1]
    np.testing.assert_allclose(ours["per_example"], (1 - ours["s"]) ** 2 * theirs["per_example"], rtol=1e-9)


def test_only_the_input_of_the_comparing_map_has_a_gradient(draw):
    """The gradient of the comparison is the gradient of ``X_{s,t}`` pulled back by the stopped ``X_{t,1}``."""
    batch, keys, params, target = draw
    share = functools.partial(times.constant_fraction, value=0.25)
    method = consistency_trajectory(mlp, diagonal=0.0, fraction=share, power=0.0)
    (_, aux), actual = jax.value_and_grad(method.loss, has_aux=True)(params, target, batch, keys)
    s, t = aux["s"], aux["t"]
    m = s + (t - s) / 4
    x = at(1 - s) * batch.x0 + at(s) * batch.x1
    still, step = method.flow_map(params), heun(method.velocity(target))
    aim = still(still(step(x, s, m), m, t), t, 1.0)
    loss = lambda p: jnp.mean((still(method.flow_map(p)(x, s, t), t, 1.0) - aim) ** 2)
    expected = jax.grad(loss)(params)
    np.testing.assert_allclose(aux["per_example"].mean(), loss(params), rtol=1e-10)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)
