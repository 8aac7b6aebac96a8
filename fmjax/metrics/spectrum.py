"""The power of an error by radial frequency."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from fmjax.metrics import checking


def radial(x: np.ndarray) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return the power of images in rings of frequency: ``|F x|^2 / (H W)^2``, mean over images and channels.

    ``F`` is the 2-D discrete Fourier transform. A ring holds the modes whose frequency rounds to the same multiple of
    ``1 / min(H, W)`` cycles a pixel; the highest frequency is ``1 / sqrt 2``. The powers are sums over modes, so that
    they add up to the mean of ``x^2``: for an error they say which fraction of its mean square is low or high.

    Args:
        x: images ``[n, H, W, C]``, or differences of images.

    Returns:
        Frequencies ``[k]``, cycles a pixel, and powers ``[k]``.

    Raises:
        ValueError: for another shape.

    >>> frequency, power = radial(np.ones((1, 4, 4, 1)))
    >>> frequency[:2].tolist(), power[:2].tolist()
    ([0.0, 0.25], [1.0, 0.0])
    """
    if np.ndim(x) != 4:
        raise ValueError(f"x={np.shape(x)}: a spectrum is taken of images. Give [n, H, W, C].")
    x = checking.finite_rows("x", x, least=1)
    n, height, width, channels = x.shape
    modes = np.abs(np.fft.fft2(x, axes=(1, 2))) ** 2 / (height * width) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    ring = np.rint(radius * min(height, width)).astype(int)
    power = np.bincount(ring.ravel(), modes.sum((0, 3)).ravel() / (n * channels))
    return np.arange(len(power)) / min(height, width), power


def low_fraction(frequency: ArrayLike, power: ArrayLike, *, below: float = 0.2) -> float:
    """Return the fraction of the power at low frequencies.

    Args:
        frequency: frequencies ``[k]``, cycles a pixel, of ``radial``.
        power: powers ``[k]``.
        below: the bound of low frequencies; 0.2 means waves of more than 5 pixels.

    Returns:
        The fraction, in [0, 1].

    Raises:
        ValueError: for frequencies and powers that do not match, or are not finite.

    >>> low_fraction([0.0, 0.25, 0.5], [3.0, 1.0, 0.0])
    0.75
    """
    frequency, power = (checking.finite_rows(*a, least=1) for a in (("frequency", frequency), ("power", power)))
    if power.ndim != 1 or frequency.shape != power.shape:
        raise ValueError(f"power={power.shape}: frequencies are {frequency.shape}. Give both as `radial` returns them.")
    return float(power[frequency < below].sum() / power.sum())
