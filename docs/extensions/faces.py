"""Write one page of reference per package: every public name, from the docstrings."""

import importlib
import inspect
import re
from pathlib import Path

PACKAGES = {
    "fmjax": "Names of the guide",
    "fmjax.methods": "Training objectives",
    "fmjax.nets": "Networks",
    "fmjax.sampling": "Sampling",
    "fmjax.correction": "Marginal correction",
    "fmjax.straightening": "Reflow of parts of the time axis",
    "fmjax.data": "Data",
    "fmjax.metrics": "Metrics",
    "fmjax.training": "Training",
    "fmjax.oracles": "Closed forms",
    "fmjax.convert": "Public checkpoints",
    "fmjax.storage": "Files",
    "fmjax.paths": "Paths, interpolants and predictions",
    "fmjax.times": "Training times, and fractions that change during training",
    "fmjax.couplings": "Couplings",
    "fmjax.sources": "Sources",
    "fmjax.tokens": "Paths of discrete data",
    "fmjax.psd": "Positive semi-definite models",
    "fmjax.transport": "Optimal transport",
    "fmjax.types": "Types",
    "fmjax.keys": "Random keys",
    "fmjax.checks": "Messages of errors",
}


def setup(app):
    """Write the pages before Sphinx reads the sources."""
    app.connect("builder-inited", lambda app: write(Path(app.srcdir) / "api"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write(folder: Path) -> None:
    """Write ``folder/PACKAGE.rst`` for every package; a file that does not change keeps its date."""
    for package, title in PACKAGES.items():
        page, text = folder / f"{package}.rst", render(package, title)
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def render(package: str, title: str) -> str:
    """Return the page of a package: the module's docstring, a table of names, and an entry for every name."""
    module = importlib.import_module(package)
    names = public(module)
    modules = [n for n in names if inspect.ismodule(getattr(module, n)) and f"{package}.{n}" not in PACKAGES]
    objects = [n for n in names if not inspect.ismodule(getattr(module, n))]
    heading = f"``{package}``: {title[0].lower()}{title[1:]}"
    lines = [
        f".. _api-{package}:",
        "",
        heading,
        "=" * len(heading),
        "",
        f".. automodule:: {package}",
        "   :no-members:",
        "",
    ]
    if package == "fmjax":
        return "\n".join([*lines, *_elsewhere(module, objects), *_entries("fmjax.experiments.run", ["Run", "load"])])
    lines += [*_table(package, objects), *_entries(package, objects)]
    for name in modules:
        inner = f"{package}.{name}"
        heading = f"``{inner}``"
        members = [n for n in public(importlib.import_module(inner)) if n not in objects]
        lines += [
            heading,
            "-" * len(heading),
            "",
            f".. automodule:: {inner}",
            "   :no-members:",
            "",
            *_table(inner, members),
        ]
        lines += _entries(inner, members)
    return "\n".join(lines)


def public(module) -> list[str]:
    """Return the public functions, classes and modules of a package; without ``__all__``, what the module defines."""
    shown = lambda v: inspect.isfunction(v) or inspect.isclass(v)
    if hasattr(module, "__all__"):
        names = [n for n in module.__all__ if shown(getattr(module, n)) or inspect.ismodule(getattr(module, n))]
    else:
        names = [n for n, v in vars(module).items() if shown(v) and v.__module__ == module.__name__]
    return sorted((n for n in names if not n.startswith("_")), key=str.lower)


def _entries(package: str, names: list[str]) -> list[str]:
    """Return one directive per name."""
    module, lines = importlib.import_module(package), []
    for name in names:
        value = getattr(module, name)
        kind = "class" if inspect.isclass(value) else "function"
        lines += [f".. auto{kind}:: {package}.{name}", *(["   :members:"] if kind == "class" else []), ""]
    return lines


def _table(package: str, names: list[str]) -> list[str]:
    """Return a table of names and the first lines of their docstrings."""
    module, lines = importlib.import_module(package), []
    for name in names:
        value = getattr(module, name)
        role = "class" if inspect.isclass(value) else "func"
        lines += [f"   * - :{role}:`~{package}.{name}`", f"     - {_first_line(value)}"]
    return [".. list-table::", "   :widths: 30 70", "", *lines, ""] if lines else []


def _elsewhere(module, names: list[str]) -> list[str]:
    """Return a table of the short names at the top, with links to the entries of the packages that define them."""
    lines = []
    for name in names:
        value = getattr(module, name)
        home = next((p for p in PACKAGES if p != "fmjax" and value.__module__.startswith(p)), "fmjax.experiments.run")
        role = "class" if inspect.isclass(value) else "func"
        lines += [f"   * - ``fmjax.{name}``", f"     - :{role}:`{home}.{name}`: {_first_line(value)}"]
    return [".. list-table::", "   :widths: 25 75", "", *lines, ""]


def _first_line(value) -> str:
    return re.sub(r"\s+", " ", (inspect.getdoc(value) or "").split("\n\n")[0]).strip()
