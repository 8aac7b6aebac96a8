"""Runs that start from the averages of others and are taught by them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training_loop import config, records, same, small

from fmjax.experiments import assemble
from fmjax.keys import example_keys
from fmjax.storage import checkpoint
from fmjax.training import loop


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher")
    return path, assemble.fit(config(seed=1), path)


MAP = {"method": {"name": "lagrangian", "diagonal": 0.0}, "steps": 1}


def test_a_run_starts_from_and_is_taught_by_the_averages_of_other_runs(teacher, tmp_path):
    """One SGD-like step of a distillation, against the loss at the averages of the teacher's run."""
    path, state = teacher
    first = assemble.fit(config(seed=2, steps=3), tmp_path / "first").ema
    cfg = config(init=str(tmp_path / "first"), teacher=str(path), target="frozen", log_every=1, **MAP)
    assemble.fit(cfg, tmp_path / "w")
    plan = assemble.assemble(cfg)
    keys = example_keys(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0), jnp.arange(32))
    batch = jax.tree.map(jnp.asarray, plan.data.batch(0))
    loss = jax.jit(lambda *args: plan.method.loss(*args, batch, keys)[0])
    value = loss(first, state.ema)
    (record,) = records(tmp_path / "w")
    np.testing.assert_allclose(record["loss"], value, rtol=1e-5)
    for params, target in ((first, first), (first, state.params), (state.ema, state.ema)):
        assert abs(loss(params, target) - value) > 1e-3 * value


def test_a_teacher_of_another_network_or_that_has_changed_is_refused(teacher, tmp_path):
    path, state = teacher
    cfg = config(init=str(path), teacher=str(path), target="frozen", **{"net.width": 8}, **MAP)
    with pytest.raises(ValueError, match=r"init=.* is a run of another network: its .* is of shape .* in this one"):
        assemble.fit(cfg, tmp_path / "w")
    with pytest.raises(checkpoint.CheckpointError):
        assemble.fit(config(init=str(tmp_path / "none"), **MAP), tmp_path / "w")
    assert not (tmp_path / "w").exists()
    plan = small(steps=4)
    loop.train(plan.replace(steps=2), tmp_path, params=jax.device_get(state.ema))
    with pytest.raises(ValueError, match="the params given to flow are not those that the run in .* began with"):
        loop.train(plan, tmp_path, params=jax.device_get(state.params))
    loop.train(plan, tmp_path, params=jax.device_get(state.ema))


def test_what_a_model_has_beside_the_checkpoints_is_as_at_first(teacher, tmp_path):
    path, state = teacher
    plan = assemble.assemble(config(weighting="learned", **MAP))
    got = loop.load_average(plan, path)
    assert same({k: v for k, v in got.items() if k != "log_variance"}, state.ema)
    assert same(got["log_variance"], loop.initial_parameters(plan)["log_variance"])
    with pytest.raises(ValueError, match=r"given is a run of another network: its \['c'\] \(1,\) is not there in this"):
        loop.merge_parameters(plan, {"c": jnp.zeros(1)})


def test_a_prediction_is_not_taken_for_a_velocity(tmp_path):
    """Nor the other way round; the same kind goes on."""
    assemble.fit(config(method="denoising", coupling="independent", steps=1), tmp_path / "denoising")
    flow = assemble.fit(config(steps=1), tmp_path / "flow")
    for theirs, ours in (("denoising", "flow_matching"), ("flow", "denoising")):
        cfg = config(init=str(tmp_path / theirs), method=ours, coupling="independent", steps=1)
        with pytest.raises(ValueError, match=f"init=.*{theirs}.* are not of one kind; diffusion.as_flow"):
            assemble.fit(cfg, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    assemble.fit(
        config(init=str(tmp_path / "denoising"), method="denoising", coupling="independent", steps=1), tmp_path / "w"
    )
    assert same(loop.load_average(assemble.assemble(config()), tmp_path / "flow"), flow.ema)
