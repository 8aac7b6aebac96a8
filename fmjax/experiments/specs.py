"""Resolve what a config says of an object: a name, a name with options, a place outside the package, or the object.

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
import hashlib
import importlib
import importlib.util
import inspect
import numbers
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax import checks, paths

Spec = Any  # a ConfigDict is no Mapping, and an object may be anything
OUTSIDE = re.compile(r"(.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")
LENGTH = 300  # characters of a refusal at most
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class Kind(NamedTuple):
    """A kind of object that a config can name.

    Attributes:
        noun: the word for it in messages.
        package: module or package below ``fmjax`` whose public names are offered.
        takes: names of the positional arguments of a factory.
        returns: the return annotation of a factory; empty for any.
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
        **context: options from other fields; a factory that does not take one does not get it.

    Returns:
        ``factory(*args, **options)``; an object that is no factory is returned as it is.

    Raises:
        ValueError: an unknown name, an option that is unknown, missing or out of range, or an option that another
            field sets.

    >>> build(PATH, {"name": "vp", "beta_max": 16.0}, field="path").gamma is None
    True
    """
    if not is_spec(spec):
        return call(spec, {}, *args, field=field) if kind.takes and _positional(spec) == kind.takes else spec
    factory, options = resolve(kind, spec, field=field)
    known = options_of(factory)
    context = {name: value for name, value in context.items() if name in known}
    if repeated := sorted(context.keys() & options.keys()):
        raise refusal(f"{field}.{repeated[0]}", options[repeated[0]], "another field sets it", "Take this option out")
    return call(factory, {**options, **context}, *args, field=field)


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
    if is_outside(name):
        factory = _outside(name, field)
        if kind.takes and _positional(factory) != kind.takes:
            takes = ", ".join(kind.takes)
            raise refusal(field, name, f"a {kind.noun} factory takes ({takes}, *, options)", "Change its arguments")
        return factory, options
    offered = offers(kind)
    if name not in offered:
        near = checks.nearest(name, offered)
        raise refusal(field, name, f"no such {kind.noun}{near}", f"There are {', '.join(sorted(offered))}")
    return offered[name], options


def call(factory: Callable, options: dict[str, Any], *args: Any, field: str) -> Any:
    """Call a factory with options that are checked against its signature.

    Args:
        factory: function with keyword-only options, or a Flax module class.
        options: options by name.
        *args: positional arguments.
        field: the config field, for messages.

    Returns:
        What the factory returns.

    Raises:
        ValueError: an option that is unknown, missing or out of range, or what the factory itself refuses.
    """
    return factory(*args, **checked(factory, options, field=field))


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
            raise refusal(f"{field}.{name}", options[name], f"no such option{checks.nearest(name, known)}", takes)
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
        raise refusal(field, spec, "neither a name nor a mapping with a name", "Give a name, or {'name': ..., options}")
    return name, options


def name_of(spec: Spec) -> str:
    """Return the name in a spec; of an object its class or function name.

    >>> name_of({"name": "edm", "sigma_data": 0.5}), name_of("linear")
    ('edm', 'linear')
    """
    name = spec if isinstance(spec, str) else (parse(spec, field="spec")[0] if hasattr(spec, "items") else spec)
    return name if isinstance(name, str) else getattr(name, "__name__", type(name).__name__)


def offers(kind: Kind) -> dict[str, Callable]:
    """Return the factories of this package that a config can name, by name.

    Args:
        kind: what is looked for.

    Returns:
        Functions whose positional arguments and return annotation are the kind's; for networks the Flax modules, by
        the name of their file (``song_unet`` is ``SongUNet``).
    """
    module = importlib.import_module(f"fmjax.{kind.package}")
    names = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    found = {}
    for name in names:
        value = getattr(module, name)
        if kind is NET:
            if inspect.isclass(value) and dataclasses.is_dataclass(value) and hasattr(value, "apply"):
                found[_snake(value)] = value
        elif inspect.isfunction(value) and value.__module__.startswith("fmjax.") and _fits(kind, value):
            found[name] = value
    return found


def options_of(factory: Callable) -> dict[str, Any]:
    """Return the options of a factory with their defaults: keyword-only arguments, or a Flax module's own fields."""
    if inspect.isclass(factory) and dataclasses.is_dataclass(factory):
        fields = (f for f in dataclasses.fields(factory) if f.init and f.name not in ("parent", "name"))
        empty = inspect.Parameter.empty
        return {f.name: empty if f.default is dataclasses.MISSING else f.default for f in fields}
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def is_spec(value: Any) -> bool:
    """Return whether a value is a name or a mapping, and no object."""
    return isinstance(value, str) or hasattr(value, "items")


