"""Where in frequency an error lies: its power by radial frequency."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def radial(x: np.ndarray) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """``(frequency, power)`` of images ``[n, H, W, C]``: ``|F x|^2 / (H W)^2`` in rings, mean over ``n`` and ``C``.

    ``F`` is the 2-D discrete Fourier transform of an image; a ring holds the modes whose frequency, in cycles a pixel
    and at most ``1 / sqrt 2``, rounds to the same multiple of ``1 / min(H, W)``. The powers are sums over modes, so
    that they add up to the mean of ``x^2``: of an error this says which share of its mean square is low or high.
    Raises ``ValueError`` unless ``x`` is ``[n, H, W, C]``.
    """
    if np.ndim(x) != 4:
        raise ValueError(f"a spectrum is of images [n, H, W, C], got shape {np.shape(x)}")
    n, height, width, channels = np.shape(x)
    modes = np.abs(np.fft.fft2(np.asarray(x, np.float64), axes=(1, 2))) ** 2 / (height * width) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    ring = np.rint(radius * min(height, width)).astype(int)
    power = np.bincount(ring.ravel(), modes.sum((0, 3)).ravel() / (n * channels))
    return np.arange(len(power)) / min(height, width), power


def low_share(frequency, power, *, below: float = 0.2) -> float:
    """The share of ``radial``'s power at frequencies under ``below`` cycles a pixel: of waves of 5 pixels and more."""
    frequency, power = np.asarray(frequency), np.asarray(power)
    return float(power[frequency < below].sum() / power.sum())
