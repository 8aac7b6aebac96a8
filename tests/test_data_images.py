"""Image sets from their original files: bytes and labels against an independent reading, and all that can fail."""

import functools
import gzip
import hashlib
import http.server
import os
import struct
import subprocess
import sys
import threading
import weakref

import jax
import numpy as np
import originals
import pytest
from originals import assert_is

from fmjax import couplings
from fmjax.data import batches, images, preparation
from fmjax.data.mnist import FASHION_MNIST, MNIST, fashion_mnist, mnist

IMAGES = "train-images-idx3-ubyte.gz"
LABELS = "t10k-labels-idx1-ubyte.gz"


load = functools.partial(images.load_images, validation=5)


@pytest.fixture
def small(tmp_path):
    """A set of the MNIST format with a table of checksums: its ``Original``, its folder and what is in it."""
    folder = tmp_path / "source"
    folder.mkdir()
    written = originals.idx(folder)
    originals.checksums(folder, tmp_path / "checksums.tsv")
    return MNIST._replace(name="small", registered=str(tmp_path / "checksums.tsv")), folder, written


@pytest.mark.parametrize(
    ("published", "counts", "mean", "std"),
    [
        # counts of LeCun's test and training labels; mean and standard deviation as everybody normalises with
        (mnist, [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], 0.1307, 0.3081),
        pytest.param(fashion_mnist, [6000] * 10, 0.2860, 0.3530, marks=pytest.mark.slow),
    ],
)
def test_the_published_sets_are_read_byte_for_byte(published, counts, mean, std, tmp_path):
    source = originals.SHARED / published.__name__
    if not source.is_dir():
        pytest.skip(f"needs the original files of {published.__name__} in ../shared/data")
    splits = published(source_dir=str(source), data_dir=str(tmp_path))
    assert splits.levels == 256 and [examples.count for examples in splits[:3]] == [55_000, 5000, 10_000]
    train = [np.concatenate(parts) for parts in zip(splits.train, splits.validation, strict=True)]
    for x, y, split in [(*train, "train"), (*splits.test, "t10k")]:
        raw = gzip.open(source / f"{split}-images-idx3-ubyte.gz").read()
        assert struct.unpack(">IIII", raw[:16]) == (2051, len(x), 28, 28)
        assert np.rint((x + 1) * 127.5).astype(np.uint8).tobytes() == raw[16:]
        assert y.astype(np.uint8).tobytes() == gzip.open(source / f"{split}-labels-idx1-ubyte.gz").read()[8:]
    assert np.bincount(train[1]).tolist() == counts
    assert (train[0].mean() + 1) / 2 == pytest.approx(mean, abs=5e-5)
    assert train[0].std() / 2 == pytest.approx(std, abs=5e-5)
    assert "tensorflow" not in sys.modules


def test_prepared_records_are_read_without_their_source(small, tmp_path):
    original, folder, written = small
    assert_is(load(original, source_dir=str(folder), data_dir=str(tmp_path / "d")), written)
    (folder / LABELS).unlink()
    assert_is(load(original, source_dir="no such folder", data_dir=str(tmp_path / "d")), written)
    assert_is(load(original, data_dir=str(tmp_path / "d")), written)
    assert "tensorflow" not in sys.modules


def test_unverified_files_of_the_format_are_read_and_kept_apart(small, tmp_path):
    _, folder, written = small
    read_again = lambda: mnist(validation=5, source_dir=str(folder), data_dir=str(tmp_path / "d"), verify=False)
    assert_is(read_again(), written)
    assert_is(read_again(), written)
    other = originals.idx(folder, train=9)
    assert_is(read_again(), other)  # changed files are other data
    with pytest.raises(FileNotFoundError, match="gone"):
        mnist(validation=5, source_dir=str(tmp_path / "gone"), data_dir=str(tmp_path / "d"))


def test_a_download_is_verified_kept_and_read_once(small, tmp_path):
    original, folder, written = small
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        table = tmp_path / "checksums.tsv"
        originals.checksums(folder, table, f"http://127.0.0.1:{server.server_port}")
        assert_is(load(original, data_dir=str(tmp_path / "d")), written)
        assert sorted(requests) == sorted(f"/{path.name}" for path in folder.iterdir())
        assert_is(load(original, data_dir=str(tmp_path / "d")), written)
        assert len(requests) == 4
        good = table.read_text()
        table.write_text(good.replace("\t" + good.split("\t")[2], "\t" + "0" * 64))
        with pytest.raises(OSError, match="cannot download small .*0000.*source_dir") as caught:
            load(original, data_dir=str(tmp_path / "other"))
        # TFDS's other downloads may still be running: os.walk, unlike rglob, does not mind a folder that goes
        kept = [name for *_, names in os.walk(tmp_path / "other") for name in names if "array_record" in name]
        assert "\n" not in str(caught.value) and not kept
    finally:
        server.shutdown()
        server.server_close()


