"""Batch statistics of Linen, NNX and Equinox: used, updated, averaged over devices, kept by a run that resumes."""

import textwrap

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from laboratory import PLAIN, config_file, run
from laboratory import laboratory as laboratory  # a fixture

import fmjax
from fmjax import methods, nets, training
from fmjax.storage import checkpoint
from fmjax.types import Batch, Method

X = jnp.asarray(np.random.default_rng(0).normal(3.0, 2.0, (16, 3)), jnp.float32)
T = jnp.linspace(0.1, 0.9, 16)
KEEP = 0.75


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, t, *, frozen):
        return nn.BatchNorm(use_running_average=frozen, momentum=KEEP, epsilon=1e-5)(x) * (1 + t[:, None])


class NNX(nnx.Module):
    def __init__(self):
        self.norms = nnx.List([nnx.BatchNorm(3, momentum=KEEP, epsilon=1e-5, rngs=nnx.Rngs(0))])

    def __call__(self, x, t):
        return self.norms[0](x) * (1 + t[:, None])


class Equinox(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self, mode="batch"):
        self.norm = eqx.nn.BatchNorm(3, "rows", momentum=KEEP, eps=1e-5, mode=mode)

    def __call__(self, x, t, state):
        y, state = self.norm(x, state)
        return y * (1 + t), state


def equinox(**options):
    module, batch_state = eqx.nn.make_with_state(Equinox)(**options)
    call = lambda module, x, s, t, cond, key, state: module(x, t, state)
    return nets.from_equinox(module, call=call, batch_state=batch_state, axis="rows")


ADAPTED = {
    "linen": lambda: nets.from_linen(Linen(), call=lambda m, x, s, t, cond, train: m(x, t, frozen=not train)),
    "nnx": lambda: nets.from_nnx(NNX(), call=lambda m, x, s, t, cond: m(x, t)),
    "equinox": equinox,
}


def moments(params):
    """The running mean and variance among the state."""
    arrays = [np.asarray(a) for a in jax.tree.leaves(params["state"]) if np.shape(a) == (3,)]
    assert len(arrays) == 2
    return arrays


def evaluated(model, key):
    """A method whose loss evaluates the network at the data, twice with a gradient and once without."""

    def loss(params, target, batch, keys):
        y = model.net(params, batch.x1, T[: len(batch.x1)], T[: len(batch.x1)], None, keys)
        jax.lax.stop_gradient(model.net(target, batch.x1, 0.0, 0.0, None, keys))
        each = (y**2).mean(1)
        return 5 * each.mean(), {"per_example": each}

    return Method(loss)


@pytest.mark.parametrize("library", ADAPTED)
def test_statistics_are_of_the_batch_in_training_and_the_running_ones_otherwise(library, key):
    model = ADAPTED[library]()
    params = model.init(key, X)
    net = jax.jit(model.net)
    scale = 1 + T[:, None]
    normed = (X - X.mean(0)) / np.sqrt(X.var(0) + 1e-5)
    np.testing.assert_allclose(net(params, X, T, T, None, key), normed * scale, atol=2e-4)
    mean, var = moments(params)
    moved = jax.tree.map(lambda a: a + 1.0 if np.shape(a) == (3,) else a, params)
    if library == "equinox":  # its running moments are scaled by the number of batches
        rows = net(moved, X, T, T)
        np.testing.assert_allclose(net(moved, X[:4], T[:4], T[:4]), rows[:4], rtol=1e-5)
        assert np.abs(rows - net(params, X, T, T)).max() > 0.1
        return
    mean, var = moments(moved)
    scaled = lambda weight, bias: ((X - mean) / np.sqrt(var + 1e-5) * weight + bias) * scale
    np.testing.assert_allclose(net(moved, X, T, T), scaled(2.0, 1.0), atol=2e-4)  # weight 1 + 1, bias 0 + 1


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("library", ADAPTED)
def test_a_step_writes_the_mean_of_the_devices_statistics(library, devices, key):
    """Whatever the optimiser, the factor of the loss, and the evaluations without a gradient."""
    model = ADAPTED[library]()
    mesh = training.sharding.make_mesh(jax.devices()[:devices])
    tx = optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(1e-9))
    params = model.init(key, X)
    first = moments(params)
    state = training.init(params, tx, mesh=mesh)
    step = training.make_step(evaluated(model, key).loss, tx, mesh=mesh, ema=0.5)
    parts = X.reshape(devices, -1, 3)
    batch = parts.mean(1).mean(0), parts.var(1).mean(0)
    state, _ = step(state, Batch(X), key)
    want = [KEEP * old + (1 - KEEP) * new for old, new in zip(first, batch, strict=True)]
    for seen, truth in zip(moments(jax.device_get(state.params)), want, strict=True):
        np.testing.assert_allclose(seen, truth, rtol=2e-5, atol=1e-5)
    state, _ = step(state, Batch(X), key)
    want = [KEEP * old + (1 - KEEP) * new for old, new in zip(want, batch, strict=True)]
    for seen, truth in zip(moments(jax.device_get(state.params)), want, strict=True):
        np.testing.assert_allclose(seen, truth, rtol=2e-5, atol=1e-5)


