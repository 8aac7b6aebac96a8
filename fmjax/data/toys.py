"""Data sets of points in the plane, drawn from known densities: what a flow does to modes, curves and sharp edges."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np

from fmjax.checks import NonNegativeFloat, Seed, check_hints
from fmjax.data import densities
from fmjax.data.dataset import Count, Dataset, Examples, dataset
from fmjax.keys import from_seed


def checkerboard(
    *,
    train: Count = 100_000,
    validation: Count = 10_000,
    test: Count = 10_000,
    seed: Seed = 0,
    labels: bool = False,
) -> Dataset:
    """Draw points that are uniform on 8 of the 16 cells of [-1, 1)^2, see ``densities.draw_checkerboard``.

    Args:
        train: the number of points to train on, at least 2.
        validation: the number of points for validation, at least 2.
        test: the number of points for testing, at least 2.
        seed: the seed of all points, not negative.
        labels: whether the points have labels, the number of their cell, 0..7.

    Returns:
        Points ``[n, 2]`` float32 in [-1, 1)^2.

    Raises:
        ValueError: for fewer than 2 points a split, or a negative number.

    >>> checkerboard(train=8, validation=4, test=4).train.x.shape
    (8, 2)
    """
    draw = densities.draw_checkerboard
    return _points("checkerboard", draw, 8, labels, train=train, validation=validation, test=test, seed=seed)


def eight_gaussians(
    *,
    train: Count = 100_000,
    validation: Count = 10_000,
    test: Count = 10_000,
    seed: Seed = 0,
    labels: bool = False,
    radius: NonNegativeFloat = 2.0,
    std: NonNegativeFloat = 0.2,
) -> Dataset:
    """Draw points of eight equal Gaussians on a circle, see ``densities.draw_eight_gaussians``.

    Args:
        train: the number of points to train on, at least 2.
        validation: the number of points for validation, at least 2.
        test: the number of points for testing, at least 2.
        seed: the seed of all points, not negative.
        labels: whether the points have labels, the number of their Gaussian, 0..7.
        radius: the radius of the circle of means.
        std: the standard deviation of each Gaussian.

    Returns:
        Points ``[n, 2]`` float32.

    Raises:
        ValueError: for fewer than 2 points a split, or a negative number.

    >>> data = eight_gaussians(train=8, validation=4, test=4, labels=True)
    >>> data.train.x.shape, data.classes
    ((8, 2), 8)
    """
    check_hints(eight_gaussians, {"radius": radius, "std": std})
    draw = lambda key, n, labels: densities.draw_eight_gaussians(key, n, radius=radius, std=std, labels=labels)
    return _points("eight_gaussians", draw, 8, labels, train=train, validation=validation, test=test, seed=seed)


def two_moons(
    *,
    train: Count = 100_000,
    validation: Count = 10_000,
    test: Count = 10_000,
    seed: Seed = 0,
    labels: bool = False,
    std: NonNegativeFloat = 0.1,
) -> Dataset:
    """Draw points of two interleaved half circles, see ``densities.draw_two_moons``.

    Args:
        train: the number of points to train on, at least 2.
        validation: the number of points for validation, at least 2.
        test: the number of points for testing, at least 2.
        seed: the seed of all points, not negative.
        labels: whether the points have labels, 0 for the lower and 1 for the upper half circle.
        std: the standard deviation of the noise on the half circles.

    Returns:
        Points ``[n, 2]`` float32.

    Raises:
        ValueError: for fewer than 2 points a split, or a negative number.

    >>> two_moons(train=8, validation=4, test=4).kind
    'points'
    """
    check_hints(two_moons, {"std": std})
    draw = lambda key, n, labels: densities.draw_two_moons(key, n, std=std, labels=labels)
    return _points("two_moons", draw, 2, labels, train=train, validation=validation, test=test, seed=seed)


def _points(
    name: str,
    draw: Callable,
    classes: int,
    labels: bool,
    *,
    train: Count,
    validation: Count,
    test: Count,
    seed: Seed,
) -> Dataset:
    """Draw the training and test points from the seed's key, and the validation points from another key."""
    check_hints(_points, {"train": train, "validation": validation, "test": test, "seed": seed})
    key = from_seed(seed)
    x, y = map(np.asarray, draw(key, train + test, labels=True))
    held_out_x, held_out_y = map(np.asarray, draw(jax.random.fold_in(key, 1), validation, labels=True))
    examples = lambda x, y: Examples(x, y if labels else None)
    return dataset(
        examples(x[:train], y[:train]),
        examples(held_out_x, held_out_y),
        examples(x[train:], y[train:]),
        classes=classes if labels else None,
        name=name,
    )
