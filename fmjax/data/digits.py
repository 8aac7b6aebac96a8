"""The offline default: scikit-learn's handwritten digits (UCI optdigits), 8x8, no download."""

from __future__ import annotations

import numpy as np

from fmjax.data.arrays import Splits


def digits(*, held_out: float = 0.2, seed: int = 0) -> Splits:
    """The 1,797 digits, split at random with equal class shares; ``x = pixel / 8 - 1`` of the 17 grey levels 0..16.

    The file is ordered by writer, so its last rows are another distribution than its first; a random split makes the
    held-out digits exchangeable with the training ones, which is what a distance to the data must assume. The grey
    levels stay discrete: no noise is added.

    Raises ``ValueError`` unless ``0 < held_out < 1`` leaves every class on both sides.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out} is the share of digits kept for testing; give a number in (0, 1)")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    x = (data.images / 8 - 1).astype(np.float32)[..., None]
    y = data.target.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=held_out, random_state=seed, stratify=y)
    missing = sorted(set(range(10)) - (set(train_y.tolist()) & set(test_y.tolist())))
    if missing:
        raise ValueError(f"held_out={held_out} leaves digits {missing} out of one side; choose it nearer to 0.2")
    return Splits(train_x, train_y, test_x, test_y, levels=17)
