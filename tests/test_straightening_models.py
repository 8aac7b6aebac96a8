"""Models of straightened flows: which network serves which segment, and their measures against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, sampling, straightening
from fmjax.experiments import specs
from fmjax.keys import as_keys
from fmjax.methods.straighten import straighten
from fmjax.straightening import segments
from fmjax.straightening.models import FULL, SHARING, TEACHER
from fmjax.types import expand

BOUNDS = (0.0, 0.5, 1.0)
PARTS = {"early": (0,), "late": (1,), "both": (0, 1)}
STD = 0.4


def test_two_segments_need_these_networks():
    models, students = straightening.comparison_models(BOUNDS, PARTS, SHARING)
    of = {(m.sharing, m.part): m.networks for m in models}
    assert of[TEACHER, "none"] == (TEACHER, TEACHER) and models[0].sharing == TEACHER
    assert of["gated", "early"] == ("segment 0", TEACHER) and of["gated", "late"] == (TEACHER, "segment 1")
    assert of["gated", "both"] == ("segment 0", "segment 1")
    # one network trained on one segment and used everywhere is the gated one's
    assert of["shared", "early"] == ("segment 0",) * 2 and of["shared", "late"] == ("segment 1",) * 2
    assert of["shared", "both"] == of["retained", "both"] == ("both, shared",) * 2  # nothing is kept
    assert (
        of["retained", "early"] == ("early, retained",) * 2 and of["conditioned", "both"] == ("both, conditioned",) * 2
    )
    assert of[FULL, "all as one"] == (FULL,) * 2 and len(models) == 2 + 4 * 3
    assert students == {
        "segment 0": {"bounds": (0.0, 0.5)},
        "segment 1": {"bounds": (0.5, 1.0)},
        "both, shared": {"bounds": BOUNDS, "keep": ()},
        "early, retained": {"bounds": BOUNDS, "keep": (1,)},
        "late, retained": {"bounds": BOUNDS, "keep": (0,)},
        "early, conditioned": {"bounds": BOUNDS, "keep": (1,), "to_bound": True},
        "late, conditioned": {"bounds": BOUNDS, "keep": (0,), "to_bound": True},
        "both, conditioned": {"bounds": BOUNDS, "keep": (), "to_bound": True},
        FULL: {"bounds": (0.0, 1.0)},
    }
    net = lambda params, x, s, t, cond=None, key=None: x
    assert all(straighten(net, **options).velocity for options in students.values())


def test_some_of_three_segments_share_a_network_without_a_loss_in_the_third():
    bounds = (0.0, 0.2, 0.6, 1.0)
    models, students = straightening.comparison_models(bounds, {"ends": (0, 2)}, ("gated", "shared"), full=False)
    assert [m.networks for m in models[1:]] == [("segment 0", TEACHER, "segment 2"), ("ends, shared",) * 3]
    assert students["ends, shared"] == {"bounds": bounds, "keep": (1,), "retention": 0.0}
    assert students["segment 2"] == {"bounds": (0.6, 1.0)} and len(students) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharing": ("gatet",)}, "sharing='gatet'.*gated, shared, retained, conditioned"),
        ({"parts": {"late": (2,)}}, r"parts=.*'late': \(2,\).* 0 \.\. 1"),
        ({"parts": {"none": ()}}, r"parts=.*'none'"),
        ({"bounds": (0.0, 0.6, 0.5)}, "bounds="),
    ],
)
def test_what_is_no_comparison_is_refused(change, message):
    given = {"bounds": BOUNDS, "parts": PARTS, "sharing": ("gated",)} | change
    with pytest.raises(ValueError, match=message):
        straightening.comparison_models(given["bounds"], given["parts"], given["sharing"])


def test_students_at_their_start_are_the_teacher(key):
    """Told of their segment or not, whatever they share: their networks start from the teacher's parameters."""
    spec = {"name": "mlp", "width": 16, "depth": 1, "preconditioning": "edm"}
    model = specs.net(spec)
    x = jax.random.normal(key, (6, 3))
    params = jax.tree.map(lambda p: p + 0.1, model.init(key, x))
    models, students = straightening.comparison_models(BOUNDS, PARTS, SHARING)
    # the embedding of a jump starts at zero
    params["TwoTimes_0"]["jump"] = jax.tree.map(jnp.zeros_like, params["TwoTimes_0"]["jump"])
    methods = {name: straighten(model.net, **options) for name, options in students.items()}
    methods[TEACHER] = straighten(model.net)
    at = dict.fromkeys(methods, params)
    grid = segments.segment_grid(BOUNDS, (2, 3))
    plain = sampling.sample(sampling.euler(methods[TEACHER].velocity(params)), x, grid, trajectory=True)
    for one in models:
        got = sampling.sample(
            straightening.segmented_step(straightening.segment_velocities(one, methods, at), BOUNDS),
            x,
            grid,
            trajectory=True,
        )
        if one.sharing == TEACHER:
            np.testing.assert_array_equal(got, plain)
        np.testing.assert_allclose(got, plain, rtol=1e-5, atol=1e-6)


