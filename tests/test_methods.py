"""The battery: this file finds every method and held to what all methods promise.

A new method is covered by its file and one entry of ``cases.CASES``: its closed form on Gaussian data.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, SLOW, Alias, Case, Own, assert_same_method, case_of, discover, factory

from fmjax import paths, training
from fmjax.keys import example_keys, normal
from fmjax.storage import checkpoint
from fmjax.training import sharding
from fmjax.types import Batch, Net, Network, expand, over_batch

Z = 4.5  # two-sided, 7e-6 a test: some 200 z-tests under fixed seeds
FLOOR = 1e-6  # float64: the oracle's u is a quotient for |t - s| > 1e-4 and a trapezium, off by 1e-8 u'', below
KEYS = jax.random.key(11)


ALIASES = [name for name in discover() if isinstance(CASES.get(name), Alias)]
LEFT_OUT = [name for name in discover() if isinstance(CASES.get(name), Alias | Own)]


def over_methods(slow):
    """Every method but special cases; the names in ``slow`` with ``-m slow``."""
    marked = lambda n: pytest.param(n, marks=[pytest.mark.slow] if n in slow else [])
    return pytest.mark.parametrize("name", [marked(n) for n in discover() if n not in LEFT_OUT])


every_method = over_methods(SLOW)
# over devices others are as these: a batch that is split by terms, one that is not, and one that is attacked
OVER_DEVICES = {"lagrangian", "flow_matching", "classifier_corrector"}
# The path with a velocity that changes is the harder one, and is enough by default.
both_paths = pytest.mark.parametrize("path", [pytest.param(paths.linear, marks=pytest.mark.slow), paths.trigonometric])

# Directions to be wrong in, functions of (x, s, t). The second group vanishes where s = t.
ANYWHERE = {
    "1": lambda x, s, t: jnp.ones_like(x),
    "x0": lambda x, s, t: x * np.array([1, 0]),  # a coordinate each: what is wrong in both may cancel in their sum
    "x1": lambda x, s, t: x * np.array([0, 1]),
    "x[::-1]": lambda x, s, t: x[:, ::-1],
    "sin 2x": lambda x, s, t: jnp.sin(2 * x),
    "s x": lambda x, s, t: s * x,
    "t x": lambda x, s, t: t * x,
}
OFF_DIAGONAL = {
    "t-s": lambda x, s, t: (t - s) * jnp.ones_like(x),
    "(t-s) x": lambda x, s, t: (t - s) * x,
    "(t-s) s sin 2x": lambda x, s, t: (t - s) * s * jnp.sin(2 * x),
}
BASIS = ANYWHERE | OFF_DIAGONAL


def around(solution: Net) -> Net:
    """The solution plus ``sum_k params[k] phi_k(x, s, t)``: exact at ``params = 0``."""

    def net(params, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        phi = jnp.stack([f(x, expand(s, x), expand(t, x)) for f in BASIS.values()])
        return solution(None, x, s, t) + jnp.tensordot(params, phi, 1)

    return net


def mean_gradients(case: Case, params, groups=4096, rows=8):
    """The expected gradient at each of ``params``, ``[P, K]``, and its standard error, from independent batches."""
    loss = case.make(around(case.solution)).loss

    @jax.jit
    def moments(key):
        flat = case.batch(key, groups * rows)
        batches = jax.tree.map(lambda a: a.reshape(groups, rows, *a.shape[1:]), flat)
        keys = example_keys(KEYS, jnp.arange(groups * rows)).reshape(groups, rows)

        def at(params):  # target and student alike
            gradient = lambda batch, key: jax.grad(loss, has_aux=True)(params, params, batch, key)[0]
            g = jax.vmap(gradient)(batches, keys)
            return g.mean(0), g.std(0, ddof=1) / groups**0.5

        return jax.lax.map(at, params)

    return map(np.asarray, moments(jax.random.key(5)))


@every_method
@both_paths
def test_the_closed_form_is_a_stationary_point_and_descent_returns_to_it(name, path, x64):
    """E grad = 0 at the solution; a step away along phi_k, the gradient points back, by more than chance."""
    case, names = case_of(name, path()), list(BASIS)
    away = case.away * jnp.eye(len(names))
    mean, error = mean_gradients(case, jnp.concatenate([jnp.zeros_like(away[:1]), away]))
    off = np.array([phi in OFF_DIAGONAL for phi in names]) & ("flow_map" not in case.uses)
    assert not mean[:, off].any(), f"{name} has no flow map but evaluates the net off the diagonal"
    z = mean[0] / (error[0] + FLOOR / Z)
    assert (np.abs(z) < Z).all(), f"not stationary: z = {dict(zip(names, z, strict=True))}"
    back, chance = np.diag(mean[1:])[~off], Z * np.diag(error[1:])[~off] + FLOOR
    stuck = [phi for phi, no in zip(np.array(names)[~off], back <= chance, strict=True) if no]
    assert not stuck, f"descent does not return along {stuck}: {back} against {chance}"


@every_method
@both_paths
def test_the_net_is_evaluated_at_points_of_their_source_time(name, path):
    """At the solution every (x, s) has x ~ p_s and s <= t: first and second moments, alone and against s."""
    case = case_of(name, path())
    seen = []

    def net(params, x, s, t, cond=None, key=None):
        jax.debug.callback(lambda *a: seen.append(a), case.standard(x, over_batch(s, x)), s, t)
        return case.solution(None, x, s, t)

    n = 20_000
    loss = jax.jit(lambda key: case.make(net).loss(None, None, case.batch(key, n), example_keys(KEYS, jnp.arange(n))))
    jax.block_until_ready(loss(jax.random.key(6)))
    jax.effects_barrier()
    assert seen
    for r, s, t in seen:
        assert case.inverts or (s <= t).all()
        for power in (r, r**2 - 1, r[:, :1] * r[:, 1:]):
            for moment in (power, power * (s[:, None] - 0.5)):
                z = moment.mean(0) / (moment.std(0) / len(r) ** 0.5)
                assert np.abs(z).max() < Z, f"x does not have the distribution at s: z = {z}"


@every_method
@both_paths
def test_every_use_of_the_solution_is_the_closed_form(name, path, x64):
    case = case_of(name, path())
    method = case.make(case.solution)
    offered = {use for use in ("velocity", "flow_map", "direction", "score") if getattr(method, use) is not None}
    assert offered == set(case.uses), f"{name} offers {offered}, its case states {set(case.uses)}"
    x, s, t = jax.random.normal(KEYS, (6, 2)), jnp.linspace(0, 0.7, 6), jnp.linspace(0.2, 1, 6)
    for use, exact in case.uses.items():
        for times in ((s, t), (0.25, 0.75)):
            at = times if use == "flow_map" else times[1:]
            if use == "score":  # on a path without a latent it has no value at t = 1
                at = (0.9 * at[0],)
            np.testing.assert_allclose(getattr(method, use)(None)(x, *at), exact(x, *at), rtol=0, atol=1e-12)


def mlp(params, x, s, t, cond=None, key=None):
    s, t = expand(over_batch(s, x), x), expand(over_batch(t, x), x)
    return jnp.tanh(jnp.concatenate([x, s, t], -1) @ params["in"] + params["bias"]) @ params["out"]


def mlp_params(seed=0, width=16):
    rng = np.random.default_rng(seed)
    shapes = {"in": (4, width), "bias": (width,), "out": (width, 2)}
    return {name: jnp.asarray(rng.standard_normal(shape, np.float32)) for name, shape in shapes.items()}


@functools.cache
def setting(name: str):
    """A method over the small net, its loss compiled, a batch of 32 and keys."""
    case = case_of(name)
    method = case.make(mlp)
    return method, jax.jit(method.loss), case.batch(jax.random.key(7), 32), example_keys(KEYS, jnp.arange(32))


@every_method
def test_a_jump_of_no_length_is_the_identity_to_the_bit(name):
    if (method := case_of(name).make(mlp)).flow_map is None:
        return
    x, t = 3 * jax.random.normal(KEYS, (64, 2)), jnp.linspace(0, 1, 64)
    flow_map = method.flow_map(mlp_params())
    for f, at in itertools.product((flow_map, jax.jit(flow_map)), (t, 0.0, 0.3, 1.0)):
        assert np.asarray(f(x, at, at)).tobytes() == np.asarray(x).tobytes()
    assert (np.asarray(flow_map(x, t * 0.5, t)) != np.asarray(x))[1:].all()


@every_method
def test_the_loss_is_the_mean_of_per_example_and_aux_is_per_example(name):
    _, loss, batch, keys = setting(name)
    value, aux = loss(mlp_params(), mlp_params(1), batch, keys)
    np.testing.assert_allclose(value, np.mean(aux["per_example"]), rtol=1e-6)
    assert all(a.shape == (32,) and (a.dtype == bool) == k.startswith("is_") for k, a in aux.items())


@every_method
def test_the_loss_is_determined_by_its_keys_and_no_example_sees_another(name):
    _, loss, batch, keys = setting(name)
    each = lambda batch, keys: np.asarray(loss(mlp_params(), mlp_params(1), batch, keys)[1]["per_example"])
    first, others = each(batch, keys), example_keys(jax.random.key(12), jnp.arange(32))
    draws = case_of(name).draws
    assert (each(batch, keys) == first).all() and ((each(batch, others) != first) == draws).all()
    for i in (0, 1, 13):
        rekeyed = each(batch, keys.at[i].set(others[i]))
        changed = each(batch._replace(x1=batch.x1.at[i].add(0.1)), keys)
        assert np.flatnonzero(rekeyed != first).tolist() == [i] * draws
        assert np.flatnonzero(changed != first).tolist() == [i]


@every_method
def test_a_loss_does_not_depend_on_place_nor_on_batch_size(name):
    """Rows may be dealt to terms by their place: places are permuted within each term, halves are whole units."""
    _, loss, batch, keys = setting(name)
    take = lambda index: (jax.tree.map(lambda a: a[index], batch), keys[index])
    each = lambda index: loss(mlp_params(), mlp_params(1), *take(index))[1]
    aux = each(np.arange(32))
    term = sum(2**i * a.astype(int) for i, (k, a) in enumerate(aux.items()) if k.startswith("is_")) + np.zeros(32)
    shuffled, order = np.random.default_rng(0).permutation(32), np.arange(32)
    order[np.argsort(term, kind="stable")] = shuffled[np.argsort(term[shuffled], kind="stable")]
    for index in (order, np.arange(16), np.arange(16, 32)):
        np.testing.assert_allclose(each(index)["per_example"], aux["per_example"][index], rtol=1e-5)


@every_method
def test_no_key_is_used_twice(name):
    """JAX's own checker of consumed keys, with a net that draws; eager: under jit it refuses rows of one array."""
    _, _, batch, keys = setting(name)

    def net(params, x, s, t, cond=None, key=None):
        return mlp(params, x, s, t) + (0 if key is None else normal(key, x.shape[1:]))

    with jax.debug_key_reuse(True):
        case_of(name).make(net).loss(mlp_params(), mlp_params(1), batch, jax.random.clone(keys))


