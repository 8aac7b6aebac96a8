"""Hostile files, one function for each kind, and a process that reads them and measures what they cost.

``python hostile.py FOLDER`` writes every file, reads it in a fork, and prints one line of JSON for each: what the
reader raised, its CPU seconds, and the growth of its memory. ``test_hostile_files.py`` compares them with the bounds.
"""

import gzip
import io
import json
import os
import pickle
import resource
import socket
import struct
import sys
import tarfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np

START = b"\x80\x02"
FILES = {}  # name of the kind: (reader, function that writes the file into a folder and returns it)


def kind(reader, ending, name=None):
    """Enter a function that returns the bytes of a file, or writes a path itself and returns nothing."""

    def enter(function):
        def write(folder):
            path = folder / f"a{ending}"
            data = function(path)
            if data is not None:
                path.write_bytes(data)
            return path

        FILES[f"{reader}: {name or function.__name__.replace('_', ' ')}"] = reader, write
        return function

    return enter


def text(s):
    return b"X" + struct.pack("<I", len(s)) + s.encode()


def integer(n):
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


# programs of pickles

BIG = text("k" * 20)
PROGRAMS = {
    "a tuple doubled 40 times as a key": b"})" + 40 * b"2\x86" + b"Ns.",
    "a tuple doubled 40 times": b")K\x01\x85" + 40 * b"2\x86" + b".",
    "a list doubled 40 times": b"]" + 40 * b"q\0](h\0h\0e" + b".",
    "a dict doubled 40 times": b"}" + 40 * b"q\0}(K\0h\0K\x01h\0u" + b".",
    "a set in a frozenset doubled": b"(\x91" + 40 * b"q\0(h\0h\0\x86\x91" + b".",
    "a size doubled 25 times in a message": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0"
    + text("a" * 50)
    + 25 * b"2\x86"
    + b"2\x89NtR.",
    "equal hashes as keys": b"}(" + b"".join(integer(i * (2**61 - 1)) + b"N" for i in range(40_000)) + b"u.",
    "colliding integers as keys": b"}(" + b"".join(integer(i << 40) + b"N" for i in range(60_000)) + b"u.",
    "colliding floats as keys": b"}("
    + b"".join(b"G" + struct.pack(">d", float(i << 40)) + b"N" for i in range(60_000))
    + b"u.",
    "colliding tuples as keys": b"}(" + b"".join(integer(i << 40) + b"\x85N" for i in range(60_000)) + b"u.",
    "colliding integers in a set": b"\x8f(" + b"".join(integer(i << 40) for i in range(90_000)) + b"\x90.",
    "a list as a key": b"}]Ns.",
    "a tensor as a key": b"}ctorch\nFloatStorage\nNs.",
    **{
        f"a million of {code!r}": 10**6 * code + b"."
        for code in (
            b"]",
            b"(",
            b"}",
            b")",
            b"N",
            b"\x8f",
            b"]\x94",
            b"(l",
            b"(d",
            b"(\x91",
            b"K\x01\x85",
            b"J\1\1\1\1",
        )
    },
    "a million copies": b"]" + 10**6 * b"2" + b".",
    "a million memo places": b"]" + b"".join(b"r" + struct.pack("<I", i) for i in range(300_000)) + b".",
    "a million nested lists": 10**5 * b"]" + 10**5 * b"a" + b".",
    "nested lists beyond the bound": b"]" + 600 * b"]" + 600 * b"a" + b".",
    "tuples nested by a size": b"ctorch\nSize\nq\0)" + 600 * b"\x85h\0\x85R" + b".",
    "a list in itself": b"]q\0h\0a.",
    "a dict in itself": b"}q\0(K\0h\0u.",
    "a large state set again and again": b"ctorch.nn.modules.container\nModuleDict\n)R(}("
    + b"".join(text(str(i)) + b"N" for i in range(5000))
    + b"uq\0"
    + 20_000 * b"0h\0"
    + b".",
    "a large dictionary copied again and again": b"ccollections\nOrderedDict\nq\1(l("
    + b"".join(text(str(i)) + b"N\x86" for i in range(5000))
    + b"eq\0"
    + 20_000 * b"0h\1h\0\x85R"
    + b".",
    "a large tuple copied again and again": b"ctorch\nSize\nq\1("
    + 50_000 * b"N"
    + b"lq\0"
    + 50_000 * b"0h\1h\0\x85R"
    + b".",
    "a large set copied again and again": b"c__builtin__\nset\nq\1("
    + b"".join(text(str(i)) for i in range(5000))
    + b"lq\0"
    + 20_000 * b"0h\1h\0\x85R"
    + b".",
    "a call with many arguments": b"ctorch._utils\n_rebuild_parameter\nq\1("
    + 50_000 * b"N"
    + b"tq\0"
    + 9000 * b"h\1h\0R0"
    + b".",
    "a long text": b"X" + struct.pack("<I", 8 * 2**20) + (8 * 2**20 - 4) * b"a" + "\U0001f600".encode() + b".",
    "many texts of wide characters": 40 * (b"X" + struct.pack("<I", 2**20) + (2**20 - 4) * b"a" + "\U0001f600".encode())
    + b".",
    "a text whose length lies": b"X\xff\xff\xff\xff.",
    "a text of 2^63 bytes": b"\x8d" + b"\xff" * 7 + b"\x7fx.",
    "bytes of 2^63 bytes": b"\x8e" + b"\xff" * 7 + b"\x7fx.",
    "a bytearray of 2^40 bytes": b"\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "a bytearray by its length": b"c__builtin__\nbytearray\n" + integer(2**40) + b"\x85R.",
    "an integer of 3 MB": b"\x8b" + struct.pack("<I", 3 * 2**20) + 3 * 2**20 * b"\x7f" + b".",
    "an integer whose length lies": b"\x8b\xff\xff\xff\x7f.",
    "an integer of 5 million digits": b"L" + 5 * 10**6 * b"9" + b"L\n.",
    "an integer of 4,000 digits": b"I" + 4000 * b"9" + b"\n.",
    "a name of 5 MB": b"c" + 5 * 10**6 * b"a" + b"\nb\n.",
    "a name with line breaks": b"\x8c\x05a\nb\x1b[\x8c\x02c\n\x93.",
    "a frame whose length lies": b"\x95" + b"\xff" * 8 + b".",
    "places of the memo": b"]r\xff\xff\xff\x7f.",
    "a memo place that is empty": b"h\x05.",
    "an empty stack": b"0.",
    "an empty mark": b"]e.",
    "nothing": b".",
    "an opcode that is unknown": b"\xff.",
    "an extension": b"\x82\x01.",
    "a buffer outside": b"\x97.",
    "a call of a call": b"ccollections\nOrderedDict\n)R)R.",
    "a call of a function": b"cposix\nsystem\n" + text("touch ran") + b"\x85R.",
    "a call by an instance": b"(S'touch ran'\nios\nsystem\n.",
    "a call by an object": b"(cos\nsystem\nS'touch ran'\no.",
    "a nested name": b"\x8c\x0bcollections\x8c\x10OrderedDict.copy\x93.",
    "a name that is not text": b"]]\x93.",
    "a function left over": b"]ctorch._utils\n_rebuild_tensor_v2\na.",
    "a state for a function": b"ctorch\nFloatStorage\nN}" + text("elements") + text("oops") + b"\x86b.",
    "a state for a dictionary": b"ccollections\nOrderedDict\nN}" + text("a") + b"Ns\x86b.",
    "a tensor of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "a tensor of huge sizes": b"ctorch._utils\n_rebuild_tensor_v2\n(ctorch\nFloatStorage\nK\0("
    + 9 * integer(2**500)
    + b"t2\x89NtR.",
    "a device that is a list": b"ctorch\ndevice\n]\x85R.",
    "an encoding that is odd": b"c_codecs\nencode\n" + text("a") + text("idna") + b"\x86R.",
    "a subclass by another function": b"ctorch._tensor\n_rebuild_from_type_v2\n(NN)NtR.",
    "a nested storage again and again": b"ctorch.storage\n_load_from_bytes\nq\1B"
    + struct.pack("<I", 2000)
    + pickle.dumps([0] * 900, 2)[:2000].ljust(2000, b"N")
    + b"\x85q\0"
    + 9000 * b"h\1h\0R0"
    + b".",
    "numbers instead of tensors": b"(ctorch._utils\n_rebuild_parameter\nK\x05\x85RNt.",
}
HARMLESS = {"a frame whose length lies", "a million memo places"}  # may be read: they ask for little


def packed(path, program, **files):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", program)
        for name, data in files.items():
            z.writestr(f"x/{name.replace('__', '/')}", data)


for title, program in PROGRAMS.items():
    kind("weights", ".pkl", f"pickle, {title}")(lambda path, program=program: START + program)
    kind("weights", ".pt", f"archive, {title}")(lambda path, program=program: packed(path, START + program))
for title in ("a tuple doubled 40 times", "colliding integers as keys", "a million of b']'"):
    kind("edm", ".pkl", f"pickle, {title}")(lambda path, program=PROGRAMS[title]: START + program)


def reference(count, key="0"):
    return (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text(key)
        + text("cpu")
        + b"J"
        + struct.pack("<i", count)
        + b"tQ"
    )


@kind("weights", ".pt")
def archive_ten_thousand_tensors_of_one_storage(path):
    one = b"h\1(h\2K\0(J\0\0\x10\0t(K\1t\x89NtR"
    body = b"ctorch._utils\n_rebuild_tensor_v2\nq\1" + reference(2**20) + b"q\2(" + 10_000 * one + b"l."
    packed(path, START + body, data__0=bytes(4 * 2**20))


@kind("weights", ".pt")
def archive_a_reference_that_is_a_doubled_tuple(path):
    packed(path, START + text("a" * 50) + 30 * b"2\x86" + b"Q.")


@kind("weights", ".pt")
def archive_a_tensor_that_repeats_its_storage(path):
    body = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference(4) + b"K\0(J\0\0\0\x40t(K\0t\x89NtR."
    packed(path, START + body, data__0=bytes(16))


@kind("weights", ".pt")
def archive_a_tensor_of_negative_strides(path):
    body = b"ctorch._utils\n_rebuild_tensor_v2\n(" + reference(4) + b"K\3(K\2t(J\xff\xff\xff\xfft\x89NtR."
    packed(path, START + body, data__0=bytes(16))


@kind("weights", ".pt")
def archive_a_hundred_thousand_members(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/data.pkl", START + b"N.")
        for i in range(60_000):
            z.writestr(f"x/data/{i}", b"")


def bomb(path, method, member="x/data/0", inner=START + b"N."):
    with zipfile.ZipFile(path, "w", method) as z:
        z.writestr("x/data.pkl", inner)
        z.writestr(member, bytes(300_000_000))


@kind("weights", ".pt")
def archive_a_bomb(path):
    bomb(path, zipfile.ZIP_DEFLATED)


@kind("weights", ".pt")
def archive_a_bomb_whose_sizes_lie(path):
    bomb(path, zipfile.ZIP_BZIP2)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 300_000_000), struct.pack("<I", 100)))


