"""Files of weights: what torch and safetensors recorded is read to the bit, and nothing a file asks for is executed.

``weights.pt`` and ``weights.safetensors`` hold ``torch.arange`` in several types and views; they were written by

    import torch, collections, safetensors.torch
    a = torch.arange(24.0).reshape(2, 3, 4)
    net = torch.nn.Sequential(torch.nn.Linear(2, 1))
    torch.nn.init.constant_(net[0].weight, 0.5); torch.nn.init.constant_(net[0].bias, -1.0)
    kinds = {str(d)[6:]: torch.arange(5).to(d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16,
             torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)}
    torch.save({"model": net.state_dict(), "parameter": torch.nn.Parameter(a[0]), "transposed": a.mT,
                "shared": a[1, :, 1:3], "empty": a[:0], "scalar": torch.tensor(7.0), "kinds": kinds, "step": 3,
                "rest": [None, ("x", 1.5)], "betas": a.shape}, "tests/weights.pt")
    safetensors.torch.save_file({**kinds, "a": a}, "tests/weights.safetensors", metadata={"format": "pt"})

and ``weights.pkl`` by ``pickle.dump({"parameter": torch.nn.Parameter(a[0]), "transposed": a.mT, "kinds": kinds, "step":
3}, file)``.
"""

import io
import os
import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fmjax.convert import weights

