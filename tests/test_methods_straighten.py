"""Straightening against closed forms: chords, arcs on any path, where a network is evaluated, retention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, times
from fmjax.keys import as_keys
from fmjax.methods.straighten import arc, straighten
from fmjax.types import Batch

B = 64
KEYS = as_keys(jax.random.key(3), B)


def echo(params, x, s, t, cond=None, key=None):
    """A net that returns its inputs: ``x``, and ``s``, ``t`` in the last two columns."""
    return jnp.concatenate([params * x, s[:, None], t[:, None]], 1)


def states(seed=0, d=2):
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, (B, d)), 3 + jax.random.normal(b, (B, d))


@pytest.mark.parametrize("s, t", [(0.0, 0.5), (0.25, 1.0), (0.0, 1.0)])
def test_the_arc_of_the_linear_path_is_the_chord(s, t):
    x_s, x_t = states()
    r = times.uniform(KEYS, low=s, high=t)
    x, v = arc(paths.linear(), x_s, x_t, jnp.full(B, s), jnp.full(B, t), r)
    share = ((r - s) / (t - s))[:, None]
    np.testing.assert_allclose(x, (1 - share) * x_s + share * x_t, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(v, (x_t - x_s) / (t - s), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", [paths.vp(), paths.sub_vp(), paths.ve(), paths.trigonometric()])
def test_an_arc_of_any_path_is_a_straight_line_on_the_linear_one(path):
    with jax.enable_x64(True):
        s, t = jnp.full(B, 0.3), jnp.full(B, 0.8)
        x_s, x_t = (a.astype(jnp.float64) for a in states())
        r = jnp.linspace(0.3, 0.8, B)
        x, v = arc(path, x_s, x_t, s, t, r)

        # c x at the linear path's time of equal noise, for the ends and for what lies between
        def seen(x, r):
            alpha, beta, *_ = paths.coefficients(path, x, r)
            return x / (alpha + beta), (beta / (alpha + beta))[:, 0]

        (y_s, a), (y_t, b), (y, q) = seen(x_s, s), seen(x_t, t), seen(x, r)
        share = ((q - a) / (b - a))[:, None]
        np.testing.assert_allclose(y, (1 - share) * y_s + share * y_t, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(x[0], x_s[0], atol=1e-12)
        np.testing.assert_allclose(x[-1], x_t[-1], atol=1e-12)
        point = lambda r: arc(path, x_s[:1], x_t[:1], s[:1], t[:1], r[None])[0][0]
        rate = arc(path, x_s[:1], x_t[:1], s[:1], t[:1], r[9:10])[1][0]
        np.testing.assert_allclose(jax.jvp(point, (r[9],), (1.0,))[1], rate)


def test_a_bound_belongs_to_the_segment_that_starts_there():
    net = lambda params, x, s, t, cond=None, key=None: jnp.stack([s, t], 1)
    t = jnp.array([0.0, 0.2, 0.5, 0.7, 1.0])
    for keep in ((), (1,), (0,)):  # kept ones too: (0.5, 0.5) would be evaluated from both sides of the bound
        v = straighten(net, bounds=(0.0, 0.5, 1.0), keep=keep, to_bound=True).velocity(None)(jnp.zeros((5, 2)), t)
        np.testing.assert_array_equal(v, np.stack([t, [0.5, 0.5, 1, 1, 1]], 1).astype(np.float32))
    plain = straighten(net, bounds=(0.0, 0.5, 1.0)).velocity(None)(jnp.zeros((5, 2)), t)
    np.testing.assert_array_equal(plain, np.stack([t, t], 1))


def test_straight_segments_follow_the_chord_and_kept_ones_the_teacher():
    """Bounds 0, 0.5, 1; the net is ``p x``, the teacher ``2 x``: both errors by hand, on the same draw."""
    x0, x1 = states()
    t = jnp.where(jnp.arange(B) % 2 == 0, 0.0, 0.5 + 0.4 * jnp.arange(B) / B)  # every other one is kept
    net = lambda params, x, s, t, cond=None, key=None: params * x
    method = straighten(net, bounds=(0.0, 0.5, 1.0), keep=(1,), retention=3.0)
    _, aux = method.loss(0.7, 2.0, Batch(x1=x1, x0=x0, t=t), KEYS)
    r = aux["t"]
    even = np.arange(B) % 2 == 0
    assert (r[even] >= 0).all() and (r[even] < 0.5).all() and np.ptp(r[even]) > 0.3
    np.testing.assert_array_equal(r[~even], t[~even])
    x = x0 + (r / 0.5)[:, None] * (x1 - x0)
    chord = jnp.mean((0.7 * x - (x1 - x0) / 0.5) ** 2, 1)
    held = 3 * (1 - t) ** 2 * jnp.mean((0.7 * x1 - 2 * x1) ** 2, 1)
    np.testing.assert_allclose(aux["per_example"], np.where(even, chord, held), rtol=1e-5)
    np.testing.assert_array_equal(aux["is_straight"], even)
    np.testing.assert_array_equal(aux["is_kept"], ~even)


def test_the_teacher_gets_no_gradient():
    x0, x1 = states()
    net = lambda params, x, s, t, cond=None, key=None: params * x
    method = straighten(net, bounds=(0.0, 0.5, 1.0), keep=(0,))
    loss = lambda teacher: method.loss(0.7, teacher, Batch(x1=x1, x0=x0, t=jnp.full(B, 0.2)), KEYS)[0]
    assert float(loss(0.7)) == 0 and float(loss(2.0)) > 0  # the student is the teacher: nothing to retain
    assert float(jax.grad(loss)(2.0)) == 0


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_pseudo_huber_is_its_formula_of_the_velocitys_error(size):
    """``(sqrt(|e|^2 + c^2) - c) / d``, ``c = scale d``: quadratic in the small, ``|e| / d`` in the large."""
    with jax.enable_x64(True):
        x0, x1 = (a.astype(jnp.float64) for a in states(d=3))
        e, c = size * jnp.linspace(-1, 1, 3 * B).reshape(B, 3), 0.01 * 3
        net = lambda params, x, s, t, cond=None, key=None: x1 - x0 + e
        method = straighten(net, distance="pseudo_huber", scale=0.01)
        _, aux = method.loss(None, None, Batch(x1=x1, x0=x0, t=jnp.zeros(B)), KEYS)
        square = (np.asarray(e) ** 2).sum(1)
        np.testing.assert_allclose(aux["per_example"], (np.sqrt(square + c**2) - c) / 3, rtol=1e-6)
        near = {1e-4: square / (2 * c * 3), 1e3: np.sqrt(square) / 3}
        if size in near:
            np.testing.assert_allclose(aux["per_example"], near[size], rtol=1e-3)


def test_the_perceptual_cost_sees_the_data_that_the_last_segment_points_to():
    """On the chord ``x_r + (1 - r) v`` is ``x1`` itself: a net off by 1 pays (1 - r)^2 for it."""
    x0, x1 = states()
    off = lambda by: lambda params, x, s, t, cond=None, key=None: x1 - x0 + by
    seen = lambda a, b: jnp.mean((a - b) ** 2, 1)
    batch = Batch(x1=x1, x0=x0, t=jnp.zeros(B))
    right, _ = straighten(off(0.0), perceptual=seen).loss(None, None, batch, KEYS)
    assert float(right) < 1e-10
    _, aux = straighten(off(1.0), perceptual=seen).loss(None, None, batch, KEYS)
    np.testing.assert_allclose(aux["per_example"], 1 + (1 - aux["t"]) ** 2, rtol=1e-4)


def test_the_u_shaped_law_has_its_density():
    """The distribution function in closed form, by Kolmogorov and Smirnov's distance (its 1e-3 quantile 1.95)."""
    n, a = 20_000, 4.0
    t = np.sort(np.asarray(times.u_shaped(as_keys(jax.random.key(0), n))))
    cdf = 0.5 * (np.expm1(a * t) - np.expm1(a * (1 - t)) + np.expm1(a)) / np.expm1(a)
    assert np.sqrt(n) * np.abs(cdf - (np.arange(n) + 0.5) / n).max() < 1.95
    density = a / 2 * (np.exp(0.0) + np.exp(a)) / np.expm1(a)  # spec's 2.07 at the ends
    assert abs(density - 2.07) < 0.01


