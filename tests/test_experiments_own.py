"""A user's first day: own files by a config alone, trained, sampled, conditioned, evaluated and corrected."""

import json

import jax
import numpy as np
import pytest
from laboratory import ROOT, numbers, read, refused, run
from laboratory import laboratory as laboratory  # a fixture
from PIL import Image

import fmjax
from fmjax.data import arrays

pytestmark = pytest.mark.usefixtures("laboratory")
EULER = {"solver": "euler", "steps": 8}
TINY = {
    "batch_size": 16, "steps": 4, "warmup": 1, "log_every": 2, "save_every": 4, "sample_every": 0,
    "sampling.samples": 8, "samplers.euler": "(2,)", "samplers.rk4": "(2,)", "forward_examples": 64, "solver_steps": 2,
    "correctors.score.steps": 4, "correctors.score.batch_size": 16, "flow_map.steps": 4, "flow_map.batch_size": 16,
    "corrections.end.steps": 2, "corrections.end.at": "(2,)",
}  # fmt: skip
NETS = {
    "images": {
        "net.channels": 8,
        "net.multipliers": "(1,)",
        "net.blocks": 1,
        "net.attention": "()",
        "net.middle": False,
        "data.size": 4,
    },
    "table": {"net.width": 16, "net.depth": 1},
    "series": {"net.channels": 8, "net.multipliers": "(1,)", "net.middle": False},
}
CONDITIONAL = {"conditional": True, "label_dropout": 0.2, "guidance": 2.0}


def flags(**fields):
    return [f"--config.{name}={value}" for name, value in fields.items()]


def shrunk(name):
    fields = TINY | NETS[name]
    nets = {k.removeprefix("net."): v for k, v in NETS[name].items() if k.startswith("net.")}
    return fields | {f"correctors.score.net.{k}": v for k, v in nets.items()}


