"""Guidance on Gaussians, where the end point of the guided flow has a closed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import NULL, conditional

from fmjax import paths, sampling
from fmjax.nets.adapters import from_linen
from fmjax.nets.mlp import MLP
from fmjax.sampling import grids, guidance
from fmjax.types import expand, over_batch


def counted(velocity, calls):
    def count(x, t, cond=None):
        jax.debug.callback(lambda c: calls.append(np.asarray(c)), cond)
        return velocity(x, t, cond)

    return count


def ends(velocity, ts, labels=(0, 1)):
    """``(slope, offset)`` of the affine end point ``x0 -> x1``, for each label."""
    cond = jnp.tile(jnp.asarray(labels), 2)
    x = jnp.repeat(jnp.array([0.0, 1.0]), len(labels))[:, None]
    xs = jax.jit(lambda x, cond: sampling.integrate(velocity, x, ts, cond=cond)[0])(x, cond)
    low, high = np.asarray(xs[-1, :, 0]).reshape(2, -1)
    return high - low, low


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()])
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 4.0])
def test_with_equal_variances_the_guided_flow_ends_on_the_tilt(scale, path, x64):
    """``N((1 - w) m_null + w m_c, V)``."""
    means, var = np.array([-1.0, 2.0, 0.4]), 0.7
    guided = guidance.classifier_free(conditional(means, [var] * 3, path), scale=scale, null=NULL)
    slope, offset = ends(guided, grids.uniform_grid(60))
    np.testing.assert_allclose(slope, np.sqrt(var), rtol=1e-6)
    np.testing.assert_allclose(offset, (1 - scale) * means[NULL] + scale * means[:2], atol=1e-6)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_with_unequal_variances_it_ends_on_their_geometric_mean(scale, x64):
    """``V_null^{1 - w} V_c^w``; for w = 3, ``N(0, 1.2)`` and ``N(1.5, 0.3)`` give ``N(2.25, 0.01875)``."""
    velocity = conditional([1.5, 0.0, 0.0], [0.3, 1.2, 1.2])
    guided = guidance.classifier_free(velocity, scale=scale, null=NULL)
    slope, offset = ends(guided, grids.uniform_grid(200))
    np.testing.assert_allclose(slope**2, [1.2 ** (1 - scale) * 0.3**scale, 1.2], rtol=1e-6)
    assert abs(slope[0] ** 2 - 1 / ((1 - scale) / 1.2 + scale / 0.3)) > 0.01
    if scale == 3.0:
        assert slope[0] ** 2 == pytest.approx(0.01875, rel=1e-6)
        assert offset[0] == pytest.approx(2.25, rel=1e-6)


def test_scale_one_is_the_very_same_function():
    velocity = conditional([-1.0, 2.0, 0.4], [0.5, 0.7, 1.0])
    assert guidance.classifier_free(velocity, scale=1.0, null=NULL) is velocity
    assert guidance.classifier_free(velocity, weight=0.0, null=NULL) is velocity
    assert guidance.autoguidance(velocity, velocity, scale=1.0) is velocity


def test_weight_is_scale_minus_one_and_one_of_them_is_given(key):
    velocity = conditional([-1.0, 2.0, 0.4], [0.5, 0.7, 1.0])
    x, cond, t = jax.random.normal(key, (4, 1)), jnp.array([0, 1, 1, 0]), 0.3
    by_scale = guidance.classifier_free(velocity, scale=2.5, null=NULL)(x, t, cond)
    by_weight = guidance.classifier_free(velocity, weight=1.5, null=NULL)(x, t, cond)
    np.testing.assert_array_equal(by_scale, by_weight)
    paper = 2.5 * velocity(x, t, cond) - 1.5 * velocity(x, t, None)  # (1 + w) v_c - w v_null
    np.testing.assert_allclose(by_weight, paper, rtol=1e-5, atol=1e-6)
    for both in ({}, {"scale": 2.0, "weight": 1.0}):
        with pytest.raises(ValueError, match="scale=.*, weight=.*: "):
            guidance.classifier_free(velocity, null=NULL, **both)
    with pytest.raises(TypeError, match="weight=function: "):
        guidance.classifier_free(velocity, null=NULL, weight=guidance.interval(2.0))


def test_the_null_condition_takes_the_shape_and_type_of_the_condition():
    """A label, a vector, nothing, and a tree of them; ``scale = 0`` is the null condition's velocity."""
    seen = []
    velocity = lambda x, t, cond=None: seen.append(cond) or x
    x = jnp.ones((3, 2))
    labels, vectors = jnp.array([0, 1, 1], jnp.int8), jnp.ones((3, 4))
    tree = {"label": labels, "text": vectors}
    for cond, null in ((labels, 7), (vectors, jnp.arange(4.0)), (tree, {"label": 7, "text": 0.0}), (labels, None)):
        guidance.classifier_free(velocity, scale=0.0, null=null)(x, 0.5, cond)
    label, vector, both, none = seen[1::2]
    assert label.dtype == jnp.int8 and label.tolist() == [7, 7, 7]
    assert vector.tolist() == [[0, 1, 2, 3]] * 3
    assert both["label"].tolist() == [7, 7, 7] and not both["text"].any() and both["text"].shape == (3, 4)
    assert none is None


