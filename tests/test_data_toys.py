"""Toy data sets: the splits have the density's distribution and no common point, and labels name the parts."""

import numpy as np
import pytest

from fmjax import data
from fmjax.data.toys import checkerboard, eight_gaussians, two_moons

TOYS = pytest.mark.parametrize("toy", [checkerboard, eight_gaussians, two_moons])


def test_all_splits_are_uniform_on_the_eight_cells_and_apart():
    """Chi-squared of 8 cells, 7 degrees of freedom: below its 1 - 1e-4 quantile."""
    stats = pytest.importorskip("scipy.stats")
    board = checkerboard(train=20_000, validation=4000, test=5000, labels=True)
    assert board.train.x.shape == (20_000, 2) and board.test.x.dtype == np.float32
    assert (board.kind, board.classes, board.levels) == ("points", 8, None)
    for x, cell in board[:3]:
        column, row = np.floor(2 * (x + 1)).astype(int).T
        assert ((column + row) % 2 == 0).all() and (np.abs(x) <= 1).all()
        np.testing.assert_array_equal(cell, 2 * column + row // 2)
        assert stats.chisquare(np.bincount(cell)).pvalue > 1e-4
    points = [set(map(bytes, examples.x)) for examples in board[:3]]
    assert len(set.union(*points)) == sum(map(len, points)) == 29_000


def test_labels_name_the_nearest_gaussian():
    gaussians = eight_gaussians(train=500, validation=50, test=50, labels=True, std=0.05, radius=3.0)
    angle = gaussians.train.cond * np.pi / 4
    offset = gaussians.train.x - 3 * np.stack([np.cos(angle), np.sin(angle)], 1)
    assert gaussians.classes == 8 and np.abs(offset).max() < 0.05 * 5
    assert len(np.unique(gaussians.train.cond)) == 8


def test_labels_name_the_half_circle():
    moons = two_moons(train=500, validation=50, test=50, labels=True, std=0.0)
    for label, centre in ((1, (0, 0)), (0, (1, 0.5))):
        x = moons.train.x[moons.train.cond == label]
        np.testing.assert_allclose(np.linalg.norm(x - centre, axis=1), 1, atol=1e-6)
        assert 150 < len(x) < 350


@TOYS
def test_a_seed_fixes_the_points_and_labels_change_none(toy):
    sizes = {"train": 50, "validation": 10, "test": 10}
    a, b, other, labelled = toy(**sizes), toy(**sizes), toy(**sizes, seed=1), toy(**sizes, labels=True)
    for i in range(3):
        np.testing.assert_array_equal(a[i].x, b[i].x)
        np.testing.assert_array_equal(a[i].x, labelled[i].x)
        assert not (a[i].x == other[i].x).any()
    assert a.train.cond is None and a.classes == 0 and a.name == toy.__name__


@TOYS
@pytest.mark.parametrize(("field", "value"), [("train", 1), ("validation", 0), ("test", 1), ("seed", -1)])
def test_options_that_cannot_work_are_refused(toy, field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}: "):
        toy(**{"train": 4, "validation": 4, "test": 4, field: value})


@pytest.mark.parametrize(("toy", "field"), [(eight_gaussians, "radius"), (eight_gaussians, "std"), (two_moons, "std")])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_size_that_is_negative_or_nan_is_refused(toy, field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}: "):
        toy(train=4, validation=4, test=4, **{field: value})


def test_the_face_has_the_data_sets_under_their_names():
    assert data.two_moons is two_moons and data.eight_gaussians is eight_gaussians
