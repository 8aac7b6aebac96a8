"""Read weights from files of PyTorch (``.pt``, ``.pth``, ``.ckpt``, ``.pkl``) and ``.safetensors``, executing nothing.

A ``.pt`` file is a zip archive of one pickle and the raw bytes of its tensors; a ``.pkl`` file is a pickle with these
bytes in it. A pickle is a program. This reader knows the few names that rebuild tensors and dictionaries, and refuses a
file that names another function before that function is called. A file cannot change the functions that are called,
and they use memory of the order of the file's size. A file can therefore contain wrong numbers, but cannot run code.
"""

from __future__ import annotations

import functools
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from fmjax.convert import pickles
from fmjax.convert.budgets import Budget, Call, Fixed
from fmjax.storage import untrusted
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
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
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
DTYPES = {  # a tensor of an untyped storage states its type
    "torch.float32": np.float32,
    "torch.float64": np.float64,
    "torch.float16": np.float16,
    "torch.bfloat16": ml_dtypes.bfloat16,
    "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch.float8_e5m2": ml_dtypes.float8_e5m2,
    "torch.int64": np.int64,
    "torch.int32": np.int32,
    "torch.int16": np.int16,
    "torch.int8": np.int8,
    "torch.uint8": np.uint8,
    "torch.uint16": np.uint16,
    "torch.uint32": np.uint32,
    "torch.uint64": np.uint64,
    "torch.bool": np.bool_,
    "torch.complex64": np.complex64,
    "torch.complex128": np.complex128,
}
OTHERS = {  # how files begin that were fetched in place of weights
    b"version https://git-lfs": "is a git-lfs pointer, not the weights. Run git lfs pull",
    b"<!doctype": "is a web page, not the weights. Download the file itself",
    b"<html": "is a web page, not the weights. Download the file itself",
}


