"""Checkpoints against what was saved, bit for bit, and every kind of damage."""

import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fmjax.storage import checkpoint

# On a torn file orbax closes its event loop while other reads of that checkpoint are under way: "Exception ignored".
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class State(NamedTuple):
    step: Any
    params: Any
    ema: Any
    opt_state: Any


def make_state(step=3, seed=0, width=256):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    params = {
        "Dense_0": {"kernel": jax.random.normal(a, (16, width)), "bias": jnp.arange(width, dtype=jnp.int32)},
        "odd.name/with~marks": jax.random.normal(b, (8, 3)).astype(jnp.bfloat16),
    }
    ema = jax.tree.map(lambda p: p * 2, params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    return State(jnp.int32(step), params, ema, tx.init({"w": jax.random.normal(c, (32, 8))}))


def save_all(directory, *steps, state=make_state, **kw):
    with checkpoint.writer(directory, **kw) as manager:
        for step in steps:
            assert checkpoint.save(manager, step, state(step, seed=step), metadata={"method": "flow_matching"})


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and type(x) is type(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def data_files(directory, step):
    """The files that hold the arrays, largest first."""
    files = [p for p in (directory / str(step) / "state").rglob("d/*") if p.is_file()]
    return sorted(files, key=lambda p: -p.stat().st_size)


def flip(path, count=64):
    """Flips ``count`` bytes in the middle of the file."""
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + count] = bytes(255 - b for b in raw[middle : middle + count])
    path.write_bytes(raw)


def mesh(n):
    return jax.sharding.Mesh(np.array(jax.devices()[:n]), ("data",))


def sharded(state, n):
    """Every leaf over its first axis where ``n`` divides it, replicated otherwise."""

    def put(leaf):
        spec = PartitionSpec("data") if leaf.ndim and leaf.shape[0] % n == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh(n), spec))

    return jax.tree.map(put, state)


def test_round_trip_is_bit_exact(tmp_path):
    state = make_state()
    save_all(tmp_path / "c", 3)
    step, restored, metadata = checkpoint.restore(tmp_path / "c", make_state(seed=9))
    assert step == 3 and metadata["step"] == 3 and metadata["method"] == "flow_matching"
    assert_same(restored, make_state(3, seed=3))
    assert metadata["digest"] == {name: checkpoint.digest(part) for name, part in restored._asdict().items()}
    assert checkpoint.digest(state) != checkpoint.digest(restored)


def test_numpy_leaves_and_scalars_keep_their_type_and_float64(tmp_path):
    state = {"params": {"w": np.linspace(0, 1, 7), "n": np.int64(2**40), "h": np.ones(3, ml_dtypes.bfloat16)}, "t": 0.1}
    with checkpoint.writer(tmp_path) as manager:
        checkpoint.save(manager, 0, state)
    _, restored, _ = checkpoint.restore(tmp_path, state)
    assert_same(restored, jax.tree.map(np.asarray, state))


def test_without_a_template_nested_dicts_come_back_and_a_part_stands_alone(tmp_path):
    save_all(tmp_path, 3)
    expected = make_state(3, seed=3).ema
    step, ema, metadata = checkpoint.restore(tmp_path, part="ema")
    assert step == 3
    assert_same(ema, jax.tree.map(np.asarray, expected))
    assert checkpoint.digest(ema) == metadata["digest"]["ema"] == checkpoint.digest(expected)
    _, placed, _ = checkpoint.restore(tmp_path, expected, part="ema")
    assert_same(placed, expected)
    with pytest.raises(ValueError, match="holds no part 'emma'; it holds .*ema"):
        checkpoint.restore(tmp_path, part="emma")


def test_a_part_does_not_care_for_damage_in_another(tmp_path):
    big = lambda step, seed: {"ema": jnp.ones(8), "opt_state": jax.random.normal(jax.random.key(seed), (100_000,))}
    save_all(tmp_path, 1, state=big)
    flip(data_files(tmp_path, 1)[0])
    with pytest.raises(checkpoint.CheckpointError, match="'opt_state'"):
        checkpoint.restore(tmp_path)
    assert_same(checkpoint.restore(tmp_path, part="ema")[1], np.ones(8, np.float32))


@pytest.mark.parametrize(("saved", "devices"), [(8, 1), (1, 8), (8, 2), (4, 8)])
def test_any_sharding_restores_into_any_other(tmp_path, saved, devices):
    state = make_state(seed=1)
    with checkpoint.writer(tmp_path) as manager:
        checkpoint.save(manager, 1, sharded(state, saved))
    template = sharded(make_state(seed=2), devices)
    for like in (template, jax.eval_shape(lambda: template)):
        if like is not template:  # shapes alone, with the shardings they are to have
            like = jax.tree.map(
                lambda s, t: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=t.sharding), like, template
            )
        _, restored, _ = checkpoint.restore(tmp_path, like)
        assert_same(restored, state)
        assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, template)


def test_uncommitted_templates_stay_uncommitted(tmp_path):
    save_all(tmp_path, 1)
    _, restored, _ = checkpoint.restore(tmp_path, make_state())
    assert not any(leaf.committed for leaf in jax.tree.leaves(restored))


