"""The pipeline on other kinds of data: labelled vectors, series, and labelled digits with guidance."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laboratory import CLASSIFIER, JUMP, MAP, SCORE, numbers, read, refused, run
from laboratory import laboratory as laboratory  # a fixture

import fmjax
from fmjax import correction
from fmjax.experiments import assemble, build, pipeline, train

pytestmark = pytest.mark.usefixtures("laboratory")
MLP = {"name": "mlp", "width": 8, "depth": 1}
EULER = {"solver": "euler", "steps": 2}
END = {**EULER, "at": (2,), "by": "score", "alpha": 0.5}


def finished(path, **changes):
    pipeline.main(read(solver="euler", **changes), path)
    assert (path / "report.html").exists()
    return path, {r["name"]: r for r in numbers(path)["rows"]}


@pytest.fixture(scope="module")
def vectors(laboratory, tmp_path_factory):
    """Vectors of five entries in three classes, the classes far apart."""
    folder, rng = tmp_path_factory.mktemp("vectors"), np.random.default_rng(0)
    y = np.arange(150) % 3
    x = rng.normal(size=(150, 5)) + 10.0 * y[:, None]
    np.savez(folder / "vectors.npz", x=x.astype(np.float32), y=y)
    fixes = {
        "apart": {**EULER, "at": (1,), "by": "classifier", "alpha": 0.1},
        "drift": {**EULER, "at": (0, 2), "by": "drift", "alpha": 1.0, "bandwidth": 2.0},
    }
    return finished(
        folder / "w", data={"name": "arrays", "path": str(folder / "vectors.npz")}, conditional=True, net=MLP,
        correctors={"classifier": CLASSIFIER | {"net": MLP | {"logit": True}}}, corrections=fixes,
        samplers={"euler": (2,)}, **{"sampling.samples": 30},
    )  # fmt: skip


def test_the_pipeline_runs_on_labelled_vectors(vectors):
    path, rows = vectors
    assert {name: r["nfe"] for name, r in rows.items()} == {
        "euler, 2 steps": 2, "euler, 2 steps, classifier at 1": 4, "euler, 2 steps, drift at 0, 2": 2,
        "training data": 0,
    }  # fmt: skip
    assert {frozenset(r["distances"]) for r in rows.values()} == {frozenset(("sliced W2", "energy distance"))}
    assert len(numbers(path)["auc"]["classifier"]) == 3


def test_labels_travel_with_the_marginals_and_the_samples(vectors):
    """An untrained flow hardly moves noise; a drift between the marginals of each class does, to its own class."""
    path, _ = vectors
    forward, backward = (correction.read_marginals(path / "marginals" / d) for d in ("forward", "backward"))
    train_set = build.data({"name": "arrays", "path": str(path.parent / "vectors.npz")}).train
    np.testing.assert_array_equal(backward.cond, train_set.cond)
    np.testing.assert_array_equal(forward.cond, train_set.cond[np.arange(64) % len(train_set.cond)])
    drift = {"at": (2,), "by": "drift", "alpha": 1.0, "bandwidth": 2.0}
    push = {"at": (2,), "by": "affine_push", "per_class": True, "examples": 600}
    trained = fmjax.load(path)
    for fix, tolerance in ((drift, 2.5), (push, 1.0)):
        for label in range(3):
            x = trained.sample(20, **EULER, label=label, corrections=fix)
            np.testing.assert_allclose(x.mean() - 10.0 * label, 0, atol=tolerance)
    same = trained.sample(3, **EULER, cond=np.ones(3, np.int32))
    np.testing.assert_allclose(trained.sample(4, **EULER, label=1)[:3], same, atol=1e-6)
    with pytest.raises(ValueError, match=r"^cond=\[\(2,\)\]: not 3 conditions"):
        trained.sample(3, **EULER, cond=np.ones(2, np.int32))


def test_the_pipeline_runs_on_series(laboratory, tmp_path):
    """An MLP flattens them; a network of images alone refuses them."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "series.npy", np.cumsum(rng.normal(size=(120, 8, 2)), 1).astype(np.float32))
    changes = {"data": {"name": "arrays", "path": str(tmp_path / "series.npy")}, "sampling.samples": 20}
    changes |= {"correctors": {"score": SCORE}, "corrections": {"end": END}, "samplers": {"euler": (2,)}}
    with pytest.raises(ValueError, match=r"^net='song_unet': takes images, and the data are series \[8, 2\]"):
        pipeline.main(read(**changes | {"net": {"name": "song_unet"}}), tmp_path / "w")
    path, rows = finished(tmp_path / "w", **changes)
    assert list(rows) == ["euler, 2 steps", "euler, 2 steps, score at 2", "training data"]
    assert fmjax.load(path).sample(2, **EULER).shape == (2, 8, 2)
    run("sample", f"--workdir={path}", "--count=3", f"--out={tmp_path / 'x.png'}", "--solver=euler", "--solver_steps=2")


