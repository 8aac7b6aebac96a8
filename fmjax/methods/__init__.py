"""Training objectives: one factory ``name(net, *, ...) -> Method`` a file.

Losses are means over the elements of an example and over the batch, where most papers sum over the elements: a gradient
clip of a paper must be rescaled.
"""

from fmjax.methods import attacks, common, views, weighting
from fmjax.methods.align_your_flow import align_your_flow
from fmjax.methods.alpha_flow import alpha_flow
from fmjax.methods.categorical_ratio_matching import categorical_ratio_matching
from fmjax.methods.classifier_corrector import classifier_corrector
from fmjax.methods.consistency import consistency
from fmjax.methods.consistency_trajectory import consistency_trajectory
from fmjax.methods.continuous_consistency import continuous_consistency
from fmjax.methods.contrastive import contrastive
from fmjax.methods.denoising import denoising
from fmjax.methods.discrete_flow_matching import discrete_flow_matching
from fmjax.methods.discriminator import discriminator
from fmjax.methods.edm import edm
from fmjax.methods.eulerian import eulerian
from fmjax.methods.flow_map_matching import flow_map_matching
from fmjax.methods.flow_matching import flow_matching
from fmjax.methods.improved_mean_flow import improved_mean_flow
from fmjax.methods.jko import jko
from fmjax.methods.lagrangian import lagrangian
from fmjax.methods.learned_coupling import learned_coupling
from fmjax.methods.mean_flow import mean_flow
from fmjax.methods.neural_operator import neural_operator
from fmjax.methods.progressive import progressive
from fmjax.methods.progressive_distillation import progressive_distillation
from fmjax.methods.residual import residual
from fmjax.methods.score_corrector import score_corrector
from fmjax.methods.self_corrected import self_corrected
from fmjax.methods.shortcut import shortcut
from fmjax.methods.soflow import soflow
from fmjax.methods.stochastic_interpolant import stochastic_interpolant
from fmjax.methods.straighten import straighten
from fmjax.methods.terminal_velocity_matching import terminal_velocity_matching
from fmjax.methods.trajectory_regression import trajectory_regression

__all__ = [
    "align_your_flow", "alpha_flow", "attacks", "categorical_ratio_matching", "classifier_corrector", "common",
    "consistency", "consistency_trajectory", "continuous_consistency", "contrastive", "denoising",
    "discrete_flow_matching", "discriminator", "edm", "eulerian", "flow_map_matching", "flow_matching",
    "improved_mean_flow", "jko", "lagrangian", "learned_coupling", "mean_flow", "neural_operator",
    "progressive", "progressive_distillation", "residual", "score_corrector", "self_corrected", "shortcut",
    "soflow", "stochastic_interpolant", "straighten", "terminal_velocity_matching", "trajectory_regression",
    "views", "weighting",
]  # fmt: skip