def test_reflow_of_a_gaussian_learns_the_line_to_its_own_pair():
    """One straight segment, linear net in x: least squares of the loss is the closed form, exact in one Euler step."""
    oracle = oracles.gaussian(jnp.array([0.75, -0.5]), jnp.array([0.5, 1.5]))
    x0 = jax.random.normal(jax.random.key(1), (B, 2))
    x1 = oracle.flow_map(x0, jnp.zeros(B), jnp.ones(B))

    def net(params, x, s, t, cond=None, key=None):
        start = (x - s[:, None] * params[0]) / (1 - s[:, None] + s[:, None] * params[1])
        return params[0] + (params[1] - 1) * start

    params = (jnp.array([0.75, -0.5]), jnp.array([0.5, 1.5]))
    method = straighten(net)
    batch = Batch(x1=x1, x0=x0, t=jnp.zeros(B))
    loss, grads = jax.value_and_grad(method.loss, has_aux=True)(params, params, batch, KEYS)
    assert float(loss[0]) < 1e-10 and all(np.abs(g).max() < 1e-4 for g in grads)
    np.testing.assert_allclose(x0 + method.velocity(params)(x0, 0.0), x1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bounds": (0.5, 0.5)}, r"bounds=\(0.5, 0.5\)"),
        ({"bounds": (0.0, 1.5)}, r"bounds=\(0.0, 1.5\)"),
        ({"bounds": (0.0,)}, r"bounds=\(0.0,\)"),
        ({"keep": (0,)}, r"keep=\(0,\)"),
        ({"bounds": (0.0, 0.5, 1.0), "keep": (2,)}, r"keep=\(2,\).* 0 .. 1"),
        ({"distance": "huber"}, "distance='huber'.*squared, pseudo_huber"),
        ({"retention": -1.0}, "retention=-1.0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"bounds": (0.0, 0.5), "perceptual": abs}, "perceptual.*end at t = 1"),
        ({"bounds": (0.0, 0.5, 1.0), "keep": (1,), "perceptual": abs}, "perceptual.*not keep"),
        ({"path": paths.two_sided()}, "straightening"),
    ],
)
def test_what_cannot_work_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        straighten(echo, **options)


def test_a_batch_that_is_no_trajectory_is_refused():
    with pytest.raises(ValueError, match="batch.x0=None"):
        straighten(echo).loss(1.0, 1.0, Batch(states()[1]), KEYS)


def test_a_law_that_is_no_density_is_refused():
    with pytest.raises(ValueError, match="sharpness=0.0"):
        times.u_shaped(KEYS, sharpness=0.0)