def test_no_network_is_one_sentence_with_the_files_to_fetch(small, tmp_path, monkeypatch):
    from tensorflow_datasets.core.download import downloader

    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)  # 10 tries take 204 s
    original, _, _ = small
    originals.checksums(tmp_path / "source", tmp_path / "checksums.tsv", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OSError, match=f"cannot download small.*127.0.0.1:9/{IMAGES}.*source_dir") as caught:
        load(original, data_dir=str(tmp_path / "d"))
    assert "\n" not in str(caught.value)


def test_registered_files_have_an_address_a_size_and_a_checksum():
    for original in (MNIST, FASHION_MNIST):
        files = preparation.registered(original)
        assert list(files) == [*original.train[0], *original.test[0]]
        for name, (url, info) in files.items():
            assert url.endswith(name) and info.size > 1000 and len(bytes.fromhex(info.checksum)) == 32


def test_a_file_of_another_checksum_is_refused_with_both(small, tmp_path):
    original, folder, _ = small
    _, info = preparation.registered(original)[LABELS]
    data = bytearray((folder / LABELS).read_bytes())
    data[5] ^= 1  # the time stamp in the header of a gzip file: its content is unchanged
    (folder / LABELS).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    message = rf"{LABELS}: .* {digest}, .* {len(data)} bytes of {info.checksum}"
    with pytest.raises(ValueError, match=message):
        load(original, source_dir=str(folder), data_dir=str(tmp_path / "d"))
    assert not list((tmp_path / "d").rglob("*.array_record*")) and not list((tmp_path / "d").rglob("incomplete*"))


def test_a_missing_file_is_named_with_what_to_do(small, tmp_path):
    original, folder, _ = small
    (folder / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=f"^source_dir=.*{LABELS} of small not found"):
        load(original, source_dir=str(folder), data_dir=str(tmp_path / "d"))


def idx_of(values, magic):
    return gzip.compress(struct.pack(">I", magic) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (IMAGES, lambda data: data[: len(data) // 2], "end-of-stream"),
        (IMAGES, lambda data: data[:100] + bytes(50) + data[150:], "damaged"),
        (IMAGES, lambda data: b"<html>not found</html>", "Not a gzipped file"),
        (IMAGES, lambda data: gzip.compress(gzip.decompress(data)[:-1]), "no idx file of unsigned bytes with 3 axes"),
        (IMAGES, lambda data: gzip.compress(b"abc"), "no idx file"),
        (LABELS, lambda data: idx_of(np.zeros(6, np.uint8), 0x801), "7 images, but 6 labels"),
        (LABELS, lambda data: idx_of(np.zeros(7, np.uint8), 0x803), "no idx file of unsigned bytes with 1 axes"),
        (IMAGES, lambda data: idx_of(np.zeros((20, 8, 8), np.uint8), 0x803), r"image 0 has shape \(8, 8, 1\)"),
    ],
)
def test_a_damaged_file_is_named_and_leaves_nothing(name, change, message, small, tmp_path):
    _, folder, _ = small
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        mnist(validation=5, source_dir=str(folder), data_dir=str(tmp_path / "d"), verify=False)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not list((tmp_path / "d").rglob("*.array_record*")) and not list((tmp_path / "d").rglob("incomplete*"))


KILLED = """
import os, signal, sys
from fmjax.data import images
from fmjax.data.mnist import MNIST, read_idx

def read(paths, split):
    for i, example in enumerate(read_idx(paths, split)):
        if i == 5 and "t10k" in paths[0].name:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example

original = MNIST._replace(name="small", registered=sys.argv[1], read=read)
images.load_images(original, source_dir=sys.argv[2], data_dir=sys.argv[3])
"""


def test_a_killed_preparation_looks_incomplete_and_is_removed(small, tmp_path):
    original, folder, written = small
    command = [sys.executable, "-c", KILLED, original.registered, str(folder), str(tmp_path / "d")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True)
    assert done.returncode == -9, done.stderr[-2000:]
    assert list((tmp_path / "d").rglob("incomplete*")) and not (tmp_path / "d/fmjax_small/1.0.0").exists()
    assert_is(load(original, source_dir=str(folder), data_dir=str(tmp_path / "d")), written)
    assert not list((tmp_path / "d").rglob("incomplete*"))


def test_a_second_process_waits_for_the_one_that_prepares(small, tmp_path):
    import fcntl

    original, folder, written = small
    lock = tmp_path / "d/fmjax_small/.lock"
    lock.parent.mkdir(parents=True)
    results = []
    prepare = lambda: results.append(load(original, source_dir=str(folder), data_dir=str(tmp_path / "d")))
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread = threading.Thread(target=prepare)
        thread.start()
        thread.join(1.0)
        assert thread.is_alive() and os.listdir(lock.parent) == [".lock"]
    thread.join(60)
    assert_is(results[0], written)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("*-test.array_record*", lambda data: data[:100]),
        ("dataset_info.json", lambda data: b""),
        ("dataset_info.json", lambda data: b"[]"),
        ("dataset_info.json", lambda data: b'{"splits": 3}'),
        ("dataset_info.json", lambda data: 100_000 * b"["),
        ("dataset_info.json", lambda data: data.replace(b"20", b"99999999999")),
        ("features.json", lambda data: b"\xff"),
    ],
)
def test_torn_records_are_refused_with_their_folder(name, change, stream, small, tmp_path):
    original, folder, _ = small
    where = {"source_dir": str(folder), "data_dir": str(tmp_path / "d")}
    load(original, **where)
    (file,) = (tmp_path / "d").rglob(name)
    data = change(file.read_bytes())
    file.unlink() if data is None else file.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"data_dir=.*fmjax_small.*: the records cannot be read") as caught:
        load(original, stream=stream, **where)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:100],
        lambda data: None,
        lambda data: data[:-70] + bytes([data[-70] ^ 1]) + data[-69:],
        lambda data: originals.npy(np.zeros(20, np.int32)),
        lambda data: originals.npy(np.zeros(19, np.int32)),
    ],
)
def test_damaged_labels_are_made_again_from_the_records(change, small, tmp_path, caplog):
    original, folder, written = small
    where = {"source_dir": str(folder), "data_dir": str(tmp_path / "d")}
    load(original, **where)
    (file,) = (tmp_path / "d").rglob("train-labels.npy")
    good = file.read_bytes()
    data = change(good)
    file.unlink() if data is None else file.write_bytes(data)
    assert_is(load(original, **where), written)
    assert "made again from the records" in caplog.text and "train-labels.npy" in caplog.text
    assert file.read_bytes() == good


