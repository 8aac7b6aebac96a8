"""Grids of images as PNG files."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np

from fmjax.checks import check_pixels
from fmjax.storage.files import write_bytes

TILE = 40  # pixels: the least side of an image in a grid
GAP = 2  # grey pixels around each image


def image_grid(images, *, columns: int | None = None) -> np.ndarray:
    """Draw images side by side, row by row, as one image.

    A value ``x`` becomes ``floor(127.5 x + 128)``, clipped to 0..255. Each pixel becomes a square of
    ``k = ceil(40 / min(H, W))`` pixels.

    Args:
        images: floats in [-1, 1], ``[n, H, W, C]`` with ``C`` 1 or 3.
        columns: images in a row; ``None`` takes a divisor of ``n`` near its root, so that rows are full.

    Returns:
        The image, uint8 ``[H', W', 3]``.

    Raises:
        ValueError: another shape, values that are not finite, or ``columns < 1``.

    >>> image_grid(np.zeros((4, 8, 8, 1))).shape
    (86, 86, 3)
    """
    x = np.asarray(images)
    check_pictures("images", x, ndim=4)
    n, height, width = x.shape[:3]
    columns = _columns(n) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns={columns} must be 1 or more")
    k = max(1, math.ceil(TILE / min(height, width)))
    tiles = pixels(x)
    tiles = np.broadcast_to(tiles, (n, height, width, 3)).repeat(k, 1).repeat(k, 2)
    step_y, step_x = height * k + GAP, width * k + GAP
    sheet = np.full((-(-n // columns) * step_y + GAP, min(n, columns) * step_x + GAP, 3), 128, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * step_y + GAP, i % columns * step_x + GAP
        sheet[top : top + height * k, left : left + width * k] = tile
    return sheet


def save_png(path: str | os.PathLike, images, *, columns: int | None = None) -> Path:
    """Write ``image_grid(images)`` as a PNG file, whole or not at all.

    Args:
        path: the file, in a folder that exists.
        images: floats in [-1, 1], ``[n, H, W, C]`` with ``C`` 1 or 3.
        columns: images in a row.

    Returns:
        The path.
    """
    path = Path(path)
    write_bytes(path, png_bytes(image_grid(images, columns=columns)))
    return path


def save_image(path: str | os.PathLike, image) -> Path:
    """Write one image as a PNG file, a pixel a pixel, whole or not at all.

    Args:
        path: the file, in a folder that exists.
        image: floats in [-1, 1], ``[H, W, C]`` with ``C`` 1 or 3.

    Returns:
        The path.
    """
    path, x = Path(path), np.asarray(image)
    check_pictures("image", x[None], ndim=4)
    write_bytes(path, png_bytes(pixels(x)))
    return path


def pixels(x: np.ndarray) -> np.ndarray:
    """Return images in [-1, 1] as uint8: ``floor(127.5 x + 128)``, clipped to 0 .. 255.

    Args:
        x: floats ``[...]``.

    Returns:
        uint8 ``[...]``.

    >>> pixels(np.array([-1.0, 0.0, 1.0])).tolist()
    [0, 128, 255]
    """
    return np.clip(np.floor(127.5 * x.astype(np.float64) + 128), 0, 255).astype(np.uint8)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode an image as PNG.

    Args:
        pixels: uint8 ``[H, W, 3]``, or ``[H, W, 1]`` for a grey image.

    Returns:
        The bytes of the file.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.squeeze(pixels, -1) if pixels.shape[-1] == 1 else pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def check_pictures(name: str, x: np.ndarray, *, ndim: int) -> None:
    """Check that an array holds images that can be drawn.

    Args:
        name: the array's name in messages.
        x: floats ``[n, H, W, C]`` or ``[T, n, H, W, C]`` with ``C`` 1 or 3.
        ndim: the number of axes, 4 or 5.

    Raises:
        ValueError: another shape or dtype, values that are not finite, or another scale, as 0 .. 255.
    """
    if x.ndim != ndim or x.shape[-1] not in (1, 3) or 0 in x.shape or not np.issubdtype(x.dtype, np.floating):
        shape = "[n, H, W, C]" if ndim == 4 else "[T, n, H, W, C]"
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}; give images {shape}, floats in [-1, 1] with C = 1 or 3, or points "
            "of two coordinates"
        )
    check_finite_values(name, x)
    check_pixels(name, x)


def check_finite_values(name: str, x: np.ndarray) -> None:
    """Check that an array that is to be drawn has finite values only.

    Args:
        name: the array's name in messages.
        x: numbers ``[...]``.

    Raises:
        ValueError: some values are not finite.
    """
    bad = int(x.size - np.isfinite(x).sum())
    if bad:
        raise ValueError(
            f"{name} has {bad} of {x.size} values that are not finite; leave out the samples that diverged"
        )


def _columns(n: int) -> int:
    root = math.ceil(math.sqrt(n))
    return next((c for c in range(root, int(2 * math.sqrt(n)) + 1) if n % c == 0), root)
