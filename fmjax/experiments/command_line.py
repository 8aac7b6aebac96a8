"""The command line: options of a command, the config with its overrides, and every refusal in one line."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fmjax import checks
from fmjax.experiments import settings, workdir
from fmjax.storage import untrusted
from fmjax.training import sharding
from fmjax.training.signals import Interrupted, interrupts

FILE = "FILE"
MAPPING = re.compile(r"flag --config\.(\S+?)=(.*?): Failed to parse .* as a ConfigDict", re.DOTALL)
NAMED = r"--config\.([\w.]+)\.name="  # a flag that names a network, a data set, ...
NO_FIELD = "the config has no field"


class Option(NamedTuple):
    """An option of a command.

    Attributes:
        name: ``--name``.
        type: type of the value; ``bool`` for a switch without a value.
        default: the value without the option.
        help: one phrase for ``--help``.
        choices: the allowed values; empty for any value.
        repeated: whether the option may be repeated; the value is then a list.
    """

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    repeated: bool = False


WORKDIR = Option("workdir", str, None, "the run folder")
TRUST = Option("trust", bool, False, "run code outside fmjax that the config in the run folder names")
PRINT = Option("print_config", bool, False, "print the resolved config and stop")
DEBUG = Option("debug", bool, False, "show the traceback of an error")


def run(function: Callable[..., Any], doc: str, *options: Option, argv: Sequence[str] | None = None) -> None:
    """Run a command: ``function(settings, path, **options)``.

    The config is ``--config=FILE``, or without it the config of the run folder, with overrides
    ``--config.field=value``. An error of the input or of the disk ends the process with one line.

    Args:
        function: takes the settings, the run folder, and the options by keyword.
        doc: help text; the first line is a summary of the command.
        *options: options of the command in addition to ``--config`` and ``--workdir``.
        argv: command-line arguments; by default the arguments of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    values, overrides = _parse(doc, [WORKDIR, *options, TRUST, PRINT, DEBUG], argv)
    take = {name: values.pop(name) for name in ("workdir", "trust", "print_config", "debug")}
    try:
        if not take["workdir"]:
            raise ValueError("workdir: not given. Give --workdir=FOLDER, the folder of the run.")
        path = workdir.local(take["workdir"])
        read = settings.read(_read_config(overrides, path, trust=take["trust"]))
        if take["print_config"]:
            print(json.dumps(workdir.plain(read.config), indent=1, sort_keys=True))
            return
        sharding.start()
        _quiet()
        with interrupts():
            function(read, path, **values)
    except (Interrupted, KeyboardInterrupt) as error:
        _interrupted(error)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if take["debug"]:
            raise
        sys.exit(f"error: {_one_line(error)}")


def run_plain(function: Callable[..., Any], doc: str, *options: Option, argv: Sequence[str] | None = None) -> None:
    """Run a command that takes no config: ``function(**options)``.

    Args:
        function: takes the options by keyword.
        doc: help text; the first line is a summary of the command.
        *options: options of the command.
        argv: command-line arguments; by default the arguments of the process.
    """
    values, rest = _parse(doc, [*options, DEBUG], list(sys.argv[1:] if argv is None else argv))
    debug = values.pop("debug")
    if rest:
        known = [option.name for option in options]
        sys.exit(f"error: {rest[0]}: no such option{checks.nearest(rest[0].lstrip('-'), known)}.")
    try:
        _quiet()
        with interrupts():
            function(**values)
    except (Interrupted, KeyboardInterrupt) as error:
        _interrupted(error)
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        if debug:
            raise
        sys.exit(f"error: {_one_line(error)}")


def _interrupted(error: BaseException) -> None:
    """End the process with one line and the status of a signal."""
    number = error.args[0] if isinstance(error, Interrupted) else signal.SIGINT
    print(f"interrupted ({number.name}). Run the same command to continue.", file=sys.stderr)
    sys.exit(128 + number)


