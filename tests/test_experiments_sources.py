"""The source of a config in every command: what a flow starts from in training, marginals, samples and reflow."""

import dataclasses
import functools
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from laboratory import MAP, POINTS, RK4, SCORE, base, config, config_file, digest, read, run
from laboratory import laboratory as laboratory  # a fixture

import fmjax
from fmjax import correction, paths, sampling, sources
from fmjax.experiments import (
    assemble,
    build,
    drawing,
    networks,
    pipeline,
    records,
    reflow,
    settings,
    stages,
    train,
    workdir,
)
from fmjax.experiments import marginals as marginal_command
from fmjax.experiments.drawing import Models
from fmjax.experiments.samplers import Sampler
from fmjax.experiments.workdir import WorkdirError
from fmjax.keys import example_keys, fold_in, from_seed
from fmjax.storage import files
from fmjax.types import Method, expand, over_batch

pytestmark = pytest.mark.usefixtures("laboratory")
MOONS = {"name": "two_moons", "train": 200, "validation": 60, "test": 50, "seed": 3}
FROM_MOONS = {"name": "data", "data": MOONS}
UNIFORM = {"name": "uniform_noise", "low": 2.0, "high": 3.0}
GAUSS = {"name": "gaussian_noise", "mean": (3.0, -1.0), "std": 0.5}
SHIFT = np.array([0.5, -2.0], np.float32)  # of an exact flow, x1 = SHIFT + 3 (x0 - SHIFT)
MODES = {"name": "gaussian_mixture", "means": ((-1.0, 0.0), (2.0, 1.0)), "std": 0.6}


def exact(x, t, cond=None):
    """The velocity of the straight lines from x0 to SHIFT + 3 (x0 - SHIFT)."""
    return 2 * (x - SHIFT) / expand(1 + 2 * over_batch(t, x), x)


def rows_are_of(x, data):
    """Whether every example is an example of the data."""
    return (np.abs(np.asarray(x)[:, None] - np.asarray(data)).sum(-1).min(1) == 0).all()


def moons():
    return build.data(MOONS)


# N(0, I): nothing changes


