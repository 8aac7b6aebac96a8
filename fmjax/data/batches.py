"""The input pipeline: a batch is a pure function of the step, so that a resumed run sees the same batches."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np

from fmjax import transport
from fmjax.checks import Positive, check_hints, nearest
from fmjax.couplings import Coupling
from fmjax.data.dataset import Dataset, Examples, Rows, check_conditions
from fmjax.keys import check_seed, generator
from fmjax.sources import Source
from fmjax.types import Batch, Cond

Value = TypeVar("Value")

NEGATIVES = (None, "any", "other_label")

_EPOCH, _FLIP, _PAIR, _NEGATIVE = range(4)


def batches(
    x: Rows,
    cond: Cond = None,
    *,
    batch_size: Positive,
    seed: int,
    couple: Coupling | None = None,
    source: Source | np.ndarray | None = None,
    negatives: str | None = None,
    flip: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> Callable[[int], Batch]:
    """Return the batches of a set of examples as a function of the step.

    The steps read an endless sequence of epochs; an epoch is a permutation of all examples that ``(seed, epoch)``
    determines. A batch may contain the end of one epoch and the start of the next. Therefore ``n`` consecutive examples
    from the start of an epoch are all examples, each once, for every batch size.

    Args:
        x: examples ``[n, ...]``, floating, in memory or on disk.
        cond: conditions, a pytree of arrays ``[n, ...]``: integer labels, floats, or several of them.
        batch_size: the number of examples in the global batch, 1..n and a multiple of ``process_count``.
        seed: the seed of permutations, mirror images, noise and negatives, not negative.
        couple: a coupling. ``x0`` is drawn for the global batch and paired before this process takes its rows, so that
            the numbers do not depend on ``process_count``. Without a coupling and a source ``Batch.x0`` is ``None``.
        source: a ``Source`` in place of N(0, I): ``Batch.x0`` is drawn from the seed, the step and the row of the
            global batch. Or an array ``[n, ...]``, fixed pairs in place of a coupling: ``Batch.x0`` is the source of
            the same row. For reflow (arXiv 2209.03003) ``x`` holds the samples of a flow and ``source`` their noise.
        negatives: ``Batch.negative`` holds another example for each row, for contrastive losses (arXiv 2506.05350).
            ``"any"``: uniform over the examples that differ from the row's ``x1``; ``"other_label"``: uniform over the
            examples with other labels, the integer leaves of ``cond``.
        flip: whether half of the images ``[n, H, W, C]`` are mirrored left to right. A fixed pair is mirrored as one, a
            negative independently.
        process_index: this process receives the rows ``[i B / P, (i + 1) B / P)`` of the global batch, where ``i`` is
            ``process_index``, ``B`` is ``batch_size`` and ``P`` is ``process_count``.
        process_count: the number of processes.

    Returns:
        A function ``batch(step)`` whose result has ``batch_size / process_count`` rows, in numpy arrays.

    Raises:
        ValueError: for a size, seed or step out of range, examples that are not floating, conditions of another length,
            ``flip`` of anything but images, a ``source`` of another shape, pairs beside ``couple``, and negatives that
            do not exist.

    >>> import numpy as np
    >>> x, labels = np.eye(4, dtype=np.float32), np.arange(4)
    >>> batch = batches(x, labels, batch_size=2, seed=0)(7)
    >>> batch.x1.shape, bool((batch.x1 == x[batch.cond]).all())
    ((2, 4), True)
    """
    cond = jax.tree.map(np.asarray, cond)
    n = len(x)
    _check(x, cond, batch_size, seed, flip, process_index, process_count)
    pairs, drawn = (None, source) if isinstance(source, Source) else (source, None)
    _check_pairs(x, couple, pairs)
    if drawn:
        drawn.check_shape(x.shape[1:])
    label = _labels(cond) if negatives == "other_label" else None
    _check_negatives(x, negatives, label, flip)
    count = batch_size // process_count
    mine = slice(process_index * count, (process_index + 1) * count)

    @functools.lru_cache(maxsize=2)  # a batch touches two epochs at most
    def order(epoch: int) -> np.ndarray:
        return generator(seed, _EPOCH, epoch).permutation(n)

    def batch(step: int) -> Batch:
        if step < 0:
            raise ValueError(f"step={step}: steps are counted from 0. Give 0 or more.")
        epoch, first = divmod(int(step) * batch_size, n)
        rows = order(epoch)[first : first + batch_size]
        if len(rows) < batch_size:
            rows = np.concatenate([rows, order(epoch + 1)[: batch_size - len(rows)]])
        mirrored = generator(seed, _FLIP, step).random(batch_size) < 0.5 if flip else None
        if couple is None and negatives is None:  # no example needs another: gather this process's rows only
            rows, mirrored = rows[mine], mirrored[mine] if flip else None
        x0 = None if pairs is None else _take(pairs, rows, mirrored)
        if drawn:
            first = mine.start if len(rows) == count else 0  # this process's rows, or the whole batch
            x0 = drawn.rows(seed, step, first + np.arange(len(rows)), x.shape[1:]).astype(x.dtype, copy=False)
        out = Batch(_take(x, rows, mirrored), x0, _rows(cond, rows))
        if couple is not None:
            rng = generator(seed, _PAIR, step)
            x0 = _noise(rng, out.x1) if drawn is None else out.x0
            x0, x1, kept = couple(rng, x0, out.x1, out.cond)
            out = Batch(x1, x0, kept)
        if negatives is not None:
            out = out._replace(negative=negative(generator(seed, _NEGATIVE, step), out))
        return out if len(rows) == count else _rows(out, mine)

    def negative(rng: np.random.Generator, out: Batch) -> np.ndarray:
        same_label = lambda rows: (label[rows] == _labels(out.cond)).all(1)
        excluded = same_label if label is not None else lambda rows: _equal(x[rows], out.x1, flip)
        rows = rng.integers(n, size=batch_size)
        while len(again := np.flatnonzero(excluded(rows))):
            rows[again] = rng.integers(n, size=len(again))
        return _take(x, rows, rng.random(batch_size) < 0.5 if flip else None)

    return batch


def mean(x: Rows, chunk: int = 4096) -> np.ndarray:
    """Return the mean example, of rows in memory or on disk.

    Args:
        x: examples ``[n, ...]``.
        chunk: the number of rows that are read at a time.

    Returns:
        The mean ``[...]`` in float32, accumulated in float64.

    >>> mean(np.array([[0.0, 1.0], [1.0, 3.0]], np.float32)).tolist()
    [0.5, 2.0]
    """
    parts = (x[i : i + chunk].astype(np.float64).sum(0) for i in range(0, len(x), chunk))
    return (sum(parts) / len(x)).astype(np.float32)


def in_memory(data: Dataset, *, train: int, validation: int, test: int, seed: int) -> Dataset:
    """Return a data set in memory: random examples of the splits that are on disk, and all others unchanged.

    Args:
        data: a data set.
        train: the largest number of training examples to read.
        validation: the largest number of validation examples to read.
        test: the largest number of test examples to read.
        seed: the seed of the choice.

    Returns:
        A data set whose splits are arrays. Splits that are arrays already are returned whole.

    >>> from fmjax.data import digits
    >>> data = digits()
    >>> in_memory(data, train=10, validation=10, test=10, seed=0).train.x is data.train.x
    True
    """

    check_seed(seed)

    def some(examples: Examples, count: int) -> Examples:
        if isinstance(examples.x, np.ndarray):
            return examples
        rows = np.sort(generator(seed).permutation(examples.count)[:count])
        return Examples(examples.x[rows], _rows(examples.cond, rows))

    return data._replace(
        train=some(data.train, train), validation=some(data.validation, validation), test=some(data.test, test)
    )


def prefetch(f: Callable[[int], Value], start: int, stop: int, *, depth: int = 2) -> Iterator[Value]:
    """Yield ``f(start), ..., f(stop - 1)`` in order, computed ahead in one background thread.

    Closing the iterator waits for the running call and ends the thread.

    Args:
        f: a function of the step.
        start: the first step.
        stop: the step after the last.
        depth: the number of calls that may run ahead, at least 1.

    Yields:
        The values in order. An exception of ``f(step)`` is raised where its value was due.

    Raises:
        ValueError: for ``depth < 1``, when ``prefetch`` is called.

    >>> list(prefetch(lambda step: step**2, 0, 4))
    [0, 1, 4, 9]
    """
    if depth < 1:
        raise ValueError(f"depth={depth}: no call could run ahead. Give 1 or more.")

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


def _labels(cond: Cond) -> np.ndarray:
    message = "negatives='other_label': cond has no integer leaf, the label"
    return transport.leaves_of(cond, kind="integer", otherwise=message)


def _equal(a: np.ndarray, b: np.ndarray, flip: bool) -> np.ndarray:
    """Return which examples are equal, row by row; with ``flip`` up to mirroring."""
    views = (a, a[:, :, ::-1]) if flip else (a,)
    return np.any([(view == b).reshape(len(a), -1).all(1) for view in views], 0)


def _check(x, cond, batch_size, seed, flip, process_index, process_count) -> None:
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"x={x.dtype}: examples must be floating. Convert them; scale uint8 images by x / 127.5 - 1.")
    check_conditions("cond", cond, len(x))
    check_hints(batches, {"batch_size": batch_size})
    if batch_size > len(x):
        raise ValueError(f"batch_size={batch_size}: there are {len(x)} examples. Give a number in 1..{len(x)}.")
    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index}: there are process_count={process_count} processes. Count from 0."
        )
    if batch_size % process_count:
        near = batch_size - batch_size % process_count or process_count
        raise ValueError(f"batch_size={batch_size}: it is not divisible by {process_count} processes. Use {near}.")
    if flip and x.ndim != 4:
        raise ValueError(f"flip=True: it mirrors images [n, H, W, C], and x has shape {x.shape}. Set flip=False.")
    if seed < 0:
        raise ValueError(f"seed={seed}: a seed is not negative. Give 0 or more.")


def _check_pairs(x, couple, source) -> None:
    if source is not None and couple is not None:
        raise ValueError(f"source={source.dtype} {source.shape}: it fixes the pairs that couple would draw. Give one.")
    if source is not None and (source.shape != x.shape or not np.issubdtype(source.dtype, np.floating)):
        raise ValueError(f"source={source.dtype} {source.shape}: it has a floating row for each row of x, {x.shape}.")


def _check_negatives(x, negatives, label, flip) -> None:
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives={negatives!r}: there are {NEGATIVES}{nearest(negatives, NEGATIVES[1:])}")
    if negatives == "any" and all(_equal(x[i : i + 1], x[:1], flip)[0] for i in range(len(x))):
        raise ValueError("negatives='any': all examples are equal. Set negatives=None.")
    if label is not None and (label == label[0]).all():
        raise ValueError("negatives='other_label': all labels are equal. Set negatives='any'.")
