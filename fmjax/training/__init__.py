"""The training step, the loop, and what they record."""

from fmjax.training import hooks, logs, pictures, sharding
from fmjax.training.hooks import average_samples, draw_samples, keep_best
from fmjax.training.logs import Diverged
from fmjax.training.loop import (
    Optimiser,
    Plan,
    Schedule,
    TrainingData,
    check_plan,
    initial_parameters,
    load_average,
    merge_parameters,
    train,
)
from fmjax.training.step import TARGETS, State, Step, init, make_step

__all__ = [
    "Diverged", "Optimiser", "Plan", "Schedule", "State", "Step", "TARGETS", "TrainingData", "average_samples",
    "check_plan", "draw_samples", "hooks", "init", "initial_parameters", "keep_best", "load_average", "logs",
    "make_step", "merge_parameters", "pictures", "sharding", "train",
]  # fmt: skip
