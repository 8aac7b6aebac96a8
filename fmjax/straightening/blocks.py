"""Blocks of a flow, fitted one after the other from data to noise: local flow matching and JKO-iFlow.

Block ``k`` is trained on the data as the blocks before it have left them, starts from the parameters of the block
before (a warm start), and then pushes these data on. Each block has a time from 0, its noise side, to 1. Sampling runs
the blocks in the reverse order, as segments of one time axis (``block_step``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fmjax.correction.marginals import build_marginals, read_marginals
from fmjax.correction.trajectories import View
from fmjax.keys import generator
from fmjax.storage import checkpoint
from fmjax.straightening.segments import piecewise
from fmjax.types import Batch, FlowMapFn, Params, over_batch


def ornstein_uhlenbeck(
    x: Float[np.ndarray, "n ..."], gamma: float, *, batch_size: int, seed: int, coupled: bool = True
) -> Callable[[int], Batch]:
    """Return batches of local flow matching: data, and the same data after a short time of noising.

    ``x0 = e^{-gamma} x1 + sqrt(1 - e^{-2 gamma}) z`` from the same ``x1``, or from another example; both have the
    distribution of the noised data, and the first has the straighter flow. ``gamma = inf`` gives ``x0 = z``, the last,
    free block.

    Args:
        x: data of the block ``[n, ...]``.
        gamma: size of the block, positive.
        batch_size: examples per batch.
        seed: seed of the draws.
        coupled: whether ``x0`` comes from the same example.

    Returns:
        A function of the step that gives ``Batch(x1, x0=x0)``, float32.

    Raises:
        ValueError: a size that is not positive.

    >>> batch = ornstein_uhlenbeck(np.ones((5, 2), np.float32), 1e-9, batch_size=3, seed=0)(0)
    >>> bool(abs(batch.x0 - batch.x1).max() < 1e-3)
    True

    Source: local flow matching (arXiv 2410.02548).
    """
    if not gamma > 0:
        raise ValueError(f"gamma={gamma}: a block of no size. Give a positive number.")
    kept, spread = np.exp(-gamma), np.sqrt(-np.expm1(-2 * gamma))

    def batch(step: int) -> Batch:
        rng = generator(seed, step)
        i, j = rng.integers(len(x), size=(2, batch_size))
        x1, start = np.asarray(x[i], np.float32), np.asarray(x[i if coupled else j], np.float32)
        x0 = kept * start + spread * rng.standard_normal(start.shape, np.float32)
        return Batch(x1=x1, x0=x0.astype(np.float32))

    return batch


def fit_blocks(
    fit: Callable[[int, Params | None, np.ndarray], Params],
    view: View,
    data: Float[np.ndarray, "n ..."],
    *,
    count: int,
    directory: str | os.PathLike,
    steps: int = 16,
    solver: str = "rk4",
    batch: int = 512,
) -> list[Params]:
    """Fit blocks one after the other, each on the data that the blocks before it have pushed.

    Args:
        fit: ``fit(k, params, x)`` trains block ``k`` on ``x``, from the parameters of the block before (``None`` for
            the first), and returns its parameters: for local flow matching ``flow_matching`` on
            ``ornstein_uhlenbeck(x, gammas[k])``, for JKO-iFlow ``methods.jko(net, size=sizes[k])`` on ``x``.
        view: ``view(params)`` is the velocity of a block, from its noise side at 0 to its data side at 1.
        data: the data ``[n, ...]``, float32.
        count: number of blocks.
        directory: folder of the pushed data, one set of marginals a block. A push that is there is not solved again.
        steps: solver steps of a push.
        solver: name of the solver.
        batch: examples per solve.

    Returns:
        The parameters of the blocks, the block next to the data first.

    Raises:
        ValueError: as ``build_marginals``; fewer than one block.

    >>> import tempfile
    >>> still = lambda params: lambda x, t, cond=None: params * x
    >>> mean = lambda k, params, x: float(x.mean())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fit_blocks(mean, still, np.ones((4, 1), np.float32), count=1, directory=folder)
    [1.0]
    """
    if count < 1:
        raise ValueError(f"count={count}: no block. Give at least 1.")
    x, params, blocks = np.asarray(data, np.float32), None, []
    for k in range(count):
        params = fit(k, params, x)
        blocks.append(params)
        if k + 1 < count:
            x = push_block(
                view, params, x, directory=Path(directory) / f"block_{k}", steps=steps, solver=solver, batch=batch
            )
    return blocks


def push_block(
    view: View,
    params: Params,
    x: Float[np.ndarray, "n ..."],
    *,
    directory: str | os.PathLike,
    steps: int = 16,
    solver: str = "rk4",
    batch: int = 512,
) -> Float[np.ndarray, "n ..."]:
    """Push data through a block, from its data side to its noise side, as backward marginals on disk.

    Args:
        view: ``view(params)`` is the velocity of the block.
        params: parameters of the block.
        x: data of the block ``[n, ...]``, float32.
        directory: folder of the set.
        steps: number of solver steps.
        solver: name of the solver.
        batch: examples per solve.

    Returns:
        The data at the noise side, ``[n, ...]``.

    >>> import tempfile
    >>> shift = lambda params: lambda x, t, cond=None: params + 0 * x
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     push_block(shift, 0.25, np.ones((2, 1), np.float32), directory=folder).tolist()
    [[0.75], [0.75]]
    """
    ts = np.linspace(0, 1, steps + 1, dtype=np.float32)
    build_marginals(
        view, params, ts, directory=directory, direction="backward", flow=checkpoint.digest(params), data=x, steps=(0,),
        solver=solver, batch=batch,
    )  # fmt: skip
    return np.asarray(read_marginals(directory).x)[:, 0]


def block_step(steps: Sequence[FlowMapFn]) -> FlowMapFn:
    """Return one step on [0, 1] that runs the blocks from noise to data, in the reverse of the order of the fit.

    Args:
        steps: a step or flow map of each block on its own time, the block next to the data first.

    Returns:
        A step; sample on ``segment_grid(block_bounds(len(steps)), counts)``, which holds the bounds of the blocks.

    >>> move = lambda speed: lambda x, s, t, cond=None, key=None: x + speed * (t - s)[:, None]
    >>> step = block_step([move(1.0), move(10.0)])
    >>> step(jnp.zeros((2, 1)), jnp.array([0.0, 0.5]), jnp.array([0.5, 1.0])).tolist()
    [[10.0], [1.0]]
    """
    bounds = block_bounds(len(steps))

    def local(step, low, high):
        def move(x, s, t, cond=None, key=None):
            inside = lambda t: jnp.clip((over_batch(t, x) - low) / (high - low), 0, 1)
            return step(x, inside(s), inside(t), cond, key)

        return move

    ends = zip(bounds, bounds[1:], strict=False)
    return piecewise([local(step, *end) for step, end in zip(reversed(steps), ends, strict=True)], bounds)


def block_bounds(count: int) -> tuple[float, ...]:
    """Return the bounds of blocks on [0, 1], of equal lengths.

    Args:
        count: number of blocks.

    Returns:
        ``count + 1`` times.

    >>> block_bounds(2)
    (0.0, 0.5, 1.0)
    """
    return tuple(float(i) / count for i in range(count + 1))
