"""The input pipeline for data that fit in memory: ``batch = f(step)``, a pure function, so that resume is free."""

from __future__ import annotations

import collections
import concurrent.futures
import difflib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from fmjax import transport
from fmjax.couplings import Coupling
from fmjax.types import Batch, Cond

T = TypeVar("T")

NEGATIVES = (None, "any", "other_label")

_EPOCH, _FLIP, _PAIR, _NEGATIVE = range(4)


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
    source: np.ndarray | None = None,
    negatives: str | None = None,
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
    * ``source``: ``[n, ...]``, fixed pairs instead: ``Batch.x0`` is the source of the same row (reflow, arXiv
      2209.03003: ``x`` the samples of a flow and ``source`` the noise they came from; an inverse model the other way).
    * ``negatives``: ``Batch.negative`` is another example per row, for contrastive losses (arXiv 2506.05350): uniform
      over the data set but for those equal to the row's ``x1`` (``"any"``) or those of its label, that is of equal
      integer leaves of ``y`` (``"other_label"``).
    * ``flip``: mirrors half of the images ``[n, H, W, C]`` left to right, a fixed pair as one, a negative for itself.
    * ``process_index``: rows ``[i B/P, (i + 1) B/P)`` of the global batch of size ``B`` are returned, ``P`` being
      ``process_count``.

    Raises ``ValueError`` for ``batch_size`` outside 1..n or not divisible by ``process_count``, ``x`` that is not
    floating, ``y`` of another length, ``flip`` of anything but images, a negative seed or step, a ``source`` of another
    shape or beside ``couple``, negatives that do not exist.
    """
    n = len(x)
    _check(x, y, batch_size, seed, flip, process_index, process_count)
    _check_pairs(x, couple, source)
    label = _labels(y) if negatives == "other_label" else None
    _check_negatives(x, negatives, label, flip)
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
        if couple is None and negatives is None:  # no example needs another: gather this process's rows only
            rows, mirrored = rows[mine], mirrored[mine] if flip else None
        x0 = None if source is None else _take(source, rows, mirrored)
        out = Batch(_take(x, rows, mirrored), x0, _rows(y, rows))
        if couple is not None:
            rng = np.random.default_rng([seed, _PAIR, step])
            x0, x1, cond = couple(rng, _noise(rng, out.x1), out.x1, out.cond)
            out = Batch(x1, x0, cond)
        if negatives is not None:
            out = out._replace(negative=negative(np.random.default_rng([seed, _NEGATIVE, step]), out))
        return out if len(rows) == share else _rows(out, mine)

    def negative(rng: np.random.Generator, out: Batch) -> np.ndarray:
        def refused(rows):
            return _equal(x[rows], out.x1, flip) if label is None else (label[rows] == _labels(out.cond)).all(1)

        rows = rng.integers(n, size=batch_size)
        while len(again := np.flatnonzero(refused(rows))):
            rows[again] = rng.integers(n, size=len(again))
        return _take(x, rows, rng.random(batch_size) < 0.5 if flip else None)

    return batch


def mean(x: Rows, chunk: int = 4096) -> np.ndarray:
    """The mean example, float32, of rows in memory or on disk."""
    parts = (x[i : i + chunk].astype(np.float64).sum(0) for i in range(0, len(x), chunk))
    return (sum(parts) / len(x)).astype(np.float32)


def in_memory(data: Splits, *, train: int, test: int, seed: int) -> Splits:
    """Splits on disk as arrays of at most ``train`` and ``test`` examples, drawn at random; arrays are left alone."""

    def some(x: Rows, y: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(x, np.ndarray):
            return x, y
        rows = np.sort(np.random.default_rng(seed).permutation(len(x))[:count])
        return x[rows], y[rows]

    return Splits(*some(data.train_x, data.train_y, train), *some(data.test_x, data.test_y, test), data.levels)


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


def _labels(y: Cond) -> np.ndarray:
    needed = "negatives='other_label' needs an integer leaf in y, the label"
    return transport.leaves_of(y, kind="integer", otherwise=needed)


def _equal(a: np.ndarray, b: np.ndarray, flip: bool) -> np.ndarray:
    """Whether examples are equal, row by row; with ``flip`` up to mirroring."""
    views = (a, a[:, :, ::-1]) if flip else (a,)
    return np.any([(view == b).reshape(len(a), -1).all(1) for view in views], 0)


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


def _check_pairs(x, couple, source) -> None:
    if source is not None and couple is not None:
        raise ValueError("source gives the pairs and couple would make others: give one of them")
    if source is not None and (source.shape != x.shape or not np.issubdtype(source.dtype, np.floating)):
        raise ValueError(f"source is {source.dtype} {source.shape}; it must be floating, {x.shape} as x: row by row")


def _check_negatives(x, negatives, label, flip) -> None:
    if negatives not in NEGATIVES:
        near = difflib.get_close_matches(str(negatives), NEGATIVES[1:], 1, 0.0)[0]
        raise ValueError(f"there are no negatives {negatives!r}; did you mean {near!r}? (there are {NEGATIVES})")
    if negatives == "any" and all(_equal(x[i : i + 1], x[:1], flip)[0] for i in range(len(x))):
        raise ValueError("negatives='any' needs two different examples, and all are equal; set negatives=None")
    if label is not None and (label == label[0]).all():
        raise ValueError("negatives='other_label' needs two labels, and there is one; set negatives='any'")
