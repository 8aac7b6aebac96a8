"""Straightened flows as samplers: the networks of a comparison, the velocity of each segment, measures.

The time axis has bounds ``b_0 < ... < b_K``; a part is the set of segments that are straightened, and ``sharing`` says
which parameters serve which segment:

    ===============  =============================================================================================
    ``gated``        a student for each straightened segment, the teacher elsewhere
    ``shared``       one student everywhere, trained on the straightened segments only
    ``retained``     one student everywhere, also trained to stay at the teacher in the others
    ``conditioned``  as ``retained``, and the student is conditioned on its segment
    ===============  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import paths, sampling
from fmjax.checks import check_bounds
from fmjax.keys import as_keys
from fmjax.straightening import segments
from fmjax.types import Cond, FlowMapFn, Method, Params, VelocityFn, over_batch

SHARING = ("gated", "shared", "retained", "conditioned")
TEACHER, FULL = "teacher", "full reflow"
CONDITIONED = {"to_bound": True}  # of ``methods.straighten``: the network takes its segment


class SegmentedModel(NamedTuple):
    """A model of a comparison.

    Attributes:
        sharing: how parameters are shared, or ``TEACHER`` or ``FULL``.
        part: name of the part that is straightened.
        networks: name of the network of each segment: ``TEACHER``, or a student.
    """

    sharing: str
    part: str
    networks: tuple[str, ...]


def comparison_models(
    bounds: Sequence[float], parts: Mapping[str, Sequence[int]], sharing: Sequence[str], *, full: bool = True
) -> tuple[list[SegmentedModel], dict[str, dict[str, Any]]]:
    """Return the models of a comparison, and the options of ``methods.straighten`` for every student.

    A student that serves several models appears once.

    Args:
        bounds: bounds of the segments.
        parts: straightened segments by the name of the part.
        sharing: ways of sharing parameters, of ``SHARING``.
        full: add the reflow of the whole time axis.

    Returns:
        The models, the teacher first, and options by the name of the student.

    Raises:
        ValueError: an unknown way of sharing, or a part without segments or with one that does not exist.

    >>> models, students = comparison_models((0.0, 0.5, 1.0), {"late": (1,)}, ("gated",), full=False)
    >>> models[1].networks, students
    (('teacher', 'segment 1'), {'segment 1': {'bounds': (0.5, 1.0)}})
    """
    edges = check_bounds(bounds)
    n, bounds = len(edges) - 1, tuple(bounds)
    if unknown := [s for s in sharing if s not in SHARING]:
        raise ValueError(f"sharing={unknown[0]!r}: unknown. Give some of {', '.join(SHARING)}.")
    models, students = [SegmentedModel(TEACHER, "none", (TEACHER,) * n)], {}
    for way in sharing:
        for part, straight in parts.items():
            straight = sorted(set(straight))
            if not straight or not set(straight) <= set(range(n)):
                raise ValueError(f"parts={{{part!r}: {tuple(straight)}}}: give some of 0 .. {n - 1}.")
            networks, options = _students(way, part, straight, bounds)
            students |= options
            models.append(SegmentedModel(way, part, networks))
    if full:
        students[FULL] = {"bounds": (bounds[0], bounds[-1])}
        models.append(SegmentedModel(FULL, "all as one", (FULL,) * n))
    return models, students


def _students(way: str, part: str, straight: list[int], bounds) -> tuple[tuple[str, ...], dict[str, dict[str, Any]]]:
    """Return the network of each segment of a model, and the options of its students."""
    n = len(bounds) - 1
    kept = tuple(k for k in range(n) if k not in straight)
    # with one straightened segment, the shared student is the student of the gated model, used everywhere
    if way == "gated" or (way == "shared" and len(straight) == 1):
        single = {k: f"segment {k}" for k in straight}
        elsewhere = TEACHER if way == "gated" else single[straight[0]]
        options = {name: {"bounds": bounds[k : k + 2]} for k, name in single.items()}
        return tuple(single.get(k, elsewhere) for k in range(n)), options
    name = f"{part}, {'shared' if way == 'retained' and not kept else way}"
    options = {"bounds": bounds, "keep": kept} | (CONDITIONED if way == "conditioned" else {})
    return (name,) * n, {name: options | ({"retention": 0.0} if way == "shared" and kept else {})}


def segment_velocities(
    model: SegmentedModel, methods: Mapping[str, Method], params: Mapping[str, Params]
) -> list[VelocityFn]:
    """Return the velocity of each segment of a model.

    Args:
        model: the model.
        methods: methods by the name of the network.
        params: parameters by the name of the network.

    Returns:
        One velocity per segment; one object where a network serves several segments.

    >>> method = Method(None, velocity=lambda c: lambda x, t, cond=None: c * x)
    >>> each = segment_velocities(SegmentedModel("", "", ("a", "a")), {"a": method}, {"a": 2.0})
    >>> each[0] is each[1], each[0](3.0, 0.0)
    (True, 6.0)
    """
    by_name = {name: methods[name].velocity(params[name]) for name in dict.fromkeys(model.networks)}
    return [by_name[name] for name in model.networks]


def segmented_step(each: Sequence[VelocityFn], bounds: Sequence[float], solver: Callable = sampling.euler) -> FlowMapFn:
    """Return a solver step with the velocity of the segment in which the step starts.

    Args:
        each: one velocity per segment.
        bounds: bounds of the segments.
        solver: ``solver(velocity)`` is a step.

    Returns:
        The step.

    >>> speed = lambda c: lambda x, t, cond=None: jnp.full_like(x, c)
    >>> step = segmented_step([speed(1.0), speed(3.0)], (0.0, 0.5, 1.0))
    >>> step(jnp.zeros((1, 1)), 0.5, 1.0).tolist()
    [[1.5]]
    """
    by_velocity = {id(v): solver(v) for v in each}
    return segments.piecewise([by_velocity[id(v)] for v in each], bounds)


def segmented_velocity(each: Sequence[VelocityFn], bounds: Sequence[float]) -> VelocityFn:
    """Return one velocity of all times; a bound belongs to the segment that starts there.

    Args:
        each: one velocity per segment.
        bounds: bounds of the segments.

    Returns:
        The velocity.

    >>> speed = lambda c: lambda x, t, cond=None: jnp.full_like(x, c)
    >>> segmented_velocity([speed(1.0), speed(3.0)], (0.0, 0.5, 1.0))(jnp.zeros((1, 1)), 0.5).tolist()
    [[3.0]]
    """
    at_start = segmented_step(each, bounds, lambda v: lambda x, s, t, cond=None, key=None: v(x, s, cond))
    return lambda x, t, cond=None: at_start(x, over_batch(t, x), over_batch(t, x), cond)


def segment_measures(
    each: Sequence[VelocityFn],
    teacher: VelocityFn,
    bounds: Sequence[float],
    states: Float[Array, "k b ..."],
    real: Float[Array, "n ..."],
    key,
    cond: Cond = None,
    real_cond: Cond = None,
    x0: Float[Array, "n ..."] | None = None,
    *,
    path: paths.Path = paths.linear(),
) -> dict[str, list[Array]]:
    """Measure how straight a model is, how its velocity jumps at bounds, and how far it left the teacher.

    * ``straightness``: ``segment_straightness`` of each segment, from the teacher's states;
    * ``jump``: ``E |v(b+) - v(b-)|^2`` at the inner bounds;
    * ``departure``: ``E |v - v_teacher|^2`` at a uniform time of each segment, on noised data: for a kept segment, the
      error of the retention.

    Args:
        each: one velocity per segment.
        teacher: velocity of the teacher.
        bounds: bounds of the segments.
        states: the teacher's states at the bounds, ``[K + 1, B, ...]``.
        real: data ``[N, ...]``.
        key: one key, or ``[N]`` keys, for the noise and the times of the data.
        cond: conditions of the states.
        real_cond: conditions of the data.
        x0: examples of the source beside the data, ``[N, ...]``; by default drawn from N(0, I).
        path: path of the flow.

    Returns:
        Scalars: one per segment, or per inner bound (``jump``).

    >>> speed = lambda c: lambda x, t, cond=None: jnp.full_like(x, c)
    >>> each, states = [speed(1.0), speed(3.0)], jnp.zeros((3, 2, 1))
    >>> m = segment_measures(each, speed(1.0), (0.0, 0.5, 1.0), states, jnp.zeros((2, 1)), jax.random.key(0))
    >>> float(m["jump"][0]), [float(d) for d in m["departure"]]
    (4.0, [0.0, 4.0])
    """
    edges, keys = check_bounds(bounds), as_keys(key, len(real))
    x0 = jax.vmap(lambda k: jax.random.normal(k, real.shape[1:]))(keys) if x0 is None else x0
    u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1)))(keys)
    measures: dict[str, list[Array]] = {"straightness": [], "jump": [], "departure": []}
    for k, v in enumerate(each):
        low, high = float(edges[k]), float(edges[k + 1])
        measures["straightness"].append(segments.segment_straightness(v, states[k], low, high, cond))
        t = low + (high - low) * u
        x, _ = paths.with_velocity(path, x0, real, t)
        measures["departure"].append(jnp.mean(jnp.square(v(x, t, real_cond) - teacher(x, t, real_cond))))
        if k:
            before = lambda x, t, cond, v=each[k - 1]: v(x, jnp.nextafter(t, jnp.zeros_like(t)), cond)
            measures["jump"].append(segments.velocity_jump(before, v, states[k], low, cond))
    return measures
