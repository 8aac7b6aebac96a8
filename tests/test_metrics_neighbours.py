"""Precision and recall against a direct count, and where their values are known."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from fmjax.metrics.neighbours import precision_recall


def by_hand(real, samples, k):
    def covered(centres, points):
        radii = np.sort(cdist(centres, centres), 1)[:, k]
        return (cdist(points, centres) <= radii).any(1).mean()

    return covered(real, samples), covered(samples, real)


@pytest.mark.parametrize("k", [1, 3])
def test_the_count_is_that_of_all_pairs(k):
    rng = np.random.default_rng(0)
    real, samples = rng.standard_normal((200, 3)), 0.2 + 0.7 * rng.standard_normal((150, 3))
    np.testing.assert_allclose(precision_recall(real, samples, k=k), by_hand(real, samples, k), atol=1e-12)


def test_a_missing_mode_costs_recall_an_invented_one_precision():
    rng = np.random.default_rng(1)
    both = np.concatenate([rng.standard_normal((300, 2)), 50 + rng.standard_normal((300, 2))])
    single = rng.standard_normal((600, 2))
    precision, recall = precision_recall(both, single)
    assert precision > 0.9 and abs(recall - 0.5) < 0.05
    assert precision_recall(single, both) == (recall, precision)  # the roles swapped


@pytest.mark.parametrize("d", [2, 40])
def test_a_point_at_the_radius_is_inside_and_just_beyond_is_not(d):
    """Integer coordinates, so that equal distances are equal to the bit, whatever tree or matrix finds them."""
    line = np.arange(6.0)[:, None] * np.eye(1, d)
    for far, covered in ((1.0, 1.0), (1.001, 0.0)):
        assert precision_recall(line, np.array([[5 + far], [-far]]) * np.eye(1, d), k=1)[0] == covered


def test_the_same_points_have_both_whole():
    x = np.random.default_rng(2).standard_normal((50, 4))
    assert precision_recall(x, x) == (1.0, 1.0)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match="^k=3: there are 3 real"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
