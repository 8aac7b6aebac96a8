"""Align your flow: continuous-time flow map distillation with a normalised tangent."""

from __future__ import annotations

from fmjax import checks, paths, times
from fmjax.methods.eulerian import eulerian
from fmjax.methods.lagrangian import lagrangian
from fmjax.types import Method, Net

FORMS = ("eulerian", "lagrangian")


def align_your_flow(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.uniform,
    pair=times.gap_pair,
    diagonal: float = 0.0,
    teacher: Net | None = None,
    form: str = "eulerian",
    normalise: float = 0.1,
    warmup: float = 0.1,
    limit: float = 0.99,
) -> Method:
    """``|u - sg(u - g / (|g| + c))|^2``, ``g = u - v - r (t - s) (d/ds + v . grad) u``, ``v`` of the teacher.

    Align your flow (arXiv 2506.14603) from a frozen ``target`` (with autoguidance: ``guidance.autoguided_teacher``).
    It is ``eulerian`` without a diagonal on pairs of ``times.gap_pair``, ``r = min(limit, progress / warmup)`` and
    ``c = normalise``; the length of the warm-up and the law's parameters are not published. ``form="lagrangian"`` is
    ``lagrangian`` with ``stop="tangent"``, of which the paper says that it blurs; ``normalise``, ``warmup`` and
    ``limit`` have no meaning there. Raises ``ValueError`` for an unknown form, and as those do.
    """
    checks.check_choice("form", form, FORMS)
    where = {"path": path, "time": time, "pair": pair, "diagonal": diagonal, "teacher": teacher}
    if form == "lagrangian":
        return lagrangian(net, stop="tangent", **where)
    return eulerian(net, normalise=normalise, warmup=warmup, limit=limit, **where)
