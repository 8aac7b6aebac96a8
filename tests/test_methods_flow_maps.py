"""Losses of flow maps: exact values on Gaussian data, stopped gradients by formula, costs, and few-step use."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling, times
from fmjax.keys import example_keys
from fmjax.methods.eulerian import STOPS as EULERIAN_STOPS
from fmjax.methods.eulerian import VELOCITIES, eulerian
from fmjax.methods.flow_map_matching import flow_map_matching
from fmjax.methods.flow_matching import flow_matching
from fmjax.methods.lagrangian import STOPS as LAGRANGIAN_STOPS
from fmjax.methods.lagrangian import lagrangian
from fmjax.methods.progressive import progressive
from fmjax.nets.adapters import one_time
from fmjax.sampling import grids
from fmjax.types import Batch, Network, expand

MEAN, STD = np.array([0.75, -0.5]), np.array([0.5, 1.5])
KEYS = jax.random.key(3)

both_paths = pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()], ids=["linear", "trigonometric"])


def gaussian(path):
    return oracles.gaussian(jnp.asarray(MEAN), jnp.asarray(STD), path=path)


def apart(key):
    """Ordered pairs at least 0.1 apart, where the closed form of ``u`` is a quotient and loses one digit at most."""
    s, t = times.either_order(key, least=0.1)
    return jnp.minimum(s, t), jnp.maximum(s, t)


def evaluate(methods, batch):
    """``aux`` of each of several methods by one compiled program."""
    keys = example_keys(KEYS, jnp.arange(len(batch.x1)))
    return jax.jit(lambda batch: [method.loss(None, None, batch, keys)[1] for method in methods])(batch)


# --- values at the exact map


def self_consistent():
    """Every loss whose residual needs no data at the exact map: a factory and its options."""
    for stop in LAGRANGIAN_STOPS:
        yield lagrangian, {"stop": stop}
    for stop in EULERIAN_STOPS:
        yield eulerian, {"stop": stop}
    for split, substeps in (("equal", 2), ("equal", 3), ("uniform", 3)):
        yield progressive, {"split": split, "substeps": substeps}


@pytest.mark.parametrize(
    ("path", "frozen"),
    [(paths.linear(), False), (paths.trigonometric(), False), (paths.trigonometric(), True)],
    ids=["linear", "trigonometric", "teacher"],
)
def test_the_residual_of_the_exact_map_is_zero(path, frozen, x64):
    """Against its own diagonal, or the exact velocity as a teacher that takes one time."""
    oracle = gaussian(path)
    batch = Batch(oracle.sample(KEYS, 16))
    teacher = {"teacher": one_time(lambda params, x, t: oracle.velocity(x, t))}
    cases = list(self_consistent())
    if frozen:
        cases = [(factory, options | teacher) for factory, options in cases if factory is not progressive]
    net = oracles.average_velocity(oracle)
    methods = [factory(net, path=path, pair=apart, diagonal=0.0, **options) for factory, options in cases]
    for case, aux in zip(cases, evaluate(methods, batch), strict=True):
        assert np.sqrt(aux["per_example"]).max() < 1e-12, case


def variances(path, t):
    """Of ``I_t``, and of ``dI_t`` given ``I_t``: ``[B, 2]``."""
    alpha, beta, d_alpha, d_beta = (np.asarray(a) for a in paths.coefficients(path, jnp.zeros((len(t), 2)), t))
    var, rate = alpha**2 + beta**2 * STD**2, d_alpha**2 + d_beta**2 * STD**2
    return var, rate - (alpha * d_alpha + beta * d_beta * STD**2) ** 2 / var


@both_paths
def test_where_data_speak_the_exact_map_has_their_conditional_variance(path, x64):
    """``Var(dI_t | I_t)`` on the diagonal and in flow map matching.

    Where the Eulerian loss regresses on ``dI_s`` it is the variance at ``s``; with ``dI_s`` the direction as well it is
    carried to ``t`` by ``(grad X)^2 = C_t / C_s``.
    """
    oracle, n = gaussian(path), 20_000
    net, batch = oracles.average_velocity(oracle), Batch(oracle.sample(KEYS, n))
    at_s = lambda s, t: variances(path, s)[1]
    stretch = lambda s, t: np.sqrt(variances(path, t)[0] / variances(path, s)[0])
    own = lambda **choices: eulerian(net, path=path, pair=apart, diagonal=0.0, **choices)
    cases = {
        "diagonal": (lagrangian(net, path=path, diagonal=1.0), at_s),
        "direct": (flow_map_matching(net, path=path), lambda s, t: variances(path, t)[1]),
        "regressed": (own(velocity="conditional"), at_s),
        "both": (own(velocity="conditional", tangent="conditional"), lambda s, t: stretch(s, t) ** 2 * at_s(s, t)),
        "direction": (own(tangent="conditional"), lambda s, t: (stretch(s, t) - 1) ** 2 * at_s(s, t)),
    }
    heavy = flow_map_matching(net, path=path, round_trip=100.0)  # the round trip of the exact map adds nothing
    *auxes, again = evaluate([method for method, _ in cases.values()] + [heavy], batch)
    for (name, (_, exact)), aux in zip(cases.items(), auxes, strict=True):
        over = np.asarray(aux["per_example"]) - exact(aux["s"], aux["t"]).mean(1)
        assert abs(over.mean()) < 4.5 * over.std() / n**0.5 and over.std() > 0.01, name
    np.testing.assert_allclose(again["per_example"], auxes[1]["per_example"], rtol=0, atol=1e-20)


# --- gradients by formula

B = 6
S, T = np.linspace(0.05, 0.5, B), np.linspace(0.9, 0.6, B)


def fixed(key):
    return jnp.asarray(S), jnp.asarray(T)


def mlp(params, x, s, t, cond=None, key=None):
    wide = jnp.concatenate([x, expand(s, x) + 0 * x[:, :1], expand(t, x) + 0 * x[:, :1]], -1)
    return jnp.tanh(wide @ params["in"]) @ params["out"]


def weights(seed):
    rng = np.random.default_rng(seed)
    return {"in": jnp.asarray(rng.standard_normal((4, 5))), "out": jnp.asarray(rng.standard_normal((5, 2)))}


def row(params, x, s, t):
    return mlp(params, x[None], s[None], t[None])[0]


@pytest.fixture
def setting(x64):
    """Parameters, a teacher's, a batch with its source, and ``I_s`` on the line between."""
    x0, x1 = jax.random.normal(KEYS, (2, B, 2))
    return weights(0), weights(1), Batch(x1, x0), (1 - S[:, None]) * x0 + S[:, None] * x1


