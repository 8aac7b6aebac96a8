"""Semidiscrete optimal transport: two atoms in closed form, uniform targets, and nearer than minibatches can be."""

import jax
import numpy as np
import pytest
from test_couplings import paired_cost

from fmjax import couplings, transport
from fmjax.data import batches as batches_of
from fmjax.data.digits import digits


@pytest.mark.parametrize("p", [0.5, 0.3, 0.05])
@pytest.mark.parametrize("duplicates", [False, True])
def test_two_atoms_are_separated_at_the_gaussian_quantile(p, duplicates):
    """Targets -2 (weight p) and 1 on a line through R^2: the boundary is where ``Phi`` is ``p``, wherever they are.

    The asymptotic variance of the averaged iterates is that of the sample quantile, ``p (1 - p) / (phi^2 m)`` with
    ``m`` the draws of the averaged half: 5 standard errors. Atoms given twice at half the weight change nothing.
    """
    stats = pytest.importorskip("scipy.stats")
    direction = np.array([0.6, 0.8], np.float32)
    y, weights = np.array([[-2.0], [1.0]], np.float32) * direction, np.array([p, 1 - p])
    draws = 200_000
    if duplicates:
        y, weights = np.repeat(y, 2, 0), np.repeat(weights, 2)
    g = transport.fit_semidiscrete(jax.random.key(0), y, None, weights, draws=draws // len(y), batch_size=256)
    g = np.asarray(g, float)
    first, last = 0, len(y) - 1
    height = g - (y**2).sum(1) / 2
    threshold = (height[first] - height[last]) / 3  # <x, direction> (-2) + h_0 = <x, direction> + h_1
    want = stats.norm.ppf(p)
    error = np.sqrt(p * (1 - p) / (draws / 2)) / stats.norm.pdf(want)
    assert abs(threshold - want) < 5 * error
    couple = couplings.semidiscrete(y, g)
    x0 = np.random.default_rng(1).standard_normal((2000, 2), dtype=np.float32)
    _, x1, _ = couple(np.random.default_rng(0), x0, y[np.zeros(2000, int)])
    near = np.abs(x0 @ direction - want) < 5 * error
    assert ((x1 @ direction < 0) == (x0 @ direction < threshold))[~near].all()


@pytest.fixture(scope="module")
def digits_ot():
    data = digits()
    x, y = data.train.x, data.train.cond
    fit = {by: transport.fit_semidiscrete(jax.random.key(0), x, y, by_class=by, draws=100) for by in (False, True)}
    return x, y, fit


@pytest.mark.parametrize("by_class", [False, True])
def test_semidiscrete_targets_are_uniform_and_near(digits_ot, by_class):
    """On digits. The mean square of ``n P(j) - 1`` is 2 / draws, as documented; drawn ``m`` times, (n - 1) / m more.

    Its spread: a sum of n squares of about normal errors, so sqrt(2 / n) of itself, 4 % here; 40 % are allowed. Without
    potentials it is above 1. The cost is at most that of minibatch OT, a mixture of plans between the same
    distributions, of which the semidiscrete plan is the best; by class the same holds in each class.
    """
    x, y, fit = digits_ot
    n, b, repeats = len(x), 128, 200
    couple = couplings.semidiscrete(x, fit[by_class], y, by_class=by_class)
    f, minibatch = (
        batches_of(x, y, batch_size=b, seed=0, couple=c) for c in (couple, couplings.minibatch_ot(by_class=by_class))
    )
    index = {example.tobytes(): i for i, example in enumerate(x)}
    counts, cost, other = np.zeros(n), np.zeros(repeats), np.zeros(20)
    for step in range(repeats):
        batch = f(step)
        rows = [index[example.tobytes()] for example in batch.x1]
        assert (y[rows] == batch.cond).all()
        np.add.at(counts, rows, 1)
        cost[step] = paired_cost(batch.x0, batch.x1)
    for step in range(len(other)):
        batch = minibatch(step)
        other[step] = paired_cost(batch.x0, batch.x1)
    m = b * repeats
    excess = np.mean((counts * n / m - 1) ** 2) - (n - 1) / m
    assert abs(excess - 2 / 100) < 0.4 * 2 / 100 + 5 * np.sqrt(2 / n) * (n - 1) / m
    error = np.sqrt(cost.var() / len(cost) + other.var() / len(other))
    assert other.mean() - cost.mean() > 5 * error


def test_by_class_the_noise_of_a_class_is_standard_normal(digits_ot):
    """Given the label, ``x0`` is N(0, I) by class and is not without: mean of the noise along the class's own mean."""
    x, y, fit = digits_ot
    shift, spread = {}, {}
    for by_class, g in fit.items():
        f = batches_of(x, y, batch_size=128, seed=1, couple=couplings.semidiscrete(x, g, y, by_class=by_class))
        batches = [f(step) for step in range(100)]
        x0 = np.concatenate([batch.x0 for batch in batches]).reshape(-1, 64)
        label = np.concatenate([batch.cond for batch in batches])
        for c in range(10):
            toward = (x[y == c].mean(0) - x.mean(0)).ravel()
            along = x0[label == c] @ (toward / np.linalg.norm(toward))
            shift[by_class, c] = along.mean() * np.sqrt(len(along))
            spread[by_class, c] = (np.square(along).mean() - 1) * np.sqrt(len(along) / 2)
    # Ten z-scores of either: 4.5 is 1.4e-4. Without classes the shift is tenths of a standard deviation of 1280 draws.
    assert all(abs(z[True, c]) < 4.5 for c in range(10) for z in (shift, spread))
    assert all(shift[False, c] > 4.5 for c in range(10))


def test_semidiscrete_refuses_batches_of_other_data():
    x, y = np.random.default_rng(0).standard_normal((8, 4, 4, 1), dtype=np.float32), np.arange(8) % 2
    key, rng, zero = jax.random.key(0), np.random.default_rng(0), np.zeros(8)
    both = np.concatenate([x, x[:, :, ::-1]])
    couple = couplings.semidiscrete(x, zero)
    couple(rng, x, x[:3].repeat(3, 0)[:8])
    with pytest.raises(ValueError, match=r"x1\[5\] of the batch"):
        couple(rng, x, np.concatenate([x[:5], both[-3:]]))
    couplings.semidiscrete(both, np.zeros(16))(rng, x, both[8:])
    with pytest.raises(ValueError, match="cond of the batch"):
        couple(rng, x, x, y)
    with pytest.raises(ValueError, match=r"potentials.shape=\(7,\).*\(8,\)"):
        couplings.semidiscrete(x, zero[:7])
    with pytest.raises(ValueError, match="B=8"):
        couplings.semidiscrete(x, zero, y[:7])
    with pytest.raises(ValueError, match="integer leaf"):
        couplings.semidiscrete(x, zero, by_class=True)
    with pytest.warns(UserWarning, match="cond of semidiscrete.*labels, or by_class=False"):
        couplings.semidiscrete(x, zero, y)
    for change, words in (
        ({"draws": 0}, "draws=0"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"weights": np.arange(8.0)}, r"weights of shape \(8,\)"),
        ({"weights": np.ones(7)}, r"weights of shape \(7,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            transport.fit_semidiscrete(key, x, **change)
    with pytest.raises(TypeError, match=r"key.shape=\(2,\)"):
        transport.fit_semidiscrete(jax.random.split(key), x)
