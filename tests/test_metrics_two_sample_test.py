"""The classifier two-sample test: the best accuracy of known distributions, and no separation of equal ones."""

import numpy as np
import pytest
from scipy.stats import binom, norm

from fmjax import metrics


@pytest.mark.parametrize("shift", [0.8, 2.0])
def test_the_accuracy_is_the_best_for_two_gaussians(shift):
    """The best classifier of N(0, I) and N(shift e, I) is right with probability Phi(shift / 2)."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 3000, 2))
    result = metrics.c2st(x, y + [shift, 0], steps=300)
    best = norm.cdf(shift / 2)
    assert result.count == 1500
    assert result.accuracy == pytest.approx(best, abs=0.03) and result.accuracy < best + 0.025
    assert result.auc == pytest.approx(norm.cdf(shift / np.sqrt(2)), abs=0.03) and result.p_value < 1e-6


def test_equal_distributions_are_not_separated():
    rng = np.random.default_rng(0)
    results = [metrics.c2st(*rng.standard_normal((2, 1000, 3)), steps=100, seed=s) for s in range(4)]
    assert abs(np.mean([r.accuracy for r in results]) - 0.5) < 4 * 0.5 / np.sqrt(4 * 1000)
    assert min(r.p_value for r in results) > 1e-3


def test_the_p_value_is_of_the_number_of_right_answers():
    rng = np.random.default_rng(0)
    r = metrics.c2st(*rng.standard_normal((2, 400, 2)), steps=50)
    right = round(r.accuracy * 2 * r.count)
    assert r.p_value == pytest.approx(binom.sf(right - 1, 2 * r.count, 0.5))


def test_fine_structure_is_seen_that_a_linear_classifier_does_not_see():
    """Odd and even cells of a 4 x 4 checkerboard have equal means and covariances."""
    rng = np.random.default_rng(0)
    cells = np.array([(i, j) for i in range(4) for j in range(4)])
    draw = lambda odd: (
        (cells[cells.sum(1) % 2 == odd][rng.integers(8, size=3000)] + rng.uniform(size=(3000, 2))) / 2 - 1
    )
    assert metrics.c2st(draw(0), draw(1), steps=600).accuracy > 0.9


def test_sets_are_cut_to_one_size_scaled_and_flattened():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 2, 3, 1)), rng.standard_normal((120, 2, 3, 1)) + 3
    result = metrics.c2st(1e4 * x, 1e4 * y, steps=60)
    assert result.count == 60 and result.accuracy > 0.95
    assert metrics.c2st(x, y, steps=60).accuracy == pytest.approx(result.accuracy, abs=0.02)


def test_few_samples_are_refused():
    x = np.zeros((99, 2))
    with pytest.raises(ValueError, match=r"^x=\[99\]: .*100 samples"):
        metrics.c2st(x, x)
