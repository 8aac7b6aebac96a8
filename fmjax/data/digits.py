"""The data set that needs no download: scikit-learn's handwritten digits (UCI optdigits), 8x8."""

from __future__ import annotations

import numpy as np

from fmjax.checks import Seed, check_hints
from fmjax.data.dataset import Dataset, Examples, Part, dataset


def digits(*, validation: Part = 0.1, test: Part = 0.2, seed: Seed = 0) -> Dataset:
    """Split the 1,797 handwritten digits at random, with the same fraction of every class in each split.

    An image is ``x = pixel / 8 - 1`` of the 17 grey levels 0..16; no noise is added. The file is ordered by writer, so
    that its last rows have another distribution than its first rows. A random split makes the test digits exchangeable
    with the training digits, which every distance to the data assumes.

    Args:
        validation: the fraction of the digits for validation, in (0, 1).
        test: the fraction of the digits for testing, in (0, 1).
        seed: the seed of the split.

    Returns:
        Images ``[n, 8, 8, 1]`` in [-1, 1] with labels 0..9.

    Raises:
        ValueError: for fractions outside (0, 1), or fractions that leave fewer than ten digits in a split.

    >>> data = digits()
    >>> data.train.x.shape, data.validation.count, data.test.count, data.classes
    ((1257, 8, 8, 1), 180, 360, 10)
    """
    check_hints(digits, {"validation": validation, "test": test, "seed": seed})
    if min(validation, test, 1 - validation - test) * 1797 < 10:
        raise ValueError(
            f"validation={validation}, test={test}: ten classes need ten digits in every split. Use 0.1 and 0.2."
        )
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    x = (source.images / 8 - 1).astype(np.float32)[..., None]
    y = source.target.astype(np.int32)
    rest_x, test_x, rest_y, test_y = train_test_split(x, y, test_size=test, random_state=seed, stratify=y)
    count = round(validation * len(x))
    train_x, validation_x, train_y, validation_y = train_test_split(
        rest_x, rest_y, test_size=count, random_state=seed, stratify=rest_y
    )
    return dataset(
        Examples(train_x, train_y),
        Examples(validation_x, validation_y),
        Examples(test_x, test_y),
        levels=17,
        classes=10,
        name="digits",
    )