def value_and_grad(method, p, q, batch):
    keys = example_keys(KEYS, jnp.arange(B))
    return jax.jit(jax.value_and_grad(lambda p: method.loss(p, q, batch, keys)[0]))(p)


def over_rows(f):
    return jax.vmap(f, (None, 0, 0, 0))


u_of = over_rows(row)
u_t = over_rows(jax.jacfwd(row, 3))
u_s = over_rows(jax.jacfwd(row, 2))
u_x = over_rows(jax.jacfwd(row, 1))
GAP = (T - S)[:, None]


def lagrangian_formula(stop, p, q, x):
    """A scalar of ``p`` with the value and the gradient of the loss: what is stopped sees ``p0``."""
    p0 = p

    def value(p):
        jump = lambda p: x + GAP * u_of(p, x, S, T)
        v = u_of(q, jump(p if stop == "none" else p0), T, T)
        return jnp.mean((u_of(p, x, S, T) + GAP * u_t(p0 if stop == "tangent" else p, x, S, T) - v) ** 2)

    return value


def eulerian_formula(stop, p, q, x, r=1.0):
    p0, v = p, u_of(q, x, S, S)

    def value(p):
        in_space = jnp.einsum("bij,bj->bi", u_x(p if stop == "velocity" else p0, x, S, T), v)
        in_time = u_s(p0 if stop == "all" else p, x, S, T)
        return jnp.mean((u_of(p, x, S, T) - v - r * GAP * (in_space + in_time)) ** 2)

    return value


@pytest.mark.parametrize(
    ("factory", "formula", "stops"),
    [(lagrangian, lagrangian_formula, LAGRANGIAN_STOPS), (eulerian, eulerian_formula, EULERIAN_STOPS)],
    ids=["lagrangian", "eulerian"],
)
def test_what_a_stop_stops_is_what_the_formula_holds(factory, formula, stops, setting):
    """Equal values for all stops, gradients each its own; the teacher's parameters are others than the net's."""
    p, q, batch, x = setting
    values, grads = [], []
    for stop in stops:
        method = factory(mlp, pair=fixed, diagonal=0.0, stop=stop)
        value, grad = value_and_grad(method, p, q, batch)
        exact, exact_grad = jax.jit(lambda p, stop=stop: jax.value_and_grad(formula(stop, p, q, x))(p))(p)
        np.testing.assert_allclose(value, exact, rtol=1e-12)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), grad, exact_grad)
        values.append(value)
        grads.append(np.concatenate([np.ravel(g) for g in jax.tree.leaves(grad)]))
    np.testing.assert_allclose(values, values[0], rtol=1e-12)
    for a, b in itertools.combinations(grads, 2):
        assert np.linalg.norm(a - b) > 0.01 * np.linalg.norm(a)


