"""Read weights from files of PyTorch (``.pt``, ``.pth``, ``.ckpt``, ``.pkl``) and ``.safetensors``, executing nothing.

A ``.pt`` file is a zip archive of one pickle and the raw bytes of its tensors; a ``.pkl`` file is a pickle with these
bytes in it. A pickle is a program. This reader knows the few names that rebuild tensors and dictionaries, and refuses a
file that names another function before that function is called. A file cannot change the functions that are called,
and they use memory of the order of the file's size. A file can therefore contain wrong numbers, but cannot run code.
"""

from __future__ import annotations

import collections
import io
import json
import math
import pickle
import pickletools
import reprlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fmjax.storage.files import write_bytes

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
SAFETENSORS = {  # in the order of the tensors in a file
    "I64": np.int64,
    "F64": np.float64,
    "F32": np.float32,
    "I32": np.int32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NESTING = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET", "REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX")
DEEPEST = 500


def read(path: str | Path, *, extra: Mapping[str, Callable] | None = None) -> Any:
    """Read a file written by ``torch.save``, ``pickle.dump`` or ``safetensors``.

    Args:
        path: the file; its ending determines the format.
        extra: further functions that a pickle may call: from the pickled name (``"module.name"``) to a replacement,
            which gets the pickled arguments. A replacement should only store them.

    Returns:
        Dictionaries, lists, tuples, numbers, strings and numpy arrays.

    Raises:
        ValueError: the file is damaged, has another format, or names a function that is not known.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                return _safetensors(file.read())
            if path.suffix == ".pkl":
                return _pickled(file.read(), {**KNOWN, "torch.storage._load_from_bytes": _storage, **(extra or {})})
            if not zipfile.is_zipfile(file):
                raise ValueError("not a zip archive. Save it by torch.save of PyTorch 1.6 or newer, or as .safetensors")
            with zipfile.ZipFile(file) as archive:
                return _archive(archive, path.stat().st_size, {**KNOWN, **(extra or {})})
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail anywhere
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as weights: {str(error)[:200] or type(error).__name__}")


class _Fixed:
    """An object that a pickle may use and whose state it may not set; the default would write to its attributes."""

    __slots__ = ()

    def __setstate__(self, state):
        raise ValueError("it changes a function that rebuilds its tensors")


class _Tensor(_Fixed):
    """A rebuilt tensor, while the pickle is loaded: an object without methods that a pickle could call."""

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray):
        self.array = array


class _Storage(_Fixed):
    """The type of a storage, named by a pickle; or its elements, once loaded."""

    __slots__ = ("elements",)

    def __init__(self, elements):
        self.elements = elements


class _Call(_Fixed):
    """A function that a pickle may call."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)


def _rebuild(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
    """A view into the storage; refused unless it lies inside and has at most as many elements as the storage."""
    elements, size, stride = storage.elements, tuple(size), tuple(stride)
    whole = all(type(n) is int and n >= 0 for n in (offset, *size, *stride)) and len(size) == len(stride)
    if not isinstance(elements, np.ndarray) or not whole:
        raise ValueError(f"there is no tensor of size {size} and stride {stride}")
    end = offset + sum((n - 1) * m for n, m in zip(size, stride, strict=True)) + 1 if math.prod(size) else offset
    if end > elements.size:
        raise ValueError(f"a tensor reaches to element {end} of a storage of {elements.size}")
    if math.prod(size) > elements.size:
        raise ValueError(f"a tensor of size {size} repeats the {elements.size} elements of its storage")
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
    def __init__(self, file, known: Mapping[str, Any], fetch: Callable[[Any, str, int], np.ndarray] | None = None):
        super().__init__(file, encoding="utf-8")
        self.fetch, self.known, self.fetched = fetch, known, {}

    def find_class(self, module: str, name: str) -> Any:
        whole = f"{module}.{name}"
        if whole not in self.known:
            raise ValueError(
                f"it names {whole:.80}, which does not rebuild tensors or dictionaries. "
                "Save the state dict alone, or give a replacement in extra"
            )
        known = self.known[whole]
        return known if isinstance(known, (type, _Fixed)) else _Call(known)

    def persistent_load(self, reference: Any) -> _Storage:
        kinds = [type(r) for r in reference[1:5]] if type(reference) is tuple else None
        if self.fetch is None or kinds != [_Storage, str, str, int] or any(r is not None for r in reference[5:]):
            raise ValueError(f"it refers to {reprlib.repr(reference)}, which is not a storage")
        _, storage, key, _, count = reference[:5]
        if key not in self.fetched:
            self.fetched[key] = _Storage(self.fetch(storage.elements, key, count))
        return self.fetched[key]


def _check(data: bytes, start: int = 0) -> None:
    """Refuse a pickle that would use memory or stack out of proportion, before any of it is loaded.

    Refused are a memo place beyond the number of opcodes (Python allocates a table of that length) and tuples nested
    deeper than ``DEEPEST``, whose hash overflows the stack. The depths are followed opcode by opcode.
    """
    file, depths, memo = io.BytesIO(data), [], {}  # depths of what is on the stack, None for a mark
    file.seek(start)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if argument > count:
                raise ValueError(f"its opcode {count} writes to place {argument} of the memo")
            memo[argument] = depths[-1]
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = depths[-1]
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            depths.append(memo[argument])
        elif opcode.name == "MARK":
            depths.append(None)
        else:
            before = opcode.stack_before
            least = before.index(pickletools.markobject) if pickletools.markobject in before else len(before)
            if least < len(before):
                least += len(depths) - max(i for i, depth in enumerate(depths) if depth is None)
            used = [depths.pop() for _ in range(least)]
            deep = max((depth for depth in used if depth is not None), default=0) + (opcode.name in NESTING)
            if deep > DEEPEST:
                raise ValueError(f"it nests tuples more than {DEEPEST} deep")
            depths += [deep] * len(opcode.stack_after)


def _pickled(data: bytes, known: Mapping[str, Any]) -> Any:
    _check(data)
    return _plain(_Unpickler(io.BytesIO(data), known).load())


def _storage(data: bytes) -> _Storage:
    """Read the storage of a pickled tensor: five pickles (magic number, version, machine, type, key), then bytes.

    This is the format of ``torch.save`` before 1.6, which ``pickle.dump`` still writes for a storage.
    """
    if type(data) is not bytes:
        raise ValueError(f"a storage is bytes, got {type(data).__name__}")
    file, types = io.BytesIO(data), {name: kind for name, kind in KNOWN.items() if isinstance(kind, _Storage)}

    def load(fetch=None):
        _check(data, file.tell())
        return _Unpickler(file, types, fetch).load()

    if load() != 0x1950A86A20F9469CFC6C or load() != 1001:
        raise ValueError("a storage begins with another magic number or version than PyTorch's")
    if load().get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine, and this reader is for little-endian files")
    references = []
    storage = load(lambda dtype, key, count: references.append((np.dtype(dtype), key, count)))
    if len(references) != 1 or type(storage) is not _Storage or load() != [references[0][1]]:
        raise ValueError("a storage holds something else")
    dtype, _, count = references[0]
    length, raw = file.read(8), file.read()
    if length != count.to_bytes(8, "little", signed=True) or len(raw) != count * dtype.itemsize:
        raise ValueError(f"a storage of {count} elements has {len(raw)} bytes")
    storage.elements = np.frombuffer(raw, dtype)
    return storage


def _archive(archive: zipfile.ZipFile, size: int, known: Mapping[str, Any]) -> Any:
    if (unpacked := sum(info.file_size for info in archive.infolist())) > size:
        raise ValueError(f"it unpacks to {unpacked} bytes from {size}, and PyTorch does not compress its archives")
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"it holds {len(pickles)} files data.pkl, and a checkpoint of PyTorch has one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine, and this reader is for little-endian files")

    def fetch(dtype, key: str, count: int) -> np.ndarray:
        raw = archive.read(f"{root}data/{key}")
        if len(raw) != count * np.dtype(dtype).itemsize:
            raise ValueError(f"storage {key} of {count} elements has {len(raw)} bytes")
        return np.frombuffer(raw, dtype)

    program = archive.read(pickles[0])
    _check(program)
    return _plain(_Unpickler(io.BytesIO(program), known, fetch).load())


def _plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """Replace tensors by arrays in dictionaries, lists and tuples; each once, however often the pickle refers to it."""
    done = {} if done is None else done
    if isinstance(value, _Fixed) and not isinstance(value, _Tensor):
        raise ValueError("it holds a function that rebuilds tensors, not called")
    if isinstance(value, _Tensor):
        return value.array
    if not isinstance(value, dict) and type(value) not in (list, tuple):
        return value
    if id(value) not in done:
        done[id(value)] = _OPEN
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        plain = {key: _plain(v, done) for key, v in parts}
        done[id(value)] = plain if isinstance(value, dict) else type(value)(plain.values())
    if done[id(value)] is _OPEN:
        raise ValueError("it holds a container that contains itself")
    return done[id(value)]


_OPEN = object()  # marks a container whose parts are being converted


def _safetensors(data: bytes) -> dict[str, np.ndarray]:
    """Read eight bytes of length, a JSON table of types, shapes and offsets, then the bytes of the tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < start:
        raise ValueError(f"it has {len(data)} bytes, and its table alone needs {start}")
    table, arrays = json.loads(data[8:start]), {}
    for name, entry in table.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS:
            raise ValueError(f"{name} has type {entry['dtype']}; known are {', '.join(SAFETENSORS)}")
        dtype, (begin, end) = np.dtype(SAFETENSORS[entry["dtype"]]), entry["data_offsets"]
        raw = data[start + begin : start + end]
        if not 0 <= begin <= end or len(raw) != dtype.itemsize * math.prod(entry["shape"]):
            raise ValueError(f"{name} of shape {entry['shape']} and type {entry['dtype']} has {len(raw)} bytes")
        arrays[name] = np.frombuffer(raw, dtype).reshape(entry["shape"])
    return arrays


def metadata(path: str | Path) -> dict[str, str]:
    """Read the strings beside the tensors of a ``.safetensors`` file.

    Args:
        path: the file.

    Returns:
        The strings by name; empty where there are none.

    Raises:
        ValueError: the file cannot be read.
    """
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return json.loads(file.read(length)).get("__metadata__", {})
        except (ValueError, AttributeError, MemoryError, OverflowError) as error:
            raise _unreadable(path, error) from error


def write(path: str | Path, arrays: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as ``.safetensors``, byte for byte as the package safetensors does.

    Args:
        path: the file.
        arrays: arrays by name.
        metadata: strings to store beside them, by name.

    Raises:
        ValueError: the format does not have the type of an array.
    """
    names = {np.dtype(kind): name for name, kind in SAFETENSORS.items()}
    arrays = {name: np.asarray(a) for name, a in arrays.items()}
    for name, a in arrays.items():
        if a.dtype not in names:
            raise ValueError(f"{name} has type {a.dtype}. A safetensors file holds {', '.join(map(str, names))}.")
    order = sorted(arrays, key=lambda name: ([*names].index(arrays[name].dtype), name))
    table, at = {"__metadata__": dict(metadata)} if metadata else {}, 0
    for name in order:
        a = arrays[name]
        table[name] = {"dtype": names[a.dtype], "shape": a.shape, "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    head = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)  # tensors begin at a multiple of eight
    write_bytes(path, b"".join([len(head).to_bytes(8, "little"), head, *(arrays[name].tobytes() for name in order)]))
