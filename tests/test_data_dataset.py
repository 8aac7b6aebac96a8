"""The checked data set: kinds, classes, and every value that is refused with its split and row."""

import numpy as np
import pytest

from fmjax.data import Dataset, Examples, Rows, dataset, is_labels, kind_of


def examples(n=6, shape=(4, 4, 1), cond=None, low=-1.0, high=1.0):
    x = np.linspace(low, high, n * int(np.prod(shape)), dtype=np.float32).reshape(n, *shape)
    return Examples(x, cond)


def three(**options):
    return [examples(**options)] * 3


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((2,), "points"),
        ((1,), "vector"),
        ((3,), "vector"),
        ((9, 1), "series"),
        ((2, 2), "series"),
        ((4, 5, 3), "image"),
    ],
)
def test_the_kind_follows_from_the_shape(shape, kind):
    assert kind_of(shape) == kind == dataset(*three(shape=shape)).kind


@pytest.mark.parametrize("shape", [(), (2, 3, 4, 5)])
def test_a_shape_of_no_kind_is_refused(shape):
    with pytest.raises(ValueError, match=r"^shape=\("):
        kind_of(shape)


def test_splits_are_returned_as_they_are():
    train, validation, test = (examples(n) for n in (4, 3, 2))
    data = dataset(train, validation, test, levels=17, name="own")
    assert isinstance(data, Dataset) and data == Dataset(train, validation, test, "image", 17, 0, "own")
    assert [split.count for split in data[:3]] == [4, 3, 2]


def test_integer_labels_give_the_number_of_classes():
    labels = [np.array(y) for y in ([0, 1, 2], [1, 1], [4, 0])]
    splits = [examples(len(y), cond=y) for y in labels]
    assert dataset(*splits).classes == 5 and dataset(*splits, classes=10).classes == 10
    with pytest.raises(ValueError, match=r"^test.cond=4 at row 0: labels lie in 0\.\.3"):
        dataset(*splits, classes=4)
    with pytest.raises(ValueError, match=r"^validation.cond=-1 at row 1: "):
        dataset(splits[0], examples(2, cond=np.array([0, -1])), splits[2])


@pytest.mark.parametrize(
    "cond", [np.linspace(0, 1, 6), np.ones((6, 3)), {"class": np.arange(6), "scale": np.ones((6, 1))}, None]
)
def test_other_conditions_have_no_classes(cond):
    assert dataset(*three(cond=cond)).classes == 0 and not is_labels(cond)


@pytest.mark.parametrize(
    ("high", "low", "advice"),
    [(255.0, 0.0, "x / 127.5 - 1"), (1.0, 0.0, r"2 \* x - 1"), (3.0, -3.0, "x / 3"), (9e3, 0.0, r"2 \* x / 9000 - 1")],
)
def test_images_outside_minus_one_to_one_are_refused_with_a_scaling(low, high, advice):
    with pytest.raises(ValueError, match=rf"^train.x in \[-?\d+, \d+\]: .*{advice}"):
        dataset(*three(low=low, high=high))
    dataset(*three(low=low, high=high, shape=(5,)))  # other kinds of data have no range


def test_images_with_their_channels_first_are_refused():
    x = np.random.default_rng(0).uniform(-1, 1, (8, 3, 16, 16)).astype(np.float32)
    with pytest.raises(ValueError, match=r"^train.x=\[8, 3, 16, 16\]: .*transpose\(0, 2, 3, 1\)"):
        dataset(Examples(x), Examples(x), Examples(x))
    last = Examples(x.transpose(0, 2, 3, 1))
    assert dataset(last, last, last).kind == "image"


def not_finite(split, field):
    x = np.ones((6, 2), np.float32)
    wrong = np.where(np.arange(6) == 4, np.inf, 1.0).astype(np.float32)
    bad = Examples(wrong[:, None] * x, x) if field == "x" else Examples(x, wrong)
    good = Examples(x, x) if field == "x" else Examples(x, x[:, 0])
    return [bad if name == split else good for name in ("train", "validation", "test")]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("field", ["x", "cond"])
