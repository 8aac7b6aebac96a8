"""KID, Inception score, MIND, extrapolated Frechet distance, feature change: peers, closed forms and orders."""

import itertools

import numpy as np
import pytest
from sklearn.metrics.pairwise import polynomial_kernel

from fmjax import metrics
from fmjax.metrics import scores

pytestmark = pytest.mark.usefixtures("as_users_call")


def sets(n=300, d=6, shift=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)), rng.standard_normal((n + 20, d)) * 1.2 + shift


def test_kid_on_all_rows_is_the_kernel_of_scikit_learn():
    x, _ = sets()
    y = sets(seed=1)[1][:300]
    kernel = lambda a, b: polynomial_kernel(a, b, degree=3, gamma=1 / 6, coef0=1)
    off = lambda k: (k.sum() - np.trace(k)) / (300 * 299)
    expected = off(kernel(x, x)) + off(kernel(y, y)) - 2 * kernel(x, y).mean()
    mean, deviation = metrics.kid(x, y, subsets=1, size=300)
    assert mean == pytest.approx(expected, rel=1e-10) and deviation == 0


def test_kid_has_mean_zero_for_equal_distributions_and_not_for_others():
    values = [metrics.kid(*np.split(np.random.default_rng(s).standard_normal((200, 4)), 2), subsets=1, size=100)[0]
              for s in range(60)]  # fmt: skip
    mean, error = metrics.mean_se(values)
    assert abs(mean) < 3 * error and min(values) < 0
    x, y = sets()
    assert metrics.kid(x, y, subsets=20, size=200)[0] > 10 * error


def test_the_mean_of_kid_is_over_random_subsets_of_both_sides():
    """All pairs of the subsets of size three of four rows have the mean and the deviation that many draws have."""
    x, y = (a[:4] for a in sets(d=2))
    each = [metrics.kid(x[list(i)], y[list(j)], subsets=1, size=3)[0]
            for i in itertools.combinations(range(4), 3) for j in itertools.combinations(range(4), 3)]  # fmt: skip
    mean, deviation = metrics.kid(x, y, subsets=4000, size=3, seed=5)
    assert mean == pytest.approx(np.mean(each), abs=4 * np.std(each) / np.sqrt(4000))
    assert deviation == pytest.approx(np.std(each), rel=0.1)


def test_inception_score_of_known_predictions():
    balanced = 1e3 * np.eye(5)[np.arange(50) % 5]
    assert metrics.inception_score(balanced, splits=1)[0] == pytest.approx(5)
    assert metrics.inception_score(np.zeros((50, 5)))[0] == pytest.approx(1)
    one = metrics.inception_score(1e3 * np.eye(5)[[2] * 50], splits=5)
    assert one == (pytest.approx(1), pytest.approx(0))
    # half the rows certain of class 0, half undecided between two: exp of the mutual information
    p = np.array([[1 - 1e-12, 1e-12], [0.5, 0.5]]).repeat(10, 0)
    entropy = lambda q: -(q * np.log(q)).sum(-1)
    exact = np.exp(entropy(p.mean(0)) - entropy(p).mean())
    assert metrics.inception_score(np.log(p), splits=1)[0] == pytest.approx(exact)


def test_mind_of_a_translation_is_three_times_its_square():
    """In one direction u the squared distance is (u.v)^2, of mean |v|^2 / d."""
    x, v = sets(d=20)[0], np.full(20, 0.7)
    assert metrics.mind(x, x + v, directions=4000) == pytest.approx(3 * (v**2).sum(), rel=0.08)
    assert metrics.mind(x, x[::-1]) == 0
    assert (
        metrics.mind(x, x + v, directions=9, seed=4) == 3 * 20 * metrics.sliced_w2(x, x + v, directions=9, seed=4) ** 2
    )


def test_the_extrapolated_distance_is_near_the_distance_of_the_distributions():
    """Two Gaussians whose distance is known: |shift|^2 + d (1 - s)^2."""
    d, shift, s = 12, 0.1, 1.1
    exact = d * shift**2 + d * (1 - s) ** 2
    rows = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal((1000, d)), rng.standard_normal((20000, d)) * s + shift
        rows.append([metrics.frechet(x, y), *metrics.frechet_infinity(x, y)])
    finite, infinite, error = np.array(rows).T
    assert finite.mean() - exact > 0.04  # the bias of 1,000 samples
    mean, spread = metrics.mean_se(infinite)
    assert abs(mean - exact) < 3 * spread < 0.04
    assert (error > 0).all() and error.mean() < 0.05


