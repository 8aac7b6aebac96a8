"""Sampling: a scan that interleaves corrections with steps, and what it costs.

A step is anything with the signature of a flow map: an RK4 step of a velocity, a diffrax solve or a learned jump. Steps
that use earlier ones bring a memory (``types.Multistep``), which the scan carries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import paths
from fmjax.keys import as_keys, fold_in, normal
from fmjax.sampling import grids
from fmjax.types import Cond, Corrector, FlowMapFn, Multistep, over_batch


class Cost(NamedTuple):
    """What a sample costs: ``nfe`` in all, ``corrections`` taken, ``c_nfe`` of them, ``depth`` in sequence."""

    nfe: int
    corrections: int
    c_nfe: int
    depth: int


def cost(n: int, at: Iterable[int] = (), *, step_nfe: int = 1, corrector_nfe: int = 1, parallel: bool = False) -> Cost:
    """``NFE = m N + w |S|`` for ``n = N`` steps of ``m`` evaluations and corrections of ``w`` at the steps ``S = at``.

    In parallel only the correction after the last step adds to the depth.

    >>> cost(10, (0, 5, 10), step_nfe=4)
    Cost(nfe=43, corrections=3, c_nfe=3, depth=43)
    """
    at = check_at(at, n)
    c_nfe = corrector_nfe * len(at)
    serial = corrector_nfe * (n in at) if parallel else c_nfe
    return Cost(step_nfe * n + c_nfe, len(at), c_nfe, step_nfe * n + serial)


def check_at(at: Iterable[int], n: int) -> tuple[int, ...]:
    """The corrected steps, sorted, each once; ``ValueError`` for one outside ``0 .. n``."""
    at = tuple(sorted({int(i) for i in at}))
    outside = [i for i in at if not 0 <= i <= n]
    if outside:
        raise ValueError(f"at={outside[0]} is not a step: with {n} solver steps corrections are possible at 0 .. {n}")
    return at


def same_times(at: Iterable[int], ts, other) -> tuple[int, ...]:
    """The steps of the grid ``other`` at the times that ``at`` names on ``ts``: a corrector's steps at another ``N``.

    >>> same_times((0, 5, 10), times.uniform_grid(10), times.uniform_grid(50))
    (0, 25, 50)

    Raises ``ValueError`` for ``at`` outside of ``ts`` and for the first time that ``other`` does not have.
    """
    ts, other = grids.check_grid(ts), grids.check_grid(other)
    return grids.steps_at(other, ts[list(check_at(at, len(ts) - 1))])


def sample(
    step: FlowMapFn | Multistep,
    x0: Float[Array, "b ..."],
    ts,
    *,
    key=None,
    cond: Cond = None,
    corrector: Corrector | None = None,
    at: Iterable[int] | None = None,
    parallel: bool = False,
    trajectory: bool = False,
) -> Float[Array, ...]:
    """Carries ``x0`` along the grid ``ts: [N + 1]``, correcting before step ``n`` for each ``n`` in ``at``.

    ``x <- corrector(x, t_n)`` where ``n in at``, then ``x <- step(x, t_n, t_{n+1})``; ``n = N`` corrects the end. A
    falling grid inverts. With
    ``parallel=True`` both see the same input, ``x_{n+1} = step(x~, t_n, t_{n+1}) + alpha h(x~, t_n)``, so they can run
    side by side. Skipped corrections cost nothing. Returns ``x: [B, ...]``, or with ``trajectory=True`` all
    ``[N + 1, B, ...]`` states (after their corrections). ``key`` is one key, or one per example; step ``n`` and
    correction ``n`` of an example have keys of their own. Raises ``ValueError`` for a grid that does not rise or fall
    strictly, for ``at`` outside ``0 .. N``, for a corrector without ``at`` or without a key, and for times that
    ``corrector.check``, where it has one, refuses.
    """
    ts = grids.check_grid(ts)
    n = len(ts) - 1
    if corrector is not None and at is None:
        raise ValueError(f"say where to correct: at=(0, {n}), or at=range({n + 1}) for every step")
    at = check_at(at or (), n)
    if at and corrector is None:
        raise ValueError(f"at={at} asks for corrections, but no corrector was given")
    if corrector is not None and key is None:
        raise ValueError("a corrector draws noise and needs a key: sample(..., key=jax.random.key(seed))")
    with jax.ensure_compile_time_eval():  # the grid is static, so that times can be refused under jit too
        getattr(corrector, "check", lambda ts: None)(ts[list(at)])
    keys = None if key is None else as_keys(key, x0.shape[0])
    sub = lambda i: None if keys is None else fold_in(keys, i)
    before = np.isin(np.arange(n), at)
    init, move = with_memory(step)[:2]

    def correct(x, i, t):
        fixed, info = corrector(sub(2 * i), x, over_batch(t, x), cond)
        if not parallel:
            return fixed, jnp.zeros_like(x)
        if "noised" not in info:
            raise ValueError("parallel=True needs a corrector with info['noised'], such as marginal_matching")
        return info["noised"], fixed - info["noised"]

    def skip(x, i, t):
        return x, jnp.zeros_like(x)

    def body(carry, now):
        (x, memory), (i, fix, s, t) = carry, now
        if before.all():
            x, push = correct(x, i, s)
        elif before.any():
            x, push = jax.lax.cond(fix, correct, skip, x, i, s)  # a skipped correction is not computed
        else:
            push = None
        moved, memory = move(memory, x, over_batch(s, x), over_batch(t, x), cond, sub(2 * i + 1))
        if parallel and push is not None:
            return (moved + push, memory), x + push if trajectory else None
        return (moved, memory), x if trajectory else None

    grid = jnp.asarray(ts)
    (x, _), xs = jax.lax.scan(body, (x0, init(x0)), (jnp.arange(n), jnp.asarray(before), grid[:-1], grid[1:]))
    if n in at:
        x = sum(correct(x, n, grid[-1]))
    return jnp.concatenate([xs, x[None]]) if trajectory else x


def with_memory(step: FlowMapFn | Multistep) -> Multistep:
    """A step as one with a memory, an empty one where it has none."""
    if isinstance(step, Multistep):
        return step
    return Multistep(lambda x: None, lambda memory, *now: (step(*now), None))


def renoised(flow_map: FlowMapFn, *, path: paths.Path | None = None, share: float = 1.0) -> FlowMapFn:
    """A step that jumps past its end and returns by noise: ``x' = X_{s,t'}(x)``, then the interpolant's own kernel.

    ``x_t = (beta_t / beta_t') x' + sqrt(alpha_t^2 - (beta_t alpha_t' / beta_t')^2) xi``, ``t' = t + share (1 - t)``: of
    the law at ``t`` where ``x'`` is of that at ``t'``, for an independent N(0, I) source. ``share = 1`` jumps to the
    data, the multi-step sampling of consistency models (arXiv 2303.01469, Algorithm 1), whose maps know no other end;
    ``share = 0`` is ``flow_map``, between them lies the gamma-sampling of CTM (2310.02279). It draws: give
    ``sample`` a key. Raises ``ValueError`` for ``share`` outside [0, 1] and a path with a latent.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} of the way to the data must lie in [0, 1]")
    path = path or paths.linear()
    paths.refuse_latent("renoising", path)

    def step(x, s, t, cond=None, key=None):
        if key is None:
            raise ValueError("renoising draws noise and needs a key: sample(..., key=jax.random.key(seed))")
        s, t = over_batch(s, x), over_batch(t, x)
        further = t + share * (1 - t)
        return paths.renoise(path, flow_map(x, s, further, cond), normal(key, x.shape[1:], x.dtype), further, t)

    return step
