"""Time grids whose noise levels are shifted for large images: by a factor (SD3), or by the number of tokens (Flux).

A large image of the same noise level shows more of the data: its neighbouring pixels, which say the same, average the
noise out. A grid that is even for small images is therefore moved to more noise for large images (arXiv 2403.03206).
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np

from fmjax import paths
from fmjax.checks import Finite, Positive, PositiveFloat, Range, check_hints
from fmjax.sampling import grids


def shifted_grid(
    n: int,
    *,
    shift: PositiveFloat = 3.0,
    last: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = None,
    path: paths.Path = paths.linear(),
) -> np.ndarray:
    """Return the even grid of the linear path with all noise levels multiplied by ``shift`` (SD3, arXiv 2403.03206).

    With ``tau = 1 - t``, evenly spaced from 1 to ``last``: ``tau' = shift tau / (1 + (shift - 1) tau)``, then the data.
    So ``tau' / (1 - tau')``, the noise level ``alpha / beta``, is ``shift`` times as large: steps move to the noise, as
    large images need. The paper takes ``shift = sqrt(pixels / pixels of the training)``, and 3 for images of 1024^2.

    Args:
        n: number of steps, 1 or more.
        shift: factor on the noise level; 1 for the uniform grid.
        last: ``tau`` of the last time before the data; ``None`` for ``1 / n``, steps as even as can be. The code of SD3
            and diffusers end at their smallest training level, shifted once: ``0.001 shift / (1 + (shift - 1) 0.001)``.
        path: the path whose times are returned; it starts in pure noise.

    Returns:
        Rising times ``[n + 1]``, float64, from 0 to 1.

    Raises:
        ValueError: for ``n < 1``, a ``shift`` that is not positive, ``last`` outside (0, 1), a path that does not start
            in pure noise, and a path with a latent.

    >>> shifted_grid(4, shift=3.0).round(4).tolist()
    [0.0, 0.1, 0.25, 0.5, 1.0]
    """
    grids.check_steps(n)
    check_hints(shifted_grid, {"shift": shift, "last": last})
    tau = np.linspace(1, 1 / n if last is None else last, n)
    return grids.at_times(path, (1 - tau) / (1 + (shift - 1) * tau))


def resolution_grid(
    n: int,
    *,
    tokens: Positive,
    base_tokens: Positive = 256,
    max_tokens: Positive = 4096,
    base_shift: Finite = 0.5,
    max_shift: Finite = 1.15,
    path: paths.Path = paths.linear(),
) -> np.ndarray:
    """Return the shifted grid of Flux, whose shift ``e^mu`` grows with the number of tokens of an image.

    ``mu`` is linear in ``tokens``: ``base_shift`` at ``base_tokens`` and ``max_shift`` at ``max_tokens``, also beyond
    both. The defaults are the values of Flux.1 [dev] (the authors' code; ``use_dynamic_shifting`` in diffusers).

    Args:
        n: number of steps, 1 or more.
        tokens: number of tokens, for example (height / 16) (width / 16) for images of Flux.
        base_tokens: the number of tokens with the shift ``e^base_shift``.
        max_tokens: the number of tokens with the shift ``e^max_shift``.
        base_shift: ``mu`` at ``base_tokens``.
        max_shift: ``mu`` at ``max_tokens``.
        path: the path whose times are returned; it starts in pure noise.

    Returns:
        Rising times ``[n + 1]``, float64, from 0 to 1.

    Raises:
        ValueError: for ``n < 1``, numbers of tokens that are not positive or equal, ``mu`` outside [-20, 20], and paths
            as in ``shifted_grid``.

    >>> resolution_grid(4, tokens=4096).round(4).tolist()
    [0.0, 0.0955, 0.2405, 0.4872, 1.0]
    """
    counts = {"tokens": tokens, "base_tokens": base_tokens, "max_tokens": max_tokens}
    check_hints(resolution_grid, counts | {"base_shift": base_shift, "max_shift": max_shift})
    if base_tokens == max_tokens:
        raise ValueError(f"max_tokens={max_tokens}: equal to base_tokens. Give two numbers of tokens.")
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    if abs(mu) > 20:
        raise ValueError(
            f"tokens={tokens}: a shift of e^mu for mu={mu:g}. Change tokens, or the tokens of both shifts."
        )
    return shifted_grid(n, shift=math.exp(mu), path=path)
