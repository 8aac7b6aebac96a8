"""Training from a config: what is refused before work, and that each field means what it says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.experiments import assemble, specs, workdir
from fmjax.keys import example_keys
from fmjax.sampling import guidance
from fmjax.storage import files
from fmjax.training import loop, sharding
from fmjax.types import Batch

digits = pytest.importorskip("configs.digits")
SPEEDS = ("steps_per_s", "examples_per_s")


def config(**changes):
    """The digits' config, small; dotted names change fields."""
    c = digits.get_config()
    small = {"net.width": 16, "net.depth": 1, "batch_size": 32, "steps": 12, "warmup": 2, "log_every": 5}
    small |= {"save_every": 4, "sample_every": 0, "ema": 0.9}
    small |= {"flow_map.batch_size": 32, "correctors.score.batch_size": 32}
    for name, value in (small | changes).items():
        *parents, last = name.split(".")
        node = c
        for parent in parents:
            node = node[parent]
        with node.unlocked(), node.ignore_type():
            node[last] = value
    return c


def small(**changes):
    """A flow's plan on one device: what is tested of it does not depend on the mesh, and one compiles faster."""
    return assemble.assemble(config(**changes)).replace(mesh=sharding.make_mesh(jax.devices()[:1]))


def records(path):
    return [{k: v for k, v in r.items() if k not in SPEEDS} for r in files.read_jsonl(path / "metrics.jsonl")]


def same(a, b):
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("flow", {"method": "flow_machting"}, "did you mean 'flow_matching'"),
        ("flow", {"net": {"name": "mlp", "widht": 3}}, "no option 'widht'; did you mean 'width'"),
        ("flow", {"path": "liner"}, "did you mean 'linear'"),
        ("flow", {"coupling": "minibatch"}, "did you mean 'minibatch_ot'"),
        ("flow", {"data": "digit"}, "did you mean 'digits'"),
        ("flow", {"batch_size": 30}, "batch_size=30 is not divisible by 8 devices; use 24 or 32"),
        ("flow", {"batch_size": 100_000}, r"batch_size=100000: .* 1..1257"),
        ("flow", {"steps": 0}, "steps=0 must be at least 1"),
        ("flow", {"log_every": 0}, "log_every=0 must be at least 1"),
        ("flow", {"ema": 1.0}, "ema=1.0 is the decay"),
        ("flow", {"target": "emma"}, "target='emma' is not one of self, ema, frozen"),
        ("flow", {"target": "frozen"}, "target='frozen' needs a teacher"),
        ("flow", {"teacher": "w"}, "target='self' and teacher='w': .* no other target has one"),
        ("flow", {"method": "contrastive"}, "contrastive needs Batch.negative.* set negatives='any'"),
        ("flow", {"negatives": "other"}, "there are no negatives 'other'; did you mean 'other_label'"),
        ("flow", {"coupling": "semidiscret"}, "did you mean 'semidiscrete'"),
        ("flow", {"classes": 9}, r"classes=9 is too few: the data have labels 0 \.\. 9"),
        (
            "flow",
            {"label_dropout": 0.1},
            "label_dropout=0.1, guidance=1.0 and a guided net .* need labels: set classes",
        ),
        ("flow", {"guidance": 2.0, "classes": 10}, "guidance=2.0 needs a network that knows the null label"),
        ("flow", {"net": {"name": "mlp", "guided": True}}, "a guided net .True. need labels"),
        (
            "flow",
            {"net": {"name": "mlp", "guided": True}, "classes": 10},
            "a guided net needs a network that knows",
        ),
        ("flow", {"classes": 10, "label_dropout": 1.0}, "label_dropout=1.0 is the share"),
        ("flow", {"classes": 10, "net.classes": 10}, "is given 'classes' from a field of its own"),
        ("flow", {"learning_rate": -1.0}, "learning_rate=-1.0 must be positive"),
        ("flow", {"method": {"name": "score_corrector", "sigma": 0.1}}, "must give a velocity"),
        ("flow_map", {"flow_map.method": "flow_matching"}, "must give a flow_map"),
        ("flow_map", {"flow_map.batch_size": 16}, "batch of 2 per device cannot be split at 0.75; use a multiple of 4"),
        ("correctors.score", {}, "its batches need their times"),
        (
            "correctors.score",
            {"correctors.score.method": {"name": "score_corrector", "sigma": 0.0}},
            "sigma .* must be positive",
        ),
    ],
)
def test_a_bad_config_is_refused_in_one_sentence_before_anything_is_compiled(stage, changes, message, tmp_path):
    with jax.log_compiles(False), pytest.raises(ValueError, match=message) as caught:
        assemble.assemble(config(**changes), stage)
    assert "\n" not in str(caught.value)
    if stage == "flow":
        with pytest.raises(ValueError, match=message):
            assemble.fit(config(**changes), tmp_path / "w")
        assert not (tmp_path / "w").exists()


