"""Places of code outside the package in a config: ``"package.module:factory"`` or ``"folder/file.py:factory"``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fmjax import checks
from fmjax.checks import Refusal
from fmjax.storage.files import local_path

FILES = ("weights", "statistics")  # options of metrics and extractors that name a file
OUTSIDE = re.compile(r"(.+\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def is_outside(name: Any) -> bool:
    """Return whether a name is a place outside the package.

    Args:
        name: any value of a config.

    Returns:
        Whether the value is a string of the form of a place.

    >>> is_outside("pkg.nets:make"), is_outside("folder/nets.py:make"), is_outside("unet")
    (True, True, False)
    """
    return isinstance(name, str) and OUTSIDE.fullmatch(name) is not None


def outside_places(tree: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield every field of a config that names code outside the package.

    Args:
        tree: a config, or a part of one.
        field: dotted name of the part.

    Yields:
        The dotted name of the field, and the place.

    >>> list(outside_places({"net": {"name": "pkg.nets:make"}, "path": "linear"}))
    [('net.name', 'pkg.nets:make')]
    """
    if is_outside(tree):
        yield field, tree
    children = tree.items() if hasattr(tree, "items") else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for name, value in children:
        yield from outside_places(value, f"{field}.{name}" if field else str(name))


def absolute(tree: Any) -> Any:
    """Return a config as plain dicts with absolute paths of Python files, so that a run folder needs nothing else.

    Args:
        tree: a config, or a part of one.

    Returns:
        The config.

    >>> absolute({"path": "linear"})
    {'path': 'linear'}
    """
    if hasattr(tree, "items"):
        return {name: absolute(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(absolute(value) for value in tree)
    match = OUTSIDE.fullmatch(tree) if isinstance(tree, str) else None
    return f"{local_path('config', match[1])}:{match[2]}" if match and match[1].endswith(".py") else tree


def with_data_path(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose ``data.path`` is absolute, so that a run folder is read from any folder.

    Args:
        tree: a config as plain dicts.

    Returns:
        The config; a path that does not exist stays as it is.

    >>> with_data_path({"data": {"name": "arrays", "path": "."}})["data"]["path"] == os.getcwd()
    True
    """
    data = tree.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    if not isinstance(path, str) or not os.path.exists(path):
        return tree
    return tree | {"data": data | {"path": os.path.abspath(path)}}


def with_metric_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose ``metrics`` name weights and statistics by absolute paths, see ``with_data_path``.

    Args:
        tree: a config as plain dicts.

    Returns:
        The config; a path that does not exist stays as it is.

    >>> with_metric_paths({"metrics": ("w2_to", {"name": "frechet_to", "statistics": "none.npz"})})["metrics"][1]
    {'name': 'frechet_to', 'statistics': 'none.npz'}
    """

    def local(spec: Any) -> Any:
        if not isinstance(spec, dict):
            return spec
        files = {
            k: os.path.abspath(v) for k, v in spec.items() if k in FILES and isinstance(v, str) and os.path.exists(v)
        }
        return spec | files | ({"features": local(spec["features"])} if "features" in spec else {})

    described = tree.get("metrics")
    return tree | {"metrics": type(described)(map(local, described))} if isinstance(described, (list, tuple)) else tree


def load_factory(place: str, *, field: str) -> Callable:
    """Import the factory at a place outside the package.

    Args:
        place: ``"package.module:factory"`` or ``"folder/file.py:factory"``.
        field: the config field, for messages.

    Returns:
        The factory.

    Raises:
        ValueError: the module cannot be imported or has no such factory (with the nearest).
    """
    module_name, name = OUTSIDE.fullmatch(place).groups()
    try:
        module = _module_of_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except (ImportError, OSError) as error:
        raise Refusal(
            field, place, f"cannot be imported ({error})", "Install the package, or run where it lies"
        ) from error
    if not callable(getattr(module, name, None)):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        near = checks.nearest(name, known)
        raise Refusal(
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
