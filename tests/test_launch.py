"""The command lines, as a user starts them: kills, signals, bad flags, and the shell scripts."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fmjax.storage import checkpoint, files

ROOT = Path(__file__).parents[1]
SMALL = [
    f"--config.{field}"
    for field in ("net.width=16", "net.depth=1", "batch_size=16", "log_every=5", "save_every=10", "sample_every=0")
]
pytestmark = pytest.mark.skipif(
    not (ROOT / "configs").is_dir(), reason="needs the repository's configs and launch files"
)


def start(module, *arguments, **environment):
    env = os.environ | environment | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module, "--config=configs/digits.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def numbers(path):
    speeds = ("steps_per_s", "examples_per_s")
    return [{k: v for k, v in r.items() if k not in speeds} for r in files.read_jsonl(path / "metrics.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    code, _, err = finish(start("launch.train", f"--workdir={path}", "--config.steps=400", *SMALL))
    assert code == 0, err[-2000:]
    return path


def test_train_records_step_loss_and_rates(uninterrupted):
    records = files.read_jsonl(uninterrupted / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(5, 401, 5))
    assert {"step", "loss", "learning_rate", "steps_per_s", "examples_per_s"} <= set(records[0])
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_run_that_is_killed_or_terminated_resumes_to_the_same_bits(sign, code, uninterrupted, tmp_path):
    """SIGKILL loses what came after the last checkpoint, SIGTERM nothing; parameters and records agree bit for bit."""
    arguments = ("launch.train", f"--workdir={tmp_path / 'w'}", "--config.steps=400", *SMALL)
    first = start(*arguments)
    log = tmp_path / "w" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 7, first)
    first.send_signal(sign)
    status, _, err = finish(first)
    assert status == code, err[-2000:]
    at = checkpoint.latest_step(tmp_path / "w" / "checkpoints")
    assert at is not None and at < 400
    if sign == signal.SIGTERM:
        assert f"SIGTERM after step {at}; saved" in err and at >= numbers(tmp_path / "w")[-1]["step"]
    status, _, err = finish(start(*arguments))
    assert status == 0, err[-2000:]
    assert numbers(tmp_path / "w") == numbers(uninterrupted)
    digests = [checkpoint.restore(p / "checkpoints")[2]["digest"] for p in (tmp_path / "w", uninterrupted)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("launch.train", ["--config.lerning_rate=1"], "the config has no field 'lerning_rate'; did you mean"),
        ("launch.train", ["--config.method=flow_machting"], "did you mean 'flow_matching'"),
        ("launch.pipeline", ["--config.solver=rk5"], "did you mean 'rk4'"),
        ("launch.pipeline", ["--config.flow_map.batch_size=130"], "cannot be split at 0.75"),
        ("launch.train", ["--config=configs/digit.py"], "configs/digit.py"),
        ("launch.marginals", ["--config.backward_map=revers"], "backward_map='revers' is not one of"),
        ("launch.marginals", ["--direction=sideways"], "value should be one of <both|forward|backward>"),
        ("launch.marginals", [], "no checkpoint in"),
        ("launch.tune", ["--by=classifer"], "did you mean 'classifier'"),
    ],
)
def test_a_bad_command_line_ends_with_one_line(module, flags, message, tmp_path):
    code, out, err = finish(start(module, f"--workdir={tmp_path / 'w'}", *flags))
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], err
    assert not out and not (tmp_path / "w").exists()


def test_an_unwritable_workdir_ends_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = finish(start("launch.train", f"--workdir={tmp_path / 'file' / 'w'}"))
    assert code == 1 and "cannot be written" in err.splitlines()[-1] and "Traceback" not in err


def test_the_workdir_tells_what_it_ran_on(uninterrupted):
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["versions"]["jax"] and environment["devices"].startswith("1 x ")


def test_convert_takes_a_run_to_a_file_and_the_file_to_a_run(tmp_path):
    """The parameters of a run, written, read into another workdir and written again, are the same file."""
    with checkpoint.writer(tmp_path / "w" / "checkpoints") as manager:
        checkpoint.save(manager, 3, {"ema": {"a": {"kernel": np.arange(6.0)}}})

    def convert(workdir_, *flags):
        env = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", "launch.convert", f"--workdir={tmp_path / workdir_}", *flags]
        return finish(subprocess.Popen(command, cwd=ROOT, env=env, stdout=-1, stderr=-1, text=True))

    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for workdir_, flag, told in (
        ("w", f"--to={a}", "6 parameters in"),
        ("v", f"--source={a}", "6 parameters of kind safetensors"),
        ("v", f"--to={b}", "6 parameters in"),
    ):
        code, out, err = convert(workdir_, flag)
        assert code == 0 and told in out, err[-2000:]
    assert a.read_bytes() == b.read_bytes()
    for flags, message in (
        ([], "give --source=FILE to convert it"),
        ([f"--source={a}", "--options={"], "--options={ is no JSON"),
    ):
        code, _, err = convert("u", *flags)
        assert code == 1 and message in err and "Traceback" not in err and not (tmp_path / "u").exists()


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_quickstart_explains_itself_before_it_installs(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and "A second run resumes" in done.stdout and not done.stderr


@pytest.mark.slow
def test_two_processes_stop_together_at_sigterm_and_resume_to_the_same_bits(tmp_path):
    """jax.distributed on loopback: SIGTERM to one process makes both save one step; records agree with a whole run."""

    def pair(path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        where = {"FMJAX_DISTRIBUTED": "1", "FMJAX_COORDINATOR": f"127.0.0.1:{port}", "FMJAX_PROCESSES": "2"}
        arguments = ("launch.train", f"--workdir={path}", "--config.steps=120", *SMALL)
        return [start(*arguments, **where, FMJAX_PROCESS=str(i)) for i in range(2)]

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [finish(p)[0] for p in pair(whole)] == [0, 0]
    first = pair(parts)
    log = parts / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 5, first[0])
    first[1].send_signal(signal.SIGTERM)
    ended = [finish(p) for p in first]
    assert [status for status, *_ in ended] == [143, 143], ended[0][2][-2000:]
    at = checkpoint.latest_step(parts / "checkpoints")
    assert at < 120 and all(f"SIGTERM after step {at}; saved" in err for *_, err in ended)
    assert [finish(p)[0] for p in pair(parts)] == [0, 0]
    assert numbers(parts) == numbers(whole)


@pytest.mark.slow
def test_marginals_of_a_killed_and_of_two_processes_are_those_of_a_whole_run(uninterrupted, tmp_path):
    """SIGKILL when the first shard is complete, then two processes on loopback: the files' bytes are those of one."""
    arguments = ("launch.marginals", f"--workdir={uninterrupted}", "--config.steps=400", *SMALL)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, out, err = finish(start(*arguments, f"--out={whole}"))
    assert status == 0, err[-2000:]
    assert re.search(r"^forward: 1600 examples, at most .* MB, 32 NFE each .*\nbackward: 1257 examples", out)
    assert re.search(r"round-trip error \S+\nstraightness defect 0, .* along the grid$", out.strip())
    first = start(*arguments, f"--out={parts}")
    wait_for(lambda: any(parts.glob("forward/shard*.array_record")), first)
    first.kill()
    finish(first)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"FMJAX_DISTRIBUTED": "1", "FMJAX_COORDINATOR": f"127.0.0.1:{port}", "FMJAX_PROCESSES": "2"}
    both = [start(*arguments, f"--out={parts}", **where, FMJAX_PROCESS=str(i)) for i in range(2)]
    (status, again, err), (other, silent, _) = [finish(p) for p in both]
    assert (status, other) == (0, 0), err[-2000:]
    assert again.splitlines()[-2:] == out.splitlines()[-2:] and "examples" not in silent
    files = sorted(p.relative_to(whole) for p in whole.rglob("shard*"))
    assert len(files) == 4
    assert all((whole / p).read_bytes() == (parts / p).read_bytes() for p in files)
