"""The training step, the loop, and what they record."""

from fmjax.training import hooks, logs, sharding
from fmjax.training.loop import Plan, given, grafted, initial, train
from fmjax.training.step import TARGETS, State, init, make_step

__all__ = [
    "Plan", "State", "TARGETS", "given", "grafted", "hooks", "init", "initial", "logs", "make_step", "sharding",
    "train",
]  # fmt: skip
