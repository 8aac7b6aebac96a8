"""Adapters from modules of neural-network libraries to a ``Network``, and wrappers that give a network another form."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmjax.checks import Range, check_range
from fmjax.keys import as_keys
from fmjax.nets import state
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


def from_linen(module, *, call: Callable | None = None) -> Model:
    """Return a Flax Linen module as a ``Model``.

    Args:
        module: called as ``module(x, s, t, cond, train=...)``; ``train`` is true exactly when the network gets a key.
            Only dropout draws from the key; the first example's key seeds the masks of the whole batch.
        call: ``call(module, x, s, t, cond, train)`` evaluates a module of another signature, for example
            ``lambda module, x, s, t, cond, train: module(x, t, deterministic=not train)``.

    Returns:
        A model whose ``net.logit`` is the module's ``logit``. If the module has ``attention="fused"``, a kernel
        without a jvp, ``net.for_jvp`` is the same network with XLA's attention. Batch statistics and other state lie
        beside the parameters and are updated in training (``state``); inside a jvp they are used and not updated.

    Raises:
        ValueError: the module takes other arguments.

    >>> import jax, jax.numpy as jnp
    >>> import flax.linen as nn
    >>> model = from_linen(nn.Dense(2), call=lambda module, x, s, t, cond, train: module(x))
    >>> params = model.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> model.net(params, jnp.ones((3, 2)), 0.0, 1.0).shape
    (3, 2)
    """
    if call is None:
        _check_call("from_linen", module, "x, s, t, cond=None, *, train=False", train=False)
        call = lambda module, x, s, t, cond, train: module(x, s, t, cond, train=train)

    tokens = bool(getattr(module, "tokens", 0))  # a network of discrete data

    def init(key, x, cond=None):
        t = over_batch(0.0, x, tokens=tokens)

        def draw(key):
            variables = dict(module.init({"params": key}, x, t, t, cond, False, method=call))
            return state.beside(variables.pop("params", {}), variables)

        if isinstance(key, jax.core.Tracer):
            return draw(key)
        # A large program that runs once: on a CPU, optimising it costs several times what it saves.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(draw, compiler_options=options)(key)

    def evaluate(params, x, s, t, cond=None, key=None, *, keep=True):
        s, t = over_batch(s, x, tokens=tokens), over_batch(t, x, tokens=tokens)
        rngs = None if key is None else {"dropout": as_keys(key, len(x))[0]}
        if not state.has_state(params):
            return module.apply({"params": params}, x, s, t, cond, key is not None, rngs=rngs, method=call)
        stored = params[state.STATE]
        variables = {"params": params[state.PARAMS], **jax.lax.stop_gradient(stored)}
        if key is None:
            return module.apply(variables, x, s, t, cond, False, method=call)
        y, new = module.apply(variables, x, s, t, cond, True, rngs=rngs, method=call, mutable=list(stored))
        return state.record(y, stored, dict(new)) if keep else y

    fused = getattr(module, "attention", None) == "fused"
    inside = from_linen(module.clone(attention="xla")).net.apply if fused else functools.partial(evaluate, keep=False)
    return Model(init, Network(evaluate, inside, logit=getattr(module, "logit", False)))


def from_nnx(model, *, call: Callable | None = None) -> Model:
    """Return a Flax NNX model as a ``Model``.

    Args:
        model: an initialised NNX model, called as ``model(x, s, t, cond)``. Dropout is on, and batch statistics are
            taken from the batch, exactly when the network gets a key; the first example's key seeds the masks of the
            whole batch.
        call: ``call(model, x, s, t, cond)`` evaluates a model of another signature.

    Returns:
        A model whose parameters are the ``nnx.Param`` variables, by name. ``init`` returns the parameters that
        ``model`` has and ignores its arguments. Batch statistics lie beside the parameters and are updated in training
        (``state``). Variables of other kinds are constants.

    Raises:
        ValueError: the model takes other arguments.

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

    if call is None:
        _check_call("from_nnx", model, "x, s, t, cond=None")
        call = lambda model, x, s, t, cond: model(x, s, t, cond)
    graph, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def evaluate(params_now, x, s, t, cond=None, key=None, *, keep=True):
        weights, stored = (params_now[n] for n in (state.PARAMS, state.STATE)) if stateful else (params_now, {})
        now = state.as_before(_by_structure(stored, statistics), statistics)
        # its random state and its statistics change within one call only
        copy = nnx.merge(graph, _by_structure(weights, params), now, rest, copy=True)
        training = key is not None
        copy.set_attributes(deterministic=not training, use_running_average=not training, raise_if_not_found=False)
        if training:
            streams = [node for _, node in nnx.iter_graph(copy) if isinstance(node, nnx.RngStream)]
            for i, stream in enumerate(streams):
                seed = jax.random.fold_in(as_keys(key, len(x))[0], i)
                stream.key.set_value(jax.random.split(seed, stream.key.shape) if stream.key.shape else seed)
        y = call(copy, x, over_batch(s, x), over_batch(t, x), cond)
        if not (stateful and training and keep):
            return y
        return state.record(y, stored, _by_name(nnx.state(copy, nnx.BatchStat)))

    start = state.beside(_by_name(params), _by_name(statistics))
    stateful = state.has_state(start)
    return Model(
        lambda key, x, cond=None: start,
        Network(evaluate, functools.partial(evaluate, keep=False) if stateful else None),
    )


