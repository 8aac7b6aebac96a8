"""KL on a grid against closed forms, the published floors, and samples whose divergence is known."""

import jax
import numpy as np
import pytest

from fmjax.data import densities
from fmjax.metrics import histogram


def board(n, seed=0):
    return np.asarray(densities.draw_checkerboard(jax.random.key(seed), n))


def spread(n, bins):
    """Mean and standard error of the floor: n KL is half a chi-squared of K - 1 degrees, plus terms of order K^2/n."""
    cells = bins**2 / 2
    return (cells - 1) / (2 * n), np.sqrt((cells - 1) / 2) / n


@pytest.mark.parametrize(
    ("n", "bins", "published"), [(64_000, 48, 0.009), (64_000, 64, 0.016), (10**6, 48, 0.0006), (10**6, 64, 0.001)]
)
def test_perfect_samples_score_the_published_floor(n, bins, published):
    """To the digits given; and the mean and spread of half a chi-squared, for samples and for the drawn floor."""
    mean, se = spread(n, bins)
    assert abs(mean - published) < 0.5 * 10.0 ** np.floor(np.log10(published))
    for value in (histogram.checkerboard_kl(board(n), bins=bins), histogram.checkerboard_floor(n, bins=bins, seed=3)):
        assert abs(value - mean) < 4.5 * se + mean**2  # the next order is below the square of the first


@pytest.mark.parametrize(("n", "published", "digits"), [(64_000, 0.067, 0.001), (10**6, 0.056, 0.0005)])
def test_fifty_bins_have_the_published_floor_of_cut_cells(n, published, digits):
    """Eq. 103 takes the density at the centre of a cell: 1252 cells have mass 1/1250, half of 100 of them is empty."""
    square = np.arange(1, 101, 2) // 25  # of the centres -0.98, -0.94, ..., 0.98; -0.5 and 0.5 are among them
    occupied = (square[:, None] + square) % 2 == 0
    k = occupied.sum()
    assert k == 1252
    unscaled = k / 1250 * (histogram.kl(board(n), occupied / k) + np.log(k / 1250))
    se = np.sqrt(k / 2) / n + 0.7 * np.sqrt(100 / 1250) / np.sqrt(n)  # of the chi-squared, and of the half cells' mass
    assert abs(unscaled - published) < 4.5 * se + digits
    assert unscaled > 100 / 1250 * np.log(2)


def test_a_leak_and_missing_samples_have_their_closed_forms():
    """A fraction a moved uniformly over the board: -log(1 - a/2); moved off the squares: -log(1 - a)."""
    n, a, rng = 400_000, 0.2, np.random.default_rng(1)
    mean, se = spread(n, 64)
    x, moved = board(n), rng.random(n) < a
    cases = {
        "leak": (np.where(moved[:, None], rng.uniform(-1, 1, (n, 2)), x), -np.log(1 - a / 2)),
        "beyond": (np.where(moved[:, None], 3.0, x), -np.log(1 - a)),
        "just beyond": (np.where(moved[:, None], [1.001, -0.9], x), -np.log(1 - a)),
    }
    for name, (samples, exact) in cases.items():
        # the counts lose a binomial fraction; its log has the standard error sqrt(a / (1 - a) / n)
        assert abs(histogram.checkerboard_kl(samples) - exact - mean) < 4.5 * (se + (a / n) ** 0.5) + mean / 4, name
    half = np.where((moved & (rng.random(n) < 0.5))[:, None], 3.0, x)
    assert histogram.checkerboard_outside(half) == np.mean(half[:, 0] == 3.0)
    assert histogram.checkerboard_outside(x) == 0


def test_an_empty_square_is_finite_and_large():
    """An eighth of the K cells have q = (1/2) / (n + K/2); the rest 8/7 of their fraction, up to the floor."""
    n, cells = 200_000, 2048
    x = board(2 * n)
    x = x[~(x < -0.5).all(1)][:n]
    exact = np.log((2 * n + cells) / cells) / 8 - 7 / 8 * np.log(8 / 7 * n / (n + cells / 2))
    # the kept cells have relative counts of mean 1 + O(1/h) and variance 7 K / 8 n, h = 112 samples each
    assert abs(histogram.checkerboard_kl(x) - exact) < 4.5 * spread(n, 64)[1] + 1 / 112**2


def test_cells_are_those_of_numpy_and_half_open():
    x = np.random.default_rng(2).normal(0, 0.7, (20_000, 2))
    edges = np.linspace(-1, 1, 13)
    np.testing.assert_array_equal(histogram.counts(x, bins=12), np.histogram2d(*x.T, bins=(edges, edges))[0])
    corner = np.array([[-1.0, -1.0], [1.0, 0.0], [0.0, -0.5], [1 - 2.0**-24, 0.999]])
    h = histogram.counts(corner, bins=4)
    assert h.sum() == 3 and h[0, 0] == h[2, 1] == h[3, 3] == 1


def test_columns_and_rows_are_not_exchanged():
    """A distribution on the first column alone: its samples score the floor, their mirror image does not."""
    mass = np.zeros((4, 4))
    mass[0] = 0.25
    x = np.stack([np.full(4000, -0.9), np.random.default_rng(3).uniform(-1, 1, 4000)], 1)
    assert histogram.kl(x, mass) < 0.003 and histogram.kl(x[:, ::-1], mass) > 0.5


def test_bad_input_is_refused_with_the_reason():
    x = board(100)
    for bins, near in ((50, 48), (63, 64), (2, 4)):
        with pytest.raises(ValueError, match=rf"^bins={bins}: .*multiple of 4, such as {near}"):
            histogram.checkerboard_kl(x, bins=bins)
    with pytest.raises(ValueError, match=r"^samples=\(100, 1\)"):
        histogram.checkerboard_kl(x[:, :1])
    with pytest.raises(ValueError, match=r"^samples=\[100, 2\]: 1 rows .* row 7"):
        histogram.checkerboard_kl(np.where(np.arange(100)[:, None] == 7, np.nan, x))
    with pytest.raises(ValueError, match=r"^mass=\(2, 3\)"):
        histogram.kl(x, np.full((2, 3), 1 / 6))
    with pytest.raises(ValueError, match=r"^mass=\(2, 2\), sum 2: "):
        histogram.kl(x, np.full((2, 2), 0.5))
    with pytest.raises(ValueError, match="^bins=0: "):
        histogram.counts(x, bins=0)
    with pytest.raises(ValueError, match="^n=0: "):
        histogram.checkerboard_floor(0)
