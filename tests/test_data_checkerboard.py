"""The checkerboard as a data set: both sides are uniform on its cells and share no point."""

import numpy as np
import pytest

from fmjax.data.checkerboard import checkerboard


def test_both_sides_are_uniform_on_the_eight_cells_and_apart():
    """Chi-squared of 8 cells, 7 degrees of freedom: below its 1 - 1e-4 quantile."""
    stats = pytest.importorskip("scipy.stats")
    s = checkerboard(train=20_000, test=5000)
    assert s.train_x.shape == (20_000, 2) and s.test_x.dtype == np.float32
    assert not s.train_y.any() and not s.test_y.any() and len(s.test_y) == 5000
    for x in (s.train_x, s.test_x):
        column, row = np.floor(2 * (x + 1)).astype(int).T
        assert ((column + row) % 2 == 0).all() and (np.abs(x) <= 1).all()
        assert stats.chisquare(np.unique(4 * column + row, return_counts=True)[1]).pvalue > 1e-4
    assert not set(map(bytes, s.train_x)) & set(map(bytes, s.test_x))


def test_a_seed_fixes_the_points():
    a, b, other = checkerboard(train=50), checkerboard(train=50), checkerboard(train=50, seed=1)
    assert (a.train_x == b.train_x).all() and not (a.train_x == other.train_x).any()


@pytest.mark.parametrize("options", [{"train": 0}, {"test": 0}, {"seed": -1}])
def test_options_that_cannot_work_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1, seed=.* not negative"):
        checkerboard(**options)
