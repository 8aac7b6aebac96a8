"""What no metric takes: samples that would be cast, broadcast or averaged into a number that means nothing."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import checks, metrics
from fmjax.metrics import checking
from fmjax.metrics.features import Features
from fmjax.storage import images

pytestmark = pytest.mark.usefixtures("as_users_call")
RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(8, 2))
PICTURES = RNG.uniform(-1, 1, (6, 8, 8, 1))
PAIRS = {
    "sliced_w2": metrics.sliced_w2, "w2_exact": metrics.w2_exact, "energy_distance": metrics.energy_distance,
    "frechet": metrics.frechet, "trace_sqrt_features": metrics.trace_sqrt_features,
    "precision_recall": metrics.precision_recall, "mmd": lambda x, y: metrics.mmd(x, y, bandwidth=1.0),
}  # fmt: skip
SINGLE = {
    "moments": metrics.moments, "mean_distance": metrics.mean_distance, "median_distance": metrics.median_distance,
    "checkerboard_kl": metrics.checkerboard_kl, "checkerboard_outside": metrics.checkerboard_outside,
    "radial": lambda x: metrics.radial(x if np.ndim(x) < 2 else np.asarray(x)[:, :, None, None]),
    "bootstrap_se": lambda x: metrics.bootstrap_se(lambda s: float(np.mean(s)), x),
}  # fmt: skip


def with_value(value):
    x = POINTS.copy()
    x[3, 1] = value
    return x


BAD = {
    "nan": with_value(np.nan), "inf": with_value(-np.inf), "object": POINTS.astype(object), "complex": POINTS * 1j,
    "bytes": np.ones((8, 2), np.uint8), "integers": np.ones((8, 2), int), "booleans": POINTS > 0, "strings": ["a", "b"],
    "nothing": POINTS[:0], "a number": 1.0, "None": None,
}  # fmt: skip


def refused(function, *args, **options):
    """The message of a refusal; nothing is cast on the way."""
    with warnings.catch_warnings(), pytest.raises(ValueError, match=".") as error:
        warnings.simplefilter("error")
        function(*args, **options)
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", BAD)
def test_samples_that_would_be_cast_are_refused_by_every_metric(kind):
    for metric in PAIRS.values():
        refused(metric, BAD[kind], POINTS)
        refused(metric, POINTS, BAD[kind])
    for metric in SINGLE.values():
        refused(metric, BAD[kind])
    for logits in (metrics.classifier.bce, metrics.classifier.auc, metrics.classifier.accuracy):
        refused(logits, np.asarray(BAD[kind]).ravel() if np.ndim(BAD[kind]) else BAD[kind], POINTS[:, 0])


@pytest.mark.parametrize("shape", [(8, 1), (8, 3), (8, 2, 1), (8,), (1, 2)])
def test_samples_of_another_shape_are_refused_by_every_metric(shape):
    for metric in PAIRS.values():
        refused(metric, np.ones(shape), POINTS)
        refused(metric, POINTS, np.ones(shape))


@pytest.mark.parametrize(
    "change",
    [
        {"mu1": np.zeros(1)}, {"mu2": np.zeros((2, 1))}, {"mu1": 0.0}, {"s1": 1.0}, {"s1": np.ones(2)},
        {"s2": np.ones((2, 3))}, {"s2": np.eye(2) * np.nan}, {"mu1": np.array([0, np.inf])}, {"s1": -np.eye(2)},
        {"s1": np.array([[1.0, 2.0], [0.0, 1.0]])}, {"s2": np.eye(2) * 1j}, {"mu2": np.array(["a", "b"])},
        {"s1": np.eye(3)}, {"mu1": np.zeros(0), "mu2": np.zeros(0), "s1": np.zeros((0, 0)), "s2": np.zeros((0, 0))},
    ],
)  # fmt: skip
def test_a_frechet_distance_takes_means_and_covariances_only(change):
    arguments = {"mu1": np.zeros(2), "s1": np.eye(2), "mu2": np.ones(2), "s2": 4 * np.eye(2)}
    assert metrics.frechet_distance(**arguments) == pytest.approx(4.0)
    refused(metrics.frechet_distance, **arguments | change)
    matrices = {k: v for k, v in (arguments | change).items() if k in ("s1", "s2")}
    if set(change) & {"s1", "s2"}:
        refused(metrics.trace_sqrt_product, **matrices)


def test_options_out_of_range_are_refused_by_their_name():
    calls = {
        "directions": lambda v: metrics.sliced_w2(POINTS, POINTS, directions=v),
        "block": lambda v: metrics.energy_distance(POINTS, POINTS, block=v),
        "count": lambda v: metrics.median_distance(POINTS, count=v),
        "resamples": lambda v: metrics.bootstrap_se(lambda s: float(s.mean()), POINTS, resamples=v),
        "k": lambda v: metrics.precision_recall(POINTS, POINTS, k=v),
        "bins": lambda v: metrics.counts(POINTS, bins=v),
        "n": lambda v: metrics.checkerboard_floor(v),
        "levels": lambda v: metrics.quantise(PICTURES, v),
    }
    for name, call in calls.items():
        for value in (0, -1, 2.5, float("nan"), "3", None, True):
            assert refused(call, value).startswith(f"{name}=")
    for value in (0.0, -1.0, float("nan"), float("inf"), "1", None):
        assert refused(lambda v: metrics.mmd(POINTS, POINTS, bandwidth=v), value).startswith("bandwidth=")


def test_images_on_another_scale_are_refused_by_metrics_and_pictures():
    """0 .. 255 would be clipped to white: two values are left, and every distance is small."""
    net = metrics.random_features((8, 8, 1), levels=256)
    wrong = {
        "floats to 255": (PICTURES + 1) * 127.5, "bytes": ((PICTURES + 1) * 127.5).astype(np.uint8),
        "0 to 16": (PICTURES + 1) * 8, "nan": np.where(PICTURES > 0.9, np.nan, PICTURES),
    }  # fmt: skip
    for x in wrong.values():
        refused(metrics.quantise, x, 256)
        refused(metrics.fd_small, net, x, PICTURES)
        refused(metrics.fd_small, net, PICTURES, x)
        refused(images.image_grid, x)
        refused(metrics.small_classifier, np.concatenate([x] * 30), np.arange(180) % 2, cache_dir="none")
    over = np.where(PICTURES > 0.9, 1.4, PICTURES)  # samples overshoot
    assert metrics.quantise(over, 256).max() == 1 and images.image_grid(over).max() == 255
    checks.check_pixels("x", PICTURES)


def test_labels_of_another_shape_or_type_are_refused_not_averaged():
    logits = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    net = Features(None, lambda x: logits, None, "")
    y = np.array([0, 1, 2, 0, 1, 0])
    assert metrics.label_accuracy(net, PICTURES, y) == pytest.approx(5 / 6)
    for wrong in (y[:, None], y[:3], y[:1], y.astype(float), np.int64(0), [[0] * 6]):
        assert refused(metrics.label_accuracy, net, PICTURES, wrong).startswith("y=")
    train = np.concatenate([PICTURES] * 30)
    for wrong in (np.arange(180) % 2 + 0.5, (np.arange(180) % 2)[:, None], np.arange(90) % 2):
        assert refused(metrics.small_classifier, train, wrong, cache_dir="none").startswith("train_y=")


def test_marginals_with_conditions_of_another_length_are_refused():
    net = lambda params, x, s, t, cond=None, key=None: x
    x = np.ones((3, 2), np.float32)
    for side in ("positive", "negative"):
        message = refused(
            metrics.classifier.by_step, net, None, x, -x, np.array([0.0, 1.0]), **{f"{side}_cond": np.ones(4)}
        )
        assert message.startswith(f"{side}_cond=")


def test_a_floating_array_of_any_precision_is_a_set_of_samples():
    for dtype in (np.float16, np.float32, jnp.bfloat16):
        assert checking.finite_rows("x", jnp.asarray(POINTS, dtype)).dtype == np.float64
    assert metrics.sliced_w2(POINTS.tolist(), POINTS) == 0
