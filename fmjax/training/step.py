"""One training step for all methods: loss on the local rows, one mean over devices, optimiser, averaged parameters.

state = training.init(params, tx, mesh=mesh)
step = training.make_step(method.loss, tx, mesh=mesh, ema=0.999)
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

from fmjax import checks
from fmjax.keys import example_keys, is_key
from fmjax.methods.common import Teachers
from fmjax.nets.state import keep_state
from fmjax.training import sharding
from fmjax.training.sharding import AXIS
from fmjax.types import Aux, Batch, LossFn, Params

TARGETS = ("self", "ema", "frozen", "both")
NEEDS_TEACHER = ("frozen", "both")
GAPS = ("residual_gap_0", *(f"residual_gap_{a:g}_{a + 0.25:g}" for a in (0, 0.25, 0.5, 0.75)))


class State(NamedTuple):
    """Everything that training changes.

    Attributes:
        step: the number of steps taken, int32.
        params: the parameters.
        opt_state: the state of the optimiser.
        ema: the averaged parameters, in float32 or wider.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params

    def __repr__(self) -> str:
        step = self.step if isinstance(self.step, jax.core.Tracer) else jax.device_get(self.step)
        leaves = jax.tree.leaves(self.params)
        numbers = sum(getattr(leaf, "size", 1) for leaf in leaves)
        return f"State(step={step}, params={numbers:,} numbers in {len(leaves)} arrays)"


class Step:
    """A jitted training step, ``step(state, batch, key, teacher=None)``: see ``make_step``."""

    def __init__(self, update: Callable[..., tuple[State, dict[str, jax.Array]]], mesh: Mesh, target: str):
        self._update, self._mesh, self._target, self._jitted = update, mesh, target, None

    def __call__(self, state: State, batch: Batch, key: jax.Array, teacher: Params = None):
        self._check(key, teacher)
        if not isinstance(batch.x1, jax.Array) or batch.x1.sharding.device_set != set(self._mesh.devices.flat):
            batch = sharding.place_batch(batch, self._mesh)
        return self._program(state)(state, batch, key, teacher)

    def lower(
        self, state: State, batch: Batch, key: jax.Array, teacher: Params = None, *, platform: str | None = None
    ) -> jax.stages.Lowered:
        """Lower the step for shapes, as ``jax.jit(...).lower`` does; ``.compile()`` then tells memory and FLOPs.

        Args:
            state: a state, or ``init`` of shapes.
            batch: a global batch, or the shapes of one.
            key: one typed key.
            teacher: parameters, or their shapes, as in a step.
            platform: ``"tpu"``, ``"cuda"``, ``"rocm"`` or ``"cpu"``, which need not be there; by default the mesh's.

        Returns:
            The lowered program.

        >>> import optax
        >>> from fmjax.methods import flow_matching
        >>> net = lambda params, x, s, t, cond=None, key=None: params["w"] * x
        >>> state = init({"w": jax.ShapeDtypeStruct((), jnp.float32)}, optax.sgd(0.1))
        >>> batch = Batch(jax.ShapeDtypeStruct((8, 2), jnp.float32))
        >>> lowered = make_step(flow_matching(net).loss, optax.sgd(0.1)).lower(state, batch, jax.random.key(0))
        >>> "stablehlo" in lowered.as_text()
        True
        """
        self._check(key, teacher)
        rows = NamedSharding(self._mesh, P(AXIS))
        place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows)
        traced = self._program(state).trace(state, jax.tree.map(place, batch), key, teacher)
        return traced.lower(lowering_platforms=platform and (platform,))

    def _check(self, key, teacher) -> None:
        if not is_key(key) or key.ndim:
            raise TypeError("key must be one typed PRNG key, jax.random.key(seed): the step folds it per example")
        if (teacher is None) == (self._target in NEEDS_TEACHER):
            hint = "needs teacher=params" if teacher is None else "takes no teacher"
            raise ValueError(f"target={self._target!r} {hint}")

    def _program(self, state: State):
        if self._jitted is None:  # out_shardings equal to what came in: left open, the second call would compile again
            layout = jax.tree.map(lambda a: a.sharding, state)
            out = (layout, sharding.replicated(self._mesh))
            self._jitted = jax.jit(self._update, donate_argnums=0, out_shardings=out)
        return self._jitted


