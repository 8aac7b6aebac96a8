"""Progress: a line a minute in a log, the time left from the recent speed, and no failing widgets."""

import sys
import types

import pytest

from fmjax.training import logs, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves by hand."""
    now = types.SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now.seconds)
    return now


def run(clock, times, total=10_000, **values):
    """Take one step after each of these times."""
    with logs.bar("flow", total) as bar:
        for seconds in times:
            clock.seconds += seconds
            bar.set_postfix(**values)
            bar.update()


def test_a_log_file_gets_a_line_a_minute(clock, capsys):
    run(clock, [0.5] * 1000, loss="0.5312")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + 8  # 500 s, and the end
    assert lines[0] == "flow: step 121 of 10000, loss 0.5312, 2 steps/s, 82 min left, first step 0 s"
    assert lines[-1] == "flow: step 1000 of 10000, done in 500 s"


def test_compilation_is_told_apart_and_does_not_count(clock, capsys):
    run(clock, [300.0] + [1.0] * 61, total=162)
    (line, last) = capsys.readouterr().err.splitlines()
    assert line == "flow: step 61 of 162, 1 steps/s, 101 s left, first step 5 min".replace("101 s", "2 min")
    assert "done in 361 s" in last


def test_the_time_left_follows_the_recent_speed(clock, capsys):
    run(clock, [1.0] + [1.0] * 60 + [10.0] * 6, total=127)
    assert "10 min left" in capsys.readouterr().err.splitlines()[1]  # 60 of 10 s, not of the mean 1.8 s


def test_a_short_run_writes_nothing_to_a_log(clock, capsys):
    run(clock, [1.0] * 50)
    assert capsys.readouterr().err == ""


def test_a_failed_loop_does_not_say_done(clock, capsys):
    with pytest.raises(KeyError):
        with logs.bar("flow", 10) as bar:
            for _ in range(3):
                clock.seconds += 70
                bar.update()
            raise KeyError
    assert "done" not in capsys.readouterr().err


def test_a_total_that_comes_later_and_other_units(clock, capsys):
    with logs.bar("marginals", 0, unit="example") as bar:
        for done in (10, 70, 140):
            clock.seconds += 61
            bar.total = 500
            bar.update(done - bar.n)
    assert bar.n == 140
    assert "marginals: example 70 of 500, 0.984 examples/s, 7 min left" in capsys.readouterr().err


class Terminal:
    """A stderr that is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_whose_speed_is_without_compilation(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with logs.bar("flow", 100, 40) as bar:
        bar._bar.start_t -= 300  # as if the first step had compiled for five minutes
        bar._bar.last_print_t -= 300
        bar.set_postfix(loss="0.5")
        bar.update()
        assert bar._bar.format_dict["elapsed"] < 10
        bar.update(59)
    assert "100/100" in terminal.text and "loss=0.5" in terminal.text and "flow" in terminal.text


def test_a_notebook_whose_widgets_fail_gets_a_text_bar(monkeypatch):
    """Without ipywidgets tqdm.auto raises when a bar is made, or warns."""
    import tqdm.auto

    def broken(*args, **kwargs):
        raise ImportError("IProgress not found. Please update jupyter and ipywidgets.")

    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(tqdm.auto, "tqdm", broken)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with logs.bar("flow", 3) as bar:
        bar.update(3)
    assert "3/3" in terminal.text


def test_other_processes_than_the_first_are_silent(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.jax, "process_index", lambda: 1)
    run(clock, [100.0] * 5)
    assert capsys.readouterr().err == ""
