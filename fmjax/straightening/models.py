"""Straightened flows as samplers: which networks a comparison needs, what each model does in each segment, measures.

The time axis has bounds ``b_0 < ... < b_K``; a part is the set of segments that are straightened, and ``sharing`` says
which parameters serve which segment:

    ============  ================================================================================================
    ``gated``     a student for each straightened segment, the teacher elsewhere
    ``shared``    one student everywhere, trained on the straightened segments alone
    ``retained``  one student everywhere, also held to the teacher in the others
    ``told``      as ``retained``, and told which segment it is in
    ============  ================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.checks import check_bounds
from fmjax.sampling import solvers
from fmjax.straightening import segments
from fmjax.types import FlowMapFn, Method, Params, VelocityFn, over_batch

SHARING = ("gated", "shared", "retained", "told")
TEACHER, FULL = "teacher", "full reflow"


class Model(NamedTuple):
    """What is sampled: the name of a network for each segment, ``TEACHER`` or one of ``students``."""

    sharing: str
    part: str
    networks: tuple[str, ...]


def models(
    bounds: Sequence[float], parts: Mapping[str, Sequence[int]], sharing: Sequence[str], *, full: bool = True
) -> tuple[list[Model], dict[str, dict[str, Any]]]:
    """The models of a comparison, the teacher first, and the options of ``methods.straighten`` of every student.

    A student that serves two models is one. With ``full`` there is the reflow of the whole axis too. Raises
    ``ValueError`` for an unknown way of sharing, and for parts that name no segment or one that does not exist.
    """
    edges = check_bounds(bounds)
    n, bounds = len(edges) - 1, tuple(bounds)
    if unknown := [s for s in sharing if s not in SHARING]:
        raise ValueError(f"no sharing {unknown[0]!r}: there are {', '.join(SHARING)}")
    made, students = [Model(TEACHER, "none", (TEACHER,) * n)], {}
    for how in sharing:
        for part, straight in parts.items():
            straight = sorted(set(straight))
            if not straight or not set(straight) <= set(range(n)):
                raise ValueError(f"part {part!r} must name some of the segments 0 .. {n - 1}, got {tuple(straight)}")
            kept = tuple(k for k in range(n) if k not in straight)
            # on one segment alone there is nothing to share: the student of a gated model, used everywhere, is it
            alone = {k: f"segment {k}" for k in straight}
            if how == "gated" or (how == "shared" and len(straight) == 1):
                students |= {name: {"bounds": bounds[k : k + 2]} for k, name in alone.items()}
                one = alone[straight[0]]
                networks = tuple(alone.get(k, TEACHER if how == "gated" else one) for k in range(n))
            else:
                name = f"{part}, {'shared' if how == 'retained' and not kept else how}"
                options = {"bounds": bounds, "keep": kept} | ({"to_bound": True} if how == "told" else {})
                students[name] = options | ({"retention": 0.0} if how == "shared" and kept else {})
                networks = (name,) * n
            made.append(Model(how, part, networks))
    if full:
        students[FULL] = {"bounds": (bounds[0], bounds[-1])}
        made.append(Model(FULL, "all as one", (FULL,) * n))
    return made, students


def velocities(model: Model, methods: Mapping[str, Method], params: Mapping[str, Params]) -> list[VelocityFn]:
    """The velocity of each segment; one function where one network serves several."""
    made = {name: methods[name].velocity(params[name]) for name in dict.fromkeys(model.networks)}
    return [made[name] for name in model.networks]


def step(each: Sequence[VelocityFn], bounds: Sequence[float], solver: Callable = solvers.euler) -> FlowMapFn:
    """A step of ``solver`` with the velocity of the segment in which it starts."""
    made = {id(v): solver(v) for v in each}
    return segments.piecewise([made[id(v)] for v in each], bounds)


def velocity(each: Sequence[VelocityFn], bounds: Sequence[float]) -> VelocityFn:
    """One velocity of all times; a bound belongs to the segment that starts there."""
    moves = step(each, bounds, lambda v: lambda x, s, t, cond=None, key=None: v(x, s, cond))
    return lambda x, t, cond=None: moves(x, over_batch(t, x), over_batch(t, x), cond)


def measures(
    each: Sequence[VelocityFn],
    teacher: VelocityFn,
    bounds: Sequence[float],
    states: Float[Array, "k b ..."],
    real: Float[Array, "b ..."],
    keys,
) -> dict[str, list[Array]]:
    """How straight a model is, how it jumps and what it forgot: scalars of the segments or the inner bounds.

    ``states: [K + 1, B, ...]`` are the teacher's at the bounds, ``real: [B, ...]`` data, ``keys: [B]``.

    * ``straightness``: ``segments.straightness`` of each segment, from the teacher's states;
    * ``jump``: ``E |v(b+) - v(b-)|^2`` at the inner bounds;
    * ``departure``: ``E |v - v_teacher|^2`` at a uniform time of each segment, on noised real data: of a kept one the
      error of its retention.
    """
    edges = check_bounds(bounds)
    z = jax.vmap(lambda k: jax.random.normal(k, real.shape[1:]))(keys)
    u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(keys)
    found: dict[str, list[Array]] = {"straightness": [], "jump": [], "departure": []}
    for k, v in enumerate(each):
        low, high = float(edges[k]), float(edges[k + 1])
        found["straightness"].append(segments.straightness(v, states[k], low, high))
        t = low + (high - low) * u
        wide = t.reshape(-1, *(1,) * (z.ndim - 1))
        x = (1 - wide) * z + wide * real
        found["departure"].append(jnp.mean(jnp.square(v(x, t) - teacher(x, t))))
        if k:
            before = lambda x, t, v=each[k - 1]: v(x, jnp.nextafter(t, jnp.zeros_like(t)))
            found["jump"].append(segments.jump(before, v, states[k], low))
    return found
