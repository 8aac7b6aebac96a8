"""Facts of a training plan before it starts: the size of its checkpoints, and whether its length counts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fmjax.keys import example_keys
from fmjax.training import loop
from fmjax.training.step import stand_in


def checkpoint_bytes(plan: loop.Plan) -> int:
    """Return the bytes that the checkpoints of a run take on disk: ``keep + 1`` states.

    Args:
        plan: the run.

    Returns:
        The number of bytes.
    """
    params = jax.eval_shape(lambda: loop.initial_parameters(plan))
    state = (params, params, jax.eval_shape(plan.optimiser.tx.init, params))
    return (plan.schedule.keep + 1) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def uses_progress(plan: loop.Plan) -> bool:
    """Return whether the loss depends on the fraction of the training that is done, so that its length counts.

    Args:
        plan: the run.

    Returns:
        Whether a step of a longer training is another step.
    """
    batch = jax.tree.map(jnp.asarray, loop.numbered_batch(plan, 0))
    params = jax.eval_shape(lambda: loop.initial_parameters(plan))
    keys = example_keys(jax.random.key(0), jnp.arange(len(batch.x1)))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    loss = lambda progress: plan.method.loss(
        zeros, stand_in(plan.target, zeros), batch._replace(progress=progress), keys
    )
    traced = jax.make_jaxpr(loss)(batch.progress).jaxpr
    (progress,) = traced.invars
    return any(progress is variable for equation in traced.eqns for variable in equation.invars)
