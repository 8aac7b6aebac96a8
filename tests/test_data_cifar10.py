"""CIFAR-10 from an archive of its format, against the arrays that were put into it."""

import originals
import pytest

from fmjax.data import preparation
from fmjax.data.cifar10 import CIFAR10, cifar10

NAME = "cifar-10-binary.tar.gz"


@pytest.mark.parametrize("stream", [False, True])
def test_cifar10_has_the_images_of_its_archive_in_their_order(stream, tmp_path):
    written = originals.cifar10(tmp_path)
    where = {"source_dir": str(tmp_path), "data_dir": str(tmp_path / "d")}
    originals.assert_is(cifar10(validation=5, verify=False, stream=stream, **where), written)


def test_the_archive_is_registered_with_an_address_a_size_and_a_checksum():
    """170 MB, as the page of the set says."""
    ((url, info),) = preparation.registered(CIFAR10).values()
    assert url.endswith(NAME) and round(info.size / 1e6) == 170 and len(bytes.fromhex(info.checksum)) == 32


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.95])
def test_a_truncated_archive_is_named_and_leaves_nothing(fraction, tmp_path):
    originals.cifar10(tmp_path)
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(ValueError, match=f"{NAME}: damaged"):
        cifar10(source_dir=str(tmp_path), data_dir=str(tmp_path / "d"), verify=False)
    assert not list((tmp_path / "d").rglob("*.array_record*"))
