"""Guided flow maps on Gaussian classes of one variance, whose guided flow has a closed form for every scale.

The velocity is affine in the mean, so ``v_null + w (v_c - v_null)`` is the velocity of the mean
``m_null + w (m_c - m_null)``.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, sampling
from fmjax.keys import as_keys
from fmjax.methods.improved_mean_flow import improved_mean_flow
from fmjax.methods.lagrangian import lagrangian
from fmjax.methods.mean_flow import mean_flow
from fmjax.methods.terminal_velocity_matching import terminal_velocity_matching
from fmjax.types import Batch, expand, over_batch

MEANS, STD, NULL = np.array([-0.8, 1.0, 0.3]), 0.6, 2  # the last one is of the null label
Z = 4.5


def exact(x, s, t, label, scale):
    """``u = m + k (x - s m)``, ``k = ((t + s)(1 + V) - 2) / (C_s + sqrt(C_s C_t))``, ``C_t = (1 - t)^2 + t^2 V``.

    It is ``(X_{s,t}(x) - x) / (t - s)`` of the Gaussian of the guided mean; the null class is guided nowhere.
    """
    means = jnp.asarray(MEANS)
    m, var = expand(means[NULL] + scale * (means[label] - means[NULL]), x), STD**2
    s, t = expand(s, x), expand(t, x)
    at = lambda t: (1 - t) ** 2 + t**2 * var
    return m + ((t + s) * (1 + var) - 2) / (at(s) + jnp.sqrt(at(s) * at(t))) * (x - s * m)


def test_the_closed_form_is_the_oracles(x64):
    x, s, label = jnp.linspace(-2, 2, 6)[:, None], jnp.linspace(0, 0.6, 6), jnp.arange(6) % 3
    mean = MEANS[NULL] + 1.7 * (MEANS[label] - MEANS[NULL])
    u = oracles.average_velocity(oracles.gaussian(jnp.asarray(mean)[:, None], jnp.full(1, STD)))
    for t in (s, s + 0.4):
        np.testing.assert_allclose(exact(x, s, t, label, 1.7), u(None, x, s, t), rtol=1e-8)


def features(x, s, t):
    s, t = expand(s, x), expand(t, x)
    return jnp.stack([jnp.ones_like(x), x, s * x, (t - s) * jnp.ones_like(x), (t - s) * x])


def net(params, x, s, t, cond=None, key=None):
    """The closed form of scale ``w + params["off"]`` plus ``sum_k params["k"][label, k] phi_k``.

    ``w`` comes from a condition ``(labels, w)``; where there are only labels it is one.
    """
    s, t = over_batch(s, x), over_batch(t, x)
    label, w = cond if isinstance(cond, tuple) else (cond, jnp.ones(x.shape[0]))
    off = jnp.einsum("bk,kb...->b...", params["k"][label], features(x, s, t))
    return exact(x, s, t, label, w + params["off"]) + off


def draw(key, n):
    """Labels, the null one among them, and data of each class."""
    label = jnp.arange(n) % 3
    return jnp.asarray(MEANS)[label][:, None] + STD * jax.random.normal(key, (n, 1)), label


def scores(method, points, groups=600, rows=24):
    """``z`` of the mean gradient to ``k``, ``[3, K]``, at each of the points, from independent batches."""

    @jax.jit
    def moments(key):
        x1, label = draw(key, groups * rows)
        keys = as_keys(jax.random.fold_in(key, 1), groups * rows)
        batches = jax.tree.map(lambda a: a.reshape(groups, rows, *a.shape[1:]), (Batch(x1, cond=label), keys))

        def at(point):
            loss = lambda k, batch, key: method.loss(point | {"k": k}, point, batch, key)[0]
            g = jax.vmap(jax.grad(loss), (None, 0, 0))(point["k"], *batches)
            return g.mean(0) / (g.std(0) / groups**0.5 + 1e-5)  # rounding errors do not count

        return jax.lax.map(at, points)

    return np.asarray(moments(jax.random.key(3)))


def plain(scale):
    """The points of a method of one scale: its closed form, the one of another scale, and away from both."""
    return {
        "off": scale - 1 + jnp.array([0.0, -1.5, 0.0]),
        "k": jnp.stack([jnp.zeros((3, 5)), jnp.zeros((3, 5)), jnp.tile(jnp.array([1.0, 0.0, 0.0, 1.0, 0.0]), (3, 1))]),
    }


def two_heads(params, x, s, t, cond=None, key=None):
    return jnp.concatenate([net(params, x, s, t, cond), net(params, x, s, s, cond)], -1)


def unscaled(params, x, s, t, cond=None, key=None):
    """What terminal velocity matching, ``scaled``, multiplies by the scale of a row that has a class."""
    label, w = cond
    return net(params, x, s, t, cond) / jnp.where(label == NULL, 1, w)[:, None]


def conditional(params, x, s, t, cond=None, key=None):
    return exact(x, s, t, cond, 1.0)


every = functools.partial(sampling.random_scale, low=1.0, high=3.0)
CASES = {
    "mean_flow": (mean_flow(net, guidance=0.8, mix=0.6, null=NULL), plain(2.0)),
    "improved_mean_flow": (every(improved_mean_flow(net, null=NULL)), plain(1.0)),
    "improved_mean_flow, head": (every(improved_mean_flow(two_heads, null=NULL, head=True)), plain(1.0)),
    "terminal_velocity_matching": (every(terminal_velocity_matching(unscaled, null=NULL, scaled=True)), plain(1.0)),
    "lagrangian": (
        every(lagrangian(net, teacher=sampling.guided_teacher(conditional, null=NULL), diagonal=0.0)),
        plain(1.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_only_the_guided_flow_map_of_this_scale_is_stationary(name):
    """At another scale the classes move and the null one does not; else each class is held to its own mean."""
    z, off, away = np.abs(scores(*CASES[name]))
    assert z.max() < Z, z
    assert off[:2].max() > 2 * Z and off[NULL].max() < Z, off
    assert (away.max(1) > 2 * Z).all(), away
