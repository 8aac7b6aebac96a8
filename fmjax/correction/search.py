"""Search where and how strongly to correct: on tuning keys by grid and greedy search, reported on other keys.

Independent of configs and models: ``evaluate(placement, key) -> float`` draws one run of samples with the key and
returns its distance or loss (smaller is better). The search minimises the mean over the tuning keys
(``Evaluations``); the result is measured on the reporting keys.

One compilation serves all strengths: let ``alpha`` and ``beta`` be traced arrays ``[N + 1]``, zero where nothing is
corrected (``Placement.dense``), and make schedules of them (``grids.per_step``):

    @jax.jit
    def draw(key, alpha, beta):
        schedule = functools.partial(grids.per_step, ts)
        fix = marginal_matching(h, alpha=schedule(alpha), beta=schedule(beta))
        return sampling.sample(step, x0(key), ts, key=key, corrector=fix, at=range(len(ts)))

    evaluate = lambda placement, key: distance(draw(key, *placement.dense(len(ts) - 1)))
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fmjax.correction.evaluations import Evaluations, Placement, Reported, Trial
from fmjax.storage import files

FACTORS = (0.9, 1.0, 1.1)  # the perturbation of alpha that the paper reports


class Space(NamedTuple):
    """The placements to search.

    Attributes:
        n: number of solver steps.
        steps: steps that may be corrected, among ``0 .. n``.
        alpha: values of ``alpha``.
        beta: values of ``beta``.
        last: values of ``alpha`` after the last step; ``None`` for the same.
    """

    n: int
    steps: tuple[int, ...]
    alpha: tuple[float, ...]
    beta: tuple[float, ...] = (0.0,)
    last: tuple[float, ...] | None = None

    def alphas(self, step: int) -> tuple[float, ...]:
        """Return the values of ``alpha`` at a step."""
        return self.last if step == self.n and self.last is not None else self.alpha


class Choice(NamedTuple):
    """The outcome of ``choose``; values are on the tuning keys except in ``plain`` and ``reported``.

    Attributes:
        influence: the best single correction of each step.
        path: the greedy search's best of each number of corrections, beginning with none.
        chosen: the best of both.
        sensitivity: value of ``chosen`` with all ``alpha`` multiplied by each of ``FACTORS``.
        plain: no correction, on the reporting keys.
        reported: ``chosen`` on the reporting keys.
    """

    influence: tuple[Trial, ...]
    path: tuple[Trial, ...]
    chosen: Trial
    sensitivity: dict[str, float]
    plain: Reported
    reported: Reported


def value_grid(low: float | int, high: float | int, step: float | int) -> tuple[float, ...]:
    """Return evenly spaced values, rounded to ten digits.

    Args:
        low: first value.
        high: last value.
        step: distance of two values.

    Returns:
        ``low, low + step, .. high``.

    Raises:
        ValueError: a step that is not positive, or ``high`` below ``low``.

    >>> value_grid(0, 0.3, 0.1)
    (0.0, 0.1, 0.2, 0.3)
    """
    if step <= 0 or high < low:
        raise ValueError(f"low={low}, high={high}, step={step}: no values. Give low <= high and a positive step.")
    return tuple(round(low + i * step, 10) for i in range(int((high - low) / step + 1.5)))


def score_space(n: int, *, sigma: float, steps: Iterable[int] | None = None) -> Space:
    """Return the search space of a score corrector, in displacement units.

    ``alpha`` is in [0, 1.5] by 0.05 and ``beta`` in [0, 2 sigma] by 0.01. The resolution is the paper's, the intervals
    are ours.

    Args:
        n: number of solver steps.
        sigma: noise level of the corrector.
        steps: steps that may be corrected; by default all of ``0 .. n``.

    Returns:
        The space.

    Raises:
        ValueError: steps outside ``0 .. n``.

    >>> score_space(2, sigma=0.01).beta
    (0.0, 0.01, 0.02)

    Source: OpenReview kRjLBXWn1T.
    """
    return _space(n, steps, value_grid(0, 1.5, 0.05), value_grid(0, 2 * sigma, 0.01))


def classifier_space(n: int, *, steps: Iterable[int] | None = None) -> Space:
    """Return the search space of a classifier corrector, without noise.

    ``alpha`` is in [0, 1.5] by 0.05, and in [0, 0.3] by 0.01 after the last step. The resolution is the paper's, the
    intervals are ours.

    Args:
        n: number of solver steps.
        steps: steps that may be corrected; by default all of ``0 .. n``.

    Returns:
        The space.

    Raises:
        ValueError: steps outside ``0 .. n``.

    >>> classifier_space(2).alphas(2)[:3]
    (0.0, 0.01, 0.02)

    Source: OpenReview kRjLBXWn1T.
    """
    return _space(n, steps, value_grid(0, 1.5, 0.05), (0.0,))._replace(last=value_grid(0, 0.3, 0.01))


def _space(n, steps, alpha, beta) -> Space:
    steps = tuple(range(n + 1)) if steps is None else tuple(sorted({int(i) for i in steps}))
    if not steps or steps[0] < 0 or steps[-1] > n:
        raise ValueError(f"steps={steps}: corrections are possible at 0 .. {n}. Give some of these.")
    return Space(n, steps, alpha, beta)


def grid_search(value: Evaluations, space: Space, at: Sequence[int]) -> Trial:
    """Return the best ``alpha`` and ``beta`` that all corrected steps have in common.

    Args:
        value: the evaluations.
        space: the values; the last step has another ``alpha`` where ``space.last`` is set.
        at: corrected steps.

    Returns:
        The best trial.

    >>> import jax
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> value = Evaluations(lambda p, key: (p.alpha[0] - 0.5) ** 2, tuning=keys[:1], reporting=keys[1:])
    >>> grid_search(value, Space(4, (4,), (0.0, 0.5, 1.0)), (4,)).placement
    Placement(at=(4,), alpha=(0.5,), beta=(0.0,))
    """
    ends = space.last if space.last is not None and space.n in at else (None,)

    def placement(alpha, beta, end):
        alphas = tuple(alpha if end is None or i != space.n else end for i in sorted(at))
        return Placement(tuple(sorted(at)), alphas, (beta,) * len(at))

    alphas = space.alpha if any(i != space.n for i in at) or space.last is None else (0.0,)
    return value.best(placement(alpha, beta, end) for alpha in alphas for beta in space.beta for end in ends)


def influence(value: Evaluations, space: Space) -> tuple[Trial, ...]:
    """Return the best single correction of every step.

    Args:
        value: the evaluations.
        space: steps and values.

    Returns:
        One trial per step of the space.

    >>> import jax
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> value = Evaluations(lambda p, key: p.at[0] - p.alpha[0], tuning=keys[:1], reporting=keys[1:])
    >>> [trial.value for trial in influence(value, Space(4, (2, 4), (0.0, 1.0)))]
    [1.0, 3.0]
    """
    return tuple(grid_search(value, space, (step,)) for step in space.steps)


def greedy(
    value: Evaluations, space: Space, *, most: int | None = None, first: tuple[Trial, ...] = ()
) -> tuple[Trial, ...]:
    """Return the best placement of every number of corrections, by a coordinate search over the steps.

    The last step ``n = N`` is corrected first where it is in the space, then the step that gains most: its ``alpha``
    and ``beta`` are optimised one after the other, starting from the best single correction. Then all ``alpha`` and
    ``beta`` are refitted in turn until none improves. The search ends after ``most`` corrections, or where no step
    gains.

    Args:
        value: the evaluations.
        space: steps and values.
        most: largest number of corrections; by default the number of steps.
        first: the best single corrections, where ``influence`` has run already.

    Returns:
        One trial per number of corrections, beginning with none.

    >>> import jax
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> value = Evaluations(lambda p, key: -sum(p.alpha), tuning=keys[:1], reporting=keys[1:])
    >>> [trial.value for trial in greedy(value, Space(4, (2, 4), (0.0, 1.0)))]
    [0.0, -1.0, -2.0]
    """
    single = {trial.placement.at[0]: trial.placement for trial in first or influence(value, space)}
    path = [Trial(Placement(), value(Placement()))]
    most, end_first = len(space.steps) if most is None else most, space.n in space.steps
    while len(path) <= most:
        now = path[-1].placement
        free = [space.n] if end_first else [step for step in space.steps if step not in now.at]
        if not free:
            break
        trials = (_line(value, space, now.put(i, single[i].alpha[0], single[i].beta[0]), i) for i in free)
        trial = _refit(value, space, min(trials, key=lambda trial: trial.value))
        if trial.value < path[-1].value:
            path.append(trial)
        elif not end_first:
            break
        end_first = False
    return tuple(path)


def _line(value: Evaluations, space: Space, placement: Placement, step: int) -> Trial:
    """Return the best alpha of a step with its beta, then the best beta with that alpha."""
    at = placement.at.index(step)
    trial = value.best(placement.put(step, alpha, placement.beta[at]) for alpha in space.alphas(step))
    return value.best(trial.placement.put(step, trial.placement.alpha[at], beta) for beta in space.beta)


def _refit(value: Evaluations, space: Space, trial: Trial) -> Trial:
    """Optimise each step in turn until a round improves nothing."""
    while True:
        before = trial.value
        for step in trial.placement.at:
            better = _line(value, space, trial.placement, step)
            trial = better if better.value < trial.value else trial
        if not trial.value < before:
            return trial


def sensitivity(value: Evaluations, placement: Placement, factors: Sequence[float] = FACTORS) -> dict[str, float]:
    """Return the value with all ``alpha`` multiplied by each factor.

    Args:
        value: the evaluations.
        placement: the corrections.
        factors: the factors.

    Returns:
        The value by factor, as text.

    >>> import jax
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> value = Evaluations(lambda p, key: p.alpha[0], tuning=keys[:1], reporting=keys[1:])
    >>> sensitivity(value, Placement((1,), (2.0,), (0.0,)), (0.5, 1.0))
    {'0.5': 1.0, '1': 2.0}
    """
    return {f"{factor:g}": value(placement.times(factor)) for factor in factors}


def transfer(
    value: Evaluations, placement: Placement, n: int, to: int, *, factors: Sequence[float] | None = None
) -> Trial:
    """Transfer a placement to a grid of another number of steps: ``alpha' = c alpha`` at the same times.

    Args:
        value: the evaluations, of placements on ``to`` steps.
        placement: the corrections, on ``n`` steps.
        n: number of steps of ``placement``.
        to: number of steps of the other grid.
        factors: values of ``c``; by default 0.05 to 1.5 by 0.05.

    Returns:
        The best trial.

    Raises:
        ValueError: a time that is not a step of the other grid.

    >>> import jax
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> value = Evaluations(lambda p, key: abs(p.alpha[0] - 0.5), tuning=keys[:1], reporting=keys[1:])
    >>> transfer(value, Placement((1,), (1.0,), (0.0,)), 5, 10, factors=(0.5, 1.0)).placement
    Placement(at=(2,), alpha=(0.5,), beta=(0.0,))
    """
    moved = placement.moved(n, to)
    return value.best(moved.times(c) for c in (value_grid(0.05, 1.5, 0.05) if factors is None else factors))


def choose(
    value: Evaluations, space: Space, *, most: int | None = None, record: str | os.PathLike | None = None
) -> Choice:
    """Choose the corrections: single steps, greedy search, then the report of the best and of none.

    The greedy search begins at the last step and may end worse than a single correction elsewhere; the best of both is
    chosen.

    Args:
        value: the evaluations.
        space: steps and values.
        most: largest number of corrections.
        record: JSON file for the choice, with the space and both sets of keys.

    Returns:
        The choice.

    >>> import jax
    >>> keys = jax.random.split(jax.random.key(0), 4)
    >>> value = Evaluations(lambda p, key: 1 - sum(p.alpha), tuning=keys[:1], reporting=keys[1:])
    >>> choice = choose(value, Space(1, (0, 1), (0.0, 0.5)))
    >>> choice.chosen.placement.at, choice.plain.mean, choice.reported.mean
    ((0, 1), 1.0, 0.0)
    """
    single = influence(value, space)
    path = greedy(value, space, most=most, first=single)
    chosen = min((*path[::-1], *single), key=lambda trial: trial.value)
    factors = sensitivity(value, chosen.placement)
    choice = Choice(single, path, chosen, factors, value.report(Placement()), value.report(chosen.placement))
    if record is not None:
        keys = {"tuning": list(value.tuning), "reporting": list(value.reporting)}
        files.write_json(record, {"space": to_json(space), "keys": keys, **to_json(choice)})
    return choice


def to_json(record: Any) -> Any:
    """Return named tuples as dictionaries, at every depth, and ``None`` for numbers that are not finite.

    Args:
        record: named tuples, tuples, dictionaries, numbers and text.

    Returns:
        The same content in strict JSON.

    >>> to_json(Placement((1,), (0.5,), (math.inf,)))
    {'at': [1], 'alpha': [0.5], 'beta': [None]}
    """
    if hasattr(record, "_asdict"):
        record = record._asdict()
    if isinstance(record, dict):
        return {name: to_json(value) for name, value in record.items()}
    if isinstance(record, tuple):
        return [to_json(value) for value in record]
    return None if isinstance(record, float) and not math.isfinite(record) else record