@pytest.mark.parametrize("name", ["dataset_info.json", "train-labels.npy"])
def test_a_pipe_among_records_is_refused_and_not_waited_for(name, small, tmp_path):
    original, folder, _ = small
    where = {"source_dir": str(folder), "data_dir": str(tmp_path / "d")}
    load(original, **where)
    (file,) = (tmp_path / "d").rglob(name)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(RuntimeError, match="the records cannot be read .is a pipe"):
        load(original, **where)


@pytest.mark.parametrize("couple", [None, couplings.minibatch_ot(by_class=False)])
@pytest.mark.parametrize("process", [None, 0, 1])
def test_batches_from_disk_are_those_from_memory(couple, process, small, tmp_path):
    """Bit for bit, over two epochs, mirrored, with labels, for the global batch and for each of two processes."""
    original, folder, _ = small
    where = {"source_dir": str(folder), "data_dir": str(tmp_path / "d")}
    memory, disk = (load(original, stream=stream, **where) for stream in (False, True))
    assert isinstance(disk.train.x, images.Records) and isinstance(memory.train.x, np.ndarray)
    options = {} if process is None else {"process_index": process, "process_count": 2}
    a, b = (
        batches(s.train.x, s.train.cond, batch_size=6, seed=1, couple=couple, flip=True, **options)
        for s in (memory, disk)
    )
    for step in (6, 3, 0, 1, 2):
        jax.tree.map(np.testing.assert_array_equal, a(step), b(step))
    assert (disk.test.x[:] == memory.test.x).all() and (disk.test.x[2:4] == memory.test.x[2:4]).all()
    assert disk.test.x[np.array([], int)].shape == (0, 28, 28, 1)


def test_images_on_disk_do_not_slip_into_memory(small, tmp_path):
    original, folder, _ = small
    x = load(original, source_dir=str(folder), data_dir=str(tmp_path / "d"), stream=True).train.x
    with pytest.raises(ValueError, match="stream=True: 15 images on disk"):
        np.asarray(x)


def test_preparing_holds_a_few_images_in_memory_not_all(small, tmp_path):
    original, folder, _ = small
    alive = []

    def read(paths, split):
        for i in range(200):
            image = np.full((28, 28, 1), i, np.uint8)
            alive.append(weakref.ref(image))
            yield image, i
            assert sum(r() is not None for r in alive) <= 3

    original = original._replace(read=read, classes=200)
    x = load(original, source_dir=str(folder), data_dir=str(tmp_path / "d")).train.x
    assert (np.rint((x[:, 0, 0, 0] + 1) * 127.5) == np.arange(195)).all()


def test_the_records_are_a_source_for_grain(small, tmp_path):
    """Whoever wants another pipeline has grain's own transformations."""
    grain = pytest.importorskip("grain")
    original, folder, written = small
    x = load(original, source_dir=str(folder), data_dir=str(tmp_path / "d"), stream=True).train.x
    epoch = list(grain.MapDataset.source(x.source).shuffle(seed=0))
    assert sorted(r["image"].tobytes() for r in epoch) == sorted(image.tobytes() for image in written["train"][0][:15])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"verify": False}, "^verify=False: .*source_dir"),
        ({"validation": 1}, "^validation=1: "),
        ({"data_dir": "gs://bucket/data"}, "^data_dir=gs://bucket/data: "),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mnist(**options)


def test_a_data_dir_that_cannot_be_written_is_refused(small, tmp_path):
    original, folder, _ = small
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="^data_dir=.*file"):
        load(original, source_dir=str(folder), data_dir=str(tmp_path / "file/d"))