def test_donated_states_are_saved_as_they_were(tmp_path):
    advance = jax.jit(lambda w: w + 1, donate_argnums=0)
    w = jnp.zeros((512, 512))
    with checkpoint.writer(tmp_path, keep=8) as manager:
        for step in range(8):
            assert checkpoint.save(manager, step, {"w": w})
            w = advance(w)
    for step in range(8):
        _, restored, _ = checkpoint.restore(tmp_path, step=step)
        assert (restored["w"] == step).all()
    _, restored, _ = checkpoint.restore(tmp_path, {"w": w})
    assert (advance(restored["w"]) == 8).all()


def test_keeps_the_last_and_does_not_write_a_step_twice(tmp_path):
    with checkpoint.writer(tmp_path, keep=2) as manager:
        for step in (1, 2, 5, 9):
            assert checkpoint.save(manager, step, {"w": jnp.ones(3) * step})
        assert not checkpoint.save(manager, 9, {"w": jnp.zeros(3)})
        with pytest.raises(ValueError, match="step=4: .* newest is step 9"):
            checkpoint.save(manager, 4, {"w": jnp.zeros(3)})
    assert checkpoint.all_steps(tmp_path) == [5, 9] and checkpoint.latest_step(tmp_path) == 9
    assert (checkpoint.restore(tmp_path)[1]["w"] == 9).all()
    assert (checkpoint.restore(tmp_path, step=5)[1]["w"] == 5).all()


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_flipped_bytes_that_orbax_restores_are_found_by_the_digest(tmp_path):
    import orbax.checkpoint as ocp

    save_all(tmp_path, 1, 2)
    flip(data_files(tmp_path, 2)[0])
    raw = ocp.PyTreeCheckpointer().restore(tmp_path / "2" / "state")
    assert checkpoint.digest(raw) != checkpoint.digest(make_state(2, seed=2)), "the flip did not reach an array"
    with pytest.raises(
        checkpoint.CheckpointError, match=r"/2 is damaged: the bytes of .* last good step is 1: .*step=1"
    ):
        checkpoint.restore(tmp_path, make_state())


