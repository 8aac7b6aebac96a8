"""The small ImageNets from archives of their formats, against the arrays that were put into them."""

import originals
import pytest

from fmjax.data import images, preparation
from fmjax.data.imagenet import archives, imagenet32, imagenet64

SIZES = pytest.mark.parametrize(("load", "size"), [(imagenet64, 64), (imagenet32, 32)])


def both(load, tmp_path, **options):
    """From disk, which is the default, and in memory."""
    where = {"source_dir": str(tmp_path), "data_dir": str(tmp_path / "d"), "verify": False, "validation": 3}
    return load(**where, **options), load(**where, stream=False, **options)


@SIZES
def test_the_resized_set_has_the_images_and_labels_of_its_archives(load, size, tmp_path):
    written = originals.imagenet_npz(tmp_path, size)
    disk, memory = both(load, tmp_path)
    originals.assert_is(disk, written)
    originals.assert_is(memory, written)
    assert isinstance(disk.train.x, images.Records)
    records = list((tmp_path / "d").rglob("*train.array_record*"))
    assert disk.classes == 1000 and len(records) == (2 if size == 64 else 1)  # one for each archive


@SIZES
def test_the_downsampled_set_has_images_and_no_labels(load, size, tmp_path):
    written = originals.imagenet_png(tmp_path, size)
    for data in both(load, tmp_path, archive="downsampled"):
        originals.assert_is(data, written)
        assert data.classes == 0 and data.test.cond is None


def test_an_unknown_set_of_archives_is_refused():
    with pytest.raises(ValueError, match="archive='resizd': .*did you mean 'resized'"):
        imagenet64(archive="resizd")


@pytest.mark.parametrize(
    ("size", "archive", "gigabytes"),
    [(32, "resized", 3.72), (64, "resized", 14.09), (32, "downsampled", 4.27), (64, "downsampled", 12.59)],
)
def test_the_archives_are_registered_with_address_size_and_checksum(size, archive, gigabytes):
    original = archives(size, archive)
    files = preparation.registered(original)
    assert list(files) == original.files()
    assert all(url.endswith(name) and len(bytes.fromhex(i.checksum)) == 32 for name, (url, i) in files.items())
    assert sum(info.size for _, info in files.values()) / 1e9 == pytest.approx(gigabytes, abs=0.006)


@pytest.mark.parametrize(
    ("write", "archive", "name"),
    [
        (originals.imagenet_npz, "resized", "Imagenet64_train_part2_npz.zip"),
        (originals.imagenet_png, "downsampled", "valid_64x64.tar"),
    ],
)
def test_a_truncated_archive_is_named_and_leaves_nothing(write, archive, name, tmp_path):
    write(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{name}: damaged"):
        both(imagenet64, tmp_path, archive=archive)
    assert not list((tmp_path / "d").rglob("*.array_record*"))


def test_the_wrong_archive_under_the_right_name_is_refused(tmp_path):
    """Images of 32x32 in archives whose names say 64x64."""
    originals.imagenet_npz(tmp_path, 32)
    for part, source in [("train_part1", "train"), ("train_part2", "train"), ("val", "val")]:
        data = (tmp_path / f"Imagenet32_{source}_npz.zip").read_bytes()
        (tmp_path / f"Imagenet64_{part}_npz.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"image 0 has shape \(32, 32, 3\), not \(64, 64, 3\)"):
        both(imagenet64, tmp_path)