@every_method
def test_the_teacher_is_an_argument_and_gets_no_gradient(name):
    method, compiled, batch, keys = setting(name)
    loss = lambda params, target: compiled(params, target, batch, keys)[0]
    to_params, to_target = jax.grad(loss, (0, 1))(mlp_params(), mlp_params(1))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(to_params))
    assert not any(np.any(g) for g in jax.tree.leaves(to_target))
    changes = bool(loss(mlp_params(), mlp_params(1)) != loss(mlp_params(), mlp_params(2)))
    assert changes == case_of(name).teacher, f"{name}: its case says teacher={case_of(name).teacher}"
    captured = jax.make_jaxpr(method.loss)(mlp_params(), mlp_params(1), batch, keys).consts
    assert all(np.size(c) <= 32 for c in captured), "arrays are captured by the loss: make them arguments"


@every_method
def test_a_loss_accepts_one_key_or_one_key_per_example(name):
    method, _, batch, keys = setting(name)
    shapes = lambda key: jax.eval_shape(method.loss, mlp_params(), mlp_params(1), batch, key)
    assert shapes(KEYS) == shapes(keys)
    with pytest.raises(ValueError, match=r"key.*\(31,\).*\(32,\)"):
        shapes(keys[:31])


def test_one_key_stands_for_the_keys_of_the_examples():
    _, loss, batch, keys = setting("flow_matching")
    values = (loss(mlp_params(), mlp_params(1), batch, key)[1]["per_example"] for key in (KEYS, keys))
    np.testing.assert_array_equal(*values)


