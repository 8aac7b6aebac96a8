"""The command line of the launchers: flags of a config, and what goes wrong told in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fmjax import checks

NO_FIELD = "the config has no field"


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's flags, for ``app.run(main, flags_parser=parse_flags)``: a bad one ends the process in one line.

    The launcher has a config flag named ``config``.
    """
    import sys

    from absl import flags

    try:
        rest = flags.FLAGS(list(argv))
        getattr(flags.FLAGS["config"].value, "items", None)  # ml_collections keeps a file's failure until it is used
        return rest
    except (flags.Error, OSError, AttributeError, KeyError) as error:
        line = explain_flag_error(error, flags.FLAGS["config"].value)
        if isinstance(error, (flags.Error, OSError)) or line.startswith(NO_FIELD):
            sys.exit(f"error: {line}")
        raise  # the config file itself failed: its traceback says where


def in_one_line(function: Callable, *args: Any) -> None:
    """Calls ``function``; what it raises about its input or the state of the disk ends the process with one line.

    Libraries log warnings only, unless ``--verbosity`` says otherwise.
    """
    import sys

    from absl import flags, logging

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        function(*args)
    except (ValueError, RuntimeError, OSError) as error:
        logging.debug("raised by", exc_info=True)
        sys.exit(f"error: {error} (--verbosity=1 shows where)")


def explain_flag_error(error: Exception, config: Any = None) -> str:
    """One line for what absl or ml_collections raise on a bad flag; a misspelt field comes with the nearest one.

    ml_collections raises ``AttributeError`` with a suggestion of its own where the field follows ``--config`` on the
    command line of the process, absl ``UnrecognizedFlagError`` otherwise: then ``config`` names the fields.
    """
    flag, text = getattr(error, "flagname", ""), str(error)
    if flag.startswith("config."):
        fields = list(_field_names(config or {}))
        field = flag.removeprefix("config.")
        hint = checks.nearest(field, fields) or (f" (its fields are {', '.join(fields)})" if fields else "")
        return f"{NO_FIELD} {field!r}{hint}"
    quoted = re.fullmatch(r"[\"'\\]*(\w+)[\"'\\]*(?:(?:\\n|\s)*Did you mean \"(\w+)\".*)?", text, re.DOTALL)
    if quoted and isinstance(error, (AttributeError, KeyError)):
        return f"{NO_FIELD} {quoted[1]!r}" + (f"; did you mean {quoted[2]!r}?" if quoted[2] else "")
    return " ".join(text.split())


def _field_names(config: Any, prefix: str = "") -> Iterable[str]:
    for name, value in config.items():
        yield prefix + name
        if hasattr(value, "items"):
            yield from _field_names(value, f"{prefix}{name}.")
