"""The step against a plain one written out here: ``jax.grad``, optax, and the averages by their formulas."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax import training
from fmjax.keys import example_keys, normal
from fmjax.storage import checkpoint
from fmjax.training import sharding
from fmjax.types import Batch

ROWS = 16
KEY = jax.random.key(3)


def loss(params, target, batch, key):
    """Regression on a noised, moved target: every argument matters. One term has all its examples in few shards."""
    z = normal(key, batch.x1.shape[1:])
    x = batch.x1 + 0.1 * z
    pull = jax.lax.stop_gradient(jnp.tanh(x @ target["w"]))
    each = jnp.mean((jnp.tanh(x @ params["w"]) + params["b"] - 0.5 * pull - z) ** 2, -1)
    rare = batch.t < 3 / ROWS  # rows 0, 1, 2: the first of four devices, and no other
    aux = {"per_example": each, "is_rare": rare, "is_common": ~rare, "is_none": each < 0}
    gap = jnp.round(16 * batch.t) % 6 / 5  # 0, .2, .4, .6, .8, 1
    aux |= {"noise": z[:, 0], "s": batch.t * (1 - gap), "t": batch.t * (1 - gap) + gap, "residual": 3 * each}
    return each.mean(), aux


def start():
    k_w, k_b = jax.random.split(jax.random.key(1))
    return {"w": jax.random.normal(k_w, (8, 8)), "b": jax.random.normal(k_b, (8,))}


def batch_of(step, rows=ROWS):
    x1 = np.random.default_rng(step).standard_normal((rows, 8), np.float32)
    return Batch(x1, t=np.arange(rows, dtype=np.float32) / rows)


def mesh_of(count):
    return sharding.make_mesh(jax.devices()[:count])


def close(tree, expected, rtol=2e-5, atol=2e-6):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@functools.partial(jax.jit, static_argnums=0)
def differentiate(tx, params, target, batch, key, opt_state):
    (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, target, batch, key)
    updates, opt_state = tx.update(grads, opt_state, params)
    return aux, optax.tree.norm(grads), optax.apply_updates(params, updates), opt_state


def reference(tx, steps, ema=0.999, target="self", teacher=None):
    """What ``train.make_step`` promises, one device, no tricks: state and metrics after every step."""
    params, average = start(), start()
    opt_state = tx.init(params)
    for n in range(steps):
        keys = example_keys(jax.random.fold_in(KEY, n), jnp.arange(ROWS))
        pull = {"self": params, "ema": average, "frozen": teacher}[target]
        aux, norm, params, opt_state = differentiate(tx, params, pull, batch_of(n), keys, opt_state)
        d = min(ema, (1 + n) / (10 + n))
        average = {k: d * average[k] + (1 - d) * params[k] for k in params}
        each, rare = np.asarray(aux["per_example"]), np.asarray(aux["is_rare"])
        metrics = {"loss": each.mean(), "grad_norm": norm, "noise": aux["noise"].mean(), "residual": 3 * each.mean()}
        metrics |= {"rare": 3 * each[rare].mean(), "common": 3 * each[~rare].mean(), "none": 0.0}
        bins = np.array([0, 1, 2, 3, 4, 4])[np.arange(ROWS) % 6]  # the last closes (0.75, 1]
        metrics["by_gap"] = np.stack([np.bincount(bins, w, 5) for w in (3 * each, np.ones(ROWS))])
        yield training.State(jnp.int32(n + 1), params, opt_state, average), metrics


TX = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(optax.linear_schedule(0.02, 0.005, 3), weight_decay=0.1))


# "both" has a loss of its own: test_methods_self_corrected.py
@pytest.mark.parametrize("target", [name for name in training.TARGETS if name != "both"])
@pytest.mark.parametrize("fsdp", [False, True])
def test_every_step_is_the_plain_one(target, fsdp, monkeypatch):
    """Parameters, moments, average, loss, gradient norm and each term's mean, on four devices."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)
    teacher = jax.tree.map(lambda a: a[::-1], start()) if target == "frozen" else None
    mesh = mesh_of(4)
    state = training.init(start(), TX, mesh=mesh, fsdp=fsdp)
    assert (state.params["w"].addressable_shards[0].data.size == 16) == fsdp
    step = training.make_step(loss, TX, mesh=mesh, ema=0.2, target=target, fsdp=fsdp)
    for n, (expected, means) in enumerate(reference(TX, 4, 0.2, target, teacher)):
        state, metrics = step(state, batch_of(n), KEY, teacher)
        close(state, expected)
        close(metrics, means)


