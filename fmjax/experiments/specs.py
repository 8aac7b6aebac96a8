"""Build objects from specs of a config: a name, a name with options, a place outside the package, or the object.

A spec is one of

* a name of this package, ``"lagrangian"``;
* a mapping with a name and options, ``{"name": "unet", "channels": 64}``;
* a place outside the package, ``"my_package.my_module:factory"`` or ``"folder/file.py:factory"``, alone or as the
  ``name`` of a mapping;
* in Python, the object itself.

Options are keyword-only arguments of the factory (fields, for a Flax module). They are checked against its type hints,
ranges included (``checks.Range``), before anything is compiled. Every refusal is a ``ValueError`` of one line.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import numbers
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fmjax import checks, paths
from fmjax.checks import Refusal
from fmjax.experiments import places

Spec = Any  # a ConfigDict is no Mapping, and an object may be anything


class Kind(NamedTuple):
    """A kind of object that a config can name.

    Attributes:
        noun: the word for the object in messages.
        package: module or package below ``fmjax`` whose public names are offered.
        takes: names of the positional arguments of a factory.
        returns: the return annotation of a factory; an empty string for any annotation.
    """

    noun: str
    package: str
    takes: tuple[str, ...] = ()
    returns: str = ""


NET = Kind("network", "nets")
PRECONDITIONER = Kind("preconditioning", "nets.preconditioning", (), "Preconditioner")
METHOD = Kind("method", "methods", ("net",))
WEIGHTING = Kind("weighting", "methods.weighting", ("method",))
PATH = Kind("path", "paths", (), "Path")
COUPLING = Kind("coupling", "couplings", (), "Coupling")
DATA = Kind("data set", "data", (), "Dataset")
METRIC = Kind("metric", "metrics", ("data", "reference"), "Metric")
SOLVER = Kind("solver", "sampling", ("velocity",))


def build(kind: Kind, spec: Spec, *args: Any, field: str, **context: Any) -> Any:
    """Build the object that a spec describes.

    Args:
        kind: what the spec describes.
        spec: a name, a mapping, a place outside the package, or the object itself.
        *args: the positional arguments of the factory.
        field: the config field that holds the spec, for messages.
        **context: options from other fields; each option is passed only to a factory that takes the option.

    Returns:
        ``factory(*args, **options)``; an object that is not a factory is returned unchanged.

    Raises:
        ValueError: an unknown name, an option that is unknown, missing or out of range, or an option that another
            field sets.

    >>> build(PATH, {"name": "vp", "beta_max": 16.0}, field="path").gamma is None
    True
    """
    check_spec(kind, spec, field=field)
    if not is_spec(spec):
        return call(spec, {}, *args, field=field) if kind.takes and _positional(spec) == kind.takes else spec
    factory, options = resolve(kind, spec, field=field)
    known = options_of(factory)
    context = {name: value for name, value in context.items() if name in known}
    if repeated := sorted(context.keys() & options.keys()):
        raise Refusal(f"{field}.{repeated[0]}", options[repeated[0]], "another field sets it", "Take this option out")
    return call(factory, {**options, **context}, *args, field=field)


def check_spec(kind: Kind, spec: Spec, *, field: str) -> None:
    """Refuse a plain value (a number, a sequence, nothing) in the place of a spec.

    Args:
        kind: what the spec must describe.
        spec: the spec.
        field: the config field that holds the spec, for messages.

    Raises:
        ValueError: neither a name, nor a mapping, nor an object.
    """
    if isinstance(spec, numbers.Number) or type(spec) in (type(None), list, tuple, set, bytes):
        raise Refusal(field, spec, f"not a {kind.noun}", "Give a name, or {'name': ..., options}")


def resolve(kind: Kind, spec: Spec, *, field: str) -> tuple[Callable, dict[str, Any]]:
    """Find the factory that a spec names.

    Args:
        kind: what the spec describes.
        spec: a name, a mapping or a place outside the package.
        field: the config field that holds the spec, for messages.

    Returns:
        The factory and the options of the spec, unchecked.

    Raises:
        ValueError: no such name (with the nearest), or a place outside the package that cannot be imported.

    >>> resolve(SOLVER, "heun", field="solver")[0].__name__, resolve(NET, "song_unet", field="net")[0].__name__
    ('heun', 'SongUNet')
    """
    name, options = parse(spec, field=field)
    if not isinstance(name, str):
        return name, options
    if places.is_outside(name):
        factory = places.load_factory(name, field=field)
        if _positional(factory) != kind.takes:
            takes = ", ".join((*kind.takes, "*"))
            raise Refusal(field, name, f"a {kind.noun} factory takes ({takes}, options)", "Change its arguments")
        return factory, options
    offered = offers(kind)
    checks.check_choice(field, name, sorted(offered), kind.noun)
    return offered[name], options


def call(factory: Callable, options: dict[str, Any], *args: Any, field: str) -> Any:
    """Call a factory with options that are checked against its signature.

    Args:
        factory: function with keyword-only options, or a Flax module class.
        options: options by name.
        *args: positional arguments.
        field: the config field, for messages.

    Returns:
        The object that the factory returns.

    Raises:
        ValueError: an option that is unknown, missing or out of range, or a value that the factory refuses.
    """
    values = checked(factory, options, field=field)
    try:
        return factory(*args, **values)
    except (ValueError, FileNotFoundError) as error:
        name = re.match(r"(\w+)[=\[:]", str(error))
        if name is None or name[1] not in values:
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{field}.{error}") from error


def checked(factory: Callable, options: dict[str, Any], *, field: str) -> dict[str, Any]:
    """Check the options of a factory by name, type and range.

    Whole numbers become floats and lists tuples where the type hint says so. An option whose default is a function of
    this package (a time distribution) or whose hint is a path is itself a spec.

    Args:
        factory: function or Flax module class.
        options: options by name.
        field: the config field, for messages.

    Returns:
        The options, converted.

    Raises:
        ValueError: an option that is unknown, missing, of another type or out of range.
    """
    known, hints = options_of(factory), typing.get_type_hints(factory, include_extras=True)
    for name in options:
        if name not in known:
            takes = f"Its options are {', '.join(known)}" if known else "It takes none"
            raise Refusal(f"{field}.{name}", options[name], f"no such option{checks.nearest(name, known)}", takes)
    missing = [name for name, default in known.items() if default is inspect.Parameter.empty and name not in options]
    if missing:
        raise ValueError(f"{field}: {label(factory)} needs the option {missing[0]!r}. Add {field}.{missing[0]}.")
    values = {}
    for name, value in options.items():
        default, hint, where = known[name], hints.get(name, Any), f"{field}.{name}"
        default = getattr(default, "func", default)  # of a functools.partial
        if is_spec(value) and inspect.isfunction(default):
            values[name] = _like(default, value, where)
        elif is_spec(value) and hint is paths.Path:
            values[name] = build(PATH, value, field=where)
        else:
            values[name] = _convert(where, value, hint)
    checks.check_hints(factory, values, label=f"{field}.")
    return values


def parse(spec: Spec, *, field: str) -> tuple[Any, dict[str, Any]]:
    """Split a spec into its name (or factory) and its options.

    Args:
        spec: a name, or a mapping with a ``name``.
        field: the config field, for messages.

    Returns:
        The name and the options.

    Raises:
        ValueError: a mapping without a name.
    """
    if isinstance(spec, str):
        return spec, {}
    options = dict(spec.items()) if hasattr(spec, "items") else {}
    name = options.pop("name", None)
    if not (isinstance(name, str) or callable(name)):
        where, value = (f"{field}.name", name) if hasattr(spec, "items") and "name" in spec else (field, spec)
        raise Refusal(where, value, "not a name", "Give a name, or {'name': ..., options}")
    return name, options


def name_of(spec: Spec) -> str:
    """Return the name in a spec; for an object the name of its class or function.

    Args:
        spec: a spec.

    Returns:
        The name.

    >>> name_of({"name": "edm", "sigma_data": 0.5}), name_of("linear")
    ('edm', 'linear')
    """
    name = spec if isinstance(spec, str) else (parse(spec, field="spec")[0] if hasattr(spec, "items") else spec)
    return name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)


def offers(kind: Kind) -> dict[str, Callable]:
    """Return the factories of this package that a config can name, by name.

    Args:
        kind: the kind of object.

    Returns:
        Functions whose positional arguments and return annotation are the kind's; for networks the Flax modules, by
        the name of their file (``song_unet`` is ``SongUNet``).
    """
    module = importlib.import_module(f"fmjax.{kind.package}")
    names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    factories = {}
    for name in names:
        value = getattr(module, name)
        if kind is NET:
            if inspect.isclass(value) and dataclasses.is_dataclass(value) and hasattr(value, "apply"):
                factories[_snake(value)] = value
        elif inspect.isfunction(value) and value.__module__.startswith("fmjax.") and _fits(kind, value):
            factories[name] = value
    return factories


def options_of(factory: Callable) -> dict[str, Any]:
    """Return the options of a factory with their defaults.

    Args:
        factory: a function, whose options are its keyword-only arguments, or a Flax module, whose options are its
            fields.

    Returns:
        Defaults by name; ``inspect.Parameter.empty`` for a required option.

    >>> options_of(paths.vp)["beta_max"]
    20.0
    """
    if inspect.isclass(factory) and dataclasses.is_dataclass(factory):
        fields = (f for f in dataclasses.fields(factory) if f.init and f.name not in ("parent", "name"))
        empty = inspect.Parameter.empty
        return {f.name: empty if f.default is dataclasses.MISSING else f.default for f in fields}
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def is_spec(value: Any) -> bool:
    """Return whether a value is a name or a mapping, and not an object.

    Args:
        value: any value.

    Returns:
        Whether the value has to be resolved.
    """
    return isinstance(value, str) or hasattr(value, "items")


def label(factory: Callable) -> str:
    """Return the name by which a config refers to a factory.

    Args:
        factory: a function or a Flax module class.

    Returns:
        The name.
    """
    return _snake(factory) if inspect.isclass(factory) else getattr(factory, "__name__", repr(factory))


def _like(default: Callable, spec: Spec, field: str) -> Callable:
    """Return a function from the module of ``default`` with the same signature, its options bound."""
    returns = inspect.signature(default).return_annotation
    kind = Kind("choice", default.__module__.removeprefix("fmjax."), _positional(default), str(returns))
    function, options = resolve(kind, spec, field=field)
    options = checked(function, options, field=field)
    return functools.partial(function, **options) if options else function


def _fits(kind: Kind, function: Callable) -> bool:
    returns = str(inspect.signature(function).return_annotation)
    return _positional(function) == kind.takes and (not kind.returns or returns.rpartition(".")[2] == kind.returns)


def _positional(function: Any) -> tuple[str, ...]:
    if inspect.isclass(function) or not callable(function):
        return ()
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin without a signature
        return ()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty)


def _snake(factory: type) -> str:
    file = factory.__module__.rpartition(".")[2]
    return file if file.replace("_", "") == factory.__name__.lower() else factory.__name__


def _convert(field: str, value: Any, hint: Any) -> Any:
    """Return a value converted to its type hint; a value without a hint is returned unchanged."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    value = value.item() if isinstance(value, np.generic) else value
    for kind in kinds:
        kind = kind.__origin__ if typing.get_origin(kind) is typing.Annotated else kind
        origin = typing.get_origin(kind)
        if kind is float and isinstance(value, numbers.Integral) and not isinstance(value, bool):
            return float(value)
        if origin in (Sequence, tuple, list):
            if isinstance(value, (list, tuple)):  # tuples, since Flax modules are hashed
                inner = typing.get_args(kind)[0]
                return tuple(_convert(f"{field}[{i}]", v, inner) for i, v in enumerate(value))
        elif origin is typing.Literal:
            return value
        elif kind in (int, float, str, bool):
            if type(value) is kind:
                return value
        elif origin is Callable or getattr(kind, "_is_protocol", False):
            if callable(value):
                return value
        elif kind is Any or not inspect.isclass(kind) or isinstance(value, kind):
            return value
    names = " or ".join(_plain(kind) for kind in kinds)
    raise Refusal(field, value, f"must be {names}, and is {type(value).__name__}", f"Give {names}")


def _plain(hint: Any) -> str:
    hint = hint.__origin__ if typing.get_origin(hint) is typing.Annotated else hint
    words = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
    return words.get(hint, hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", ""))
