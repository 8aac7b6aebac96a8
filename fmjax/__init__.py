"""Few-step flow models in JAX: flow matching, flow maps and marginal correction.

The public names are those of ``__all__``: modules, imported at first use. ``fmjax.samplers.sample`` and
``from fmjax import samplers`` both work.
"""

import importlib

__version__ = "0.1.0"

__all__ = [
    "attacks", "best", "checkpoint", "convert", "correctors", "couplings", "data", "diffusion", "evaluate",
    "guidance", "interpolated", "likelihood", "marginal_sets", "marginals", "methods", "metrics", "mismatch",
    "nets", "oracles", "paths", "pipeline", "reflow", "report", "run", "samplers", "schedules", "segments",
    "sharding", "solvers", "straightening", "times", "train", "tune", "tuning", "types", "weighting",
    "workdir",
]  # fmt: skip


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"fmjax.{name}")
    raise AttributeError(f"module 'fmjax' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__():
    return [*globals(), *__all__]
