"""Metrics of features that a config names: equal to the functions, for every kind of data, with stored statistics."""

import numpy as np
import pytest

from fmjax import metrics
from fmjax.data import Examples, dataset
from fmjax.metrics import extractors, statistics
from fmjax.metrics.features import Features
from fmjax.storage import files

pytestmark = pytest.mark.usefixtures("as_users_call")
SHAPES = {"points": (2,), "vector": (3,), "series": (6, 2), "image": (8, 8, 1)}
PLAIN = ("frechet_to", "frechet_infinity_to", "mind_to", "precision_to", "recall_to", "density_to", "coverage_to")


def data(kind="points", seed=0, n=200, levels=None):
    rng = np.random.default_rng(seed)
    splits = [Examples(np.tanh(rng.standard_normal((n, *SHAPES[kind])))) for _ in range(3)]
    return dataset(*splits, levels=levels, name="some data")


def few(d):
    """An extractor outside the package: two numbers an example."""
    summary = lambda x: np.stack([x.reshape(len(x), -1).mean(1), x.reshape(len(x), -1).std(1)], 1)
    return Features(summary, lambda x: 20 * summary(x), None, "weights", "few")


@pytest.mark.parametrize("kind", SHAPES)
def test_the_random_network_separates_what_differs_in_every_kind(kind):
    d = data(kind)
    net = extractors.random_network(d)
    features = metrics.embed(net, d.test.x)
    assert features.shape == (200, 32) and (features.std(0) > 0).mean() > 0.9 and net.name == "random"
    metric = metrics.frechet_to(d, d.test)
    floor, scaled, noisy = (metric.distance(x) for x in (d.train.x, 0.7 * d.train.x, np.roll(d.train.x, 1, -1) * 0.5))
    assert floor < scaled and floor < noisy and metric.name == "FD[random]"
    np.testing.assert_array_equal(features, metrics.embed(extractors.random_network(d), d.test.x))
    assert net.weights != extractors.random_network(d, seed=1).weights
    if kind != "image":
        other = d._replace(train=Examples(2 * d.train.x))
        assert extractors.random_network(other).weights != net.weights  # other units
        ours = metrics.embed(extractors.random_network(other), 2 * d.test.x)
        np.testing.assert_allclose(ours, features, atol=1e-5)  # the units of the data do not matter


@pytest.mark.parametrize("kind", ["points", "series", "image"])
def test_every_measure_is_the_function_in_the_features(kind):
    d, x = data(kind, levels=256 if kind == "image" else None), data(kind, seed=1).train.x
    net = extractors.random_network(d)
    a, b = metrics.embed(net, x), metrics.embed(net, d.test.x)
    scale = np.sqrt((b**2).mean())
    order = np.random.default_rng(0).permutation(200)
    p, r = metrics.precision_recall(b[order], a, k=4)
    dense, covered = metrics.density_coverage(b[order], a, k=4)
    subsets = {"size": 90, "subsets": 3, "seed": 2}
    expected = {
        "frechet_to": ({}, metrics.frechet(a, b)),
        "frechet_infinity_to": ({"counts": 4, "seed": 3}, metrics.frechet_infinity(a, b, counts=4, seed=3)[0]),
        "kid_to": (subsets, metrics.kid(a / scale, b / scale, **subsets)[0]),
        "mind_to": ({"directions": 7, "seed": 5}, metrics.mind(a, b, directions=7, seed=5)),
        "precision_to": ({"k": 4}, 1 - p), "recall_to": ({"k": 4}, 1 - r),
        "density_to": ({"k": 4}, abs(1 - dense)), "coverage_to": ({"k": 4}, 1 - covered),
    }  # fmt: skip
    for name, (options, value) in expected.items():
        metric = getattr(metrics, name)(d, d.test, **options)
        assert metric.distance(x) == pytest.approx(value, rel=1e-7, abs=1e-12), name
        assert metric.name.endswith("[random]") and metric.facts["features"].startswith("random, weights ")


@pytest.mark.parametrize("name", PLAIN)
def test_a_measure_of_equal_samples_is_below_others(name):
    d = data("vector", n=400)
    metric = getattr(metrics, name)(d, d.test, features=extractors.raw)
    good, bad = metric.distance(d.train.x), metric.distance(0.3 * d.train.x + 1)
    assert good < 0.3 and bad > 2 * abs(good)
    assert metric.least <= 400


def test_the_least_number_of_samples_follows_from_the_features():
    d = data("vector")
    least = lambda name, **options: getattr(metrics, name)(d, d.test, **options).least
    assert least("frechet_to", features=extractors.raw) == 4 and least("frechet_to") == 33
    assert least("frechet_infinity_to", features=extractors.raw) == 16
    assert (least("kid_to", size=50), least("precision_to"), least("coverage_to", k=150)) == (50, 100, 151)
    assert (least("inception_score_to", features=few, splits=3), least("c2st_to")) == (30, 100)
    short = d.test._replace(x=d.test.x[:20])
    for name in ("frechet_to", "kid_to", "precision_to", "c2st_to", "memorised_to"):
        with pytest.raises(ValueError, match="^reference=20: "):
            getattr(metrics, name)(d, short, **({"quantile": 0.01} if name == "memorised_to" else {}))


def test_the_gap_of_inception_scores_is_stated_with_the_score_of_the_data():
    d = data("vector")
    metric = metrics.inception_score_to(d, d.test, features=few, splits=2)
    score = lambda x: metrics.inception_score(few(d).logits(x), splits=2)[0]
    x = d.train.x / 3
    assert metric.distance(x) == pytest.approx(score(d.test.x) - score(x))
    assert metric.facts["score of the reference"] == f"{score(d.test.x):.4f}"
    with pytest.raises(ValueError, match="^features='raw': .*logits"):
        metrics.inception_score_to(d, d.test, features=extractors.raw)


