"""The two ways in which images are enlarged or shrunk for a feature network; another way gives another distance."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from fmjax.checks import Positive, check_hints

Way = Literal["legacy", "clean"]


def resize(x: Num[Array, "n h w c"], size: Positive, *, way: Way = "clean") -> Float[Array, "n size size c"]:
    """Resize images on the scale 0 .. 255 to ``size`` pixels in both directions.

    Args:
        x: images ``[n, h, w, c]``.
        size: the number of pixels on a side.
        way: ``"legacy"``: bilinear as TensorFlow 1 did it in the original FID (arXiv 1706.08500): a pixel's corner is
            its place, and shrinking skips pixels. ``"clean"``: bicubic with an antialiasing filter, clipped, as Pillow
            does it and clean-fid proposes (arXiv 2104.11222).

    Returns:
        The images, float32.

    >>> resize(jnp.arange(4.0).reshape(1, 2, 2, 1), 4, way="legacy")[0, :, :, 0].tolist()[0]
    [0.0, 0.5, 1.0, 1.0]
    """
    check_hints(resize, {"size": size, "way": way})
    x = x.astype(jnp.float32)
    if way == "legacy":
        return _corner_bilinear(_corner_bilinear(x, size, 1), size, 2)
    shape = (len(x), size, size, x.shape[-1])
    enlarged = jax.image.resize(x, shape, "bicubic", antialias=True, precision=jax.lax.Precision.HIGHEST)
    return jnp.clip(enlarged, 0, 255)


def _corner_bilinear(x: Array, size: int, axis: int) -> Array:
    """Return one axis resized with ``source = target * scale``, the border repeated."""
    length = x.shape[axis]
    place = jnp.arange(size, dtype=jnp.float32) * jnp.float32(length / size)
    low = jnp.floor(place).astype(jnp.int32)
    weight = (place - low).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    a, b = (jnp.take(x, jnp.minimum(i, length - 1), axis) for i in (low, low + 1))
    return a + (b - a) * weight
