"""From modules of a neural-network library to ``Net``: plain functions of ``(params, x, s, t, cond, key)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmjax.types import Net, Params, expand, over_batch

ENCODER = "encoder"


class Model(NamedTuple):
    """A network as two functions: ``init(key, x, cond) -> params`` and ``net(params, x, s, t, cond, key)``."""

    init: Callable[..., Params]
    net: Net


def from_linen(module) -> Model:
    """A Flax Linen module ``module(x, s, t, cond, train=...)`` as a ``Model``; ``train`` holds when a key is given.

    Only dropout draws from ``key`` (the first example's key seeds the masks of the whole batch). Where the module has
    ``attention="fused"``, a kernel without a jvp, ``net.with_jvp`` is the same network with XLA's attention: losses of
    flow maps take it inside their jvp, and there alone. ``net.logit`` tells whether it gives one number an example.
    """

    def init(key, x, cond=None):
        t = over_batch(0.0, x)
        draw = lambda k: module.init({"params": k}, x, t, t, cond)["params"]
        if isinstance(key, jax.core.Tracer):
            return draw(key)
        # A large program that runs once: on a CPU, optimising it costs several times what it saves.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(draw, compiler_options=options)(key)

    def net(params, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        rngs = None if key is None else {"dropout": key.ravel()[0]}
        return module.apply({"params": params}, x, s, t, cond, train=key is not None, rngs=rngs)

    net.logit = getattr(module, "logit", False)
    if getattr(module, "attention", None) == "fused":
        net.with_jvp = from_linen(module.clone(attention="xla")).net
    return Model(init, net)


def from_nnx(model) -> tuple[Params, Net]:
    """An NNX model called as ``model(x, s, t, cond)``: its parameters and a ``Net`` over them (split and merge)."""
    from flax import nnx

    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def net(params, x, s, t, cond=None, key=None):
        return nnx.merge(graph, params, rest)(x, over_batch(s, x), over_batch(t, x), cond)

    return params, net


def one_time(f: Callable[..., Any]) -> Net:
    """A textbook velocity ``f(params, x, t)`` as a ``Net``: it ignores the jump's end, so ``X`` is an Euler step."""
    return lambda params, x, s, t, cond=None, key=None: f(params, x, over_batch(s, x))


def with_encoder(model: Model, encoder: Model) -> Model:
    """The model with another beside it, ``net.encoder``, for methods that train both (``learned_coupling``).

    Its parameters, a dictionary, lie in ``params["encoder"]``; ``net`` ignores them, and passes without them, so that
    a flow's checkpoint starts it or is its teacher. ``encoder`` sees no condition.
    """

    def init(key, x, cond=None):
        own, other = jax.random.split(key)
        return {**model.init(own, x, cond), ENCODER: encoder.init(other, x)}

    def alone(inner):
        def net(params, *args, **kwargs):
            return inner({name: p for name, p in params.items() if name != ENCODER}, *args, **kwargs)

        return net

    net = alone(model.net)
    if hasattr(model.net, "with_jvp"):
        net.with_jvp = alone(model.net.with_jvp)
    net.encoder = lambda params, *args, **kwargs: encoder.net(params[ENCODER], *args, **kwargs)
    return Model(init, net)


def trigonometric(net: Net, *, sigma: float = 1.0) -> Net:
    """A network ``F`` as the average velocity of ``X_{s,t}(x) = cos(a) x - sin(a) sigma F(x / sigma, s, t)``.

    ``a = pi / 2 (t - s)``: sCM's parametrisation (arXiv 2410.11081), for data and a source of standard deviation
    ``sigma`` on the trigonometric path; on the diagonal ``v = -(pi / 2) sigma F``, smoothly. Raises ``ValueError`` for
    ``sigma <= 0``.
    """
    if not sigma > 0:
        raise ValueError(f"trigonometric needs sigma > 0, the standard deviation of the data, got {sigma}")

    def average(params, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        a = expand(jnp.pi / 2 * (t - s), x)
        turn = sigma * net(params, x / sigma, s, t, cond, key)
        return -jnp.pi / 2 * (a / 2 * jnp.sinc(a / (2 * jnp.pi)) ** 2 * x + jnp.sinc(a / jnp.pi) * turn)

    return average
