"""What methods share: noise, errors, reductions, the split of a batch, and the views of a net as velocity or map."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import paths, times
from fmjax.keys import normal, split
from fmjax.types import (
    Aux,
    Batch,
    Cond,
    FlowMapFn,
    LossFn,
    Method,
    Net,
    Params,
    VelocityFn,
    expand,
    network,
    over_batch,
    with_null,
)


def source(key, batch: Batch) -> Float[Array, "b ..."]:
    """The batch's own ``x0`` where a coupling chose it, otherwise ``N(0, I)``, one draw per example."""
    return normal(key, batch.x1.shape[1:], batch.x1.dtype) if batch.x0 is None else batch.x0


def interpolant(path: paths.Path, key, batch: Batch, t) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """``(I_t, dI_t)`` of the batch, its source and the path's latent, where it has one, drawn from ``key: [B]``."""
    if path.gamma is None:
        return paths.with_velocity(path, source(key, batch), batch.x1, t)
    k_source, k_latent = split(key, 2)
    return paths.with_velocity(path, source(k_source, batch), batch.x1, t, latent(k_latent, batch))


def latent(key, batch: Batch) -> Float[Array, "b ..."]:
    """The path's latent ``z ~ N(0, I)``, one draw per example."""
    return normal(key, batch.x1.shape[1:], batch.x1.dtype)


def check_times(path: paths.Path, time: Callable) -> None:
    """Refuses times up to the ends, ``times.uniform``, on a path whose ``gamma'`` is infinite there."""
    if path.gamma is None or time is not times.uniform:
        return
    ends = jnp.array([0.0, 1.0])
    if not np.isfinite(jax.jvp(path.gamma, (ends,), (jnp.ones(2),))[1]).all():
        raise ValueError(
            "the velocity of this path's latent is infinite at t = 0 and 1, which time=times.uniform reaches: "
            "use times.interior (in a config time='interior')"
        )


def two_heads(what: str, out: Array, x: Array) -> list[Float[Array, "b ..."]]:
    """The two fields that a net of two heads gives at ``x``: halves of its channels. ``ValueError`` for another net."""
    if out.shape != (*x.shape[:-1], 2 * x.shape[-1]):
        raise ValueError(f"{what} needs a net of two heads (outputs=2): {x.shape} became {out.shape}")
    return jnp.split(out, 2, axis=-1)


def mse(a: Array, b: Array) -> Float[Array, " b"]:
    """Mean squared error per example, over all but the batch axis."""
    return jnp.mean(jnp.square(a - b).reshape(a.shape[0], -1), 1)


def pseudo_huber(q: Float[Array, " b"], scale: float) -> Float[Array, " b"]:
    """``sqrt(q + scale^2) - scale`` of a mean square ``q``: ``q / (2 scale)`` in the small, its root in the large."""
    return q / (jnp.sqrt(q + scale**2) + scale)


def reduce(per_example: Float[Array, " b"], **info: Array) -> tuple[Array, Aux]:
    """The batch mean as the loss; per-example values and what else is told as ``aux``, whose gradient nobody takes."""
    return jnp.mean(per_example), {"per_example": per_example, **info}


def rows(tree, index: np.ndarray):
    """The given rows of every array of a batch, a key array or a tree."""
    return jax.tree.map(lambda a: a[index], tree)


