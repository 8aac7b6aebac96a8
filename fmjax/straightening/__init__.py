"""Reflow and half-straightening on segments of the time axis."""

from fmjax.straightening.models import (
    FULL,
    TEACHER,
    SegmentedModel,
    comparison_models,
    segment_measures,
    segment_velocities,
    segmented_step,
    segmented_velocity,
)
from fmjax.straightening.segments import (
    from_data,
    inserted,
    piecewise,
    segment_batches,
    segment_grid,
    segment_straightness,
    velocity_jump,
)

__all__ = [
    "FULL", "SegmentedModel", "TEACHER", "comparison_models", "from_data", "inserted", "piecewise",
    "segment_batches", "segment_grid", "segment_measures", "segment_straightness", "segment_velocities",
    "segmented_step", "segmented_velocity", "velocity_jump",
]  # fmt: skip
