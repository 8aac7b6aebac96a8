"""Closed forms of flows: exact fields of known distributions, and flows with a known error."""

from fmjax.oracles.blocks import block_variance, jko_scale
from fmjax.oracles.closed_forms import Oracle, average_velocity, coupled, finite, gaussian, mixture, ring
from fmjax.oracles.conditioned import linear_condition
from fmjax.oracles.geometry import kernel_mean, mean_shift, memorisation
from fmjax.oracles.heat_kernel import heat_kernel, reflected_diffusion, uniform_finite
from fmjax.oracles.mismatch import Mismatch, field, gradient, perturbed, pushed, scaled, shifted
from fmjax.oracles.rates import consistency_maps, sufficient_steps
from fmjax.oracles.token_table import TokenTable, kolmogorov_residual, token_flux, token_table

__all__ = [
    "Mismatch", "Oracle", "TokenTable", "average_velocity", "block_variance", "consistency_maps", "coupled",
    "field", "finite", "gaussian", "gradient", "heat_kernel", "jko_scale", "kernel_mean", "kolmogorov_residual",
    "linear_condition", "mean_shift", "memorisation", "mixture", "perturbed", "pushed", "reflected_diffusion",
    "ring", "scaled", "shifted", "sufficient_steps", "token_flux", "token_table", "uniform_finite",
]  # fmt: skip
