"""Neural operators (DSNO): one evaluation decodes a teacher's trajectory at several times at once."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.methods import common as c
from fmjax.types import Cond, Costed, Method, Net, Params, expand, over_batch


def neural_operator(net: Net, *, ts: Sequence[float] = (0.0, 1.0), weights: Sequence[float] | None = None) -> Method:
    """Train a network that returns a whole trajectory, ``sum_m w_m |x_0 + (t_m - t_0) u_m(x_0) - x_{t_m}|^2``.

    DSNO (arXiv 2211.13449), with M = 4 times in the paper. It departs from the authors' code: squares in place of
    LPIPS, equal weights by default, and the network returns average velocities, so that one whose output is zero leaves
    the source where it is; the code starts from the teacher instead.

    Args:
        net: ``net(params, x, s, t, cond, key) -> [B, M, ...]`` for sources ``x: [B, ...]``, evaluated at ``s = t =
            t_0``, such as ``nets.TemporalNet``.
        ts: the times ``t_0 < t_1 < ... < t_M``; the first is the source's.
        weights: weights ``[M]`` of the times, positive, scaled to the mean 1; by default equal.

    Returns:
        A method with ``flow_map``, from ``t_0`` to the times of ``ts``; ``nan`` at others. Batches have in ``x1`` the
        trajectory ``[B, M + 1, ...]`` at ``ts``. ``decoded`` gives all times by one evaluation.

    Raises:
        ValueError: times that do not rise, weights that are not M positive numbers, and in the loss a trajectory, or an
            output of the network, of another length.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> net = lambda params, x, s, t, cond=None, key=None: jnp.stack([x, 3 * x], 1)
    >>> method = methods.neural_operator(net, ts=(0.0, 0.5, 1.0))
    >>> method.flow_map(None)(jnp.ones((1, 2)), 0.0, 1.0).tolist()
    [[4.0, 4.0]]
    """
    times = _rising(ts)
    count = len(times) - 1
    w = np.ones(count) if weights is None else np.asarray(weights, float)
    if w.shape != (count,) or not (w > 0).all():
        raise ValueError(f"weights={weights}: ts has {count} times after the first. Give one positive number each.")
    w = jnp.asarray(w / w.mean(), jnp.float32)

    @c.keyed
    def loss(params, target, batch, key):
        if batch.x1.ndim < 2 or batch.x1.shape[1] != count + 1:
            raise ValueError(f"batch.x1={list(batch.x1.shape)}: not trajectories at ts. Give [B, {count + 1}, ...].")
        error = jnp.square(decoded(net, params, batch.x1[:, 0], ts, batch.cond) - batch.x1[:, 1:])
        each = jnp.mean(error.reshape(*error.shape[:2], -1), 2)
        return c.reduce(jnp.mean(w * each, 1))

    def flow_map(params):
        def jump(x, s, t, cond=None, key=None):
            s, t = over_batch(s, x), over_batch(t, x)
            xs = jnp.concatenate([x[:, None], decoded(net, params, x, ts, cond)], 1)
            match = jnp.abs(t[:, None] - times) < 1e-6
            y = jnp.take_along_axis(xs, expand(match.argmax(1), xs), 1)[:, 0]
            known = match.any(1) & (jnp.abs(s - times[0]) < 1e-6)
            return jnp.where(expand((s == t) | known, y), jnp.where(expand(s == t, x), x, y), jnp.nan)

        return Costed(jump, nfe=1)

    return Method(loss, flow_map=flow_map, batches="trajectories")


def decoded(
    net: Net, params: Params, x: Float[Array, "b ..."], ts: Sequence[float], cond: Cond = None
) -> Float[Array, "b m ..."]:
    """Return the states at all times after the first, by one evaluation of the network.

    Args:
        net: the network of ``neural_operator``.
        params: its parameters.
        x: sources ``[B, ...]``, the states at ``ts[0]``.
        ts: the times ``[M + 1]``.
        cond: conditions.

    Returns:
        States ``[B, M, ...]``.

    Raises:
        ValueError: a network that returns another number of times.
    """
    times = _rising(ts)
    start = over_batch(float(times[0]), x)
    u = net(params, x, start, start, cond)
    if u.shape != (len(x), len(times) - 1, *x.shape[1:]):
        raise ValueError(
            f"net={list(u.shape)}: one output for each of the {len(times) - 1} times of x {list(x.shape)} is "
            f"[{len(x)}, {len(times) - 1}, ...]. Set the times of the network."
        )
    return x[:, None] + jnp.asarray(times[1:] - times[0], x.dtype).reshape(1, -1, *(1,) * (x.ndim - 1)) * u


def _rising(ts: Sequence[float]) -> np.ndarray:
    times = np.asarray(ts, np.float32)
    if times.ndim != 1 or len(times) < 2 or not (np.diff(times) > 0).all() or times[0] < 0 or times[-1] > 1:
        raise ValueError(f"ts={tuple(ts)}: not times that rise within [0, 1]. Give at least two.")
    return times
