"""The vocabulary of the library: networks, velocities, flow maps, losses, and their common conventions.

Conventions, stated once:

* Time runs from ``t = 0`` (source, ``x0``, noise) to ``t = 1`` (data, ``x1``); a jump goes from ``s`` to ``t``.
* ``x: [B, ...]``, times ``[B]`` float32; images are ``[B, H, W, C]`` in [-1, 1].
* ``Net(params, x, s, t)`` is the average velocity from ``s`` to ``t``; its diagonal ``s = t`` is the velocity, and
  ``X_{s,t}(x) = x + (t - s) Net(x, s, t)`` is the flow map.
* Positional arguments are arrays (traced); keyword-only arguments are static.
* Randomness belongs to the example: inside the library ``key`` is an array ``[B]`` of typed keys, folded from the run's
  key, the step and the example's global index, whatever the batch size and mesh. Public functions accept one key, too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from fmjax import checks

Params = Any
Cond = Any
Aux = dict[str, Array]


@runtime_checkable
class Net(Protocol):
    """An unbound network: the average velocity from ``s`` to ``t``. Dropout is on exactly when a key is given."""

    def __call__(self, params: Params, x: Array, s: Array, t: Array, cond: Cond = None, key=None) -> Array: ...


@runtime_checkable
class LogitNet(Protocol):
    """An unbound classifier: one logit per example, ``[B]``; always evaluated on the diagonal ``s = t``."""

    def __call__(self, params: Params, x: Array, s: Array, t: Array, cond: Cond = None, key=None) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Network:
    """A ``Net`` that also states what methods need to know of it. Calling it calls ``apply``.

    It is a dataclass and not a NamedTuple: ``jax.jit`` cannot take a callable tuple.

    Attributes:
        apply: the network, ``(params, x, s, t, cond, key) -> [B, ...]``.
        for_jvp: the same function of the same parameters, where ``apply`` has no forward-mode derivative (a fused
            kernel). Losses with a ``jax.jvp`` evaluate it inside the jvp. ``None``: ``apply`` has a derivative.
        logit: whether the network returns one number per example, ``[B]`` (a ``LogitNet``).
        encoder: a second network over the same parameters, for ``methods.learned_coupling``; usually ``None``.

    >>> import jax, jax.numpy as jnp
    >>> net = Network(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> jax.jit(net)(2.0, jnp.ones(2), 0.0, 0.0).tolist(), net.logit
    ([2.0, 2.0], False)
    """

    apply: Net | LogitNet
    for_jvp: Net | LogitNet | None = None
    logit: bool = False
    encoder: Net | None = None

    def __call__(self, params: Params, x: Array, s: ArrayLike, t: ArrayLike, cond: Cond = None, key=None) -> Array:
        """Evaluate the network; see ``Net``."""
        return self.apply(params, x, s, t, cond, key)

    def replace(self, **changes: Any) -> Network:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def wrap(self, wrapper: Callable[[Net], Net]) -> Network:
        """Return a copy with ``wrapper`` around ``apply`` and ``for_jvp``; the other fields stay."""
        return self.replace(apply=wrapper(self.apply), for_jvp=self.for_jvp and wrapper(self.for_jvp))


def network(net: Net | LogitNet) -> Network:
    """Return a net as a ``Network``, with the fields that a ``Network`` inside ``net`` states.

    Args:
        net: a ``Network``, a plain function, or either of these inside ``jax.jit`` or ``functools.partial``.

    Returns:
        ``net`` itself if it is a ``Network``, otherwise a ``Network`` whose ``apply`` is ``net``.

    >>> import jax
    >>> classifier = Network(lambda params, x, s, t, cond=None, key=None: x[:, 0], logit=True)
    >>> network(jax.jit(classifier)).logit, network(lambda params, x, s, t: x).logit
    (True, False)
    """
    if isinstance(net, Network):
        return net
    if isinstance(net, functools.partial):
        return network(net.func).wrap(lambda inner: functools.partial(inner, *net.args, **net.keywords))
    if (inner := getattr(net, "__wrapped__", None)) is None:
        return Network(net)
    inner = network(inner)
    # jax.jit does not change the function; another wrapper may, so that its for_jvp is unknown
    return inner.replace(apply=net, for_jvp=inner.for_jvp if isinstance(net, jax.stages.Wrapped) else None)


@runtime_checkable
class VelocityFn(Protocol):
    """A bound velocity ``v(x, t)``: the only interface that solvers, likelihood and guidance use."""

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array: ...


@runtime_checkable
class FlowMapFn(Protocol):
    """A bound flow map ``X_{s,t}(x)``, learned or made from a velocity by one solver step."""

    def __call__(self, x: Array, s: Array, t: Array, cond: Cond = None, key=None) -> Array: ...


def accept(ts) -> None:
    """Accept all times: the default ``check`` of ``Costed`` and ``Multistep``.

    Args:
        ts: times of any kind.

    >>> accept([0.0, 1.0])
    """


@dataclasses.dataclass(frozen=True)  # jax.jit needs weak references, which tuples do not have
class Costed:
    """A step, corrector, direction or schedule that states its cost and refuses times at which it cannot work.

    Calling the object calls ``apply``. ``stated`` reads ``nfe`` and ``check`` through ``jax.jit`` and ``partial`` too.

    Attributes:
        apply: the step, corrector, direction or schedule.
        nfe: number of network evaluations of one call, per example; ``None``: unknown.
        check: ``check(ts)`` raises ``ValueError`` for times, or for a grid, at which ``apply`` cannot work;
            ``sampling.sample`` calls ``check`` before anything is compiled.
        tokens: whether the states are integers (``fmjax.tokens``).
    """

    apply: Callable[..., Any]
    nfe: int | None = None
    check: Callable[[Any], None] = accept
    tokens: bool = False

    def __call__(self, *args, **kwargs):
        return self.apply(*args, **kwargs)


class Multistep(NamedTuple):
    """A step that uses earlier steps: a ``FlowMapFn`` with a memory, which ``sampling.sample`` carries along the grid.

    Attributes:
        init: ``init(x)`` is the memory before the first step of a grid.
        step: ``step(memory, x, s, t, cond, key)`` returns ``(x, memory)``. Shapes never change, so that the scan
            compiles one step.
        nfe, check: as in ``Costed``.
    """

    init: Callable[[Array], Any]
    step: Callable[..., tuple[Array, Any]]
    nfe: int | None = None
    check: Callable[[Any], None] = accept


def stated(function: Any) -> Costed | Multistep:
    """Return the stated cost and check of a step, corrector or direction.

    Args:
        function: any callable, or a ``Multistep``.

    Returns:
        The ``Costed`` or ``Multistep`` inside ``function``; for a plain function ``Costed(function)`` of unknown cost.

    >>> import functools, jax
    >>> step = Costed(lambda x, s, t, cond=None, key=None: x, nfe=4)
    >>> stated(jax.jit(step)).nfe, stated(functools.partial(step, cond=None)).nfe, stated(abs).nfe
    (4, 4, None)
    >>> jax.jit(step)(1.0, 0.0, 0.5).item()
    1.0
    """
    inner = function
    while not isinstance(inner, (Costed, Multistep)):
        inner = getattr(inner, "__wrapped__", None) or getattr(inner, "func", None)
        if inner is None:
            return Costed(function)
    return inner


@runtime_checkable
class DirectionFn(Protocol):
    """Where a corrector pushes ``x`` at time ``t``, in displacement units."""

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array: ...


@runtime_checkable
class Corrector(Protocol):
    """One correction of ``x`` at time ``t``; the second value holds diagnostics and no state."""

    def __call__(self, key, x: Array, t: Array, cond: Cond = None) -> tuple[Array, Aux]: ...


class Batch(NamedTuple):
    """A batch of training examples; every field is ``[B, ...]`` or ``None``.

    Attributes:
        x1: data.
        x0: examples of the source; ``None``: the loss draws ``N(0, I)``.
        cond, t: condition, a pytree of arrays ``[B, ...]``, and times ``[B]`` where the data carry a time.
        negative: ``x1`` of another training example, independent of this example (contrastive losses).
        progress: fraction of the training that is done, in [0, 1), for losses that change; ``None`` stands for its end.
    """

    x1: Array
    x0: Array | None = None
    cond: Cond = None
    t: Array | None = None
    negative: Array | None = None
    progress: Array | None = None


@runtime_checkable
class LossFn(Protocol):
    """A loss with the parameters of its teacher (self, EMA or frozen) as the argument ``target``; ``key: [B]``.

    The loss returns ``(scalar, aux)``. ``aux`` holds arrays ``[B]`` only:

    * ``aux["per_example"]``: the loss of every example, so that a caller can mask, reweight, or bin by time;
    * ``aux["s"]``, ``aux["t"]``: the times drawn;
    * ``aux["is_NAME"]``, boolean: the examples to which the term ``NAME`` of the loss applies;
    * ``aux["NAME"]``, floating: a term of every example;
    * ``aux["residual"]``: for a weighted loss the mean squared error before the weight.
    """

    def __call__(self, params: Params, target: Params, batch: Batch, key) -> tuple[Array, Aux]: ...


BATCHES = ("data", "marginals", "ends", "trajectories", "tokens")


class Method(NamedTuple):
    """A training objective and the functions that its trained parameters define: the views of the method.

    Each view takes parameters and returns a function of arrays, for example ``method.velocity(params)(x, t, cond)``. A
    view that a method does not have is ``None``; the subclasses below state which views are always there.

    Attributes:
        loss: ``loss(params, target, batch, key) -> (scalar, aux)``; ``key`` is one key, or one key per example ``[B]``.
        velocity: ``velocity(params)(x, t, cond) -> [B, ...]``, the drift of the probability flow.
        flow_map: ``flow_map(params)(x, s, t, cond, key) -> [B, ...]``, the jump ``X_{s,t}(x)``.
        direction: ``direction(params)(x, t, cond) -> [B, ...]``, where a corrector pushes ``x``.
        score: ``score(params)(x, t, cond) -> [B, ...]``, ``grad log p_t(x)``, which an SDE step needs.
        log_probs: ``log_probs(params)(x, t, cond) -> [B, ..., K]``, of the tokens of each site of integer states ``x``.
        batches: which batches the loss takes, one of ``BATCHES``. ``"data"``: data in ``x1``. ``"marginals"``: at all
            times ``t`` of a grid, a backward example in ``x1`` and a forward example in ``x0``. ``"ends"``: data in
            ``x1`` and generated examples in ``x0``. ``"trajectories"``: a teacher's states. ``"tokens"``: integers.
        frozen: names of the entries of the parameters, a dictionary, that are given and not trained.
        normal_source: whether the method is valid for the source N(0, I) alone (see ``sources``).

    >>> Method(loss=lambda params, target, batch, key: (0.0, {}), velocity=lambda params: lambda x, t, cond=None: x)
    Method(loss, velocity)
    """

    loss: LossFn
    velocity: Callable[[Params], VelocityFn] | None = None
    flow_map: Callable[[Params], FlowMapFn] | None = None
    direction: Callable[[Params], DirectionFn] | None = None
    score: Callable[[Params], VelocityFn] | None = None
    batches: str = "data"
    frozen: tuple[str, ...] = ()
    normal_source: bool = False
    log_probs: Callable[[Params], Callable[..., Array]] | None = None

    def __repr__(self) -> str:
        names = (name for name, function in zip(self._fields, self, strict=True) if callable(function))
        return f"{type(self).__name__}({', '.join(names)})"


class FlowMethod(Method):
    """A method whose parameters define a velocity; a score only where the path of the method gives one."""

    __slots__ = ()
    velocity: Callable[[Params], VelocityFn]


class DiffusionMethod(FlowMethod):
    """A method whose parameters define a velocity and a score."""

    __slots__ = ()
    score: Callable[[Params], VelocityFn]


class FlowMapMethod(FlowMethod):
    """A method whose parameters define a velocity, on the diagonal ``s = t``, and a flow map."""

    __slots__ = ()
    flow_map: Callable[[Params], FlowMapFn]


class CorrectorMethod(Method):
    """A method whose parameters define the direction of a corrector."""

    __slots__ = ()
    direction: Callable[[Params], DirectionFn]


class ScoreCorrectorMethod(CorrectorMethod):
    """A method whose parameters define the direction of a corrector and the score behind that direction."""

    __slots__ = ()
    score: Callable[[Params], VelocityFn]


def with_null(cond: Cond, null: Cond) -> Cond:
    """Replace the labels of a condition by the null label, leaf by leaf.

    Args:
        cond: condition of a batch, or a pair ``(labels, scale)``, the condition of a guided network. A pair keeps its
            scale unless ``null`` is a pair, too.
        null: condition that stands for no label, without the batch axis; for the float conditions of ``nets`` NaN, for
            all leaves alike. ``None`` stands for no condition at all.

    Returns:
        A condition of the structure, shapes and types of ``cond``; ``None`` for ``null=None``.

    >>> with_null(jnp.array([3, 7]), 10)
    Array([10, 10], dtype=int32)
    """
    if null is None:
        return None
    if isinstance(cond, tuple) and not isinstance(null, tuple):
        return (with_null(cond[0], null), *cond[1:])
    fill = lambda n, c: jnp.broadcast_to(jnp.asarray(n, jnp.asarray(c).dtype), jnp.shape(c))
    return jax.tree.map(lambda n, part: jax.tree.map(lambda c: fill(n, c), part), null, cond)


def is_null(cond: Cond, null: Cond) -> Array:
    """Return a mask of the examples whose condition is the null label.

    Args:
        cond: condition of a batch.
        null: the null label (see ``with_null``); not ``None``.

    Returns:
        Booleans ``[B]``.

    >>> is_null(jnp.array([3, 10]), 10)
    Array([False,  True], dtype=bool)
    """
    equal = lambda a, b: (a == b) | ((a != a) & (b != b))  # NaN is the null condition of floats
    same = lambda a, b: jnp.all(equal(a, b).reshape(a.shape[0], -1), 1)
    return jnp.stack(jax.tree.leaves(jax.tree.map(same, cond, with_null(cond, null)))).all(0)


def expand(t: Array, x: Array) -> Array:
    """Append axes of size one to times, so that they multiply examples.

    Args:
        t: times ``[B]``, or a scalar.
        x: examples ``[B, ...]``.

    Returns:
        ``t`` of shape ``[B, 1, ..., 1]``, with as many axes as ``x``.

    >>> expand(jnp.zeros(4), jnp.zeros((4, 8, 8, 3))).shape
    (4, 1, 1, 1)
    """
    return jnp.reshape(t, jnp.shape(t) + (1,) * (x.ndim - jnp.ndim(t)))


def over_batch(t, x: Array, *, tokens: bool = False) -> Float[Array, " b"]:
    """Broadcast a time over a batch.

    Args:
        t: a scalar time, or times ``[B]``, which pass through.
        x: examples ``[B, ...]``.
        tokens: whether the examples are integers; the times are then in the precision of ``t``.

    Returns:
        Times ``[B]``: float32, or float64 where ``x`` is float64.

    Raises:
        TypeError, ValueError: ``x`` is not a floating array, or ``t`` is neither a scalar nor ``[B]``.

    >>> over_batch(0.5, jnp.zeros((3, 2)))
    Array([0.5, 0.5, 0.5], dtype=float32)
    """
    checks.check_state("x", x, tokens=tokens)
    if jnp.shape(t) not in ((), x.shape[:1]):
        raise ValueError(f"t.shape={jnp.shape(t)}: not times of {len(x)} examples. Give a number, or one for each.")
    precise = (jnp.asarray(t).dtype if tokens else x.dtype) == jnp.float64
    dtype = jnp.float64 if precise else jnp.float32
    return jnp.broadcast_to(jnp.asarray(t, dtype), (x.shape[0],))