@pytest.mark.parametrize("substeps", [2, 3])
@pytest.mark.parametrize("step", ["jumps", "euler"])
def test_progressive_regresses_on_the_mean_of_the_teachers_sub_steps(step, substeps, setting):
    p, q, batch, x = setting
    y, grid = x, np.linspace(S, T, substeps + 1)
    for m, after in itertools.pairwise(grid):
        y += (after - m)[:, None] * u_of(q, y, m, after if step == "jumps" else m)
    exact = lambda p: jnp.mean((u_of(p, x, S, T) - (y - x) / GAP) ** 2)
    method = progressive(mlp, pair=fixed, diagonal=0.0, substeps=substeps, step=step)
    actual, expected = value_and_grad(method, p, q, batch), jax.jit(jax.value_and_grad(exact))(p)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), actual, expected)


def test_flow_map_matching_takes_its_gradient_through_the_inverse_jump(setting):
    p, q, batch, _ = setting
    x = (1 - T[:, None]) * batch.x0 + T[:, None] * batch.x1

    def exact(p):
        y = x - GAP * u_of(p, x, T, S)
        along = u_of(p, y, S, T) + GAP * u_t(p, y, S, T)
        back = y + GAP * u_of(p, y, S, T)
        return jnp.mean((along - (batch.x1 - batch.x0)) ** 2) + 0.5 * jnp.mean((back - x) ** 2)

    method = flow_map_matching(mlp, pair=fixed, round_trip=0.5)
    actual, expected = value_and_grad(method, p, q, batch), jax.jit(jax.value_and_grad(exact))(p)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), actual, expected)


def test_normalise_divides_a_residual_by_its_norm_plus_the_constant(setting):
    """As the gradient of ``2 <g / (|g| + c), u>`` with the first factor held; ``residual`` keeps ``g^2``."""
    p, q, batch, x = setting
    method = eulerian(mlp, pair=fixed, diagonal=0.0, normalise=0.3)
    keys = example_keys(KEYS, jnp.arange(B))

    @jax.jit
    def both(p):
        v = u_of(q, x, S, S)
        g = u_of(p, x, S, T) - v - GAP * (jnp.einsum("bij,bj->bi", u_x(p, x, S, T), v) + u_s(p, x, S, T))
        unit = g / (jnp.linalg.norm(g, axis=1, keepdims=True) + 0.3)
        exact = jax.grad(lambda p: jnp.mean(2 * unit * u_of(p, x, S, T)))(p)
        return g, unit, exact, *jax.grad(lambda p: method.loss(p, q, batch, keys), has_aux=True)(p)

    g, unit, exact, grad, aux = both(p)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), grad, exact)
    np.testing.assert_allclose(aux["residual"], (g**2).mean(1), rtol=1e-12)
    np.testing.assert_allclose(aux["per_example"], (unit**2).mean(1), rtol=1e-12)


# --- what changes with the progress of training


@pytest.mark.parametrize("factory", [lagrangian, eulerian, progressive, flow_map_matching])
def test_annealing_bounds_the_jump_by_the_progress_and_ends(factory, setting):
    """``|t - s| <= progress / anneal`` in either order, reached where ``pair`` jumps further; the end is unannealed."""
    p, q, batch, _ = setting
    n = 64
    batch = Batch(jnp.tile(batch.x1, (11, 1))[:n])
    keys, progress = example_keys(KEYS, jnp.arange(n)), jnp.linspace(0, 0.2, n)
    ends = (None, jnp.full(n, 0.4)) if factory is lagrangian else (jnp.full(n, 0.4),)

    @jax.jit
    def drawn(p):
        of = lambda anneal: factory(mlp, pair=times.either_order, diagonal=0.0, anneal=anneal)
        aux = lambda anneal, progress: of(anneal).loss(p, q, batch._replace(progress=progress), keys)[1]
        return aux(0.0, None), aux(0.4, progress), [aux(0.4, end)["per_example"] for end in ends]

    free, aux, finished = drawn(p)
    expected = np.clip(free["t"] - free["s"], -progress / 0.4, progress / 0.4)
    np.testing.assert_allclose(aux["t"] - aux["s"], expected, atol=1e-14)
    assert (np.abs(expected) < np.abs(free["t"] - free["s"])).sum() > n / 4 and (expected < 0).sum() > n / 4
    for per_example in finished:
        np.testing.assert_allclose(per_example, free["per_example"], rtol=1e-9)


def test_the_eulerian_tangent_grows_over_the_warm_up_to_its_limit(setting):
    """``r = min(limit, progress / warmup)`` on ``(t - s) du``: progress 0.1 and 0.9 of a warm-up over 0.5, no word."""
    p, q, batch, x = setting
    for progress, r in ((0.1, 0.2), (0.9, 0.7), (None, 0.7)):
        moved = batch._replace(progress=None if progress is None else jnp.full(B, progress))
        method = eulerian(mlp, pair=fixed, diagonal=0.0, warmup=0.5, limit=0.7)
        value, _ = method.loss(p, q, moved, example_keys(KEYS, jnp.arange(B)))
        np.testing.assert_allclose(value, eulerian_formula("all", p, q, x, r)(p), rtol=1e-12)


