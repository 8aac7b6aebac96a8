"""Choosing where and how strongly to correct: grid and greedy search on some seeds, the result reported on others.

Pure of configs and models: the caller gives ``evaluate(setting, key) -> float``, one run of samples drawn with that key
and its distance or loss, less being better. The mean over the tuning keys is what is minimised; what is reported is
measured on other keys. Every evaluation is kept in a file, so that a search that was killed goes on.

One compilation serves all strengths: let ``alpha`` and ``beta`` be traced arrays ``[N + 1]``, zero where nothing is
corrected (``Setting.dense``), and functions of time close over them (``times.per_step``):

    @jax.jit
    def draw(key, alpha, beta):
        over = functools.partial(times.per_step, ts)
        fix = correctors.marginal_matching(h, alpha=over(alpha), beta=over(beta))
        return samplers.sample(step, x0(key), ts, key=key, corrector=fix, at=range(len(ts)))

    evaluate = lambda setting, key: distance(draw(key, *setting.dense(len(ts) - 1)))
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from fmjax.keys import is_key
from fmjax.storage import files

FACTORS = (0.9, 1.0, 1.1)  # the perturbation of alpha that the paper reports


class Setting(NamedTuple):
    """Corrections at the steps ``at``, rising, each with its ``alpha`` and ``beta``; by default none at all."""

    at: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    beta: tuple[float, ...] = ()

    def dense(self, n: int) -> tuple[Float[np.ndarray, " n1"], Float[np.ndarray, " n1"]]:
        """``alpha`` and ``beta`` as arrays ``[n + 1]``, zero at the steps that are not corrected."""
        alpha, beta = np.zeros(n + 1, np.float32), np.zeros(n + 1, np.float32)
        alpha[list(self.at)], beta[list(self.at)] = self.alpha, self.beta
        return alpha, beta

    def put(self, step: int, alpha: float, beta: float) -> Setting:
        """This setting with ``step`` corrected so, whether it was before or not."""
        steps = {i: (a, b) for i, a, b in zip(*self, strict=True)} | {step: (alpha, beta)}
        at = tuple(sorted(steps))
        return Setting(at, tuple(steps[i][0] for i in at), tuple(steps[i][1] for i in at))

    def times(self, factor: float) -> Setting:
        """``alpha' = factor alpha``: sensitivity, or the transfer to another grid."""
        return self._replace(alpha=tuple(factor * a for a in self.alpha))

    def moved(self, n: int, to: int) -> Setting:
        """The same times on a grid of ``to`` steps instead of ``n``: step ``i`` is ``i to / n`` there.

        Raises ``ValueError`` where a time is no step of the other grid.
        """
        lost = [i for i in self.at if i * to % n]
        if lost:
            raise ValueError(f"step {lost[0]} of {n} is no step of {to}; choose a multiple of {n}, or other steps")
        return self._replace(at=tuple(i * to // n for i in self.at))


class Space(NamedTuple):
    """What to search: corrections at ``steps`` of ``0 .. n``; the grids of ``alpha``, and of ``beta``.

    ``last`` is the grid of ``alpha`` after the last step, ``None`` for the same.
    """

    n: int
    steps: tuple[int, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...] = (0.0,)
    last: tuple[float, ...] | None = None

    def alphas(self, step: int) -> tuple[float, ...]:
        """The grid of ``alpha`` at a step."""
        return self.last if step == self.n and self.last is not None else self.alpha


class Trial(NamedTuple):
    """A setting and its value on the tuning keys."""

    setting: Setting
    value: float


class Reported(NamedTuple):
    """A setting on the reporting keys: mean and standard error over runs, and the runs."""

    setting: Setting
    mean: float
    error: float
    runs: tuple[float, ...]


class Choice(NamedTuple):
    """The outcome of ``choose``; all but ``plain`` and ``reported`` are values on the tuning keys.

    ``influence`` holds each step's best single correction, ``path`` the greedy search's best of each size, beginning
    with none, ``sensitivity`` the value where all alphas are multiplied by each of ``FACTORS``.
    """

    influence: tuple[Trial, ...]
    path: tuple[Trial, ...]
    chosen: Trial
    sensitivity: dict[str, float]
    plain: Reported
    reported: Reported


def grid(low: float | int, high: float | int, step: float | int) -> tuple[float, ...]:
    """``low, low + step, .. high`` without the dust of floating point.

    >>> grid(0, 0.3, 0.1)
    (0.0, 0.1, 0.2, 0.3)
    """
    if step <= 0 or high < low:
        raise ValueError(f"a grid rises from low to high by a positive step, got {low}, {high}, {step}")
    return tuple(round(low + i * step, 10) for i in range(int((high - low) / step + 1.5)))


def score_space(n: int, *, sigma: float, steps: Iterable[int] | None = None) -> Space:
    """Score correctors, in displacement units: alpha in [0, 1.5] by 0.05, beta in [0, 2 sigma] by 0.01.

    The resolution is the paper's (OpenReview kRjLBXWn1T), the intervals are ours.
    """
    return _space(n, steps, grid(0, 1.5, 0.05), grid(0, 2 * sigma, 0.01))


def classifier_space(n: int, *, steps: Iterable[int] | None = None) -> Space:
    """Classifiers, no noise: alpha in [0, 1.5] by 0.05, and in [0, 0.3] by 0.01 after the last step."""
    return _space(n, steps, grid(0, 1.5, 0.05), (0.0,))._replace(last=grid(0, 0.3, 0.01))


def _space(n, steps, alpha, beta) -> Space:
    steps = tuple(range(n + 1)) if steps is None else tuple(sorted({int(i) for i in steps}))
    if not steps or steps[0] < 0 or steps[-1] > n:
        raise ValueError(f"steps={steps} must be some of 0 .. {n}: with {n} solver steps nothing else can be corrected")
    return Space(n, steps, alpha, beta)


class Evaluations:
    """``evaluate(setting, key)`` on tuning keys and, apart from them, on reporting keys; none is made twice.

    ``directory`` keeps the evaluations in ``tuning.jsonl``; they are taken up again where ``what`` (plain JSON that
    says what is evaluated: digests, solver, steps, metric) is the same. A value that is not finite is the worst.

    Raises ``TypeError`` for anything but arrays ``[K]`` of typed keys; ``ValueError`` for a key in both sets or twice
    in one, for fewer than three reporting keys, and for a directory that belongs to something else.
    """

    def __init__(
        self,
        evaluate: Callable[[Setting, Array], float],
        *,
        tuning: Array,
        reporting: Array,
        directory: str | os.PathLike | None = None,
        what: dict[str, Any] | None = None,
    ):
        ours, theirs = _names("tuning", tuning), _names("reporting", reporting)
        both = set(ours) & set(theirs)
        if both:
            raise ValueError(
                f"{len(both)} of the reporting keys are tuning keys too, first {min(both)}; report on keys that "
                "nothing was tuned on, such as jax.random.split(jax.random.key(another_seed), 3)"
            )
        if len(theirs) < 3:
            raise ValueError(f"{len(theirs)} reporting keys are too few for a standard error; give three or more")
        self._evaluate, self._known, self._file = evaluate, {}, None
        self.tuning = dict(zip(ours, tuning, strict=True))
        self.reporting = dict(zip(theirs, reporting, strict=True))
        if directory is not None:
            self._open(Path(directory), json.loads(json.dumps(what or {})))

    def _open(self, directory: Path, what: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / "tuning.jsonl"
        files.truncate_jsonl(self._file, 0)  # a torn last line
        head, *known = files.read_jsonl(self._file) or [None]
        if head is None:
            files.append_jsonl(self._file, {"what": what})
        elif head != {"what": what}:
            raise ValueError(f"{self._file} has evaluations of {head['what']}, not of {what}; choose another directory")
        for one in known:
            self._known[_setting(one["setting"]), one["key"]] = one["value"]

    def _one(self, setting: Setting, name: str, key: Array) -> float:
        if (setting, name) not in self._known:
            value = float(self._evaluate(setting, key))
            value = value if math.isfinite(value) else None  # JSON knows no infinity
            self._known[setting, name] = value
            if self._file is not None:
                files.append_jsonl(self._file, {"setting": setting, "key": name, "value": value})
        value = self._known[setting, name]
        return math.inf if value is None else value

    def __call__(self, setting: Setting) -> float:
        """The mean over the tuning keys."""
        return float(np.mean([self._one(setting, name, key) for name, key in self.tuning.items()]))

    def best(self, settings: Iterable[Setting]) -> Trial:
        """The first of the least."""
        return min((Trial(setting, self(setting)) for setting in settings), key=lambda trial: trial.value)

    def report(self, setting: Setting) -> Reported:
        """Mean and standard error over the reporting keys."""
        runs = tuple(self._one(setting, name, key) for name, key in self.reporting.items())
        return Reported(setting, float(np.mean(runs)), float(np.std(runs, ddof=1) / len(runs) ** 0.5), runs)


def grid_search(value: Evaluations, space: Space, at: Sequence[int]) -> Trial:
    """The best ``alpha`` and ``beta`` shared by all steps ``at``; the last has an ``alpha`` of its own grid, if any."""
    last = space.last if space.last is not None and space.n in at else (None,)

    def setting(alpha, beta, end):
        alphas = tuple(alpha if end is None or i != space.n else end for i in sorted(at))
        return Setting(tuple(sorted(at)), alphas, (beta,) * len(at))

    alphas = space.alpha if any(i != space.n for i in at) or space.last is None else (0.0,)
    return value.best(setting(alpha, beta, end) for alpha in alphas for beta in space.beta for end in last)


def influence(value: Evaluations, space: Space) -> tuple[Trial, ...]:
    """The best single correction of every step, over the whole grid of ``alpha`` and ``beta``."""
    return tuple(grid_search(value, space, (step,)) for step in space.steps)


def greedy(
    value: Evaluations, space: Space, *, most: int | None = None, first: tuple[Trial, ...] = ()
) -> tuple[Trial, ...]:
    """The best found of every number of corrections, beginning with none: coordinate search over the steps.

    The end ``n = N`` is corrected first where it is in the space, then the step that gains most (its alpha and beta
    sought one after the other from its best single ones, ``first``, found if not given); then all alphas and betas are
    refitted in turn until none improves. Ends after ``most`` steps, or where no step gains.
    """
    single = {trial.setting.at[0]: trial.setting for trial in first or influence(value, space)}
    found = [Trial(Setting(), value(Setting()))]
    most, end_first = len(space.steps) if most is None else most, space.n in space.steps
    while len(found) <= most:
        now = found[-1].setting
        free = [space.n] if end_first else [step for step in space.steps if step not in now.at]
        if not free:
            break
        tried = (_line(value, space, now.put(i, single[i].alpha[0], single[i].beta[0]), i) for i in free)
        trial = _refit(value, space, min(tried, key=lambda trial: trial.value))
        if trial.value < found[-1].value:
            found.append(trial)
        elif not end_first:
            break
        end_first = False
    return tuple(found)


def _line(value: Evaluations, space: Space, setting: Setting, step: int) -> Trial:
    """The best alpha of a step with its beta, then the best beta with that alpha."""
    at = setting.at.index(step)
    trial = value.best(setting.put(step, alpha, setting.beta[at]) for alpha in space.alphas(step))
    return value.best(trial.setting.put(step, trial.setting.alpha[at], beta) for beta in space.beta)


def _refit(value: Evaluations, space: Space, trial: Trial) -> Trial:
    """Each step in turn until a round improves nothing."""
    while True:
        before = trial.value
        for step in trial.setting.at:
            better = _line(value, space, trial.setting, step)
            trial = better if better.value < trial.value else trial
        if not trial.value < before:
            return trial


def sensitivity(value: Evaluations, setting: Setting, factors: Sequence[float] = FACTORS) -> dict[str, float]:
    """The value where all alphas are multiplied by each factor."""
    return {f"{factor:g}": value(setting.times(factor)) for factor in factors}


def transfer(value: Evaluations, setting: Setting, n: int, to: int, *, factors: Sequence[float] | None = None) -> Trial:
    """A setting of ``n`` steps at the same times of ``to``: ``alpha' = c alpha``, the best one ``c`` of ``factors``.

    ``value`` evaluates settings of ``to`` steps. By default ``c`` from 0.05 to 1.5 by 0.05.
    """
    moved = setting.moved(n, to)
    return value.best(moved.times(c) for c in (grid(0.05, 1.5, 0.05) if factors is None else factors))


def choose(
    value: Evaluations, space: Space, *, most: int | None = None, record: str | os.PathLike | None = None
) -> Choice:
    """Influence of the single steps, greedy search, sensitivity of the best of both, then that and none reported.

    The search begins at the end, and may do worse than a single step elsewhere. ``record`` is a
    JSON file for all of it, with the space and both sets of keys.
    """
    single = influence(value, space)
    path = greedy(value, space, most=most, first=single)
    chosen = min((*path[::-1], *single), key=lambda trial: trial.value)
    choice = Choice(
        single, path, chosen, sensitivity(value, chosen.setting), value.report(Setting()), value.report(chosen.setting)
    )
    if record is not None:
        keys = {"tuning": list(value.tuning), "reporting": list(value.reporting)}
        files.write_json(record, {"space": plain(space), "keys": keys, **plain(choice)})
    return choice


def plain(record: Any) -> Any:
    """Named tuples as dictionaries, all the way down, and ``None`` for numbers that are not finite: strict JSON."""
    if hasattr(record, "_asdict"):
        record = record._asdict()
    if isinstance(record, dict):
        return {name: plain(value) for name, value in record.items()}
    if isinstance(record, tuple):
        return [plain(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record


def _setting(fields) -> Setting:
    return Setting(*(tuple(values) for values in fields))


def _names(what: str, keys) -> list[str]:
    """The data of every key as text: what tells one key from another."""
    if not is_key(keys) or keys.ndim != 1:
        raise TypeError(f"{what} must be an array [K] of typed keys, such as jax.random.split(jax.random.key(0), 4)")
    data = np.asarray(jax.random.key_data(keys)).reshape(len(keys), -1)
    names = [f"{jax.random.key_impl(keys)}:" + "-".join(map(str, row)) for row in data]
    if len(set(names)) < len(names):
        raise ValueError(f"{what} has a key twice: {next(k for k in names if names.count(k) > 1)}")
    return names
