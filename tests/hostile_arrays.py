"""Hostile files of arrays, numbers and JSON, and what is not a file at all."""

import json
import os
import pickle
import socket
import struct
import warnings
import zipfile

import numpy as np
from hostile_pickles import bomb, kind

# safetensors


def table(value, data=b"", length=None):
    head = value if isinstance(value, bytes) else json.dumps(value).encode()
    return (len(head) if length is None else length).to_bytes(8, "little") + head + data


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


MB8 = bytes(8 * 2**20)
TABLES = {
    "sixty overlapping tensors": ({f"w{i}": entry(0, 8 * 2**20) for i in range(60)}, MB8),
    "a small overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "a hole at the beginning": ({"a": entry(4, 8)}, bytes(8)),
    "a hole in the middle": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "a hole at the end": ({"a": entry(0, 4)}, bytes(8)),
    "a tensor beyond the end": ({"a": entry(0, 400)}, bytes(8)),
    "a reversed tensor": ({"a": entry(8, 0, [])}, bytes(8)),
    "a negative tensor": ({"a": entry(-8, 0, [2])}, bytes(8)),
    "metadata that is a list": ({"__metadata__": [1], "a": entry(0, 4)}, bytes(4)),
    "metadata that is null": ({"__metadata__": None, "a": entry(0, 4)}, bytes(4)),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry(0, 4)}, bytes(4)),
    "metadata that is nested": ({"__metadata__": {"a": {}}, "a": entry(0, 4)}, bytes(4)),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
    "a table that is a list": ([], b""),
    "a table that is a number": (3, b""),
    "a table that is no JSON": (b"{]", b""),
    "a table of bad text": (b'{"\xff":1}', b""),
    "a table of deep lists": (b'{"a":' + 10**6 * b"[", b""),
    "a table of a million lists": (b'{"a":[' + 10**6 * b"[]," + b"0]}", b""),
    "a table of a million names": (b"{" + b",".join(b'"%d":{}' % i for i in range(500_000)) + b"}", b""),
    "a table of 20 MB": (b'{"' + 20 * 2**20 * b"a" + b'":1}', b""),
    "an integer of 5,000 digits": (
        b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,4]}}' % (5000 * b"9"),
        bytes(4),
    ),
    "an integer of 4,000 digits": (
        b'{"a":{"dtype":"F32","shape":[%b],"data_offsets":[0,4]}}' % (4000 * b"9"),
        bytes(4),
    ),
    "sizes that are not finite": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,Infinity]}}', bytes(4)),
    "a shape of floats": ({"a": entry(0, 4, [1.0])}, bytes(4)),
    "a shape of truth values": ({"a": entry(0, 4, [True])}, bytes(4)),
    "a negative shape": ({"a": entry(0, 4, [-1, -1])}, bytes(4)),
    "a shape of a thousand axes": ({"a": entry(0, 4, [1] * 1000)}, bytes(4)),
    "a shape of nothing times 2^80": ({"a": entry(0, 0, [0, 2**80])}, b""),
    "a shape that is text": ({"a": entry(0, 4, "4")}, bytes(4)),
    "a type that is a list": ({"a": entry(0, 4, dtype=["F32"])}, bytes(4)),
    "a type that is unknown": ({"a": entry(0, 4, dtype="Q4")}, bytes(4)),
    "an entry without offsets": ({"a": {"dtype": "F32"}}, bytes(4)),
    "an entry that is null": ({"a": None}, bytes(4)),
    "a name with line breaks": ({"a\n\x1b[31m\n" * 50: entry(0, 400)}, bytes(4)),
}
for title, content in TABLES.items():
    kind("weights", ".safetensors", f"safetensors, {title}")(lambda path, content=content: table(*content))
for title, length in {"no table": 0, "a table of 2^63 bytes": 2**63, "a table of 2^64 - 1 bytes": 2**64 - 1}.items():
    kind("weights", ".safetensors", f"safetensors, {title}")(lambda path, n=length: table(b"{}", MB8, n))
    kind("metadata", ".safetensors", f"safetensors, {title}")(lambda path, n=length: table(b"{}", MB8, n))


# what is not a file, or not the file that was meant


def special(path, what):
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "endless device":
        path.symlink_to("/dev/zero")
    elif what == "terminal":
        path.symlink_to("/dev/tty")
    elif what == "file of the kernel":
        path.symlink_to("/proc/self/environ")
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "broken link":
        path.symlink_to(path.parent / "none")
    elif what == "socket":
        os.chdir(path.parent)  # its name may have 100 characters
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif what == "terabyte of holes":
        path.touch()
        os.truncate(path, 2**40)
    elif what == "gigabyte of holes":
        path.touch()
        os.truncate(path, 2**30)
    elif what == "empty file":
        path.touch()
    elif what == "git-lfs pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    elif what == "web page":
        path.write_text("<!DOCTYPE html>\n<html><body>Not found</body></html>")
    elif what == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(10_000))


SPECIAL = [
    "folder", "pipe", "endless device", "terminal", "file of the kernel", "link to itself", "broken link", "socket",
    "terabyte of holes", "gigabyte of holes", "empty file", "git-lfs pointer", "web page", "random bytes",
]  # fmt: skip
READERS = [
    ("weights", ".pkl"), ("weights", ".pt"), ("weights", ".safetensors"), ("edm", ".pkl"), ("arrays", ".npz"),
    ("arrays", ".npy"), ("stream", ".npz"), ("json", ".json"), ("array", ".npy"), ("convert", ".pt"),
]  # fmt: skip
for reader, ending in READERS:
    for what in SPECIAL:
        kind(reader, ending, f"{ending[1:]}, a {what}")(lambda path, what=what: special(path, what))


