"""Models of straightened flows: which network serves which segment, and their measures against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import nets, oracles, paths, sampling, straightening
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
    networks = {(m.sharing, m.part): m.networks for m in models}
    assert networks[TEACHER, "none"] == (TEACHER, TEACHER) and models[0].sharing == TEACHER
    assert networks["gated", "early"] == ("segment 0", TEACHER) and networks["gated", "late"] == (TEACHER, "segment 1")
    assert networks["gated", "both"] == ("segment 0", "segment 1")
    # one network trained on one segment and used everywhere is the gated one's
    assert networks["shared", "early"] == ("segment 0",) * 2 and networks["shared", "late"] == ("segment 1",) * 2
    assert networks["shared", "both"] == networks["retained", "both"] == ("both, shared",) * 2  # nothing is kept
    assert (
        networks["retained", "early"] == ("early, retained",) * 2
        and networks["conditioned", "both"] == ("both, conditioned",) * 2
    )
    assert networks[FULL, "all as one"] == (FULL,) * 2 and len(models) == 2 + 4 * 3
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


def test_two_of_three_segments_use_one_network_without_retention():
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
    options = {"bounds": BOUNDS, "parts": PARTS, "sharing": ("gated",)} | change
    with pytest.raises(ValueError, match=message):
        straightening.comparison_models(options["bounds"], options["parts"], options["sharing"])


def test_students_at_their_start_are_the_teacher(key):
    """Conditioned on their segment or not, with shared networks or not, they start from the teacher's parameters."""
    model = nets.from_linen(nets.MLP(width=16, depth=1))
    net = nets.preconditioning.preconditioned(model.net, nets.preconditioning.edm())
    x = jax.random.normal(key, (6, 3))
    params = jax.tree.map(lambda p: p + 0.1, model.init(key, x))
    models, students = straightening.comparison_models(BOUNDS, PARTS, SHARING)
    # the embedding of a jump starts at zero
    params["TwoTimes_0"]["jump"] = jax.tree.map(jnp.zeros_like, params["TwoTimes_0"]["jump"])
    methods = {name: straighten(net, **options) for name, options in students.items()}
    methods[TEACHER] = straighten(net)
    at = dict.fromkeys(methods, params)
    grid = segments.segment_grid(BOUNDS, (2, 3))

    @jax.jit
    def all_samples(x):
        sample = lambda step: sampling.sample(step, x, grid, trajectory=True)
        each = [straightening.segment_velocities(model, methods, at) for model in models]
        teacher = sample(sampling.euler(methods[TEACHER].velocity(params)))
        return teacher, [sample(straightening.segmented_step(velocities, BOUNDS)) for velocities in each]

    teacher, samples = all_samples(x)
    for model, xs in zip(models, samples, strict=True):
        if model.sharing == TEACHER:
            np.testing.assert_array_equal(xs, teacher)
        np.testing.assert_allclose(xs, teacher, rtol=1e-5, atol=1e-6)


def test_each_segment_has_its_velocity_and_a_bound_the_later_one():
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
    gaussian = oracles.gaussian(jnp.zeros(2), STD)
    c = [(scale(t) / scale(s) - 1) / (t - s) for s, t in itertools.pairwise(BOUNDS)]
    chord = lambda k: lambda x, t, cond=None: expand(c[k] / (1 + c[k] * (t - BOUNDS[k])), x) * x
    n = 40_000
    x0 = jax.random.normal(key, (n, 2))
    states = jnp.stack([x0 * scale(b) for b in BOUNDS])
    real = STD * jax.random.normal(jax.random.fold_in(key, 1), (n, 2))

    def measures(each):
        run = lambda states, real, key: straightening.segment_measures(
            each, gaussian.velocity, BOUNDS, states, real, key
        )
        return jax.jit(run)(states, real, jax.random.fold_in(key, 2))

    measured = measures([chord(0), gaussian.velocity])
    r = np.linspace(0.5, 1, 33)[:-1]
    assert float(measured["straightness"][0]) < 1e-10
    # Euler's own chord and states, 32 steps
    y, vs = 1.0, []
    for s in r:
        vs.append(rate(s) * y)
        y += vs[-1] / 64
    line = (y - 1) / 0.5
    assert float(measured["straightness"][1]) == pytest.approx(np.mean((np.array(vs) - line) ** 2) / line**2, rel=1e-3)
    jump = (rate(0.5) - c[0] / (1 + c[0] * 0.5)) ** 2 * float(jnp.mean(states[1] ** 2))
    assert len(measured["jump"]) == 1 and float(measured["jump"][0]) == pytest.approx(jump, rel=1e-3)
    t = (np.arange(2000) + 0.5) / 4000
    off = np.mean((c[0] / (1 + c[0] * t) - rate(t)) ** 2 * scale(t) ** 2)
    assert float(measured["departure"][0]) == pytest.approx(off, rel=4 * np.sqrt(5 / (2 * n)))  # of a fourth moment
    assert float(measured["departure"][1]) == 0
    late = measures([gaussian.velocity, chord(1)])
    off = np.mean((c[1] / (1 + c[1] * t) - rate(0.5 + t)) ** 2 * scale(0.5 + t) ** 2)
    assert float(late["departure"][1]) == pytest.approx(off, rel=4 * np.sqrt(5 / (2 * n)))


def test_straightness_is_of_the_states_where_a_segment_starts(key):
    bent_far_away = lambda x, t, cond=None: 1 + jnp.where(x > 5, expand(t, x), 0.0)
    states = jnp.stack([jnp.full((4, 2), at) for at in (0.0, 0.0, 10.0)])
    measured = straightening.segment_measures(
        [bent_far_away] * 2, bent_far_away, BOUNDS, states, states[0], as_keys(key, 4)
    )
    assert max(map(float, measured["straightness"])) < 1e-12


def test_the_jump_of_a_conditioned_network_is_between_its_segments(key):
    """One velocity of all times that differs at the bound: the earlier side is evaluated just before it."""
    v = lambda x, t, cond=None: expand(jnp.where(t < 0.5, 1.0, 3.0), x) * jnp.ones_like(x)
    x = jax.random.normal(key, (8, 2))
    measured = straightening.segment_measures([v, v], v, BOUNDS, jnp.stack([x] * 3), x, as_keys(key, 8))
    assert float(measured["jump"][0]) == 4 and measured["departure"] == [0, 0]


def test_measures_take_the_conditions_of_states_and_of_data(key):
    """A teacher whose velocity is its condition; a model that adds one in the second segment."""
    teacher = lambda x, t, cond=None: expand(cond, x) * jnp.ones_like(x)
    other = lambda x, t, cond=None: teacher(x, t, cond) + 1
    states, cond, real_cond = jnp.zeros((3, 4, 2)), jnp.arange(4.0) + 1, jnp.arange(3.0)
    measured = straightening.segment_measures(
        [teacher, other], teacher, BOUNDS, states, jnp.zeros((3, 2)), key, cond, real_cond
    )
    assert max(map(float, measured["straightness"])) < 1e-12
    assert float(measured["jump"][0]) == 1
    np.testing.assert_allclose(measured["departure"], [0, 1], atol=1e-6)
    wide = straightening.segment_measures(
        [lambda x, t, cond=None: x] * 2, lambda x, t, cond=None: 0 * x, BOUNDS, states, jnp.zeros((20_000, 2)), key,
        path=paths.trigonometric(),
    )  # fmt: skip
    # noise of the path at a uniform time of each segment: the mean of cos(pi t / 2)^2
    half = 1 / np.pi
    np.testing.assert_allclose(wide["departure"], [0.5 + half, 0.5 - half], rtol=0.05)