def init(params: Params, tx: optax.GradientTransformation, *, mesh: Mesh | None = None, fsdp: bool = False) -> State:
    """Return the state before the first step, placed on the mesh.

    Args:
        params: the parameters, which are copied; or their shapes (``jax.ShapeDtypeStruct``) for ``Step.lower``.
        tx: the optimiser; ``optax.masked``, ``optax.partition`` and the like are fine.
        mesh: the devices; by default all of them.
        fsdp: split large arrays of parameters, optimiser and average over the devices (ZeRO-3).

    Returns:
        Step 0, the optimiser's first state, and an average that equals the parameters, in float32 or wider. Of shapes,
        the shapes of all this and how each array lies on the mesh.

    >>> import optax
    >>> init({"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}, optax.adam(1e-3))
    State(step=0, params=9 numbers in 2 arrays)
    """
    mesh, tx = mesh or sharding.make_mesh(), keep_state(tx)
    average = lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32), copy=True)
    make = lambda params: State(jnp.zeros((), jnp.int32), params, tx.init(params), jax.tree.map(average, params))
    shapes = jax.eval_shape(make, params)
    layout = _layout(shapes, mesh, fsdp)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        return jax.tree.map(place, shapes, layout)
    return jax.jit(make, out_shardings=layout)(params)


def make_step(
    loss: LossFn,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    ema: float = 0.999,
    target: str = "self",
    fsdp: bool = False,
) -> Step:
    """Return the jitted training step, one ``jax.shard_map`` over the mesh.

    Each device takes the loss of its rows and the gradient; one mean over devices follows, then ``tx`` and
    ``ema <- d ema + (1 - d) params`` with ``d = min(ema, (1 + n) / (10 + n))`` at step ``n = 0 ..``. Example keys are
    folded from ``key``, ``state.step`` and the row of the global batch, so that the numbers do not depend on the mesh.

    Args:
        loss: the loss of a method.
        tx: the optimiser that ``init`` got.
        mesh: the devices; by default all of them.
        ema: decay of the average, in [0, 1); 0 keeps no average.
        target: whose parameters are the teacher's: ``"self"``, ``"ema"``, ``"frozen"`` (the argument ``teacher``), or
            ``"both"``, the ``methods.common.Teachers`` of the argument and the average.
        fsdp: split large arrays over the devices, as ``init`` did.

    Returns:
        ``step(state, batch, key, teacher=None) -> (state, metrics)``. ``state`` is donated: use the returned one.
        ``batch`` holds global arrays (``sharding.place_batch``) or host arrays, ``key`` is one typed key. ``metrics``
        are scalars: ``loss``, ``grad_norm``, and the mean of every term that the loss's ``aux`` names (``is_NAME``
        masks and float values), without the weights of a weighted loss. Where ``aux`` holds the times ``s`` and ``t``
        there is ``by_gap: [2, 5]``: sums of the residual and counts of examples on the diagonal and with ``|t - s|``
        in four quarters of (0, 1] (their names: ``GAPS``). The step raises ``ValueError`` for a teacher that is missing
        or not used and for a batch that the mesh does not divide, ``TypeError`` for another key.

    Raises:
        ValueError: an unknown target, or a decay outside [0, 1).

    >>> import optax
    >>> from fmjax.methods import flow_matching
    >>> net = lambda params, x, s, t, cond=None, key=None: params["w"] * x
    >>> step = make_step(flow_matching(net).loss, optax.sgd(0.1))
    >>> state = init({"w": jnp.zeros(())}, optax.sgd(0.1))
    >>> state, metrics = step(state, Batch(jnp.ones((8, 2))), jax.random.key(0))
    >>> state, sorted(metrics)
    (State(step=1, params=1 numbers in 1 arrays), ['grad_norm', 'loss'])
    """
    checks.check_choice("target", target, TARGETS)
    if not 0 <= ema < 1:
        raise ValueError(f"ema={ema}: the decay of the average lies in [0, 1). Give 0 to keep no average.")
    mesh, tx = mesh or sharding.make_mesh(), keep_state(tx)

    def update(state, batch, key, teacher):
        layout = sharding.specs(state.params, mesh, fsdp=fsdp)
        # the average is carried in float32: a teacher computes in the parameters' precision
        average = lambda: jax.tree.map(lambda a, p: a.astype(p.dtype), state.ema, state.params)
        whole = jax.tree.map(lambda _: P(), teacher)
        teacher = average() if target == "ema" else Teachers(teacher, average()) if target == "both" else teacher
        teacher_layout = layout if target == "ema" else Teachers(whole, layout) if target == "both" else whole

        def local(params, teacher, batch, key):
            params = sharding.gather(params, layout)
            teacher = params if target == "self" else sharding.gather(teacher, teacher_layout)
            rows = jax.tree.leaves(batch)[0].shape[0]
            keys = example_keys(key, jax.lax.axis_index(AXIS) * rows + jnp.arange(rows))
            (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, teacher, batch, keys)
            if mesh.size > 1:  # on a CPU XLA keeps an all-reduce of one device: a copy of all gradients
                grads = sharding.scatter_mean(grads, layout)
            return grads, _means(value, aux)

        # check_vma=False: with it a loss could not start a scan from constants or call diffrax. `gather` and
        # `scatter_mean` are right either way, and out_specs are tested by comparing meshes.
        shard = jax.shard_map(
            local, mesh=mesh, in_specs=(layout, teacher_layout, P(AXIS), P()), out_specs=(layout, P()), check_vma=False
        )
        grads, metrics = shard(state.params, teacher, batch, jax.random.fold_in(key, state.step))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = 1 - jnp.minimum(ema, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: a + rate.astype(a.dtype) * (p.astype(a.dtype) - a), state.ema, params)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, params, opt_state, average), metrics

    return Step(update, mesh, target)


