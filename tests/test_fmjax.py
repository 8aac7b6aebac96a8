"""The package: public names resolve, imports stay light, and packages import downwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fmjax

ROOT = Path(fmjax.__file__).parent
HEAVY = (
    "sklearn",
    "ott",
    "matplotlib",
    "tensorflow_datasets",
    "tensorflow",
    "ot",
    "torch",
    "jaxopt",
    "orbax",
    "diffrax",
)
# The floors of the house, from the ground up: a package imports from lower floors and from its own, never in a circle.
FLOORS = (
    ("types", "keys", "checks"),
    (
        "storage",
        "interpolants",
        "predictions",
        "paths",
        "fractions",
        "times",
        "transport",
        "couplings",
        "sources",
        "tokens",
        "psd",
        "nets",
    ),
    ("sampling", "methods", "data", "convert", "metrics"),
    ("oracles", "correction", "training"),
    ("straightening",),
    ("experiments",),
)
CONFIGS = ("ml_collections", "absl")  # only the laboratory knows configs and flags


def imports(file: Path) -> tuple[set[str], set[str]]:
    """The packages of fmjax, and the top-level names outside it, that a file imports anywhere."""
    inner, outer = set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            outer |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            top, *rest = (node.module or "").split(".")
            if top != "fmjax":
                outer.add(top)
            elif rest:
                inner.add(rest[0])
            else:
                inner |= {alias.name for alias in node.names}
    return inner, outer


@pytest.mark.parametrize("name", fmjax.__all__)
def test_every_public_name_resolves(name):
    value = getattr(fmjax, name)
    assert value.__name__ in (name, f"fmjax.{name}")
    assert name in dir(fmjax)


def test_a_package_has_its_names_and_no_module_hides_a_function():
    for package in sorted({name for floor in FLOORS for name in floor}):
        module = getattr(fmjax, package)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{package}.{name}"
    assert callable(fmjax.methods.lagrangian) and callable(fmjax.nets.UNet) and callable(fmjax.sampling.rk4)


def test_an_unknown_name_is_refused_with_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'smapling'; its public names are .*sampling"):
        _ = fmjax.smapling


def test_importing_the_mathematics_imports_nothing_heavy():
    names = "correction, couplings, methods, nets, oracles, paths, sampling, times, training"
    code = f"import sys; from fmjax import {names}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_packages_import_downwards_only_and_never_in_a_circle():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    below = {name: set() for name in floor}
    for file in ROOT.rglob("*.py"):
        if file.parent == ROOT and file.stem == "__init__":
            continue
        package = file.relative_to(ROOT).with_suffix("").parts[0]
        inner, outer = imports(file)
        assert not outer & {"launch", "configs"}, file
        assert package == "experiments" or not outer & set(CONFIGS), file
        upward = {name for name in inner if floor[name] > floor[package]}
        assert not upward, f"{file} imports upwards: {sorted(upward)}"
        below[package] |= inner - {package}
    while below:  # take away what imports nothing that is left, until nothing is left
        free = [package for package, names in below.items() if not names & below.keys()]
        assert free, f"imports in a circle: {below}"
        for package in free:
            del below[package]