def test_a_network_with_labels_is_guided_by_its_null_class(key):
    model = from_linen(MLP(width=8, depth=1, classes=2))
    x, cond, t = jnp.ones((4, 1)), jnp.array([0, 1, 0, 1]), jnp.full(4, 0.4)
    params = model.init(key, x, cond)
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(key, p.shape), params)  # its last layer starts at zero
    velocity = lambda x, t, cond=None: model.net(params, x, t, t, cond)
    guided = guidance.classifier_free(velocity, scale=3.0, null=2)(x, t, cond)
    free, given = velocity(x, t, jnp.full(4, 2)), velocity(x, t, cond)
    assert not np.allclose(free, given)
    np.testing.assert_allclose(guided, free + 3 * (given - free), rtol=1e-6)


EDGES = (-1.5, 2.0)
CORNERS = {
    "linear": (paths.linear(), lambda r: r / (1 + r)),
    "trigonometric": (paths.trigonometric(), lambda r: 2 / np.pi * np.arctan(r)),
}


def grid(name, n=60):
    """Even steps in each third: before the interval, inside it, and after it."""
    _, inverse = CORNERS[name]
    low, high = (inverse(np.exp(edge / 2)) for edge in EDGES)
    parts = [np.linspace(a, b, n, endpoint=False) for a, b in ((0, low), (low, high), (high, 1))]
    return np.append(np.concatenate(parts), 1.0)


def test_an_interval_in_log_snr_gives_the_same_samples_on_every_path(x64):
    """With equal variances the mean ends at ``m_c + (w - 1)(m_c - m_0) (g(high) - g(low)) sqrt(V)``.

    ``g = beta / sqrt(C) = (V + 1 / SNR)^{-1/2}``, which no path changes. A step of RK4 ends on each edge, but a stage
    on an edge may fall either side of it: the tolerance is one such stage, ``h / 6`` of the largest jump.
    """
    means, var, scale = np.array([-1.0, 2.0, 0.4]), 0.7, 3.0
    g = lambda snr: 1 / np.sqrt(var + 1 / snr)
    gain = (scale - 1) * np.sqrt(var) * (g(np.exp(EDGES[1])) - g(np.exp(EDGES[0])))
    want = means[:2] + gain * (means[:2] - means[NULL])
    assert gain > 0.5
    for name, (path, _) in CORNERS.items():
        at = guidance.interval(scale, low=EDGES[0], high=EDGES[1], path=path)
        guided = guidance.classifier_free(conditional(means, [var] * 3, path), scale=at, null=NULL)
        slope, offset = ends(guided, grid(name))
        np.testing.assert_allclose(slope, np.sqrt(var), rtol=1e-6)
        np.testing.assert_allclose(offset, want, atol=0.02)
        full = guidance.classifier_free(conditional(means, [var] * 3, path), scale=scale, null=NULL)
        assert abs(ends(full, grid(name))[1] - want).min() > 0.2


@pytest.mark.parametrize("name", CORNERS)
def test_an_interval_holds_its_scale_between_its_log_snr_and_one_outside(name):
    path, inverse = CORNERS[name]
    at = guidance.interval(2.5, low=EDGES[0], high=EDGES[1], path=path)
    log_snr = np.array([-8.0, -1.51, -1.49, 0.0, 1.99, 2.01, 8.0])
    t = jnp.asarray(inverse(np.exp(log_snr / 2)), jnp.float32)
    assert at(t).tolist() == [1, 1, 2.5, 2.5, 2.5, 1, 1]
    ends = jnp.array([0.0, 1.0], jnp.float32)
    assert at(ends).tolist() == [1, 1]
    assert guidance.interval(2.5, path=path)(ends).tolist() == [2.5, 2.5]
    assert guidance.interval(2.5, low=0.0, path=path)(ends).tolist() == [1, 2.5]


