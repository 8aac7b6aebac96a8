"""Files of weights become workdirs that runs start from, learn from and evaluate; and back, to the bit."""

import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laboratory import config_file, no_checkpoint, numbers, read, refused, run
from laboratory import laboratory as laboratory  # a fixture
from test_convert_edm import NCSN, TINY, names
from test_convert_edm_snapshots import snapshot
from test_convert_torchcfm import FILE, RECORDED, draw
from test_convert_weights import archive

import fmjax
from fmjax.convert import edm, torchcfm, weights
from fmjax.experiments import assemble, build, convert, evaluate, workdir
from fmjax.storage import checkpoint
from fmjax.training import loop

DIGITS = {**TINY, "colours": 1, "mult": (1,), "attention": ()}


def restored(path):
    step, params, metadata = checkpoint.restore(path / "flow" / "checkpoints", part="ema")
    assert step == 0 and metadata["stage"] == "flow"
    return params


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_snapshot_of_edm_is_the_workdir_of_its_network(tmp_path):
    state = names(**NCSN)
    (tmp_path / "a.pkl").write_bytes(snapshot(state))
    told = convert.convert_file(tmp_path / "a.pkl", tmp_path / "w")
    kept = json.loads((tmp_path / "w" / "converted.json").read_text(), object_hook=tupled)
    assert told == {name: value for name, value in kept.items() if name != "sha256"}
    want, spec = edm.network_parameters(state, dropout=0.13, preconditioning={"name": "edm", "sigma_data": 0.5})
    assert told["classes"] == spec.pop("classes") == 2 and told["net"] == spec
    assert (told["kind"], told["source"]) == ("edm", "a.pkl")
    assert told["parameters"] == sum(a.size for a in jax.tree.leaves(want))
    same(restored(tmp_path / "w"), want)
    with pytest.raises(checkpoint.CheckpointError, match="already holds step 0"):
        convert.convert_file(tmp_path / "a.pkl", tmp_path / "w")


def tupled(found):
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


@pytest.mark.parametrize(("name", "options"), [("labels", {}), ("cifar-like", {"heads": 2})])
def test_a_checkpoint_of_torchcfm_needs_what_its_weights_do_not_tell(name, options, tmp_path):
    with np.load(FILE) as file:
        state = draw(json.loads(str(file[f"{name} shapes"])))
    weights.write(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match="'size'"):
        convert.convert_file(tmp_path / "a.safetensors", tmp_path / "w")
    with pytest.raises(ValueError, match="options.sise=8.*did you mean 'size'"):
        convert.convert_file(tmp_path / "a.safetensors", tmp_path / "w", options={"sise": 8})
    assert not (tmp_path / "w").exists()
    told = convert.convert_file(tmp_path / "a.safetensors", tmp_path / "w", options={"size": 8, **options})
    want, fields = torchcfm.unet(state, size=8, **options)
    classes = RECORDED[name][1].get("num_classes", 0)
    assert told["kind"] == "torchcfm" and told["classes"] == fields.pop("classes") == classes
    assert told["net"] == {"name": "unet", **fields}
    same(restored(tmp_path / "w"), want)


def test_the_averaged_part_of_a_checkpoint_is_taken_or_the_one_that_is_named(tmp_path, monkeypatch):
    plain, averaged = names(**TINY), {name: 2 * a for name, a in names(**TINY).items()}
    averaged |= {name: a for name, a in plain.items() if "resample_filter" in name}
    whole = {"net_model": plain, "ema_model": averaged, "step": 7, "optim": {"state": {}}}
    (tmp_path / "a.pt").touch()
    monkeypatch.setattr(weights, "read_weights", lambda path: whole)
    bias = lambda w: restored(tmp_path / w)["output"]["bias"]
    convert.convert_file(tmp_path / "a.pt", tmp_path / "averaged")
    convert.convert_file(tmp_path / "a.pt", tmp_path / "plain", part="net_model")
    np.testing.assert_array_equal(bias("averaged"), 2 * bias("plain"))
    with pytest.raises(ValueError, match="part='optim'.*net_model, ema_model"):
        convert.convert_file(tmp_path / "a.pt", tmp_path / "w", part="optim")
    for part in ("net_model", "ema_model"):
        whole[part[:2]] = whole.pop(part)
    with pytest.raises(ValueError, match="part=.*ne, em"):
        convert.convert_file(tmp_path / "a.pt", tmp_path / "w")