def test_each_segment_has_its_own_velocity_and_a_bound_that_of_the_later_one():
    constant = lambda c: lambda x, t, cond=None: jnp.full_like(x, c)
    each = [constant(1.0), constant(10.0)]
    t = jnp.array([0.0, 0.4999, 0.5, 0.7, 1.0])
    v = straightening.segmented_velocity(each, BOUNDS)(jnp.zeros((5, 2)), t)
    np.testing.assert_array_equal(v[:, 0], [1, 1, 10, 10, 10])
    end = sampling.sample(
        straightening.segmented_step(each, BOUNDS), jnp.zeros((3, 2)), segments.segment_grid(BOUNDS, (3, 4))
    )
    np.testing.assert_allclose(end, 5.5, rtol=1e-6)


def scale(t):
    """``x_t = scale(t) x_0`` along the flow to ``N(0, STD^2)``."""
    return np.sqrt((1 - t) ** 2 + (STD * t) ** 2)


def rate(t):
    """Its velocity is ``rate(t) x``."""
    return (STD**2 * t - (1 - t)) / scale(t) ** 2


def test_measures_of_a_gaussian_are_the_known_ones(key):
    """Chords of a linear flow are linear: ``v = c x / (1 + c (r - s))``, the segment's factor ``1 + c (t - s)``."""
    law = oracles.gaussian(jnp.zeros(2), STD)
    c = [(scale(t) / scale(s) - 1) / (t - s) for s, t in itertools.pairwise(BOUNDS)]
    chord = lambda k: lambda x, t, cond=None: expand(c[k] / (1 + c[k] * (t - BOUNDS[k])), x) * x
    n = 40_000
    x0 = jax.random.normal(key, (n, 2))
    states = jnp.stack([x0 * scale(b) for b in BOUNDS])
    real = STD * jax.random.normal(jax.random.fold_in(key, 1), (n, 2))
    found = straightening.segment_measures(
        [chord(0), law.velocity], law.velocity, BOUNDS, states, real, as_keys(jax.random.fold_in(key, 2), n)
    )
    r = np.linspace(0.5, 1, 33)[:-1]
    assert float(found["straightness"][0]) < 1e-10
    # Euler's own chord and states, 32 steps
    y, vs = 1.0, []
    for s in r:
        vs.append(rate(s) * y)
        y += vs[-1] / 64
    line = (y - 1) / 0.5
    assert float(found["straightness"][1]) == pytest.approx(np.mean((np.array(vs) - line) ** 2) / line**2, rel=1e-3)
    jump = (rate(0.5) - c[0] / (1 + c[0] * 0.5)) ** 2 * float(jnp.mean(states[1] ** 2))
    assert len(found["jump"]) == 1 and float(found["jump"][0]) == pytest.approx(jump, rel=1e-3)
    t = (np.arange(2000) + 0.5) / 4000
    off = np.mean((c[0] / (1 + c[0] * t) - rate(t)) ** 2 * scale(t) ** 2)
    assert float(found["departure"][0]) == pytest.approx(off, rel=4 * np.sqrt(5 / (2 * n)))  # of a fourth moment
    assert float(found["departure"][1]) == 0
    late = straightening.segment_measures(
        [law.velocity, chord(1)], law.velocity, BOUNDS, states, real, as_keys(jax.random.fold_in(key, 2), n)
    )
    off = np.mean((c[1] / (1 + c[1] * t) - rate(0.5 + t)) ** 2 * scale(0.5 + t) ** 2)
    assert float(late["departure"][1]) == pytest.approx(off, rel=4 * np.sqrt(5 / (2 * n)))


def test_straightness_is_of_the_states_where_a_segment_starts(key):
    bent_far_away = lambda x, t, cond=None: 1 + jnp.where(x > 5, expand(t, x), 0.0)
    states = jnp.stack([jnp.full((4, 2), at) for at in (0.0, 0.0, 10.0)])
    found = straightening.segment_measures(
        [bent_far_away] * 2, bent_far_away, BOUNDS, states, states[0], as_keys(key, 4)
    )
    assert max(map(float, found["straightness"])) < 1e-12


def test_the_jump_of_a_network_that_is_told_is_between_its_segments(key):
    """One velocity of all times that differs at the bound: the earlier side is asked just before it."""
    v = lambda x, t, cond=None: expand(jnp.where(t < 0.5, 1.0, 3.0), x) * jnp.ones_like(x)
    x = jax.random.normal(key, (8, 2))
    found = straightening.segment_measures([v, v], v, BOUNDS, jnp.stack([x] * 3), x, as_keys(key, 8))
    assert float(found["jump"][0]) == 4 and found["departure"] == [0, 0]
