"""Progressive distillation: a jump of a student is two jumps of its teacher, on a grid that is halved."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fmjax import paths, times
from fmjax.methods.progressive import progressive
from fmjax.types import FlowMapMethod, Net


def progressive_distillation(
    net: Net,
    *,
    path: paths.Path = paths.linear(),
    pair: Callable = functools.partial(times.grid_pair, rounds=1),
    teacher: Net | None = None,
    step: str = "jumps",
) -> FlowMapMethod:
    """Distil two jumps of a teacher into one, ``|u(x, s, s + 2h) - sg (u(x, s, s + h) + u(y, s + h, s + 2h)) / 2|^2``.

    Here ``y = X_{s,s+h}(x)``, and the second term is the teacher at the parameters ``target``: progressive distillation
    (arXiv 2202.00512) in flow form, as the baseline of shortcut models has it. It departs from the paper, whose DDIM
    steps on a cosine path regress on the data with the weight of "v" or ``max(SNR, 1)``: here Euler steps or jumps on
    ``path`` regress on average velocities, as means over elements. It departs from the baseline, which clips states to
    [-4, 4].

    It is ``progressive`` without a diagonal on a grid of 64 steps. The teacher of a round is the frozen student of the
    previous round, so each round is a run: the next has ``pair`` with half the ``steps``, and a first round from a
    velocity has ``step="euler"``. A moving average as ``target`` is no such teacher: it forgets short jumps while the
    student learns longer ones, and in the plane seven rounds in one run end with a relative error of 1.0 of the whole
    jump, where seven runs end with 0.1.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``.
        path: interpolant ``I_t``.
        pair: distribution of ``(s, t)``; by default the steps of a grid of 64.
        teacher: network of the two jumps, at the parameters ``target``; ``net`` by default.
        step: ``"jumps"`` of the teacher, or ``"euler"`` steps of its diagonal.

    Returns:
        A method with ``velocity`` and ``flow_map``; only the jumps of the grid are trained, and no velocity.

    Raises:
        ValueError: as ``progressive``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.progressive_distillation(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.0, 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    return progressive(net, path=path, pair=pair, diagonal=0.0, teacher=teacher, step=step)
