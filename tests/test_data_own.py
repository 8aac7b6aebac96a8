"""Data by config: folders of images, TFDS and Hugging Face sets, units; each compared with Pillow and numpy."""

import importlib
import importlib.util
import io
import os

import numpy as np
import pytest
from PIL import Image

from fmjax import data
from fmjax.data import batches, decoding, splits, units
from fmjax.data.arrays import Mapped, arrays
from fmjax.data.folder import folder
from fmjax.data.table import TableRows

RNG = np.random.default_rng(0)


def pixels(*shape):
    return RNG.integers(0, 256, shape, np.uint8)


def as_file(array, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def labelled(tmp_path):
    """Forty images, ten a sub-folder, each of one colour that says which it is."""
    for i in range(40):
        place = tmp_path / "set" / ("cat", "dog", "emu", "fox")[i % 4]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (i, 255 - i, i % 4)).save(place / f"{i:02d}.png")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "set" / ".hidden").mkdir()
    return tmp_path / "set"


@pytest.mark.parametrize("stream", [False, True])
def test_sub_folders_are_labels_and_pixels_come_back(stream, labelled, tmp_path):
    loaded = folder(path=str(labelled), stream=stream, data_dir=str(tmp_path / "records"))
    assert (loaded.kind, loaded.classes, loaded.levels) == ("image", 4, 256)
    assert loaded.labels == ("cat", "dog", "emu", "fox")
    assert [part.count for part in loaded[:3]] == [32, 4, 4]
    seen = []
    for part in loaded[:3]:
        assert isinstance(part.x, Mapped if stream else np.ndarray)
        levels = np.rint((part.x[:] + 1) * 127.5).astype(int)
        assert (levels == levels[:, :1, :1]).all()
        red, green, blue = levels[:, 0, 0].T
        np.testing.assert_array_equal(green, 255 - red)
        np.testing.assert_array_equal(blue, part.cond)
        np.testing.assert_array_equal(red % 4, part.cond)
        seen += red.tolist()
    assert sorted(seen) == list(range(40))


def test_records_are_decoded_once_and_again_when_a_file_changes(labelled, tmp_path, monkeypatch):
    module = importlib.import_module("fmjax.data.folder")
    calls, decode = [], module.decode_image
    options = {"path": str(labelled), "size": 6, "stream": True, "data_dir": str(tmp_path / "records")}
    monkeypatch.setattr(module, "decode_image", lambda *a, **k: calls.append(1) or decode(*a, **k))
    first = folder(**options)
    again = folder(**options)
    assert len(calls) == 40
    np.testing.assert_array_equal(first.train.x[:], again.train.x[:])
    memory = folder(**options | {"stream": False})
    a, b = (batches(d.train.x, d.train.cond, batch_size=5, seed=0, flip=True) for d in (first, memory))
    np.testing.assert_array_equal(a(3).x1, b(3).x1)
    (records,) = (tmp_path / "records").glob("*.npy")
    records.write_bytes(records.read_bytes()[:-9])  # torn: decoded again
    calls.clear()
    np.testing.assert_array_equal(folder(**options).train.x[:], memory.train.x)
    assert len(calls) == 40
    os.utime(labelled / "cat" / "00.png", ns=(1, 1))
    folder(**options)
    assert len(calls) == 80


def test_splits_of_a_folder_stay_as_they_are(tmp_path):
    for i, split in enumerate(("train", "validation", "test")):
        (tmp_path / split).mkdir()
        for j in range(3 + i):
            Image.fromarray(np.full((4, 4), 10 * i + j, np.uint8)).save(tmp_path / split / f"{j}.png")
    loaded = folder(path=str(tmp_path), channels=1)
    levels = [np.rint((part.x[:, 0, 0, 0] + 1) * 127.5).astype(int).tolist() for part in loaded[:3]]
    assert levels == [[0, 1, 2], [10, 11, 12, 13], [20, 21, 22, 23, 24]] and loaded.train.cond is None


