"""Hostile files of published images and of networks."""

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from hostile_arrays import npy
from hostile_pickles import HARMLESS, START, integer, kind, text

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
