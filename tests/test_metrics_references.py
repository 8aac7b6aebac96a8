"""Metrics that a config names: equal to the functions and closed forms, and refused where they mean nothing."""

import inspect

import numpy as np
import pytest

from fmjax import metrics
from fmjax.data import Examples, dataset, digits
from fmjax.metrics import DataLike, ExamplesLike, Metric, features
from fmjax.storage import files

FACTORIES = {name: getattr(metrics, name) for name in metrics.__all__ if name.endswith("_to")}
GENERAL = ("sliced_w2_to", "energy_to", "mmd_to")
SHAPES = {"points": (2,), "vector": (3,), "series": (6, 2), "image": (4, 4, 1)}


def data(kind="points", labels=False, seed=0):
    rng = np.random.default_rng(seed)
    splits = [
        Examples(rng.uniform(-1, 1, (n, *SHAPES[kind])), np.arange(n) % 2 if labels else None) for n in (40, 30, 50)
    ]
    return dataset(*splits)


@pytest.fixture(scope="module")
def small_digits(tmp_path_factory):
    """Digits and a metric whose classifier is trained for a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(features.RECIPE, "steps", 8)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        images = digits()
        yield images, metrics.fd_small_to(images, images.test), files.cache_folder() / "features"


def test_every_factory_has_the_form_that_a_config_needs():
    for factory in FACTORIES.values():
        parameters = inspect.signature(factory).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        required = [p.name for p in options if p.default is p.empty]
        assert positional == ["data", "reference"] and required in ([], ["teacher"])
        assert inspect.signature(factory).return_annotation == "Metric"


def test_a_dataset_is_what_the_factories_take():
    assert isinstance(data(), DataLike) and isinstance(data().test, ExamplesLike)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("classes", [0, 1, 2, 10])
def test_default_metrics_are_factories_that_accept_the_kind(kind, classes):
    names = metrics.defaults(kind, classes)
    assert set(names) <= set(FACTORIES) and names[-2:] == ("sliced_w2_to", "energy_to")
    assert names[:-2] == (() if kind != "image" else ("fd_small_to",) if classes > 1 else ("fd_random_to",))
    if "fd_small_to" not in names:
        for name in names:
            assert isinstance(FACTORIES[name](data(kind), data(kind).test), Metric)


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_distances_are_those_of_the_functions(kind, split):
    examples = data(kind)
    x, y = examples.train.x / 2, getattr(examples, split).x
    distance = lambda name, **options: FACTORIES[name](examples, getattr(examples, split), **options).distance(x)
    assert distance("sliced_w2_to", directions=7, seed=3) == metrics.sliced_w2(x, y, directions=7, seed=3)
    assert distance("energy_to") == pytest.approx(metrics.energy_distance(x, y), rel=1e-7)
    assert distance("mmd_to", bandwidth=0.7) == pytest.approx(metrics.mmd(x, y, bandwidth=0.7), rel=1e-9)
    median = metrics.median_distance(y)
    assert distance("mmd_to") == pytest.approx(metrics.mmd(x, y, bandwidth=median), rel=1e-9)


def test_a_translation_has_the_closed_forms():
    """One dimension: W2 is the shift; E|X - Y + a| - E|X - X'| of two points; the kernel at known distances."""
    y = np.array([[0.0], [1.0]])
    line = dataset(*[Examples(y)] * 3)
    assert metrics.sliced_w2_to(line, line.test).distance(y + 5) == pytest.approx(5)
    assert metrics.energy_to(line, line.test).distance(y + 5) == pytest.approx(2 * 5 - 1 - 1)
    k = lambda gap: np.exp(-(gap**2) / 2)
    exact = 2 * k(1) - 2 * (2 * k(5) + k(6) + k(4)) / 4
    assert metrics.mmd_to(line, line.test, bandwidth=1.0).distance(y + 5) == pytest.approx(exact)