GREY16 = np.array([[0, 128, 129, 257], [65535, 65278, 32896, 400]], np.uint16)
RGBA = np.stack([np.full((2, 2), v, np.uint8) for v in (200, 100, 0, 51)], -1)


@pytest.mark.parametrize(
    ("file", "channels", "truth"),
    [
        (as_file(pixels(3, 5, 3)), 3, lambda x: x),
        (as_file(pixels(3, 5)), 3, lambda x: np.repeat(x[..., None], 3, -1)),
        (as_file(pixels(3, 5)), 1, lambda x: x[..., None]),
        (as_file(pixels(8, 8, 3), "webp", lossless=True), 3, lambda x: x),
    ],
)
def test_eight_bit_files_keep_their_pixels(file, channels, truth):
    stored = np.asarray(Image.open(io.BytesIO(file)))
    np.testing.assert_array_equal(decoding.decode_image(file, size=None, channels=channels), truth(stored))


def test_jpeg_is_what_pillow_decodes():
    file = as_file(pixels(16, 16, 3), "jpeg")
    np.testing.assert_array_equal(
        decoding.decode_image(file, size=16, channels=3), np.asarray(Image.open(io.BytesIO(file)))
    )


def test_sixteen_bits_are_rounded_and_transparency_lies_on_white():
    grey = decoding.decode_image(as_file(GREY16), size=None, channels=1)[..., 0]
    np.testing.assert_array_equal(grey, np.rint(GREY16 / 257))
    clear = decoding.decode_image(as_file(RGBA), size=None, channels=3)[0, 0]
    np.testing.assert_allclose(clear, 0.2 * np.array([200, 100, 0]) + 0.8 * 255, atol=1)


def test_the_orientation_of_a_camera_is_applied():
    x, exif = pixels(4, 6), Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter clockwise to see it upright
    upright = decoding.decode_image(as_file(x, exif=exif.tobytes()), size=None, channels=1)[..., 0]
    np.testing.assert_array_equal(upright, np.rot90(x, -1))


