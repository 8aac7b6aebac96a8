"""Measures of samples: distances to data, to a teacher and to training examples, in float64 on the host."""

from fmjax.metrics import classifier, extractors
from fmjax.metrics.feature_references import frechet_infinity_to, frechet_to, inception_score_to, kid_to, mind_to
from fmjax.metrics.features import (
    Features,
    embed,
    fd_small,
    label_accuracy,
    quantise,
    random_features,
    small_classifier,
)
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
from fmjax.metrics.neighbour_references import coverage_to, density_to, memorised_to, precision_to, recall_to
from fmjax.metrics.neighbours import Memorisation, density_coverage, memorised, nearest_distance, precision_recall
from fmjax.metrics.references import (
    autocorrelation_to,
    c2st_to,
    channel_w2_to,
    energy_to,
    fd_random_to,
    fd_small_to,
    mmd_to,
    sliced_w2_to,
    w2_to,
)
from fmjax.metrics.resizing import resize
from fmjax.metrics.scores import (
    FeatureChange,
    bits_per_dimension,
    feature_change,
    frechet_infinity,
    inception_score,
    kid,
    mind,
    paired_error,
)
from fmjax.metrics.series import autocorrelation, autocorrelation_error, channel_w2
from fmjax.metrics.spectrum import low_fraction, radial
from fmjax.metrics.teacher_references import feature_change_to, paired_error_to, teacher_frechet_to
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
from fmjax.metrics.two_sample_test import TwoSampleTest, c2st

__all__ = [
    "DataLike", "ExamplesLike", "FeatureChange", "Features", "Memorisation", "Metric", "TwoSampleTest",
    "autocorrelation", "autocorrelation_error", "autocorrelation_to", "bits_per_dimension", "bootstrap_se", "c2st",
    "c2st_to", "channel_w2", "channel_w2_to", "checkerboard_floor", "checkerboard_kl", "checkerboard_mass",
    "checkerboard_outside", "classifier", "counts", "coverage_to", "defaults", "density_coverage", "density_to",
    "embed", "energy_distance", "energy_to", "extractors", "fd_random_to", "fd_small", "fd_small_to",
    "feature_change", "feature_change_to", "frechet", "frechet_distance", "frechet_infinity", "frechet_infinity_to",
    "frechet_to", "inception_score", "inception_score_to", "kid", "kid_to", "kl", "label_accuracy", "low_fraction",
    "mean_distance", "mean_kernel", "mean_se", "median_distance", "memorised", "memorised_to", "mind", "mind_to",
    "mmd", "mmd_to", "moments", "nearest_distance", "paired_error", "paired_error_to", "precision_recall",
    "precision_to", "quantise", "radial", "random_features", "recall_to", "resize", "sliced_w2", "sliced_w2_to",
    "small_classifier", "teacher_frechet_to", "trace_sqrt_features", "trace_sqrt_product", "w2_exact", "w2_to",
]  # fmt: skip