def _parse(doc: str, options: Sequence[Option], argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the options of a command, and the arguments that are about the config."""
    raw, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s [--config=FILE] [--config.FIELD=VALUE] ..."
    parser = _Parser(description=doc, epilog=_config_help(), allow_abbrev=False, formatter_class=raw, usage=usage)
    parser.known = [option.name for option in options]
    for o in options:
        shown = "" if o.default in (None, False, []) else f" (default {o.default})"
        if o.type is bool:
            parser.add_argument(f"--{o.name}", action=argparse.BooleanOptionalAction, default=o.default, help=o.help)
        else:
            parser.add_argument(
                f"--{o.name}", type=o.type, default=o.default, help=o.help + shown, choices=o.choices or None,
                action="append" if o.repeated else "store", metavar=o.name.upper(),
            )  # fmt: skip
    values, rest = parser.parse_known_args(argv)
    unknown = [a for a in rest if not re.match(r"--config(=|\.|$)", a)]
    if unknown and not (rest and rest[0] == "--config"):
        parser.error(
            f"{unknown[0]}: no such option{checks.nearest(unknown[0].lstrip('-').split('=')[0], parser.known)}."
        )
    return vars(values), rest


def _read_config(arguments: Sequence[str], path: Path, *, trust: bool = False) -> Any:
    """Return the config of a command line as a ``ConfigDict``.

    Args:
        arguments: ``--config=FILE`` and overrides ``--config.field=value``.
        path: the run folder, whose config is read where ``arguments`` has no file.
        trust: accept code outside the package that the run folder names.

    Raises:
        ValueError: a file or a field that does not exist (with the nearest), or a value of another type.
    """
    from absl import flags
    from ml_collections import config_flags

    for argument in arguments:
        name = argument.partition("=")[0]
        if re.search(r"\s", name):
            raise ValueError(f"{name}: a flag cannot set a name with a space. Set it in a config file, or rename it.")
    arguments = [re.sub(r"^--config=~", lambda _: f"--config={Path.home()}", a) for a in arguments]
    find_configs()
    arguments = [re.sub(r"^--config=(\w+)$", lambda m: f"--config={_shipped(m[1])}", a) for a in arguments]
    file = _config_file(arguments)
    if file is not None and not re.search(r"\.py(:|$)", file):
        raise checks.Refusal("config", file, "not a Python file", "Give a file of configs/, or --workdir=FOLDER alone")
    holder, stored = flags.FlagValues(), None
    if not any(re.match(r"--config(=|$)", a) for a in arguments):
        stored = _as_config(workdir.read_config(path, trust=trust))
    sys.modules.pop("config_config", None)  # under this name ml_collections keeps the file that it read before
    former, sys.argv = sys.argv, ["fmjax", *arguments]  # ml_collections reads the overrides from there
    try:
        if stored is None:
            config_flags.DEFINE_config_file("config", None, "", flag_values=holder, lock_config=True)
        else:
            config_flags.DEFINE_config_dict("config", stored, "", flag_values=holder, lock_config=True)
        holder(["fmjax", *arguments])
        config = holder["config"].value
        if not hasattr(config, "items"):  # ml_collections keeps a file's failure until the config is used
            raise TypeError(f"get_config returns {config!r:.40}, not a config")
    except (flags.Error, OSError, AttributeError, KeyError, TypeError) as error:
        base = stored if stored is not None else holder["config"].value
        if (named := _by_name(error, arguments, base)) != arguments:
            return _read_config(named, path, trust=trust)
        line = _explain(error, base)
        if isinstance(error, (flags.Error, OSError)) or line.startswith(NO_FIELD):
            raise ValueError(line) from error
        raise ValueError(_failure(arguments, error)) from error
    except ValueError:
        raise
    except Exception as error:  # a config file can fail in any way
        raise ValueError(_failure(arguments, error)) from error
    finally:
        sys.argv = former
    if any(re.match(NAMED, argument) for argument in arguments):
        original = _read_config([a for a in arguments if not a.startswith("--config.")], path, trust=trust)
        _drop_other_options(config, original, arguments)
    return config


def _by_name(error: Exception, arguments: Sequence[str], config: Any) -> Sequence[str]:
    """Return the arguments with ``--config.net=NAME``, which ml_collections refuses, as ``--config.net.name=NAME``."""
    refused = MAPPING.search(str(error))
    if not refused or f"{refused[1]}.name" not in field_names(config) or not re.fullmatch(r"[\w./~:-]+", refused[2]):
        return arguments
    flag = f"--config.{refused[1]}="
    return [a.replace(flag, f"{flag[:-1]}.name=", 1) if a.startswith(flag) else a for a in arguments]


def _drop_other_options(config: Any, original: Any, arguments: Sequence[str]) -> None:
    """Remove the options of a factory that a flag ``--config.FIELD.name=NAME`` replaces, but for options of flags."""
    fields = {argument.partition("=")[0].removeprefix("--config.") for argument in arguments}
    for section in [match[1] for match in map(re.compile(NAMED).match, arguments) if match]:
        old, new = (functools.reduce(lambda tree, key: tree[key], section.split("."), c) for c in (original, config))
        if old.name != new.name:
            with config.unlocked():
                for option in [o for o in new if o != "name" and f"{section}.{o}" not in fields]:
                    del new[option]


def _as_config(tree: Any) -> Any:
    """Return plain values as a ``ConfigDict`` with fields that flags can override; lists become tuples."""
    from ml_collections import ConfigDict, config_dict

    config = ConfigDict()
    for name, value in tree.items():
        if isinstance(value, dict):
            config[name] = _as_config(value)
        else:
            config[name] = config_dict.placeholder(str) if value is None else _tuples(value)
    return config


def find_configs() -> None:
    """Make ``import configs`` work for config files in a checkout and in an installed package."""
    if "configs" in sys.modules or importlib.util.find_spec("configs") is not None:
        return
    package = Path(__file__).parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "base.py").exists():
            spec = importlib.util.spec_from_loader("configs", None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            sys.modules["configs"] = importlib.util.module_from_spec(spec)
            return


def _shipped(name: str) -> str:
    """Return the file of a config of this package by its name; another name unchanged."""
    if os.path.exists(name) or (spec := importlib.util.find_spec("configs.base")) is None:
        return name
    file = Path(spec.origin).with_name(f"{name}.py")
    return str(file) if file.exists() else name


def _explain(error: Exception, config: Any = None) -> str:
    """Return an error of absl or ml_collections about a bad flag as one line, with the nearest field."""
    flag, text = getattr(error, "flagname", ""), str(error)
    if flag.startswith("config."):
        fields = list(field_names(config or {}))
        return f"{NO_FIELD} {flag.removeprefix('config.')!r}{checks.nearest(flag.removeprefix('config.'), fields)}"
    quoted = re.fullmatch(r"[\"'\\]*(\w+)[\"'\\]*(?:(?:\\n|\s)*Did you mean \"(\w+)\".*)?", text, re.DOTALL)
    if quoted and isinstance(error, (AttributeError, KeyError)):
        return f"{NO_FIELD} {quoted[1]!r}" + (f"; did you mean {quoted[2]!r}?" if quoted[2] else "")
    if mapping := MAPPING.search(text):
        way_out = f"Set its fields, as in --config.{mapping[1]}.FIELD=VALUE"
        return str(checks.Refusal(mapping[1], mapping[2], "the field is a mapping", way_out))
    missing = re.search(r"No such file or directory: '(.*?)'", text)
    if "Error whilst parsing config file" in text and not missing:
        value, cause = text.partition("--config=")[2].partition(": ")[0], text.strip().splitlines()[-1]
        cause = cause if len(cause) <= 120 else re.sub(r".* (\w+Error: )", r"\1", cause)
        return f"config={value}: failed ({untrusted.one_line(cause, 120)}). Correct the file or its argument."
    return f"config={missing[1]!r}: no such file. Give a file of configs/." if missing else _one_line(text)


def _config_file(arguments: Sequence[str]) -> str | None:
    """Return the value of ``--config=FILE`` or ``--config FILE``; ``None`` without the option."""
    for i, argument in enumerate(arguments):
        if re.match(r"--config(=|$)", argument):
            return argument.partition("=")[2] if "=" in argument else "".join(arguments[i + 1 : i + 2])
    return None


def _failure(arguments: Sequence[str], error: Exception) -> str:
    """Return the error of a config file with the line of the file where it happened."""
    file = _config_file(arguments) or ""
    name = Path(file.partition(":")[0]).name
    at = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == name]
    line = error.lineno if isinstance(error, SyntaxError) else at[-1] if at else None
    where = "" if line is None else f" in line {line}"
    what = untrusted.one_line(f"{type(error).__name__}: {getattr(error, 'msg', error)}", 120)
    return f"config={untrusted.short_path(file)}: failed{where} ({what}). Correct it; --debug shows the traceback."


def _one_line(error: Any) -> str:
    """Return a message on one line of bounded length."""
    if isinstance(error, MemoryError):
        return f"memory: not enough for these sizes ({' '.join(str(error).split()) or 'MemoryError'}). Ask for less."
    if isinstance(error, OSError) and error.filename is not None and type(error).__module__ == "builtins":
        place = untrusted.short_path(str(error.filename2 or error.filename))
        error = f"{place}: {error.strerror}. Give a place that can be read and written."
    line = untrusted.one_line(error, 10**4)
    if len(line) > checks.LENGTH:  # the end of a message says what to do: long paths are cut first
        line = re.sub(r"/[^\s'\"(),;]{60,}", lambda path: f"…{path[0][-59:]}", line)
    return untrusted.one_line(line, checks.LENGTH)


def field_names(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a config's fields.

    Args:
        config: a config, or any mapping of mappings.
        prefix: what the names begin with.

    Yields:
        The names, a mapping before its entries.
    """
    for name, value in config.items():
        yield prefix + name
        if hasattr(value, "items"):
            yield from field_names(value, f"{prefix}{name}.")


def _quiet() -> None:
    """Let libraries log warnings only, and no traceback of theirs from a thread of a file that failed already."""
    from absl import logging

    logging.set_verbosity(logging.WARNING)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _unraisable(raised) -> None:
    # tensorstore's last futures call the event loop that Orbax has closed; the file's own error is raised beside
    if not (isinstance(raised.exc_value, RuntimeError) and "Event loop is closed" in str(raised.exc_value)):
        sys.__unraisablehook__(raised)


class _Parser(argparse.ArgumentParser):
    """A parser that ends the process with one line for a bad option."""

    known: list[str] = []

    def error(self, message: str):
        sys.exit(f"error: {_one_line(message)}")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _config_help() -> str:
    """Return the fields of a config with their comments, from ``configs/base.py``."""
    find_configs()
    spec = importlib.util.find_spec("configs.base")
    if spec is None or spec.origin is None:
        return ""
    lines = re.findall(r"^    c\.(\w+) = (.*?)(?:  # (.*))?$", Path(spec.origin).read_text(), re.MULTILINE)
    width = max(len(name) for name, *_ in lines)
    rows = [f"  {name:<{width}}  {comment or default}" for name, default, comment in lines]
    return "config fields (--config.FIELD=VALUE; nested ones as --config.net.width=64):\n" + "\n".join(rows)