def read_weights(path: str | Path, *, extra: Mapping[str, Callable] | None = None) -> Any:
    """Read a file written by ``torch.save``, ``pickle.dump`` or ``safetensors``.

    Nothing in the file is executed. Reading takes at most four times the size of the file plus 64 MB of memory, and a
    pickle that takes more work than weights do is refused (``convert.budgets``). Keys are text or numbers. A ``device``
    or a ``dtype`` becomes its name.

    Args:
        path: the file; its ending determines the format.
        extra: further functions that a pickle may call: from the pickled name (``"module.name"``) to a replacement,
            which gets the pickled arguments. A replacement should only store them.

    Returns:
        Dictionaries, lists, tuples, sets, numbers, strings, bytes and numpy arrays.

    Raises:
        ValueError: the file is damaged, has another format, names a function that is not known, or is not a file.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    try:
        with untrusted.open_file(path) as file:
            size = untrusted.size_of(file)
            _check_beginning(file)
            budget = Budget(size)
            known = {**_known(budget), **(extra or {})}
            if path.suffix == ".safetensors":
                return _safetensors(file, size)[0]
            if path.suffix == ".pkl":
                known.setdefault("torch.storage._load_from_bytes", functools.partial(_storage, budget))
                return pickles.load_pickle(file, size, known, budget)
            if not zipfile.is_zipfile(file):
                raise ValueError("not a zip archive. Save it by torch.save of PyTorch 1.6 or newer, or as .safetensors")
            with untrusted.open_zip(file, size, packed=False) as archive:
                return _archive(archive, known, budget)
    except OSError as error:
        if error.filename is not None:  # the message has the path
            raise
        raise _unreadable(path, error) from error
    except Exception as error:  # a damaged file can fail anywhere
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: Exception) -> ValueError:
    problem = untrusted.one_line(error, 200) or type(error).__name__
    return ValueError(untrusted.one_line(f"{untrusted.short_path(path)} cannot be read as weights: {problem}"))


def _check_beginning(file: io.IOBase) -> None:
    beginning = file.read(64).lstrip().lower()
    file.seek(0)
    for text, problem in OTHERS.items():
        if beginning.startswith(text):
            raise ValueError(problem)


class _Storage(Fixed):
    """The type of a storage, named by a pickle; or its elements, once loaded."""

    __slots__ = ("elements",)

    def __init__(self, elements):
        self.elements = elements


def _rebuild(budget, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> np.ndarray:
    """A view into the storage; refused unless it lies inside and has at most as many elements as the storage."""
    elements = storage.elements if type(storage) is _Storage else None
    sized = all(type(part) in (tuple, list) and len(part) <= 32 for part in (size, stride))
    numbers = (offset, *size, *stride) if sized else (None,)
    if not isinstance(elements, np.ndarray) or len(size) != len(stride) or not all(map(_is_count, numbers)):
        shown = [
            f"({', '.join(map(str, part))},)" if sized and all(map(_is_number, part)) else "?"
            for part in (size, stride)
        ]
        raise ValueError(f"there is no tensor of size {shown[0]:.60} and stride {shown[1]:.60}")
    count = math.prod(size)
    end = offset + sum((n - 1) * m for n, m in zip(size, stride, strict=True)) + 1 if count else offset
    if end > elements.size:
        raise ValueError(f"a tensor reaches to element {end} of a storage of {elements.size}")
    if count > elements.size:
        raise ValueError(f"a tensor of size {tuple(size)} repeats the {elements.size} elements of its storage")
    budget.spend_bytes(count * elements.itemsize)
    strides = [m * elements.itemsize for m in stride]
    return np.lib.stride_tricks.as_strided(elements[offset:], size, strides, writeable=False)


def _is_number(n: Any) -> bool:
    return type(n) is int and abs(n) < 2**62


def _is_count(n: Any) -> bool:
    return _is_number(n) and n >= 0


def _rebuild_typed(budget, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> np.ndarray:
    """A view into an untyped storage, whose elements are bytes."""
    if type(dtype) is not str or dtype not in DTYPES or type(storage) is not _Storage:
        raise ValueError("there is no tensor of this type")
    if not isinstance(storage.elements, np.ndarray):
        raise ValueError("there is no tensor without a storage")
    return _rebuild(budget, _Storage(storage.elements.view(DTYPES[dtype])), offset, size, stride)


def _parameter(data, requires_grad=True, hooks=None, state=None) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise ValueError("it holds a parameter that is not a tensor")
    return data


def _subclass(function, kind, args, state) -> np.ndarray:
    """A tensor with attributes, which are left out."""
    if type(function) is not Call or type(args) is not tuple or len(args) > 9:
        raise ValueError("it calls something that is not a function")
    return _parameter(function.function(*args))


def _device(kind="", index=None) -> str:
    if type(kind) is not str or not (index is None or _is_number(index)):
        raise ValueError("it holds a device without a name")
    return kind if index is None else f"{kind}:{index}"


TYPES = {
    **{f"torch.{name}": _Storage(dtype) for name, dtype in STORAGES.items()},
    "torch.storage.UntypedStorage": _Storage(np.uint8),
}


def _known(budget: Budget) -> dict[str, Any]:
    """What the names in files of PyTorch stand for."""
    return {
        **TYPES,
        **{name: name for name in DTYPES},
        **{name: name for name in ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.strided")},
        "torch.device": _device,
        "torch._tensor._rebuild_from_type_v2": _subclass,
        "torch._utils._rebuild_tensor": functools.partial(_rebuild, budget),
        "torch._utils._rebuild_tensor_v2": functools.partial(_rebuild, budget),
        "torch._utils._rebuild_tensor_v3": functools.partial(_rebuild_typed, budget),
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
    }


def _reference(reference: Any) -> tuple[np.dtype, str, int]:
    """The type, the key and the number of elements that a persistent reference states."""
    kinds = [type(r) for r in reference[1:5]] if type(reference) is tuple else None
    if kinds != [_Storage, str, str, int] or any(r is not None for r in reference[5:]):
        shown = repr(reference[:60]) if type(reference) is str else type(reference).__name__
        raise ValueError(f"it refers to {shown}, which is not a storage")
    _, storage, key, _, count = reference[:5]
    if isinstance(storage.elements, np.ndarray) or not _is_count(count):
        raise ValueError("it refers to a storage that is not one")
    return np.dtype(storage.elements), key, count


def _storage(budget: Budget, data: bytes) -> _Storage:
    """Read the storage of a pickled tensor: five pickles (magic number, version, machine, type, key), then bytes.

    This is the format of ``torch.save`` before 1.6, which ``pickle.dump`` still writes for a storage.
    """
    if type(data) is not bytes:
        raise ValueError(f"a storage is bytes, got {type(data).__name__}")
    file = io.BytesIO(data)
    load = lambda fetch=None: pickles.load_pickle(file, len(data), TYPES, budget, fetch=fetch)
    if load() != 0x1950A86A20F9469CFC6C or load() != 1001:
        raise ValueError("a storage begins with another magic number or version than PyTorch's")
    machine = load()
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine, and this reader is for little-endian files")
    references = []
    load(lambda reference: references.append(_reference(reference)))
    if len(references) != 1 or load() != [references[0][1]]:
        raise ValueError("a storage holds something else")
    dtype, _, count = references[0]
    length, raw = file.read(8), memoryview(data)[file.tell() :]
    if length != count.to_bytes(8, "little", signed=True) or len(raw) != count * dtype.itemsize:
        raise ValueError(f"a storage of {count} elements has {len(raw)} bytes")
    return _Storage(np.frombuffer(raw, dtype))


def _archive(archive: zipfile.ZipFile, known: Mapping[str, Any], budget: Budget) -> Any:
    """Read an archive of ``torch.save``: the program ``data.pkl``, and one member for each storage."""
    names = archive.namelist()
    programs = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
    if len(programs) != 1:
        raise ValueError(f"it holds {len(programs)} files data.pkl, and a checkpoint of PyTorch has one")
    root = programs[0].removesuffix("data.pkl")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine, and this reader is for little-endian files")
    contents: dict[str, bytes] = {}

    def fetch(reference: Any) -> _Storage:
        dtype, key, count = _reference(reference)
        if key not in contents:
            contents[key] = archive.read(f"{root}data/{key}")
        raw = contents[key]
        if len(raw) != count * dtype.itemsize:
            raise ValueError(f"storage {key:.40} of {count} elements has {len(raw)} bytes")
        return _Storage(np.frombuffer(raw, dtype))

    program = archive.read(programs[0])
    return pickles.load_pickle(io.BytesIO(program), len(program), known, budget, fetch=fetch)


def _table(file: io.IOBase, size: int) -> tuple[dict[str, Any], dict[str, str], int]:
    """Read the table of a safetensors file: eight bytes of length, then JSON; the tensors, the metadata, the end."""
    end = 8 + int.from_bytes(file.read(8), "little")
    if size < end:
        raise ValueError(f"it has {size} bytes, and its table alone needs {end}")
    if end - 8 > untrusted.JSON_BYTES:
        raise ValueError(f"its table has {end - 8} bytes, more than {untrusted.JSON_BYTES}")
    table = untrusted.parse_json(file.read(end - 8))
    if not isinstance(table, dict):
        raise ValueError("its table is not a JSON object")
    extra = table.pop("__metadata__", {})
    if not isinstance(extra, dict) or any(not isinstance(value, str) for value in extra.values()):
        raise ValueError("its __metadata__ holds something else than strings")
    return table, extra, end


def _safetensors(file: io.IOBase, size: int) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors of a safetensors file, which cover all bytes after the table, each byte once."""
    table, extra, start = _table(file, size)
    entries = sorted((_entry(name, entry) for name, entry in table.items()), key=lambda e: (e[1], e[2]))
    place = 0
    for name, begin, end, *_ in entries:
        if begin != place:
            raise ValueError(f"{name:.60} begins at byte {begin}, and the tensor before it ends at byte {place}")
        if end > size - start:
            raise ValueError(
                f"{name:.60} ends at byte {end}, and the file has {max(0, size - start - begin)} bytes for it"
            )
        place = end
    if place != size - start:
        raise ValueError(f"its tensors take {place} bytes of {size - start}")
    data = file.read(place)
    if len(data) != place:
        raise ValueError("it was cut while it was read")
    arrays = {}
    for name, begin, _, dtype, shape in entries:
        arrays[name] = (
            np.frombuffer(data, dtype, math.prod(shape), begin).reshape(shape) if data else np.empty(shape, dtype)
        )
    return {name: arrays[name] for name in table}, extra


