"""Plans from settings: what is refused before work, and that each field means what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laboratory import read, records

from fmjax.experiments import assemble, build, networks, specs
from fmjax.keys import example_keys
from fmjax.sampling import guided_training
from fmjax.storage import checkpoint
from fmjax.training import loop, sharding

DIGITS = {"data": {"name": "digits"}, "net": {"name": "mlp", "width": 16, "depth": 1}, "coupling": "minibatch_ot"}
LABELS = {"conditional": True, "label_dropout": 0.5, "coupling": "independent"}
SCORE = {"method": {"name": "score_corrector", "sigma": 0.2}}


@pytest.fixture(scope="module")
def digits():
    return build.data("digits")


@pytest.fixture(scope="module")
def points():
    return build.data(read().common.data)


def small(digits, **changes):
    """A flow's plan on one device: what is tested of it does not depend on the mesh, and one compiles faster."""
    return assemble.flow_plan(read(**(DIGITS | changes)), digits).replace(mesh=sharding.make_mesh(jax.devices()[:1]))


def same(a, b):
    return all((np.asarray(x) == np.asarray(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"method": "flow_machting"}, "method='flow_machting'.*did you mean 'flow_matching'"),
        ({"net": {"name": "mlp", "widht": 3}}, "net.widht=3.*did you mean 'width'"),
        ({"path": "liner"}, "path='liner'.*did you mean 'linear'"),
        ({"coupling": "minibatch"}, "coupling='minibatch'.*did you mean 'minibatch_ot'"),
        ({"coupling": "semidiscret"}, "coupling='semidiscret'.*did you mean 'semidiscrete'"),
        ({"batch_size": 30}, "batch_size=30.*24 or 32"),
        ({"batch_size": 100_000}, "batch_size=100000"),
        ({"target": "frozen"}, "target='frozen'.*teacher"),
        ({"teacher": "w"}, "target='self'.*teacher='w'"),
        ({"method": "contrastive"}, "negative"),
        ({"label_dropout": 0.1}, "label_dropout=0.1.*conditional=True"),
        ({"guidance": 2.0, "conditional": True}, "guidance=2.0.*label_dropout=0.1"),
        ({"net": {"name": "mlp", "guided": True}, "conditional": True}, "net.guided=True.*label_dropout=0.1"),
        ({"conditional": True, "net": {"name": "mlp", "classes": 10}}, "net.classes=10"),
        ({"conditional": True, "net": "plain"}, "net='plain'.*10 classes"),
        (
            {"method": {"name": "score_corrector", "sigma": 0.1}},
            "method='score_corrector'.*batches of marginals.*'flow' gives data",
        ),
        ({"method": "discriminator", "net": {"name": "mlp", "logit": True}}, "method='discriminator'"),
    ],
)
def test_a_bad_flow_is_refused_in_one_line(changes, line, digits):
    settings = read(**(DIGITS | changes))
    with pytest.raises(ValueError, match=line) as caught:
        assemble.flow_plan(settings, build.data(settings.common.data))
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({"flow_map": {"method": "flow_matching"}}, "flow_map.method='flow_matching'.*no flow map"),
        ({"flow_map": {"method": "lagrangian", "batch_size": 16}}, "batch=2 per device"),
        ({"correctors": {"a": {"method": {"name": "score_corrector", "sigma": 0.0}}}}, "sigma"),
        (
            {"correctors": {"a": {"method": "flow_matching"}}},
            "correctors.a.method='flow_matching'.*batches of data.*'correctors.a' gives marginals",
        ),
        ({"correctors": {"a": SCORE | {"net": "unett"}}}, "correctors.a.net='unett'.*did you mean 'unet'"),
    ],
)
def test_a_bad_stage_is_refused_in_one_line(parts, line, points):
    with pytest.raises(ValueError, match=line) as caught:
        networks.plans(read(**parts), points)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_conditions_need_data_that_have_them():
    settings = read(conditional=True)
    with pytest.raises(ValueError, match="^conditional=True.*no labels"):
        assemble.flow_plan(settings, build.data(settings.common.data))


def test_a_weighted_loss_records_the_residual_unweighted(points, tmp_path):
    for name, weighting in (("a", None), ("b", "adaptive")):
        settings = read(steps=1, log_every=1, weighting=weighting)
        plan = assemble.flow_plan(settings, points).replace(mesh=sharding.make_mesh(jax.devices()[:1]))
        loop.train(plan, tmp_path / name)
    (a,), (b,) = records(tmp_path / "a"), records(tmp_path / "b")
    np.testing.assert_allclose(b["residual"], a["loss"], rtol=1e-5)
    np.testing.assert_allclose(b["loss"], 1.0, atol=1e-2)  # d r / (d r + 0.01)