@kind("weights", ".pt")
def archive_two_members_of_one_name(path):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as z:
        warnings.simplefilter("ignore")
        for _ in range(2):
            z.writestr("x/data.pkl", START + b"N.")


@kind("weights", ".pt")
def archive_two_programs(path):
    packed(path, START + b"N.", **{"y__data.pkl": START + b"N."})


@kind("weights", ".pt")
def archive_no_program(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("x/other", b"")


@kind("weights", ".pt")
def archive_that_is_encrypted(path):
    packed(path, START + b"N.")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


@kind("weights", ".pt")
def archive_whose_directory_lies(path):
    packed(path, START + b"N.")
    data = path.read_bytes()
    at = data.rindex(b"PK\5\6") + 12
    return data[:at] + struct.pack("<I", 2**31) + data[at + 4 :]


@kind("weights", ".pt")
def archive_cut(path):
    packed(path, START + b"N.")
    return path.read_bytes()[:60]


@kind("weights", ".pt")
def archive_with_another_byteorder(path):
    packed(path, START + b"N.", byteorder=b"big")


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


# published images


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                archive.addfile(info)


def png(width, height, rows=None):
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = zlib.compress(bytes(height * (width + 1)) if rows is None else rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


PICTURES = {
    "a picture of a gigapixel": png(30_000, 30_000, b""),
    "a picture of 10,000 pixels a side": png(10_000, 10_000, b""),
    "a picture that is cut": png(32, 32)[:60],
    "a program of PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(ran) (w) file closefile\n",
    "a picture of another size": png(8, 8),
    "no picture": b"hello",
}
for title, data in PICTURES.items():
    kind("pictures", ".tar", title)(lambda path, data=data: tar(path, {"a.png": data}))
kind("pictures", ".tar", "a link to itself")(lambda path: tar(path, {"a.png": (tarfile.SYMTYPE, "a.png")}))
kind("pictures", ".tar", "a folder named as a picture")(lambda path: tar(path, {"a.png": (tarfile.DIRTYPE, "")}))
kind("pictures", ".tar", "a pipe in an archive")(lambda path: tar(path, {"a.png": (tarfile.FIFOTYPE, "")}))
HARMLESS |= {"a link to itself", "a folder named as a picture", "a pipe in an archive"}  # no pictures
HARMLESS |= {"a picture that is cut", "wide text"}  # the end of a picture is missing; UTF-16 is JSON, too


@kind("pictures", ".tar")
def a_packed_tar_with_a_name_of_half_a_gigabyte(path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 500_000_000
    with gzip.open(path, "wb", 1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(500):
            file.write(1_000_000 * b"a")


@kind("cifar10", ".tar.gz")
def a_packed_tar_of_half_a_gigabyte(path):
    tar(path, {"data_batch_1.bin": bytes(500_000_000)}, "w:gz")


@kind("cifar10", ".tar.gz")
def a_tar_without_its_files(path):
    tar(path, {"other.bin": b""}, "w:gz")


@kind("cifar10", ".tar.gz")
def records_that_are_cut(path):
    tar(path, {f"data_batch_{i}.bin": bytes(3074) for i in range(1, 6)}, "w:gz")


@kind("idx", ".gz")
def a_packed_file_of_half_a_gigabyte(path):
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, 20, 28, 28) + bytes(500_000_000), 1))


@kind("idx", ".gz")
def sizes_that_wrap_around(path):
    path.write_bytes(gzip.compress(struct.pack(">IIII", 0x803, 2**31, 2**31, 4)))


@kind("npzs", ".zip")
def a_bomb_in_a_zip(path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("data.npy", npy("(100000000,)", data=bytes(400_000_000)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.npz", inner.getvalue())


@kind("npzs", ".zip")
def an_archive_without_labels(path):
    inner = io.BytesIO()
    np.savez(inner, data=np.zeros((2, 12), np.uint8))
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a.npz", inner.getvalue())


# snapshots of EDM


def module(modules=b"}", parameters=b"}"):
    """The program of a module's state, from the programs of its parts."""
    return (
        b"}(" + text("_parameters") + parameters + text("_buffers") + b"}" + text("_modules") + modules
        + text("_init_kwargs") + b"}" + text("sigma_data") + b"G?\xe0\0\0\0\0\0\0" + b"u"
    )  # fmt: skip


def snapshot(inner, name=text("EDMPrecond"), sigma=b"G?\xe0\0\0\0\0\0\0"):
    """The program of a snapshot around the program of its network."""
    outer = (
        module(b"}(" + text("model") + inner + b"u") + text("class") + name + b"s" + text("sigma_data") + sigma + b"s"
    )
    return START + b"}(" + text("ema") + outer + b"u."


@kind("edm", ".pkl")
def shared_modules_walked_2_to_the_40_times(path):
    program = module()
    for i in range(40):
        place = b"q" + bytes([i])
        both = b"}(" + text("a") + b"h" + bytes([i]) + text("b") + b"h" + bytes([i]) + b"u"
        program += place + b"0" + module(both)
    return snapshot(program)


@kind("edm", ".pkl")
def shared_modules_walked_2_to_the_20_times(path):
    program = module()
    for i in range(18):
        both = b"}(" + text("a") + b"h" + bytes([i]) + text("b") + b"h" + bytes([i]) + b"u"
        program += b"q" + bytes([i]) + b"0" + module(both)
    return snapshot(program)


@kind("edm", ".pkl")
def a_module_in_itself(path):
    return snapshot(module(b"}") + b"q\0" + text("_modules") + b"}(" + text("a") + b"h\0us")


@kind("edm", ".pkl")
def many_modules_that_share_many(path):
    many = b"}(" + b"".join(text(str(i)) + b"h\1" for i in range(3000)) + b"u"
    return snapshot(module() + b"q\0" + b"0" + module(many.replace(b"h\1", b"h\0")) + b"q\1" + b"0" + module(many))


@kind("edm", ".pkl")
def names_that_grow(path):
    program = module()
    for _ in range(90):
        program = module(b"}(" + text("n" * 10_000) + program + b"u")
    return snapshot(program)


kind("edm", ".pkl", "a class that is a list")(lambda path: snapshot(module(), b"]"))
kind("edm", ".pkl", "a class of a megabyte")(lambda path: snapshot(module(), text("c" * 10**6)))
kind("edm", ".pkl", "an option that is not finite")(lambda path: snapshot(module(), sigma=b"G\x7f\xf8\0\0\0\0\0\0"))
kind("edm", ".pkl", "an option that is text")(lambda path: snapshot(module(), sigma=text("a")))
kind("edm", ".pkl", "an option that is an integer of 100 bytes")(lambda path: snapshot(module(), sigma=integer(2**800)))
kind("edm", ".pkl", "a parameter that is a number")(lambda path: snapshot(module(parameters=b"}K\0K\1s")))
kind("edm", ".pkl", "parameters that are text")(lambda path: snapshot(module(parameters=text("abc"))))
kind("edm", ".pkl", "modules that are a list")(lambda path: snapshot(module(b"]")))


# networks


def tensors(path, arrays, metadata=None):
    from fmjax.convert import weights

    weights.write(path, arrays, metadata=metadata)


EDM = {"map_layer0.weight": np.ones((8, 8), "f4"), "enc.8x8_conv.weight": np.ones((8, 3, 3, 3), "f4")}
UNET = {"time_embed.0.weight": np.ones((8, 4), "f4"), "input_blocks.0.0.weight": np.ones((4, 3, 3, 3), "f4"),
        "out.2.weight": np.ones((3, 4, 3, 3), "f4")}  # fmt: skip
NETWORKS = {
    "weights that are not numbers": {**EDM, "a": np.array([np.nan], "f4")},
    "weights that are infinite": {**EDM, "a": np.array([np.inf], "f4")},
    "weights beyond float32": {**EDM, "a": np.array([1e300])},
    "an empty tensor": {**EDM, "a": np.zeros((0, 10**9), "f4")},
    "tensors without axes": {"map_layer0.weight": np.ones((), "f4"), "enc.8x8_conv.weight": np.ones((), "f4")},
    "images of 9,999 pixels a side": {**EDM, "enc.9999x9999_conv.weight": np.ones((8, 3, 3, 3), "f4")},
    "images of a number of 4,000 digits": {
        "map_layer0.weight": np.ones((8, 8), "f4"),
        f"enc.{'9' * 4000}x{'9' * 4000}_conv.weight": np.ones((8, 3, 3, 3), "f4"),
    },
    "no blocks": EDM,
    "three thousand tensors": {**EDM, **{f"a{i}": np.ones(1, "f4") for i in range(3000)}},
    "two tensors of one name": {**EDM, **{f"module.{name}": a for name, a in EDM.items()}},
    "a U-Net of nothing": UNET,
    "a U-Net whose tensors have no axes": {name: np.ones((), "f4") for name in UNET},
    "names of nobody": {"layer.weight": np.ones(3, "f4")},
    "a long name of nobody": {"n" * 10**6: np.ones(3, "f4")},
}
for title, arrays in NETWORKS.items():
    kind("convert", ".safetensors", f"network, {title}")(lambda path, arrays=arrays: tensors(path, arrays))
OWN = {
    "code in a file": {"net": json.dumps({"name": "ran.py:factory"}), "classes": "0"},
    "code in a module": {"net": json.dumps({"name": "os:getcwd"}), "classes": "0"},
    "code as an option": {"net": json.dumps({"name": "mlp", "preconditioning": {"name": "os:getcwd"}}), "classes": "0"},
    "a network that is a list": {"net": "[1]", "classes": "0"},
    "a network that is no JSON": {"net": "{]", "classes": "0"},
    "a network of deep lists": {"net": 10**5 * "[", "classes": "0"},
    "a network without classes": {"net": '"mlp"'},
    "classes that are negative": {"net": '"mlp"', "classes": "-1"},
    "classes that are text": {"net": '"mlp"', "classes": '"a"'},
    "an unknown network": {"net": '"mpl"', "classes": "0"},
    "a width of 10^18": {"net": json.dumps({"name": "mlp", "width": -1}), "classes": "0"},
}
for title, extra in OWN.items():
    kind("convert", ".safetensors", f"fmjax, {title}")(
        lambda path, extra=extra: tensors(path, {"a/b": np.ones(2, "f4")}, {"format": "fmjax", **extra})
    )
PATHS = {
    "a name that is a parent": {"a": np.ones(1, "f4"), "a/b": np.ones(1, "f4")},
    "a name of 100,000 levels": {"a/" * 10**5 + "b": np.ones(1, "f4")},
    "values that are not finite": {"a": np.full(3, np.nan, "f4")},
}
for title, arrays in PATHS.items():
    kind("convert", ".safetensors", f"fmjax, {title}")(
        lambda path, arrays=arrays: tensors(path, arrays, {"format": "fmjax"})
    )


# the process that reads


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
