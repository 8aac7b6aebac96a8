"""The folder of a run: its config, its environment, its records. A folder belongs to one config."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from fmjax.storage.files import as_json, write_json

PACKAGES = ("fmjax", "jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "numpy")
ABSENT = "absent"


class WorkdirError(RuntimeError):
    """A folder that cannot be written, or that belongs to another config."""


def open_workdir(path: str | Path, config: Mapping[str, Any], *, free: Iterable[str] = ()) -> Path:
    """Makes the folder of a run, or checks that it belongs to this one; returns its absolute path.

    Writes ``config.json`` (plain JSON, sorted) and ``environment.json`` (code and package versions, devices; what it
    was at earlier openings, where it differs, under ``earlier``). ``free`` names fields, dotted, that may change when
    a run is resumed. On several processes the first one writes. Raises ``WorkdirError``, before anything is touched,
    for a folder of another config (with every differing field and both values) and for one that cannot be written.
    """
    if "://" in str(path):
        raise WorkdirError(f"workdir {path} is a URL; give a folder of a local or mounted file system")
    path = Path(path).absolute()
    config = _plain(config)
    if (path / "config.json").exists():
        differing = _differing(_read_config(path), config, tuple(free))
        if differing:
            told = "; ".join(differing)
            raise WorkdirError(f"{path} belongs to another config: {told}; choose another workdir, or its values")
    if jax.process_index() == 0:
        try:
            path.mkdir(parents=True, exist_ok=True)
            _write_environment(path / "environment.json")
            write_json(path / "config.json", config)
        except OSError as error:
            at = f" ({error.filename})" if error.filename else ""
            raise WorkdirError(f"workdir {path} cannot be written: {error.strerror}{at}; choose another one") from error
    return path


def environment() -> dict[str, Any]:
    """What the run ran on: package versions, git commit (``+`` where changed), Python, platform and devices."""
    devices = jax.devices()
    return {
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": jax.process_count(),
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(config), default=as_json))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path / 'config.json'} is unreadable ({error}); choose another workdir") from error


def _differing(old: dict, new: dict, free: tuple[str, ...]) -> list[str]:
    a, b = dict(_fields(old)), dict(_fields(new))
    is_free = lambda name: any(name == f or name.startswith(f + ".") for f in free)
    show = lambda fields, name: json.dumps(fields[name]) if name in fields else ABSENT
    names = [name for name in sorted(a.keys() | b.keys()) if not is_free(name)]
    return [
        f"{name} is {show(a, name)} there, {show(b, name)} here" for name in names if show(a, name) != show(b, name)
    ]


def _fields(tree: dict, prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _write_environment(path: Path) -> None:
    now = environment()
    try:
        before = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        before = now
    earlier = before.pop("earlier", []) if before is not now else []
    if before != now:
        earlier.append(before)
    write_json(path, {**now, "earlier": earlier})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit(package: Path) -> str | None:
    """The commit of the checkout that is the package's own; one installed below some other checkout has none."""
    git = lambda *args: subprocess.run(
        ["git", "-C", str(package), *args], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.resolve().parent:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