def test_a_workdir_of_another_config_is_refused_with_the_fields_that_differ(tmp_path):
    assemble.fit(config(steps=2), tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(workdir.WorkdirError, match="learning_rate is 0.002 there, 0.1 here"):
        assemble.fit(config(steps=2, learning_rate=0.1), tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assemble.fit(config(steps=2, log_every=1), tmp_path)  # no number depends on it


def test_an_unwritable_workdir_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(workdir.WorkdirError, match="cannot be written"):
        assemble.fit(config(), tmp_path / "file" / "w")


def test_a_config_weighs_its_loss_and_records_the_residual_unweighted(tmp_path):
    plain, weighted = (small(steps=1, log_every=1, **w) for w in ({}, {"weighting": "adaptive"}))
    for plan, name in ((plain, "a"), (weighted, "b")):
        loop.train(plan, tmp_path / name)
    (a,), (b,) = records(tmp_path / "a"), records(tmp_path / "b")
    np.testing.assert_allclose(b["residual"], a["loss"], rtol=1e-5)
    np.testing.assert_allclose(b["loss"], 1.0, atol=1e-2)  # d r / (d r + 0.01)


@pytest.mark.parametrize("name", ["improved_mean_flow", "lagrangian"])
def test_a_net_told_the_scale_is_trained_at_random_scales_and_asked_at_the_configs(name):
    """The loss of a config is that of its parts put together by hand; a view is the net at (label, guidance)."""
    net = {"name": "mlp", "width": 16, "depth": 1, "guided": True}
    cfg = config(net=net, method=name, classes=10, label_dropout=0.25, guidance=3.0, coupling="independent")
    plan = assemble.assemble(cfg)
    options = {"teacher": guidance.guided_teacher(plan.model.net, null=10)} if name == "lagrangian" else {"null": 10}
    method = specs.from_spec("methods", {"name": name, **options}, plan.model.net)
    method = guidance.label_dropout(guidance.random_scale(method), rate=0.25, null=10)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape, np.float32), loop.initial_parameters(plan))
    keys, batch = example_keys(jax.random.key(0), jnp.arange(32)), jax.tree.map(jnp.asarray, plan.data.batch(0))
    value, _ = jax.jit(plan.method.loss)(params, params, batch, keys)
    np.testing.assert_allclose(value, jax.jit(method.loss)(params, params, batch, keys)[0], rtol=1e-6)
    labels, half, w = batch.cond, jnp.full(32, 0.5), jnp.full(32, 3.0)
    u = plan.model.net(params, batch.x1, half, 2 * half, (labels, w))
    np.testing.assert_allclose(
        plan.method.flow_map(params)(batch.x1, half, 2 * half, labels), batch.x1 + u / 2, rtol=1e-5
    )
    other = plan.model.net(params, batch.x1, half, half, (labels, w - 1))
    assert np.abs(plan.method.velocity(params)(batch.x1, half, labels) - other).max() > 1e-3


def test_pictures_are_written_while_training(tmp_path):
    from PIL import Image

    assemble.fit(config(steps=4, sample_every=2, log_every=2), tmp_path)
    files = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert files == ["step-0000002.png", "step-0000004.png"]
    with Image.open(tmp_path / "samples" / files[0]) as image:
        assert image.size == (6 * 42 + 2, 6 * 42 + 2)  # 36 digits, each pixel a square of 5, with gaps of 2


def test_corrector_batches_can_be_given(tmp_path):
    plan = assemble.assemble(
        config(),
        "correctors.score",
        batch=lambda step: Batch(np.ones((32, 8, 8, 1), np.float32), t=np.ones(32, np.float32)),
    )
    assert plan.data.shape == (8, 8, 1) and plan.schedule.steps == digits.get_config().correctors.score.steps


