"""The input pipeline for data that fit in memory: ``batch = f(step)``, a pure function, so that resume is free."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from fmjax.couplings import Coupling
from fmjax.types import Batch, Cond

T = TypeVar("T")

_EPOCH, _FLIP, _PAIR = range(3)


@runtime_checkable
class Rows(Protocol):
    """What examples are taken from: an array ``[n, ...]``, or a file that reads rows when asked for them."""

    shape: Any
    dtype: Any
    ndim: Any

    def __len__(self) -> int: ...

    def __getitem__(self, rows, /) -> Any:
        """The examples of the indices ``rows: [k]``, as an array ``[k, ...]`` of their own."""


class Splits(NamedTuple):
    """A data set: images ``x: [n, H, W, C]`` float32 in [-1, 1] with labels ``y: [n]``, train and held out.

    The images are arrays, or stay on disk (``images.Records``). ``levels`` is the number of grey levels that a pixel
    can have (8-bit images: 256).
    """

    train_x: Rows
    train_y: np.ndarray
    test_x: Rows
    test_y: np.ndarray
    levels: int = 256


def batches(
    x: Rows,
    y: Cond = None,
    *,
    batch_size: int,
    seed: int,
    couple: Coupling | None = None,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], Batch]:
    """Batches of ``x: [n, ...]`` (float) and ``y`` (a pytree of ``[n, ...]``) as a function of the step alone.

    The steps read one endless row of epochs, each a permutation of all examples drawn from ``(seed, epoch)``; a batch
    may lie across two of them. So ``n`` consecutive examples from an epoch's start are all examples once, whatever
    ``batch_size`` (the global one) is.

    * ``couple``: draws ``x0 ~ N(0, I)`` for the global batch and pairs it, before this process takes its rows: the
      numbers do not depend on ``process_count``. Without it ``Batch.x0`` is None.
    * ``flip``: mirrors half of the images ``[n, H, W, C]`` left to right.
    * ``process_index``: rows ``[i B/P, (i + 1) B/P)`` of the global batch of size ``B`` are returned, ``P`` being
      ``process_count``.

    Raises ``ValueError`` for ``batch_size`` outside 1..n or not divisible by ``process_count``, ``x`` that is not
    floating, ``y`` of another length, ``flip`` of anything but images, a negative seed or step.
    """
    n = len(x)
    _check(x, y, batch_size, seed, flip, process_index, process_count)
    share = batch_size // process_count
    mine = slice(process_index * share, (process_index + 1) * share)

    @functools.lru_cache(maxsize=2)  # a batch touches two epochs at most
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, _EPOCH, epoch]).permutation(n)

    def batch(step: int) -> Batch:
        if step < 0:
            raise ValueError(f"step={step} must be 0 or more")
        epoch, first = divmod(int(step) * batch_size, n)
        rows = order(epoch)[first : first + batch_size]
        if len(rows) < batch_size:
            rows = np.concatenate([rows, order(epoch + 1)[: batch_size - len(rows)]])
        mirrored = np.random.default_rng([seed, _FLIP, step]).random(batch_size) < 0.5 if flip else None
        if couple is None:  # no example needs another: gather this process's rows only
            return Batch(x1=_take(x, rows[mine], mirrored[mine] if flip else None), cond=_rows(y, rows[mine]))
        rng = np.random.default_rng([seed, _PAIR, step])
        x1 = _take(x, rows, mirrored)
        x0, x1, cond = couple(rng, _noise(rng, x1), x1, _rows(y, rows))
        return Batch(x1=x1[mine], x0=x0[mine], cond=_rows(cond, mine))

    return batch


def prefetch(f: Callable[[int], T], start: int, stop: int, *, depth: int = 2) -> Iterator[T]:
    """``f(start), ..., f(stop - 1)`` in order, computed up to ``depth`` calls ahead in one background thread.

    An exception of ``f(step)`` is raised where that value was due; closing the iterator waits for the running call and
    ends the thread. Raises ``ValueError`` for ``depth < 1``.
    """
    if depth < 1:
        raise ValueError(f"depth={depth} must be 1 or more: the number of calls that may run ahead")

    def values():
        pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        ahead = collections.deque()
        try:
            for step in range(start, stop):
                ahead.append(pool.submit(f, step))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    return values()


def _take(x: Rows, rows: np.ndarray, mirrored: np.ndarray | None) -> np.ndarray:
    out = x[rows]
    if mirrored is not None:
        out[mirrored] = out[mirrored, :, ::-1]
    return out


def _rows(tree: Cond, rows) -> Cond:
    return jax.tree.map(lambda leaf: leaf[rows], tree)


def _noise(rng: np.random.Generator, like: np.ndarray) -> np.ndarray:
    return rng.standard_normal(like.shape, dtype=np.float32).astype(like.dtype, copy=False)


def _check(x, y, batch_size, seed, flip, process_index, process_count) -> None:
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"x has dtype {x.dtype}; give floats, images as float32 in [-1, 1] (uint8: x / 127.5 - 1)")
    lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(y)}
    if lengths - {(len(x),)}:
        raise ValueError(f"y has leaves of leading size {sorted(lengths)}; each must be [n, ...] with n={len(x)} as x")
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size={batch_size} must be in 1..{len(x)}, the number of examples")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} must be in 0..process_count - 1, process_count={process_count}"
        )
    if batch_size % process_count:
        down = batch_size - batch_size % process_count
        near = down or process_count
        raise ValueError(f"batch_size={batch_size} is not divisible by {process_count} processes; use {near}")
    if flip and x.ndim != 4:
        raise ValueError(f"flip=True mirrors images [n, H, W, C]; x has shape {x.shape}, so set flip=False")
    if seed < 0:
        raise ValueError(f"seed={seed} must be 0 or more")