def test_our_own_parameters_come_back_to_the_bit_with_their_network(tmp_path):
    state = names(**NCSN)
    (tmp_path / "a.pkl").write_bytes(snapshot(state))
    told = convert.convert_file(tmp_path / "a.pkl", tmp_path / "w")
    count = convert.export(tmp_path / "w", tmp_path / "a.safetensors")
    assert count == told["parameters"]
    assert "TwoTimes_0/jump/kernel" in weights.read_weights(tmp_path / "a.safetensors")
    again = convert.convert_file(tmp_path / "a.safetensors", tmp_path / "v")
    assert {**tupled(again), "net": tupled(again["net"])} == {**told, "kind": "safetensors", "source": "a.safetensors"}
    same(restored(tmp_path / "v"), restored(tmp_path / "w"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"kind": "torchcfm"}, "kind='torchcfm'.*'edm'"),
        ({"kind": "edn"}, "kind='edn'.*did you mean 'edm'"),
        (
            {"options": {"dropuot": 0.1}},
            "options.dropuot=0.1.*did you mean 'dropout'",
        ),
        ({"options": {"preconditioning": "vpp"}}, "vpp.*did you mean 'vp'"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_is_written(how, message, tmp_path):
    (tmp_path / "a.pkl").write_bytes(snapshot(names(**TINY)))
    with pytest.raises(ValueError, match=message):
        convert.convert_file(tmp_path / "a.pkl", tmp_path / "w", **how)
    assert not (tmp_path / "w").exists()


def test_weights_of_something_else_are_refused(tmp_path):
    weights.write(tmp_path / "a.safetensors", {"layer.weight": np.zeros(3)})
    with pytest.raises(ValueError, match="source='a.safetensors'.*layer.weight"):
        convert.convert_file(tmp_path / "a.safetensors", tmp_path / "w")
    archive(tmp_path / "a.pt", pickle.dumps([1]))
    with pytest.raises(ValueError, match="a.pt: part=None: the file has no state dict"):
        convert.convert_file(tmp_path / "a.pt", tmp_path / "w")
    with pytest.raises(ValueError, match="to=.*a.npz.*safetensors"):
        convert.export(tmp_path, tmp_path / "a.npz")
    with pytest.raises(workdir.WorkdirError, match="no checkpoint"):
        convert.export(tmp_path, tmp_path / "b.safetensors")


@pytest.fixture
def converted(tmp_path):
    """A snapshot for digits, its state dict, and fields of a config for its run folder ``w``."""
    state = {name: a if "norm" in name else 0.1 * a for name, a in names(**DIGITS).items()}
    (tmp_path / "a.pkl").write_bytes(snapshot(state))
    record = convert.convert_file(tmp_path / "a.pkl", tmp_path / "w", shape=(8, 8, 1))
    return state, {"net": record["net"], "data": {"name": "digits"}, "steps": 1, "batch_size": 8}


def test_a_run_gets_the_velocity_of_the_published_denoiser(converted, tmp_path):
    """From the file to a run's parameters and velocity: ``v = (D(x / t; (1 - t) / t) - x) / (1 - t)``."""
    state, changes = converted
    settings = read(**changes, init=str(tmp_path / "w"))
    plan = assemble.flow_plan(settings, build.data("digits"))
    start = assemble.start_of(plan, settings, "init")
    same(start, edm.network_parameters(state)[0])
    x, t = plan.data.batch(0).x1, jnp.linspace(0.1, 0.9, 8)
    v = jax.jit(plan.method.velocity(start))(x, t)
    params, spec = edm.network_parameters(state, preconditioning=None)
    raw = jax.jit(build.net(spec).net)

    def denoise(x, sigma):
        scale = lambda a: a[:, None, None, None]
        root = jnp.sqrt(sigma**2 + 0.25)
        f = raw(params, x / scale(root), jnp.log(sigma) / 4, jnp.log(sigma) / 4)
        return scale(0.25 / root**2) * x + scale(sigma * 0.5 / root) * f

    by = t[:, None, None, None]
    np.testing.assert_allclose(v, (denoise(x / by, (1 - t) / t) - x) / (1 - by), rtol=1e-3, atol=1e-4)
    assert np.abs(v).max() > 1


@pytest.mark.slow
def test_a_run_starts_from_a_converted_network_and_learns_from_it(converted, tmp_path):
    where = str(tmp_path / "w")
    method = {"method": {"name": "align_your_flow"}, "target": "frozen", "teacher": where, "init": where}
    settings = read(**converted[1], **method)
    plan = assemble.flow_plan(settings, build.data("digits"))
    start, teacher = (assemble.start_of(plan, settings, field) for field in ("init", "teacher"))
    trained = loop.train(plan, tmp_path / "r", params=start, teacher=teacher)
    pairs = zip(*map(jax.tree.leaves, (trained.params, restored(tmp_path / "w"))), strict=True)
    assert int(trained.step) == 1 and 0 < max(np.abs(a - b).max() for a, b in pairs) < 0.01  # Adam at its first step


def test_a_file_without_a_shape_is_evaluated_on_data_and_sampled_with_a_shape(tmp_path, laboratory, as_users_call):
    """The file of ``--to`` holds weights alone: a converted folder of it states no shape of an example."""
    run("train", f"--config={config_file(tmp_path)}", f"--workdir={tmp_path / 'w'}")
    run("convert", f"--workdir={tmp_path / 'w'}", f"--to={tmp_path / 'w.safetensors'}")
    for name, *shape in (("unknown",), ("known", "--shape=2")):
        run("convert", f"--workdir={tmp_path / name}", f"--source={tmp_path / 'w.safetensors'}", *shape)
    sample = (f"--out={tmp_path / 'x.npz'}", "--count=3", "--solver=euler", "--solver_steps=2")
    line = refused("sample", f"--workdir={tmp_path / 'unknown'}", *sample)
    assert line.startswith(f"workdir={tmp_path / 'unknown'}") and "--shape" in line
    run("sample", f"--workdir={tmp_path / 'known'}", *sample)
    assert np.load(tmp_path / "x.npz")["x"].shape == (3, 2)
    for option in ("--shape=0", "--shape=-2", "--shape=3,3,x", "--shape=7", "--shape=", "--options=[]", "--source="):
        line = refused("convert", f"--workdir={tmp_path / 'z'}", f"--source={tmp_path / 'w.safetensors'}", option)
        assert option.removeprefix("--").partition("=")[0] in line.partition(":")[0] and no_checkpoint(tmp_path / "z")
    run("evaluate", f"--config={config_file(tmp_path)}", f"--workdir={tmp_path / 'unknown'}")
    assert numbers(tmp_path / "unknown", "evaluation.json")["rows"]


def test_a_converted_network_is_evaluated_and_sampled_as_it_is(converted, tmp_path):
    changes = {"sampling": {"seeds": 1, "samples": 16}, "samplers": {"euler": (2,)}}
    evaluate.main(read(**converted[1], **changes), tmp_path / "w")
    rows = json.loads((tmp_path / "w" / "evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["euler, 2 steps", "training data"]
    assert (tmp_path / "w" / "evaluation.html").exists()
    samples = fmjax.load(tmp_path / "w").sample(3, solver="euler", steps=2)
    assert samples.shape == (3, 8, 8, 1) and np.isfinite(samples).all()
    convert.export(tmp_path / "w", tmp_path / "a.safetensors")
    net = json.loads(weights.metadata(tmp_path / "a.safetensors")["net"])
    assert net["name"] == "song_unet" and net["preconditioning"]["name"] == "edm"
