"""Batch statistics and other state of networks: it lies beside the parameters and is written by the optimiser's step.

A network is a pure function that returns one array, so it cannot hand new state to the training step. The new state
travels with the gradient in its place: an evaluation in training mode is an identity whose derivative by the old state
is ``old - new``, whatever the loss is, and ``keep_state`` subtracts it. Gradients are averaged over devices, and so is
the state. Several evaluations in one loss add up their changes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fmjax.types import Params

PARAMS, STATE = "params", "state"
TRAINED = "trained"


def beside(params: Params, state: Any) -> Params:
    """Return parameters with the state of their network.

    Args:
        params: the parameters.
        state: a pytree of arrays, perhaps without any.

    Returns:
        ``{"params": ..., "state": ...}`` with the state in float32, or ``params`` itself where there is no state.

    >>> beside({"w": 1.0}, {}), sorted(beside({"w": 1.0}, {"mean": jnp.zeros(2)}))
    ({'w': 1.0}, ['params', 'state'])
    """
    if not jax.tree.leaves(state):
        return params
    floats = lambda a: a if jnp.issubdtype(jnp.result_type(a), jnp.inexact) else jnp.asarray(a, jnp.float32)
    return {PARAMS: params, STATE: jax.tree.map(floats, state)}


def as_before(state: Any, like: Any) -> Any:
    """Return state in the dtypes that its network takes; counters are rounded, and no gradient passes.

    Args:
        state: the state in floating dtypes, as ``beside`` keeps it.
        like: a pytree of the same structure with the dtypes of the network.

    Returns:
        A pytree of the structure of ``like``.

    >>> as_before(jnp.array(1.8), jnp.array(0)).item()
    2
    """

    def cast(a, b):
        whole = not jnp.issubdtype(jnp.result_type(b), jnp.inexact)
        return jax.lax.stop_gradient(jnp.round(a) if whole else a).astype(jnp.result_type(b))

    return jax.tree.map(cast, state, like)


def record(y: jax.Array, old: Any, new: Any) -> jax.Array:
    """Return ``y`` and note the new state: the gradient of every loss of it by ``old`` is ``old - new``.

    Args:
        y: the output of a network.
        old: the state before the evaluation, floating, as ``beside`` keeps it.
        new: the state after it.

    Returns:
        ``y``.

    >>> jax.grad(lambda old: 7 * record(jnp.array(2.0), old, {"mean": jnp.array(3.0)}))({"mean": jnp.array(5.0)})
    {'mean': Array(2., dtype=float32)}
    """
    change = jax.tree.map(lambda a, b: jax.lax.stop_gradient(a - jnp.asarray(b, a.dtype)), old, new)
    return _recorded(y, old, change)


@jax.custom_vjp
def _recorded(y, old, change):
    return y


def _forward(y, old, change):
    return y, change


def _backward(change, cotangent):
    return cotangent, change, jax.tree.map(jnp.zeros_like, change)


_recorded.defvjp(_forward, _backward)


def keep_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return an optimiser that writes the state of networks and gives ``tx`` everything else.

    ``training.make_step`` does so itself.

    Args:
        tx: the optimiser of the parameters.

    Returns:
        An optimiser; for parameters without state it is ``tx``, with the same state.

    >>> tx = keep_state(optax.sgd(0.1))
    >>> params = {"params": jnp.array(1.0), "state": jnp.array(5.0)}
    >>> grads = {"params": jnp.array(1.0), "state": jnp.array(2.0)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> jax.tree.map(float, optax.apply_updates(params, updates))
    {'params': 0.8999999761581421, 'state': 3.0}
    """
    parts = optax.partition({TRAINED: tx, STATE: optax.scale(-1.0)}, _labels)
    chosen = lambda tree: parts if has_state(tree) else tx
    update = lambda grads, opt, params=None: chosen(grads).update(grads, opt, params)
    return optax.GradientTransformation(lambda params: chosen(params).init(params), update)


def has_state(params: Params) -> bool:
    """Return whether a network with these parameters has state.

    Args:
        params: a pytree of parameters.

    Returns:
        Whether one of its entries is named ``"state"`` beside an entry ``"params"``.

    >>> has_state({"base": {"params": 1.0, "state": 2.0}}), has_state({"state": 1.0})
    (True, False)
    """
    return STATE in jax.tree.leaves(_labels(params))


def _labels(tree: Any) -> Any:
    """Return ``"state"`` or ``"trained"`` for every leaf."""
    pair = lambda part: isinstance(part, dict) and {PARAMS, STATE} <= part.keys()
    name = lambda key: STATE if key == STATE else TRAINED
    split = lambda part: {key: jax.tree.map(lambda _, key=key: name(key), value) for key, value in part.items()}
    return jax.tree.map(lambda part: split(part) if pair(part) else TRAINED, tree, is_leaf=pair)