def test_too_few_samples_are_not_extrapolated():
    x = np.random.default_rng(0).standard_normal((200, 8))
    with pytest.raises(ValueError, match="^n=40: .*40 samples"):
        metrics.frechet_infinity(x[:40], x)
    with pytest.raises(ValueError, match="^n=100: "):
        metrics.frechet_infinity(x[:100], x[:8])
    with pytest.raises(ValueError, match="^size=300: "):
        metrics.kid(x, x, size=300)
    with pytest.raises(ValueError, match="^logits=.*10 samples"):
        metrics.inception_score(x[:9])


def test_the_change_of_features_is_in_units_of_the_data():
    reference = np.arange(5.0)[:, None]  # median distance of two examples: 2
    plain = np.zeros((6, 1))
    moves = np.array([0.0, 0.1, 0.6, 1.0, 1.9, 8.0])[:, None]
    change = metrics.feature_change(plain + moves, plain, reference, bins=4, top=1.0)
    assert metrics.median_distance(reference) == 2
    np.testing.assert_allclose(change.distances, moves[:, 0] / 2)
    assert change.counts.tolist() == [2, 1, 1, 2] and change.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match=r"^corrected=\[5\]: .*6 plain"):
        metrics.feature_change(moves[:5], plain, reference)


def test_a_paired_error_needs_the_same_noise_in_the_same_order():
    x = np.random.default_rng(0).standard_normal((50, 3, 2))
    assert metrics.paired_error(x, x + 0.5) == pytest.approx(0.25)
    assert metrics.paired_error(x, x[::-1]) > 1
    with pytest.raises(ValueError, match=r"^x=\[49\]: "):
        metrics.paired_error(x[1:], x)


@pytest.mark.parametrize(("level", "offset"), [(2 / 255, np.log2(127.5)), (1 / 128, 7.0), (None, 0.0)])
def test_bits_per_dimension_of_a_uniform_density(level, offset):
    """A density of one in d dimensions costs the offset; a density of 1/256 of all cells costs 8 bits more."""
    bits = metrics.bits_per_dimension(np.array([0.0, -48 * 8 * np.log(2)]), 48, level=level)
    np.testing.assert_allclose(bits, [offset, offset + 8])


def test_bits_per_dimension_of_a_discrete_distribution_is_its_entropy():
    """Two grey levels of probability 1/4 and 3/4, made continuous by uniform noise within a level."""
    p, level = np.array([0.25, 0.75]), 1.0
    log_density = np.log(np.repeat(p, [250, 750]) / level)
    assert metrics.bits_per_dimension(log_density, 1, level=level).mean() == pytest.approx(-(p * np.log2(p)).sum())


def test_the_measures_are_torch_fidelitys():
    torch = pytest.importorskip("torch", reason="pip install torch torch-fidelity brings measures to compare with")
    reason = "pip install torch-fidelity brings measures to compare with"
    kid = pytest.importorskip("torch_fidelity.metric_kid", reason=reason)
    isc = pytest.importorskip("torch_fidelity.metric_isc", reason=reason)
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason=reason)
    x, y = sets()
    y = y[: len(x)]
    theirs = kid.kernel_mmd(x, y, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
                            kid_kernel_poly_coef0=1)  # fmt: skip
    assert metrics.kid(x, y, subsets=1, size=len(x))[0] == pytest.approx(float(theirs), rel=1e-9)
    theirs = isc.isc_features_to_metric(torch.from_numpy(3 * x), splits=1)["inception_score_mean"]
    assert metrics.inception_score(3 * x, splits=1)[0] == pytest.approx(theirs, rel=1e-9)
    statistics = [fid.fid_features_to_statistics(torch.from_numpy(a)) for a in (x, y)]
    theirs = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert metrics.frechet(x, y) == pytest.approx(theirs, rel=1e-6)
    assert scores.mind(x, x) == 0