@pytest.fixture(scope="module")
def digits(laboratory, tmp_path_factory):
    """Labelled digits with guidance: a pipeline, hardly trained."""
    path = tmp_path_factory.mktemp("digits") / "w"
    fixes = {"end": END, "map": {**JUMP, "at": (2,), "by": "score", "alpha": 0.5}}
    return finished(
        path, data="digits", conditional=True, label_dropout=0.2, guidance=2.0, net=MLP, correctors={"score": SCORE},
        flow_map=MAP, corrections=fixes, samplers={"euler": (2,), "flow_map": (2,)}, metrics=("sliced_w2_to",),
        sample_every=4,
    )  # fmt: skip


def test_the_pipeline_runs_on_labelled_digits_with_guidance(digits):
    path, rows = digits
    assert {name: r["nfe"] for name, r in rows.items()} == {
        "euler, 2 steps": 4, "flow map, 2 steps": 2, "euler, 2 steps, score at 2": 5,
        "flow map, 2 steps, score at 2": 3, "training data": 0,
    }  # fmt: skip
    assert sorted(p.name for p in (path / "flow" / "samples").iterdir()) == ["step-0000004.png", "step-0000008.png"]


def test_a_velocity_is_guided_at_any_scale(digits):
    """The guided velocity mixes the velocities of the label and of no label, whatever scale the config has."""
    trained = fmjax.load(digits[0])
    labels, null = jnp.arange(6), jnp.full(6, 10)
    x = jnp.asarray(build.data("digits").test.x[:6])
    field, strong = (m.methods["flow"].velocity(m.params["flow"]) for m in (trained.guided(1.0), trained.guided(3.0)))
    labelled, without = (jax.jit(field)(x, 0.5, cond) for cond in (labels, null))
    assert np.abs(labelled - without).max() > 1e-3
    np.testing.assert_allclose(jax.jit(strong)(x, 0.5, labels), 3 * labelled - 2 * without, atol=1e-4)
    np.testing.assert_allclose(trained.velocity(x, 0.5, labels), 2 * labelled - without, atol=1e-4)


def test_samples_have_any_label_and_scale_by_every_way(digits, tmp_path):
    path, trained = digits[0], fmjax.load(digits[0])

    def draw(*flags):
        fixed = ["--count=4", "--solver=euler", "--solver_steps=2", f"--out={tmp_path / 'x.npz'}"]
        run("sample", f"--workdir={path}", *fixed, *flags)
        with np.load(tmp_path / "x.npz") as content:
            return content["x"], content["cond"]

    x, labels = draw()
    np.testing.assert_array_equal(labels, np.arange(4))
    np.testing.assert_array_equal(x, trained.sample(4, **EULER))
    (folder,) = (path / "samples").glob("euler--2-steps-" + "[0-9a-f]" * 12)
    np.testing.assert_allclose(np.load(folder / "0.npy")[:4], x, atol=1e-5)
    other, labels = draw("--guidance=3", "--label=7")
    np.testing.assert_array_equal(labels, [7] * 4)
    np.testing.assert_array_equal(other, trained.sample(4, **EULER, label=7, guidance=3.0))
    assert np.abs(other - x).max() > 1e-3