def test_another_size_is_the_middle_of_the_resized_image():
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200  # the middle square
    assert (decoding.fit_image(wide, size=8, channels=3) == 200).all()
    half = decoding.fit_image(wide, size=4, channels=3)
    assert half.shape == (4, 4, 3) and (half[:, 1:3] >= 195).all()
    ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[:, None], 64, 1)
    small = decoding.fit_image(ramp, size=16, channels=1)[..., 0]
    np.testing.assert_allclose(small[1:-1], ramp.reshape(16, 4, 16, 4).mean((1, 3))[1:-1], atol=1)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda p: None, {}, "path=.*holds no .png"),
        (lambda p: p.joinpath("a.png").write_bytes(b"\x89PNG no image"), {}, r"path=.*a\.png: it is damaged"),
        (lambda p: p.joinpath("a.png").write_bytes(as_file(pixels(4, 4), "gif")), {}, r"path=.*a\.png: it is damaged"),
        (lambda p: (p / "test").mkdir(), {}, "path=.*test look like splits"),
        (lambda p: None, {"size": 0}, "size=0"),
        (lambda p: None, {"validation": 0.0}, "validation=0.0"),
    ],
)
def test_folders_of_another_form_are_refused_in_one_sentence(make, options, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        folder(path=str(tmp_path), **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_sizes_and_places_that_differ_are_named(labelled):
    Image.new("RGB", (7, 6)).save(labelled / "fox" / "zz.png")
    with pytest.raises(ValueError, match=r"^path=.*zz\.png: has 6 x 7 pixels, and the first image 6 x 6"):
        folder(path=str(labelled))
    assert folder(path=str(labelled), size=6).train.count == 33
    Image.new("RGB", (6, 6)).save(labelled / "lost.png")
    with pytest.raises(ValueError, match="^path=.*images lie in it and in its sub-folders"):
        folder(path=str(labelled), size=6)
    with pytest.raises(FileNotFoundError, match="^path=.*no such folder"):
        folder(path=str(labelled / "gone"))


@pytest.mark.parametrize(("shape", "axes"), [((5,), (0,)), ((6, 3), (0, 1))])
@pytest.mark.parametrize("stream", [False, True])
def test_standardised_data_have_mean_zero_and_deviation_one(shape, axes, stream, tmp_path):
    spread = np.geomspace(1e-3, 1e3, shape[-1])
    x = RNG.normal(size=(60, *shape)) * spread + 50 * spread
    y = RNG.normal(size=60) * 7 + 300
    np.savez(tmp_path / "x.npz", x=x, y=y)
    plain, scaled = (arrays(path=str(tmp_path / "x.npz"), stream=stream, standardise=s) for s in (False, True))
    seen = scaled.train.x[:].astype(np.float64)
    np.testing.assert_allclose(seen.mean(axes), 0, atol=1e-5)
    np.testing.assert_allclose(seen.std(axes), 1, atol=1e-5)
    assert abs(scaled.train.cond.mean()) < 1e-5 and abs(scaled.train.cond.std() - 1) < 1e-5
    for name in ("train", "validation", "test"):
        back = scaled.units.to_data(getattr(scaled, name).x[:])
        np.testing.assert_allclose(back, getattr(plain, name).x[:], rtol=1e-4, atol=1e-6)
    again = units.from_record(scaled.units.to_record())
    np.testing.assert_array_equal(again.to_network(x), scaled.units.to_network(x))
    assert "standardised" in data.describe_data(scaled) and "standardised" not in data.describe_data(plain)


def test_images_are_conditions_in_the_same_range(tmp_path):
    x, y = pixels(40, 4, 4, 3), pixels(40, 4, 4, 1)
    np.savez(tmp_path / "x.npz", x=x, y=y, unrelated=np.arange(3))
    loaded = arrays(path=str(tmp_path / "x.npz"))
    together = {x[i].tobytes(): y[i] for i in range(40)}
    for image, cond in zip(loaded.train.x, loaded.train.cond, strict=True):
        stored = np.rint((image + 1) * 127.5).astype(np.uint8)
        np.testing.assert_allclose(cond, together[stored.tobytes()] / 127.5 - 1, atol=1e-6)
    assert loaded.classes == 0 and data.describe_data(loaded).endswith("conditions are arrays")


def test_constant_columns_stay_and_images_are_refused():
    mean, spread = units.measure_units(np.array([[3.0, 1e6], [3.0, 3e6]]))
    assert mean.tolist() == [3.0, 2e6] and spread.tolist() == [1.0, 1e6]
    with pytest.raises(ValueError, match="^standardise=True: images"):
        data.standardise(data.digits())


def test_missing_splits_are_drawn_from_the_training_examples():
    x = np.arange(40.0)[:, None].repeat(3, 1)
    given = data.Examples(x), data.Examples(-x[:5])
    train, validation, test = splits.complete({"train": given[0], "test": given[1]}, validation=0.25, test=0.1, seed=0)
    assert test is given[1] and (train.count, validation.count) == (30, 10)
    assert sorted([*train.x[:, 0], *validation.x[:, 0]]) == list(range(40))


# --- TFDS


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A set that TFDS prepared here: images of two sizes, labels, vectors."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            kinds = tfds.features
            features = {
                "image": kinds.Image(shape=(None, None, 3)),
                "kind": kinds.ClassLabel(names=["a", "b"]),
                "v": kinds.Tensor(shape=(3,), dtype=np.float32),
                "text": kinds.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=kinds.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(30), "test": self._generate_examples(6)}

        def _generate_examples(self, count):
            for i in range(count):
                image = io.BytesIO(as_file(np.full((5 + i % 2, 6, 3), i, np.uint8)))
                yield i, {"image": image, "kind": i % 2, "v": np.arange(i, i + 3, dtype=np.float32), "text": "t"}

    place = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=place, file_format="array_record").download_and_prepare()
    return str(place)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tfds_set_has_its_images_and_labels(stream, tfds_folder):
    loaded = data.tfds(dataset="tiny", data_dir=tfds_folder, size=4, stream=stream)
    assert (loaded.kind, loaded.classes, loaded.labels, loaded.levels) == ("image", 2, ("a", "b"), 256)
    assert [part.count for part in loaded[:3]] == [27, 3, 6]
    assert isinstance(loaded.train.x, TableRows if stream else np.ndarray)
    seen = []
    for part in loaded[:2]:
        levels = np.rint((part.x[:] + 1) * 127.5).astype(int)
        assert levels.shape[1:] == (4, 4, 3) and (levels == levels[:, :1, :1, :1]).all()
        np.testing.assert_array_equal(levels[:, 0, 0, 0] % 2, part.cond)
        seen += levels[:, 0, 0, 0].tolist()
    assert sorted(seen) == list(range(30))


def test_a_tfds_set_has_its_arrays(tfds_folder):
    loaded = data.tfds(dataset="tiny", data_dir=tfds_folder, x="v", standardise=True)
    first = loaded.units.to_data(loaded.test.x)[:, 0]
    assert loaded.kind == "vector" and sorted(np.rint(first).tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "tiny"}, "size=None: the images have several sizes"),
        ({"dataset": "tiny", "x": "v", "y": "kin"}, "y='kin': no such column; did you mean 'kind'"),
        ({"dataset": "tiny", "x": "text"}, "x='text': is no column"),
        ({"dataset": "no_such_set"}, "dataset='no_such_set'"),
        ({"dataset": "../tiny"}, "dataset='../tiny'"),
    ],
)
def test_tfds_sets_that_cannot_be_read_are_refused(options, message, tfds_folder):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        data.tfds(data_dir=tfds_folder, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


# --- Hugging Face

needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the package datasets: pip install 'fmjax[huggingface]'"
)


