"""Progressive distillation: a jump of a student is two of its teacher's, on a grid that is halved."""

from __future__ import annotations

from fmjax import paths, times
from fmjax.methods.progressive import progressive
from fmjax.types import Method, Net


def progressive_distillation(
    net: Net, *, path: paths.Path | None = None, pair=times.grid_pair, teacher: Net | None = None, step: str = "jumps"
) -> Method:
    """``|u(x, s, s + 2h) - sg (u(x, s, s + h) + u(X_{s,s+h}(x), s + h, s + 2h)) / 2|^2``, the sum of ``target``.

    Progressive distillation (arXiv 2202.00512) in flow form: ``progressive`` without a diagonal, on the grid of
    ``times.grid_pair``, whose jumps double from round to round. The teacher of a round is the student of the one
    before: for a frozen teacher give each round a run of its own, ``pair`` with ``rounds=1`` and half the ``steps``,
    the first from a velocity with ``step="euler"``; a moving average as the target serves all rounds in one run. Only
    the maps of the grid are trained, no velocity. Raises as ``progressive`` does.
    """
    return progressive(net, path=path, pair=pair, diagonal=0.0, teacher=teacher, step=step)