def _entry(name: str, entry: Any) -> tuple[str, int, int, np.dtype, list[int]]:
    """Check an entry of the table; return its name, first byte and end, dtype and shape."""
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = kind in SAFETENSORS and isinstance(shape, list) and len(shape) <= 32
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name:.60} has no dtype, shape and data_offsets") from error
    if not known:
        raise ValueError(f"{name:.60} has type {str(kind):.20}; known are {', '.join(SAFETENSORS)}")
    dtype = np.dtype(SAFETENSORS[kind])
    if not all(map(_is_count, (begin, end, *shape))) or end - begin != dtype.itemsize * math.prod(shape):
        length = end - begin if _is_number(begin) and _is_number(end) else "no"
        shown = shape if all(map(_is_number, shape)) else "?"
        raise ValueError(f"{name:.60} of shape {str(shown):.60} and type {kind} has {length} bytes")
    return name, begin, end, dtype, shape


def metadata(path: str | Path) -> dict[str, str]:
    """Read the strings beside the tensors of a ``.safetensors`` file.

    Args:
        path: the file.

    Returns:
        The strings by name; empty where there are none.

    Raises:
        ValueError: the file cannot be read.
        OSError: the file cannot be opened.
    """
    try:
        with untrusted.open_file(path) as file:
            return _table(file, untrusted.size_of(file))[1]
    except OSError:
        raise
    except Exception as error:  # a damaged file can fail anywhere
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
