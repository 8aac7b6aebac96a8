"""Meshes, layouts, the mean over devices, and two real processes."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax.training import sharding
from fmjax.types import Batch

AXIS = sharding.AXIS


def mesh_of(count):
    return sharding.make_mesh(jax.devices()[:count])


def test_the_mesh_has_one_auto_axis_over_all_devices_or_those_given():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {AXIS: 8} and list(mesh.devices) == jax.devices()
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
    assert list(sharding.make_mesh(jax.devices()[3:5]).devices) == jax.devices()[3:5]


@pytest.mark.parametrize(
    ("size", "devices", "near"), [(10, 4, "8 or 12"), (3, 4, "4"), (0, 4, "4"), (-4, 4, "4"), (9, 8, "8 or 16")]
)
def test_a_batch_that_devices_do_not_divide_is_refused_with_sizes(size, devices, near):
    sentence = f"batch_size={size} is not divisible by {devices} devices; use {near}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        sharding.check_batch(size, mesh_of(devices))
    for fits in (devices, 3 * devices):
        sharding.check_batch(fits, mesh_of(devices))


def test_a_placed_batch_is_split_by_rows_in_order():
    mesh = mesh_of(4)
    batch = Batch(np.arange(24.0, dtype=np.float32).reshape(8, 3), cond={"label": np.arange(8)}, t=jnp.arange(8.0))
    placed = sharding.place_batch(batch, mesh)
    assert placed.x0 is None
    for leaf, host in zip(jax.tree.leaves(placed), jax.tree.leaves(batch), strict=True):
        assert leaf.sharding == NamedSharding(mesh, P(AXIS))
        np.testing.assert_array_equal(leaf, host)
        assert len(leaf.addressable_shards) == 4
        for shard in leaf.addressable_shards:
            i = list(mesh.devices).index(shard.device)
            np.testing.assert_array_equal(shard.data, np.asarray(host)[2 * i : 2 * i + 2])
    with pytest.raises(ValueError, match="batch_size=6 is not divisible by 4 devices; use 4 or 8"):
        sharding.place_batch(jax.tree.map(lambda a: a[:6], batch), mesh)


def test_specs_split_the_largest_axis_that_fits_and_no_small_array():
    limit = sharding.SMALLEST_SPLIT
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    tree = {
        "first": shape(2048, 64),
        "last": shape(3, 3, 64, 2048),
        "only divisible": shape(9999, 8),
        "at the limit": shape(limit),
        "below": shape(limit - 8),
        "indivisible": shape(9999, 9),
        "scalar": shape(),
    }
    whole = dict.fromkeys(tree, P())
    assert sharding.specs(tree, mesh_of(8)) == whole
    split = {"first": P(AXIS, None), "last": P(None, None, None, AXIS), "only divisible": P(None, AXIS)}
    assert sharding.specs(tree, mesh_of(8), fsdp=True) == whole | split | {"at the limit": P(AXIS)}


PARAMS = {"w": np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8), "b": np.linspace(0, 1, 8, dtype=np.float32)}
X = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)


def squares(params, x):
    return jnp.mean((x @ params["w"] + params["b"]) ** 2)


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("split", [{"w": P(), "b": P()}, {"w": P(None, AXIS), "b": P(AXIS)}])
def test_gathered_parameters_have_the_gradient_of_the_global_mean(check_vma, count, split):
    """The trap: gradients of replicated inputs arrive summed under ``check_vma=True`` and local without it."""
    mesh = mesh_of(count)

    def local(params, x):
        whole = sharding.gather(params, split)
        assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, PARAMS)
        return sharding.scatter_mean(jax.grad(squares)(whole, x), split)

    step = jax.shard_map(local, mesh=mesh, in_specs=(split, P(AXIS)), out_specs=split, check_vma=check_vma)
    grads, expected = jax.jit(step)(PARAMS, X), jax.grad(squares)(PARAMS, X)
    for name in PARAMS:
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5, atol=1e-6)
        assert grads[name].sharding.is_equivalent_to(NamedSharding(mesh, split[name]), grads[name].ndim)


def test_without_gather_the_mean_is_wrong_by_the_number_of_devices():
    """What ``gather`` is for: the plain recipe is off by a factor of 8 under ``check_vma=True``."""
    local = lambda params, x: jax.tree.map(lambda g: jax.lax.pmean(g, AXIS), jax.grad(squares)(params, x))
    plain = jax.shard_map(local, mesh=mesh_of(8), in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=True)
    np.testing.assert_allclose(jax.jit(plain)(PARAMS, X)["w"], 8 * jax.grad(squares)(PARAMS, X)["w"], rtol=1e-5)


def test_gather_then_scatter_of_equal_arrays_is_the_identity():
    split = {"w": P(AXIS, None), "b": P(AXIS)}
    round_trip = lambda params: sharding.scatter_mean(sharding.gather(params, split), split)
    step = jax.shard_map(round_trip, mesh=mesh_of(4), in_specs=(split,), out_specs=split)
    back = jax.jit(step)(PARAMS)
    for name in PARAMS:
        np.testing.assert_array_equal(back[name], PARAMS[name])


@pytest.fixture
def environment(monkeypatch):
    """No ``FMJAX_`` variables and no compilation cache; what ``start`` sets is undone."""
    for name in [n for n in os.environ if n.startswith("FMJAX_")]:
        monkeypatch.delenv(name)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield monkeypatch
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"FMJAX_DISTRIBUTED": "yes"}, "FMJAX_DISTRIBUTED='yes' must be 0 or 1"),
        (
            {"FMJAX_DISTRIBUTED": "1", "FMJAX_COORDINATOR": "h:1"},
            "FMJAX_COORDINATOR is set, so FMJAX_PROCESSES must be a number too",
        ),
        (
            {"FMJAX_DISTRIBUTED": "1", "FMJAX_COORDINATOR": "h:1", "FMJAX_PROCESSES": "2", "FMJAX_PROCESS": "first"},
            "FMJAX_COORDINATOR is set, so FMJAX_PROCESS must be a number too",
        ),
    ],
)
def test_a_wrong_environment_is_refused_with_the_variable_named(variables, sentence, environment, tmp_path):
    environment.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sharding.start()


@pytest.mark.parametrize("distributed", [None, "", "0"])
def test_one_process_starts_alone_with_a_compilation_cache(distributed, environment, tmp_path):
    environment.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment.setenv("FMJAX_COORDINATOR", "ignored:1")
    if distributed is not None:
        environment.setenv("FMJAX_DISTRIBUTED", distributed)
    sharding.start()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "fmjax" / "xla")
    assert not jax.distributed.is_initialized()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    sharding.start()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# Three SGD steps of flow matching, replicated and split, from rows that each process makes of the global batch.
TRAINING = """
import json, sys
from fmjax.training import sharding
sharding.start()
import jax, numpy as np, optax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from fmjax import training as train
from fmjax.storage import checkpoint
from fmjax.methods.flow_matching import flow_matching
from fmjax.types import Batch, expand

