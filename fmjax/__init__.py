"""Few-step flow models in JAX: flow matching, flow maps and marginal correction.

The names of ``__all__`` are imported on demand: ``fmjax.sampling.rk4``, ``fmjax.sample`` and
``from fmjax import methods`` all work after ``import fmjax``.
"""

from __future__ import annotations

import importlib
import typing

__version__ = "0.1.0"

if typing.TYPE_CHECKING:
    from fmjax import (
        checks,
        convert,
        correction,
        couplings,
        data,
        experiments,
        fractions,
        interpolants,
        keys,
        methods,
        metrics,
        nets,
        oracles,
        paths,
        predictions,
        psd,
        sampling,
        sources,
        storage,
        straightening,
        times,
        tokens,
        training,
        transport,
        types,
    )
    from fmjax.experiments.run import Run, load
    from fmjax.methods import flow_matching, lagrangian
    from fmjax.sampling import euler, heun, rk4, sample, uniform_grid
    from fmjax.types import Batch, Method

_PACKAGES = (
    "checks", "convert", "correction", "couplings", "data", "experiments", "fractions", "interpolants", "keys",
    "methods", "metrics", "nets", "oracles", "paths", "predictions", "psd", "sampling", "sources", "storage",
    "straightening", "times", "tokens", "training", "transport", "types",
)  # fmt: skip
_NAMES = {
    **dict.fromkeys(("flow_matching", "lagrangian"), "methods"),
    **dict.fromkeys(("sample", "euler", "heun", "rk4", "uniform_grid"), "sampling"),
    **dict.fromkeys(("Batch", "Method"), "types"),
    **dict.fromkeys(("Run", "load"), "experiments.run"),
}

__all__ = [
    "Batch", "Method", "Run", "checks", "convert", "correction", "couplings", "data", "euler", "experiments",
    "flow_matching", "fractions", "heun", "interpolants", "keys", "lagrangian", "load", "methods", "metrics",
    "nets", "oracles", "paths", "predictions", "psd", "rk4", "sample", "sampling", "sources", "storage",
    "straightening", "times", "tokens", "training", "transport", "types", "uniform_grid",
]  # fmt: skip


def __getattr__(name: str):
    if name in _PACKAGES:
        return importlib.import_module(f"fmjax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(f"fmjax.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'fmjax' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__():
    return [*globals(), *__all__]