def test_the_default_source_changes_no_number_and_no_record(tmp_path):
    """A folder of a config without the field is continued by one with the field; its record does not name it."""
    old = config(steps=4).to_dict()
    del old["source"]
    train.main(settings.read(old), tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text(json.dumps(old))
    assert "source" not in "".join(records.read_record(tmp_path / "w" / "flow")["fields"])
    for spec in ({"name": "gaussian_noise"}, {"name": "gaussian_noise", "mean": 0, "std": (1.0, 1.0)}):
        chosen = read(source=spec)
        assert chosen.common.normal_source and assemble.flow_plan(chosen, build.data(POINTS)).data.batch(0).x0 is None
        assert networks.identity(chosen, {}) == networks.identity(settings.read(old), {})
        assert assemble.stage_fields(read(source=spec, flow_map=MAP), "flow_map").keys() == (
            assemble.stage_fields(read(flow_map=MAP), "flow_map").keys()
        )
    assert networks.identity(read(source=UNIFORM), {}) != networks.identity(read(), {})
    train.main(read(steps=8), tmp_path / "w")
    with pytest.raises(WorkdirError, match="source.high is absent there"):
        train.main(read(steps=8, source=UNIFORM), tmp_path / "w")
    train.main(read(steps=8), tmp_path / "whole")
    assert digest(tmp_path / "w" / "flow") == digest(tmp_path / "whole" / "flow")
    trained = fmjax.load(tmp_path / "w")
    noise = sampling.source_sample(paths.linear(), fold_in(drawing.sample_keys(5, 0, 6), 0), (6, 2))
    np.testing.assert_allclose(trained.sample(6, seed=5, steps=64), trained.decode(noise), atol=1e-6)


# samples, exactly


@pytest.mark.parametrize(
    "source", [sources.gaussian_noise(mean=3.0, std=0.5), sources.uniform_noise(low=1.0, high=2.0)]
)
def test_samples_are_the_map_of_the_source(source):
    """RK4 along straight lines is exact; a path that scales its source scales the start."""
    flow = Method(None, velocity=lambda p: exact)
    models = Models({"flow": flow}, {"flow": ()}, (2,), paths.linear(), source=source)
    keys = drawing.sample_keys(1, 0, 12)
    x0 = np.asarray(source.examples(fold_in(keys, 0), (2,)))
    x = np.asarray(drawing.program(Sampler("", "", "rk4", 8), models)(models.params, keys))
    np.testing.assert_allclose(x, SHIFT + 3 * (x0 - SHIFT), atol=1e-4)
    np.testing.assert_allclose(drawing.starts(models._replace(path=paths.ve()), keys), 50 * x0, rtol=1e-5)


# a run from data to data


@pytest.fixture(scope="module")
def moved(laboratory, tmp_path_factory):
    """The pipeline from two moons to eight Gaussians, by the command."""
    folder = tmp_path_factory.mktemp("moved")
    file = config_file(
        folder, source=FROM_MOONS, coupling="minibatch_ot", correctors={"score": SCORE}, samplers={"rk4": (2,)},
        sample_every=4,
        corrections={"end": {**RK4, "at": (2,), "by": "score", "alpha": 0.5, "beta": 0.1}},
    )  # fmt: skip
    run("pipeline", f"--config={file}", f"--workdir={folder / 'w'}")
    return folder / "w", file


def test_training_starts_from_the_training_examples(moved):
    chosen = settings.read(workdir.read_config(moved[0]))
    batch = assemble.flow_plan(chosen, build.data(POINTS)).data.batch(3)
    assert rows_are_of(batch.x0, moons().train.x) and not rows_are_of(batch.x0, moons().test.x)
    assert rows_are_of(batch.x1, build.data(POINTS).train.x)


def test_marginals_start_from_the_training_examples(moved):
    forward, backward = (correction.read_marginals(moved[0] / "marginals" / d) for d in ("forward", "backward"))
    assert forward.x.shape == (64, 3, 2) and rows_are_of(forward.x[:, 0], moons().train.x)
    np.testing.assert_array_equal(backward.x[:, -1], build.data(POINTS).train.x)


def test_samples_start_from_the_test_examples_in_every_command(moved, tmp_path):
    path, file = moved
    trained = fmjax.load(path)
    keys = drawing.sample_keys(0, 0, 40)
    starts = drawing.starts(trained.models, keys)
    assert rows_are_of(starts, moons().test.x)
    states = drawing.program(Sampler("", "", "rk4", 2), trained.models, trajectory=True)(trained.models.params, keys)
    np.testing.assert_array_equal(states[0], starts)
    (stored,) = (path / "samples").glob(f"{files.slug('rk4, 2 steps')}-{12 * '?'}")
    np.testing.assert_allclose(np.load(stored / "0.npy"), states[-1], atol=1e-6)
    np.testing.assert_allclose(trained.sample(40, solver="rk4", steps=2), states[-1], atol=1e-6)
    run("sample", f"--workdir={path}", "--count=8", f"--out={tmp_path / 'x.npz'}", "--solver=rk4", "--solver_steps=2")
    np.testing.assert_allclose(np.load(tmp_path / "x.npz")["x"], states[-1][:8], atol=1e-6)
    run("evaluate", f"--workdir={path}")
    for page in ("report.html", "evaluation.html"):
        assert "source: two_moons" in (path / page).read_text()
    assert len(list((path / "flow" / "samples").glob("*.png"))) == 2
    plan = assemble.flow_plan(trained.settings, build.data(POINTS))
    shown = networks.picture(trained.settings, plan)(trained.params)
    np.testing.assert_allclose(shown[:40], trained.sample(len(shown), solver="euler", steps=16)[:40], atol=1e-6)


def test_a_point_of_the_source_flows_there_and_back(moved):
    trained = fmjax.load(moved[0])
    x0 = np.asarray(moons().test.x[:5])
    x1 = trained.decode(x0)
    np.testing.assert_allclose(trained.encode(x1), x0, atol=1e-4)
    with pytest.raises(ValueError, match="^source='two_moons': has no density"):
        trained.log_prob(x1)
    with pytest.raises(ValueError, match=r"^source='two_moons': the great circle .* needs the source N\(0, I\)"):
        trained.interpolate(x1[0], x1[1], 3)


def test_only_samples_depend_on_the_split(moved):
    """Another split is no other training; its samples start elsewhere and are kept apart."""
    path, _ = moved
    here = settings.read(workdir.read_config(path))
    there = settings.read(workdir.read_config(path) | {"source": FROM_MOONS | {"split": "train"}})
    assert assemble.flow_fields(here) == assemble.flow_fields(there)
    assert networks.identity(here, {}) != networks.identity(there, {})
    models, *_ = networks.load_models(there, path)
    assert rows_are_of(drawing.starts(models, drawing.sample_keys(0, 0, 20)), moons().train.x)


@pytest.mark.slow
def test_strengths_are_chosen_from_validation_examples(moved, monkeypatch):
    path, file = moved
    searched, program = [], drawing.program

    def watched(sampler, models, **options):
        searched.append(models.source)
        return program(sampler, models, **options)

    monkeypatch.setattr(drawing, "program", watched)
    run(
        "tune", f"--workdir={path}", "--by=score", "--solver=rk4", "--solver_steps=2", "--most=1", "--seeds=2",
        "--config.sampling.seeds=3", "--alpha=0.5", "--beta=0.0",
    )  # fmt: skip
    first, *others = (source.examples(drawing.sample_keys(0, 0, 30), (2,)) for source in searched)
    assert rows_are_of(first, moons().validation.x) and all(rows_are_of(x, moons().test.x) for x in others) and others


@pytest.mark.parametrize("other", [{"name": "gaussian_noise"}, UNIFORM, {"name": "data", "data": MOONS | {"seed": 4}}])
def test_another_source_is_refused_in_a_folder_that_has_begun(moved, other):
    path, _ = moved
    chosen = settings.read(workdir.read_config(path) | {"source": other})
    for command in (pipeline.main, train.main, functools.partial(marginal_command.main, direction="forward")):
        with pytest.raises(WorkdirError, match=r"source[.\w]* is .*there"):
            command(chosen, path)


# densities


@pytest.mark.parametrize("source", [GAUSS, pytest.param(MODES, marks=pytest.mark.slow)])
def test_a_log_density_is_the_change_of_variables(source, tmp_path):
    """``log p_0(z) - log |det dx/dz|`` at ``x = decode(z)``, the Jacobian by central differences."""
    train.main(read(source=source, steps=4, learning_rate=0.05), tmp_path / "w")
    trained, origin = fmjax.load(tmp_path / "w"), sources_of(source)
    z = np.asarray(origin.examples(drawing.sample_keys(2, 0, 4), (2,)))
    h = 1e-2 * np.eye(2, dtype=np.float32)
    ends = np.stack([trained.decode(z + sign * h[i]) for i in range(2) for sign in (1, -1)])
    jacobian = np.moveaxis((ends[0::2] - ends[1::2]) / 2e-2, 0, 2)
    truth = origin.log_density(jnp.asarray(z)) - np.log(np.abs(np.linalg.det(jacobian)))
    np.testing.assert_allclose(trained.log_prob(trained.decode(z)), truth, atol=2e-3)


def sources_of(spec):
    """The source of a spec, by the library alone."""
    return getattr(sources, spec["name"])(**{name: value for name, value in spec.items() if name != "name"})


# reflow


@pytest.mark.slow
def test_reflow_starts_from_the_source(tmp_path):
    """Trajectories from training examples, kept segments at noised data, and the comparison from test examples."""
    c = config(source=FROM_MOONS, steps=4)
    with c.unlocked(), c.ignore_type():
        c.straighten = base.straighten(
            c, grid="even", grid_steps=2, examples=30, reference_steps=2, allocations=((1, 1),), baselines=(), probes=8,
            parts={"late": (1,)}, sharing=("shared",), full=False,
        )  # fmt: skip
    reflow.main(settings.read(c), tmp_path / "w")
    trajectories = correction.read_marginals(tmp_path / "w" / "trajectories")
    assert trajectories.x.shape == (30, 3, 2) and rows_are_of(trajectories.x[:, 0], moons().train.x)
    keys = example_keys(from_seed(0), jnp.arange(30))
    np.testing.assert_array_equal(trajectories.x[:, 0], sources.rows_of(moons().train.x).examples(keys, (2,)))
    reflow.main(settings.read(c), tmp_path / "w")  # everything is read
    with pytest.raises(WorkdirError, match=r"source[.\w]* is .*there"):
        reflow.main(settings.read(c.to_dict() | {"source": UNIFORM}), tmp_path / "w")


# what needs N(0, I)


class Ready(Exception):
    """Every check has passed."""


ONCE = {**RK4, "at": (1,)}
PAIRED = {"net": {"name": "mlp", "width": 8, "depth": 1, "noise_encoder": {"name": "mlp", "width": 8}}}
REFUSED = {
    "denoising": ({"method": {"name": "denoising", "predict": "noise"}}, "the method 'denoising' needs"),
    "edm": ({"method": {"name": "edm", "sigma_data": 1.0}}, "the method 'edm' needs"),
    "contrastive": ({"method": "contrastive", "negatives": "any"}, "the method 'contrastive' needs"),
    "learned_coupling": ({"method": "learned_coupling", **PAIRED}, "the method 'learned_coupling' needs"),
    "semidiscrete": ({"coupling": "semidiscrete"}, "the coupling 'semidiscrete' needs"),
    "ddim": ({"samplers": {"ddim": (2,)}}, "the solver 'ddim' needs"),
    "edm_heun": ({"samplers": {"edm_heun": (2,)}}, "the solver 'edm_heun' needs"),
    "dpmpp_2m": ({"samplers": {"dpmpp_2m": (2,)}}, "the solver 'dpmpp_2m' needs"),
    "ipndm": ({"samplers": {"ipndm": (2,)}}, "the solver 'ipndm' needs"),
    "euler_maruyama": ({"samplers": {"euler_maruyama": (2,)}}, "the solver 'euler_maruyama' needs"),
    "reverse_diffusion": ({"samplers": {"reverse_diffusion": (2,)}}, "the solver 'reverse_diffusion' needs"),
    "initial_noise": ({"samplers": {"initial_noise": (2,)}}, "the solver 'initial_noise' needs"),
    "restart": ({"corrections": {"c": {**ONCE, "by": "restart", "to": 0.25}}}, "the corrector 'restart' needs"),
    "langevin": ({"corrections": {"c": {**ONCE, "by": "langevin", "snr": 0.1}}}, "the corrector 'langevin' needs"),
}  # fmt: skip


def outcome(changes, path, monkeypatch):
    """The refusal of a pipeline before its first stage, or ``"accepted"``."""

    def ready(every, path):
        raise Ready

    monkeypatch.setattr(stages, "run_all", ready)
    try:
        pipeline.main(read(**changes), path / "w")
    except Ready:
        return "accepted"
    except ValueError as error:
        assert not (path / "w").exists()
        return str(error)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_noise_refuses_another_source_before_any_work(name, tmp_path, monkeypatch):
    changes, message = REFUSED[name]
    line = outcome(changes | {"source": UNIFORM}, tmp_path, monkeypatch)
    assert f"source='uniform_noise': {message} the source N(0, I). " in line and len(line) <= 300, line
    assert line.endswith(".") and "\n" not in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"name": "data", "data": "digits"}}, r"^source='digits': has examples \[8, 8, 1\].* \[2\]"),
        ({"source": {"name": "gaussian_noise", "mean": (1.0, 2.0, 3.0)}}, r"^source='gaussian_noise': .*\[3\].*\[2\]"),
        ({"source": {"name": "uniform"}}, "^source='uniform': no such source; did you mean 'uniform_noise'"),
        ({"source": {"name": "data"}}, "^source: 'data' needs the option 'data'"),
        ({"source": {"name": "data", "data": "two_moon"}}, "^source.data='two_moon'"),
        ({"source": {"name": "data", "data": MOONS, "split": "tests"}}, "^source.split='tests'"),
        ({"source": {"name": "uniform_noise", "high": -2.0}}, "^source.high=-2.0: not above low=-1.0"),
        ({"source": 3}, "^source=3: not a source"),
        ({"source": "laboratory:config"}, "^source='laboratory:config': gives ConfigDict, not Source"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(changes, message, tmp_path, monkeypatch):
    line = outcome(changes, tmp_path, monkeypatch)
    assert re.search(message, line), line


def test_a_score_that_is_learned_serves_any_source(tmp_path, monkeypatch):
    """The denoiser of a latent gives the score whatever the source, so that stochastic steps remain."""
    learned = {
        "method": {"name": "stochastic_interpolant", "time": "interior"}, "path": {"name": "two_sided"},
        "net": {"name": "mlp", "width": 8, "depth": 1, "outputs": 2},
        "samplers": {"euler_maruyama": (2,), "euler": (2,)},
    }  # fmt: skip
    assert outcome(learned | {"source": UNIFORM}, tmp_path, monkeypatch) == "accepted"
    plan = assemble.flow_plan(read(source=UNIFORM), build.data(POINTS))
    assert plan.method.score is None and assemble.flow_plan(read(), build.data(POINTS)).method.score is not None


def test_samplers_of_reflow_and_a_teacher_of_another_source_are_refused(tmp_path):
    c = config(source=UNIFORM)
    with c.unlocked(), c.ignore_type():
        c.straighten = base.straighten(c, examples=30, baselines=(2,), parts={"late": (1,)}, sharing=("shared",))
    with pytest.raises(ValueError, match=r"^straighten.baselines=\(2,\): .* need the source N\(0, I\)"):
        reflow.main(settings.read(c), tmp_path / "w")
    train.main(read(steps=2, save_every=2, log_every=2), tmp_path / "teacher")
    chosen = read(source=UNIFORM, teacher=str(tmp_path / "teacher"), target="frozen", method=MAP["method"])
    with pytest.raises(ValueError, match="^teacher=.* its flow starts from another source"):
        train.main(chosen, tmp_path / "w")
    same = read(source={"name": "gaussian_noise", "std": 1}, teacher=str(tmp_path / "teacher"), target="frozen")
    assert assemble.start_of(assemble.flow_plan(same, build.data(POINTS)), same, "teacher") is not None


# a source of a file, and the object


def test_a_source_of_a_file_is_named_by_its_place(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from fmjax import sources\n\n\ndef ring(*, radius: float = 1.0):\n"
        "    means = [(radius, 0.0), (-radius, 0.0)]\n    return sources.gaussian_mixture(means=means, std=0.01)\n"
    )
    spec = {"name": f"{file}:ring", "radius": 4.0}
    train.main(read(source=spec, steps=2, save_every=2, log_every=2), tmp_path / "w")
    with pytest.raises(WorkdirError, match="source.name=.*runs code outside fmjax"):
        fmjax.load(tmp_path / "w")
    starts = drawing.starts(fmjax.load(tmp_path / "w", trust=True).models, drawing.sample_keys(0, 0, 50))
    np.testing.assert_allclose(np.abs(np.asarray(starts)), np.tile([4.0, 0.0], (50, 1)), atol=0.06)


def test_a_source_object_stands_in_place_of_its_name():
    source = sources.uniform_noise(low=5.0, high=6.0)
    chosen = dataclasses.replace(read().common, source=source)
    assert not chosen.normal_source and chosen.origin.training is source
