"""Marginal correction: correctors, marginal data sets and the search for strengths."""

from fmjax.correction.batches import marginal_batches, marginal_pairs, operator_batches
from fmjax.correction.clamping import clamp, in_turn
from fmjax.correction.correctors import langevin, mala, marginal_matching, preset, restart
from fmjax.correction.diagnostics import dispersion_ratio, round_trip, straightness_defect
from fmjax.correction.directions import kernel_drift, score_of
from fmjax.correction.evaluations import Evaluations, Placement, Reported, Trial
from fmjax.correction.interpolated import Between, interpolate_marginals
from fmjax.correction.marginals import (
    Estimate,
    Marginals,
    build_marginals,
    draw_conditions,
    estimate_cost,
    read_marginals,
)
from fmjax.correction.refinements import corrected_step, flow_mala, second_flow, variance_descent
from fmjax.correction.search import (
    Choice,
    Space,
    choose,
    classifier_space,
    greedy,
    grid_search,
    influence,
    score_space,
    sensitivity,
    to_json,
    transfer,
    value_grid,
)
from fmjax.correction.sobolev import Push, fit_push, sobolev_drift

__all__ = [
    "Between", "Choice", "Estimate", "Evaluations", "Marginals", "Placement", "Push", "Reported", "Space",
    "Trial", "build_marginals", "choose", "clamp", "classifier_space", "corrected_step", "dispersion_ratio",
    "draw_conditions", "estimate_cost", "fit_push", "flow_mala", "greedy", "grid_search", "in_turn",
    "influence", "interpolate_marginals", "kernel_drift", "langevin", "mala", "marginal_batches",
    "marginal_matching", "marginal_pairs", "operator_batches", "preset", "read_marginals", "restart",
    "round_trip", "score_of", "score_space", "second_flow", "sensitivity", "sobolev_drift",
    "straightness_defect", "to_json", "transfer", "value_grid", "variance_descent",
]  # fmt: skip
