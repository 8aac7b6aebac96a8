"""Marginal correction: correctors, marginal data sets and the search for strengths."""

from fmjax.correction import trajectories
from fmjax.correction.correctors import (
    dispersion_ratio,
    kernel_drift,
    langevin,
    mala,
    marginal_matching,
    nfe,
    preset,
    restart,
    score_of,
)
from fmjax.correction.interpolated import Between, marginals
from fmjax.correction.marginals import (
    Estimate,
    Marginals,
    batches,
    build,
    estimate,
    pairs,
    read,
    round_trip,
    straightness_defect,
)
from fmjax.correction.search import (
    Choice,
    Evaluations,
    Reported,
    Space,
    Trial,
    choose,
    classifier_space,
    greedy,
    grid_search,
    influence,
    plain,
    score_space,
    sensitivity,
    transfer,
)

__all__ = [
    "Between", "Choice", "Estimate", "Evaluations", "Marginals", "Reported", "Space", "Trial", "batches", "build",
    "choose", "classifier_space", "dispersion_ratio", "estimate", "greedy", "grid_search", "influence",
    "kernel_drift", "langevin", "mala", "marginal_matching", "marginals", "nfe", "pairs", "plain", "preset", "read",
    "restart", "round_trip", "score_of", "score_space", "sensitivity", "straightness_defect", "trajectories",
    "transfer",
]  # fmt: skip
