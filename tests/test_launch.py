"""The command lines, as a user starts them: kills, signals, bad options, and the shell scripts.

A launcher runs in this process (``launch.train.main(arguments)``) where a test needs no process that it can kill.
"""

import importlib
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
CONFIG = f"--config={ROOT / 'configs' / 'digits.py'}"
SMALL = [
    f"--config.{field}"
    for field in ("net.width=16", "net.depth=1", "batch_size=16", "log_every=5", "save_every=10", "sample_every=0")
]
STEPS = 200
pytestmark = pytest.mark.skipif(
    not (ROOT / "configs").is_dir(), reason="needs the repository's configs and launch files"
)


def start(module, *arguments, **environment):
    """Start a launcher as a process on the devices of this one."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"} | environment
    command = [sys.executable, "-m", module, CONFIG, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def launch(module, *arguments):
    """Run a launcher in this process."""
    importlib.import_module(module).main([str(a) for a in arguments])


def refusal(module, *arguments):
    """The line with which a launcher ends in this process."""
    with pytest.raises(SystemExit) as end:
        launch(module, *arguments)
    assert isinstance(end.value.code, str), "a message is printed on stderr, and the status is 1"
    return end.value.code


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def numbers(path):
    speeds = ("steps_per_s", "examples_per_s")
    return [{k: v for k, v in r.items() if k not in speeds} for r in files.read_jsonl(path / "flow" / "metrics.jsonl")]


def train(path, *changes, steps=STEPS):
    return (f"--workdir={path}", f"--config.steps={steps}", *SMALL, *changes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    launch("launch.train", CONFIG, *train(path))
    return path


def test_train_records_step_loss_and_rates(uninterrupted):
    records = files.read_jsonl(uninterrupted / "flow" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(5, STEPS + 1, 5))
    assert {"step", "loss", "learning_rate", "steps_per_s", "examples_per_s"} <= set(records[0])
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]


@pytest.mark.parametrize(
    ("sign", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_run_that_is_killed_or_terminated_resumes_to_the_same_bits(sign, code, uninterrupted, tmp_path):
    """SIGKILL loses what came after the last checkpoint, SIGTERM nothing; parameters and records agree bit for bit."""
    child = start("launch.train", *train(tmp_path))
    log, checkpoints = tmp_path / "flow" / "metrics.jsonl", tmp_path / "flow" / "checkpoints"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 7, child)
    child.send_signal(sign)
    status, _, err = finish(child)
    assert status == code, err[-2000:]
    at = checkpoint.latest_step(checkpoints)
    assert at is not None and at < STEPS
    if sign == signal.SIGTERM:
        assert f"SIGTERM after step {at}; saved" in err and at >= numbers(tmp_path)[-1]["step"]
    launch("launch.train", CONFIG, *train(tmp_path))
    assert numbers(tmp_path) == numbers(uninterrupted)
    digests = [checkpoint.restore(p / "flow" / "checkpoints")[2]["digest"] for p in (tmp_path, uninterrupted)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        ("launch.train", ["--config.lerning_rate=1"], "did you mean 'learning_rate'"),
        ("launch.train", ["--config.method=flow_machting"], "did you mean 'flow_matching'"),
        ("launch.train", ["--workdirr=x"], "did you mean 'workdir'"),
        ("launch.pipeline", ["--config.solver=rk5"], "did you mean 'rk4'"),
        ("launch.pipeline", ["--config.flow_map.batch_size=130"], "130"),
        ("launch.train", ["--config=configs/digit.py"], "configs/digit.py"),
        ("launch.marginals", ["--config.backward_map=revers"], "backward_map='revers'"),
        ("launch.marginals", ["--direction=sideways"], "'sideways'"),
        ("launch.marginals", [], "has no checkpoint of a flow"),
        ("launch.tune", ["--by=classifer"], "did you mean 'classifier'"),
    ],
)
def test_a_bad_command_line_ends_with_one_line(module, flags, message, tmp_path, capsys):
    line = refusal(module, CONFIG, f"--workdir={tmp_path / 'w'}", *flags)
    assert line.startswith("error: ") and message in line and "\n" not in line
    captured = capsys.readouterr()
    assert not captured.out and not captured.err and not (tmp_path / "w").exists()


def test_a_bad_command_line_is_one_line_of_stderr_and_status_1(tmp_path):
    code, out, err = finish(start("launch.train", f"--workdir={tmp_path / 'w'}", "--config.lerning_rate=1"))
    lines = [line for line in err.splitlines() if line.strip()]
    assert code == 1 and len(lines) == 1 and lines[0].startswith("error: ") and not out, err


def test_an_unwritable_workdir_ends_with_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal("launch.train", CONFIG, f"--workdir={tmp_path / 'file' / 'w'}")


def test_the_workdir_tells_what_it_ran_on(uninterrupted):
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert environment["versions"]["jax"] and environment["devices"].startswith("8 x ")


def test_convert_takes_a_run_to_a_file_and_the_file_to_a_run(tmp_path, capsys):
    """The parameters of a run, written, read into another workdir and written again, are the same file."""
    with checkpoint.writer(tmp_path / "w" / "checkpoints") as manager:
        checkpoint.save(manager, 3, {"ema": {"a": {"kernel": np.arange(6.0)}}})
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for workdir, flag, line in (
        ("w", f"--to={a}", "6 parameters in"),
        ("v", f"--source={a}", "6 parameters of kind safetensors"),
        ("v", f"--to={b}", "6 parameters in"),
    ):
        launch("launch.convert", f"--workdir={tmp_path / workdir}", flag)
        assert line in capsys.readouterr().out
    assert a.read_bytes() == b.read_bytes()
    for flags, message in (([], "--source=FILE"), ([f"--source={a}", "--options={"], "options=")):
        assert message in refusal("launch.convert", f"--workdir={tmp_path / 'u'}", *flags)
        assert not (tmp_path / "u").exists()


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda p: p.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_quickstart_explains_itself_before_it_installs(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), "--help"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and "A second run resumes" in done.stdout and not done.stderr


def pair(module, *arguments):
    """Two processes of one device each that find each other over loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = {"FMJAX_DISTRIBUTED": "1", "FMJAX_COORDINATOR": f"127.0.0.1:{port}", "FMJAX_PROCESSES": "2"}
    return [start(module, *arguments, **where, FMJAX_PROCESS=str(i), XLA_FLAGS="") for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_together_and_resume_to_the_same_bits(sign, tmp_path):
    """A signal to one process makes both save one step; records agree with a whole run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert [finish(p)[0] for p in pair("launch.train", *train(whole, steps=120))] == [0, 0]
    first = pair("launch.train", *train(parts, steps=120))
    log = parts / "flow" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 5, first[0])
    first[1].send_signal(sign)
    ended = [finish(p) for p in first]
    assert [status for status, *_ in ended] == [143, 143], ended[0][2][-2000:]
    at = checkpoint.latest_step(parts / "flow" / "checkpoints")
    assert at < 120 and all(f"SIGTERM after step {at}; saved" in err for *_, err in ended)
    assert [finish(p)[0] for p in pair("launch.train", *train(parts, steps=120))] == [0, 0]
    assert numbers(parts) == numbers(whole)


@pytest.mark.slow
def test_marginals_of_killed_and_of_two_processes_are_those_of_one(uninterrupted, tmp_path):
    """SIGKILL when the first shard is complete, then two processes on loopback: the files' bytes are the same."""
    arguments = ("launch.marginals", *train(uninterrupted))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    status, out, err = finish(start(*arguments, f"--out={whole}", XLA_FLAGS=""))
    assert status == 0, err[-2000:]
    assert re.search(r"^forward: 1600 examples, at most .* MB, 32 NFE each .*\nbackward: \d+ examples", out)
    assert re.search(r"round-trip error \S+\nstraightness defect 0, .* along the grid$", out.strip())
    first = start(*arguments, f"--out={parts}", XLA_FLAGS="")
    wait_for(lambda: any(parts.glob("forward/shard*.array_record")), first)
    first.kill()
    finish(first)
    (status, again, err), (other, silent, _) = [finish(p) for p in pair(*arguments, f"--out={parts}")]
    assert (status, other) == (0, 0), err[-2000:]
    assert again.splitlines()[-2:] == out.splitlines()[-2:] and "examples" not in silent
    names = sorted(p.relative_to(whole) for p in whole.rglob("shard*"))
    assert len(names) == 4
    assert all((whole / p).read_bytes() == (parts / p).read_bytes() for p in names)