def test_flags_in_the_state_are_refused():
    with pytest.raises(ValueError, match=r"^module=Equinox: its state has a flag.*mode='batch'"):
        equinox(mode="ema")


def test_a_counter_of_equinox_counts(key):
    model = equinox()
    params = model.init(key, X)
    mesh = training.sharding.make_mesh(jax.devices()[:1])
    step = training.make_step(evaluated(model, key).loss, optax.sgd(0.0), mesh=mesh)
    state = training.init(params, optax.sgd(0.0), mesh=mesh)
    for _ in range(3):
        state, _ = step(state, Batch(X), key)
    (counter,) = (a for a in jax.tree.leaves(state.params["state"]) if a.ndim == 0)
    assert counter == 3


@pytest.mark.parametrize("library", ADAPTED)
def test_losses_with_a_jvp_train_networks_with_statistics(library, key):
    model = ADAPTED[library]()
    params = model.init(key, X)
    loss = methods.lagrangian(model.net, diagonal=0.5).loss
    grads = jax.jit(jax.grad(lambda p: loss(p, p, Batch(jnp.asarray(X)), key)[0]))(params)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(grads))


def test_only_state_beside_parameters_is_written():
    """Entries that a wrapper adds beside both (a learned weight, an encoder) are trained like parameters."""
    params = {"params": jnp.ones(2), "state": jnp.ones(2), "log_variance": {"state": jnp.ones(2)}}
    tx = nets.state.keep_state(optax.sgd(0.5))
    updates, _ = tx.update(jax.tree.map(lambda a: 0.1 * a, params), tx.init(params), params)
    first = jax.tree.map(lambda a: round(float(a[0]), 6), updates)
    assert first == {"params": -0.05, "state": -0.1, "log_variance": {"state": -0.05}}


def test_a_network_without_statistics_keeps_its_parameters_and_optimiser(key):
    model = nets.from_linen(nn.Dense(3), call=lambda m, x, s, t, cond, train: m(x))
    params = model.init(key, X)
    assert sorted(params) == ["bias", "kernel"]
    tx = optax.adam(1e-3)
    assert jax.tree.structure(nets.state.keep_state(tx).init(params)) == jax.tree.structure(tx.init(params))


NETWORKS = """
    import equinox as eqx, jax, jax.numpy as jnp
    from flax import nnx
    from fmjax import nets

    class Two(nnx.Module):
        def __init__(self, rngs):
            self.a, self.norm = nnx.Linear(3, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
            self.drop, self.b = nnx.Dropout(0.3, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x, t):
            h = jnp.tanh(self.norm(self.a(jnp.concatenate([x, t[:, None]], 1))))
            return self.b(self.drop(h))

    def nnx_net(*, seed: int = 0):
        return nets.from_nnx(Two(nnx.Rngs(seed)), call=lambda m, x, s, t, cond: m(x, t))

    class One(eqx.Module):
        a: eqx.nn.Linear
        b: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout

        def __init__(self):
            k = jax.random.split(jax.random.key(0))
            self.a, self.b = eqx.nn.Linear(3, 8, key=k[0]), eqx.nn.Linear(8, 2, key=k[1])
            self.norm, self.drop = eqx.nn.BatchNorm(8, "batch", mode="batch"), eqx.nn.Dropout(0.3)

        def __call__(self, x, s, t, cond=None, *, key=None, state=None):
            h, state = self.norm(self.a(jnp.concatenate([x, t[None]])), state)
            return self.b(self.drop(jnp.tanh(h), key=key)), state

    def equinox_net():
        module, state = eqx.nn.make_with_state(One)()
        return nets.from_equinox(module, batch_state=state)
"""


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_a_killed_run_resumes_to_the_same_bits_and_loads(library, laboratory, tmp_path):
    """Parameters, statistics and their averages, by the commands; the folder alone gives the trained network."""
    (tmp_path / "own.py").write_text(textwrap.dedent(NETWORKS))
    assert PLAIN["name"] == "plain"
    file = config_file(tmp_path, net={"name": f"{tmp_path}/own.py:{library}_net"}, steps=8, save_every=4)
    run("train", f"--config={file}", f"--workdir={tmp_path / 'whole'}")
    run("train", f"--config={file}", f"--workdir={tmp_path / 'parts'}", "--config.steps=4")
    run("train", f"--config={file}", f"--workdir={tmp_path / 'parts'}")
    whole, parts = (checkpoint.restore(tmp_path / w / "flow" / "checkpoints")[1] for w in ("whole", "parts"))
    same = jax.tree.map(np.array_equal, whole, parts)
    assert all(jax.tree.leaves(same)) and len(jax.tree.leaves(same)) > 10
    trained = fmjax.load(tmp_path / "whole", trust=True)
    counts = [np.abs(a).max() for a in jax.tree.leaves(trained.params["state"])]
    assert min(counts) > 0
    x = trained.sample(5, solver="euler", steps=2)
    assert np.isfinite(x).all()
    twice = np.asarray(trained.velocity(x[:2], 0.5))
    np.testing.assert_allclose(twice, np.asarray(trained.velocity(x, 0.5))[:2], atol=1e-5)  # no statistics of a batch
