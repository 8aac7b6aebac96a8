"""Kills with -9 at random moments, and two launches of one command: the numbers are those of one whole run."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from fmjax.storage import checkpoint, files, lock

pytestmark = pytest.mark.slow
CONFIG = f"--config={Path(__file__).parent / 'tiny.py'}"
LONGER = [f"--config.{field}" for field in ("steps=24", "correctors.score.steps=12", "flow_map.steps=12")]
KILLS = 10  # of each command
LAUNCHES = 20
COMMANDS = {  # command -> what is in the folder before, and its arguments
    "train": (None, []),
    "marginals": ("train", []),
    "pipeline": (None, []),
    "reflow": (None, []),
    "tune": ("pipeline", ["--solver_steps=2", "--alpha=0.1", "--alpha=0.5", "--beta=0", "--most=1", "--seeds=2"]),
}
SERVER = multiprocessing.get_context("forkserver")  # starts a process without importing JAX again
SERVER.set_forkserver_preload([f"launch.{command}" for command in COMMANDS])


def work(module, arguments, log):
    """Run a command in a process of its own, its output in a file."""
    with open(log, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            importlib.import_module(module).main(arguments)
        except SystemExit as end:
            print(end.code)
            raise


def start(command, path, log):
    arguments = [CONFIG, *LONGER, f"--workdir={path}", *COMMANDS[command][1]]
    process = SERVER.Process(target=work, args=(f"launch.{command}", arguments, str(log)))
    process.start()
    return process


def owned(process, path, seconds=120):
    """Wait until the process owns the folder, or has ended."""
    end = time.monotonic() + seconds
    while process.is_alive() and not (path / lock.FILE).exists():
        assert time.monotonic() < end
        time.sleep(0.005)
    return process.is_alive()


def numbers(path):
    """Digests of all parameters, records without their speeds, samples, and all numbers of JSON files."""
    kept = {}
    for folder in path.rglob("checkpoints"):
        step, _, metadata = checkpoint.restore(folder)
        kept[str(folder.relative_to(path))] = (step, metadata["digest"])
    for file in path.rglob("*"):
        name = str(file.relative_to(path))
        if file.suffix == ".jsonl":
            lines = files.read_jsonl(file)
            kept[name] = [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]
        elif file.suffix == ".npy" or file.name.startswith("shard-"):
            kept[name] = file.read_bytes()
        elif file.name in ("metrics.json", "straightened.json", "choice.json", "manifest.json"):
            kept[name] = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("environment", *LOCAL)}
    return kept


LOCAL = ("sha256", "digest", "page", "costs")  # of a file with an environment or a page, or seconds: not numbers


def complete(command, path, log):
    process = start(command, path, log)
    owned(process, path)
    began = time.monotonic()
    process.join(600)
    assert process.exitcode == 0, log.read_text()[-3000:]
    return time.monotonic() - began


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of each command: the folder before, the folder of an uninterrupted run, and how long that worked."""
    root, made = tmp_path_factory.mktemp("whole"), {}

    def of(command):
        if command not in made:
            before, path = COMMANDS[command][0], root / command
            if before:
                shutil.copytree(of(before)[0], path)
            complete(command, path, root / "log")  # compiles
            shutil.rmtree(path)
            if before:
                shutil.copytree(of(before)[0], path)
            made[command] = path, complete(command, path, root / "log")
        return made[command]

    return of


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_killed_at_random_moments_gives_the_same_bits(command, whole, tmp_path):
    expected, seconds = whole(command)
    before, log, path = COMMANDS[command][0], tmp_path / "log", tmp_path / "w"
    rng, kills = random.Random(command), 0
    while kills < KILLS or not path.exists():
        if not path.exists() and before:
            shutil.copytree(whole(before)[0], path)
        process = start(command, path, log)
        if owned(process, path):
            process.join(rng.uniform(0, seconds))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join(60)
        if process.exitcode == 0:
            assert numbers(path) == numbers(expected)
            shutil.rmtree(path)
        else:
            assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
    complete(command, path, log)
    assert numbers(path) == numbers(expected)
    assert "Traceback" not in log.read_text()


def test_of_two_launches_one_is_refused_and_the_other_is_whole(whole, tmp_path):
    """At random offsets; of every second pair the first launch is stopped, and goes on when the second has ended."""
    expected, seconds = whole("train")
    rng, refused = random.Random(0), 0
    for i in range(LAUNCHES):
        path, logs = tmp_path / str(i), [tmp_path / f"{i}-{n}.log" for n in range(2)]
        first = start("train", path, logs[0])
        time.sleep(rng.uniform(0, 0.3 * seconds))
        if i % 3:
            owned(first, path)
        time.sleep(rng.uniform(0, 0.5 * seconds))
        stopped = i % 2 == 0
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(first.pid, signal.SIGSTOP if stopped else 0)
        second = start("train", path, logs[1])
        second.join(120)
        with contextlib.suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGCONT if stopped else 0)
        first.join(300)
        codes = [first.exitcode, second.exitcode]
        assert codes in ([0, 0], [0, 1], [1, 0]), [log.read_text()[-2000:] for log in logs]
        if 1 in codes:
            refused += 1
            loser, winner = codes.index(1), (first, second)[codes.index(0)]
            line = logs[loser].read_text()
            assert f"process {winner.pid} on {os.uname().nodename}" in line and line.count("\n") == 1, line
        assert numbers(path) == numbers(expected)
        assert not list(path.rglob("*tmp*")) and not list(path.rglob(lock.FILE))
    assert refused >= LAUNCHES // 2, refused