@every_method
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(name, tmp_path):
    """Four steps of other batches and keys, two of them again from a checkpoint; all of them by one trace."""
    case, mesh, tx = case_of(name), sharding.make_mesh(jax.devices()[:2]), optax.adam(1e-2)
    fresh = lambda seed: training.init(mlp_params(seed), tx, mesh=mesh)
    chex.clear_trace_counter()
    loss = chex.assert_max_traces(case.make(mlp).loss, n=1)
    step = training.make_step(loss, tx, mesh=mesh, target="ema")

    def run(state, first, last):
        history = []
        for i in range(first, last):
            key = jax.random.fold_in(KEYS, i)
            state, metrics = step(state, case.batch(jax.random.fold_in(jax.random.key(8), i), 16), key)
            history.append(jax.tree.map(np.asarray, metrics))
        return state, history

    whole, history = run(fresh(0), 0, 4)
    halfway, _ = run(fresh(0), 0, 2)
    with checkpoint.writer(tmp_path) as manager:
        checkpoint.save(manager, 2, halfway)
    _, restored, _ = checkpoint.restore(tmp_path, fresh(1))
    resumed, history_later = run(restored, 2, 4)
    assert len({float(metrics["loss"]) for metrics in history}) == 4 and int(resumed.step) == 4
    assert jax.tree.structure(whole) == jax.tree.structure(resumed)
    for a, b in zip(jax.tree.leaves((whole, history[2:])), jax.tree.leaves((resumed, history_later)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_another_frozen_teacher_needs_no_new_trace():
    method, _, batch, _ = setting("lagrangian")
    chex.clear_trace_counter()
    mesh, tx = sharding.make_mesh(jax.devices()[:2]), optax.adam(1e-2)
    step = training.make_step(chex.assert_max_traces(method.loss, n=1), tx, mesh=mesh, target="frozen")
    state, losses = training.init(mlp_params(), tx, mesh=mesh), set()
    for i in range(3):
        teacher = jax.tree.map(lambda a, i=i: a + i, mlp_params(1))
        state, metrics = step(state, batch._replace(x1=batch.x1 + i), jax.random.key(i), teacher)
        losses.add(float(metrics["loss"]))
    assert len(losses) == 3


@over_methods(set(discover()) - OVER_DEVICES)
def test_loss_gradient_and_parameters_do_not_depend_on_the_devices(name, monkeypatch):
    """Two SGD steps, parameters whole or split over the devices, against ``jax.grad`` of the whole batch."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 16)
    method, _, batch, _ = setting(name)
    rate, teacher, expected, history = 0.1, mlp_params(1), mlp_params(), []
    for n in range(2):
        keys = example_keys(jax.random.fold_in(KEYS, n), jnp.arange(32))
        (value, _), grads = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(expected, teacher, batch, keys)
        expected = jax.tree.map(lambda p, g: p - rate * g, expected, grads)
        history.append((value, optax.tree.norm(grads)))
    # every count for the loss whose batch is split by terms, the extremes for the others
    many = [(1, False), (2, False), (4, False), (8, False), (2, True), (8, True)]
    for count, fsdp in many if name == "lagrangian" else [(8, False), (2, True)]:
        mesh, tx = sharding.make_mesh(jax.devices()[:count]), optax.sgd(rate)
        state = training.init(mlp_params(), tx, mesh=mesh, fsdp=fsdp)
        step = training.make_step(method.loss, tx, mesh=mesh, target="frozen", fsdp=fsdp)
        for value in history:
            state, metrics = step(state, batch, KEYS, teacher)
            np.testing.assert_allclose([metrics["loss"], metrics["grad_norm"]], value, rtol=1e-5)
        assert fsdp == any(sharding.AXIS in a.sharding.spec for a in state.params.values())
        chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.usefixtures("x64")
def test_a_special_case_is_the_general_method_with_arguments(name):
    """All along the training (``progress``), for a target that is not the student."""
    path, wide = paths.trigonometric(), lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64), tree)
    general = case_of(CASES[name].of)
    batch = general.batch(jax.random.key(7), 32)._replace(progress=jnp.linspace(0, 1, 32, endpoint=False))
    assert_same_method(
        factory(name)(mlp, path=path), factory(CASES[name].of)(mlp, path=path, **CASES[name].options),
        wide(batch), example_keys(KEYS, jnp.arange(32)), wide(mlp_params()), wide(mlp_params(1)),
    )  # fmt: skip


ROWS = Batch(np.ones((4, 2), np.float32), **{n: np.ones((4, 2), np.float32) for n in ("x0", "negative")})
WRONG = {  # field -> values that broadcast against four examples [2], or are cast without a word
    "x1": (1.0, np.ones((0, 2), np.float32), np.ones((4, 2), np.uint8), [[1.0, 2.0]] * 4),
    "x0": (np.ones(2, np.float32), np.ones((1, 2), np.float32), np.ones((4, 1), np.float32), np.ones((4, 2), int)),
    "negative": (np.float32(1), np.ones((1, 2), np.float32), np.ones((4, 2), int)),
    "t": (
        np.float32(0.5),
        np.ones(1, np.float32),
        np.ones((4, 1), np.float32),
        np.ones(2, np.float32),
        np.ones(4, int),
    ),
    "progress": (np.float32(0.5), np.ones(1, np.float32), np.ones((4, 1), np.float32)),
    "cond": (np.int32(3), np.ones(1, int), np.ones(3, int), {"a": np.ones(4), "b": np.ones((2, 4))}),
}


@pytest.mark.parametrize("name", discover())
def test_a_batch_that_would_broadcast_is_refused_by_its_field(name):
    net = Network(lambda params, x, s, t, cond=None, key=None: x, encoder=lambda *args: args[1])
    options = {"contrastive": {"mean": np.zeros(2)}, "score_corrector": {"sigma": 0.1}}.get(name, {})
    options |= {"bounds": (0.0, 1.0)} if name == "straighten" else {}
    options |= {"critic": lambda *args: args[1][:, 0]} if name == "self_corrected" else {}
    loss = factory(name)(net, **options).loss
    tokens = name in ("categorical_ratio_matching", "discrete_flow_matching")  # their data are integers
    right = jax.tree.map(lambda a: a.astype(int), ROWS) if tokens else ROWS
    for field, values in WRONG.items():
        for value in values:
            if tokens and field in ("x1", "x0", "negative") and np.asarray(value).dtype.kind in "iu":
                value = np.asarray(value, float)
            with pytest.raises((TypeError, ValueError), match=rf"^batch\.{field}[=\[]") as error:
                loss({}, {}, right._replace(**{field: value}), jax.random.key(0))
            assert len(str(error.value)) <= 300 and "\n" not in str(error.value)


def test_every_method_file_has_a_factory_and_an_entry():
    for name in discover():
        factory(name)
        assert name in LEFT_OUT or case_of(name)
    assert set(CASES) == set(discover()) >= {"flow_matching", "lagrangian", "score_corrector"}


def test_a_method_without_an_entry_fails_with_what_to_add():
    with pytest.raises(pytest.fail.Exception, match=r"does not know no_method: add CASES\['no_method'\]"):
        case_of("no_method")
