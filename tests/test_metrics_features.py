"""The small classifier of FD-small: accuracy, sensitivity, reproducibility, cache."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fmjax.data import Dataset, Examples
from fmjax.metrics import features
from fmjax.metrics.frechet import moments


@pytest.fixture(scope="module")
def data():
    """scikit-learn's digits in [-1, 1], one in five held out at random."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x, y = (raw.images / 8 - 1).astype(np.float32)[..., None], raw.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(x))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    train, test = (Examples(x[rows], y[rows]) for rows in (train, test))
    return Dataset(train, test, test, "image", levels=17, classes=10)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    return features.small_classifier(data.train.x, data.train.cond, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def short(monkeypatch):
    """A recipe of few steps: another recipe, hence another file."""
    monkeypatch.setitem(features.RECIPE, "steps", 8)


def test_held_out_accuracy(trained, data):
    assert features.label_accuracy(trained, data.test.x, data.test.cond) >= 0.95


def test_no_feature_is_dead_and_blocks_do_not_show(trained, data):
    f = trained.features(data.train.x)
    assert f.shape == (data.train.count, 32) and len(f) > 512
    assert (f.std(0) > 1e-3 * f.std()).all()
    np.testing.assert_array_equal(f[500:530], trained.features(data.train.x[500:530]))


@pytest.mark.parametrize("kind", ["trained", "random"])
def test_larger_corruptions_are_farther(kind, trained, data):
    trained = trained if kind == "trained" else features.random_features((8, 8, 1), levels=17)
    x, reference = np.asarray(data.test.x), data.train.x
    g = np.random.default_rng(0).standard_normal(x.shape)
    noise = [features.fd_small(trained, x + s * g, reference) for s in (0, 0.1, 0.2, 0.4)]
    blur = [
        features.fd_small(trained, gaussian_filter(x, (0, s, s, 0), mode="nearest"), reference)
        for s in (0, 0.5, 0.7, 1)
    ]
    missing = [features.fd_small(trained, x[data.test.cond >= k], reference) for k in (0, 1, 3)]
    for distances in (noise, blur, missing):
        assert distances == sorted(distances) and distances[-1] > 3 * distances[0]


def test_quantisation_restores_data_and_agrees_with_uint8(trained, data):
    x = np.asarray(data.test.x)
    np.testing.assert_array_equal(features.quantise(x, 17), x)
    nudged = x + np.random.default_rng(0).uniform(-0.06, 0.06, x.shape)  # less than half a grey level, 1/16
    np.testing.assert_array_equal(features.quantise(nudged, 17), x)
    assert features.fd_small(trained, nudged, x) < 1e-6 * np.trace(moments(trained.features(x))[1])
    y = np.random.default_rng(1).uniform(-1.2, 1.2, 10000)
    bytes_ = np.clip(127.5 * y + 128, 0, 255).astype(np.uint8)
    np.testing.assert_allclose(features.quantise(y, 256), bytes_ / 127.5 - 1, atol=1e-6)


def test_the_recipe_gives_the_same_weights_and_the_cache_is_used(data, short, tmp_path, monkeypatch):
    args = (data.train.x, data.train.cond)
    first = features.small_classifier(*args, cache_dir=tmp_path / "a")
    second = features.small_classifier(*args, cache_dir=tmp_path / "b")
    assert first.weights == second.weights
    monkeypatch.setattr(features, "_train", None)  # calling it would raise
    third = features.small_classifier(*args, cache_dir=tmp_path / "a")
    assert third.weights == first.weights
    np.testing.assert_array_equal(third.logits(data.test.x), first.logits(data.test.x))


def test_another_recipe_or_other_data_is_another_file(data, short, tmp_path, monkeypatch):
    x, y = np.array(data.train.x), data.train.cond
    features.small_classifier(x, y, cache_dir=tmp_path)
    x[0, 0, 0] *= 0.5
    features.small_classifier(x, y, cache_dir=tmp_path)
    monkeypatch.setitem(features.RECIPE, "leak", 0.2)
    features.small_classifier(x, y, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def _tear(file):
    file.write_bytes(file.read_bytes()[:-200])


def _alter(file):
    content = dict(np.load(file))
    content["head_w"] = content["head_w"] * 1.001
    np.savez(file, **content)


def _rename(file):
    content = dict(np.load(file))
    content["recipe_and_data"] = "0" * 64
    np.savez(file, **content)


@pytest.mark.parametrize(
    ("damage", "words"), [(_tear, "cannot be read"), (_alter, "sha256 it states"), (_rename, "another recipe")]
)
def test_a_damaged_cache_is_named_and_replaced(damage, words, data, short, tmp_path, recwarn):
    args = (data.train.x, data.train.cond)
    good = features.small_classifier(*args, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    damage(file)
    with pytest.warns(UserWarning, match=rf"{file.name}.*{words}"):
        again = features.small_classifier(*args, cache_dir=tmp_path)
    assert again.weights == good.weights and list(tmp_path.iterdir()) == [file]
    recwarn.clear()
    features.small_classifier(*args, cache_dir=tmp_path)
    assert not recwarn.list


def test_bad_input_is_named(data, trained, tmp_path):
    x, y = np.asarray(data.train.x), data.train.cond
    with pytest.raises(ValueError, match=r"^train_x: .*\[-1, 1\]"):
        features.small_classifier(8 * x, y, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^train_x=\(64, 8, 8, 1\)"):
        features.small_classifier(x[:64], y[:64], cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^train_y=\[\d+\]: all labels are 3"):
        features.small_classifier(x, np.full(len(x), 3), cache_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^cache_dir=.*file"):
        features.small_classifier(x, y, cache_dir=tmp_path / "file")
    with pytest.raises(ValueError, match="^levels=1: "):
        features.quantise(x, 1)
    with pytest.raises(ValueError, match=r"^x=\(\d+, 4, 8, 1\): .*\[n, 8, 8, 1\]"):
        trained.features(x[:, :4])
    with pytest.raises(ValueError, match=r"^samples=\[1, 8, 8, 1\]"):
        features.fd_small(trained, x[:1], x)
