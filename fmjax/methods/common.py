"""What methods share: noise, errors, reductions, the split of a batch, and the views of a net as velocity or map."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import paths, times
from fmjax.types import Aux, Batch, FlowMapFn, Net, Params, VelocityFn, expand, normal, over_batch, split

__all__ = [
    "check_times", "diagonal", "interpolant", "jump", "latent", "mse", "reduce", "rows", "source", "split", "split_rows"
]  # fmt: skip


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


def mse(a: Array, b: Array) -> Float[Array, " b"]:
    """Mean squared error per example, over all but the batch axis."""
    return jnp.mean(jnp.square(a - b).reshape(a.shape[0], -1), 1)


def reduce(per_example: Float[Array, " b"], **info: Array) -> tuple[Array, Aux]:
    """The batch mean as the loss; per-example values and what else is told, without gradient, as ``aux``."""
    aux = jax.lax.stop_gradient({"per_example": per_example, **info})
    return jnp.mean(per_example), aux


def rows(tree, index: np.ndarray):
    """The given rows of every array of a batch, a key array or a tree."""
    return jax.tree.map(lambda a: a[index], tree)


def split_rows(n: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``0 .. n-1`` dealt into two static, evenly interleaved groups, the first with ``share`` of them.

    Static sizes are what lets each group pay only for its own term. Dealt evenly, a shard of a batch splits as the
    whole batch does, so the loss is the same on every mesh; keys and data are exchangeable, so which rows form a group
    does not matter. Raises ``ValueError`` where ``share * n`` is not whole.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share must lie strictly between 0 and 1, got {share}")
    size = share * n
    if abs(size - round(size)) > 1e-6:
        unit = next(k for k in range(1, 10_001) if abs(share * k - round(share * k)) < 1e-6)
        raise ValueError(f"a batch of {n} per device cannot be split at {share}; use a multiple of {unit}")
    first = np.diff(np.floor(np.arange(n + 1) * share + 1e-6)) > 0
    return np.flatnonzero(first), np.flatnonzero(~first)


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
