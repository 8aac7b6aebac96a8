"""Weights from files of PyTorch (``.pt``, ``.pth``, ``.ckpt``) and ``.safetensors``, nothing in them executed.

A ``.pt`` file is a zip archive of one pickle and the raw bytes of its tensors. A pickle is a program; this reader knows
the handful of names that rebuild tensors and dictionaries and refuses a file that asks for any other, before it is
called. So a file can give wrong numbers, but run no code.
"""

from __future__ import annotations

import collections
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read(path: str | Path, *, extra: Mapping[str, Callable] | None = None) -> Any:
    """What ``torch.save`` or ``safetensors`` wrote: dictionaries, lists, tuples, numbers, strings; tensors as numpy.

    ``extra`` maps further names a pickle may call (``"module.name"``) to what stands for them here: a function given
    the pickled arguments, best one that only keeps them.

    Raises ``ValueError`` for a file that is damaged, of another format, or asks for a name that is not known.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _safetensors(file.read())
            if not zipfile.is_zipfile(file):
                raise ValueError(
                    "it is no zip archive; save it by torch.save of PyTorch 1.6 or newer, or as .safetensors"
                )
            with zipfile.ZipFile(file) as archive:
                return _archive(archive, {**KNOWN, **(extra or {})})
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail anywhere
        raise ValueError(f"{path} cannot be read as weights: {error or type(error).__name__}") from error


class _Tensor:
    """A rebuilt tensor, until the pickle has ended: an object without methods that a pickle could call."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray):
        self.array = array


class _Storage:
    """The type of a storage, named by a pickle; or its elements, once loaded."""

    __slots__ = ("elements",)

    def __init__(self, elements):
        self.elements = elements


def _rebuild(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
    """A view into the storage, only if all of it lies inside."""
    elements, size, stride = storage.elements, tuple(size), tuple(stride)
    whole = all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) and len(size) == len(stride)
    if not isinstance(elements, np.ndarray) or not whole:
        raise ValueError(f"there is no tensor of size {size} and stride {stride}")
    end = offset + sum((n - 1) * m for n, m in zip(size, stride, strict=True)) + 1 if math.prod(size) else offset
    if end > elements.size:
        raise ValueError(f"a tensor reaches to element {end} of a storage of {elements.size}")
    strides = [m * elements.itemsize for m in stride]
    return _Tensor(np.lib.stride_tricks.as_strided(elements[offset:], size, strides, writeable=False))


KNOWN = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_parameter": lambda data, requires_grad=True, hooks=None: data,
    "torch.Size": tuple,
    **{f"torch.{name}": _Storage(dtype) for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, fetch: Callable[[Any, str, int], np.ndarray], known: Mapping[str, Any]):
        super().__init__(file, encoding="utf-8")
        self.fetch, self.known, self.fetched = fetch, known, {}

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole not in self.known:
            raise ValueError(
                f"it asks for {whole}, which is not among the names that rebuild tensors and dictionaries; "
                "save its state dict alone, or say in extra what stands for it"
            )
        return self.known[whole]

    def persistent_load(self, reference: Any) -> _Storage:
        if type(reference) is not tuple or [type(r) for r in reference[1:]] != [_Storage, str, str, int]:
            raise ValueError(f"it refers to {reference!r}, which is no storage")
        _, storage, key, _, count = reference
        if key not in self.fetched:
            self.fetched[key] = _Storage(self.fetch(storage.elements, key, count))
        return self.fetched[key]


def _archive(archive: zipfile.ZipFile, known: Mapping[str, Any]) -> Any:
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"it holds {len(pickles)} files data.pkl, and a checkpoint of PyTorch has one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine, whose byte order is not read here")

    def fetch(dtype, key: str, count: int) -> np.ndarray:
        raw = archive.read(f"{root}data/{key}")
        if len(raw) != count * np.dtype(dtype).itemsize:
            raise ValueError(f"storage {key} of {count} elements has {len(raw)} bytes")
        return np.frombuffer(raw, dtype)

    return _plain(_Unpickler(io.BytesIO(archive.read(pickles[0])), fetch, known).load())


def _plain(value: Any) -> Any:
    if isinstance(value, _Tensor):
        return value.array
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Eight bytes of length, a JSON table of types, shapes and offsets, then the bytes of the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < start:
        raise ValueError(f"it has {len(data)} bytes, and its table alone needs {start}")
    table, found = json.loads(data[8:start]), {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS:
            raise ValueError(f"{name} has type {entry['dtype']}; known are {', '.join(SAFETENSORS)}")
        dtype, (begin, end) = np.dtype(SAFETENSORS[entry["dtype"]]), entry["data_offsets"]
        raw = data[start + begin : start + end]
        if not 0 <= begin <= end or len(raw) != dtype.itemsize * math.prod(entry["shape"]):
            raise ValueError(f"{name} of shape {entry['shape']} and type {entry['dtype']} has {len(raw)} bytes")
        found[name] = np.frombuffer(raw, dtype).reshape(entry["shape"])
    return found
