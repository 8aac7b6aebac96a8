"""Checks of arguments, and one wording of what is refused."""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LENGTH = 300  # largest number of characters of a refusal
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint at the known name nearest to an unknown name.

    Args:
        name: the unknown name.
        names: the known names. The last part of a dotted name may match alone.

    Returns:
        ``"; did you mean 'x'?"``, or an empty string where no name is near.

    >>> nearest("lerning_rate", ("learning_rate", "net.width")), nearest("widht", ("net.width",)), nearest("q", ("a",))
    ("; did you mean 'learning_rate'?", "; did you mean 'net.width'?", '')
    """
    names = list(names)
    last = {n.rpartition(".")[2]: n for n in names} | {n: n for n in names}
    name = str(name)
    matches = (
        difflib.get_close_matches(name, names, 1)
        or difflib.get_close_matches(name.rpartition(".")[2], last, 1)
        or [n for n in last if n.startswith(name)]
    )
    return f"; did you mean {last[matches[0]]!r}?" if matches else ""


class Refusal(ValueError):
    """The error ``<field>=<value>: <what is wrong>. <what to do>.`` on one line of at most 300 characters.

    Args:
        field: the field or argument.
        value: the value that is refused; long values are shortened.
        wrong: what is wrong, without a full stop.
        way_out: what to do, without a full stop.

    >>> Refusal("steps", 0, "outside the allowed range", "Give at least 1")
    Refusal('steps=0: outside the allowed range. Give at least 1.')
    """

    def __init__(self, field: str, value: Any, wrong: str, way_out: str):
        line = " ".join(f"{field}={_SHORT.repr(value)}: {wrong}. {way_out}.".split()).replace("?.", "?")
        super().__init__(line if len(line) <= LENGTH else line[: LENGTH - 2] + " …")

    def __reduce__(self):
        return ValueError, self.args  # other processes get the line


def check_choice(field: str, value: Any, known: Iterable[str], noun: str | None = None) -> None:
    """Refuse a value that is not a known choice, and name the nearest one.

    Args:
        field: the field or argument, for the message.
        value: the value.
        known: the choices.
        noun: what the choices are; by default the name of the field.

    Raises:
        ValueError: ``value`` is not in ``known``.

    >>> check_choice("solver", "rk4", ("euler", "rk4"))
    """
    if value not in (known := tuple(known)):
        known = known or ("none",)
        raise Refusal(field, value, f"no such {noun or field}{nearest(value, known)}", f"There are {', '.join(known)}")


def check_fraction(**fractions: float) -> None:
    """Refuse a fraction of the training or of a batch outside [0, 1].

    Args:
        **fractions: values by the names of the arguments.

    Raises:
        ValueError: a value outside [0, 1].

    >>> check_fraction(diagonal=0.75)
    """
    for name, value in fractions.items():
        check_range(name, value, Range(0, 1))


def check_bounds(bounds: Sequence[float]) -> np.ndarray:
    """Check the bounds of the segments of a cut time axis.

    Args:
        bounds: at least two times that rise strictly within [0, 1].

    Returns:
        The bounds, float32.

    Raises:
        ValueError: the bounds do not rise strictly within [0, 1].

    >>> check_bounds((0.0, 0.5, 1.0))
    array([0. , 0.5, 1. ], dtype=float32)
    """
    edges = np.asarray(bounds, np.float32)
    if edges.ndim != 1 or len(edges) < 2 or (np.diff(edges) <= 0).any() or edges[0] < 0 or edges[-1] > 1:
        raise ValueError(f"bounds={tuple(bounds)}: do not rise strictly within [0, 1]. Give two times or more.")
    return edges


def check_state(name: str, x: Any, *, tokens: bool = False) -> None:
    """Refuse a state that is not a floating array with a batch axis: integers would be stepped by times rounded to 0.

    Args:
        name: name of the argument, for the message.
        x: states ``[B, ...]``.
        tokens: whether the state is one of discrete data, which must be integers.

    Raises:
        TypeError: ``x`` is no array, or not floating (with ``tokens``: not integers).
        ValueError: ``x`` has no batch axis.

    >>> check_state("x", np.zeros((4, 2)))
    >>> check_state("x", np.zeros((4, 2), int))
    Traceback (most recent call last):
    TypeError: x=int64[4, 2]: a state is floating. Convert it: x.astype(jnp.float32).
    """
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        raise TypeError(f"{name}={_SHORT.repr(x)}: a state is a floating array. Give jnp.asarray({name}, jnp.float32).")
    if tokens and not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name}={x.dtype}{list(x.shape)}: tokens are integers. Give token numbers, such as int32.")
    if not tokens and not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{name}={x.dtype}{list(x.shape)}: a state is floating. Convert it: {name}.astype(jnp.float32)."
        )
    if not x.shape:
        raise ValueError(f"{name}={x.dtype}[]: a state has a batch axis. Give an array [B, ...].")


def check_examples(batch: Any, *, tokens: bool = False) -> None:
    """Refuse a batch whose fields do not have one row for each example: broadcasting would train on other data.

    Args:
        batch: a ``types.Batch``; under ``jax.jit`` its shapes and types are known.
        tokens: whether ``x1``, ``x0`` and ``negative`` are integers.

    Raises:
        TypeError: ``x1``, ``x0`` or ``negative`` is not a floating array (with ``tokens``: not integers).
        ValueError: no example, a field of another shape, times that are not floating, or a condition of another length.

    >>> from fmjax.types import Batch
    >>> check_examples(Batch(np.zeros((4, 2)), x0=np.zeros((4, 2)), t=np.zeros(4)))
    >>> check_examples(Batch(np.zeros((4, 2)), x0=np.zeros((1, 2))))
    Traceback (most recent call last):
    ValueError: batch.x0=float64[1, 2]: batch.x1 is [4, 2]. Give one row for each example.
    """
    shape = np.shape(batch.x1)
    rows = lambda field, value, expected: ValueError(
        f"batch.{field}={np.result_type(value).name}{list(np.shape(value))}: {expected}. Give one row for each example."
    )
    for field in ("x1", "x0", "negative"):
        if (value := getattr(batch, field)) is not None:
            check_state(f"batch.{field}", value, tokens=tokens)
            if value.shape != shape or not shape[0]:
                raise rows(field, value, f"batch.x1 is {list(shape)}" if shape[0] else "no example")
    for field in ("t", "progress"):
        value = getattr(batch, field)
        if value is None:
            continue
        if np.shape(value) != shape[:1] or not jnp.issubdtype(value.dtype, jnp.floating):
            raise rows(field, value, f"not floats [{shape[0]}]")
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch.cond):
        if np.shape(leaf)[:1] != shape[:1]:
            raise rows(f"cond{jax.tree_util.keystr(path)}", leaf, f"not of leading size {shape[0]}")


def check_pixels(name: str, x: np.ndarray) -> None:
    """Refuse images on another scale than [-1, 1]: bytes, 0 .. 255 as floats, or another scale that starts at 0.

    Samples may overshoot, so that only a scale is refused which no samples have: nothing below 0 and more than 2.

    Args:
        name: name of the argument, for the message.
        x: images of any shape.

    Raises:
        ValueError: ``x`` is on another scale, or not finite.

    >>> check_pixels("images", np.array([-1.2, 0.5]))
    >>> check_pixels("images", np.array([0.0, 255.0]))
    Traceback (most recent call last):
    ValueError: images in [0, 255]: images lie in [-1, 1]. Scale them: images / 127.5 - 1.
    """
    x = np.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}={x.dtype}{list(x.shape)}: images are floats in [-1, 1]. Convert and scale them.")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}={x.dtype}{list(x.shape)}: not all values are finite. Leave out what diverged.")
    if x.size and x.min() >= 0 and (high := x.max()) > 2:
        advice = "127.5" if 16 < high <= 255 else f"{high / 2:g}"
        raise ValueError(
            f"{name} in [{x.min():g}, {high:g}]: images lie in [-1, 1]. Scale them: {name} / {advice} - 1."
        )


class Range(NamedTuple):
    """The finite numbers from ``low`` to ``high``, for type hints: ``width: Annotated[int, Range(low=1)]``.

    Attributes:
        low: lowest number allowed.
        high: highest number allowed.
        open_low: whether ``low`` itself is refused.
        open_high: whether ``high`` itself is refused.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return bool(above and below)

    def __str__(self) -> str:
        low, high = (f"{end:,.12g}".replace(",", "") for end in (self.low, self.high))
        if math.isinf(self.low) and math.isinf(self.high):
            return "a finite number"
        if math.isinf(self.high):
            return f"a finite number above {low}" if self.open_low else f"a finite number of at least {low}"
        if math.isinf(self.low):
            return f"a finite number below {high}" if self.open_high else f"a finite number of at most {high}"
        return f"a number in {'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"