@pytest.mark.parametrize("ema", [0.0, 0.05, 0.15, 0.999])
def test_the_average_warms_up_and_is_of_the_new_parameters(ema):
    """Scalars by hand: w_n = -n under a gradient of one and a rate of one; d_n = min(ema, (1 + n) / (10 + n))."""
    ones = lambda params, target, batch, key: (params["w"], {"per_example": jnp.broadcast_to(params["w"], (2,))})
    step = training.make_step(ones, optax.sgd(1.0), mesh=mesh_of(2), ema=ema)
    state, average = training.init({"w": jnp.float32(0)}, optax.sgd(1.0), mesh=mesh_of(2)), 0.0
    for n in range(4):
        state, _ = step(state, Batch(np.zeros((2, 1), np.float32)), KEY)
        d = min(ema, (1 + n) / (10 + n))
        average = d * average + (1 - d) * -(n + 1)
        assert int(state.step) == n + 1 and float(state.params["w"]) == -(n + 1)
        np.testing.assert_allclose(state.ema["w"], average, rtol=1e-6)


def test_every_step_and_example_has_its_own_noise_on_any_mesh():
    """At a learning rate of zero only the keys differ between steps; their mean tells a repeated or a lost one."""
    noise = {}
    for count in (1, 2, 4, 8):
        tx = optax.sgd(0.0)
        state, step = training.init(start(), tx, mesh=mesh_of(count)), training.make_step(loss, tx, mesh=mesh_of(count))
        noise[count] = []
        for _ in range(2):
            state, metrics = step(state, batch_of(0), KEY)
            noise[count].append(float(metrics["noise"]))
    expected = [normal(example_keys(jax.random.fold_in(KEY, n), jnp.arange(ROWS)), (8,))[:, 0].mean() for n in (0, 1)]
    assert abs(expected[0] - expected[1]) > 0.01
    for values in noise.values():
        np.testing.assert_allclose(values, expected, atol=1e-6)


def test_host_arrays_and_placed_arrays_give_the_same_bits():
    mesh, tx = mesh_of(4), optax.adam(1e-2)
    step = training.make_step(loss, tx, mesh=mesh)
    place = functools.partial(sharding.place_batch, mesh=mesh)
    ways = (lambda b: b, lambda b: jax.tree.map(jnp.asarray, b), place, lambda b: jax.device_put(b, jax.devices()[7]))
    ends = [step(training.init(start(), tx, mesh=mesh), way(batch_of(0)), KEY) for way in ways]
    for end in ends[1:]:
        for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(ends[0]), strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("fsdp", [False, True])
def test_the_step_is_compiled_once_and_keeps_its_layout(fsdp, caplog, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)
    mesh, tx = mesh_of(4), optax.adam(1e-2)
    state = training.init(start(), tx, mesh=mesh, fsdp=fsdp)
    layout = jax.tree.map(lambda a: a.sharding, state)
    step = training.make_step(loss, tx, mesh=mesh, fsdp=fsdp)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for n in range(4):
            batch = batch_of(n) if n % 2 else sharding.place_batch(batch_of(n), mesh)
            state, _ = step(state, batch, jax.random.key(n))
            assert jax.tree.map(lambda a: a.sharding, state) == layout
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation of jit(update)" in r.getMessage()]
    assert len(compiled) == 1


def test_the_state_is_donated_and_what_init_was_given_is_not():
    mesh, tx, params = mesh_of(2), optax.adam(1e-2), start()
    state = training.init(params, tx, mesh=mesh)
    after, _ = training.make_step(loss, tx, mesh=mesh)(state, batch_of(0), KEY)
    assert all(a.is_deleted() for a in jax.tree.leaves((state.params, state.opt_state, state.ema)))
    assert not any(a.is_deleted() for a in jax.tree.leaves((params, after)))
    close(params, start())


def test_init_places_parameters_moments_and_average_alike(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)
    state = training.init(start(), optax.adam(1e-2), mesh=mesh_of(4), fsdp=True)
    adam = state.opt_state[0]
    for tree in (state.params, state.ema, adam.mu, adam.nu):
        assert tree["w"].addressable_shards[0].data.shape == (2, 8) and tree["b"].sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated and adam.count.sharding.is_fully_replicated
    assert int(state.step) == 0 and not np.any(adam.mu["w"])
    close((state.params, state.ema), (start(), start()))


def test_without_a_mesh_all_devices_are_used():
    state = training.init(start(), optax.sgd(0.1))
    assert state.params["w"].sharding.device_set == set(jax.devices())
    state, metrics = training.make_step(loss, optax.sgd(0.1))(state, batch_of(0), KEY)
    expected, means = next(reference(optax.sgd(0.1), 1))
    close((state, metrics), (expected, means))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"target": "slef"}, "target='slef': .* 'self'"), ({"ema": 1.0}, "ema=1.0"), ({"ema": -0.1}, "ema=-0.1")],
)
def test_wrong_options_are_refused_when_the_step_is_made(options, words):
    with pytest.raises(ValueError, match=words):
        training.make_step(loss, optax.sgd(0.1), mesh=mesh_of(1), **options)