def test_an_extractor_that_returns_something_else_is_refused():
    d = data()
    with pytest.raises(ValueError, match="^features='wrong': returns ndarray"):
        metrics.frechet_to(d, d.test, features=wrong)


def wrong(d):
    return d.train.x


def test_copies_are_memorised_in_pixels_shifts_included():
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    inside = np.tanh(gaussian_filter(rng.standard_normal((600, 8, 8, 1)), (0, 1, 1, 0)))
    x = np.pad(inside, ((0, 0), (2, 2), (2, 2), (0, 0)))
    d = dataset(Examples(x[:200]), Examples(x[200:400]), Examples(x[400:]))
    metric = metrics.memorised_to(d, d.test)
    assert metric.name == "memorised[raw]" and metric.facts["shifts"] == "1 pixels"
    assert metric.distance(np.roll(x[:50], 1, 1)) == 1 and metric.distance(d.validation.x) < 0.15
    without = metrics.memorised_to(d, d.test, shifts=0).distance(np.roll(x[:50], 1, 1))
    assert without < 0.5
    assert metrics.memorised_to(d, d.test, features=extractors.random_network).distance(x[:50]) == 1
    with pytest.raises(ValueError, match="^shifts=2: "):
        metrics.memorised_to(d, d.test, features=extractors.random_network, shifts=2)


def test_statistics_are_stored_by_data_split_preprocessing_and_digest(tmp_path, monkeypatch):
    d = data("vector")
    calls = []
    counted = lambda d: few(d)._replace(features=lambda x: calls.append(len(x)) or few(d).features(x))
    build = lambda split, features=counted: metrics.frechet_to(d, split, features=features, cache_dir=str(tmp_path))
    first = build(d.test)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("some_data-test-few-") and file.suffix == ".npz" and calls == [200]
    mean, covariance = metrics.moments(few(d).features(np.asarray(d.test.x)))
    with np.load(file, allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["mu"], mean)
        np.testing.assert_array_equal(stored["sigma"], covariance)
    assert build(d.test).distance(d.train.x) == first.distance(d.train.x)
    assert calls == [200] * 3  # the samples, twice, and the reference once
    build(d.validation)
    build(Examples(d.test.x + 1e-3))
    other = lambda d: few(d)._replace(weights="others")
    build(d.test, other)
    names = sorted(f.name.rpartition("-")[0] for f in tmp_path.iterdir())
    assert names == ["some_data-reference-few", "some_data-test-few", "some_data-test-few", "some_data-validation-few"]


def test_only_slow_extractors_are_stored_unless_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    d = data("vector")
    metrics.frechet_to(d, d.test, features=few)
    assert not files.cache_folder().exists()
    metrics.frechet_to(d, d.test, features=lambda d: few(d)._replace(slow=True))
    assert len(list((files.cache_folder() / "statistics").iterdir())) == 1


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_damaged_statistics_are_named_and_computed_again(damage, tmp_path):
    d = data("vector")
    build = lambda: metrics.frechet_to(d, d.test, features=few, cache_dir=str(tmp_path)).distance(d.train.x)
    value = build()
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-50])
    else:
        with np.load(file) as z:
            arrays = dict(z)
        np.savez(file, **arrays | {"mu": arrays["mu"] + 1})
    with pytest.warns(UserWarning, match=f"{file.name} are damaged"):
        assert build() == value
    assert file.read_bytes() == content


def test_published_statistics_take_the_place_of_the_reference(tmp_path):
    d = data("vector")
    mean, covariance = metrics.moments(np.asarray(d.validation.x))
    file = tmp_path / "published.npz"
    np.savez(file, mu=mean, sigma=covariance)
    metric = metrics.frechet_to(d, d.test, features=extractors.raw, statistics=str(file))
    assert metric.distance(d.train.x) == pytest.approx(metrics.frechet(d.train.x, d.validation.x))
    assert metric.facts["reference"].startswith("published.npz, sha256 ")
    np.savez(file, mu=mean)
    with pytest.raises(ValueError, match=r"^statistics=.*'sigma': None"):
        statistics.read_statistics(str(file))
    np.save(tmp_path / "objects.npz", np.array([{}], object), allow_pickle=True)
    for path in ("none.npz", "objects.npz.npy"):
        with pytest.raises(ValueError, match=f"^statistics=.*{path}"):
            statistics.read_statistics(str(tmp_path / path))


def test_metrics_of_a_teacher_compare_pairs():
    d = data("vector")
    x, noise = d.train.x, np.random.default_rng(0).permutation(200)
    paired = metrics.paired_error_to(d, d.test, teacher="rk4, 8 steps")
    assert (paired.teacher, paired.name) == ("rk4, 8 steps", "error to rk4, 8 steps")
    assert paired.distance(x + 0.1, x) == pytest.approx(0.01) and paired.distance(x[noise], x) > 0.1
    frechet = metrics.teacher_frechet_to(d, d.test, teacher="rk4, 8 steps", features=extractors.raw)
    assert frechet.name == "T-FD[raw, rk4, 8 steps]" and frechet.least == 4
    assert frechet.distance(x[noise] + 1, x) == pytest.approx(3)  # order does not matter, data neither
    change = metrics.feature_change_to(d, d.test, teacher="rk4, 8 steps", features=extractors.raw)
    unit = metrics.median_distance(d.test.x)
    assert change.distance(x + 0.3, x) == pytest.approx(0.3 * np.sqrt(3) / unit)