Positive = Annotated[int, Range(low=1)]
NonNegative = Annotated[int, Range(low=0)]
Finite = Annotated[float, Range()]
PositiveFloat = Annotated[float, Range(low=0, open_low=True)]
NonNegativeFloat = Annotated[float, Range(low=0)]
Fraction = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Refuse a number outside a range; numbers that are not finite are outside every range.

    Args:
        name: name of the argument, for the message.
        value: a Python or numpy number.
        allowed: the range.

    Raises:
        ValueError: ``value`` is not a number of the range.

    >>> check_range("width", 64, Range(low=1))
    >>> check_range("width", 0, Range(low=1))
    Traceback (most recent call last):
    ValueError: width=0: outside the allowed range. Give a finite number of at least 1.
    """
    if value not in allowed:
        raise ValueError(f"{name}={reprlib.repr(value)}: outside the allowed range. Give {allowed}.")


def check_hints(function: Callable[..., Any], values: Mapping[str, Any], *, label: str = "") -> None:
    """Check values against the ranges and choices in the type hints of a function or of a class's fields.

    ``Annotated[int, Range(low=1)]`` gives a range and ``Literal["a", "b"]`` a choice; both also inside ``X | None``
    and ``Sequence[X]``. Other hints, and values whose name has no hint, are not checked: types are the caller's.

    Args:
        function: a function, or a class with annotated fields.
        values: arguments by name.
        label: prefix of the names in the message: ``"net."``.

    Raises:
        ValueError: a value outside its range, or a value that is no choice.

    >>> def mlp(*, width: Positive = 64, dtype: Literal["float32", "bfloat16"] = "float32"): ...
    >>> check_hints(mlp, {"width": 128, "dtype": "bfloat16"})
    >>> check_hints(mlp, {"width": -1}, label="net.")
    Traceback (most recent call last):
    ValueError: net.width=-1: outside the allowed range. Give a finite number of at least 1.
    """
    hints = _hints(function)
    for name, value in values.items():
        if name in hints:
            _check_hint(f"{label}{name}", value, hints[name])


def check_fields(instance: Any) -> None:
    """Check every field of a dataclass or Flax module against its type hint (see ``check_hints``).

    Args:
        instance: the object, its fields set.

    Raises:
        ValueError: a field outside its range, or a field that is no choice.

    >>> import dataclasses
    >>> @dataclasses.dataclass
    ... class Grid:
    ...     steps: Positive = 8
    ...     def __post_init__(self):
    ...         check_fields(self)
    >>> Grid(steps=0)
    Traceback (most recent call last):
    ValueError: steps=0: outside the allowed range. Give a finite number of at least 1.
    """
    check_hints(type(instance), {name: getattr(instance, name) for name in _hints(type(instance))})


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """The hints that state a range or a choice, by name."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return" and _states(hint)}


