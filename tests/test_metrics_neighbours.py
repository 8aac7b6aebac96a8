"""Precision, recall, density, coverage, memorisation: direct counts, prdc, and where their values are known."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from fmjax import metrics
from fmjax.metrics import precision_recall

pytestmark = pytest.mark.usefixtures("as_users_call")


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


def brute_density_coverage(real, samples, k):
    """Every ball and every sample, by the definitions."""
    inside = covered = 0
    for i, centre in enumerate(real):
        radius = sorted(np.linalg.norm(np.delete(real, i, 0) - centre, axis=1))[k - 1]
        near = np.linalg.norm(samples - centre, axis=1) < radius
        inside, covered = inside + near.sum(), covered + near.any()
    return inside / (k * len(samples)), covered / len(real)


@pytest.mark.parametrize("block", [7, 64, 1024])
def test_density_and_coverage_by_the_definition(block):
    rng = np.random.default_rng(0)
    real, samples = rng.standard_normal((61, 3)), 0.6 * rng.standard_normal((45, 3)) + 0.2
    exact = brute_density_coverage(real, samples, 4)
    assert metrics.density_coverage(real, samples, k=4, block=block) == pytest.approx(exact)
    assert exact[0] > 1.05  # samples that are too narrow: denser than the data


def test_a_sample_at_the_very_distance_of_the_neighbour_is_outside_as_in_prdc():
    real = np.array([[0.0], [1.0], [5.0]])  # of a whole mean, so that distances are exact
    assert metrics.density_coverage(real, np.array([[-1.0], [9.0]]), k=1) == (0.0, 0.0)
    assert metrics.density_coverage(real, np.array([[-1.0 + 1e-9], [9.0]]), k=1) == (0.5, 1 / 3)


def test_density_is_one_and_coverage_known_for_equal_distributions():
    """E density = 1; E coverage = 1 - (n-1) ... (n-k) / ((2n-1) ... (2n-k)) for n = m (Naeem et al., lemma 2)."""
    rng, n, k = np.random.default_rng(1), 200, 5
    values = [
        metrics.density_coverage(rng.standard_normal((n, 2)), rng.standard_normal((n, 2)), k=k) for _ in range(40)
    ]
    (density, d_error), (coverage, c_error) = (metrics.mean_se(v) for v in np.transpose(values))
    i = np.arange(1, k + 1)
    assert abs(density - 1) < 4 * d_error
    assert abs(coverage - (1 - np.prod((n - i) / (2 * n - i)))) < 4 * c_error


def test_all_four_are_those_of_prdc(capsys):
    prdc = pytest.importorskip("prdc", reason="pip install prdc brings the authors' code to compare with")
    rng = np.random.default_rng(2)
    real, samples = rng.standard_normal((300, 4)), 0.8 * rng.standard_normal((250, 4)) + 0.3
    theirs = prdc.compute_prdc(real, samples, nearest_k=5)
    ours = (*metrics.precision_recall(real, samples, k=5), *metrics.density_coverage(real, samples, k=5))
    np.testing.assert_allclose(ours, [theirs[k] for k in ("precision", "recall", "density", "coverage")], atol=1e-12)


def images(rng, n):
    """Smooth images, different from each other, with a border of zeros as digits have."""
    from scipy.ndimage import gaussian_filter

    x = np.zeros((n, 12, 12, 1))
    x[:, 2:-2, 2:-2] = gaussian_filter(rng.standard_normal((n, 8, 8, 1)), (0, 1, 1, 0))
    return x


def test_copies_are_memorised_and_fresh_examples_are_not():
    rng = np.random.default_rng(0)
    train, held_out, fresh = images(rng, 400), images(rng, 400), images(rng, 400)
    m = metrics.memorised(fresh, train, held_out)
    assert m.low < 0.05 < m.high and 0.9 < m.ratio < 1.1
    copies = metrics.memorised(train[:50], train, held_out)
    assert (copies.fraction, copies.ratio) == (1, 0) and (copies.nearest == np.arange(50)).all()
    half = metrics.memorised(np.concatenate([train[:200], fresh[:200]]), train, held_out)
    assert half.low < 0.525 < half.high
    assert metrics.memorised(9 + fresh, train, held_out).ratio > 5


def test_a_copy_shifted_by_a_pixel_needs_the_search_over_shifts():
    rng = np.random.default_rng(0)
    train, held_out = images(rng, 200), images(rng, 200)
    shifted = np.roll(np.roll(train[:60], 1, 1), -1, 2)
    assert metrics.memorised(shifted, train, held_out).fraction < 0.5
    m = metrics.memorised(shifted, train, held_out, shifts=1)
    assert m.fraction == 1 and (m.nearest == np.arange(60)).all() and m.ratio < 1e-6


def test_the_nearest_distance_is_scikit_learns():
    from sklearn.neighbors import NearestNeighbors

    rng = np.random.default_rng(0)
    x, train = rng.standard_normal((70, 5)) + 100, rng.standard_normal((90, 5)) + 100
    distance, index = NearestNeighbors(n_neighbors=1).fit(train).kneighbors(x)
    ours = metrics.nearest_distance(x, train, block=16)
    np.testing.assert_allclose(ours[0], distance[:, 0], rtol=1e-9)
    np.testing.assert_array_equal(ours[1], index[:, 0])


def test_too_few_examples_for_neighbours_are_refused():
    x = np.random.default_rng(0).standard_normal((30, 2))
    with pytest.raises(ValueError, match="^k=5: "):
        metrics.density_coverage(x[:5], x)
    with pytest.raises(ValueError, match=r"^held_out=\[19\]: .*20 or more"):
        metrics.memorised(x, x, x[:19])
    with pytest.raises(ValueError, match="^shifts=1: "):
        metrics.nearest_distance(x, x, shifts=1)
    with pytest.raises(ValueError, match=r"^x=\[30, 2\]: .*train"):
        metrics.nearest_distance(x, x[:, :1])
