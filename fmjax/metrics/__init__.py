"""Distances between sample sets, computed in float64 on the host."""

from fmjax.metrics import classifier
from fmjax.metrics.features import Features, fd_small, label_accuracy, quantise, random_features, small_classifier
from fmjax.metrics.frechet import frechet, frechet_distance, moments, trace_sqrt_features, trace_sqrt_product
from fmjax.metrics.histogram import (
    checkerboard_floor,
    checkerboard_kl,
    checkerboard_mass,
    checkerboard_outside,
    counts,
    kl,
)
from fmjax.metrics.metric import DataLike, ExamplesLike, Metric, defaults
from fmjax.metrics.neighbours import precision_recall
from fmjax.metrics.references import energy_to, fd_random_to, fd_small_to, mmd_to, sliced_w2_to
from fmjax.metrics.spectrum import low_fraction, radial
from fmjax.metrics.two_sample import (
    bootstrap_se,
    energy_distance,
    mean_distance,
    mean_kernel,
    mean_se,
    median_distance,
    mmd,
    sliced_w2,
    w2_exact,
)

__all__ = [
    "DataLike", "ExamplesLike", "Features", "Metric", "bootstrap_se", "checkerboard_floor", "checkerboard_kl",
    "checkerboard_mass", "checkerboard_outside", "classifier", "counts", "defaults", "energy_distance", "energy_to",
    "fd_random_to", "fd_small", "fd_small_to", "frechet", "frechet_distance", "kl", "label_accuracy",
    "low_fraction", "mean_distance", "mean_kernel", "mean_se", "median_distance", "mmd", "mmd_to", "moments",
    "precision_recall", "quantise", "radial", "random_features", "sliced_w2", "sliced_w2_to", "small_classifier",
    "trace_sqrt_features", "trace_sqrt_product", "w2_exact",
]  # fmt: skip
