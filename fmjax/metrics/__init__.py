"""Distances between sample sets, computed in float64 on the host."""

from fmjax.metrics import classifier
from fmjax.metrics.features import Features, fd_small, quantise, small_classifier
from fmjax.metrics.frechet import frechet, frechet_distance, moments, trace_sqrt_features, trace_sqrt_product
from fmjax.metrics.histogram import (
    checkerboard_floor,
    checkerboard_kl,
    checkerboard_mass,
    checkerboard_outside,
    counts,
    kl,
)
from fmjax.metrics.neighbours import precision_recall
from fmjax.metrics.spectrum import low_share, radial
from fmjax.metrics.two_sample import bootstrap_se, energy_distance, mean_distance, mean_se, sliced_w2, w2_exact

__all__ = [
    "Features", "bootstrap_se", "checkerboard_floor", "checkerboard_kl", "checkerboard_mass",
    "checkerboard_outside", "classifier", "counts", "energy_distance", "fd_small", "frechet", "frechet_distance",
    "kl", "low_share", "mean_distance", "mean_se", "moments", "precision_recall", "quantise", "radial", "sliced_w2",
    "small_classifier", "trace_sqrt_features", "trace_sqrt_product", "w2_exact",
]  # fmt: skip
