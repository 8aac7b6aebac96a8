"""A classifier's numbers against scikit-learn, quadrature, and the invariance of exact inverse marginals."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from fmjax.methods import attacks
from fmjax.metrics import classifier


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    return np.round(rng.normal(0.5, 1.5, 300), 1), np.round(rng.normal(-0.4, 1.0, 180), 1)  # rounded: with many ties


def as_sklearn(positive, negative):
    """Labels, logits, and weights that make the classes count alike."""
    y = np.repeat([1, 0], [len(positive), len(negative)])
    w = np.repeat([1 / len(positive), 1 / len(negative)], [len(positive), len(negative)])
    return y, np.concatenate([positive, negative]), w


def test_the_auc_is_scikit_learns_with_ties_too(logits):
    y, f, _ = as_sklearn(*logits)
    assert len(np.unique(f)) < 100
    assert classifier.auc(*logits) == pytest.approx(metrics.roc_auc_score(y, f), rel=1e-12)
    assert classifier.auc(np.ones(3), np.ones(7)) == 0.5
    assert classifier.auc(np.array([1.0, 2.0]), np.array([0.0, 0.5, -3.0])) == 1.0


def test_the_cross_entropy_and_its_error_are_scikit_learns(logits):
    y, f, w = as_sklearn(*logits)
    value, se = classifier.bce(*logits)
    assert value == pytest.approx(metrics.log_loss(y, 1 / (1 + np.exp(-f)), sample_weight=w), rel=1e-10)
    p, n = (np.logaddexp(0, -logits[0]), np.logaddexp(0, logits[1]))
    assert se == pytest.approx(np.hypot(stats.sem(p), stats.sem(n)) / 2, rel=1e-12)
    assert classifier.bce(np.zeros(4), np.zeros(5)) == (pytest.approx(np.log(2)), 0.0)
    assert classifier.bce(np.full(4, -1e4), np.zeros(5))[0] == pytest.approx((1e4 + np.log(2)) / 2)  # no overflow


def test_the_accuracy_is_scikit_learns_balanced_one(logits):
    positive, negative = (f + 0.05 for f in logits)  # no logit is zero
    y, f, _ = as_sklearn(positive, negative)
    assert classifier.accuracy(positive, negative) == pytest.approx(metrics.balanced_accuracy_score(y, f > 0))


EPS, S = 0.4, 0.5
TS = np.linspace(0, 1, 5)


def spread(t):
    """Stds of the forward and backward marginals of data N(0, s^2) under the exact velocity plus ``EPS x``."""
    std = np.sqrt((1 - t) ** 2 + t**2 * S**2)
    return std * np.exp(EPS * t), std * np.exp(-EPS * (1 - t))


def odds(params, x, s, t, cond=None, key=None):
    """The exact logit ``log q_t - log p_t``, times ``params``."""
    std = jnp.sqrt((1 - t) ** 2 + t**2 * S**2)
    p, q = std * jnp.exp(EPS * t), std * jnp.exp(-EPS * (1 - t))
    return params * (jnp.log(p / q) + 0.5 * (x[:, 0] / p) ** 2 - 0.5 * (x[:, 0] / q) ** 2)


def test_a_classifier_with_conditions_sees_the_condition_of_each_example():
    """Each class has a sign of its own: with the conditions all is right, with those of the other set all is wrong."""
    net = lambda params, x, s, t, cond=None, key=None: x[:, 0] * jnp.where(cond == 1, 1.0, -1.0)
    labels = np.arange(6) % 2
    x = np.where(labels == 1, 1.0, -1.0)[:, None, None] * np.ones((6, 2, 1), np.float32)
    ts, conds = np.array([0.0, 1.0]), {"positive_cond": labels, "negative_cond": labels}
    right = classifier.by_step(net, None, x, -x, ts, **conds, batch=4)
    wrong = classifier.by_step(net, None, x, -x, ts, positive_cond=1 - labels, negative_cond=1 - labels)
    assert right.accuracy.tolist() == [1, 1] and wrong.accuracy.tolist() == [0, 0]


def test_exact_inverse_marginals_have_equal_numbers_at_all_steps():
    """Along a bijection every f-divergence is constant: with the exact logit the numbers are too, to rounding."""
    rng, n = np.random.default_rng(0), 3000
    p, q = (np.array([spread(t)[i] for t in TS]) for i in (0, 1))
    backward = (rng.standard_normal((n, 1)) * q)[..., None].astype(np.float32)
    forward = (rng.standard_normal((n + 137, 1)) * p)[..., None].astype(np.float32)
    result = classifier.by_step(odds, jnp.float32(1.0), backward, forward, TS)
    assert result.robust_accuracy is None and all(len(a) == 5 for a in result[:5])
    for a in (result.bce, result.auc):
        np.testing.assert_allclose(a, a[0], atol=3e-4)  # logits in float32; a few ranks turn where they nearly tie
    x = np.linspace(-12, 12, 40_001)
    density = [stats.norm.pdf(x, scale=s) for s in (q[0], p[0])]
    f = np.log(density[0]) - np.log(density[1])
    exact = np.trapezoid(density[0] * np.logaddexp(0, -f) + density[1] * np.logaddexp(0, f), x) / 2
    assert abs(result.bce[0] - exact) < 4.5 * result.bce_se[0]
    edge = np.sqrt(2 * np.log(p[0] / q[0]) / (1 / q[0] ** 2 - 1 / p[0] ** 2))  # |x| < edge is judged backward
    fraction = lambda std: 2 * stats.norm.cdf(edge / std) - 1
    exact = (fraction(q[0]) + 1 - fraction(p[0])) / 2
    assert abs(result.accuracy[0] - exact) < 4.5 * 0.5 / (2 * n) ** 0.5
    blind = classifier.by_step(odds, jnp.float32(0.0), backward, forward, TS)
    np.testing.assert_allclose(blind.bce, np.log(2), rtol=1e-7)
    np.testing.assert_array_equal(blind.auc, 0.5)


def test_robust_accuracy_of_a_linear_logit_counts_margins_above_eps(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(m, 1, (n, 2, 2)).astype(np.float32) for m, n in ((0.8, 90), (-0.8, 70)))
    w, eps = np.array([1.0, -0.5], np.float32), 0.6
    net = lambda w, x, s, t, cond=None, key=None: x @ w + 0.3 * s
    attack = functools.partial(attacks.pgd, eps=eps)
    result = classifier.by_step(net, jnp.asarray(w), x, y, np.array([0.0, 1.0]), attack=attack, batch=32)
    for n, t in enumerate((0.0, 1.0)):
        margins = (x[:, n] @ w + 0.3 * t, -(y[:, n] @ w) - 0.3 * t)
        for measured, edge in ((result.accuracy, 0.0), (result.robust_accuracy, eps * np.linalg.norm(w))):
            assert measured[n] == pytest.approx(np.mean([np.mean(m > edge) for m in margins]))
    assert (result.robust_accuracy < result.accuracy - 0.1).all()


def test_sets_of_other_steps_than_the_times_are_refused():
    x = np.zeros((4, 2, 1), np.float32)
    with pytest.raises(ValueError, match=r"^ts=\[3\]: .*\(4, 2, 1\) and \(4, 2, 1\)"):
        classifier.by_step(odds, jnp.float32(1.0), x, x, np.arange(3.0))