def split_rows(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``0 .. n-1`` dealt into two static, evenly interleaved groups, the first with ``share`` of them.

    Static sizes are what lets each group pay only for its own term. Dealt evenly, a shard of a batch splits as the
    whole batch does, so the loss is the same on every mesh; keys and data are exchangeable, so which rows form a group
    does not matter. Raises ``ValueError`` where ``share * n`` is not whole or ``share`` outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of the batch must lie in [0, 1], got {share}")
    size = share * n
    if abs(size - round(size)) > 1e-6:
        unit = next(k for k in range(1, 10_001) if abs(share * k - round(share * k)) < 1e-6)
        raise ValueError(f"a batch of {n} per device cannot be split at {share}; use a multiple of {unit}")
    first = np.diff(np.floor(np.arange(n + 1) * share + 1e-6)) > 0
    return np.flatnonzero(first), np.flatnonzero(~first)


class Term(NamedTuple):
    """What a term of a loss gives for its rows, ``[B]`` each; ``residual`` where ``per_example`` is no mean square."""

    s: Array
    t: Array
    per_example: Array
    residual: Array | None = None


def matching(net: Net, path: paths.Path, time: Callable, guide: Callable | None = None) -> Callable[..., Term]:
    """The term ``|u(I_t, t, t) - dI_t|^2`` that teaches the diagonal (see ``guided``); dropout acts here alone."""

    def term(params, target, batch, key):
        k_t, k_x, k_net = split(key, 3)
        t = time(k_t)
        x, u = interpolant(path, k_x, batch, t)
        u = guided(guide, target, batch, x, t, u)
        return Term(t, t, mse(net(params, x, t, t, batch.cond, k_net), u))

    return term


def guided(guide: Callable | None, target: Params, batch: Batch, x: Array, t: Array, v: Array) -> Array:
    """``sg[guide(target, batch, x, t, v)]`` in the place of ``v = dI_t`` at ``x = I_t``, or ``v`` itself."""
    return v if guide is None else jax.lax.stop_gradient(guide(target, batch, x, t, v))


def unconditional(cond: Cond, null: Cond) -> Cond:
    """The condition of no condition: ``null`` for the labels, and of a pair ``(labels, scale)`` the scale one."""
    cond = with_null(cond, null)
    return (cond[0], jnp.ones_like(cond[1])) if isinstance(cond, tuple) and not isinstance(null, tuple) else cond


def two_terms(on: Callable[..., Term], off: Callable[..., Term], share: float) -> LossFn:
    """The loss that is ``on`` for a share of the batch and ``off`` for the rest: no example pays for both.

    ``aux``: ``s``, ``t``, ``residual`` where a term has one, and masks of who has which term where there are both.
    """

    def loss(params, target, batch, key):
        n = batch.x1.shape[0]
        groups = split_rows(n, share)
        terms = [
            (index, term(params, target, rows(batch, index), key[index]))
            for term, index in zip((on, off), groups, strict=True)
            if len(index)
        ]

        def join(value):
            if len(terms) == 1:
                return value(terms[0][1])
            joined = jnp.zeros(n, value(terms[0][1]).dtype)
            for index, term in terms:
                joined = joined.at[index].set(value(term))
            return joined

        unweighted = lambda a: a.per_example if a.residual is None else a.residual
        on_diagonal = np.isin(np.arange(n), groups[0])
        masks = {"is_on_diagonal": jnp.asarray(on_diagonal), "is_off_diagonal": jnp.asarray(~on_diagonal)}
        return reduce(
            join(lambda a: a.per_example), s=join(lambda a: a.s), t=join(lambda a: a.t),
            **({"residual": join(unweighted)} if any(term.residual is not None for _, term in terms) else {}),
            **(masks if len(terms) == 2 else {}),
        )  # fmt: skip

    return loss


def draw_pair(pair: Callable, key, batch: Batch, anneal: float = 0.0) -> tuple[Array, Array]:
    """``(s, t)`` of the law ``pair``, with ``|t - s| <= progress / anneal`` during the share ``anneal``.

    A law that takes ``(key, progress)`` gets the progress too.
    """
    s, t = pair(key, progress(batch)) if "progress" in inspect.signature(pair).parameters else pair(key)
    if not anneal:
        return s, t
    gap = progress(batch) / anneal
    return s, s + jnp.clip(t - s, -gap, gap)


def progress(batch: Batch) -> Float[Array, " b"]:
    """The share of the training that is done, ``[B]``; one where the batch does not say."""
    return jnp.ones(batch.x1.shape[0]) if batch.progress is None else batch.progress


def warmed(batch: Batch, warmup: float, limit: float = 1.0) -> Float[Array, " b"]:
    """``min(limit, progress / warmup)``, ``[B]``; ``limit`` where there is no warm-up."""
    share = progress(batch)
    return jnp.minimum(limit, share / warmup) if warmup else limit * jnp.ones_like(share)


def semigradient(u: Array, g: Array, normalise: float = 0.0) -> tuple[Array, Array | None]:
    """Per example ``|u - sg(u - g)|^2``, whose gradient is ``2 g`` times that of ``u``, and ``|g|^2`` if that differs.

    ``normalise = c > 0`` puts ``g / (|g| + c)`` for ``g``, norms over an example (arXiv 2410.11081, 2506.14603).
    """
    residual, g = mse(g, jnp.zeros_like(g)), jax.lax.stop_gradient(g)
    if normalise:
        g = g / (expand(jnp.sqrt(residual * g[0].size), g) + normalise)
    return mse(u, jax.lax.stop_gradient(u - g)), residual if normalise else None


def with_jvp(net: Net) -> Net:
    """The net for a jvp: ``for_jvp`` where it has one, of the same parameters, since fused kernels have none."""
    return network(net).for_jvp or net


def two_time(net: Net, loss: LossFn) -> Method:
    """A loss over a net whose diagonal is a velocity and whose jumps are a flow map."""
    return Method(loss, velocity=diagonal(net), flow_map=jump(net))


def diagonal(net: Net) -> Callable[[Params], VelocityFn]:
    """The velocity ``v(x, t) = u(x, t, t)`` of a net."""

    def bind(params):
        def velocity(x, t, cond=None):
            t = over_batch(t, x)
            return net(params, x, t, t, cond)

        return velocity

    return bind


def jump(net: Net) -> Callable[[Params], FlowMapFn]:
    """The flow map ``X_{s,t}(x) = x + (t - s) u(x, s, t)`` of a net."""

    def bind(params):
        def flow_map(x, s, t, cond=None, key=None):
            s, t = over_batch(s, x), over_batch(t, x)
            return x + expand(t - s, x) * net(params, x, s, t, cond)

        return flow_map

    return bind


def score(path: paths.Path, velocity: Callable[[Params], VelocityFn]) -> Callable[[Params], VelocityFn] | None:
    """The score in a velocity whose source is N(0, I), independent of the data; ``None`` on a path with a latent."""

    def bind(params):
        v = velocity(params)
        return lambda x, t, cond=None: paths.score(path, x, v(x, t, cond), t)

    return bind if path.gamma is None else None
