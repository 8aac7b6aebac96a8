"""Grids of images as PNG files."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np

from fmjax.storage.files import write_bytes

TILE = 40  # pixels: the least side of an image in a grid


GAP = 2


def grid(images, *, columns: int | None = None) -> np.ndarray:
    """Images ``[n, H, W, C]`` in [-1, 1] as one contact sheet, uint8 ``[H', W', 3]``, row by row.

    ``floor(127.5 x + 128)`` clipped to 0..255; each pixel becomes a square of ``k = ceil(40 / min(H, W))`` pixels, with
    2 grey pixels around each image. ``columns`` defaults to a divisor of ``n`` near its root, so that rows are full.
    Raises ``ValueError`` for another shape, values that are not finite, and ``columns < 1``.
    """
    x = np.asarray(images)
    check_images("images", x, ndim=4)
    n, height, width = x.shape[:3]
    columns = _columns(n) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns={columns} must be 1 or more")
    k = max(1, math.ceil(TILE / min(height, width)))
    tiles = np.clip(np.floor(127.5 * x.astype(np.float64) + 128), 0, 255).astype(np.uint8)
    tiles = np.broadcast_to(tiles, (n, height, width, 3)).repeat(k, 1).repeat(k, 2)
    step_y, step_x = height * k + GAP, width * k + GAP
    sheet = np.full((-(-n // columns) * step_y + GAP, min(n, columns) * step_x + GAP, 3), 128, np.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * step_y + GAP, i % columns * step_x + GAP
        sheet[top : top + height * k, left : left + width * k] = tile
    return sheet


def save_png(path: str | os.PathLike, images, *, columns: int | None = None) -> Path:
    """Writes ``grid(images, columns=columns)`` as a PNG file, whole or not at all, and returns its path."""
    path = Path(path)
    write_bytes(path, _png(grid(images, columns=columns)))
    return path


def check_images(name: str, x: np.ndarray, *, ndim: int) -> None:
    """Raises ``ValueError`` unless ``x`` is finite floats ``[.., H, W, C]`` of ``ndim`` axes, ``C`` 1 or 3."""
    if x.ndim != ndim or x.shape[-1] not in (1, 3) or 0 in x.shape or not np.issubdtype(x.dtype, np.floating):
        shape = "[n, H, W, C]" if ndim == 4 else "[T, n, H, W, C]"
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}; give images {shape}, floats in [-1, 1] with C = 1 or 3, or points "
            "of two coordinates"
        )
    _check_finite(name, x)


def _check_finite(name: str, x: np.ndarray) -> None:
    bad = int(x.size - np.isfinite(x).sum())
    if bad:
        raise ValueError(f"{name} has {bad} of {x.size} values that are not finite; leave out what diverged")


def _columns(n: int) -> int:
    root = math.ceil(math.sqrt(n))
    return next((c for c in range(root, int(2 * math.sqrt(n)) + 1) if n % c == 0), root)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()
