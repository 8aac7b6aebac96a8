"""Projected gradient descent against its closed form on a linear logit, and what it promises on any."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from fmjax.keys import as_keys
from fmjax.methods import attacks

N, D = 32, 3
W, C = np.array([0.6, -1.5, 0.4]), 0.3


def linear(y, x):
    return y * (x @ W + C)


def curved(x):
    return jnp.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 2.5


def norms(d, norm):
    return np.linalg.norm(np.asarray(d), axis=1, ord=2 if norm == "l2" else np.inf)


@pytest.fixture
def data(key):
    y = jnp.where(jnp.arange(N) % 2 == 0, 1.0, -1.0)
    x = jax.random.normal(key, (N, D), jnp.float64)
    return x + y[:, None] * 8 * W / (W @ W), y  # classified right, and no attack of radius 0.5 changes that


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
@pytest.mark.parametrize("start", [False, True])
def test_on_a_linear_logit_the_attack_is_exact(norm, dual, start, x64, data, key):
    """``y f`` falls by ``eps |w|``, of the dual norm: ``softplus(-y f)`` becomes ``softplus(-y f + eps |w|)``."""
    x, y = data
    eps, margin = 0.5, functools.partial(linear, y)
    d = attacks.pgd(margin, x, as_keys(key, N) if start else None, eps=eps, steps=20, step=1.0, norm=norm)
    # from anywhere on the sphere: a step of 2 eps makes the angle to the way out three times smaller
    np.testing.assert_allclose(margin(x + d), margin(x) - eps * np.linalg.norm(W, dual), rtol=1e-12)
    assert (norms(d, norm) <= eps * (1 + 1e-12)).all()


def test_one_step_is_the_formula(x64, key):
    """``d = step g / |g|`` inside the ball, ``eps g / |g|`` beyond; ``step = 2.5 eps / steps`` unless given."""
    x = jax.random.normal(key, (N, D), jnp.float64)
    g = np.asarray(jax.vmap(jax.grad(lambda x: curved(x[None])[0]))(x))
    unit = g / np.linalg.norm(g, axis=1, keepdims=True)
    hit = (np.asarray(curved(x)) <= 0)[:, None]
    assert hit.any() and not hit.all()
    for options, length in (({"step": 0.2}, 0.2), ({"step": 2.0}, 0.5), ({}, 0.5)):
        d = attacks.pgd(curved, x, eps=0.5, steps=1, **options)
        np.testing.assert_allclose(d, np.where(hit, 0, -length * unit), rtol=1e-8, atol=1e-12)
    seventh = attacks.pgd(curved, x, eps=0.5, steps=7)
    again = attacks.pgd(curved, x, eps=0.5, steps=7, step=2.5 * 0.5 / 7)
    np.testing.assert_array_equal(seventh, again)


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_the_attack_stays_in_the_ball_and_never_helps_the_classifier(norm, x64, key):
    """On a curved margin too, and it finds as much as an optimiser of scipy does, to a few per cent."""
    x = 0.3 * jax.random.normal(key, (8, D), jnp.float64)
    eps = 0.3
    d = attacks.pgd(curved, x, eps=eps, steps=40, norm=norm)
    assert (norms(d, norm) <= eps * (1 + 1e-12)).all()
    before, after = np.asarray(curved(x)), np.asarray(curved(x + d))
    assert (after < before - 0.1).all()
    for i in range(8):
        value = lambda e, i=i: float(np.sin(2 * (x[i, 0] + e[0])) + (x[i, 1] + e[1]) * (x[i, 2] + e[2]) + 2.5)
        ball = {"type": "ineq", "fun": lambda e: eps**2 - e @ e}
        limits = {"constraints": ball} if norm == "l2" else {"bounds": [(-eps, eps)] * D}
        best = optimize.minimize(value, np.asarray(d[i]) * 0.9, method="SLSQP", **limits).fun
        assert after[i] - best < 0.03 * (before[i] - best)


def test_an_attack_stops_at_the_first_misclassified_point(x64):
    """Steps of 0.1 down ``f = x``: from 0.25 three of them, from -0.1 and 0 none, from 2 all eight."""
    x = jnp.array([[0.25], [-0.1], [0.0], [2.0]])
    d = attacks.pgd(lambda x: x[:, 0], x, eps=1.0, steps=8, step=0.1)
    np.testing.assert_allclose(d[:, 0], [-0.3, 0, 0, -0.8], atol=1e-12)


def test_a_sure_classifier_is_attacked_all_the_same():
    """In float32 the gradient of ``softplus(-m)`` vanishes at ``m = 200``; the gradient of the margin does not."""
    x = jnp.ones((2, D))
    d = attacks.pgd(lambda x: 200 + x.sum(1), x, eps=0.5)
    np.testing.assert_allclose(d, -0.5 / D**0.5 * jnp.ones((2, D)), rtol=1e-5)
    flat = attacks.pgd(lambda x: 1 + 0 * x.sum(1), x, eps=0.5)
    assert (flat == 0).all(), "there is no direction in which to go"


def test_no_attack_for_eps_zero_not_even_an_evaluation(key):
    def margin(x):
        raise AssertionError("evaluated")

    assert not attacks.pgd(margin, jnp.ones((2, D)), as_keys(key, 2), eps=0.0).any()


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_a_random_start_belongs_to_the_example(norm, key):
    """Where nothing is to be gained it is what stays: on the sphere, or in the cube, of mean zero, each its own."""
    x, keys = jnp.zeros((4000, D)), as_keys(key, 4000)
    start = np.asarray(attacks.pgd(lambda x: -1 + 0 * x.sum(1), x, keys, eps=0.5, norm=norm), np.float64)
    few = attacks.pgd(lambda x: -1 + 0 * x.sum(1), x[:10], keys[:10], eps=0.5, norm=norm)
    np.testing.assert_array_equal(few, start[:10].astype(np.float32))
    if norm == "l2":
        np.testing.assert_allclose(norms(start, norm), 0.5, rtol=1e-6)
    var = 0.25 / 3  # of a coordinate: eps^2 / d on the sphere, eps^2 / 3 in the cube
    assert np.abs(start.mean(0)).max() < 4.5 * (var / 4000) ** 0.5
    assert np.abs(start.var(0) / var - 1).max() < 4.5 * (2 / 4000) ** 0.5


def test_no_gradient_passes_through_the_perturbation(x64, data):
    """Neither to the parameters nor to the example, of a curved margin: on a linear one none would show."""
    x, _ = data
    margin = lambda w, x: 3 + jnp.sin(2 * x @ w) + x[:, 0] * x[:, 1] / 20
    attack = lambda w, x: attacks.pgd(functools.partial(margin, w), x, eps=0.5, steps=2, step=0.15)
    w = jnp.asarray(W)
    d = attack(w, x)
    actual = jax.grad(lambda w, x: margin(w, x + attack(w, x)).sum(), (0, 1))(w, x)
    expected = jax.grad(lambda w, x: margin(w, x + d).sum(), (0, 1))(w, x)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    turned = np.abs(attack(w + 1e-3, x) - d).max()
    assert turned > 1e-4, "the attack does not depend on the parameters in this test"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eps": -0.1}, "eps=-0.1"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"eps": 0.5, "steps": 0}, "steps=0"),
        ({"eps": 0.5, "step": 0.0}, "step=0.0"),
        ({"eps": 0.5, "norm": "l1"}, "norm='l1'.*l2.*linf"),
    ],
)
def test_bad_options_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        attacks.pgd(lambda x: x.sum(1), jnp.ones((2, D)), **options)