def stand_in(target: str, params: Params) -> Params | Teachers:
    """Return parameters in the form of a target, to trace a loss before there is a teacher.

    Args:
        target: one of ``TARGETS``.
        params: parameters, or their shapes.

    Returns:
        ``params``, or a pair of them.
    """
    return Teachers(params, params) if target == "both" else params


def _means(value: jax.Array, aux: Aux) -> dict[str, jax.Array]:
    """Return the loss and the mean of each of its terms over the global batch: two small reductions."""
    residual = aux.get("residual", aux["per_example"])
    masks = {k.removeprefix("is_"): m for k, m in aux.items() if k.startswith("is_")}
    sums = {k: jnp.sum(jnp.where(m, residual, 0)) for k, m in masks.items()}
    counts = {k: jnp.sum(m) for k, m in masks.items()}
    if "s" in aux and "t" in aux:  # of the residual by |t - s|: a bin may be empty in a step, so sums are returned
        bins = jnp.arange(len(GAPS)) == jnp.ceil(4 * jnp.abs(aux["t"] - aux["s"]))[:, None]
        sums["by_gap"] = jnp.where(bins, residual[:, None], 0).sum(0)
        counts["by_gap"] = bins.sum(0)
    sums, counts = jax.lax.psum((sums, counts), AXIS)
    by_gap = {"by_gap": jnp.stack([sums.pop("by_gap"), counts.pop("by_gap")])} if "by_gap" in sums else {}
    every = {k: jnp.mean(a) for k, a in aux.items() if k not in ("per_example", "s", "t") and a.dtype != bool}
    means = jax.lax.pmean({"loss": value, **every}, AXIS)
    return means | {k: sums[k] / jnp.maximum(counts[k], 1) for k in sums} | by_gap


def _layout(state: State, mesh: Mesh, fsdp: bool) -> State:
    """Return a ``NamedSharding`` for every array of a state; optimiser moments lie as their parameters do.

    A moment is an array of the optimiser's state whose path ends with the path of a parameter of the same shape. So it
    is found in every optimiser, whatever wraps it (``optax.masked``, ``optax.partition``).
    """
    params = jax.tree.map(lambda s: NamedSharding(mesh, s), sharding.specs(state.params, mesh, fsdp=fsdp))
    whole = sharding.replicated(mesh)
    shapes = dict(jax.tree_util.tree_leaves_with_path(state.params))
    layouts = dict(jax.tree_util.tree_leaves_with_path(params))

    def moment(path, leaf):
        for start in range(len(path) + 1):  # the longest end first
            if path[start:] in shapes and shapes[path[start:]].shape == leaf.shape:
                return layouts[path[start:]]
        return whole

    return State(whole, params, jax.tree_util.tree_map_with_path(moment, state.opt_state), params)
