"""Flags of a config: good ones parse, bad ones end with one line."""

import sys

import pytest

from fmjax.experiments import command_line

ml_collections = pytest.importorskip("ml_collections")
CONFIG = """
import ml_collections
def get_config():
    c = ml_collections.ConfigDict({"learning_rate": 1e-3, "steps": 10, "net": {"name": "mlp", "width": 64}})
    return c.lock()
"""


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parses a command line as a launcher does, in flags of its own."""
    from absl import flags
    from ml_collections import config_flags

    (tmp_path / "c.py").write_text(CONFIG)

    def run(*arguments, config=tmp_path / "c.py"):
        values = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        config_flags.DEFINE_config_file("config", flag_values=values)
        argv = ["launch", f"--config={config}", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(flags, "FLAGS", values)
        command_line.parse_flags(argv)
        return values

    return run


def test_good_flags_parse(parse):
    values = parse("--config.steps=12", "--config.net.width=32", "--workdir=w")
    assert (values.config.steps, values.config.net.width, values.workdir) == (12, 32, "w")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.lerning_rate=1", "error: the config has no field 'lerning_rate'; did you mean 'learning_rate'?"),
        ("--config.net.widht=1", "error: the config has no field 'widht'; did you mean 'width'?"),
        ("--config.zzz=1", "error: the config has no field 'zzz'"),
        ("--config.steps=abc", "error: flag --config.steps=abc: invalid literal for int() with base 10: 'abc'"),
        ("--wrkdir=w", "error: Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    ],
)
def test_a_bad_flag_ends_with_one_line(parse, argument, message):
    with pytest.raises(SystemExit) as caught:
        parse(argument)
    assert caught.value.code == message


def test_a_missing_config_file_ends_with_one_line_and_a_failing_one_with_its_traceback(parse, tmp_path):
    with pytest.raises(SystemExit) as caught:
        parse(config=tmp_path / "none.py")
    assert "No such file" in caught.value.code and "\n" not in caught.value.code
    (tmp_path / "bad.py").write_text("import ml_collections\ndef get_config():\n    return ml_collections.zzz\n")
    with pytest.raises(AttributeError, match="Traceback.*|zzz"):
        parse(config=tmp_path / "bad.py")


def test_absls_own_error_names_the_nearest_field():
    from absl import flags

    config = ml_collections.ConfigDict({"learning_rate": 1e-3, "net": {"name": "mlp", "width": 64}})
    explain = lambda flag: command_line.explain_flag_error(flags.UnrecognizedFlagError(flag), config)
    assert explain("config.lerning_rate") == "the config has no field 'lerning_rate'; did you mean 'learning_rate'?"
    assert explain("config.width") == "the config has no field 'width'; did you mean 'net.width'?"
    assert explain("config.zzz") == (
        "the config has no field 'zzz' (its fields are learning_rate, net, net.name, net.width)"
    )
