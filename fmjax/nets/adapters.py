"""Adapters from modules of neural-network libraries to a ``Network``, and wrappers that give a network another form."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmjax.checks import Range, check_range
from fmjax.keys import as_keys
from fmjax.types import Network, Params, expand, network, over_batch

ENCODER = "encoder"


class Model(NamedTuple):
    """A network and the function that makes its parameters.

    Attributes:
        init: ``init(key, x, cond=None) -> params``, for a batch ``x: [B, ...]`` and its conditions.
        net: ``net(params, x, s, t, cond=None, key=None) -> [B, ...]``.
    """

    init: Callable[..., Params]
    net: Network


def from_linen(module) -> Model:
    """Return a Flax Linen module as a ``Model``.

    Args:
        module: called as ``module(x, s, t, cond, train=...)``; ``train`` is true exactly when the network gets a key.
            Only dropout draws from the key; the first example's key seeds the masks of the whole batch.

    Returns:
        A model whose ``net.logit`` is the module's ``logit``. If the module has ``attention="fused"``, a kernel
        without a jvp, ``net.for_jvp`` is the same network with XLA's attention.

    Raises:
        ValueError: the module takes other arguments, or keeps state beside its parameters (batch statistics).

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> model = from_linen(nets.Plain(width=4, depth=1, waves=0, times=0))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> model.net(params, jnp.ones((3, 2)), 0.0, 1.0).shape
    (3, 2)
    """
    _check_call("from_linen", module, "x, s, t, cond=None, *, train=False", train=False)

    def init(key, x, cond=None):
        t = over_batch(0.0, x)

        def draw(key):
            variables = module.init({"params": key}, x, t, t, cond)
            if others := sorted(variables.keys() - {"params"}):
                raise ValueError(_stateful("from_linen", module, ", ".join(others)))
            return variables["params"]

        if isinstance(key, jax.core.Tracer):
            return draw(key)
        # A large program that runs once: on a CPU, optimising it costs several times what it saves.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(draw, compiler_options=options)(key)

    def apply(params, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        rngs = None if key is None else {"dropout": as_keys(key, len(x))[0]}
        return module.apply({"params": params}, x, s, t, cond, train=key is not None, rngs=rngs)

    fused = getattr(module, "attention", None) == "fused"
    for_jvp = from_linen(module.clone(attention="xla")).net.apply if fused else None
    return Model(init, Network(apply, for_jvp, logit=getattr(module, "logit", False)))


def from_nnx(model) -> Model:
    """Return a Flax NNX model as a ``Model``.

    Args:
        model: an initialised NNX model, called as ``model(x, s, t, cond)``. Dropout is on exactly when the network
            gets a key; the first example's key seeds the masks of the whole batch.

    Returns:
        A model whose parameters are the ``nnx.Param`` variables. ``init`` returns the parameters that ``model`` has
        and ignores its arguments. Variables of other kinds are constants.

    Raises:
        ValueError: the model takes other arguments, or has batch statistics.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> class Linear(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.layer = nnx.Linear(2, 2, rngs=rngs)
    ...     def __call__(self, x, s, t, cond=None):
    ...         return self.layer(x)
    >>> model = from_nnx(Linear(nnx.Rngs(0)))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> model.net(params, jnp.ones((3, 2)), 0.0, 1.0).shape
    (3, 2)
    """
    from flax import nnx

    _check_call("from_nnx", model, "x, s, t, cond=None")
    graph, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    if jax.tree.leaves(statistics):
        raise ValueError(_stateful("from_nnx", model, "batch statistics"))

    def apply(params, x, s, t, cond=None, key=None):
        copy = nnx.merge(graph, params, rest, copy=True)  # its random state changes within one call only
        copy.set_attributes(deterministic=key is None, raise_if_not_found=False)
        if key is not None:
            streams = [node for _, node in nnx.iter_graph(copy) if isinstance(node, nnx.RngStream)]
            for i, stream in enumerate(streams):
                seed = jax.random.fold_in(as_keys(key, len(x))[0], i)
                stream.key.set_value(jax.random.split(seed, stream.key.shape) if stream.key.shape else seed)
        return copy(x, over_batch(s, x), over_batch(t, x), cond)

    return Model(lambda key, x, cond=None: params, Network(apply))


def from_equinox(module) -> Model:
    """Return an Equinox module as a ``Model``.

    Args:
        module: an initialised module for **one** example, called as ``module(x, s, t, cond, key=key)``. Dropout is on
            exactly when the network gets a key; each example has its own.

    Returns:
        A model whose parameters are the module's floating arrays. ``init`` returns the parameters that ``module`` has
        and ignores its arguments.

    Raises:
        ValueError: the module takes other arguments, or has state (batch statistics).

    >>> import equinox as eqx, jax, jax.numpy as jnp
    >>> class Linear(eqx.Module):
    ...     layer: eqx.nn.Linear
    ...     def __call__(self, x, s, t, cond=None, *, key=None):
    ...         return self.layer(x)
    >>> model = from_equinox(Linear(eqx.nn.Linear(2, 2, key=jax.random.key(0))))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> model.net(params, jnp.ones((3, 2)), 0.0, 1.0).shape
    (3, 2)
    """
    import equinox as eqx

    _check_call("from_equinox", module, "x, s, t, cond=None, *, key=None", key=None)
    is_state = lambda part: isinstance(part, eqx.nn.StateIndex)
    if any(map(is_state, jax.tree.leaves(module, is_leaf=is_state))):
        raise ValueError(_stateful("from_equinox", module, "state"))
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def apply(params, x, s, t, cond=None, key=None):
        whole = eqx.nn.inference_mode(eqx.combine(params, static), value=key is None)
        example = lambda x, s, t, cond, key: whole(x, s, t, cond, key=key)
        keys = None if key is None else as_keys(key, len(x))
        return jax.vmap(example)(x, over_batch(s, x), over_batch(t, x), cond, keys)

    return Model(lambda key, x, cond=None: params, Network(apply))


def one_time(f: Callable[..., Any]) -> Network:
    """Return a textbook velocity as a network that ignores the end of the jump.

    Args:
        f: the velocity, ``f(params, x, t) -> [B, ...]`` with ``t: [B]``.

    Returns:
        A network whose diagonal is ``f``. Its flow map is one Euler step; it ignores conditions and keys.

    >>> import jax.numpy as jnp
    >>> net = one_time(lambda params, x, t: params * x)
    >>> net(2.0, jnp.ones((1, 2)), 0.0, 1.0).tolist()
    [[2.0, 2.0]]
    """
    return Network(lambda params, x, s, t, cond=None, key=None: f(params, x, over_batch(s, x)))


def with_encoder(model: Model, encoder: Model) -> Model:
    """Return a model that carries a second one, for methods that train both (``methods.learned_coupling``).

    Args:
        model: the flow. Its parameters must be a dictionary.
        encoder: the second network; it gets no conditions.

    Returns:
        A model with the encoder's parameters in ``params["encoder"]`` and the encoder as ``net.encoder``. The flow
        ignores these parameters and also works without them, so that a flow's checkpoint can start the model or
        teach it.

    >>> import jax, jax.numpy as jnp
    >>> flow = Model(lambda key, x, cond=None: {"a": 2.0}, one_time(lambda params, x, t: params["a"] * x))
    >>> joint = with_encoder(flow, flow)
    >>> joint.init(jax.random.key(0), jnp.ones((1, 1)))
    {'a': 2.0, 'encoder': {'a': 2.0}}
    """

    def init(key, x, cond=None):
        first, second = jax.random.split(key)
        return {**model.init(first, x, cond), ENCODER: encoder.init(second, x)}

    def without_encoder(net):
        return lambda params, *args, **kwargs: net({k: p for k, p in params.items() if k != ENCODER}, *args, **kwargs)

    second = lambda params, *args, **kwargs: encoder.net(params[ENCODER], *args, **kwargs)
    return Model(init, network(model.net).wrap(without_encoder).replace(encoder=second))


def trigonometric_velocity(net: Network, *, sigma: float = 1.0) -> Network:
    """Return a network ``F`` as the average velocity of ``X_{s,t}(x) = cos(a) x - sin(a) sigma F(x / sigma, s, t)``.

    ``a = pi / 2 (t - s)``. This is sCM's parametrisation, for data and a source of standard deviation ``sigma`` on
    the trigonometric path. On the diagonal ``v = -(pi / 2) sigma F``, smoothly.

    Args:
        net: the network ``F``.
        sigma: standard deviation of the data and of the source, positive.

    Returns:
        A network on the trigonometric path.

    Raises:
        ValueError: ``sigma`` is not positive.

    Source: arXiv 2410.11081.

    >>> import jax.numpy as jnp
    >>> net = trigonometric_velocity(one_time(lambda params, x, t: 0 * x))
    >>> jump = jnp.ones((1, 1)) + net(None, jnp.ones((1, 1)), 0.0, 1.0)  # X_{0,1}(1) = cos(pi / 2)
    >>> bool(jnp.abs(jump[0, 0]) < 1e-6)
    True
    """
    check_range("sigma", sigma, Range(low=0, open_low=True))

    def average(net):
        def apply(params, x, s, t, cond=None, key=None):
            s, t = over_batch(s, x), over_batch(t, x)
            a = expand(jnp.pi / 2 * (t - s), x)
            turn = sigma * net(params, x / sigma, s, t, cond, key)
            return -jnp.pi / 2 * (a / 2 * jnp.sinc(a / (2 * jnp.pi)) ** 2 * x + jnp.sinc(a / jnp.pi) * turn)

        return apply

    return network(net).wrap(average)


def _check_call(adapter: str, module: Any, takes: str, **options: Any) -> None:
    """Refuse a module that cannot be called with ``x, s, t, cond`` and these keyword arguments."""
    signature = inspect.signature(module.__call__)
    try:
        signature.bind(*"xst", None, **options)
    except TypeError as error:
        names = ", ".join(signature.parameters)
        raise ValueError(
            f"module={type(module).__name__}({names:.80}): {adapter} calls it with other arguments ({error}). "
            f"Wrap it in a module whose __call__ takes ({takes})."
        ) from None


def _stateful(adapter: str, module: Any, what: str) -> str:
    return (
        f"module={type(module).__name__}: it has {what}, and {adapter} keeps parameters only. "
        "Use GroupNorm or LayerNorm in place of BatchNorm."
    )