def written(name, folder):
    """Files of a user: 40 images in two sub-folders; a labelled table; series with their past."""
    rng = np.random.default_rng(0)
    if name == "images":
        for i in range(80):
            (folder / "set" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (7, 5 + i % 3, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "set" / "ab"[i % 2] / f"{i}.{('png', 'webp')[i % 4 // 2]}")
        return folder / "set"
    content = {"x": rng.normal(size=(80, 5)) * 100, "y": np.arange(80) % 3}
    if name == "series":
        whole = np.cumsum(rng.normal(size=(80, 16, 2)), 1)
        content = {"x": whole[:, 8:], "y": whole[:, :8]}
    np.savez(folder / "own.npz", **content)
    return folder / "own.npz"


def started(name, folder, command="train"):
    path = folder / "w"
    config = f"--config={ROOT / 'configs' / name}.py"
    place = flags(**{"data.path": written(name, folder)})
    conditional = CONDITIONAL if name == "table" else {"conditional": True}  # guidance compiles the network twice
    run(command, config, f"--workdir={path}", *place, *flags(**shrunk(name) | conditional))
    return path


@pytest.fixture(scope="module")
def gaussian(laboratory, tmp_path_factory):
    """x = (y, -y) + 20 noise + 1000, y ~ N(300, 7^2) times 100: a run on standardised data, trained to the end."""
    folder, rng = tmp_path_factory.mktemp("gaussian"), np.random.default_rng(0)
    y = rng.normal(300, 7, 4000)
    x = 1000 + 100 * (y - 300)[:, None] * np.array([1, -1, 0]) + np.array([200, 200, 0.01]) * rng.normal(size=(4000, 3))
    np.savez(folder / "own.npz", x=x, y=y)
    config = f"--config={ROOT / 'configs' / 'table.py'}"
    fields = {"net.width": 48, "net.depth": 2, "steps": 800, "ema": 0.99, "learning_rate": 4e-3, "batch_size": 256}
    fields |= {"data.path": folder / "own.npz", "conditional": True, "label_dropout": 0.1, "save_every": 800}
    run("train", config, f"--workdir={folder / 'w'}", *flags(**fields))
    return folder / "w"


def test_samples_follow_a_float_condition_in_the_units_of_the_data(gaussian):
    trained = fmjax.load(gaussian)
    data = arrays(path=str(gaussian.parent / "own.npz"))
    for value in (290.0, 300.0, 310.0):
        x = trained.sample(400, cond=np.full(400, value, np.float32), **EULER)
        want = 1000 + 100 * (value - 300) * np.array([1, -1, 0])
        spread = data.train.x.std(0)
        assert (np.abs(x.mean(0) - want) / spread < 0.15).all(), (value, x.mean(0))
        assert 100 < x[:, 0].std() < 320  # of one condition: 200, of all: 728
    drawn = trained.sample(1000, cond=data.train.cond[:1000].astype(np.float32), **EULER)
    np.testing.assert_allclose(drawn.std(0) / data.train.x.std(0), 1, atol=0.2)
    assert np.abs(drawn.mean(0) - data.train.x.mean(0)).max() < 0.15 * data.train.x.std(0).max()


def test_guidance_by_a_float_condition_goes_past_it(gaussian):
    trained, cond = fmjax.load(gaussian), np.full(200, 307.0, np.float32)
    plain, strong = (trained.sample(200, cond=cond, guidance=g, **EULER).mean(0)[0] for g in (1.0, 2.0))
    # exact means of Euler's 8 steps for the Gaussian of this condition and the Gaussian of all: 1700 and 1789
    assert abs(plain - 1700) < 60 and abs(strong - 1789) < 60 and strong > plain + 20


def test_noise_and_densities_are_of_the_data_in_their_units(gaussian):
    trained = fmjax.load(gaussian)
    data = arrays(path=str(gaussian.parent / "own.npz"))
    x, cond = data.test.x[:8], data.test.cond[:8].astype(np.float32)
    z = trained.encode(x, cond=cond)
    assert np.abs(z).max() < 5
    np.testing.assert_allclose(trained.decode(z, cond=cond), x, rtol=1e-4, atol=1e-2 * x.std(0).max() / 100)
    ends = trained.interpolate(x[0], x[1], 3, cond=cond[0])[[0, 2]]
    np.testing.assert_allclose(ends, x[:2], rtol=1e-3, atol=2.0)
    centre = 1000 + 100 * (cond - 300)[:, None] * np.array([1, -1, 0])
    sigma = np.array([200, 200, 0.01])
    truth = (-0.5 * ((x - centre) / sigma) ** 2 - np.log(sigma) - 0.5 * np.log(2 * np.pi)).sum(1)
    assert np.abs(trained.log_prob(x, cond=cond) - truth).mean() < 1.0  # nats, of a density between 1e-9 and 1e-4
    run("likelihood", f"--workdir={gaussian}", "--count=32")
    result = json.loads((gaussian / "likelihood.json").read_text())
    rows = slice(0, 32)
    x, cond = data.test.x[rows], data.test.cond[rows].astype(np.float32)
    assert result["unit"] == "nats per example"
    assert result["mean"] == pytest.approx(trained.log_prob(x, cond=cond).mean(), abs=1e-2)


def test_sample_17_is_the_same_by_every_way(gaussian, tmp_path):
    trained, cond = fmjax.load(gaussian), np.linspace(280, 320, 20).astype(np.float32)
    np.save(tmp_path / "y.npy", cond)
    command = [
        f"--workdir={gaussian}",
        "--count=20",
        "--solver=euler",
        "--solver_steps=8",
        f"--cond={tmp_path / 'y.npy'}",
    ]
    run("sample", *command, f"--out={tmp_path / 'x.npz'}")
    with np.load(tmp_path / "x.npz") as content:
        np.testing.assert_array_equal(content["cond"], cond)
        x = content["x"]
    one = trained.sample(1, cond=cond[17:18], first=17, **EULER)
    np.testing.assert_allclose(x[17], one[0], rtol=1e-5)
    np.testing.assert_allclose(trained.sample(20, cond=cond, **EULER), x, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cond": np.zeros((2, 3), np.float32)}, r"cond=\[2, 3\]: another shape than in training"),
        ({}, r"cond=None: this run is conditioned on floats \[n\]"),
        ({"label": 1}, "label=1: this run has no labels"),
    ],
)
def test_other_conditions_are_refused_in_one_sentence(options, message, gaussian):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        fmjax.load(gaussian).sample(2, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


@pytest.mark.parametrize("name", NETS)
def test_a_config_of_own_files_trains_and_samples(name, tmp_path, capfd):
    path = started(name, tmp_path)
    said = capfd.readouterr().err
    assert "64 for training, 8 for validation, 8 for testing" in said
    assert ("labels 0..1 (0 a, 1 b)" in said) == (name == "images")
    assert ("standardised by its training examples" in said) == (name != "images")
    trained = fmjax.load(path)
    out, more = tmp_path / "x.npz", [f"--cond={tmp_path / 'own.npz'}"] if name == "series" else []
    if name == "series":
        with np.load(tmp_path / "own.npz") as content:
            np.savez(tmp_path / "own.npz", y=content["y"][:3])
    run("sample", f"--workdir={path}", "--count=5", "--solver=euler", "--solver_steps=2", f"--out={out}", *more)
    with np.load(out) as content:
        x, cond = content["x"], content["cond"]
    assert x.shape == (5, *{"images": (4, 4, 3), "table": (5,), "series": (8, 2)}[name])
    if name == "series":
        np.testing.assert_array_equal(cond[3:], cond[:2])  # three rows, in turn
    if name == "table":
        np.testing.assert_allclose(trained.sample(5, cond=cond, solver="euler", steps=2), x, rtol=1e-5, atol=1e-5)
    if name == "images":
        by_name = trained.sample(2, label="b", solver="euler", steps=2)
        np.testing.assert_array_equal(by_name, trained.sample(2, label=1, solver="euler", steps=2))
        line = refused("sample", f"--workdir={path}", "--label=c")
        assert line.startswith("label='c': no such label") and "a, b" in line


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_a_config_of_own_files_is_corrected_and_evaluated(name, tmp_path):
    path = started(name, tmp_path, "pipeline")
    rows = {r["name"]: r["distances"] for r in numbers(path)["rows"]}
    assert {"euler, 2 steps", "rk4, 2 steps, score at 2", "training data"} <= rows.keys()
    run("evaluate", f"--workdir={path}")
    assert all(np.isfinite(d[0]) for d in rows["euler, 2 steps"].values())
    run("likelihood", f"--workdir={path}", "--count=4")
    assert json.loads((path / "likelihood.json").read_text())["unit"].startswith("bits" if name == "images" else "nats")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("table", {"batch_size": 65}, "batch_size=65: there are 64 examples"),
        ("table", {"data.path": "gone.npz"}, "data.path=.*gone.npz|path=.*gone.npz"),
        ("table", {"net.name": "unet"}, "net='unet': takes images and series"),
        ("series", {"net.name": "song_unet"}, "net='song_unet': takes images"),
        ("images", {"data.size": 0}, "data.size=0"),
        ("images", {"data.channels": 2}, "data.channels=2"),
        ("images", {"guidance": 2.0, "conditional": False}, "guidance=2.0|label_dropout=0.2"),
    ],
)
def test_what_cannot_work_is_said_before_any_work(name, fields, message, tmp_path):
    import re

    place = {"data.path": written(name, tmp_path)}
    shapes = {k: v for k, v in shrunk(name).items() if "net." not in k} if "net.name" in fields else shrunk(name)
    base = CONDITIONAL if name == "images" else {}
    arguments = flags(**shapes | base | place | fields)
    line = refused("train", f"--config={ROOT / 'configs' / name}.py", f"--workdir={tmp_path / 'w'}", *arguments)
    assert re.match(message, line), line
    assert not (tmp_path / "w").exists()


def test_a_run_keeps_where_its_data_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("own.npy", np.zeros((4, 2)))
    kept = [read(data={"name": "arrays", "path": path}).config["data"]["path"] for path in ("own.npy", "gone.npy")]
    assert kept == [str(tmp_path / "own.npy"), "gone.npy"]


def test_one_class_cannot_condition(tmp_path):
    (tmp_path / "set" / "a").mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / "set" / "a" / f"{i}.png")
    fields = shrunk("images") | {"data.path": tmp_path / "set", "conditional": True}
    line = refused(
        "train", f"--config={ROOT / 'configs' / 'images'}.py", f"--workdir={tmp_path / 'w'}", *flags(**fields)
    )
    assert line.startswith("conditional=True: ") and "one class" in line
    assert jax.process_count() == 1