def test_fd_small_is_the_frechet_distance_in_the_cached_classifier(small_digits):
    images, metric, cache = small_digits
    (file,) = cache.iterdir()
    net = metrics.small_classifier(images.train.x, images.train.cond, cache_dir=cache, levels=17)
    x = images.validation.x + 0.01
    assert metric.distance(x) == metrics.fd_small(net, x, images.test.x) and list(cache.iterdir()) == [file]
    accuracy = metrics.label_accuracy(net, images.test.x, images.test.cond)
    assert metric.facts == {"classifier": f"accuracy {accuracy:.3f} on the reference, weights {net.weights[:12]}"}
    assert metric.name == "FD-small"


def test_fd_random_needs_no_labels_and_its_seed_fixes_it():
    images = data("image")
    net = metrics.random_features((4, 4, 1), seed=2)
    metric = metrics.fd_random_to(images, images.test, seed=2)
    assert metric.distance(images.train.x) == metrics.fd_small(net, images.train.x, images.test.x)
    assert metric.distance(images.train.x) != metrics.fd_random_to(images, images.test).distance(images.train.x)


def test_grey_levels_are_rounded_where_the_data_have_them():
    x = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (40, 4, 4, 1))
    coarse, fine = (dataset(*[Examples(x)] * 3, levels=levels) for levels in (3, None))
    moved = x + np.random.default_rng(1).uniform(-0.3, 0.3, x.shape)
    distances = [metrics.fd_random_to(images, images.test).distance(moved) for images in (coarse, fine)]
    assert abs(distances[0]) < 1e-6 < distances[1]


@pytest.mark.parametrize(
    ("name", "kind", "labels", "message"),
    [
        ("fd_small_to", "points", True, "^kind='points': "),
        ("fd_random_to", "vector", False, "^kind='vector': "),
        ("fd_small_to", "image", False, "^classes=0: .*fd_random_to"),
    ],
)
def test_a_metric_that_means_nothing_is_refused(name, kind, labels, message):
    examples = data(kind, labels)
    with pytest.raises(ValueError, match=message):
        FACTORIES[name](examples, examples.test)


def test_one_class_is_too_few_for_fd_small():
    x = np.random.default_rng(0).uniform(-1, 1, (40, 4, 4, 1))
    images = dataset(*[Examples(x, np.zeros(40, int))] * 3)
    with pytest.raises(ValueError, match="^classes=1: .*two classes"):
        metrics.fd_small_to(images, images.test)


@pytest.mark.parametrize("name", [*GENERAL, "fd_random_to"])
def test_shapes_and_values_of_both_sides_are_checked(name):
    images = data("image")
    with pytest.raises(ValueError, match=r"^reference.x=\[50, 2\]: .*data.train.x"):
        FACTORIES[name](images, data("points").test)
    with pytest.raises(ValueError, match=r"^reference.x=\[50, 4, 4, 1\]: 50 rows are not finite"):
        FACTORIES[name](images, images.test._replace(x=images.test.x * np.nan))
    metric = FACTORIES[name](images, images.test)
    with pytest.raises(ValueError, match=r"^(x|samples)=\[40, 16\]"):
        metric.distance(images.train.x.reshape(40, 16))
    with pytest.raises(ValueError, match=r"^(x|samples)=\[1, 4, 4, 1\]"):
        metric.distance(images.train.x[:1])


def test_reference_examples_may_be_on_disk():
    class Rows:
        def __init__(self, x):
            self.x, self.shape, self.dtype, self.ndim = x, x.shape, x.dtype, x.ndim

        def __len__(self):
            return len(self.x)

        def __getitem__(self, rows):
            return self.x[rows].copy()

    points = data()
    on_disk = dataset(*[Examples(Rows(split.x)) for split in points[:3]])
    for name in GENERAL:
        a, b = (FACTORIES[name](d, d.test).distance(points.train.x) for d in (points, on_disk))
        assert a == b