def _states(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return any(isinstance(extra, Range) for extra in hint.__metadata__) or _states(hint.__origin__)
    return typing.get_origin(hint) is Literal or any(_states(part) for part in typing.get_args(hint))


def _check_hint(name: str, value: Any, hint: Any) -> None:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        _check_hint(name, value, hint.__origin__)
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if hint.__origin__ is int and not whole:
            raise ValueError(f"{name}={reprlib.repr(value)}: not a whole number. Give an integer.")
        for allowed in hint.__metadata__:
            if isinstance(allowed, Range):
                check_range(name, value, allowed)
    elif origin is Literal:
        _check_literal(name, value, parts)
    elif origin in (typing.Union, types.UnionType):
        _check_union(name, value, parts)
    elif origin in (Sequence, tuple, list) and isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            _check_hint(f"{name}[{i}]", entry, parts[0])


def _check_union(name: str, value: Any, parts: tuple[Any, ...]) -> None:
    """Accept what one part accepts; refuse in the words of the first part that states something."""
    if any(isinstance(part, type) and isinstance(value, part) for part in parts):
        return
    errors = []
    for part in filter(_states, parts):
        try:
            return _check_hint(name, value, part)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def _check_literal(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        choices = ", ".join(map(repr, known))
        near = nearest(value, [k for k in known if isinstance(k, str)]) if isinstance(value, str) else ""
        raise ValueError(f"{name}={reprlib.repr(value)}: not a choice{near}. Give one of {choices}.")
