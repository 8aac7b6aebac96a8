"""Closed forms of flows: exact fields of known distributions, and flows with a known error."""

from fmjax.oracles.closed_forms import Oracle, average_velocity, coupled, finite, gaussian, mixture, ring
from fmjax.oracles.conditioned import linear_condition
from fmjax.oracles.geometry import kernel_mean, mean_shift, memorisation
from fmjax.oracles.heat_kernel import heat_kernel, reflected_diffusion, uniform_finite
from fmjax.oracles.mismatch import Mismatch, field, gradient, perturbed, pushed, scaled, shifted

__all__ = [
    "Mismatch", "Oracle", "average_velocity", "coupled", "field", "finite", "gaussian", "gradient", "heat_kernel",
    "kernel_mean", "linear_condition", "mean_shift", "memorisation", "mixture", "perturbed", "pushed",
    "reflected_diffusion", "ring", "scaled", "shifted", "uniform_finite",
]  # fmt: skip