# --- who pays for what


@pytest.mark.parametrize(
    ("factory", "options", "off"),
    [
        (lagrangian, {}, 2),
        (lagrangian, {"stop": "tangent"}, 2),
        (eulerian, {}, 2),
        (eulerian, {"stop": "jacobian"}, 3),
        (eulerian, dict.fromkeys(("velocity", "tangent"), "conditional"), 1),
        (eulerian, {"velocity": "conditional"}, 2),
        (progressive, {}, 3),
        (progressive, {"substeps": 4}, 5),
        (flow_map_matching, {}, 2),
    ],
)
def test_no_example_pays_for_two_terms(factory, options, off):
    """With a diagonal of 3/4 the net is evaluated once for 24 rows of 32, and ``off`` times for the other 8."""
    sizes = []

    def net(params, x, s, t, cond=None, key=None):
        sizes.append(len(x))
        return mlp(params, x, s, t)

    batch = Batch(jnp.zeros((32, 2)))
    method = factory(net, diagonal=0.75, **options)
    jax.eval_shape(method.loss, weights(0), weights(1), batch, example_keys(KEYS, jnp.arange(32)))
    assert sorted(sizes) == [8] * off + [24]


# --- kernels without a jvp


@jax.custom_vjp
def fused(a):
    """As fused attention: a custom gradient, and so no jvp."""
    return jnp.tanh(a)


fused.defvjp(lambda a: (jnp.tanh(a), a), lambda a, g: (g * (1 - jnp.tanh(a) ** 2),))


def fused_mlp(params, x, s, t, cond=None, key=None):
    wide = jnp.concatenate([x, expand(s, x) + 0 * x[:, :1], expand(t, x) + 0 * x[:, :1]], -1)
    return fused(wide @ params["in"]) @ params["out"]


@pytest.mark.parametrize(
    ("factory", "options"),
    [(lagrangian, {}), (eulerian, {}), (eulerian, {"stop": "jacobian"}), (progressive, {}), (flow_map_matching, {})],
)
def test_a_fused_kernel_is_replaced_where_a_jvp_is_taken(factory, options, setting):
    """Gradients are as without it; the kernel serves the diagonal; alone it has no jvp, as jax says."""
    p, q, batch, _ = setting
    batch = jax.tree.map(lambda a: a[:4], batch)
    keys = example_keys(KEYS, jnp.arange(4))
    called = []

    def net(*args):
        called.append(len(args[1]))
        return fused_mlp(*args)

    loss = lambda net: lambda p: factory(net, diagonal=0.5, **options).loss(p, q, batch, keys)[0]
    if factory is not progressive:
        with pytest.raises(TypeError, match="forward-mode autodiff"):
            jax.jit(loss(net))(p)
    called.clear()
    fused = Network(net, for_jvp=mlp)
    actual, expected = (jax.jit(jax.grad(loss(f)))(p) for f in (fused, mlp))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9), actual, expected)
    assert len(called) == {lagrangian: 2, eulerian: 2, progressive: 4, flow_map_matching: 2}[factory]


# --- use


@both_paths
def test_few_steps_of_the_exact_map_are_exact_in_both_directions(path, x64):
    oracle = gaussian(path)
    jump = lagrangian(oracles.average_velocity(oracle), path=path).flow_map(None)
    x0 = jax.random.normal(KEYS, (5, 2))
    x1 = oracle.flow_map(x0, 0.0, 1.0)
    for grid in (grids.uniform_grid(1), grids.uniform_grid(2), grids.uniform_grid(7), np.array([0, 0.05, 0.8, 1.0])):
        np.testing.assert_allclose(sampling.sample(jump, x0, grid), x1, atol=1e-12)
        np.testing.assert_allclose(sampling.sample(jump, x1, grid[::-1]), x0, atol=1e-12)


@pytest.mark.parametrize("choice", VELOCITIES)
def test_the_loss_on_the_diagonal_alone_is_flow_matching(choice, setting):
    """So a flow-matching checkpoint and its loss fit every flow map at ``diagonal=1``."""
    p, q, batch, _ = setting
    keys = example_keys(KEYS, jnp.arange(B))
    ours = [m(mlp, diagonal=1.0) for m in (lagrangian, progressive, flow_map_matching)]
    ours.append(eulerian(mlp, diagonal=1.0, velocity=choice))
    value = flow_matching(mlp).loss(p, q, batch, keys)[0]
    for method in ours:
        np.testing.assert_allclose(method.loss(p, q, batch, keys)[0], value, rtol=1e-12)
