"""One run owns a folder: two real processes, locks that a dead process left, and file systems without flock."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from fmjax.storage import Owned, lock, owned

OWN = """
import sys, time
from fmjax.storage import owned
with owned(sys.argv[1]):
    print("owned", flush=True)
    sys.stdin.readline()
"""


def other(folder):
    """Start another process that owns the folder until a line is written to it."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OWN, str(folder)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True, env=env)


def write_lock(folder, **owner):
    folder.mkdir(exist_ok=True)
    now = {"host": socket.gethostname(), "pid": os.getpid(), "started": lock._started(os.getpid()), "since": "then"}
    (folder / lock.FILE).write_text(json.dumps(now | owner))


def dead_process():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    folder = tmp_path / "run"
    with other(folder) as first:
        assert first.stdout.readline() == "owned\n"
        with pytest.raises(Owned, match=f"{folder} is in use by process {first.pid} on {socket.gethostname()}") as e:
            with owned(folder):
                pass
        assert len(str(e.value)) < 300 + len(str(folder))
        first.communicate("end\n")
        assert first.returncode == 0
    with owned(folder) as path:
        assert path == folder
    assert list(folder.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    with other(tmp_path) as first:
        assert first.stdout.readline() == "owned\n"
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / lock.FILE).exists()
    with owned(tmp_path):
        assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_of_many_processes_that_start_at_once_one_owns_the_folder(tmp_path):
    """Over the lock of a dead process, so that all of them try to take it over."""
    write_lock(tmp_path, pid=dead_process())
    children = [other(tmp_path) for _ in range(4)]
    time.sleep(0.1)
    results = []
    for child in children:
        line = child.stdout.readline()
        results.append(line)
    assert results.count("owned\n") == 1 and results.count("") == 3
    for child in children:
        child.communicate("end\n" if child.poll() is None else None)
    assert list(tmp_path.iterdir()) == []


def test_a_process_with_the_number_of_a_dead_one_is_not_its_owner(tmp_path):
    write_lock(tmp_path, started="another boot:17")
    with owned(tmp_path):
        pass
    write_lock(tmp_path, pid=os.getppid(), started="another boot:17")
    with owned(tmp_path):
        pass


def test_a_running_owner_and_one_of_another_host_are_believed(tmp_path):
    write_lock(tmp_path, pid=os.getppid(), started=lock._started(os.getppid()))
    with pytest.raises(Owned, match=f"process {os.getppid()} on"), owned(tmp_path):
        pass
    write_lock(tmp_path, host="elsewhere", pid=dead_process())
    with pytest.raises(Owned, match=r"on elsewhere .*delete owner\.lock"), owned(tmp_path):
        pass
    assert (tmp_path / lock.FILE).exists()


def test_an_unreadable_lock_is_believed_while_it_is_new(tmp_path):
    for content in ("", "3", '{"pid'):
        path = tmp_path / lock.FILE
        path.write_text(content)
        with pytest.raises(Owned, match="another run"), owned(tmp_path):
            pass
        os.utime(path, (0, 0))
        with owned(tmp_path):
            pass


def test_blocks_of_one_process_nest_and_the_last_one_releases(tmp_path):
    leave, entered = threading.Event(), threading.Event()

    def hold():
        with owned(tmp_path):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    with owned(tmp_path):
        with owned(tmp_path):
            pass
        assert (tmp_path / lock.FILE).exists()
        thread.start()
        entered.wait(10)
    assert (tmp_path / lock.FILE).exists()
    leave.set()
    thread.join()
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_block_releases_and_a_deleted_folder_is_no_error(tmp_path):
    with pytest.raises(KeyError), owned(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / "gone"
    with owned(folder):
        (folder / lock.FILE).unlink()
        folder.rmdir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links_and_flock_is_locked_too(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "link", unsupported)
    monkeypatch.setattr("fcntl.flock", unsupported)
    with owned(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [lock.FILE]
        with other(tmp_path) as second:
            assert second.wait() != 0 and f"in use by process {os.getpid()}" in second.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error_of_the_system(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), owned(tmp_path / "file" / "run"):
        pass
    assert not lock._held


def test_a_block_that_fails_leaves_no_empty_folder(tmp_path):
    with pytest.raises(KeyError), owned(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").write_text("")
        raise KeyError
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["file"]
    (tmp_path / "own").mkdir()
    with pytest.raises(KeyError), owned(tmp_path / "own"):
        raise KeyError
    with owned(tmp_path / "used"):
        pass
    assert (tmp_path / "own").is_dir() and (tmp_path / "used").is_dir()
