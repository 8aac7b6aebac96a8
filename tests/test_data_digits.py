"""The digits against scikit-learn's own arrays, and the laws a fair split must have."""

import numpy as np
import pytest

from fmjax.data.digits import digits


@pytest.fixture(scope="module")
def source():
    return pytest.importorskip("sklearn.datasets").load_digits()


def rows_in_file(x, source):
    """The row of scikit-learn's file that each image is."""
    table = {image.astype(np.float32).tobytes(): i for i, image in enumerate(source.images)}
    assert len(table) == 1797  # no image occurs twice, so the row is unique
    return np.array([table[((image[..., 0] + 1) * 8).tobytes()] for image in x])


def test_the_splits_are_the_file_each_digit_once_with_its_label(source):
    s = digits()
    train, test = rows_in_file(s.train_x, source), rows_in_file(s.test_x, source)
    assert sorted([*train, *test]) == list(range(1797))
    assert (source.target[train] == s.train_y).all() and (source.target[test] == s.test_y).all()
    assert s.train_x.dtype == np.float32 and s.train_y.dtype == np.int32
    assert s.train_x.min() == -1 and s.train_x.max() == 1


@pytest.mark.parametrize("held_out", [0.1, 0.2, 0.5])
def test_every_class_is_held_out_in_the_same_share(source, held_out):
    s = digits(held_out=held_out)
    shares = np.bincount(s.test_y) - held_out * np.bincount(source.target)
    assert (np.abs(shares) <= 1).all()  # rounding of a stratified split


def test_the_held_out_digits_come_from_all_writers(source):
    """Row numbers of the held-out digits are uniform in the file (it is ordered by writer); the last rows are not."""
    stats = pytest.importorskip("scipy.stats")
    rows = rows_in_file(digits().test_x, source)
    assert stats.kstest(rows / 1797, "uniform").pvalue > 1e-3
    assert stats.kstest(np.arange(1797 - len(rows), 1797) / 1797, "uniform").pvalue < 1e-9


def test_a_seed_fixes_the_split():
    a, b, other = digits(), digits(), digits(seed=1)
    assert all((p == q).all() for p, q in zip(a[:4], b[:4], strict=True))
    assert not (a.test_x == other.test_x).all()


@pytest.mark.parametrize("held_out", [0.0, 1.0, -0.2, 2.0, 100.0])
def test_a_share_outside_0_1_is_refused(held_out):
    with pytest.raises(ValueError, match=r"held_out=.*\(0, 1\)"):
        digits(held_out=held_out)
