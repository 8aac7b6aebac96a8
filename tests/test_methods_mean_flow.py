"""Mean flow against the published loss, in noise time, and against the Eulerian method that it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import paths, times
from fmjax.keys import as_keys
from fmjax.methods import weighting
from fmjax.methods.eulerian import eulerian
from fmjax.methods.mean_flow import mean_flow
from fmjax.types import Batch, expand

LAW = functools.partial(times.logit_normal, mean=0.4)
NULL, D = 2, 2


def net(params, x, s, t, cond=None, key=None):
    s, t = expand(s, x), expand(t, x)
    shift = 0 if cond is None else jnp.asarray(params["label"])[cond]
    return jnp.tanh(x * params["a"] + s * params["b"] + t * params["c"] + shift)


PARAMS = {
    "a": np.array([0.7, -0.4]),
    "b": np.array([0.2, 0.9]),
    "c": np.array([-0.5, 0.3]),
    "label": np.array([[0.1, -0.2], [0.6, 0.3], [-0.4, 0.0]]),
}


def setting(n=16, cond=None):
    x0, x1 = jax.random.normal(jax.random.key(0), (2, n, D))
    return Batch(x1, x0, cond), as_keys(jax.random.key(1), n)


def graded(method, batch, keys):
    return jax.jit(jax.value_and_grad(lambda p: method.loss(p, PARAMS, batch, keys), has_aux=True))(PARAMS)


def test_it_is_eulerian_with_conditional_velocities_and_adaptive_weight():
    path, (batch, keys) = paths.trigonometric(), setting()
    drawn = {
        "path": path,
        "time": functools.partial(times.earlier, time=LAW),
        "pair": functools.partial(times.ordered_pair, time=LAW),
        "diagonal": 0.75,
    }
    same = eulerian(net, velocity="conditional", tangent="conditional", stop="all", **drawn)
    first, second = (
        graded(mean_flow(net, path=path, power=1.0), batch, keys),
        graded(weighting.adaptive(same), batch, keys),
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("options", [{}, {"guidance": 0.5, "mix": 0.6, "null": NULL, "low": 0.3, "high": 0.8}])
def test_its_gradient_is_that_of_the_published_loss_in_noise_time(options, x64):
    """``|u - sg[v_g - (tau - r) (d/d tau + v_g . grad) u]|^2 / sg[.. + 0.01]`` of ``-net`` at ``1 - tau, 1 - r``."""
    cond = jnp.arange(16) % 3 if options else None
    batch, keys = setting(cond=cond)
    (_, aux), actual = graded(mean_flow(net, power=1.0, **options), batch, keys)
    tau, r = 1 - aux["s"], 1 - aux["t"]
    z, v = expand(1 - tau, batch.x1) * batch.x1 + expand(tau, batch.x1) * batch.x0, batch.x0 - batch.x1
    mf = lambda p, z, r, tau, cond: -net(p, z, 1 - tau, 1 - r, cond)
    v_g = v
    if options:
        v_null, v_c = (mf(PARAMS, z, tau, tau, c) for c in (jnp.full(16, NULL), cond))
        inside = (cond != NULL) & (1 - tau >= 0.3) & (1 - tau <= 0.8)
        assert 4 < inside.sum() < 14 and ((cond == NULL) & (tau != r)).any()
        v_g = jnp.where(inside[:, None], 0.5 * v + (1 - 0.5 - 0.6) * v_null + 0.6 * v_c, v)
    ones, none = jnp.ones_like(tau), jnp.zeros_like(tau)

    def published(p):
        u, du = jax.jvp(lambda z, r, tau: mf(p, z, r, tau, cond), (z, r, tau), (v_g, none, ones))
        square = jnp.sum((u - jax.lax.stop_gradient(v_g - (tau - r)[:, None] * du)) ** 2, 1)
        return jnp.mean(square / jax.lax.stop_gradient(square + 0.01)), square

    (value, square), expected = jax.jit(jax.value_and_grad(published, has_aux=True))(PARAMS)
    np.testing.assert_allclose(aux["per_example"].mean(), value, rtol=1e-12)
    np.testing.assert_allclose(aux["residual"], square / D, rtol=1e-10)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12), actual, expected)


def test_a_quarter_of_the_rows_are_jumps():
    n = 4000
    batch, keys = setting(n)
    aux = jax.jit(mean_flow(net).loss)(PARAMS, PARAMS, batch, keys)[1]
    jumps = np.asarray(aux["is_off_diagonal"])
    assert jumps.sum() == n // 4 and (aux["s"] == aux["t"])[~jumps].all() and (aux["s"] < aux["t"])[jumps].all()
    for rows in (jumps, ~jumps):
        share = np.mean(np.asarray(aux["s"])[rows] < jax.nn.sigmoid(0.4))  # of the smaller of two: 1 - (1/2)^2
        assert abs(share - 0.75) < 4.5 * (0.75 * 0.25 / rows.sum()) ** 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 0.0, "null": NULL}, "guidance=0.0"),
        ({"mix": 1.0, "null": NULL}, "mix=1.0"),
        ({"guidance": 2.0}, "guidance=2.0 and mix=0.0.*null"),
        ({"mix": 0.5}, "guidance=1.0 and mix=0.5.*null"),
        ({"mix": 0.5, "null": NULL, "low": 0.6, "high": 0.6}, "low=0.6, high=0.6"),
        ({"power": -1.0}, "power=-1.0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mean_flow(net, **options)


def test_guidance_without_labels_in_the_batch_is_refused():
    with pytest.raises(ValueError, match="batch.cond=None"):
        jax.eval_shape(mean_flow(net, guidance=2.0, null=NULL).loss, PARAMS, PARAMS, *setting())