def from_equinox(module, *, call: Callable | None = None, batch_state: Any = None, axis: str = "batch") -> Model:
    """Return an Equinox module as a ``Model``.

    Args:
        module: an initialised module for **one** example, called as ``module(x, s, t, cond, key=key)``. Dropout is on
            exactly when the network gets a key; each example has its own.
        call: ``call(module, x, s, t, cond, key)`` evaluates a module of another signature; with ``batch_state``
            ``call(module, x, s, t, cond, key, state)`` returns ``(y, state)``.
        batch_state: the state of the module (batch statistics), as ``equinox.nn.make_with_state`` returns it. The
            module is then called as ``module(x, s, t, cond, key=key, state=state)`` and returns ``(y, state)``.
        axis: the name of the axis of examples, over which batch statistics are taken.

    Returns:
        A model whose parameters are the module's floating arrays, by name. ``init`` returns the parameters that
        ``module`` has and ignores its arguments. State lies beside them and is updated in training (``state``).

    Raises:
        ValueError: the module takes other arguments, has state, and ``batch_state`` is missing, or has flags in its
            state (batch norm of ``mode="ema"``).

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

    stateful = batch_state is not None
    options = {"key": None} | ({"state": None} if stateful else {})
    if call is None:
        _check_call(
            "from_equinox", module, f"x, s, t, cond=None, *, {', '.join(f'{o}=None' for o in options)}", **options
        )
        call = lambda module, x, s, t, cond, *rest: module(x, s, t, cond, **dict(zip(options, rest, strict=True)))
    is_state = lambda part: isinstance(part, eqx.nn.StateIndex)
    if not stateful and any(map(is_state, jax.tree.leaves(module, is_leaf=is_state))):
        raise ValueError(
            f"module={type(module).__name__}: it has state (batch statistics). Make it by equinox.nn.make_with_state "
            "and give from_equinox the state as batch_state."
        )
    if any(jnp.issubdtype(jnp.result_type(leaf), jnp.bool_) for leaf in jax.tree.leaves(batch_state)):
        raise ValueError(
            f"module={type(module).__name__}: its state has a flag, which cannot follow the gradient. "
            "Use equinox.nn.BatchNorm(mode='batch'), or LayerNorm."
        )
    params, static = eqx.partition(module, eqx.is_inexact_array)

    def evaluate(params_now, x, s, t, cond=None, key=None, *, keep=True):
        weights, stored = (params_now[n] for n in (state.PARAMS, state.STATE)) if stateful else (params_now, {})
        whole = eqx.nn.inference_mode(eqx.combine(_by_structure(weights, params), static), value=key is None)
        keys = None if key is None else as_keys(key, len(x))
        rows = (x, over_batch(s, x), over_batch(t, x), cond, keys)
        if not stateful:
            return jax.vmap(lambda *row: call(whole, *row))(*rows)
        now = state.as_before(_by_structure(stored, batch_state), batch_state)
        example = lambda row, now: call(whole, *row, now)
        y, new = jax.vmap(example, axis_name=axis, in_axes=(0, None), out_axes=(0, None))(rows, now)
        return y if key is None or not keep else state.record(y, stored, _by_name(new))

    start = state.beside(_by_name(params), _by_name(batch_state) if stateful else {})
    return Model(
        lambda key, x, cond=None: start,
        Network(evaluate, functools.partial(evaluate, keep=False) if stateful else None),
    )


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


def with_encoder(model: Model, encoder: Model, *, name: str = ENCODER) -> Model:
    """Return a model that carries a second one, for methods that train both.

    Args:
        model: the flow. Its parameters must be a dictionary.
        encoder: the second network, such as the encoder of ``methods.learned_coupling`` or the critic of
            ``methods.self_corrected``; it is initialised without conditions.
        name: the entry of its parameters.

    Returns:
        A model with the second parameters in ``params[name]`` and the second network as ``net.encoder``. The flow
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
        return {**model.init(first, x, cond), name: encoder.init(second, x)}

    def without_encoder(net):
        return lambda params, *args, **kwargs: net({k: p for k, p in params.items() if k != name}, *args, **kwargs)

    second = lambda params, *args, **kwargs: encoder.net(params[name], *args, **kwargs)
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
            f"Give {adapter}(module, call=...), which says how, or a __call__ that takes ({takes})."
        ) from None


def _by_name(tree: Any) -> dict[str, Any]:
    """Return a pytree as dictionaries by name, which a checkpoint gives back without knowing the library."""
    out: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = _names(path)
        place = out
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = leaf
    return out


def _by_structure(named: dict[str, Any], like: Any) -> Any:
    """Return dictionaries by name as a pytree of the structure of ``like``: the inverse of ``_by_name``."""
    leaves = []
    for path, _ in jax.tree_util.tree_leaves_with_path(like):
        leaf = named
        for name in _names(path):
            leaf = leaf[name]
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _names(path: tuple) -> list[str]:
    """Return the names along a path of a pytree; a variable of NNX has no name beside its module's."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return names[:-1] if len(names) > 1 and names[-1] == "value" and hasattr(path[-1], "name") else names
