"""Sampling: a scan that interleaves corrections with solver steps, and the state that it starts from.

A step is anything with the signature of a flow map: an RK4 step of a velocity, a diffrax solve or a learned jump. Steps
that use earlier steps have a memory (``types.Multistep``), which the scan carries.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax import paths
from fmjax.keys import as_keys, fold_in, normal
from fmjax.sampling import grids
from fmjax.sampling.costs import evaluations
from fmjax.sampling.states import time_dtype, token_state, wide_state
from fmjax.sampling.stochastic import draw_noise
from fmjax.sources import Source
from fmjax.types import Aux, Cond, Corrector, Costed, FlowMapFn, Multistep, over_batch, stated


class SampleInfo(NamedTuple):
    """What correctors and multistep steps report of a sample.

    Attributes:
        corrections: the diagnostics of the corrector, each with a leading axis over the ``K`` corrected steps: ``[K]``
            of a scalar, ``[K, B]`` of one number for each example. Empty without corrections.
        memory: the memory of a multistep step after the last step; ``None`` for a step without memory.
        steps: indices ``[K]`` of the corrected steps.
    """

    corrections: Aux
    memory: Any
    steps: np.ndarray


def sample(
    step: FlowMapFn | Multistep,
    x0: Any,
    ts: Any,
    *,
    key=None,
    cond: Cond = None,
    corrector: Corrector | None = None,
    at: Iterable[int] | None = None,
    parallel: bool = False,
    trajectory: bool = False,
    info: bool = False,
) -> Any:
    """Carry states along a time grid by a step, with corrections before the steps in ``at``.

    ``x <- corrector(x, t_n)`` where ``n`` is in ``at``, then ``x <- step(x, t_n, t_{n+1})``; ``n = N`` corrects the
    end. A rising grid samples, a falling grid inverts. With ``parallel=True`` both see the same input,
    ``x_{n+1} = step(x~, t_n, t_{n+1}) + alpha h(x~, t_n)``, so that they can run side by side. Skipped corrections cost
    nothing. The state is carried in float32 (float64 where ``x0`` is float64), whatever a network computes in.

    Args:
        step: a step ``(x, s, t, cond, key) -> x``, for example ``rk4(velocity)``, or a ``types.Multistep``.
        x0: states ``[B, ...]`` at ``ts[0]``, floating; integers for a step of tokens (``sampling.tau_leaping``).
        ts: the time grid ``[N + 1]`` in [0, 1], or the number ``N`` of uniform steps from 0 to 1. It may be traced.
        key: one key, or keys ``[B]``. Step ``n`` and correction ``n`` of each example have different keys.
        cond: the condition of the step and of the corrector, with leading axis ``B``.
        corrector: a corrector ``(key, x, t, cond) -> (x, diagnostics)``.
        at: indices of the corrected steps, from ``0`` to ``N``.
        parallel: whether a step and the correction before it see the same input.
        trajectory: whether to return all states, after their corrections.
        info: whether to return a ``SampleInfo``, too.

    Returns:
        The states ``[B, ...]`` at ``ts[-1]``, or with ``trajectory=True`` all states ``[N + 1, B, ...]``, in the type
        of ``x0``. With ``info=True`` a pair of these and a ``SampleInfo``.

    Raises:
        TypeError: for a velocity in the place of a step, and for states that are not floating.
        ValueError: for a grid outside [0, 1], or that does not rise or fall strictly, for ``at`` outside ``0 .. N``,
            for a corrector without ``at`` or without a key, and for times that the step or the corrector refuses.

    >>> import jax.numpy as jnp
    >>> from fmjax import sampling
    >>> step = sampling.euler(lambda x, t, cond=None: -x)
    >>> sampling.sample(step, jnp.ones((1, 1)), 2).tolist()
    [[0.25]]
    >>> sampling.sample(step, jnp.ones((1, 1)), [0.0, 0.5, 1.0], trajectory=True)[:, 0, 0].tolist()
    [1.0, 0.5, 0.25]
    """
    _check_step(step)
    tokens = getattr(stated(step), "tokens", False)
    x0, dtype = token_state("x0", x0) if tokens else wide_state("x0", x0)
    ts = grids.check_grid(ts, dtype=time_dtype(x0))
    n = len(ts) - 1
    if corrector is not None and at is None:
        raise ValueError(
            f"at=None: where to correct is missing. Give at=(0, {n}), or at=range({n + 1}) for every step."
        )
    at = grids.check_at(at or (), n)
    if at and corrector is None:
        raise ValueError(f"at={at}: corrections without a corrector. Give corrector=..., or leave out at.")
    if corrector is not None and key is None:
        raise ValueError("key=None: a corrector needs a key. Write sample(..., key=jax.random.key(seed)).")
    if not grids.is_traced(ts):
        with jax.ensure_compile_time_eval():  # the grid is static, so that times can be refused under jit too
            stated(step).check(ts)
            if at:
                stated(corrector).check(ts[list(at)])
    keys = None if key is None else as_keys(key, x0.shape[0])
    sub = lambda i: None if keys is None else fold_in(keys, i)
    before = np.isin(np.arange(n), at)
    init, move, *_ = with_memory(step)

    def correct(x, i, t):
        fixed, diagnostics = corrector(sub(2 * i), x, over_batch(t, x, tokens=tokens), cond)
        report = jax.tree.map(jnp.asarray, diagnostics) if info else {}
        if not parallel:
            return fixed.astype(x.dtype), jnp.zeros_like(x), report
        if "noised" not in diagnostics:
            raise ValueError(
                "parallel=True: this corrector has no info['noised']. Use marginal_matching, or parallel=False."
            )
        noised = diagnostics["noised"].astype(x.dtype)
        return noised, fixed.astype(x.dtype) - noised, report

    def skip(x, i, t):
        # of x: inside shard_map the zeros must vary over devices as x does
        zero = jnp.zeros_like(x.ravel()[:1].sum())
        shapes = jax.eval_shape(correct, x, i, t)[2] if info else {}
        return x, jnp.zeros_like(x), jax.tree.map(lambda a: jnp.broadcast_to(zero, a.shape).astype(a.dtype), shapes)

    def body(carry, row):
        (x, memory), (i, fix, s, t) = carry, row
        push, report = None, {}
        if before.all():
            x, push, report = correct(x, i, s)
        elif before.any():
            x, push, report = jax.lax.cond(fix, correct, skip, x, i, s)  # a skipped correction is not computed
        now = over_batch(s, x, tokens=tokens), over_batch(t, x, tokens=tokens)
        moved, new = move(memory, x, *now, cond, sub(2 * i + 1))
        moved, memory = _like(x, moved), jax.tree.map(_like, memory, new)
        if parallel and push is not None:
            return (moved + push, memory), (x + push if trajectory else None, report)
        return (moved, memory), (x if trajectory else None, report)

    grid = jnp.asarray(ts)
    rows = (jnp.arange(n), jnp.asarray(before), grid[:-1], grid[1:])
    (x, memory), (xs, reports) = jax.lax.scan(body, (x0, init(x0)), rows)
    reports = [jax.tree.map(lambda a: a[np.flatnonzero(before)], reports)] if before.any() else []
    if n in at:
        fixed, push, report = correct(x, n, grid[-1])
        x = fixed + push
        reports.append(jax.tree.map(lambda a: a[None], report))
    result = (jnp.concatenate([xs, x[None]]) if trajectory else x).astype(dtype)
    if not info:
        return result
    corrections = jax.tree.map(lambda *a: jnp.concatenate(a), *reports) if reports else {}
    return result, SampleInfo(corrections, memory, np.asarray(at, np.int32))


def source_sample(
    path: paths.Path,
    key,
    shape: tuple[int, ...],
    *,
    start: float | None = None,
    source: Source | None = None,
    dtype: Any = jnp.float32,
) -> Array:
    """Draw the states that a sampler starts from: ``alpha x0 + gamma z`` with ``x0`` from the source.

    ``alpha`` is 1 at ``t = 0`` of most paths, but ``sigma_max`` on ``paths.ve``; ``gamma`` is 0 there.
    Where the path keeps some of the data at ``start`` (``beta > 0``), that part is left out: it must be small.

    Args:
        path: the path of the velocity.
        key: one key, or keys ``[B]``.
        shape: the shape ``(B, ...)`` of the states.
        start: the first time of the grid, by default the start of ``path.span``.
        source: the distribution of ``x0``, by default N(0, I). Another source is drawn outside of ``jax.jit``.
        dtype: the type of the states.

    Returns:
        States ``[B, ...]`` at the time ``start``.

    >>> import jax
    >>> from fmjax import paths
    >>> x0 = source_sample(paths.ve(sigma_max=50.0), jax.random.key(0), (512, 4))
    >>> bool(45 < x0.std() < 55)
    True
    """
    start = path.span[0] if start is None else start
    keys, other = as_keys(key, shape[0]), source is not None and not source.normal
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        t = jnp.asarray(start, jnp.float64)  # N(0, I) and a latent are one Gaussian
        scale = float((path if other else paths.one_sided(path)).coefficients(t)[0])
        gamma = float(path.gamma(t)) if other and path.gamma else 0.0
    if not other:
        return jnp.asarray(scale, dtype) * normal(keys, tuple(shape[1:]), dtype)
    x = jnp.asarray(scale, dtype) * jnp.asarray(source.examples(keys, shape[1:]), dtype)
    return x + jnp.asarray(gamma, dtype) * normal(fold_in(keys, 1), tuple(shape[1:]), dtype) if gamma else x


def with_memory(step: FlowMapFn | Multistep) -> Multistep:
    """Return a step as one with a memory, which is empty where the step has none.

    Args:
        step: a step.

    Returns:
        A ``types.Multistep`` of the same cost and check.

    >>> from fmjax import sampling
    >>> with_memory(sampling.rk4(lambda x, t, cond=None: -x)).nfe
    4
    """
    if isinstance(step, Multistep):
        return step
    return Multistep(lambda x: None, lambda memory, *now: (step(*now), None), evaluations(step), stated(step).check)


def renoised(flow_map: FlowMapFn, *, path: paths.Path = paths.linear(), fraction: float = 1.0) -> FlowMapFn:
    """Return the step of multistep consistency sampling: jump past ``t``, then add noise back to ``t``.

    ``x' = X_{s,t'}(x)`` with ``t' = t + fraction (1 - t)``, then the interpolant's kernel
    ``x_t = (beta_t / beta_t') x' + sqrt(alpha_t^2 - (beta_t alpha_t' / beta_t')^2) xi``. It has the marginal at ``t``
    where ``x'`` has the marginal at ``t'``, for an independent ``N(0, I)`` source. ``fraction = 1`` jumps to the data,
    the multistep sampling of consistency models (arXiv 2303.01469, Algorithm 1), whose maps end in the data only;
    between 0 and 1 lies the gamma-sampling of CTM (2310.02279).

    Args:
        flow_map: ``X(x, s, t, cond)``.
        path: the path of the flow map.
        fraction: fraction of the way from ``t`` to the data; 0 returns ``flow_map`` itself.

    Returns:
        A step ``(x, s, t, cond, key) -> x`` that needs a key.

    Raises:
        ValueError: for a fraction outside [0, 1], for a path with a latent, and without a key.

    >>> import jax, jax.numpy as jnp
    >>> step = renoised(lambda x, s, t, cond=None, key=None: x)
    >>> step(jnp.ones((2, 3)), 0.0, 0.5, key=jax.random.key(0)).shape
    (2, 3)
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction}: outside [0, 1]. Give the fraction of the way to the data.")
    paths.refuse_latent("renoising", path)
    if fraction == 0:
        return flow_map

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        further = t + fraction * (1 - t)
        noise = draw_noise(key, x)
        return paths.renoise(path, flow_map(x, s, further, cond), noise, further, t)

    return Costed(step, evaluations(flow_map))


def _like(old: Array, new: Array) -> Array:
    """The precision of the state does not change along the grid, whatever a network computes in."""
    return new if new.dtype == old.dtype else new.astype(old.dtype)


def _check_step(step: Any) -> None:
    """Refuse a velocity, ``(x, t, cond)``, in the place of a step, ``(x, s, t, cond, key)``."""
    inner = stated(step)
    if isinstance(inner, Multistep):
        return
    if not callable(step):
        raise TypeError(f"step={step!r}: not a function. Pass a step, for example sampling.rk4(velocity).")
    try:
        signature = inspect.signature(inner.apply)
    except (TypeError, ValueError):  # builtins have no signature
        return
    try:
        signature.bind("x", "s", "t", "cond", "key")
    except TypeError:
        raise TypeError(
            f"step={getattr(step, '__name__', 'step')}{signature}: a step takes (x, s, t, cond, key). For a velocity "
            "(x, t, cond), pass sampling.rk4(velocity)."
        ) from None
