"""Number of network evaluations (NFE): of one call, of one step and of a whole sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fmjax.sampling import grids
from fmjax.types import Corrector, Costed, FlowMapFn, Multistep, stated


class Cost(NamedTuple):
    """The cost of one sample in network evaluations.

    Attributes:
        nfe: all network evaluations, of steps and of corrections.
        corrections: number of corrections.
        c_nfe: network evaluations of the corrections.
        depth: network evaluations that run one after another (smaller than ``nfe`` with ``parallel=True``).
    """

    nfe: int
    corrections: int
    c_nfe: int
    depth: int


def evaluations(*functions: Callable[..., Any] | Multistep, calls: int = 1, default: int = 1) -> int | None:
    """Return the network evaluations of ``calls`` calls of each function.

    Args:
        functions: velocities, score networks, steps or correctors.
        calls: number of calls of each function.
        default: evaluations of one call of a plain function, that is, of one which is no ``types.Costed``.

    Returns:
        The sum of what the functions state; ``None`` where one of them states that its cost is unknown.

    >>> from fmjax import types
    >>> guided = types.Costed(lambda x, t, cond=None: -x, nfe=2)
    >>> evaluations(guided, calls=4), evaluations(guided, lambda x, t, cond=None: -x)
    (8, 3)
    """
    counts = []
    for function in functions:
        inner = stated(function)
        plain = isinstance(inner, Costed) and inner.apply is function
        counts.append(default if plain else inner.nfe)
    return None if None in counts else calls * sum(counts)


def cost(
    step: FlowMapFn | Multistep | int,
    ts: Any,
    at: Iterable[int] = (),
    corrector: Corrector | int | None = None,
    *,
    parallel: bool = False,
) -> Cost:
    """Return the cost of ``sample(step, x0, ts, corrector=corrector, at=at)`` without running it.

    ``NFE = m N + w |S|`` for ``N`` steps of ``m`` evaluations and corrections of ``w`` evaluations at the steps ``S``.
    With ``parallel=True`` only the correction after the last step adds to the depth. A step that needs fewer
    evaluations at the end of a path (``edm_heun``, ``dpmpp_2s``) is counted in full.

    Args:
        step: a step, or the number ``m`` of its evaluations. A plain function counts as one evaluation.
        ts: the time grid, or the number ``N`` of its steps.
        at: indices of the corrected steps, from ``0`` to ``N``.
        corrector: a corrector, or the number ``w`` of its evaluations. A plain function, or ``None``, counts as one.
        parallel: whether a step and the correction before it run side by side.

    Returns:
        The evaluations, corrections and depth of one sample.

    Raises:
        ValueError: for a step or corrector of unknown cost (an adaptive solver), and for ``at`` outside ``0 .. N``.

    >>> from fmjax import sampling
    >>> cost(sampling.rk4(lambda x, t, cond=None: -x), 10, at=(0, 5, 10))
    Cost(nfe=43, corrections=3, c_nfe=3, depth=43)
    """
    n = len(grids.check_grid(ts)) - 1
    at = grids.check_at(at, n)
    m, w = _known("step", step), _known("corrector", 1 if corrector is None else corrector) if at else 0
    c_nfe = w * len(at)
    serial = w * (n in at) if parallel else c_nfe
    return Cost(m * n + c_nfe, len(at), c_nfe, m * n + serial)


def _known(what: str, function: Any) -> int:
    nfe = function if isinstance(function, int) else evaluations(function)
    if nfe is None:
        raise ValueError(
            f"{what}={function}: its number of network evaluations is unknown. Give the number itself, or a {what} "
            "with a fixed number of evaluations."
        )
    return nfe
