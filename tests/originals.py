"""Small image sets in the formats in which the real ones are published, written by hand."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

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
