"""Reflow and half-straightening on segments of the time axis."""

from fmjax.straightening.blocks import block_bounds, block_step, fit_blocks, ornstein_uhlenbeck, push_block
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
    "FULL", "SegmentedModel", "TEACHER", "block_bounds", "block_step", "comparison_models", "fit_blocks",
    "from_data", "inserted", "ornstein_uhlenbeck", "piecewise", "push_block", "segment_batches", "segment_grid",
    "segment_measures", "segment_straightness", "segment_velocities", "segmented_step", "segmented_velocity",
    "velocity_jump",
]  # fmt: skip
