"""Checks of arguments, and one wording of what is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where none is near. The last part of a dotted name may match alone."""
    names = list(names)
    last = {n.rpartition(".")[2]: n for n in names} | {n: n for n in names}
    name = str(name)
    found = (
        difflib.get_close_matches(name, names, 1)
        or difflib.get_close_matches(name.rpartition(".")[2], last, 1)
        or [n for n in last if n.startswith(name)]
    )
    return f"; did you mean {last[found[0]]!r}?" if found else ""


def check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    """``ValueError`` for a value that is none of the known ones, with the nearest."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0.0)
        raise ValueError(f"{what}={value!r} must be one of {', '.join(known)}; did you mean {near[0]!r}?")


def check_share(**shares: float) -> None:
    """``ValueError`` for a share of the training or of a batch outside [0, 1], by name."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a share and must lie in [0, 1]")
