"""Command lines: options and overrides parse, what is wrong ends with one line, and the run folder is config enough."""

import json
import re
import signal

import pytest

from fmjax.experiments import command_line, settings, workdir
from fmjax.experiments.command_line import Option
from fmjax.storage import files, lock

base = pytest.importorskip("configs.base")
CONFIG = """
from configs import base


def get_config():
    c = base.get_config()
    c.steps = 10
    return base.finish(c)
"""
OPTIONS = (Option("stage", str, "flow", "the stage"), Option("alpha", float, None, "a strength", repeated=True))


@pytest.fixture
def launch(tmp_path):
    """Run a command that records what it is given."""
    (tmp_path / "c.py").write_text(CONFIG)
    calls = []

    def run(*arguments, config=tmp_path / "c.py"):
        function = lambda read, path, **options: calls.append((read, path, options))
        named = [f"--config={config}"] if config else []
        command_line.run(function, "A command.", *OPTIONS, argv=[*named, f"--workdir={tmp_path / 'w'}", *arguments])
        return calls[-1]

    return run


def refused(launch, *arguments, **options):
    with pytest.raises(SystemExit) as caught:
        launch(*arguments, **options)
    line = caught.value.code
    assert line.startswith("error: ") and "\n" not in line and len(line) <= 310
    return line.removeprefix("error: ")


def test_options_and_overrides_reach_the_command(launch, tmp_path):
    read, path, options = launch(
        "--config.batch_size=12", "--config.net.width=32", "--stage=x", "--alpha=1", "--alpha=2"
    )
    assert (read.flow.steps, read.flow.batch_size, read.flow.net["width"]) == (10, 12, 32)
    assert path == tmp_path / "w" and options == {"stage": "x", "alpha": [1.0, 2.0]}


def test_another_network_by_a_flag_leaves_the_options_of_the_former(launch, tmp_path):
    """The config's network has a width and a depth; a factory of one's own takes no depth."""
    (tmp_path / "mine.py").write_text("def make(*, width: int = 8):\n    return None\n")
    name = f"{tmp_path / 'mine.py'}:make"
    read, *_ = launch(f"--config.net.name={name}")
    assert dict(read.flow.net) == {"name": name}
    read, *_ = launch("--config.net.width=32", f"--config.net.name={name}")
    assert dict(read.flow.net) == {"name": name, "width": 32}
    read, *_ = launch(f"--config.net={name}", "--config.net.width=32")
    assert dict(read.flow.net) == {"name": name, "width": 32}
    same, *_ = launch("--config.net.name=mlp", "--config.net.width=32")
    whole, *_ = launch("--config.net.width=32")
    assert dict(same.flow.net) == dict(whole.flow.net) and "depth" in same.flow.net


@pytest.mark.parametrize(("flag", "field"), [("sampling=x", "sampling='x'"), ("net={", "net='{'")])
def test_a_word_for_a_mapping_without_a_name_is_refused(flag, field, launch):
    assert refused(launch, f"--config.{flag}").startswith(f"{field}: the field is a mapping. Set its fields")


def test_the_run_folder_is_config_enough(launch, tmp_path):
    read, *_ = launch("--config.batch_size=12")
    (tmp_path / "w").mkdir()
    files.write_json(tmp_path / "w" / "config.json", workdir.plain(read.config))
    again, *_ = launch("--config.samplers.euler=(2,)", config=None)
    assert (again.flow, again.correctors, again.flow_map) == (read.flow, read.correctors, read.flow_map)
    assert again.samplers["euler"] == (2,)


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--config.lerning_rate=1", "the config has no field 'lerning_rate'; did you mean 'learning_rate'?"),
        ("--config.net.widht=1", "the config has no field 'widht'; did you mean 'width'?"),
        ("--config.zzz=1", "the config has no field 'zzz'"),
        ("--config.steps=abc", "flag --config.steps=abc: invalid literal"),
        ("--config.steps=0", "steps=0"),
        ("--config.seed=4294967296", "seed=4294967296"),
        ("--config.learning_rate=nan", "learning_rate=nan"),
        ("--config.correctors.score.ema=1.0", "correctors.score.ema=1.0"),
        ("--config.schedule=cosin", "schedule='cosin'"),
        ("--wrkdir=w", "--wrkdir=w: no such option; did you mean 'workdir'?"),
        ("--alpha=x", "argument --alpha: invalid float value: 'x'"),
        ("stray", "stray: no such option"),
    ],
)
def test_what_is_wrong_ends_with_one_line(launch, argument, line):
    assert refused(launch, argument).startswith(line)