def test_outside_the_interval_it_is_unguided_and_costs_one_evaluation(key):
    calls = []
    velocity = conditional([-1.0, 2.0, 0.4], [0.5, 0.7, 1.0])
    at = guidance.interval(3.0, low=0.0)
    guided = jax.jit(guidance.classifier_free(counted(velocity, calls), scale=at, null=NULL))
    always = guidance.classifier_free(velocity, scale=3.0, null=NULL)
    x, cond = jax.random.normal(key, (64, 5)), jnp.arange(64) % 2
    plain = jax.jit(velocity)
    for t, evaluations in ((0.3, 1), (0.7, 2), (jnp.where(jnp.arange(64) < 20, 0.3, 0.7), 2)):
        calls.clear()
        got = guided(x, t, cond).block_until_ready()
        jax.effects_barrier()
        assert len(calls) == evaluations
        out = np.asarray(over_batch(t, x)) < 0.5
        np.testing.assert_array_equal(got[out], plain(x, t, cond)[out])
        np.testing.assert_allclose(got[~out], always(x, t, cond)[~out], rtol=1e-5, atol=1e-5)


def test_a_guided_velocity_has_a_derivative_through_the_interval(x64):
    """``d v / d x`` of an affine field is its slope: ``(1 - w) a_null + w a_c`` inside, ``a_c`` outside."""
    velocity = conditional([-1.0, 2.0, 0.4], [0.5, 0.7, 1.3])
    guided = guidance.classifier_free(velocity, scale=guidance.interval(3.0, low=0.0), null=NULL)
    x, t, cond = jnp.ones((2, 1)), jnp.array([0.3, 0.7]), jnp.array([0, 1])
    slope = lambda f, c: jax.jvp(lambda x: f(x, t, c), (x,), (jnp.ones_like(x),))[1]
    null, given = slope(velocity, None), slope(velocity, cond)
    want = jnp.stack([given[0], -2 * null[1] + 3 * given[1]])
    np.testing.assert_allclose(slope(guided, cond), want, rtol=1e-12)


def test_autoguidance_undoes_an_error_that_the_weak_model_has_more_of(x64):
    """Errors ``e`` and ``3 e`` of the velocity cancel at ``w = 3 / 2``; conditions are passed to both models."""
    exact = conditional([-1.0, 2.0, 0.4], [0.5, 0.7, 1.0])
    error = lambda size: lambda x, t, cond=None: exact(x, t, cond) + size * jnp.sin(x)
    guided = guidance.autoguidance(error(0.1), error(0.3), scale=1.5)
    x = jnp.linspace(-2, 2, 8)[:, None]
    for cond in (jnp.arange(8) % 2, None):
        np.testing.assert_allclose(guided(x, 0.6, cond), exact(x, 0.6, cond), atol=1e-14)


def test_bad_options_are_refused():
    velocity = conditional([-1.0, 2.0, 0.4], [0.5, 0.7, 1.0])
    for scale in (float("nan"), float("inf")):
        for make in (
            functools.partial(guidance.classifier_free, velocity, null=NULL),
            functools.partial(guidance.autoguidance, velocity, velocity),
        ):
            with pytest.raises(ValueError, match=f"scale={scale}: "):
                make(scale=scale)
        with pytest.raises(ValueError, match=f"scale={scale}: "):
            guidance.interval(scale)
    with pytest.raises(ValueError, match="low=1.0, high=1.0: "):
        guidance.interval(2.0, low=1.0, high=1.0)
    with pytest.raises(ValueError, match="cond=None: "):
        guidance.classifier_free(velocity, scale=2.0, null=NULL)(jnp.ones((2, 1)), 0.5)


def test_a_guided_map_at_a_scale_is_one_of_labels(key):
    x, labels = jax.random.normal(key, (4, 1)), jnp.arange(4) % 2
    value = lambda cond: x * cond[1][:, None] + cond[0][:, None]
    velocity = guidance.at_scale(lambda x, t, cond=None: value(cond) * expand(over_batch(t, x), x), 2.5)
    jump = guidance.at_scale(lambda x, s, t, cond=None, key=None: value(cond) * (t - s), 2.5)
    want = 2.5 * x + labels[:, None]
    np.testing.assert_allclose(velocity(x, 0.5, labels), want * 0.5)
    np.testing.assert_allclose(jump(x, 0.25, 0.5, labels), want * 0.25)
    np.testing.assert_allclose(jump(x, 0.25, 0.5, cond=labels, key=key), want * 0.25)
    walk = functools.partial(sampling.sample, sampling.euler(velocity), x, grids.uniform_grid(2))
    np.testing.assert_allclose(walk(cond=labels), x + 0.25 * want, rtol=1e-6)
    for bad in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"scale={bad}: "):
            guidance.at_scale(velocity, bad)
    with pytest.raises(ValueError, match="cond=None: "):
        jump(x, 0.0, 1.0)
