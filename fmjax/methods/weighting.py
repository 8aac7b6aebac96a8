"""Weights of a loss, example by example: wrappers ``Method -> Method`` that change how much an error counts.

Both weigh the squared error ``d r``, the sum over the ``d`` elements of an example; the ``aux["per_example"]`` of a
method is the mean ``r``. The mean square stays in ``aux["residual"]`` (unless the method has set it): the weighted loss
says little about the progress of a training.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.types import Aux, Method, Params, network

NAME = "log_variance"
FEW = 64  # elements of an example below which an adaptive weight is left out
FREQUENCIES = 32

M = TypeVar("M", bound=Method)


def check_adaptive(power: float | None, floor: float) -> None:
    """Refuse the options of an adaptive weight that cannot work.

    Args:
        power: exponent; ``None`` as in ``exponent``.
        floor: constant beside the squared error.

    Raises:
        ValueError: not ``power >= 0``, not ``floor > 0``, or not finite.
    """
    if power is not None and not 0 <= power < math.inf:
        raise ValueError(f"power={power}: not the exponent of an adaptive weight. Give 0 or more.")
    if not 0 < floor < math.inf:
        raise ValueError(f"floor={floor}: an adaptive weight is infinite without it. Give a positive number.")


def exponent(power: float | None, x: Array) -> float:
    """Return the exponent of an adaptive weight for examples of the size of ``x``.

    A weight ``1 / (|e|^2 + floor)`` that depends on a noisy error ``e`` moves the minimiser away from the mean, in each
    element by about ``skewness / d`` standard deviations of the noise for ``d`` independent elements. This is the
    published weight of mean flow and of its successors; it does no harm on images, and learns another velocity in the
    plane.

    Args:
        power: the exponent; ``None``: 1 from ``FEW = 64`` elements on, and 0, no weight, below.
        x: examples ``[B, ...]``.

    Returns:
        The exponent.

    >>> exponent(None, jnp.zeros((1, 2))), exponent(None, jnp.zeros((1, 8, 8))), exponent(0.5, jnp.zeros((1, 2)))
    (0.0, 1.0, 0.5)
    """
    return float(x[0].size >= FEW) if power is None else power


def adapted(square: Float[Array, " b"], power: float = 1.0, floor: float = 1e-2) -> Float[Array, " b"]:
    """Return ``square / sg[(square + floor)^power]``.

    Args:
        square: squared errors, summed over an example, ``[B]``.
        power: exponent.
        floor: constant beside the squared error.

    Returns:
        Weighted errors ``[B]``.

    Raises:
        ValueError: as ``check_adaptive``.
    """
    check_adaptive(power, floor)
    return square / jax.lax.stop_gradient((square + floor) ** power)


def adaptive(method: M, *, power: float | None = 1.0, floor: float = 1e-2) -> M:
    """Divide the loss of each example by ``sg[(d r + floor)^power]`` (mean flow, arXiv 2505.13447; 2406.14548).

    The gradient of an example is ``(d r + floor)^-power`` times the gradient of ``d r``: for ``power = 1`` the gradient
    of ``log(d r + floor)``, for ``1/2`` the gradient of a pseudo-Huber loss, for 0 the gradient of the sum of squares.
    Large errors count less, so the minimiser is not a mean, unless the distribution of the target is symmetric about
    its mean (any Gaussian); it is close to the mean where ``d`` is large.

    Args:
        method: the method to weight.
        power: exponent; 0 for sums of squares, ``None`` as in ``exponent``.
        floor: constant beside the squared error.

    Returns:
        The method with the weighted loss and the same views.

    Raises:
        ValueError: as ``check_adaptive``.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax.methods.flow_matching import flow_matching
    >>> adaptive(flow_matching(lambda params, x, s, t, cond=None, key=None: params * x))
    FlowMethod(loss, velocity, score)
    """
    check_adaptive(power, floor)

    def loss(params, target, batch, key):
        _, aux = method.loss(params, target, batch, key)
        square = batch.x1[0].size * aux["per_example"]
        return _weighted(aux, adapted(square, exponent(power, batch.x1), floor))

    return method._replace(loss=loss)


def learned(method: M) -> M:
    """Weight a loss by an uncertainty ``w`` that is learned with the network, ``exp(-w(s, t)) d r + w(s, t)``.

    For given times the optimum is ``w = log E[d r]``: then every pair of times counts alike, and the minimiser is the
    minimiser of the unweighted loss (arXiv 2312.02696; 2505.18825 eq. 19). ``w(s, t) = b + a . phi(s) + c . phi(t)``
    with ``phi_k(t) = cos(k pi t)``, of the times in ``aux`` (``s = t`` for a method of one time), is initially zero.

    Args:
        method: the method to weight. Its parameters are a dictionary that also has ``params["log_variance"]`` (see
            ``with_log_variance``).

    Returns:
        The method with the weighted loss and the same views. ``aux`` gets ``log_variance``, ``w`` of each example.

    Raises:
        ValueError: in the loss, parameters without ``"log_variance"``, or a method whose ``aux`` has no times.
    """

    def loss(params, target, batch, key):
        if not isinstance(params, dict) or NAME not in params:
            raise ValueError(f"params[{NAME!r}]: missing. Use weighting.with_log_variance(model).")
        _, aux = method.loss(params, target, batch, key)
        if "t" not in aux:
            raise ValueError("aux['t']: missing, and a learned weight is a function of times. Use another method.")
        w = log_variance(params[NAME], aux.get("s", aux["t"]), aux["t"])
        return _weighted(aux | {NAME: w}, jnp.exp(-w) * batch.x1[0].size * aux["per_example"] + w)

    return method._replace(loss=loss)


def log_variance(weights: Params, s: Float[Array, " b"], t: Float[Array, " b"]) -> Float[Array, " b"]:
    """Return ``w(s, t)`` of ``learned``.

    Args:
        weights: ``params["log_variance"]``.
        s: start times ``[B]``.
        t: end times ``[B]``.

    Returns:
        ``[B]``.
    """
    phi = lambda t: jnp.cos(jnp.pi * t[:, None] * jnp.arange(1, FREQUENCIES + 1))
    return weights["bias"] + phi(s) @ weights["s"] + phi(t) @ weights["t"]


def init_log_variance() -> Params:
    """Return the initial ``params["log_variance"]``, for which ``w(s, t) = 0``.

    Returns:
        A dictionary of arrays.
    """
    return {"bias": jnp.zeros(()), "s": jnp.zeros(FREQUENCIES), "t": jnp.zeros(FREQUENCIES)}


def with_log_variance(model: Any) -> Any:
    """Add the parameters of ``learned`` to a model, whose network ignores them.

    Args:
        model: a ``nets.adapters.Model`` whose parameters are a dictionary.

    Returns:
        The model whose ``init`` also makes ``params["log_variance"]``. Its network also takes parameters without them,
        so that the checkpoint of a flow can be the teacher.
    """

    def init(key, x, cond=None):
        return {**model.init(key, x, cond), NAME: init_log_variance()}

    def without(inner):
        return lambda params, *args, **kwargs: inner({k: p for k, p in params.items() if k != NAME}, *args, **kwargs)

    return model._replace(init=init, net=network(model.net).wrap(without))


def _weighted(aux: Aux, per_example: Array) -> tuple[Array, Aux]:
    return jnp.mean(per_example), {"residual": aux["per_example"]} | aux | {"per_example": per_example}