def test_every_field_of_the_workdir_s_config_is_plain_json(tmp_path):
    assemble.fit(config(steps=1), tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["net"] == {"name": "mlp", "width": 16, "depth": 1} and stored["sampling"]["euler"] == [4, 8, 16, 32]


def test_a_conditional_run_trains_on_its_labels_and_guides_its_velocity():
    """The batch's labels are those of its images, dropout is told of, and guidance goes past the conditional field."""
    changes = {"classes": 10, "label_dropout": 0.5, "steps": 3, "log_every": 3}
    plan, plain = small(**changes), small()
    data = specs.data("digits")
    batch = plan.data.batch(0)
    index = [int(np.flatnonzero((data.train.x == x).all((1, 2, 3)))[0]) for x in batch.x1]
    np.testing.assert_array_equal(batch.cond, data.train.cond[index])
    assert plain.batch(0).cond is None
    params = loop.initial_parameters(plan)
    assert params["Embed_0"]["embedding"].shape[0] == 11 and "Embed_0" not in loop.initial_parameters(plain)

    rng = np.random.default_rng(0)  # the output layer starts at zero
    params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), params)
    guided = small(**changes, guidance=3.0).method.velocity(params)
    velocity = plan.method.velocity(params)
    x, y = jnp.asarray(batch.x1), jnp.asarray(batch.cond)
    labelled, null = velocity(x, 0.5, y), velocity(x, 0.5, jnp.full_like(y, 10))
    np.testing.assert_allclose(guided(x, 0.5, y), null + 3 * (labelled - null), rtol=1e-4, atol=1e-5)
    assert np.abs(labelled - null).max() > 0.01

    keys = example_keys(jax.random.key(1), jnp.arange(32))
    placed = jax.tree.map(jnp.asarray, batch)
    loss = lambda params: plan.method.loss(params, params, placed, keys)[0]
    taught = np.abs(jax.grad(loss)(params)["Embed_0"]["embedding"]).max(1)
    assert taught[10] > 0, "the null label is never trained"


def test_a_conditional_run_records_the_loss_without_labels(tmp_path):
    loop.train(small(classes=10, label_dropout=0.5, steps=3, log_every=3), tmp_path)
    record = records(tmp_path)[-1]
    assert record["unconditional"] > 0.5, "the loss of an untrained flow is near E|x1 - x0|^2 per pixel"


def test_a_contrastive_run_gets_other_examples_and_the_mean_of_the_data():
    plan, data = small(method={"name": "contrastive", "weight": 0.2}, negatives="any"), specs.data("digits")
    batch = plan.data.batch(0)
    each = lambda x: [int(np.flatnonzero((data.train.x == a).all((1, 2, 3)))[0]) for a in x]
    assert not set(zip(each(batch.x1), each(batch.negative), strict=True)) & {(i, i) for i in range(data.train.count)}
    params, x = loop.initial_parameters(plan), jnp.asarray(batch.x1)  # a network that is zero: the mean alone is left
    np.testing.assert_allclose(plan.method.velocity(params)(x, 0.3)[0], 0.2 * data.train.x.mean(0), atol=1e-6)


def test_a_semidiscrete_run_pairs_noise_with_all_the_data_nearer_than_a_minibatch_can():
    cost = lambda batch: np.square(batch.x0 - batch.x1).reshape(len(batch.x1), -1).sum(1).mean()
    draws = {"name": "semidiscrete", "draws": 20}
    near, batchwise = small(coupling=draws, flip=True), small(coupling="minibatch_ot")
    costs = [[cost(plan.data.batch(i)) for i in range(8)] for plan in (near, batchwise)]
    difference = np.subtract(*costs)
    assert difference.mean() + 4 * difference.std() / 8**0.5 < 0


def test_folders_of_files_may_move_between_runs_only_where_the_files_are_known():
    free = lambda **options: assemble.free(config(data={"name": "mnist", "source_dir": "a", **options}))
    assert set(free(verify=True)) - set(assemble.FREE) == {"data.source_dir", "data.data_dir"}
    assert free(verify=False) == free() == assemble.free(config(data="digits")) == assemble.FREE
