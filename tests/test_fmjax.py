"""The package's door: public names resolve, what is heavy stays out of an import, and rooms import downwards only."""

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
# what each room may import of fmjax, beside itself; packages stand for all their files
BELOW = {
    "types": set(),
    **dict.fromkeys(("weighting", "attacks"), {"types"}),
    **dict.fromkeys(("paths", "times", "couplings", "oracles", "guidance"), {"types", "paths", "times"}),
    "methods": {"types", "paths", "times", "weighting", "attacks", "methods"},
    "nets": {"types", "nets"},
    "fixed_point": set(),
    "solvers": {"types", "paths", "times", "fixed_point"},
    **dict.fromkeys(("samplers", "correctors", "likelihood", "diffusion"), {"types", "paths", "times", "solvers"}),
    "schedules": {"types", "paths", "times"},
    "mismatch": {"types", "oracles", "solvers"},
    "tune": {"types", "workdir"},
}


@pytest.mark.parametrize("name", fmjax.__all__)
def test_every_public_name_is_a_module(name):
    assert getattr(fmjax, name).__name__ == f"fmjax.{name}"
    assert name in dir(fmjax)


def test_an_unknown_name_is_refused_with_the_public_ones():
    with pytest.raises(AttributeError, match="no attribute 'smaplers'; its public names are .*samplers"):
        _ = fmjax.smaplers


def test_importing_the_mathematics_imports_nothing_heavy():
    names = "correctors, couplings, marginals, oracles, paths, samplers, solvers, times, train"
    code = f"import sys; from fmjax import {names}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_rooms_import_downwards_only():
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).with_suffix("").parts[0]
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fmjax":
                _, *inner = node.module.split(".")
                found |= {inner[0]} if inner else {alias.name for alias in node.names}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                assert not {n.split(".")[0] for n in names} & {"launch", "configs"}, file
                if room not in ("run", "build"):
                    assert "ml_collections" not in {n.split(".")[0] for n in names}, file
        assert found <= BELOW.get(room, found), f"{file} imports {sorted(found - BELOW[room])}"
