"""What a run costs: evaluations, FLOPs and seconds of each sampler, and steps and seconds of each training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr

from fmjax import sampling
from fmjax.experiments import drawing, samplers, workdir
from fmjax.experiments.drawing import Models
from fmjax.experiments.samplers import FLOW, FLOW_MAP, Sampler
from fmjax.storage import files
from fmjax.training import logs
from fmjax.types import Cond


class Spent(NamedTuple):
    """The cost of a sampler.

    Attributes:
        nfe: network evaluations per sample.
        flops: floating-point operations of the networks per sample: matrix products and convolutions.
        seconds: seconds per 1000 samples on the machine of the run; nan where no time is recorded.
    """

    nfe: int
    flops: float
    seconds: float


class TrainingTime(NamedTuple):
    """The cost of a training.

    Attributes:
        stage: the stage.
        steps: number of steps.
        seconds: seconds of the steps, without compilation; nan where no speed is recorded.
    """

    stage: str
    steps: int
    seconds: float


def flops(function: Any, *args: Any) -> float:
    """Return the floating-point operations of the matrix products and convolutions of a function.

    Args:
        function: a function of arrays.
        *args: its arguments, possibly shapes.

    Returns:
        The number.

    >>> flops(lambda a, b: a @ b, jnp.ones((2, 3)), jnp.ones((3, 4)))
    48.0
    """
    return float(sum(operations for _, operations in products(jax.make_jaxpr(function)(*args).jaxpr)))


def products(jaxpr: Jaxpr) -> list[tuple[np.dtype, float]]:
    """Return type and floating-point operations of every matrix product and convolution of a traced function.

    Args:
        jaxpr: the traced function. The body of a scan counts as often as it runs, so the layers of a network under a
            scan do, and the largest branch of a condition; the body of a loop of unknown length counts once.

    Returns:
        Pairs ``(dtype, operations)``; a multiplication and an addition are two operations.

    >>> layers = lambda x: jax.lax.scan(lambda y, w: (y @ w, None), x, jnp.ones((5, 3, 3)))[0]
    >>> products(jax.make_jaxpr(layers)(jnp.ones((2, 3))).jaxpr)
    [(dtype('float32'), 180.0)]
    """
    counted = []
    for eqn in jaxpr.eqns:
        inside = [
            products(getattr(part, "jaxpr", part))
            for value in eqn.params.values()
            for part in (value if isinstance(value, (tuple, list)) else [value])
            if hasattr(part, "eqns") or hasattr(part, "jaxpr")
        ]
        if eqn.primitive.name == "cond":
            inside = [max(inside, key=lambda branch: sum(n for _, n in branch))]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        counted += [(kind, times * n) for part in inside for kind, n in part]
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval
            size = math.prod(left.shape[i] for i in contracted)
            counted.append((left.dtype, 2.0 * eqn.outvars[0].aval.size * size))
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            counted.append((kernel.dtype, 2.0 * eqn.outvars[0].aval.size * kernel.size / features))
    return counted


def sampler_flops(names: Sequence[Sampler], models: Models, costs: Mapping[str, sampling.Cost], cond: Cond) -> dict:
    """Return the floating-point operations of the networks per sample.

    Args:
        names: the samplers.
        models: the networks.
        costs: the numbers of evaluations by name of the sampler.
        cond: conditions ``[n, ...]``, or ``None``.

    Returns:
        Operations by name of the sampler; solver arithmetic, fitted pushes and kernel drifts are not counted.
    """
    x, t = jnp.zeros((1, *models.shape)), jnp.full(1, 0.5)
    single = None if cond is None else drawing.first(cond, 1)
    unit = {}
    for name, method in models.methods.items():
        params = models.params[name]
        if name == FLOW_MAP:
            unit[name] = flops(lambda p, x, t, c, m=method: m.flow_map(p)(x, 0.5 * t, t, c), params, x, t, single)
        elif name == FLOW:
            unit[name] = flops(lambda p, x, t, c, m=method: m.velocity(p)(x, t, c), params, x, t, single)
        elif method.direction is not None:
            unit[name] = flops(lambda p, x, t, c, m=method: m.direction(p)(x, t, c), params, x, t, single)

    def of(sampler: Sampler) -> float:
        c = costs[sampler.name]
        total = (c.nfe - c.c_nfe) * unit[FLOW_MAP if sampler.solver == FLOW_MAP else FLOW]
        if isinstance(sampler.by, str) and sampler.by in unit:
            return total + c.corrections * unit[sampler.by]
        return total + (0.0 if sampler.by in (samplers.NOISE, samplers.DRIFT) else c.c_nfe * unit[FLOW])

    return {sampler.name: of(sampler) for sampler in names}


def trainings(path: Path, names: Iterable[str]) -> list[TrainingTime]:
    """Return the cost of each training of a run folder, from the speeds that it recorded.

    Args:
        path: the run folder.
        names: names of the stages.

    Returns:
        The trainings that have records.
    """
    trained = []
    for name in names:
        lines = files.read_jsonl(workdir.stage_folder(path, name) / logs.RECORDS)
        if lines:
            speeds = [r["steps_per_s"] for r in lines if r.get("steps_per_s")]
            speed = statistics.median(speeds) if speeds else math.nan  # the first records include compilation
            trained.append(TrainingTime(name, lines[-1]["step"], lines[-1]["step"] / speed))
    return trained


def number(value: float) -> str:
    """Return a cost as text with two or three digits and a prefix of the SI.

    Args:
        value: the number; nan is shown as n/a.

    Returns:
        The text.

    >>> number(1234567.0), number(0.0123), number(math.nan)
    ('1.23 M', '0.0123', 'n/a')
    """
    if not math.isfinite(value):
        return "n/a"
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"
