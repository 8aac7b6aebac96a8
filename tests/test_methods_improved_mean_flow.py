"""Improved mean flow against the published loss, in noise time, and against the Eulerian method that it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import times
from fmjax.keys import as_keys
from fmjax.methods import weighting
from fmjax.methods.eulerian import eulerian
from fmjax.methods.improved_mean_flow import improved_mean_flow
from fmjax.types import Batch, expand

NULL, D, N = 2, 2, 16
PARAMS = {
    "a": np.array([0.7, -0.4, 0.3, 0.9]),
    "b": np.array([0.2, 0.9, -0.6, 0.1]),
    "c": np.array([-0.5, 0.3, 0.2, 0.4]),
    "label": np.array([[0.1, -0.2, 0.5, 0.2], [0.6, 0.3, -0.1, 0.4], [-0.4, 0.0, 0.2, 0.1]]),
}
ONE = jax.tree.map(lambda a: a[..., :D], PARAMS)


def net(params, x, s, t, cond=None, key=None):
    """Of one head or two, as the parameters are wide; the scale moves the label's part."""
    s, t = expand(s, x), expand(t, x)
    label, w = cond if isinstance(cond, tuple) else (cond, jnp.ones(x.shape[0]))
    shift = 0 if label is None else jnp.asarray(params["label"])[label] * w[:, None]
    return jnp.tanh(jnp.tile(x, len(params["a"]) // D) * params["a"] + s * params["b"] + t * params["c"] + shift)


def setting(cond=None):
    x0, x1 = jax.random.normal(jax.random.key(0), (2, N, D))
    return Batch(x1, x0, cond), as_keys(jax.random.key(1), N)


def graded(method, params, batch, keys):
    return jax.jit(jax.value_and_grad(lambda p: method.loss(p, params, batch, keys), has_aux=True))(params)


def test_without_a_head_it_is_eulerian_with_its_own_tangent():
    batch, keys = setting()
    law = functools.partial(times.logit_normal, mean=0.4)
    laws = {"time": functools.partial(times.earlier, time=law), "pair": functools.partial(times.ordered_pair, time=law)}
    same = eulerian(net, velocity="conditional", tangent="own", stop="all", diagonal=0.5, **laws)
    first, second = (
        graded(improved_mean_flow(net, power=1.0), ONE, batch, keys),
        graded(weighting.adaptive(same), ONE, batch, keys),
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first[0][1]["is_on_diagonal"].sum() == N // 2


@pytest.mark.parametrize("head", [True, False])
def test_its_gradient_is_that_of_the_published_loss_in_noise_time(head, x64):
    """``V = u + (tau - r) sg[du]`` along the net's own ``v``, guidance of the row's scale, both losses adapted."""
    label, w = jnp.arange(N) % 3, jnp.linspace(1.0, 6.0, N)
    params = PARAMS if head else ONE
    batch, keys = setting((label, w))
    method = improved_mean_flow(net, head=head, null=NULL, low=0.2, high=0.8, power=1.0)
    (value, aux), actual = graded(method, params, batch, keys)
    tau, r = 1 - aux["s"], 1 - aux["t"]
    z, v_t = expand(1 - tau, batch.x1) * batch.x1 + expand(tau, batch.x1) * batch.x0, batch.x0 - batch.x1

    def heads(p, z, tau, r, cond):
        out = -net(p, z, 1 - tau, 1 - r, cond)
        return jnp.split(out, 2, -1) if head else (out, out)

    v_c = heads(params, z, tau, tau, (label, w))[1]
    v_u = heads(params, z, tau, tau, (jnp.full(N, NULL), jnp.ones(N)))[1]
    inside = (label != NULL) & (tau >= 0.2) & (tau <= 0.8)
    v_g = v_t + jnp.where(inside, 1 - 1 / w, 0)[:, None] * (v_c - v_u)
    assert 4 < inside.sum() < 11

    def published(p):
        u_fn = lambda z, tau: heads(p, z, tau, r, (label, w))
        u, du, v = jax.jvp(u_fn, (z, tau), (v_c, jnp.ones(N)), has_aux=True)
        mapped = u + (tau - r)[:, None] * jax.lax.stop_gradient(du)
        adapt = lambda square: square / jax.lax.stop_gradient(square + 0.01)
        square = jnp.sum((mapped - v_g) ** 2, 1)
        second = adapt(jnp.sum((v - v_g) ** 2, 1)) if head else 0
        return jnp.mean(adapt(square) + second), square

    (want_value, square), expected = jax.jit(jax.value_and_grad(published, has_aux=True))(params)
    np.testing.assert_allclose(value, want_value, rtol=1e-12)
    np.testing.assert_allclose(aux["residual"], square / D, rtol=1e-10)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12), actual, expected)


def test_velocity_and_flow_map_are_those_of_the_first_head():
    method, x, s, t = improved_mean_flow(net, head=True), jnp.ones((4, D)), jnp.full(4, 0.2), jnp.full(4, 0.7)
    first = lambda s, t: net(PARAMS, x, s, t)[:, :D]
    np.testing.assert_allclose(method.velocity(PARAMS)(x, 0.7), first(t, t), rtol=1e-6)
    np.testing.assert_allclose(method.flow_map(PARAMS)(x, s, t), x + 0.5 * first(s, t), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "params", "cond", "message"),
    [
        ({"head": True}, ONE, None, r"head=True.*\(.*, 2\) into \(.*, 2\).*outputs=2"),
        ({"null": NULL}, ONE, jnp.arange(N) % 3, "null=.*sampling.random_scale"),
        ({}, ONE, (jnp.arange(N) % 3, jnp.ones(N)), "null=None.*scale"),
        ({"null": NULL}, ONE, None, "batch.cond=None"),
    ],
)
def test_what_does_not_fit_is_refused(options, params, cond, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(improved_mean_flow(net, **options).loss, params, params, *setting(cond))


def test_bad_options_are_refused():
    for options in ({"floor": 0.0}, {"floor": 0.0, "head": True}):
        with pytest.raises(ValueError, match="floor=0.0"):
            improved_mean_flow(net, **options)
    with pytest.raises(ValueError, match="low=0.5, high=0.2"):
        improved_mean_flow(net, null=NULL, low=0.5, high=0.2)
    with pytest.raises(ValueError, match="diagonal=1.5"):
        improved_mean_flow(net, head=True, diagonal=1.5)