def test_a_value_that_is_not_finite_names_its_split_and_row(split, field):
    with pytest.raises(ValueError, match=rf"^{split}\.{field}\b.*: row 4 "):
        dataset(*not_finite(split, field))


def test_rows_beyond_the_first_chunk_are_checked():
    x = np.ones((10_000, 2), np.float32)
    x[9_000, 1] = np.nan
    with pytest.raises(ValueError, match=r"^train\.x=float32 \[10000, 2\]: row 9000 "):
        dataset(Examples(x), *three(shape=(2,))[:2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Examples(np.zeros((6, 4, 4, 1), np.uint8)), r"^test.x=uint8 \[6, 4, 4, 1\]: .*127.5"),
        (Examples(np.zeros((6, 4, 4, 1), int)), "^test.x=int64 .*floating"),
        (examples(1), r"^test.x=float32 \[1, 4, 4, 1\]: .*at least 2"),
        (examples(shape=(4, 5, 1)), r"^test.x=\[6, 4, 5, 1\]: .*\[6, 4, 4, 1\]"),
        (examples(cond=np.arange(5)), r"^test.cond=\[5\]: there are 6 examples"),
        (examples(cond=np.array(list("abcdef"))), "^test.cond=<U1"),
        (examples(cond={"a": np.arange(6), "b": np.zeros(2)}), r"^test.cond\['b'\]=\[2\]"),
        (examples(cond=np.arange(6)), "^test.cond: .*train.cond"),
    ],
)
def test_a_split_of_another_form_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataset(examples(), examples(), wrong)


@pytest.mark.parametrize(
    ("options", "cond", "message"),
    [
        ({"levels": 1}, None, "^levels=1: "),
        ({"classes": 3}, None, "^classes=3: "),
        ({"classes": 3}, np.ones(6), "^classes=3: "),
        ({}, np.arange(6)[:, None], r"^train.cond=\[6, 1\]: .*labels \[n\]"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, cond, message):
    with pytest.raises(ValueError, match=message):
        dataset(*three(cond=cond), **options)


class Lazy:
    """Rows that count how many of them are read."""

    dtype, ndim = np.dtype(np.float32), 4

    def __init__(self, n, from_bytes):
        self.shape, self.from_bytes, self.reads = (n, 4, 4, 1), from_bytes, 0

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        count = len(range(*rows.indices(len(self))))
        self.reads += count
        return np.full((count, 4, 4, 1), -1.0, np.float32)


@pytest.mark.parametrize(("from_bytes", "reads"), [(True, 2), (False, 20_000)])
def test_rows_on_disk_are_read_whole_unless_made_from_bytes(from_bytes, reads):
    rows = Lazy(10_000, from_bytes)
    assert isinstance(rows, Rows)
    dataset(Examples(rows), examples(), examples())
    assert rows.reads == reads  # once for finite values, once for the range


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize("x", [[[0.1, 0.2]] * 4, None, np.float32(1), "abc", {"x": np.ones((4, 2))}])
def test_examples_that_are_no_array_are_refused_by_their_split(x):
    with pytest.raises(ValueError, match=r"^test\.x="):
        dataset(examples(), examples(), Examples(x))


@pytest.mark.usefixtures("as_users_call")
def test_numbers_of_levels_and_classes_are_whole_and_labels_fit_into_a_table():
    for field, values in {"levels": (1, 2.5, np.nan, "256", True), "classes": (0, -1, 3.0, np.nan, 10**9)}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"^{field}="):
                dataset(*three(cond=np.arange(6) % 3), **{field: value})
    with pytest.raises(ValueError, match="^classes="):
        dataset(*three(n=4, cond=np.array([0, 1, 2, 10**12])))
