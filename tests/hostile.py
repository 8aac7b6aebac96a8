"""Hostile files, one function for each kind, and a process that reads them and measures what they cost.

``python hostile.py FOLDER`` writes every file, reads it in a fork, and prints one line of JSON for each: what the
reader raised, its CPU seconds, and the growth of its memory. ``test_hostile_files.py`` compares them with the bounds.
"""

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path

import hostile_arrays  # noqa: F401  enters its files
import hostile_networks  # noqa: F401
from hostile_pickles import FILES, HARMLESS  # noqa: F401


def read(reader, path):
    from fmjax.convert import edm, weights
    from fmjax.data import arrays, preparation
    from fmjax.storage import files

    if reader in ("pictures", "cifar10", "idx", "npzs"):
        from fmjax.data import imagenet
        from fmjax.data.cifar10 import CIFAR10
        from fmjax.data.mnist import MNIST

        original = {
            "pictures": imagenet.archives(32, "downsampled"), "npzs": imagenet.archives(32, "resized"),
            "cifar10": CIFAR10,
            "idx": MNIST._replace(train=((path.name, path.name),)),
        }[reader]  # fmt: skip
        if reader != "idx":
            original = original._replace(train=((path.name,),))
        (examples,) = preparation._shards(original, {path.name: path}, "train", path.parent)
        return [None for _ in examples()]
    if reader == "convert":
        from fmjax.experiments import convert

        return convert.convert_file(
            path, path.parent / "run", options={"size": 8} if b"time_embed" in beginning(path) else {}
        )
    call = {
        "weights": weights.read_weights, "metadata": weights.metadata, "edm": edm.read_snapshot,
        "json": files.read_json,
        "array": files.read_array, "jsonl": lambda path: list(files.read_jsonl(path)),
        "arrays": lambda path: arrays(path=str(path)), "stream": lambda path: arrays(path=str(path), stream=True),
    }  # fmt: skip
    return call[reader](path)


def beginning(path):
    return path.read_bytes()[:2000] if path.is_file() and path.stat().st_size < 2**26 else b""


def measure(reader, path):
    """Read a file in this process; return what was raised, the CPU seconds and the growth of the memory in bytes."""
    os.chdir(path.parent)
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    usage = lambda: resource.getrusage(resource.RUSAGE_SELF)
    before, raised = usage(), {}
    try:
        read(reader, path)
    except BaseException as error:
        expected = isinstance(error, (ValueError, OSError))
        raised = {
            "type": type(error).__name__,
            "message": str(error),
            "trace": None if expected else traceback.format_exc(),
        }
    after = usage()
    size = path.stat().st_size if path.is_file() else 0
    return {
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "bytes": 1024 * (after.ru_maxrss - before.ru_maxrss), "size": size,
        "ran": (path.parent / "ran").exists(), **raised,
    }  # fmt: skip


def main(folder, names):
    import jax  # noqa: F401  all modules are loaded before the forks

    from fmjax.convert import edm, weights  # noqa: F401
    from fmjax.data import cifar10, digits, images  # noqa: F401
    from fmjax.experiments import convert  # noqa: F401

    places = {name: Path(folder) / str(i) for i, name in enumerate(names or FILES)}
    if not (child := os.fork()):  # a process of their own writes the files: it uses much memory
        for name, place in places.items():
            place.mkdir()
            FILES[name][1](place)
        os._exit(0)
    os.waitpid(child, 0)
    for name, place in places.items():
        (path,) = (place / entry for entry in os.listdir(place))
        sys.stdout.flush()
        start = time.monotonic()
        if not (child := os.fork()):
            result = measure(FILES[name][0], path)
            print(json.dumps({"name": name, "path": str(path), **result, "seconds": time.monotonic() - start}))
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        if path.is_file():
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
