"""A data set from the user's file: every kind, both forms, in memory and on disk, and what is refused."""

import numpy as np
import pytest

from fmjax import data
from fmjax.data import batches
from fmjax.data.arrays import Mapped, arrays

N = 40
SHAPES = {"points": (2,), "vector": (5,), "series": (6, 3), "image": (4, 4, 1)}


def floats(shape, n=N, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype(np.float32)


def saved(folder, **content):
    path = folder / "own.npz"
    np.savez(path, **content)
    return str(path)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_one_array_is_split_at_random_with_its_labels(kind, stream, tmp_path):
    x, index = floats(SHAPES[kind]), np.arange(N)
    loaded = arrays(path=saved(tmp_path, x=x, y=index), validation=0.2, test=0.1, stream=stream)
    assert (loaded.kind, loaded.classes, loaded.name, loaded.levels) == (kind, N, "own", None)
    assert [examples.count for examples in loaded[:3]] == [28, 8, 4]
    for examples in loaded[:3]:
        assert isinstance(examples.x, Mapped if stream else np.ndarray) and examples.x.dtype == np.float32
        np.testing.assert_array_equal(examples.x[:], x[examples.cond])
    assert sorted(np.concatenate([examples.cond for examples in loaded[:3]])) == list(range(N))


@pytest.mark.parametrize("stream", [False, True])
def test_given_splits_stay_as_they_are(stream, tmp_path):
    splits = {name: floats((3,), 10 + i, seed=i) for i, name in enumerate(("train", "validation", "test"))}
    y = {f"y_{name}": x[:, :2] for name, x in splits.items()}
    path = saved(tmp_path, **{f"x_{name}": x for name, x in splits.items()}, **y)
    loaded = arrays(path=path, stream=stream)
    for name, x in splits.items():
        np.testing.assert_array_equal(getattr(loaded, name).x[:], x)
        np.testing.assert_array_equal(getattr(loaded, name).cond, x[:, :2])
    assert loaded.classes == 0


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_are_scaled_to_minus_one_to_one(stream, tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (N, 4, 4, 3), np.uint8)
    loaded = arrays(path=saved(tmp_path, x=x, y=np.arange(N)), stream=stream)
    assert loaded.kind == "image" and loaded.levels == 256
    np.testing.assert_allclose(loaded.train.x[:], x[loaded.train.cond] / 127.5 - 1, atol=1.2e-7)
    assert loaded.train.x[[3, 1]].shape == (2, 4, 4, 3)


@pytest.mark.parametrize("order", ["C", "F"])
def test_batches_from_a_mapped_file_equal_batches_from_memory(order, tmp_path):
    x = np.asarray(floats((4, 4, 1)).astype(np.float64), order=order)
    memory, disk = (arrays(path=saved(tmp_path, y=np.arange(N), x=x), stream=stream) for stream in (False, True))
    a, b = (batches(d.train.x, d.train.cond, batch_size=7, seed=0, flip=True) for d in (memory, disk))
    for step in range(6):
        np.testing.assert_array_equal(a(step).x1, b(step).x1)
        np.testing.assert_array_equal(a(step).cond, b(step).cond)
    assert isinstance(disk.train.x.array, np.memmap)


def test_a_npy_file_holds_the_examples(tmp_path):
    x = floats((5,))
    np.save(tmp_path / "own.npy", x)
    memory, disk = (arrays(path=str(tmp_path / "own.npy"), stream=stream) for stream in (False, True))
    np.testing.assert_array_equal(memory.train.x, disk.train.x[:])
    assert memory.train.cond is None and isinstance(disk.train.x.array, np.memmap)


def test_a_seed_fixes_the_split(tmp_path):
    path = saved(tmp_path, x=floats((2,)))
    a, b, other = arrays(path=path), arrays(path=path), arrays(path=path, seed=1)
    np.testing.assert_array_equal(a.test.x, b.test.x)
    assert not np.array_equal(a.test.x, other.test.x)


X = floats((2,))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"x": X}, {"validation": 0.0}, r"^validation=0.0: .*\(0, 1\)"),
        ({"x": X}, {"test": 1.5}, r"^test=1.5: .*\(0, 1\)"),
        ({"x": X}, {"test": 0.9}, r"^validation=0.1, test=0.9: of 40 examples"),
        ({"x": X[:6]}, {}, r"^validation=0.1, test=0.1: of 6 examples"),
        ({"x": X, "y": np.arange(3)}, {}, r"^y=\[3\]: there are 40 examples"),
        ({"x": X, "y": np.arange(N)}, {"classes": 7}, r"^train.cond=7 at row \d+: labels lie in 0\.\.6"),
        ({"x_train": X, "x_test": X}, {}, "holds x_test, x_train. Give x .* x_train, x_validation, x_test"),
        ({"x": np.arange(80).reshape(N, 2)}, {}, r"x is int64 \[40, 2\]"),
        ({"x": np.zeros((N, 2), np.uint8)}, {}, r"x is uint8 \[40, 2\]"),
        ({"x": np.where(np.arange(N)[:, None] == 5, np.nan, X)}, {}, r"^x=\[40\]: row 5 "),
        ({"x": np.zeros((N, 3, 3, 3, 3))}, {}, r"^shape=\(3, 3, 3, 3\)"),
        ({"x": np.array([None] * N)}, {}, "cannot be read as arrays"),
        ({}, {}, "holds nothing"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_file_of_another_form_is_refused(content, options, message, stream, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        arrays(path=saved(tmp_path, **content), stream=stream, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="^path=.*gone.npz"):
        arrays(path=str(tmp_path / "gone.npz"))
    np.savez_compressed(tmp_path / "small.npz", x=X)
    assert arrays(path=str(tmp_path / "small.npz")).train.count == 32
    with pytest.raises(ValueError, match="^path=.*small.npz.*compressed"):
        arrays(path=str(tmp_path / "small.npz"), stream=True)
    (tmp_path / "torn.npz").write_bytes((tmp_path / "small.npz").read_bytes()[:-40])
    with pytest.raises(ValueError, match="^path=.*torn.npz"):
        arrays(path=str(tmp_path / "torn.npz"))


def test_the_factory_is_named_in_the_face():
    assert data.arrays is arrays
