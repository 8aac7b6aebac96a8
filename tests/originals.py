"""Small image sets in the formats in which the real ones are published, written by hand."""

import gzip
import hashlib
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).parents[2] / "shared/data"


def pixels(n, shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), rng.integers(0, 10, n, np.uint8)


def idx(folder, train=20, test=7, shape=(28, 28)):
    """The four files of the MNIST family; returns the arrays that were written."""
    arrays = {}
    for i, (split, n) in enumerate({"train": train, "t10k": test}.items()):
        x, y = arrays[split] = pixels(n, shape, i)
        head = struct.pack(">IIII", 0x803, n, *shape)
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + x.tobytes(), 1))
        head = struct.pack(">II", 0x801, n)
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + y.tobytes(), 1))
    return arrays


def checksums(folder, table, address="http://nowhere.invalid"):
    """A table as TFDS registers them: address, size, SHA-256 and name of each file of the folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    rows = [
        (f"{address}/{p.name}", str(p.stat().st_size), hashlib.sha256(p.read_bytes()).hexdigest(), p.name)
        for p in files
    ]
    table.write_text("".join("\t".join(row) + "\n" for row in rows))


def cifar10(folder, train=20, test=7):
    """``cifar-10-binary.tar.gz`` with its files in another order than they are read."""
    written = {"train": pixels(train, (32, 32, 3)), "test": pixels(test, (32, 32, 3), 1)}
    members = dict(zip((f"data_batch_{i}.bin" for i in range(1, 6)), np.array_split(np.arange(train), 5), strict=True))
    rows = {name: ("train", rows) for name, rows in members.items()} | {"test_batch.bin": ("test", np.arange(test))}
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        add(tar, "cifar-10-batches-bin/batches.meta.txt", b"airplane\n")
        for name, (split, part) in sorted(rows.items(), reverse=True):
            x, y = written[split]
            planes = np.moveaxis(x[part], 3, 1).reshape(len(part), -1)
            add(tar, f"cifar-10-batches-bin/{name}", np.concatenate([y[part, None], planes], 1).tobytes())
    return written


def imagenet_npz(folder, size=64, counts=(9, 4, 11), test=7):
    """The archives of the resized ImageNet of one size: npz files of planes and labels from 1, zipped."""
    written = {"train": pixels(sum(counts), (size, size, 3)), "test": pixels(test, (size, size, 3), 1)}
    parts = [("train_part1", [0, 1]), ("train_part2", [2])] if size == 64 else [("train", [0, 1, 2])]
    batches = dict(enumerate(np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])))
    for part, numbers in [*parts, ("val", None)]:
        with zipfile.ZipFile(folder / f"Imagenet{size}_{part}_npz.zip", "w") as archive:
            for i in numbers if numbers is not None else [None]:
                x, y = written["test" if i is None else "train"]
                rows = np.arange(test) if i is None else batches[i]
                file = io.BytesIO()
                planes = np.moveaxis(x[rows], 3, 1).reshape(len(rows), -1)
                np.savez(file, data=planes, labels=y[rows].astype(np.int64) + 1, mean=np.zeros(3))
                archive.writestr("val_data.npz" if i is None else f"train_data_batch_{i + 1}.npz", file.getvalue())
    return written


def imagenet_png(folder, size=64, train=6, test=4):
    """The archives of the downsampled ImageNet of one size: PNG files, in a tar."""
    written = {}
    for i, (split, n) in enumerate({"train": train, "valid": test}.items()):
        x, _ = pixels(n, (size, size, 3), i)
        with tarfile.open(folder / f"{split}_{size}x{size}.tar", "w") as tar:
            for j, image in enumerate(x):
                file = io.BytesIO()
                Image.fromarray(image).save(file, "png")
                add(tar, f"{split}_{size}x{size}/{j:07d}.png", file.getvalue())
        written[split] = x, np.zeros(n, np.uint8)
    return written


def assert_is(data, written):
    """What was loaded is what was written, pixel for pixel and in order."""
    assert data.levels == 256
    for parts, (bytes_, labels) in zip((data[:2], data[2:3]), written.values(), strict=True):
        x = np.concatenate([part.x[:] for part in parts])
        assert all(part.x.dtype == np.float32 for part in parts) and x.shape[:3] == bytes_.shape[:3]
        np.testing.assert_allclose(x, bytes_.reshape(x.shape) / 127.5 - 1, atol=1.2e-7)  # a rounding below 2
        if not data.classes:
            assert all(part.cond is None for part in parts)
            continue
        assert all(part.cond.dtype == np.int32 for part in parts)
        assert (np.concatenate([part.cond for part in parts]) == labels).all()


def npy(array):
    """The bytes of a npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def add(tar, name, data):
    """One file of an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