def test_a_missing_folder_or_file_ends_with_one_line(launch, tmp_path):
    assert refused(launch, config=tmp_path / "none.py").startswith(f"config='{tmp_path / 'none.py'}'")
    assert refused(launch, config=None).startswith(f"workdir={tmp_path / 'w'}")
    with pytest.raises(SystemExit, match="^error: workdir: not given"):
        command_line.run(lambda *a, **k: None, "A command.", argv=[f"--config={tmp_path / 'c.py'}"])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import configs\n\ndef get_config():\n    return configs.zzz\n", "failed in line 4 (AttributeError: .*zzz"),
        ("def get_config(:\n", "failed in line 1 (SyntaxError: "),
        ("import none_such\n", "failed in line 1 (ModuleNotFoundError: .*none_such"),
        ("steps = 4\n", "failed .*get_config"),
        ("def get_config(name):\n    pass\n", "failed .*get_config"),
        ("def get_config():\n    return 3\n", "."),
        ("raise MemoryError\n", "."),
    ],
)
def test_a_config_file_that_fails_ends_with_its_line_and_its_error(text, what, launch, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    line = refused(launch, config=tmp_path / "bad.py")
    assert re.search(what.replace("(", r"\("), line) and len(line) <= 300, line
    (tmp_path / "debug").mkdir()
    with pytest.raises(Exception, match="."):  # the traceback
        launch("--debug", config=tmp_path / "bad.py")


@pytest.mark.parametrize("name", ["/etc/passwd", "w/config.json", "/dev/null", "/tmp"])
def test_what_is_no_python_file_is_no_config(name, launch):
    assert refused(launch, config=name).startswith("config=")


@pytest.mark.parametrize("name", ["", " ", "a\0b", "w" * 256, "é" * 200, "s3://bucket/w"])
def test_a_name_that_no_folder_can_have_is_refused_by_its_option(name, launch, tmp_path):
    with pytest.raises(SystemExit) as end:
        command_line.run(
            lambda *a, **k: None, "A command.", argv=[f"--config={tmp_path / 'c.py'}", f"--workdir={name}"]
        )
    line = str(end.value.code)
    assert line.startswith("error: workdir") and len(line) <= 307 and "\0" not in line


def test_a_long_message_keeps_its_end_and_short_paths(tmp_path, monkeypatch):
    deep = "/" + "/".join(["d" * 100] * 5)

    def failing(*a, **k):
        raise RuntimeError(f"workdir={deep}: its stage 'flow' is in the way of {deep}/flow. Delete it.")

    with pytest.raises(SystemExit) as end:
        command_line.run_plain(failing, "A command.", argv=[])
    line = str(end.value.code)
    assert len(line) <= 307 and line.endswith("Delete it.") and "its stage 'flow'" in line

    def missing(*a, **k):
        open("/nowhere/x" * 40)

    with pytest.raises(SystemExit) as end:
        command_line.run_plain(missing, "A command.", argv=[])
    assert "No such file or directory" in str(end.value.code) and len(str(end.value.code)) <= 307


def test_help_lists_options_and_config_fields(launch, capsys):
    with pytest.raises(SystemExit):
        launch("--help")
    text = capsys.readouterr().out
    for name in ("--stage", "--workdir", "learning_rate", "label_dropout", "corrections"):
        assert name in text
    assert not {name for name in base.get_config() if f"\n  {name} " not in text}


def test_the_resolved_config_is_printed(launch, capsys, tmp_path):
    with pytest.raises(IndexError):  # nothing was run
        launch("--print_config", "--config.steps=7")
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 7 and settings.read(printed).flow.steps == 7
    assert not (tmp_path / "w").exists()


def test_an_error_of_the_command_is_one_line_and_a_traceback_on_demand(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)

    def fail(read, path):
        raise ValueError("field=1: wrong.\n  Do this.")

    argv = [f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'w'}"]
    with pytest.raises(SystemExit, match="^error: field=1: wrong. Do this.$"):
        command_line.run(fail, "A command.", argv=argv)
    with pytest.raises(ValueError, match="field=1"):
        command_line.run(fail, "A command.", argv=[*argv, "--debug"])


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
@pytest.mark.parametrize("with_config", [True, False])
def test_a_signal_outside_of_a_training_is_one_line_and_unlocks(name, status, with_config, tmp_path, capsys):
    """While samples are drawn, marginals are built, or strengths are searched."""
    (tmp_path / "c.py").write_text(CONFIG)
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the suite itself may run where they are ignored
        signal.signal(s, signal.default_int_handler if s == signal.SIGINT else signal.SIG_DFL)
    former = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def work(*arguments, **options):
        with lock.owned(tmp_path / "w"):
            signal.raise_signal(getattr(signal, name))
            raise AssertionError("works on after the signal")

    with pytest.raises(SystemExit) as end:
        if with_config:
            command_line.run(work, "A command.", argv=[f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'w'}"])
        else:
            command_line.run_plain(work, "A command.", argv=[])
    assert end.value.code == status
    assert capsys.readouterr().err == f"interrupted ({name}). Run the same command to continue.\n"
    assert not (tmp_path / "w" / lock.FILE).exists()
    assert former == {s: signal.getsignal(s) for s in former}


def test_a_signal_that_is_ignored_stays_ignored_outside_of_a_training():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        command_line.run_plain(lambda: signal.raise_signal(signal.SIGHUP), "A command.", argv=[])
    finally:
        signal.signal(signal.SIGHUP, former)