def test_an_evaluation_at_another_scale_draws_other_samples(digits, tmp_path):
    """The folder keeps samples by everything that they depend on, the scale too."""
    path = shutil.copytree(digits[0], tmp_path / "w")
    means = []
    for scale in (2.0, 4.0):
        run("evaluate", f"--workdir={path}", f"--config.guidance={scale}")
        rows = {r["name"]: r["distances"]["sliced W2"][0] for r in numbers(path, "evaluation.json")["rows"]}
        means.append(rows)
    (table, _) = digits[1]["euler, 2 steps"]["distances"]["sliced W2"]
    assert means[0]["euler, 2 steps"] == pytest.approx(table, rel=1e-5)
    assert means[0]["euler, 2 steps"] != means[1]["euler, 2 steps"]
    assert means[0]["training data"] == means[1]["training data"]
    assert len(list((path / "draws").glob("euler--2-steps-" + "[0-9a-f]" * 12))) == 2


def test_a_folder_of_images_holds_one_picture_a_sample(digits, tmp_path):
    run("sample", f"--workdir={digits[0]}", "--count=3", f"--out={tmp_path / 'images'}")
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [f"{i:06d}.png" for i in range(3)]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("label=10", "label=10: labels are 0 .. 9"), ("label=-1", "label=-1"), ("guidance=nan",) * 2],
)
def test_labels_and_scales_that_do_not_exist_are_refused(argument, message, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("sample", f"--workdir={digits[0]}", f"--{argument}").startswith(message)
    assert not list(tmp_path.iterdir())


def test_guidance_is_part_of_what_marginals_and_samples_are_made_with(digits):
    line = refused("pipeline", f"--workdir={digits[0]}", "--config.guidance=1.5")
    assert "its stage 'marginals'" in line and "guidance is 2.0 there, 1.5 here" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditional": True}, "conditional=True: .*has no labels"),
        ({"guidance": 2.0}, "guidance=2.0"),
        ({"label_dropout": 0.1}, "label_dropout=0.1"),
        ({"data": {"name": "eight_gaussians", "labels": True, "train": 240}, "conditional": True}, "net='plain'"),
        ({"data": "digits", "net": MLP, "conditional": True, "guidance": 2.0}, "guidance=2.0: .*label_dropout=0.1"),
        (
            {"data": "digits", "net": MLP, "conditional": True, "correctors": {"score": SCORE}, "forward_examples": 6},
            "forward_examples=6: 'score' cannot train",
        ),
        ({"data": {"name": "arrays", "path": "/nowhere.npz"}}, ".*no such file"),
    ],
)
def test_conditions_that_cannot_work_are_refused_before_the_first_step(changes, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=f"^{message}") as caught:
        pipeline.main(read(**changes), tmp_path / "w")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300 and not (tmp_path / "w").exists()


def test_float_conditions_need_a_network_that_takes_them(laboratory, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=rng.normal(size=(60, 5)).astype(np.float32), y=rng.normal(size=(60, 2)))
    data = {"name": "arrays", "path": str(tmp_path / "a.npz")}
    with pytest.raises(ValueError, match="^conditional=True: .*net='plain' takes no arrays"):
        pipeline.main(read(data=data, conditional=True), tmp_path / "w")


def test_the_mean_of_the_data_is_kept_with_a_network_that_needs_it(laboratory, tmp_path):
    """A contrastive flow subtracts the mean: a folder alone has the velocity of the plan."""
    contrastive = {"method": {"name": "contrastive", "weight": 0.2}, "negatives": "any"}
    settings = read(**contrastive, data={"name": "two_moons", "train": 240})
    train.main(settings, tmp_path)
    data = build.data(settings.common.data)
    assert np.abs(data.train.x.mean(0)).max() > 0.1
    trained, x = fmjax.load(tmp_path), jnp.asarray(data.test.x[:8])
    velocity = assemble.flow_plan(settings, data).method.velocity(trained.params)
    np.testing.assert_allclose(trained.velocity(x, 0.3), velocity(x, 0.3), atol=1e-6)
