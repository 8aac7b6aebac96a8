"""The digits against scikit-learn's own arrays, and the distributions of a fair split."""

import jax
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
    data = digits()
    rows = [rows_in_file(examples.x, source) for examples in data[:3]]
    assert sorted(np.concatenate(rows)) == list(range(1797))
    for row, examples in zip(rows, data[:3], strict=True):
        assert (source.target[row] == examples.cond).all()
    assert data.train.x.dtype == np.float32 and data.train.cond.dtype == np.int32
    assert data.train.x.min() == -1 and data.train.x.max() == 1


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.2), (0.05, 0.1), (0.3, 0.5)])
def test_every_class_has_the_same_fraction_in_a_split(source, validation, test):
    data = digits(validation=validation, test=test)
    for fraction, examples in ((validation, data.validation), (test, data.test)):
        excess = np.bincount(examples.cond) - fraction * np.bincount(source.target)
        assert (np.abs(excess) <= 1.5).all()  # rounding of a stratified split, after the rounding of another


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_digits_come_from_all_writers(source, split):
    """Row numbers of the held-out digits are uniform in the file (it is ordered by writer); the last rows are not."""
    stats = pytest.importorskip("scipy.stats")
    rows = rows_in_file(getattr(digits(), split).x, source)
    assert stats.kstest(rows / 1797, "uniform").pvalue > 1e-3
    assert stats.kstest(np.arange(1797 - len(rows), 1797) / 1797, "uniform").pvalue < 1e-9


def test_a_seed_fixes_the_split():
    a, b, other = digits(), digits(), digits(seed=1)
    jax.tree.map(np.testing.assert_array_equal, a[:3], b[:3])
    assert not (a.test.x == other.test.x).all()


def test_validation_does_not_change_the_test_digits():
    np.testing.assert_array_equal(digits(validation=0.3).test.x, digits().test.x)


@pytest.mark.parametrize("field", ["validation", "test"])
@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 2.0, 100.0, float("nan")])
def test_a_fraction_outside_0_1_is_refused(field, fraction):
    with pytest.raises(ValueError, match=rf"{field}={fraction}: .*\(0, 1\)"):
        digits(**{field: fraction})


@pytest.mark.parametrize("options", [{"validation": 0.5, "test": 0.5}, {"validation": 0.002}])
def test_splits_without_training_digits_or_classes_are_refused(options):
    with pytest.raises(ValueError, match=f"validation={options['validation']}"):
        digits(**options)
