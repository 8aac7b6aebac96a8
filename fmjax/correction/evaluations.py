"""Evaluate placements of corrections on tuning keys and report them on others; every evaluation is kept in a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from fmjax.keys import is_key
from fmjax.storage import files


class Placement(NamedTuple):
    """Where corrections are made, and how strongly; by default nowhere.

    Attributes:
        at: corrected steps, rising.
        alpha: size of the push at each of them.
        beta: standard deviation of the noise at each of them.
    """

    at: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    beta: tuple[float, ...] = ()

    def dense(self, n: int) -> tuple[Float[np.ndarray, " n1"], Float[np.ndarray, " n1"]]:
        """Return ``alpha`` and ``beta`` as arrays ``[n + 1]``, zero at the steps that are not corrected."""
        alpha, beta = np.zeros(n + 1, np.float32), np.zeros(n + 1, np.float32)
        alpha[list(self.at)], beta[list(self.at)] = self.alpha, self.beta
        return alpha, beta

    def put(self, step: int, alpha: float, beta: float) -> Placement:
        """Return this placement with another correction at ``step``, in place of an earlier one there."""
        steps = {i: (a, b) for i, a, b in zip(*self, strict=True)} | {step: (alpha, beta)}
        at = tuple(sorted(steps))
        return Placement(at, tuple(steps[i][0] for i in at), tuple(steps[i][1] for i in at))

    def times(self, factor: float) -> Placement:
        """Return this placement with all ``alpha`` multiplied by a factor."""
        return self._replace(alpha=tuple(factor * a for a in self.alpha))

    def moved(self, n: int, to: int) -> Placement:
        """Return the same times on a grid of ``to`` steps in place of ``n``: step ``i`` becomes ``i to / n``.

        Raises:
            ValueError: a time that is not a step of the other grid.
        """
        lost = [i for i in self.at if i * to % n]
        if lost:
            raise ValueError(f"to={to}: no step {lost[0]} of {n} there. Give a multiple of {n}, or other steps.")
        return self._replace(at=tuple(i * to // n for i in self.at))


class Trial(NamedTuple):
    """A placement and its value on the tuning keys.

    Attributes:
        placement: the corrections.
        value: mean over the tuning keys; smaller is better.
    """

    placement: Placement
    value: float


class Reported(NamedTuple):
    """A placement and its values on the reporting keys.

    Attributes:
        placement: the corrections.
        mean: mean over the runs.
        error: standard error of the mean.
        runs: value of each run.
    """

    placement: Placement
    mean: float
    error: float
    runs: tuple[float, ...]


class Evaluations:
    """Evaluations of placements, each made once: ``evaluations(placement)`` is the mean over the tuning keys.

    A value that is not finite counts as the worst.

    Args:
        evaluate: ``evaluate(placement, key)`` draws one run of samples and returns a distance or loss.
        tuning: typed keys ``[K]`` that the search minimises on.
        reporting: typed keys ``[R]``, at least three, none of them a tuning key.
        directory: folder of ``tuning.jsonl``, in which evaluations are kept and from which a search resumes.
        identity: plain JSON that says what is evaluated (digests, solver, steps, metric); a file with another
            identity is refused.

    Attributes:
        tuning: the tuning keys by name.
        reporting: the reporting keys by name.

    Raises:
        TypeError: anything but arrays of typed keys.
        ValueError: a key twice, fewer than three reporting keys, or a file of another identity.

    >>> keys = jax.random.split(jax.random.key(0), 5)
    >>> squares = Evaluations(lambda placement, key: sum(placement.alpha) ** 2, tuning=keys[:2], reporting=keys[2:])
    >>> squares(Placement((3,), (0.5,), (0.0,)))
    0.25
    """

    def __init__(
        self,
        evaluate: Callable[[Placement, Array], float],
        *,
        tuning: Array,
        reporting: Array,
        directory: str | os.PathLike | None = None,
        identity: dict[str, Any] | None = None,
    ):
        tuned, reported = _names("tuning", tuning), _names("reporting", reporting)
        both = set(tuned) & set(reported)
        if both:
            raise ValueError(
                f"reporting={min(both)}: {len(both)} keys are tuning keys too. Report on other keys, such as "
                "jax.random.split(jax.random.key(another_seed), 3)."
            )
        if len(reported) < 3:
            raise ValueError(f"reporting={len(reported)} keys: too few for a standard error. Give three or more.")
        self._evaluate, self._known, self._file = evaluate, {}, None
        self.tuning = dict(zip(tuned, tuning, strict=True))
        self.reporting = dict(zip(reported, reporting, strict=True))
        if directory is not None:
            self._open(Path(directory), json.loads(json.dumps(identity or {})))

    def _open(self, directory: Path, identity: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / "tuning.jsonl"
        files.truncate_jsonl(self._file, 0)  # a torn last line
        head, *known = files.read_jsonl(self._file, sealed=True) or [None]
        if head is None:
            files.append_jsonl(self._file, {"identity": identity}, sealed=True)
        elif head != {"identity": identity}:
            raise ValueError(f"identity={identity}: {self._file} has evaluations of {head}. Use another directory.")
        for row in known:
            self._known[Placement(*map(tuple, row["placement"])), row["key"]] = row["value"]

    def _value(self, placement: Placement, name: str, key: Array) -> float:
        if (placement, name) not in self._known:
            value = float(self._evaluate(placement, key))
            value = value if math.isfinite(value) else None  # JSON has no infinity
            self._known[placement, name] = value
            if self._file is not None:
                row = {"placement": placement, "key": name, "value": value}
                files.append_jsonl(self._file, row, sealed=True)
        value = self._known[placement, name]
        return math.inf if value is None else value

    def __call__(self, placement: Placement) -> float:
        """Return the mean over the tuning keys."""
        return float(np.mean([self._value(placement, name, key) for name, key in self.tuning.items()]))

    def best(self, placements: Iterable[Placement]) -> Trial:
        """Return the first trial of the smallest value."""
        return min((Trial(placement, self(placement)) for placement in placements), key=lambda trial: trial.value)

    def report(self, placement: Placement) -> Reported:
        """Return mean and standard error over the reporting keys."""
        runs = tuple(self._value(placement, name, key) for name, key in self.reporting.items())
        return Reported(placement, float(np.mean(runs)), float(np.std(runs, ddof=1) / len(runs) ** 0.5), runs)


def _names(argument: str, keys) -> list[str]:
    """Return a name of every key, made of its data."""
    if not is_key(keys) or keys.ndim != 1:
        raise TypeError(f"{argument}={type(keys).__name__}: not [K] typed keys. Give jax.random.split(key, 4).")
    data = np.asarray(jax.random.key_data(keys)).reshape(len(keys), -1)
    names = [f"{jax.random.key_impl(keys)}:" + "-".join(map(str, row)) for row in data]
    if len(set(names)) < len(names):
        raise ValueError(f"{argument}={next(k for k in names if names.count(k) > 1)}: a key twice. Give distinct keys.")
    return names