def test_wrong_arguments_are_refused_before_anything_is_traced():
    def untouched(*args):
        raise AssertionError("the loss was traced")

    mesh, tx = mesh_of(4), optax.sgd(0.1)
    state = training.init(start(), tx, mesh=mesh)
    step = training.make_step(untouched, tx, mesh=mesh)
    frozen = training.make_step(untouched, tx, mesh=mesh, target="frozen")
    good = batch_of(0)
    for key in (jax.random.PRNGKey(0), jax.random.split(KEY, 4)):
        with pytest.raises(TypeError, match="one typed PRNG key"):
            step(state, good, key)
    with pytest.raises(ValueError, match="'self' takes no teacher"):
        step(state, good, KEY, start())
    with pytest.raises(ValueError, match="'frozen' needs teacher=params"):
        frozen(state, good, KEY)
    for rows, near in ((18, "use 16 or 20"), (3, "use 4")):
        with pytest.raises(ValueError, match=f"batch_size={rows} is not divisible by 4 devices; {near}"):
            step(state, batch_of(0, rows), KEY)
    assert not any(a.is_deleted() for a in jax.tree.leaves(state))


def some_frozen():
    """Adam for the matrix; the bias is frozen."""
    return optax.partition({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, {"w": "train", "b": "freeze"})


OPTIMISERS = {
    "partition": some_frozen,
    "masked": lambda: optax.masked(optax.adam(1e-2), {"w": True, "b": False}),
    "muon": lambda: optax.contrib.muon(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2),
    "schedule free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "apply if finite": lambda: optax.apply_if_finite(optax.MultiSteps(optax.adam(1e-2), 2), 3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_optimiser_of_optax_is_placed_and_steps(name, monkeypatch):
    """Four devices that split parameters and moments, whatever wraps them, give the numbers of one device."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 64)
    ends = []
    for count in (1, 4):
        mesh, tx, fsdp = mesh_of(count), OPTIMISERS[name](), count > 1
        step = training.make_step(loss, tx, mesh=mesh, fsdp=fsdp)
        state = training.init(start(), tx, mesh=mesh, fsdp=fsdp)
        moments = [a for a in jax.tree.leaves(state.opt_state) if a.shape == (8, 8)]
        assert moments and all(a.addressable_shards[0].data.size == 64 // count for a in moments)
        for n in range(2):
            state, _ = step(state, batch_of(n), KEY)
        ends.append(jax.device_get(state.params))
    close(*ends, rtol=1e-4, atol=1e-5)
    if name == "partition":
        np.testing.assert_array_equal(ends[1]["b"], start()["b"])
        assert np.abs(ends[1]["w"] - start()["w"]).min() > 0


def test_a_run_with_frozen_parameters_resumes_to_the_same_bits(tmp_path):
    mesh, tx = mesh_of(2), some_frozen()
    step = training.make_step(loss, tx, mesh=mesh)
    state = training.init(start(), tx, mesh=mesh)
    with checkpoint.writer(tmp_path) as manager:
        for n in range(4):
            state, _ = step(state, batch_of(n), KEY)
            if n == 1:
                checkpoint.save(manager, 2, state)
    _, resumed, _ = checkpoint.restore(tmp_path, training.init(start(), tx, mesh=mesh))
    for n in (2, 3):
        resumed, _ = step(resumed, batch_of(n), KEY)
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(state))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_average_is_carried_in_float32_whatever_the_parameters(dtype):
    """Parameters 1, an average that begins at 0, decay 0.999: 1 - 0.999^n; in bfloat16 it would stop at 0.25."""
    zero = lambda params, target, batch, key: (0 * params["w"].sum(), {"per_example": 0 * batch.x1[:, 0]})
    tx, mesh, steps = optax.sgd(0.0), mesh_of(1), 1500
    state = training.init({"w": jnp.ones(2, dtype)}, tx, mesh=mesh)
    late = jax.device_put((jnp.int32(10**6), jnp.zeros(2)), sharding.replicated(mesh))
    state = state._replace(step=late[0], ema={"w": late[1]})
    step, batch = training.make_step(zero, tx, mesh=mesh), sharding.place_batch(Batch(np.zeros((1, 1))), mesh)
    for _ in range(steps):
        state, _ = step(state, batch, KEY)
    assert state.params["w"].dtype == dtype and state.ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(state.ema["w"], 1 - 0.999**steps, rtol=1e-4)


def test_a_teacher_of_averages_computes_in_the_precision_of_the_parameters():
    dtypes = []

    def loss(params, target, batch, key):
        dtypes.append((params["w"].dtype, target["w"].dtype))
        return params["w"].sum().astype(jnp.float32), {"per_example": batch.x1[:, 0]}

    tx, mesh = optax.sgd(0.0), mesh_of(1)
    step = training.make_step(loss, tx, mesh=mesh, target="ema")
    step(training.init({"w": jnp.ones(2, jnp.bfloat16)}, tx, mesh=mesh), Batch(np.zeros((1, 1), np.float32)), KEY)
    assert {str(d) for pair in dtypes for d in pair} == {"bfloat16"}


def test_a_state_is_short_in_print():
    state = training.init({"w": jnp.zeros((1000, 50)), "b": jnp.zeros(7)}, optax.adam(1e-3), mesh=mesh_of(1))
    assert repr(state) == str(state) == "State(step=0, params=50,007 numbers in 2 arrays)"
    assert "State(step=" in repr(jax.eval_shape(lambda: state)) and len(repr(jax.eval_shape(lambda: state))) < 150
