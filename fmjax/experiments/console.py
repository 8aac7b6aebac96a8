"""The command ``fmjax`` of an installed package: ``fmjax train ...`` is ``python -m launch.train ...``."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fmjax.checks import nearest

PACKAGE = Path(__file__).parents[1]
COMMANDS = ("train", "marginals", "pipeline", "evaluate", "sample", "likelihood", "tune", "reflow", "convert", "report")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: the name of the command and its arguments; by default the arguments of the process.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        print(summary())
        return
    if name not in COMMANDS:
        sys.exit(f"error: {name}: no such command{nearest(name, COMMANDS)}. There are {', '.join(COMMANDS)}.")
    sys.argv[0] = f"fmjax {name}"
    _module(name).main(rest)


def summary() -> str:
    """Return the help of ``fmjax``: one line a command.

    Returns:
        The text.

    >>> summary().splitlines()[0]
    'usage: fmjax COMMAND [--config=FILE or NAME] [--workdir=FOLDER] ...'
    """
    lines = ["usage: fmjax COMMAND [--config=FILE or NAME] [--workdir=FOLDER] ...", ""]
    for name in COMMANDS:
        first = re.match(r'"""(.*?)(?:\n\n|""")', _file(name).read_text(), re.DOTALL)[1]
        lines.append(f"  {name:<11} {' '.join(first.split())}")
    return "\n".join([*lines, "", "fmjax COMMAND --help lists the options of a command."])


def _file(name: str) -> Path:
    """Return the file of a command, in the wheel or in a checkout."""
    places = [folder / "launch" / f"{name}.py" for folder in (PACKAGE, PACKAGE.parent)]
    return next(place for place in places if place.exists())


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fmjax_command_{name}", _file(name))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
