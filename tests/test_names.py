"""Names of the library: each is defined once."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import fmjax

PACKAGE = Path(fmjax.__file__).parent
SHARED = {
    "main": "the entry point of a command, one per module of experiments",
    "Block": "a Flax module: the class names the parameters, so that checkpoints depend on the name",
    "edm": "the preconditioning of a network for the method edm",
    "ve": "the preconditioning of a network for the path ve",
    "vp": "the preconditioning of a network for the path vp",
}
PLACES = {"main": "experiments/", "Block": "nets/"}


def public_definitions(path: Path) -> set[str]:
    """Return the public functions and classes that a module defines."""
    nodes = ast.parse(path.read_text()).body
    return {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")}


@pytest.fixture(scope="module")
def modules():
    """Return the modules that define each public name, as paths below the package."""
    places = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in public_definitions(path):
            places[name].append(path.relative_to(PACKAGE).as_posix())
    return dict(places)


def test_a_public_name_is_defined_in_one_module(modules):
    repeated = {name: places for name, places in modules.items() if len(places) > 1 and name not in SHARED}
    assert not repeated, "rename all but one of these, or begin the name of a helper with an underscore"


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_name_is_still_shared_and_only_where_documented(modules, name):
    places = modules[name]
    assert len(places) > 1, f"{name!r} is defined once: take it out of SHARED"
    if name in PLACES:
        assert all(place.startswith(PLACES[name]) for place in places)
    else:
        assert "nets/preconditioning.py" in places and len(places) == 2
