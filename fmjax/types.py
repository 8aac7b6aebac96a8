"""The vocabulary of the library: networks, velocities, flow maps, losses, and how randomness is handed out.

Conventions, stated once:

* Time runs from ``t = 0`` (source, ``x0``, noise) to ``t = 1`` (data, ``x1``); a jump goes from ``s`` to ``t``.
* ``x: [B, ...]``, times ``[B]`` float32; images are ``[B, H, W, C]`` in [-1, 1].
* ``Net(params, x, s, t)`` is the average velocity from ``s`` to ``t``; its diagonal ``s = t`` is the velocity, and
  ``X_{s,t}(x) = x + (t - s) Net(x, s, t)`` is the flow map.
* Positional arguments are arrays (traced); keyword-only arguments are static.
* Randomness belongs to the example: inside the library ``key`` is an array ``[B]`` of typed keys, one per example,
  folded from the run's key, the step and the example's global index. A draw is then the same whatever the batch size,
  the mesh or the number of processes.
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

Params = Any
Cond = Any
Aux = dict[str, Array]


@runtime_checkable
class Net(Protocol):
    """An unbound network: the average velocity from ``s`` to ``t``. Dropout is on exactly when a key is given."""

    def __call__(self, params: Params, x: Array, s: Array, t: Array, cond: Cond = None, key=None) -> Array: ...


@runtime_checkable
class LogitNet(Protocol):
    """An unbound network of one number an example, ``[B]``: the logit of a classifier. It is asked where ``s = t``."""

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
    """A bound velocity ``v(x, t)``: all that solvers, likelihood and guidance see."""

    def __call__(self, x: Array, t: Array, cond: Cond = None) -> Array: ...


@runtime_checkable
class FlowMapFn(Protocol):
    """A bound flow map ``X_{s,t}(x)``, learned or made from a velocity by one solver step."""

    def __call__(self, x: Array, s: Array, t: Array, cond: Cond = None, key=None) -> Array: ...


def accept(ts) -> None:
    """Accept all times: the check of what works on every grid."""


class Costed(NamedTuple):
    """A step, corrector, direction or schedule that states its cost and refuses times it cannot take.

    Calling it calls ``apply``. ``nfe`` is the number of network evaluations of one call per example (``None``:
    unknown). ``check(ts)`` raises ``ValueError`` for times, or for a grid, at which ``apply`` cannot work;
    ``sampling.sample`` calls it before anything is compiled. Read both with ``stated``, which also sees through
    ``jax.jit`` and ``functools.partial``.
    """

    apply: Callable[..., Any]
    nfe: int | None = None
    check: Callable[[Any], None] = accept

    def __call__(self, *args, **kwargs):
        return self.apply(*args, **kwargs)


class Multistep(NamedTuple):
    """A step that uses earlier ones: a ``FlowMapFn`` with a memory, which ``sampling.sample`` carries along the grid.

    ``init(x)`` is the memory before the first step, ``step(memory, x, s, t, cond, key)`` gives ``(x, memory)``: arrays
    whose shapes never change, so that the scan compiles one step. A grid starts with an empty memory. ``nfe`` and
    ``check`` are those of ``Costed``.
    """

    init: Callable[[Array], Any]
    step: Callable[..., tuple[Array, Any]]
    nfe: int | None = None
    check: Callable[[Any], None] = accept


def stated(function: Any) -> Costed | Multistep:
    """Return what a step, corrector or direction states of itself, through ``jax.jit`` and ``functools.partial``.

    Args:
        function: any callable, or a ``Multistep``.

    Returns:
        The ``Costed`` or ``Multistep`` inside ``function``; for a plain function ``Costed(function)``, of unknown cost.

    >>> import functools, jax
    >>> step = Costed(lambda x, s, t, cond=None, key=None: x, nfe=4)
    >>> stated(jax.jit(step)).nfe, stated(functools.partial(step, cond=None)).nfe, stated(abs).nfe
    (4, 4, None)
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
    """One correction of ``x`` at time ``t``; the second value informs and is not state."""

    def __call__(self, key, x: Array, t: Array, cond: Cond = None) -> tuple[Array, Aux]: ...


class Batch(NamedTuple):
    """Examples ``[B, ...]``. ``x0=None``: the loss draws ``N(0, I)``. ``t`` is set where the data carry a time.

    ``negative`` is the ``x1`` of another training example, independent of this one (contrastive losses). ``progress``
    is the share of the training that is done, in [0, 1), for losses that change with it; ``None`` stands for its end.
    """

    x1: Array
    x0: Array | None = None
    cond: Cond = None
    t: Array | None = None
    negative: Array | None = None
    progress: Array | None = None


@runtime_checkable
class LossFn(Protocol):
    """A loss with its target (the teacher: self, EMA or frozen) as an argument; ``key: [B]``.

    Returns ``(scalar, aux)``; ``aux["per_example"]: [B]`` beside the times drawn, so that anyone can mask, bin by time
    or reweight. ``aux`` holds arrays ``[B]`` only. A boolean ``aux["is_NAME"]`` says which examples the term ``NAME``
    of the loss applies to; a float ``aux["NAME"]`` is a term of every example (times are ``s`` and ``t``). A weighted
    loss keeps what it weights, the mean squared error of an example, in ``aux["residual"]``.
    """

    def __call__(self, params: Params, target: Params, batch: Batch, key) -> tuple[Array, Aux]: ...


class Method(NamedTuple):
    """A training objective and what its parameters can be used as (compare ``optax.GradientTransformation``).

    ``score(params)(x, t, cond)`` is ``grad log p_t(x)``, what an SDE step needs beside the velocity.
    """

    loss: LossFn
    velocity: Callable[[Params], VelocityFn] | None = None
    flow_map: Callable[[Params], FlowMapFn] | None = None
    direction: Callable[[Params], DirectionFn] | None = None
    score: Callable[[Params], VelocityFn] | None = None


def with_null(cond: Cond, null: Cond) -> Cond:
    """``cond`` with ``null``, broadcast leaf by leaf, in the place of its labels.

    A pair ``(labels, scale)``, the condition of a guided net, keeps its scale where ``null`` is no pair. ``null=None``
    stands for no condition at all.
    """
    if null is None:
        return None
    if isinstance(cond, tuple) and not isinstance(null, tuple):
        return (with_null(cond[0], null), *cond[1:])
    fill = lambda n, c: jnp.broadcast_to(jnp.asarray(n, jnp.asarray(c).dtype), jnp.shape(c))
    return jax.tree.map(fill, null, cond)


def is_null(cond: Cond, null: Cond) -> Array:
    """Which rows, ``[B]``, have the null label (see ``with_null``)."""
    same = lambda a, b: jnp.all((a == b).reshape(a.shape[0], -1), 1)
    return jnp.stack(jax.tree.leaves(jax.tree.map(same, cond, with_null(cond, null)))).all(0)


def expand(t: Array, x: Array) -> Array:
    """``t: [B]`` (or a scalar) with trailing axes of one, to multiply ``x: [B, ...]``."""
    return jnp.reshape(t, jnp.shape(t) + (1,) * (x.ndim - jnp.ndim(t)))


def over_batch(t, x: Array) -> Float[Array, " b"]:
    """A scalar time as ``[B]``; an array ``[B]`` passes through. Times stay float32 (float64 when ``x`` is)."""
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return jnp.broadcast_to(jnp.asarray(t, dtype), (x.shape[0],))
