"""What a report shows, and the check that the contents can be shown."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fmjax.experiments import examples
from fmjax.experiments.figures import REFERENCE, Row
from fmjax.experiments.spending import Spent, TrainingTime
from fmjax.metrics import FeatureChange
from fmjax.storage import images

VERDICTS = ("helps", "no difference seen", "harms")
CORRECTIONS = (
    "Do corrections help?",
    "Each corrected sampler is compared with the same sampler without the correction. A correction that adds noise is "
    "compared with a control: the same noise without the corrector. Corrections cost network evaluations, so that both "
    "NFE are shown.",
    "Corrections and noise controls",
)


class Verdict(NamedTuple):
    """The comparison of a corrected sampler with the same sampler without the correction.

    Attributes:
        name: the corrected sampler.
        baseline: the sampler without the correction.
        metric: the distance.
        difference: mean over seeds of the distance with the correction minus the distance without.
        se: standard error of ``difference``.
        verdict: one of ``VERDICTS``; a correction helps if the distance falls.
    """

    name: str
    baseline: str
    metric: str
    difference: float
    se: float
    verdict: str


class Contents(NamedTuple):
    """The contents of a report; an empty part is left out of the page.

    Attributes:
        title: the title.
        summary: sentences that are shown first.
        rows: the rows of the table.
        verdicts: the verdicts on corrections.
        grids: examples by caption: images ``[n, H, W, C]`` in [-1, 1], points ``[n, 2]``, series or vectors.
        trajectories: trajectories by caption: ``[T, n, H, W, C]`` (one example per row, time to the right) or
            ``[T, n, 2]`` (lines).
        curves: (step, loss) by stage.
        gaps: (``t_n``, distance of ``p_n`` to ``q_n``, standard error or 0) by name of the line.
        facts: text by name of the fact; long text is folded.
        notes: sentences that are shown last.
        influence: (``t_n``, distance, standard error or 0) by name of the line, for samples that are corrected only at
            ``t_n``.
        changes: how far corrections move samples, by name of the corrected sampler.
        advice: sentences on the sampler to use first, above everything else.
        first: captions of the ``grids`` that are shown first; by default test data and the best sampler.
        choices: sentences on the correction of each sampler.
        question: heading and explanation of the section of verdicts, and what lowers or raises a distance.
        differences: pairs of captions of ``grids`` whose samples start from the same noise and are subtracted.
        neighbours: samples ``[n, ...]``, the nearest training example of each, and a remark, by caption.
        marginals: times ``[T]``, forward ``[n, T, ...]`` and backward ``[m, T, ...]`` marginals, by caption.
        costs: cost by name of the row.
        trainings: the cost of each training.
        command: the command that reproduces the run.
        config: the config as JSON, which the page offers as a file.
    """

    title: str
    summary: list[str]
    rows: list[Row]
    verdicts: list[Verdict]
    grids: dict[str, np.ndarray]
    trajectories: dict[str, np.ndarray]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    gaps: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    facts: dict[str, str]
    notes: list[str]
    influence: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    changes: dict[str, FeatureChange] = {}
    advice: Sequence[str] = ()
    first: Sequence[str] = ()
    choices: Sequence[str] = ()
    question: tuple[str, str, str] = CORRECTIONS
    differences: Sequence[tuple[str, str]] = ()
    neighbours: dict[str, tuple[np.ndarray, np.ndarray, str]] = {}
    marginals: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    costs: dict[str, Spent] = {}
    trainings: Sequence[TrainingTime] = ()
    command: str = ""
    config: str = ""


def check_contents(contents: Contents) -> None:
    """Refuse contents that cannot be shown; nothing is drawn.

    Args:
        contents: what the report shows.

    Raises:
        ValueError: arrays of the wrong shape, images that are not finite, a verdict on a row that does not exist, or a
            verdict against the sign of its difference.
    """
    rows: dict[str, Row] = {}
    for row in contents.rows:
        if row.name in rows:
            raise ValueError(f"two rows are named {row.name!r}; verdicts refer to rows by name, so make names differ")
        if row.corrections < 0 or row.nfe < (row.family != REFERENCE):
            raise ValueError(
                f"row {row.name!r} has nfe={row.nfe} and corrections={row.corrections}; a sampler needs nfe >= 1 and "
                f"corrections >= 0, and only family {REFERENCE!r} has nfe=0"
            )
        for metric, (_, se) in row.distances.items():
            if se < 0:
                raise ValueError(
                    f"row {row.name!r}, {metric}: the standard error {se} is negative; give 0, more, or nan"
                )
        rows[row.name] = row
    for v in contents.verdicts:
        _check_verdict(v, rows)
    for name in contents.costs:
        if name not in rows:
            raise ValueError(f"a cost names {name!r}, which is not in rows")
    for name in [*contents.first, *(name for pair in contents.differences for name in pair)]:
        if name not in contents.grids:
            raise ValueError(f"a difference or the first look names {name!r}, which is not in grids")
    for caption, x in contents.grids.items():
        if np.ndim(x) == 4:
            images.check_pictures(f"grid {caption!r}", np.asarray(x), ndim=4)
        else:
            examples.check_rows(f"grid {caption!r}", np.asarray(x))
    for caption, x in contents.trajectories.items():
        if np.ndim(x) == 3:
            examples.check_points(f"trajectory {caption!r}", np.asarray(x), "[T, n, 2]")
        else:
            images.check_pictures(f"trajectory {caption!r}", np.asarray(x), ndim=5)
    for name, curve in contents.curves.items():
        _check_lines(f"curve {name!r}", curve, "(step, loss)")
    for name, gap in (contents.gaps | contents.influence).items():
        _check_lines(f"gap {name!r}", gap, "(t_n, distance, se)")
        if (np.asarray(gap[2]) < 0).any():
            raise ValueError(f"gap {name!r} has a negative standard error; give zeros for an unknown error")


def _check_verdict(v: Verdict, rows: dict[str, Row]) -> None:
    if v.verdict not in VERDICTS:
        raise ValueError(f"verdict {v.verdict!r} of {v.name!r} must be one of {', '.join(VERDICTS)}")
    for name in (v.name, v.baseline):
        if name not in rows:
            near = "".join(f"; nearest: {row!r}" for row in difflib.get_close_matches(name, rows, 1, 0))
            raise ValueError(f"a verdict names {name!r}, which is not in rows{near}")
        if v.metric not in rows[name].distances:
            known = ", ".join(rows[name].distances)
            raise ValueError(f"a verdict on {v.metric!r} needs it in row {name!r}, which has {known or 'none'}")
    if not {"helps": v.difference < 0, "harms": v.difference > 0}.get(v.verdict, True):
        raise ValueError(
            f"{v.name!r} {v.verdict} by a difference of {v.difference:g} in {v.metric}; "
            "differences are the distance with corrections minus the one without, so helping ones are negative"
        )


def _check_lines(name: str, arrays: Sequence, fields: str) -> None:
    shapes = [np.shape(a) for a in arrays]
    if len(shapes) != fields.count(",") + 1 or len(set(shapes)) != 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(f"{name} has shapes {shapes}; give {fields}, each [n] of one length n >= 1")
