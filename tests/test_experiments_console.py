"""The command ``fmjax``: its commands are those of ``launch``, from a checkout and from the wheel's layout."""

import shutil
import tomllib

import pytest
from laboratory import ROOT
from laboratory import laboratory as laboratory  # a fixture

from fmjax.experiments import console


def test_every_command_of_launch_is_a_command():
    files = {path.stem for path in (ROOT / "launch").glob("*.py") if "command_line.run" in path.read_text()}
    assert files == set(console.COMMANDS)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    included = {f"launch/{name}.py": f"fmjax/launch/{name}.py" for name in console.COMMANDS}
    assert wheel["force-include"] == included | {"configs": "fmjax/configs"}


def test_help_has_one_line_a_command(capsys):
    console.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name in console.COMMANDS:
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert len(line.split()) > 3


def test_a_command_runs_by_its_name_and_a_config_by_its(laboratory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console.main(["train", "--config=table", "--workdir=w", "--config.data.path=x.npz", "--print_config"])
    assert '"name": "arrays"' in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: config='tabel'"):
        console.main(["train", "--config=tabel", "--workdir=w"])
    with pytest.raises(SystemExit, match="^error: smaple: no such command; did you mean 'sample'"):
        console.main(["smaple"])


def test_the_commands_of_a_wheel_are_used(tmp_path, monkeypatch):
    (tmp_path / "launch").mkdir()
    for name in console.COMMANDS:
        shutil.copy(ROOT / "launch" / f"{name}.py", tmp_path / "launch")
    monkeypatch.setattr(console, "PACKAGE", tmp_path)
    assert console._file("sample") == tmp_path / "launch" / "sample.py"
    assert "sample" in console.summary()
    assert console._module("sample").__file__ == str(tmp_path / "launch" / "sample.py")