sharding.SMALLEST_SPLIT = 16
def net(params, x, s, t, cond=None, key=None):
    return jnp.tanh(x @ params["in"] + expand(t, x)) @ params["out"]
rng = np.random.default_rng(0)
params = {"in": rng.standard_normal((2, 16), np.float32), "out": rng.standard_normal((16, 2), np.float32)}
report = {"devices": jax.device_count(), "processes": jax.process_count()}
for fsdp in (False, True):
    mesh, tx = sharding.make_mesh(), optax.sgd(0.1)
    state = train.init(params, tx, mesh=mesh, fsdp=fsdp)
    step = train.make_step(flow_matching(net).loss, tx, mesh=mesh, target="ema", fsdp=fsdp)
    losses = []
    for n in range(3):
        x1 = np.random.default_rng(n).standard_normal((16, 2), np.float32)
        mine = np.split(x1, jax.process_count())[jax.process_index()]
        state, metrics = step(state, Batch(mine), jax.random.key(0))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    whole = multihost_utils.process_allgather((state.params, state.ema), tiled=True)
    leaves = [np.asarray(a).tolist() for a in jax.tree.leaves(whole)]
    split = not state.params["in"].sharding.is_fully_replicated
    report[str(fsdp)] = {"metrics": losses, "leaves": leaves, "split": split, "digest": checkpoint.digest(state.params)}
print("REPORT" + json.dumps(report))
"""


def launch(devices, **variables):
    env = {k: v for k, v in os.environ.items() if not k.startswith("FMJAX_")} | variables
    env |= {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    root = Path(sharding.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", TRAINING], cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def reports_of(*processes):
    try:
        ends = [p.communicate(timeout=120) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), "\n".join(err[-3000:] for _, err in ends)
    return [json.loads(re.search("REPORT(.*)", out)[1]) for out, _ in ends]


def test_two_processes_train_as_one():
    """Over loopback: equal digests in both, and the numbers of one process on one device to float tolerance."""
    names = {"FMJAX_DISTRIBUTED": "1", "FMJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "FMJAX_PROCESSES": "2"}
    first, second = reports_of(*(launch(2, **names, FMJAX_PROCESS=str(i)) for i in range(2)))
    (alone,) = reports_of(launch(1))
    assert first == second and (first["devices"], first["processes"]) == (4, 2)
    assert (alone["devices"], alone["processes"]) == (1, 1)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for fsdp in ("False", "True"):
        assert first[fsdp]["split"] == (fsdp == "True")
        close(first[fsdp]["metrics"], alone[fsdp]["metrics"])
        for a, b in zip(first[fsdp]["leaves"], alone[fsdp]["leaves"], strict=True):
            close(a, b)
