"""Files of a run: whole or not there, verified when read, and every message names the path."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fmjax.storage import DamagedFile, files

ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.float64(0.25),
    np.zeros((0, 3), np.int64), np.array([True, False]), np.arange(3, dtype=np.complex64), np.arange(8)[::2],
]  # fmt: skip


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{list(np.shape(a))}")
def test_an_array_comes_back_bit_for_bit_and_numpy_reads_its_file(array, tmp_path):
    path = tmp_path / "a.npy"
    digest = files.write_array(path, array)
    for back in (files.read_array(path), files.read_array(path, digest=digest), np.load(path)):
        assert back.dtype == array.dtype and back.shape == array.shape
        np.testing.assert_array_equal(back, array)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npy"]


def test_equal_arrays_have_equal_digests_and_others_do_not(tmp_path):
    digest = lambda a: files.write_array(tmp_path / "a.npy", a)
    x = np.arange(6, dtype=np.float32)
    assert digest(x) == digest(jnp.arange(6, dtype=jnp.float32)) == digest(np.arange(12, dtype=np.float32)[:6])
    assert len({digest(a) for a in (x, x + 1, x.reshape(2, 3), x.view(np.int32), x[:5])}) == 5


def test_an_array_of_many_chunks_is_read_without_a_second_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 100)
    x = np.random.default_rng(0).standard_normal((7, 33))
    digest = files.write_array(tmp_path / "a.npy", x)
    monkeypatch.setattr(files, "CHUNK", 2**24)
    np.testing.assert_array_equal(files.read_array(tmp_path / "a.npy", digest=digest), x)


@pytest.mark.parametrize("where", [0, 7, 9, 30, 100, 200, -1, -40, -66, -72])
def test_every_flipped_byte_of_an_array_file_is_found(where, tmp_path):
    path = tmp_path / "samples.npy"
    files.write_array(path, np.linspace(0, 1, 32))
    raw = bytearray(path.read_bytes())
    raw[where] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedFile, match=r"samples\.npy"):
        files.read_array(path)


@pytest.mark.parametrize("size", [0, 5, 64, 128, 200, -1])
def test_a_cut_or_zeroed_array_file_is_named_without_advice_on_pickles(size, tmp_path):
    path = tmp_path / "samples.npy"
    files.write_array(path, np.linspace(0, 1, 32))
    raw = path.read_bytes()
    for content in (raw[:size], bytes(len(raw)), raw + b"x"):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"samples\.npy") as caught:
            files.read_array(path)
        assert "pickle" not in str(caught.value) and len(str(caught.value)) < 300 and caught.value.path == path


def test_a_pickle_or_a_plain_array_file_is_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.save(tmp_path / "plain.npy", np.arange(3.0))
    for name in ("objects", "plain"):
        with pytest.raises(DamagedFile, match=rf"{name}\.npy"):
            files.read_array(tmp_path / f"{name}.npy")
    for array in (np.array([None]), np.array(["a"]), np.ones(2, ml_dtypes.bfloat16)):
        with pytest.raises(TypeError, match=f"array.dtype={array.dtype}"):
            files.write_array(tmp_path / "new.npy", array)
    assert not (tmp_path / "new.npy").exists()


def test_a_missing_file_and_another_array_are_named(tmp_path):
    with pytest.raises(DamagedFile, match=r"none\.npy is missing"):
        files.read_array(tmp_path / "none.npy")
    with pytest.raises(DamagedFile, match=r"none\.json is missing"):
        files.read_json(tmp_path / "none.json")
    digest = files.write_array(tmp_path / "a.npy", np.zeros(3))
    files.write_array(tmp_path / "a.npy", np.ones(3))
    with pytest.raises(DamagedFile, match=rf"a\.npy holds another array .*not {digest[:12]}"):
        files.read_array(tmp_path / "a.npy", digest=digest)


@pytest.mark.parametrize("content", ["[]", "3", "{}", "{", "", '{"seed": 1}'])
def test_json_of_another_kind_torn_or_without_a_digest_is_named(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(DamagedFile, match=r"config\.json"):
        files.read_json(path)


@pytest.mark.parametrize("change", [('"seed": 1', '"seed": 2'), ('"a"', '"b"'), ("1.5", "1.25"), ('"sha', '"shb')])
def test_json_that_was_edited_or_copied_to_another_name_is_named(change, tmp_path):
    path = tmp_path / "config.json"
    files.write_json(path, {"seed": 1, "a": [1.5, {"b": None}], "c": float("nan")})
    text = path.read_text()
    assert files.read_json(path)["seed"] == 1 and json.loads(text)["a"] == [1.5, {"b": None}]
    path.write_text(text.replace(*change))
    (tmp_path / "stage.json").write_text(text)
    for name in ("config", "stage"):
        with pytest.raises(DamagedFile, match=rf"{name}\.json was changed"):
            files.read_json(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda p: p.symlink_to(p), os.mkdir]
)
def test_what_is_no_regular_file_is_named_and_never_waited_for(make, tmp_path):
    path = tmp_path / "a.json"
    make(path)
    for read in (files.read_json, files.read_array, files.read_jsonl, files.file_digest):
        with pytest.raises(DamagedFile, match=r"a\.json (is a pipe|is a device|is a folder|cannot be read)"):
            read(path)


def test_an_array_is_read_as_what_it_was_written_as(tmp_path):
    files.write_array(tmp_path / "0.npy", np.arange(3.0), content="euler 0")
    np.testing.assert_array_equal(files.read_array(tmp_path / "0.npy", content="euler 0"), np.arange(3.0))
    for content in ("", "euler 1"):
        with pytest.raises(DamagedFile, match=r"0\.npy"):
            files.read_array(tmp_path / "0.npy", content=content)


def test_sealed_records_are_verified_line_by_line(tmp_path):
    path = tmp_path / "tuning.jsonl"
    for i in range(3):
        files.append_jsonl(path, {"value": i}, sealed=True)
    assert files.read_jsonl(path, sealed=True) == [{"value": i} for i in range(3)]
    path.write_text(path.read_text().replace('"value": 1', '"value": 4'))
    with pytest.raises(DamagedFile, match=r"tuning\.jsonl line 2 was changed"):
        files.read_jsonl(path, sealed=True)


@pytest.mark.parametrize("content", ["[" * 100_000, "\xff\xfe"])
def test_hostile_json_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DamagedFile, match=r"a\.json is not JSON"):
        files.read_json(tmp_path / "a.json")


def test_json_comes_back_with_arrays_as_lists(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": np.arange(2), "a": jnp.float32(0.5), "c": tmp_path})
    assert files.read_json(tmp_path / "a.json") == {"a": 0.5, "b": [0, 1], "c": str(tmp_path)}
    with pytest.raises(ValueError, match="sha256='x'"):
        files.write_json(tmp_path / "b.json", {"sha256": "x"})


def test_records_come_back_with_arrays_as_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert files.read_jsonl(path) == []
    files.append_jsonl(path, {"step": 1, "loss": jnp.float32(0.5), "norm": np.array([1.0, 2.0])})
    files.append_jsonl(path, {"step": np.int64(2), "loss": float("nan"), "out": tmp_path})
    first, second = files.read_jsonl(path)
    assert first == {"step": 1, "loss": 0.5, "norm": [1.0, 2.0]}
    assert second["step"] == 2 and np.isnan(second["loss"]) and second["out"] == str(tmp_path)


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}', '{"step": 6, "lo\n', "3\n"])
def test_interrupted_and_resumed_records_equal_uninterrupted_ones(tmp_path, torn):
    record = lambda step: {"step": step, "loss": 1 / step}
    straight, resumed = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for step in range(1, 10):
        files.append_jsonl(straight, record(step))
    for step in range(1, 6):
        files.append_jsonl(resumed, record(step))
    with open(resumed, "a") as file:
        file.write(torn)
    assert [r["step"] for r in files.read_jsonl(resumed)] == [1, 2, 3, 4, 5]
    files.truncate_jsonl(resumed, 4)
    for step in range(5, 10):
        files.append_jsonl(resumed, record(step))
    assert resumed.read_bytes() == straight.read_bytes()


def test_truncating_keeps_records_without_a_step_and_makes_no_file(tmp_path):
    files.truncate_jsonl(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
    files.append_jsonl(tmp_path / "m.jsonl", {"note": "x"})
    files.truncate_jsonl(tmp_path / "m.jsonl", 0)
    assert files.read_jsonl(tmp_path / "m.jsonl") == [{"note": "x"}]


@pytest.mark.parametrize("line", ['{"st', "[1]"])
def test_a_torn_line_in_the_middle_is_named(line, tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (files.read_jsonl, lambda p: files.truncate_jsonl(p, 2)):
        with pytest.raises(DamagedFile, match=r"m\.jsonl line 2"):
            read(path)


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"b": 1, "a": np.arange(2)})
    assert path.read_text().startswith('{\n  "a": [\n    0,\n    1\n  ],\n  "b": 1,\n  "sha256": ')

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: files.write_bytes(path, b"new"), lambda: files.write_array(path, np.ones(3))):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and json.loads(path.read_text())["b"] == 1


def test_what_killed_writes_left_is_deleted_when_it_is_old(tmp_path):
    for name in (".a.json.old", ".a.json.new", ".b.json.old"):
        (tmp_path / name).write_text("")
        if name.endswith("old"):
            os.utime(tmp_path / name, (0, 0))
    files.write_json(tmp_path / "a.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json.new", ".b.json.old", "a.json"]


def test_content_and_name_are_flushed_before_a_write_returns(tmp_path, monkeypatch):
    flushed, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    files.write_json(tmp_path / "a.json", {})
    assert flushed[0].startswith(f"{tmp_path}/.a.json.") and flushed[1:] == [str(tmp_path)]
    files.sync(tmp_path / "a.json")
    assert flushed[2:] == [str(tmp_path / "a.json")]
    files.sync(tmp_path / "none")


WRITE_FOR_EVER = """
import sys
from fmjax.storage import files
i = 0
while True:
    i += 1
    files.write_json(sys.argv[1], {"a": [i] * 200_000})
    print(i, flush=True)
"""


def test_a_kill_while_writing_leaves_a_whole_file(tmp_path):
    path = tmp_path / "big.json"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, path], stdout=subprocess.PIPE, env=env)
    for _ in range(3):
        seen = int(child.stdout.readline())
    child.kill()
    child.wait()
    child.stdout.close()
    values = files.read_json(path)["a"]
    assert len(values) == 200_000 and len(set(values)) == 1 and values[0] >= seen