def hugging(count, start=0):
    import datasets

    images = [Image.fromarray(np.full((5, 6, 3), start + i, np.uint8)) for i in range(count)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {"image": images, "label": [i % 2 for i in range(count)]}
    rows["v"] = [[float(i), 2.0, 3.0] for i in range(count)]
    features["v"] = datasets.Sequence(datasets.Value("float32"))
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@needs_datasets
@pytest.mark.parametrize("form", ["disk", "splits", "parquet"])
def test_a_hugging_face_folder_has_its_images_labels_and_arrays(form, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "own"
    if form == "parquet":
        place.mkdir()
        hugging(30).to_parquet(str(place / "train-00000-of-00001.parquet"))
        hugging(6, 100).to_parquet(str(place / "test-00000-of-00001.parquet"))
    elif form == "splits":
        datasets.DatasetDict({"train": hugging(30), "test": hugging(6, 100)}).save_to_disk(str(place))
    else:
        hugging(30).save_to_disk(str(place))
    loaded = data.huggingface(path=str(place), stream=form == "disk")
    assert (loaded.kind, loaded.classes, loaded.labels) == ("image", 2, ("a", "b"))
    assert [part.count for part in loaded[:3]] == ([24, 3, 3] if form == "disk" else [27, 3, 6])
    levels = np.rint((loaded.train.x[:] + 1) * 127.5).astype(int)
    assert levels.shape[1:] == (5, 6, 3) and (levels == levels[:, :1, :1, :1]).all()
    np.testing.assert_array_equal(levels[:, 0, 0, 0] % 2, loaded.train.cond)
    if form == "splits":
        assert sorted(np.rint((loaded.test.x[:, 0, 0, 0] + 1) * 127.5).astype(int)) == list(range(100, 106))
    vectors = data.huggingface(path=str(place), x="v", y="label")
    assert vectors.kind == "vector" and (vectors.train.x[:, 0] % 2 == vectors.train.cond).all()


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package datasets is installed")
def test_without_its_package_a_hugging_face_folder_says_what_to_install(tmp_path):
    with pytest.raises(RuntimeError, match=r"^data=huggingface: .*pip install 'fmjax\[huggingface\]'"):
        data.huggingface(path=str(tmp_path))