def is_outside(name: Any) -> bool:
    """Return whether a name is a place outside the package.

    >>> is_outside("pkg.nets:make"), is_outside("folder/nets.py:make"), is_outside("unet")
    (True, True, False)
    """
    return isinstance(name, str) and OUTSIDE.fullmatch(name) is not None


def outside_places(tree: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield every field of a config that names code outside the package, with the place that it names."""
    if is_outside(tree):
        yield field, tree
    children = tree.items() if hasattr(tree, "items") else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for name, value in children:
        yield from outside_places(value, f"{field}.{name}" if field else str(name))


def absolute(tree: Any) -> Any:
    """Return a config as plain dicts in which places in files have absolute paths, so that a run folder is enough."""
    if hasattr(tree, "items"):
        return {name: absolute(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(absolute(value) for value in tree)
    match = OUTSIDE.fullmatch(tree) if isinstance(tree, str) else None
    return f"{Path(match[1]).absolute()}:{match[2]}" if match and match[1].endswith(".py") else tree


def refusal(field: str, value: Any, wrong: str, way_out: str) -> ValueError:
    """Return the error ``<field>=<value>: <what is wrong>. <what to do>.``, cut to ``LENGTH`` characters."""
    line = " ".join(f"{field}={_SHORT.repr(value)}: {wrong}. {way_out}.".split()).replace("?.", "?")
    return ValueError(line if len(line) <= LENGTH else line[: LENGTH - 2] + " …")


def label(factory: Callable) -> str:
    """Return a factory's name as a config has it."""
    return _snake(factory) if inspect.isclass(factory) else getattr(factory, "__name__", repr(factory))


def _like(default: Callable, spec: Spec, field: str) -> Callable:
    """A function like ``default`` from the same module, with its options bound."""
    returns = inspect.signature(default).return_annotation
    kind = Kind("choice", default.__module__.removeprefix("fmjax."), _positional(default), str(returns))
    function, options = resolve(kind, spec, field=field)
    options = checked(function, options, field=field)
    return functools.partial(function, **options) if options else function


def _outside(place: str, field: str) -> Callable:
    module_name, name = OUTSIDE.fullmatch(place).groups()
    try:
        module = _module_of_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise refusal(
            field, place, f"cannot be imported ({error})", "Install the package, or run where it lies"
        ) from error
    if not callable(getattr(module, name, None)):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        near = checks.nearest(name, known)
        raise refusal(
            field, place, f"{module_name} has no factory {name!r}{near}", f"It has {', '.join(known) or 'none'}"
        )
    return getattr(module, name)


def _module_of_file(file: str) -> types.ModuleType:
    path = Path(file).absolute()
    name = f"fmjax_file_{hashlib.sha256(os.fspath(path).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


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
    """The value as its type hint has it; a value without a hint is not judged."""
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
    raise refusal(field, value, f"must be {names}, and is {type(value).__name__}", f"Give {names}")


def _plain(hint: Any) -> str:
    hint = hint.__origin__ if typing.get_origin(hint) is typing.Annotated else hint
    words = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", type(None): "None"}
    return words.get(hint, hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", ""))
