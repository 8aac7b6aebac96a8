"""Hostile pickles and archives of pickles, and the list of all hostile files, ``FILES``."""

import pickle
import struct
import warnings
import zipfile

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
