"""Terminal velocity matching against the published loss, in noise time, and the two methods it is the sum of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import paths, times
from fmjax.keys import as_keys, split
from fmjax.methods.flow_matching import flow_matching
from fmjax.methods.lagrangian import lagrangian
from fmjax.methods.terminal_velocity_matching import terminal_velocity_matching
from fmjax.types import Batch, expand

NULL, D, N = 2, 2, 16
PARAMS = {
    "a": np.array([0.7, -0.4]),
    "b": np.array([0.2, 0.9]),
    "c": np.array([-0.5, 0.3]),
    "label": np.array([[0.1, -0.2], [0.6, 0.3], [-0.4, 0.0]]),
}
TARGET = jax.tree.map(lambda a: a + 0.2, PARAMS)


def net(params, x, s, t, cond=None, key=None):
    s, t = expand(s, x), expand(t, x)
    label, w = cond if isinstance(cond, tuple) else (cond, jnp.ones(x.shape[0]))
    shift = 0 if label is None else jnp.asarray(params["label"])[label] * w[:, None]
    return jnp.tanh(x * params["a"] + s * params["b"] + t * params["c"] + shift)


def setting(cond=None):
    x0, x1 = jax.random.normal(jax.random.key(0), (2, N, D))
    return Batch(x1, x0, cond), as_keys(jax.random.key(1), N)


def graded(loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(PARAMS)


def test_without_guidance_it_is_the_lagrangian_residual_plus_flow_matching():
    (batch, keys), path = setting(), paths.trigonometric()
    law = functools.partial(times.logit_normal, mean=0.4)
    first = lagrangian(net, path=path, pair=times.terminal_pair, diagonal=0.0).loss
    second = flow_matching(net, path=path, time=law).loss

    def both(p):
        _, k_jump, k_diagonal = split(keys, 3)
        a, b = first(p, TARGET, batch, k_jump), second(p, TARGET, batch, k_diagonal)
        return a[0] + b[0], a[1]["per_example"]

    (expected, residual), want_gradient = graded(both)
    method = terminal_velocity_matching(net, path=path)
    (value, aux), gradient = graded(lambda p: method.loss(p, TARGET, batch, keys))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(aux["residual"], residual, rtol=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-7), gradient, want_gradient)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("pair", [True, False])
def test_its_gradient_is_that_of_the_published_loss_in_noise_time(pair, scaled, x64):
    """Both errors times ``1/w``, the jvp and its gradient in the target time, the null class at ``w = 1``."""
    label, w, at = jnp.arange(N) % 3, jnp.linspace(1.2, 4.0, N) if pair else jnp.full(N, 2.0), 0.37
    cond = (label, w) if pair else label
    batch, keys = setting(cond)
    options = {} if pair else {"guidance": 2.0}
    method = terminal_velocity_matching(
        net, null=NULL, scaled=scaled, time=lambda key: jnp.full(key.shape, at), **options
    )
    (value, aux), actual = graded(lambda p: method.loss(p, TARGET, batch, keys))
    start, end, prime = 1 - aux["s"], 1 - aux["t"], jnp.full(N, 1 - at)
    w = jnp.where(label == NULL, 1, w)[:, None]
    c = w if scaled else 1
    noised = lambda tau: expand(1 - tau, batch.x1) * batch.x1 + expand(tau, batch.x1) * batch.x0
    f = lambda p, z, tau, r, cond=cond: -net(p, z, 1 - tau, 1 - r, cond)
    null = (jnp.full(N, NULL), jnp.ones(N)) if pair else jnp.full(N, NULL)

    def published(p):
        z, z_prime = noised(start), noised(prime)
        slope, change = jax.jvp(lambda r: f(p, z, start, r), (end,), (jnp.ones(N),))
        gap = (end - start)[:, None]
        ahead = jax.lax.stop_gradient(z + gap * c * slope)
        terminal = (c * (slope + gap * change) - c * f(TARGET, ahead, end, end)) / w
        goal = w * (batch.x0 - batch.x1) + (1 - w) * f(TARGET, z_prime, prime, prime, null)
        matching = (c * f(p, z_prime, prime, prime) - goal) / w
        return jnp.mean(terminal**2) + jnp.mean(matching**2), jnp.mean((w * terminal) ** 2, 1)

    (expected, residual), want_gradient = graded(published)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(aux["residual"], residual, rtol=1e-9)
    np.testing.assert_allclose(aux["per_example"], aux["terminal"] + aux["matching"], rtol=1e-12)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-12), actual, want_gradient)


def test_a_jump_of_no_length_has_no_terminal_error():
    still = lambda key: (times.uniform(key),) * 2
    aux = terminal_velocity_matching(net, pair=still).loss(PARAMS, TARGET, *setting())[1]
    assert not aux["terminal"].any() and (aux["matching"] > 0).all()


def test_velocity_and_flow_map_are_guided_and_have_the_scale_in_them():
    x, s, t, label = jnp.ones((3, D)), jnp.full(3, 0.2), jnp.full(3, 0.7), jnp.arange(3)
    method = terminal_velocity_matching(net, guidance=2.0, null=NULL, scaled=True)
    scale = jnp.array([[2.0], [2.0], [1.0]])
    np.testing.assert_allclose(method.velocity(PARAMS)(x, 0.7, label), scale * net(PARAMS, x, t, t, label), rtol=1e-6)
    expected = x + 0.5 * scale * net(PARAMS, x, s, t, label)
    np.testing.assert_allclose(method.flow_map(PARAMS)(x, s, t, label), expected, rtol=1e-6)


def test_what_makes_no_sense_is_refused():
    for guidance in (0.0, float("inf")):
        with pytest.raises(ValueError, match=f"guidance={guidance}"):
            terminal_velocity_matching(net, guidance=guidance, null=NULL)
    with pytest.raises(ValueError, match="guidance=2.0.*null"):
        terminal_velocity_matching(net, guidance=2.0)
    loss = lambda cond, **options: jax.eval_shape(
        terminal_velocity_matching(net, **options).loss, PARAMS, TARGET, *setting(cond)
    )
    with pytest.raises(ValueError, match="null=None.*scale"):
        loss((jnp.arange(N) % 3, jnp.ones(N)))
    with pytest.raises(ValueError, match="batch.cond=None"):
        loss(None, guidance=2.0, null=NULL)