def truncate(directory):
    path = data_files(directory, 2)[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_array_file(directory):
    data_files(directory, 2)[0].unlink()


def remove_arrays(directory):
    shutil.rmtree(directory / "2" / "state")


def flip_metadata(directory):
    path = directory / "2" / "metadata" / "metadata"
    path.write_text(path.read_text().replace("flow_matching", "flow_matchinh"))


def truncate_metadata(directory):
    path = directory / "2" / "metadata" / "metadata"
    path.write_text(path.read_text()[:40])


def copy_another_step(directory):
    shutil.rmtree(directory / "2")
    shutil.copytree(directory / "1", directory / "2")


def remove_metadata(directory):
    shutil.rmtree(directory / "2" / "metadata")


DAMAGES = [
    truncate,
    remove_array_file,
    remove_arrays,
    flip_metadata,
    truncate_metadata,
    remove_metadata,
    copy_another_step,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_with_the_last_good_step_and_fallback_restores_it(tmp_path, damage):
    save_all(tmp_path, 1, 2)
    damage(tmp_path)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.restore(tmp_path, make_state())
    message = str(caught.value)
    assert f"{tmp_path}/2 is damaged" in message and "last good step is 1" in message and "\n" not in message
    with pytest.warns(UserWarning, match=f"{tmp_path}/2 is damaged.*falling back to step 1"):
        step, restored, _ = checkpoint.restore(tmp_path, make_state(), fallback=True)
    assert step == 1
    assert_same(restored, make_state(1, seed=1))
    assert checkpoint.restore(tmp_path, make_state(), step=1)[0] == 1


def test_nothing_good_left(tmp_path):
    save_all(tmp_path, 1, 2)
    for step in (1, 2):
        flip(data_files(tmp_path, step)[0])
    for fallback in (True, False):
        with pytest.raises(
            checkpoint.CheckpointError, match=r"/2 is damaged.*/1 is damaged.*no good checkpoint is left"
        ):
            checkpoint.restore(tmp_path, make_state(), fallback=fallback)


def test_a_good_checkpoint_gives_no_warning_with_fallback(tmp_path):
    save_all(tmp_path, 1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert checkpoint.restore(tmp_path, make_state(), fallback=True)[0] == 2


def test_another_network_is_named_by_leaf_and_shape_and_never_falls_back(tmp_path):
    save_all(tmp_path, 1, 2)
    wide = make_state(width=512)
    for fallback in (True, False):
        with pytest.raises(
            ValueError, match=r"params/Dense_0/bias: stored int32\[256\], requested int32\[512\].*and 1 more"
        ):
            checkpoint.restore(tmp_path, wide, fallback=fallback)
    with pytest.raises(ValueError, match=r"Dense_0/kernel: stored float32\[16, 256\], requested float32\[16, 512\]"):
        checkpoint.restore(tmp_path, wide.ema, part="ema")
    state = make_state()
    half = state._replace(params=state.params | {"odd.name/with~marks": jnp.ones((8, 3))})
    with pytest.raises(ValueError, match=r"marks: stored bfloat16\[8, 3\], requested float32\[8, 3\]"):
        checkpoint.restore(tmp_path, half)
    more = state._replace(ema=state.ema | {"Dense_1": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"ema/Dense_1: stored none, requested float32\[2\]"):
        checkpoint.restore(tmp_path, more)
    with pytest.raises(ValueError, match=r"opt_state/1/0/count: stored int32\[\], requested none"):
        checkpoint.restore(tmp_path, state._replace(opt_state=None))


def test_missing_checkpoints(tmp_path):
    assert checkpoint.latest_step(tmp_path / "none") is None
    with pytest.raises(checkpoint.CheckpointError, match="none, which does not exist"):
        checkpoint.restore(tmp_path / "none")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"):
        checkpoint.restore(tmp_path)
    save_all(tmp_path, 4, 5)
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint of step 7 .*steps \[4, 5\]"):
        checkpoint.restore(tmp_path, step=7)


def test_a_resumed_run_writes_skipped_steps_again(tmp_path):
    save_all(tmp_path, 1, 2)
    flip(data_files(tmp_path, 2)[0])
    with pytest.raises(checkpoint.CheckpointError, match="already holds step 2"), checkpoint.writer(tmp_path):
        pass
    with pytest.warns(UserWarning, match="falling back"):
        step, _, _ = checkpoint.restore(tmp_path, make_state(), fallback=True)
    save_all(tmp_path, 2, 3, after=step)
    assert checkpoint.all_steps(tmp_path) == [2, 3] and (tmp_path / "2.set-aside").is_dir()
    assert_same(checkpoint.restore(tmp_path, make_state(), step=2)[1], make_state(2, seed=2))


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(checkpoint.CheckpointError, match="cannot write checkpoints to .*file"):
        save_all(tmp_path / "file", 1)
    with pytest.raises(ValueError, match="keep=0"):
        save_all(tmp_path / "c", 1, keep=0)
    with checkpoint.writer(tmp_path / "c") as manager:
        with pytest.raises(TypeError, match="holds no PRNG keys"):
            checkpoint.save(manager, 1, {"key": jax.random.key(0)})
        with pytest.raises(ValueError, match="metadata='digest'"):
            checkpoint.save(manager, 1, {"w": jnp.ones(2)}, metadata={"digest": 1})
        with pytest.raises(ValueError, match="state=list"):
            checkpoint.save(manager, 1, [jnp.ones(2)])
    assert list((tmp_path / "c").iterdir()) == []


def test_metadata_may_hold_numpy_scalars_and_arrays(tmp_path):
    with checkpoint.writer(tmp_path) as manager:
        metadata = {"rate": np.float32(0.5), "bins": np.arange(2), "count": jnp.int32(3)}
        assert checkpoint.save(manager, np.int64(1), {"w": np.float32(2)}, metadata=metadata)
    step, state, metadata = checkpoint.restore(tmp_path)
    assert (step, state["w"], metadata["rate"], metadata["bins"], metadata["count"]) == (1, 2, 0.5, [0, 1], 3)


def test_a_disk_without_space_for_the_checkpoints_is_refused(tmp_path, monkeypatch):
    state = {"w": jax.ShapeDtypeStruct((1000, 250), jnp.float32)}  # 1 MB
    free = lambda megabytes: monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, int(megabytes * 1e6))
    )
    free(3.01)
    checkpoint.check_space(tmp_path / "a" / "b", state, keep=2)
    free(2.99)
    with pytest.raises(checkpoint.CheckpointError, match="a/b: checkpoints need 0.003 GB and 0.00299 GB are free"):
        checkpoint.check_space(tmp_path / "a" / "b", state, keep=2)
    save_all(tmp_path, 1)
    checkpoint.check_space(tmp_path, state, keep=2)


SAVE_FOR_EVER = """
import sys, jax.numpy as jnp
from fmjax.storage import checkpoint
with checkpoint.writer(sys.argv[1], after=checkpoint.latest_step(sys.argv[1])) as manager:
    step = checkpoint.latest_step(sys.argv[1]) or 0
    while True:
        step += 1
        checkpoint.save(manager, step, {"w": jnp.full((1500, 1000), step, jnp.float32), "step": jnp.int32(step)})
        print(step, flush=True)
"""


def test_a_kill_while_saving_leaves_the_former_checkpoint_intact(tmp_path):
    root = Path(checkpoint.__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""}
    seen = 0
    for saves in (3, 4):
        child = subprocess.Popen([sys.executable, "-c", SAVE_FOR_EVER, tmp_path], stdout=subprocess.PIPE, env=env)
        for _ in range(saves):
            seen = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        step, restored, _ = checkpoint.restore(tmp_path)
        assert step >= seen - 1, "save blocks until the former one is finished"
        assert (restored["w"] == step).all() and restored["step"] == step
    (tmp_path / "999.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with checkpoint.writer(tmp_path, after=step) as manager:
        assert checkpoint.save(manager, step + 1, restored)
    assert not list(tmp_path.glob("*.orbax-checkpoint-tmp*"))
    assert checkpoint.latest_step(tmp_path) == step + 1
