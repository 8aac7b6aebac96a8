"""Closed forms of flows: exact fields of known distributions, and flows with a known error."""

from fmjax.oracles.closed_forms import Oracle, average_velocity, coupled, finite, gaussian, mixture, ring
from fmjax.oracles.mismatch import Mismatch, field, gradient, perturbed, pushed, scaled, shifted

__all__ = [
    "Mismatch", "Oracle", "average_velocity", "coupled", "field", "finite", "gaussian", "gradient", "mixture",
    "perturbed", "pushed", "ring", "scaled", "shifted",
]  # fmt: skip
