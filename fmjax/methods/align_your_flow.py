"""Align your flow: continuous-time flow map distillation with a normalised tangent."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fmjax import checks, paths, times
from fmjax.methods.eulerian import eulerian
from fmjax.methods.lagrangian import lagrangian
from fmjax.types import FlowMapMethod, Net

GAP = functools.partial(times.gap_pair, time=functools.partial(times.logit_normal, mean=-1.5, std=1.5))
FORMS = ("eulerian", "lagrangian")


def align_your_flow(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    time: Callable = times.uniform,
    pair: Callable = GAP,
    diagonal: float = 0.0,
    teacher: Net | None = None,
    form: str = "eulerian",
    normalise: float = 0.1,
    warmup: float = 0.1,
    limit: float = 0.99,
) -> FlowMapMethod:
    """Distil a flow map with the loss of align your flow, ``|u - sg(u - g / (|g| + c))|^2`` (arXiv 2506.14603).

    This is the published loss, a mean over elements: ``g = u - v - r (t - s) (d/ds + v . grad) u`` with ``v`` of a
    frozen teacher, ``r = min(limit, progress / warmup)`` and ``c = normalise``, on logit-normal gaps ``t - s``
    (``times.gap_pair``). The length of the warm-up and the parameters of the gaps are choices of this package: a tenth
    of the training, and mean -1.5 and standard deviation 1.5, for which a sixth of the gaps is below 0.05. Where short
    gaps are rare (0.016 for mean -0.8 and deviation 1) the diagonal drifts away from the teacher. It is ``eulerian``
    without a diagonal.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        path: interpolant ``I_t``.
        time: distribution of ``t`` on the diagonal, ``key: [B] -> [B]``.
        pair: distribution of ``(s, t)`` off the diagonal.
        diagonal: fraction of the batch with the flow-matching loss.
        teacher: network of ``v``, evaluated as ``teacher(target, x, s, s, cond)``; ``net`` by default. With
            autoguidance: ``sampling.autoguided_teacher``.
        form: ``"eulerian"``, or ``"lagrangian"`` for ``lagrangian`` with ``stop="tangent"``, which blurs according to
            the paper and ignores ``normalise``, ``warmup`` and ``limit``.
        normalise: ``c``.
        warmup: fraction of the training during which ``r`` grows.
        limit: value of ``r`` after the warm-up.

    Returns:
        A method with ``velocity`` and ``flow_map``; ``aux`` as in ``eulerian`` or ``lagrangian``.

    Raises:
        ValueError: an unknown form; else as ``eulerian`` or ``lagrangian``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.align_your_flow(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    checks.check_choice("form", form, FORMS)
    if form == "lagrangian":
        return lagrangian(net, path=path, time=time, pair=pair, diagonal=diagonal, teacher=teacher, stop="tangent")
    return eulerian(
        net, path=path, time=time, pair=pair, diagonal=diagonal, teacher=teacher,
        normalise=normalise, warmup=warmup, limit=limit,
    )  # fmt: skip
