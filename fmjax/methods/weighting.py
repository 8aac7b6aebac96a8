"""Weights of a loss, example by example: wrappers ``Method -> Method`` that change how much an error counts.

Both weigh the squared error ``d r``, the sum over the ``d`` elements of an example of which a method's
``aux["per_example"]`` is the mean ``r``. The mean square stays in ``aux["residual"]`` (where the method has not put one
there itself): the weighted loss says little about progress.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.types import Method, Params

NAME = "log_variance"
FREQUENCIES = 32


def adapted(square: Float[Array, " b"], power: float = 1.0, floor: float = 1e-2) -> Float[Array, " b"]:
    """``square / sg[(square + floor)^power]``, for squared errors ``[B]`` summed over an example.

    Raises ``ValueError`` unless ``power >= 0`` and ``floor > 0``.
    """
    if not (0 <= power < math.inf and 0 < floor < math.inf):
        raise ValueError(f"an adaptive weight needs power >= 0 and floor > 0, got power={power} and floor={floor}")
    return square / jax.lax.stop_gradient((square + floor) ** power)


def adaptive(method: Method, *, power: float = 1.0, floor: float = 1e-2) -> Method:
    """Each example's loss divided by ``sg[(d r + floor)^power]`` (mean flow, arXiv 2505.13447; 2406.14548).

    The gradient of an example is ``(d r + floor)^-power`` times that of ``d r``: with ``power = 1`` that of
    ``log(d r + floor)``, with ``1/2`` that of a pseudo-Huber loss, with 0 that of the sum of squares. Large errors
    count less, so what is learned is no longer a mean: it is where the target's law is symmetric about its mean (any
    Gaussian), and nearly so where ``d`` is large. Raises ``ValueError`` unless ``power >= 0`` and ``floor > 0``.
    """
    adapted(jnp.ones(1), power, floor)

    def loss(params, target, batch, key):
        _, aux = method.loss(params, target, batch, key)
        return _weighted(aux, adapted(batch.x1[0].size * aux["per_example"], power, floor))

    return method._replace(loss=loss)


def learned(method: Method) -> Method:
    """``exp(-w(s, t)) d r + w(s, t)``: uncertainty learned beside the network (arXiv 2312.02696; 2505.18825 eq. 19).

    For given times the optimum is ``w = log E[d r]``: every pair of times then counts alike, and the minimiser is
    that of the loss unweighted. ``w(s, t) = b + a . phi(s) + c . phi(t)`` with ``phi_k(t) = cos(k pi t)``, of the times
    in ``aux`` (``s = t`` for a method of one time), is zero at first. Its parameters lie in
    ``params["log_variance"]``: see ``with_log_variance``. ``aux`` gets ``log_variance``, ``w`` of each example. Raises
    ``ValueError`` for parameters without them and a method that does not tell its times.
    """

    def loss(params, target, batch, key):
        if not isinstance(params, dict) or NAME not in params:
            raise ValueError(
                f"a learned weight needs params[{NAME!r}]: use weighting.with_log_variance(model), or add "
                "weighting.init_log_variance() there"
            )
        _, aux = method.loss(params, target, batch, key)
        if "t" not in aux:
            raise ValueError("a learned weight is a function of times, and this method's aux has none")
        w = log_variance(params[NAME], aux.get("s", aux["t"]), aux["t"])
        return _weighted(aux | {NAME: w}, jnp.exp(-w) * batch.x1[0].size * aux["per_example"] + w)

    return method._replace(loss=loss)


def log_variance(weights: Params, s: Float[Array, " b"], t: Float[Array, " b"]) -> Float[Array, " b"]:
    """``w(s, t)`` of ``learned``."""
    phi = lambda t: jnp.cos(jnp.pi * t[:, None] * jnp.arange(1, FREQUENCIES + 1))
    return weights["bias"] + phi(s) @ weights["s"] + phi(t) @ weights["t"]


def init_log_variance() -> Params:
    """The parameters of ``w(s, t) = 0``, to be put in ``params["log_variance"]``."""
    return {"bias": jnp.zeros(()), "s": jnp.zeros(FREQUENCIES), "t": jnp.zeros(FREQUENCIES)}


def with_log_variance(model):
    """A ``nets.adapters.Model`` whose parameters, a dictionary, also hold those of ``learned``; its net ignores them.

    Parameters without them pass too, so that a flow's checkpoint can be a teacher.
    """

    def init(key, x, cond=None):
        return {**model.init(key, x, cond), NAME: init_log_variance()}

    def net(params, x, s, t, cond=None, key=None):
        return model.net({name: p for name, p in params.items() if name != NAME}, x, s, t, cond, key)

    return model._replace(init=init, net=net)


def _weighted(aux, per_example):
    return jnp.mean(per_example), {"residual": aux["per_example"]} | aux | {"per_example": per_example}
