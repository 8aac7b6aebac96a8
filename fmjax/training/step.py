"""One training step for all methods: loss on the local shard, one mean over devices, optimiser, EMA.

state = train.init(params, tx, mesh=mesh)
step = train.make_step(method.loss, tx, mesh=mesh, ema=0.999)
state, metrics = step(state, batch, key)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.keys import example_keys, is_key
from fmjax.training import sharding
from fmjax.training.sharding import AXIS
from fmjax.types import Aux, Batch, LossFn, Params

TARGETS = ("self", "ema", "frozen")
GAPS = ("residual_gap_0", *(f"residual_gap_{a:g}_{a + 0.25:g}" for a in (0, 0.25, 0.5, 0.75)))


class State(NamedTuple):
    """All that training changes: the number of steps taken, parameters, optimiser state, and averaged parameters."""

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params


def init(params: Params, tx: optax.GradientTransformation, *, mesh: Mesh | None = None, fsdp: bool = False) -> State:
    """The state before the first step, placed on the mesh (default all devices): step 0, ``ema = params``.

    With ``fsdp`` large arrays of parameters, optimiser and EMA are split over the devices. ``params`` are copied.
    """
    mesh = mesh or sharding.make_mesh()
    make = lambda params: State(jnp.zeros((), jnp.int32), params, tx.init(params), jax.tree.map(jnp.copy, params))
    layout = _layout(jax.eval_shape(make, params), tx, mesh, fsdp)
    return jax.jit(make, out_shardings=layout)(params)


def make_step(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    ema: float = 0.999,
    target: str = "self",
    fsdp: bool = False,
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """``step(state, batch, key, teacher=None) -> (state, metrics)``, jitted, one ``jax.shard_map`` over the mesh.

    Each device takes the loss of its rows and its gradient; one mean over devices follows, then ``tx`` and
    ``ema <- d ema + (1 - d) params`` with ``d = min(ema, (1 + n) / (10 + n))`` at step ``n = 0 ..``. Example keys are
    folded from ``key``, ``state.step`` and the row of the global batch, so that the numbers do not depend on the mesh.
    ``target`` says whose parameters the loss gets as its teacher: ``"self"``, ``"ema"`` or ``"frozen"`` (the argument
    ``teacher``). ``state`` is donated: use the returned one.

    ``batch`` is of global arrays (``sharding.place_batch``) or of host arrays. ``metrics``: scalars ``loss``,
    ``grad_norm`` and the mean of every term that the loss's ``aux`` names (``is_NAME`` masks and float values), without
    the weights of a weighted loss; and where it tells ``s`` and ``t`` ``by_gap: [2, 5]``, the sums of the residual and
    the counts of examples on the diagonal and with ``|t - s|`` in four quarters of (0, 1] (names: ``GAPS``).
    Raises ``ValueError`` for an unknown target, a teacher that is missing or not asked for, a batch that the mesh does
    not divide; ``TypeError`` for anything but one typed key.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not one of {', '.join(TARGETS)}")
    if not 0 <= ema < 1:
        raise ValueError(f"ema={ema} is the decay of the average and must lie in [0, 1); 0 keeps no average")
    mesh = mesh or sharding.make_mesh()

    def update(state, batch, key, teacher):
        layout = sharding.specs(state.params, mesh, fsdp=fsdp)
        given = {"self": None, "ema": state.ema, "frozen": teacher}[target]
        given_layout = layout if target == "ema" else jax.tree.map(lambda _: P(), given)

        def local(params, given, batch, key):
            params = sharding.gather(params, layout)
            teacher = params if target == "self" else sharding.gather(given, given_layout)
            rows = jax.tree.leaves(batch)[0].shape[0]
            keys = example_keys(key, jax.lax.axis_index(AXIS) * rows + jnp.arange(rows))
            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, teacher, batch, keys)
            if mesh.size > 1:  # on a CPU XLA keeps an all-reduce of one device: a copy of all gradients
                grads = sharding.scatter_mean(grads, layout)
            return grads, _means(value, aux)

        # check_vma=False: with it a loss could not start a scan from constants or call diffrax. `gather` and
        # `scatter_mean` are right either way, and out_specs are tested by comparing meshes.
        shard = jax.shard_map(
            local, mesh=mesh, in_specs=(layout, given_layout, P(AXIS), P()), out_specs=(layout, P()), check_vma=False
        )
        grads, metrics = shard(state.params, given, batch, jax.random.fold_in(key, state.step))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: a + (1 - decay).astype(p.dtype) * (p - a), state.ema, params)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, params, opt_state, average), metrics

    jitted = None

    def step(state: State, batch: Batch, key: jax.Array, teacher: Params = None):
        nonlocal jitted
        if not is_key(key) or key.ndim:
            raise TypeError("key must be one typed PRNG key, jax.random.key(seed): the step folds it per example")
        if (teacher is None) == (target == "frozen"):
            hint = "needs teacher=params" if teacher is None else "takes no teacher"
            raise ValueError(f"target={target!r} {hint}")
        if not isinstance(batch.x1, jax.Array) or batch.x1.sharding.device_set != set(mesh.devices.flat):
            batch = sharding.place_batch(batch, mesh)
        if jitted is None:  # out_shardings equal to what came in: left open, the second call would compile again
            layout = jax.tree.map(lambda a: a.sharding, state)
            jitted = jax.jit(update, donate_argnums=0, out_shardings=(layout, sharding.replicated(mesh)))
        return jitted(state, batch, key, teacher)

    return step


def _means(value: jax.Array, aux: Aux) -> dict[str, jax.Array]:
    """The loss and the mean of each of its terms over the global batch: two small reductions."""
    residual = aux.get("residual", aux["per_example"])
    named = {k.removeprefix("is_"): m for k, m in aux.items() if k.startswith("is_")}
    sums = {k: jnp.sum(jnp.where(m, residual, 0)) for k, m in named.items()}
    counts = {k: jnp.sum(m) for k, m in named.items()}
    if "s" in aux and "t" in aux:  # of the residual by |t - s|: a bin may be empty in a step, so sums are told
        bins = jnp.arange(len(GAPS)) == jnp.ceil(4 * jnp.abs(aux["t"] - aux["s"]))[:, None]
        sums["by_gap"] = jnp.where(bins, residual[:, None], 0).sum(0)
        counts["by_gap"] = bins.sum(0)
    sums, counts = jax.lax.psum((sums, counts), AXIS)
    by_gap = {"by_gap": jnp.stack([sums.pop("by_gap"), counts.pop("by_gap")])} if "by_gap" in sums else {}
    every = {k: jnp.mean(a) for k, a in aux.items() if k not in ("per_example", "s", "t") and a.dtype != bool}
    means = jax.lax.pmean({"loss": value, **every}, AXIS)
    return means | {k: sums[k] / jnp.maximum(counts[k], 1) for k in sums} | by_gap


def _layout(state: State, tx: optax.GradientTransformation, mesh: Mesh, fsdp: bool) -> State:
    """A ``NamedSharding`` for every array of a state; optimiser moments lie as their parameters do."""
    params = jax.tree.map(lambda s: NamedSharding(mesh, s), sharding.specs(state.params, mesh, fsdp=fsdp))
    whole = sharding.replicated(mesh)
    moments = optax.tree_map_params(tx, lambda _, s: s, state.opt_state, params, transform_non_params=lambda _: whole)
    return State(whole, params, moments, params)