# arrays


def npy(shape="(2,)", descr="'<f4'", data=bytes(8), order="False", version=1, length=None, header=None):
    head = (
        f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode() if header is None else header
    )
    size = struct.pack("<H" if version == 1 else "<I", len(head) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + head + data


HEADERS = {
    "a huge shape": npy("(1000000000000,)"),
    "a negative shape": npy("(-1, -2)"),
    "a shape of floats": npy("(2.0,)"),
    "a shape of truth values": npy("(True, True)", data=bytes(4)),
    "a shape of nothing times 2^80": npy(f"(0, {2**80})", data=b""),
    "a shape of 100 axes": npy("(" + 100 * "1," + ")", data=bytes(4)),
    "a shape of 4,000 digits": npy("(" + 4000 * "9" + ",)"),
    "objects": npy(descr="'|O'", data=pickle.dumps([1, 2])),
    "a structure": npy(descr="[('a', '<f4')]"),
    "a structure of objects": npy(descr="[('a', '|O'), ('b', '<f4')]", data=bytes(24)),
    "an item of a gigabyte": npy(descr="'|V1000000000'"),
    "text": npy(descr="'<U1'"),
    "times": npy("(1,)", descr="'<M8[s]'"),
    "a subarray": npy(descr="('<f4', (1000000000,))"),
    "a type that is code": npy(descr="__import__('os').system('touch ran')"),
    "a header of deep brackets": npy(header=b"(" * 9000),
    "a header of many signs": npy(header=b"-" * 9000 + b"1"),
    "a header of 4 GB": npy(version=2, length=2**32 - 1),
    "a header of 60,000 bytes": npy(version=2, header=b"{" + b"'a':1," * 10_000 + b"}"),
    "a header that is code": npy(header=b"open('ran', 'w')"),
    "another version": npy(version=9),
    "fewer data": npy("(3,)"),
    "more data": npy("(1,)"),
    "values that are not finite": npy("(1000, 2)", data=np.full(2000, np.nan, "f4").tobytes()),
}
for title, data in HEADERS.items():
    kind("arrays", ".npy", f"npy, {title}")(lambda path, data=data: data)
    kind("stream", ".npy", f"npy, {title}")(lambda path, data=data: data)
    kind("array", ".npy", f"npy, {title}")(lambda path, data=data: data + b"\nsha256:" + 64 * b"0")

    def zipped(path, data=data):
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("x.npy", data)

    kind("arrays", ".npz", f"npz, {title}")(zipped)
    kind("stream", ".npz", f"npz, {title}")(zipped)


@kind("arrays", ".npz")
def npz_a_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x.npy", npy("(100000000, 1)", data=bytes(400_000_000)))


@kind("arrays", ".npz")
def npz_a_bomb_whose_size_lies(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x.npy", npy("(100000000, 1)", data=bytes(400_000_000)))
    size = 400_000_000 + len(npy("(100000000, 1)", data=b""))
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", 1000)))


@kind("arrays", ".npz")
def npz_a_bomb_of_bzip2(path):
    bomb(path, zipfile.ZIP_BZIP2, "x.npy")
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 300_000_000), struct.pack("<I", 100)))


@kind("arrays", ".npz")
def npz_a_hundred_thousand_members(path):
    with zipfile.ZipFile(path, "w") as z:
        for i in range(60_000):
            z.writestr(f"x{i}.npy", b"")


@kind("arrays", ".npz")
def npz_two_members_of_one_name(path):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as z:
        warnings.simplefilter("ignore")
        for _ in range(2):
            z.writestr("x.npy", npy())


@kind("stream", ".npz")
def npz_whose_member_ends_beyond_the_file(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x.npy", npy("(1000, 2)", data=np.ones(2000, "f4").tobytes()))
    data = path.read_bytes()
    at = data.index(b"PK\3\4") + 28
    return data[:at] + b"\xff\xff" + data[at + 2 :]


@kind("arrays", ".npz")
def npz_names_of_nothing(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr(".npy", npy())
        z.writestr("a\n\x1b[31m" * 1000 + ".npy", npy())


@kind("arrays", ".npz")
def npz_that_is_a_pickle(path):
    return pickle.dumps({"x": 1})


# JSON

JSON = {
    "deep lists": 10**6 * b"[",
    "deep objects": 10**5 * b'{"a":',
    "a million lists": b"[" + 10**6 * b"[]," + b"0]",
    "a million numbers": b"[" + 10**6 * b"0.1," + b"0]",
    "a text of 20 MB": b'["' + 20 * 2**20 * b"a" + b'"]',
    "an integer of 5,000 digits": b'{"a":' + 5000 * b"9" + b"}",
    "a name twice": b'{"a":1,"a":2}',
    "another kind": b"[]",
    "a number": b"3",
    "bad text": b'{"a":"\xff"}',
    "wide text": '{"a":1}'.encode("utf-16"),
    "a missing end": b'{"a":',
}
for title, data in JSON.items():
    kind("json", ".json", f"JSON, {title}")(lambda path, data=data: data)
    kind("jsonl", ".jsonl", f"JSON lines, {title}")(lambda path, data=data: data + b"\n{}\n")