HERE = Path(__file__).parent
A = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
KINDS = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def same_kinds(kinds):
    for name in KINDS:
        assert kinds[name].dtype == name
        np.testing.assert_array_equal(kinds[name], np.arange(5).astype(name))
    assert kinds["bfloat16"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(kinds["bfloat16"].astype("f"), np.arange(5))


def test_what_torch_saved_is_read_to_the_bit():
    got = weights.read_weights(HERE / "weights.pt")
    assert list(got) == "model parameter transposed shared empty scalar kinds step rest betas".split()
    assert type(got["model"]) is dict and list(got["model"]) == ["0.weight", "0.bias"]
    np.testing.assert_array_equal(got["model"]["0.weight"], [[0.5, 0.5]])
    np.testing.assert_array_equal(got["model"]["0.bias"], [-1.0])
    np.testing.assert_array_equal(got["parameter"], A[0])
    np.testing.assert_array_equal(got["transposed"], A.swapaxes(1, 2))
    np.testing.assert_array_equal(got["shared"], A[1, :, 1:3])
    assert got["empty"].shape == (0, 3, 4) and got["scalar"].shape == () and got["scalar"] == 7
    assert (got["step"], got["rest"], got["betas"]) == (3, [None, ("x", 1.5)], (2, 3, 4))
    same_kinds(got["kinds"])


def test_what_safetensors_saved_is_read_to_the_bit():
    got = weights.read_weights(HERE / "weights.safetensors")
    assert set(got) == {*KINDS, "bfloat16", "a"}
    np.testing.assert_array_equal(got["a"], A)
    same_kinds(got)


def test_what_pickle_dumped_is_read_to_the_bit():
    got = weights.read_weights(HERE / "weights.pkl")
    assert list(got) == ["parameter", "transposed", "kinds", "step"] and got["step"] == 3
    np.testing.assert_array_equal(got["parameter"], A[0])
    np.testing.assert_array_equal(got["transposed"], A.swapaxes(1, 2))
    same_kinds(got["kinds"])


def test_a_written_file_equals_the_file_of_safetensors_and_is_read_back(tmp_path):
    arrays = weights.read_weights(HERE / "weights.safetensors")
    weights.write(tmp_path / "a.safetensors", arrays, metadata={"format": "pt"})
    again = weights.read_weights(tmp_path / "a.safetensors")
    assert set(again) == set(arrays) and all(again[name].dtype == arrays[name].dtype for name in arrays)
    for name, a in arrays.items():
        np.testing.assert_array_equal(again[name], a)
    assert weights.metadata(tmp_path / "a.safetensors") == {"format": "pt"}
    assert (tmp_path / "a.safetensors").read_bytes() == (HERE / "weights.safetensors").read_bytes()
    with pytest.raises(ValueError, match="w has type complex64. A safetensors file holds int64"):
        weights.write(tmp_path / "b.safetensors", {"w": np.zeros(2, "complex64")})
    weights.write(tmp_path / "c.safetensors", {"w": np.zeros(2)})
    assert weights.metadata(tmp_path / "c.safetensors") == {}


def archive(path, program, **files):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", program)
        for name, data in files.items():
            z.writestr(f"x/data/{name}" if name.startswith("_") else f"x/{name}", data)
    return path


def text(s):
    return b"X" + len(s).to_bytes(4, "little") + s.encode()


def number(n):
    return b"J" + n.to_bytes(4, "little", signed=True)


FOUR = np.arange(4, dtype="<f4").tobytes()


def tensor(offset, size, stride, count=4, key="_0"):
    """The pickle of a tensor, as torch writes it."""
    out = io.BytesIO()
    out.write(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(")
    out.write(
        b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + text(key) + text("cpu") + b"J" + count.to_bytes(4, "little")
    )
    out.write(b"tQ" + number(offset) + b"(" + b"".join(map(number, size)) + b"t(")
    out.write(b"".join(map(number, stride)) + b"t\x89NtR.")
    return out.getvalue()


class Calls:
    def __init__(self, function, *args):
        self.made = function, args

    def __reduce__(self):
        return self.made


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Calls(os.system, "touch ran"), "(posix|nt).system"),
        (Calls(eval, "open('ran', 'w')"), "builtins.eval"),
        (Calls(getattr, "x", "upper"), "builtins.getattr"),
        (Calls(np.ndarray, (3,)), "numpy.ndarray"),
    ],
)
def test_a_file_that_names_another_function_is_refused_unexecuted(call, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = archive(tmp_path / "evil.pt", pickle.dumps({"state": [call]}))
    with pytest.raises(ValueError, match=rf"cannot be read as weights: it names {name}, which"):
        weights.read_weights(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            b"\x80\x02ctorch\nFloatStorage\nN}X\x08\0\0\0elementsX\x03\0\0\0oops\x86b.",
            "it changes a function",
        ),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\0\0\0functionNs\x86b.",
            "it changes a function",
        ),
        (b"\x80\x02ccollections\nOrderedDict\nN}X\x01\0\0\0aNs\x86b.", "cannot be read as weights"),
        (b"\x80\x02ctorch\nFloatStorage\n.", "it holds a function that rebuilds tensors"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "its opcode 2 writes to place 2147483647 of the memo"),
        (b"\x80\x02]p99999999999\n.", "its opcode 2 writes to place 99999999999 of the memo"),
        (b"\x80\x02]q\0h\0a.", "it holds a container that contains itself"),
        (b"\x80\x02h\x07.", "cannot be read as weights"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "it names os.system"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "names collections.OrderedDict.fromkeys"),
        (b"(cos\nsystem\nS'touch ran'\no.", "it names os.system"),
        (b"(S'touch ran'\nios\nsystem\n.", "it names os.system"),
        (b"\x80\x02\x82\x01.", "cannot be read as weights"),
        (b"\x80\x02})" + 10**6 * b"\x85" + b"Ns.", "it takes more work than weights do"),
        (b"\x80\x02})" + 10**5 * b"N\x86q\0h\0" + b"Ns.", "it takes more work than weights do"),
        (b"\x80\x02)" + 600 * b"\x85" + b".", "it is nested more than 500 deep"),
        (b"\x80\x02})" + 600 * b"\x85" + b"Ns.", "it has a key of type tuple"),
        (b"\x80\x02}(ctorch\nSize\n)" + 10**5 * b"\x85R" + b"Ns.", "cannot be read as weights"),
        (b"", "cannot be read as weights"),
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "cannot be read as weights"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fx.", "cannot be read as weights"),
    ],
)
@pytest.mark.parametrize("ending", ["pt", "pkl"])
def test_a_program_that_reaches_beyond_tensors_is_refused(program, message, ending, tmp_path, monkeypatch):
    """State set on what the reader lends, places in the memo, cycles, old and new ways to call, lengths that lie."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"a.{ending}"
    archive(file, program) if ending == "pt" else file.write_bytes(program)
    with pytest.raises(ValueError, match=message):
        weights.read_weights(file)
    assert not (tmp_path / "ran").exists()
    np.testing.assert_array_equal(
        weights.read_weights(HERE / "weights.pkl")["parameter"], A[0]
    )  # the reader is what it was


def test_what_a_pickle_repeats_is_made_once(tmp_path):
    """Each list holds the former twice: a million lists, if every path were followed."""
    value = []
    for _ in range(20):
        value = [value, value]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value))
    got = weights.read_weights(tmp_path / "a.pkl")
    assert got[0] is got[1] and got[0][0] is got[1][1]


def test_a_nest_too_deep_to_follow_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02]" + 600 * b"]" + 600 * b"a" + b".")
    with pytest.raises(ValueError, match="it is nested more than 500 deep"):
        weights.read_weights(tmp_path / "a.pkl")


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x/data.pkl", tensor(0, [2], [1], count=25_000_000))
        z.writestr("x/data/_0", bytes(100_000_000))
    assert (tmp_path / "a.pt").stat().st_size < 200_000
    with pytest.raises(ValueError, match="it unpacks to 100000[0-9]* bytes from [0-9]{5,6}, and PyTorch does not"):
        weights.read_weights(tmp_path / "a.pt")


def storage(
    *, magic=0x1950A86A20F9469CFC6C, little=True, body=None, keys=("k",), count=4, length=None, raw=None, after=b""
):
    """The bytes of four floats, as ``pickle.dump`` has them of a tensor."""
    kind = text("storage") + b"ctorch\nFloatStorage\n"
    body = body or b"(" + kind + text("k") + text("cpu") + number(count) + b"NtQ."
    parts = [pickle.dumps(v, 2) for v in (magic, 1001, {"protocol_version": 1001, "little_endian": little})]
    length = (count if length is None else length).to_bytes(8, "little", signed=True)
    return b"".join([*parts, b"\x80\x02", body, pickle.dumps([*keys], 2), length, FOUR if raw is None else raw, after])


def holding(data):
    """A pickle of ``_load_from_bytes(data)`` as a tensor's storage."""
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(ctorch.storage\n_load_from_bytes\n"
    tail = number(0) + b"(" + number(4) + b"t(" + number(1) + b"t\x89NtR."
    return head + b"B" + len(data).to_bytes(4, "little") + data + b"\x85R" + tail


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (storage(), None),
        (storage(magic=7), "another magic number or version"),
        (storage(little=False), "big-endian"),
        (storage(body=pickle.dumps(Calls(os.system, "touch ran"), 2)[2:]), "it names (posix|nt).system"),
        (storage(body=b"ctorch._utils\n_rebuild_tensor_v2\n."), "it names torch._utils._rebuild_tensor_v2"),
        (storage(body=b"ctorch.storage\n_load_from_bytes\n."), "it names torch.storage._load_from_bytes"),
        (storage(body=b"ctorch\nFloatStorage\n."), "it holds a function that rebuilds tensors, not called"),
        (storage(body=b"]r\xff\xff\xff\x7f."), "of the memo"),
        (storage(keys=()), "a storage holds something else"),
        (storage(keys=("k", "k")), "a storage holds something else"),
        (storage(length=5), "a storage of 4 elements has 16 bytes"),
        (storage(count=2**31 - 1), "a storage of 2147483647 elements has 16 bytes"),
        (storage(count=-4, raw=b""), "cannot be read as weights"),
        (storage(raw=FOUR[:-1]), "a storage of 4 elements has 15 bytes"),
        (storage(after=b"x"), "a storage of 4 elements has 17 bytes"),
        (storage()[:60], "cannot be read as weights"),
    ],
)
def test_a_storage_within_a_pickle_is_its_bytes_and_nothing_else(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(holding(data))
    if message is None:
        np.testing.assert_array_equal(weights.read_weights(tmp_path / "a.pkl"), [0, 1, 2, 3])
    else:
        with pytest.raises(ValueError, match=message):
            weights.read_weights(tmp_path / "a.pkl")
    assert not (tmp_path / "ran").exists()


def test_every_beginning_of_a_pickle_is_refused(tmp_path):
    data = (HERE / "weights.pkl").read_bytes()
    for end in range(0, len(data) - 1, 37):
        (tmp_path / "a.pkl").write_bytes(data[:end])
        with pytest.raises(ValueError, match="cannot be read as weights"):
            weights.read_weights(tmp_path / "a.pkl")


def test_extra_names_call_their_replacements(tmp_path):
    file = archive(tmp_path / "more.pt", pickle.dumps({"of": Calls(os.getenv, "HOME")}))
    assert weights.read_weights(file, extra={"os.getenv": lambda *a: a}) == {"of": ("HOME",)}


@pytest.mark.parametrize(
    ("program", "files", "message"),
    [
        (tensor(1, [2], [2]), {"_0": FOUR}, None),
        (tensor(1, [2], [3]), {"_0": FOUR}, "a tensor reaches to element 5 of a storage of 4"),
        (tensor(5, [0], [1]), {"_0": FOUR}, "a tensor reaches to element 5 of a storage of 4"),
        (tensor(-1, [2], [1]), {"_0": FOUR}, r"there is no tensor of size \(2,\) and stride \(1,\)"),
        (tensor(3, [2], [-1]), {"_0": FOUR}, r"there is no tensor of size \(2,\) and stride \(-1,\)"),
        (tensor(0, [2, 2], [1]), {"_0": FOUR}, "there is no tensor of size"),
        (tensor(0, [1000, 1000], [0, 0]), {"_0": FOUR}, r"of size \(1000, 1000\) repeats the 4 elements"),
        (tensor(0, [2], [1], count=5), {"_0": FOUR}, "storage _0 of 5 elements has 16 bytes"),
        (tensor(0, [2], [1], key="_9"), {"_0": FOUR}, "x/data/_9"),
        (tensor(0, [2], [1]), {"_0": FOUR, "byteorder": b"big"}, "big-endian"),
        (tensor(0, [2], [1])[:-9], {"_0": FOUR}, "cannot be read as weights"),
        (b"X\x01\0\0\0aQ.", {}, "it refers to 'a', which is not a storage"),
    ],
)
def test_a_damaged_archive_is_refused_and_no_tensor_leaves_its_storage(program, files, message, tmp_path):
    file = archive(tmp_path / "a.pt", program, **files)
    if message is None:
        np.testing.assert_array_equal(weights.read_weights(file), [1, 3])
    else:
        with pytest.raises(ValueError, match=message):
            weights.read_weights(file)


def test_a_flipped_byte_is_noticed(tmp_path):
    data = bytearray(archive(tmp_path / "a.pt", tensor(0, [2], [1]), _0=FOUR).read_bytes())
    data[data.index(FOUR) + 3] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        weights.read_weights(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pt", pickle.dumps({}), "not a zip archive. Save it by torch.save of PyTorch 1.6"),
        ("a.safetensors", b"\xff" * 20, "it has 20 bytes, and its table alone needs"),
        ("a.safetensors", b"\x02" + b"\0" * 7 + b"{]", "cannot be read as weights"),
    ],
)
def test_another_format_is_refused(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        weights.read_weights(tmp_path / name)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', None),
        ('{"dtype":"F32","shape":[3],"data_offsets":[0,8]}', r"w of shape \[3\] and type F32 has 8 bytes"),
        ('{"dtype":"F32","shape":[4],"data_offsets":[0,16]}', "has 8 bytes"),
        ('{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}', "w of shape"),
        ('{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}', "w has type Q4; known are I64, F64"),
    ],
)
def test_a_safetensors_table_that_does_not_fit_its_bytes_is_refused(entry, message, tmp_path):
    head = f'{{"w":{entry}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + FOUR[8:])
    if message is None:
        np.testing.assert_array_equal(weights.read_weights(tmp_path / "a.safetensors")["w"], [2, 3])
    else:
        with pytest.raises(ValueError, match=message):
            weights.read_weights(tmp_path / "a.safetensors")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        weights.read_weights(tmp_path / "none.pt")