@pytest.mark.parametrize("name", ["improved_mean_flow", "lagrangian"])
def test_a_network_of_scales_trains_at_random_ones_and_is_used_at_the_config_s(name, digits):
    """The loss of a config is the loss of its parts put together by hand; a view is the net at (label, guidance)."""
    net = {"name": "mlp", "width": 16, "depth": 1, "guided": True}
    settings = read(**(DIGITS | {"net": net, "method": name, **LABELS, "label_dropout": 0.25, "guidance": 3.0}))
    plan = assemble.flow_plan(settings, digits)
    teacher = guided_training.guided_teacher(plan.model.net, null=10)
    options = {"teacher": teacher} if name == "lagrangian" else {"null": 10}
    factory, _ = specs.resolve(specs.METHOD, name, field="method")
    method = guided_training.random_scale(factory(plan.model.net, **options))
    method = guided_training.label_dropout(method, rate=0.25, null=10)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape, np.float32), loop.initial_parameters(plan))
    keys, batch = example_keys(jax.random.key(0), jnp.arange(32)), jax.tree.map(jnp.asarray, plan.data.batch(0))
    value, _ = jax.jit(plan.method.loss)(params, params, batch, keys)
    np.testing.assert_allclose(value, jax.jit(method.loss)(params, params, batch, keys)[0], rtol=1e-6)
    labels, half, w = batch.cond, jnp.full(32, 0.5), jnp.full(32, 3.0)
    u = plan.model.net(params, batch.x1, half, 2 * half, (labels, w))
    jump = plan.method.flow_map(params)(batch.x1, half, 2 * half, labels)
    np.testing.assert_allclose(jump, batch.x1 + u / 2, rtol=1e-5)
    other = plan.model.net(params, batch.x1, half, half, (labels, w - 1))
    assert np.abs(plan.method.velocity(params)(batch.x1, half, labels) - other).max() > 1e-3


def test_a_conditional_run_trains_on_its_labels_and_guides_its_velocity(digits):
    """The batch has the labels of its images, dropout trains the null label, and guidance goes past the condition."""
    plan, plain = small(digits, **LABELS), small(digits)
    batch = plan.data.batch(0)
    index = [int(np.flatnonzero((digits.train.x == x).all((1, 2, 3)))[0]) for x in batch.x1]
    np.testing.assert_array_equal(batch.cond, digits.train.cond[index])
    assert plain.data.batch(0).cond is None
    params = loop.initial_parameters(plan)
    assert params["Embed_0"]["embedding"].shape[0] == 11 and "Embed_0" not in loop.initial_parameters(plain)

    rng = np.random.default_rng(0)  # the output layer starts at zero
    params = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), params)
    guided = small(digits, **LABELS, guidance=3.0).method.velocity(params)
    velocity = plan.method.velocity(params)
    x, y = jnp.asarray(batch.x1), jnp.asarray(batch.cond)
    labelled, null = velocity(x, 0.5, y), velocity(x, 0.5, jnp.full_like(y, 10))
    np.testing.assert_allclose(guided(x, 0.5, y), null + 3 * (labelled - null), rtol=1e-4, atol=1e-5)
    assert np.abs(labelled - null).max() > 0.01

    keys = example_keys(jax.random.key(1), jnp.arange(32))
    placed = jax.tree.map(jnp.asarray, batch)
    loss = lambda params: plan.method.loss(params, params, placed, keys)[0]
    gradient = np.abs(jax.jit(jax.grad(loss))(params)["Embed_0"]["embedding"]).max(1)
    assert gradient[10] > 0, "the null label is never trained"


def test_a_contrastive_run_gets_other_examples_and_the_mean_of_the_data(digits):
    plan = small(digits, method={"name": "contrastive", "weight": 0.2}, negatives="any", coupling="independent")
    batch = plan.data.batch(0)
    each = lambda x: [int(np.flatnonzero((digits.train.x == a).all((1, 2, 3)))[0]) for a in x]
    assert not set(zip(each(batch.x1), each(batch.negative), strict=True)) & {(i, i) for i in range(digits.train.count)}
    params, x = loop.initial_parameters(plan), jnp.asarray(batch.x1)  # a network that is zero: the mean is left
    velocity = jax.jit(plan.method.velocity(params))(x, 0.3)
    np.testing.assert_allclose(velocity[0], 0.2 * np.asarray(digits.train.x).mean(0), atol=1e-6)


