"""Reflow and half-straightening on segments of the time axis."""

from fmjax.straightening.models import Model, measures, models, step, velocity
from fmjax.straightening.segments import batches, from_data, grid, inserted, jump, piecewise, straightness

__all__ = [
    "Model", "batches", "from_data", "grid", "inserted", "jump", "measures", "models", "piecewise", "step",
    "straightness", "velocity",
]  # fmt: skip
