"""Ranges of the fields of networks, and the base class that checks them."""

from __future__ import annotations

from typing import Annotated, Literal

import flax.linen as nn
import numpy as np
from jaxtyping import Array

from fmjax import checks
from fmjax.checks import Range

Width = Annotated[int, Range(1, 65_536)]
Depth = Annotated[int, Range(0, 1024)]
Classes = Annotated[int, Range(0, 1_000_000)]
Outputs = Annotated[int, Range(1, 64)]
Dropout = checks.Fraction
Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Remat = Literal["none", "dots", "full"]


class Checked(nn.Module):
    """A Flax module that refuses fields outside their type hints when it is constructed (``checks.check_fields``).

    ``dtype`` is a name, or a type as Flax takes it, ``jnp.bfloat16``.

    >>> class Layer(Checked):
    ...     width: Width = 8
    >>> Layer(width=0)
    Traceback (most recent call last):
    ValueError: width=0: outside the allowed range. Give a number in [1, 65536].
    """

    def __post_init__(self):
        if isinstance(dtype := getattr(self, "dtype", None), (type, np.dtype)):
            object.__setattr__(self, "dtype", np.dtype(dtype).name)
        checks.check_fields(self)
        super().__post_init__()


def check_images(x: Array) -> None:
    """Refuse inputs that are not images ``[B, H, W, C]``.

    Args:
        x: the input of a network for images.

    Raises:
        ValueError: ``x`` does not have four axes.
    """
    if x.ndim != 4:
        raise ValueError(
            f"x of shape {x.shape}: this network takes images [B, H, W, C]. "
            "Give x four axes, or use the network 'mlp' for other data."
        )


def check_images_or_series(x: Array) -> None:
    """Refuse inputs that are neither images ``[B, H, W, C]`` nor series ``[B, L, C]``.

    Args:
        x: the input of a network for images and series.

    Raises:
        ValueError: ``x`` does not have three or four axes.
    """
    if x.ndim not in (3, 4):
        raise ValueError(
            f"x of shape {x.shape}: this network takes images [B, H, W, C] or series [B, L, C]. "
            "Use the network 'mlp' for other data."
        )