def test_a_semidiscrete_run_pairs_noise_nearer_than_a_minibatch_can(digits):
    cost = lambda batch: np.square(batch.x0 - batch.x1).reshape(len(batch.x1), -1).sum(1).mean()
    draws = {"name": "semidiscrete", "draws": 20}
    near, batchwise = small(digits, coupling=draws, flip=True), small(digits)
    costs = [[cost(plan.data.batch(i)) for i in range(8)] for plan in (near, batchwise)]
    difference = np.subtract(*costs)
    assert difference.mean() + 4 * difference.std() / 8**0.5 < 0


def test_folders_of_files_may_move_only_where_the_files_are_known():
    fields = lambda **options: assemble.flow_fields(read(data={"name": "mnist", "source_dir": "a", **options}))
    assert "data.source_dir" not in fields(verify=True) and "data.source_dir" in fields(verify=False)
    assert not set(assemble.FREE) & set(fields())


@pytest.fixture(scope="module")
def teacher(points, tmp_path_factory):
    """A trained flow: the folder of its run and its averaged parameters."""
    path = tmp_path_factory.mktemp("teacher")
    plan = assemble.flow_plan(read(seed=1), points).replace(mesh=sharding.make_mesh(jax.devices()[:1]))
    return path, loop.train(plan, path / "flow")


MAP = {"method": {"name": "lagrangian", "diagonal": 0.0}, "steps": 1, "log_every": 1}


def test_a_run_starts_from_and_learns_from_the_averages_of_other_runs(points, teacher, tmp_path):
    """One step of a distillation, against the loss at the averages of the teacher's run."""
    path, state = teacher
    one_device = lambda plan: plan.replace(mesh=sharding.make_mesh(jax.devices()[:1]))
    first = loop.train(one_device(assemble.flow_plan(read(seed=2, steps=3), points)), tmp_path / "first" / "flow").ema
    settings = read(init=str(tmp_path / "first"), teacher=str(path), target="frozen", **MAP)
    plan = one_device(assemble.flow_plan(settings, points))
    begin, target = (assemble.start_of(plan, settings, field) for field in ("init", "teacher"))
    assert same(begin, first) and same(target, state.ema)
    loop.train(plan, tmp_path / "w", params=begin, teacher=target)
    keys = example_keys(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0), jnp.arange(32))
    batch = jax.tree.map(jnp.asarray, plan.data.batch(0))
    loss = jax.jit(lambda *args: plan.method.loss(*args, batch, keys)[0])
    value = loss(first, state.ema)
    (record,) = records(tmp_path / "w")
    np.testing.assert_allclose(record["loss"], value, rtol=1e-5)
    for params, other in ((first, first), (first, state.params), (state.ema, state.ema)):
        assert abs(loss(params, other) - value) > 1e-6 * value


def test_a_start_of_another_network_is_refused(points, teacher, tmp_path):
    path, _ = teacher
    settings = read(init=str(path), net={"name": "plain", "width": 4, "depth": 1, "waves": 0, "times": 0})
    plan = assemble.flow_plan(settings, points)
    with pytest.raises(ValueError, match="^init=.*another network"):
        assemble.start_of(plan, settings, "init")
    nowhere = read(init=str(tmp_path / "none"))
    with pytest.raises((ValueError, RuntimeError), match="none"):
        assemble.start_of(assemble.flow_plan(nowhere, points), nowhere, "init")


def test_what_a_model_has_beside_the_checkpoint_keeps_its_initial_values(points, teacher):
    path, state = teacher
    settings = read(weighting="learned", init=str(path), **MAP)
    plan = assemble.flow_plan(settings, points)
    merged = assemble.start_of(plan, settings, "init")
    assert same({k: v for k, v in merged.items() if k != "log_variance"}, state.ema)
    assert same(merged["log_variance"], loop.initial_parameters(plan)["log_variance"])


def test_a_prediction_is_not_taken_for_a_velocity(points, teacher, tmp_path):
    from fmjax.experiments import workdir
    from fmjax.storage import files

    path, _ = teacher
    files.write_json(path / "config.json", workdir.plain(read(seed=1).config))
    settings = read(init=str(path), method="denoising")
    with pytest.raises(ValueError, match="^init=.*denoising and flow_matching.*as_flow"):
        assemble.start_of(assemble.flow_plan(settings, points), settings, "init")
    assert checkpoint.latest_step(path / "flow" / "checkpoints") == 8
