"""Settings of a config, paired sampling, and the table of distances, on a Gaussian whose flow is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training_loop import config

from fmjax import correction, oracles, paths, sampling
from fmjax.correction import correctors
from fmjax.experiments import assemble, evaluate, report
from fmjax.experiments.evaluate import Models, Setting
from fmjax.keys import fold_in, normal
from fmjax.sampling import grids, solvers
from fmjax.storage import checkpoint
from fmjax.types import Method

MEAN, STD, SIGMA = 1.5, 0.5, 0.4
PLAIN = {"euler": (4,), "rk4": (2, 8), "flow_map": (1, 2)}
END = {"solver": "rk4", "steps": 2, "at": (2,), "by": "score", "alpha": 0.5, "beta": 0.1}
JUMP = {"solver": "flow_map", "steps": 2, "at": (1, 2)}
TRAINED = {"score": 1, "classifier": 2}


@pytest.fixture
def models():
    """The exact flow and map of a Gaussian, and the exact score of its noised end; all scaled by their params."""
    oracle = oracles.gaussian(jnp.full(3, MEAN), jnp.full(3, STD))
    push = lambda p: lambda x, t, cond=None: p * SIGMA**2 * (MEAN - x) / (STD**2 + SIGMA**2)
    return Models(
        Method(loss=None, velocity=lambda p: lambda x, t, cond=None: p * oracle.velocity(x, t, cond)),
        Method(loss=None, flow_map=lambda p: lambda x, s, t, cond=None, key=None: p * oracle.flow_map(x, s, t)),
        {"score": Method(loss=None, direction=push)},
        {"flow": jnp.ones(()), "flow_map": jnp.ones(()), "score": jnp.ones(())},
        (3,),
    )


def test_settings_have_names_costs_and_baselines():
    found = {
        s.name: s
        for s in evaluate.settings(PLAIN, {"end": END | {"beta": 0.0}, "all": END | {"at": (0, 1, 2)}}, TRAINED)
    }
    assert list(found) == [
        "euler, 4 steps", "rk4, 2 steps", "rk4, 8 steps", "flow map, 1 step", "flow map, 2 steps",
        "rk4, 2 steps, score at 2", "rk4, 2 steps, noise 0.1 at every step",
        "rk4, 2 steps, score at every step",
    ]  # fmt: skip
    assert [s.cost().nfe for s in found.values()] == [4, 8, 32, 1, 2, 9, 8, 11]
    assert [s.cost().corrections for s in found.values()] == [0, 0, 0, 0, 0, 1, 0, 3]
    control = "rk4, 2 steps, noise 0.1 at every step"
    assert [s.baseline for s in found.values()] == [None] * 5 + ["rk4, 2 steps"] * 2 + [control]
    push, noise = found["rk4, 2 steps, score at every step"], found[control]
    assert (noise.alpha, noise.beta, noise.at) == (0.0, push.beta, push.at)
    assert {s.family for s in found.values()} == {"euler", "rk4", "flow map", "rk4 + corrections"}


@pytest.mark.parametrize(
    ("plain", "corrected", "message"),
    [
        ({"rk5": (2,)}, {}, "no fixed-step solver 'rk5'; did you mean 'rk4'"),
        ({"rk4": (0,)}, {}, "at least one step"),
        (PLAIN, {"x": END | {"at": (3,)}}, r"at=3 is not a step: .* 0 .. 2"),
        (PLAIN, {"x": END | {"steps": 4}}, "correction 'x' needs its plain sampler 'rk4, 4 steps'"),
        (PLAIN, {"x": END | {"beta": -1.0}}, "beta is a standard deviation"),
        (PLAIN, {"x": END | {"alpha": 0.0}}, "correction 'x' corrects nothing"),
        (PLAIN, {"x": END, "y": END}, "two samplers are both"),
        (PLAIN, {"x": END | {"by": "scor"}}, "no corrector 'scor'; did you mean 'score'"),
        (PLAIN, {"x": END | {"bandwidth": 1.0}}, "'score' has no 'bandwidth'; it takes alpha, beta"),
        (PLAIN, {"x": {**JUMP, "by": "drift", "alpha": 1.0}}, "'drift' needs 'bandwidth'"),
        (PLAIN, {"x": {**JUMP, "at": (0,), "by": "restart", "to": 0.5}}, "restart at t=0 cannot go back"),
        (PLAIN, {"x": {**JUMP, "by": "restart", "to": 1.5}}, "a time in .0, 1."),
    ],
)
def test_bad_settings_are_refused(plain, corrected, message):
    with pytest.raises(ValueError, match=message):
        evaluate.settings(plain, corrected, TRAINED)


def test_samplers_share_their_noise_and_find_the_law(models):
    """The exact map carries each example's noise to its own end; so does RK4 with many steps, and Euler nearly so."""
    keys = evaluate.keys_of(0, 0, 4096)
    assemble = lambda solver, n: np.asarray(evaluate.sampler(Setting("", "", solver, n), models)(models.params, keys))
    exact = assemble("flow_map", 1)
    np.testing.assert_allclose(assemble("flow_map", 4), exact, atol=2e-6)
    np.testing.assert_allclose(assemble("rk4", 16), exact, atol=1e-4)
    assert 1e-4 < np.abs(assemble("euler", 64) - exact).max() < 0.1
    assert (np.abs(exact.mean(0) - MEAN) < 4 * STD / 64).all()
    assert (np.abs(exact.std(0) - STD) < 4 * STD / np.sqrt(2 * 4096)).all()
    path = np.asarray(evaluate.sampler(Setting("", "", "rk4", 4), models, trajectory=True)(models.params, keys))
    assert path.shape == (5, 4096, 3) and (path[-1] == assemble("rk4", 4)).all()


def test_a_correction_pulls_as_its_formula_says(models):
    """One deterministic push at the end: x + alpha sigma^2 (m - x) / (b^2 + sigma^2)."""
    keys = evaluate.keys_of(0, 0, 64)
    assemble = lambda **kw: np.asarray(evaluate.sampler(Setting("", "", "rk4", 2, **kw), models)(models.params, keys))
    plain, corrected = assemble(), assemble(at=(2,), alpha=0.5)
    np.testing.assert_allclose(corrected, plain + 0.5 * SIGMA**2 * (MEAN - plain) / (STD**2 + SIGMA**2), atol=1e-6)


def test_strengths_are_one_for_all_steps_or_one_a_step_or_given_to_the_program(models):
    keys = evaluate.keys_of(0, 0, 64)
    setting = lambda **kw: Setting("", "", "rk4", 2, **kw)
    assemble = lambda s, *args: np.asarray(evaluate.sampler(s, models)(models.params, keys, *args))
    one = assemble(setting(at=(0, 2), alpha=0.3, beta=0.1))
    np.testing.assert_array_equal(one, assemble(setting(at=(0, 2), alpha=(0.3, 0.3), beta=(0.1, 0.1))))
    two = assemble(setting(at=(0, 2), alpha=(0.3, 0.5), beta=(0.1, 0.0)))
    everywhere = setting(at=(0, 1, 2), alpha=1.0)
    strengths = (jnp.array([0.3, 0.0, 0.5]), jnp.array([0.1, 0.0, 0.0]))
    np.testing.assert_array_equal(two, assemble(everywhere, None, strengths))
    np.testing.assert_array_equal(assemble(setting()), assemble(everywhere, None, (jnp.zeros(3), jnp.zeros(3))))
    assert (one != two).all()
    first = setting(at=(0, 2), alpha=(0.3, 0.0), beta=(0.1, 0.0))  # each strength at its own step
    np.testing.assert_array_equal(assemble(first), assemble(setting(at=(0,), alpha=0.3, beta=0.1)))


def test_every_corrector_costs_what_it_evaluates():
    found = evaluate.settings(
        PLAIN,
        {
            "score": END,
            "classifier": END | {"by": "classifier", "at": (0, 2), "beta": 0.0},
            "drift": {**JUMP, "by": "drift", "alpha": 1.0, "bandwidth": 0.5},
            "jump": {**JUMP, "by": "restart", "to": 0.25, "loops": 3},
            "ode": {"solver": "rk4", "steps": 2, "at": (2,), "by": "restart", "to": 0.25, "inner": 2},
        },
        TRAINED,
    )
    costs = {s.name: tuple(s.cost()[:2]) for s in found[len(evaluate.settings(PLAIN, {})) :]}
    assert costs == {
        "flow map, 2 steps, drift at 1, 2": (2, 2), "flow map, 2 steps, restart at 1, 2": (8, 2),
        "rk4, 2 steps, classifier at 0, 2": (12, 2), "rk4, 2 steps, restart at 2": (16, 1),
        "rk4, 2 steps, noise 0.1 at 2": (8, 0), "rk4, 2 steps, score at 2": (9, 1),
    }  # fmt: skip


def test_a_restart_is_that_of_the_settings_own_step_and_a_drift_that_of_the_banks(models):
    keys, rng = evaluate.keys_of(0, 0, 64), np.random.default_rng(0)
    ts, noise = grids.uniform_grid(2), normal(fold_in(keys, 0), (3,))
    bank = {name: jnp.asarray(rng.standard_normal((50, 3, 3)), jnp.float32) for name in ("p", "q")}
    models = models._replace(params=models.params | {"drift": bank}, ts=ts)
    jump = models.flow_map.flow_map(jnp.ones(()))
    drift = correction.kernel_drift(**bank, ts=ts, bandwidth=0.7)
    wanted = {
        Setting("", "", "flow_map", 2, (2,), by="restart", to=0.3, loops=2): correctors.restart(jump, to=0.3, loops=2),
        Setting("", "", "flow_map", 2, (2,), 0.5, 0.1, by="drift", bandwidth=0.7): correctors.marginal_matching(
            drift, alpha=0.5, beta=0.1
        ),
    }
    for setting, fix in wanted.items():
        x = sampling.sample(jump, noise, ts, key=fold_in(keys, 1), corrector=fix, at=(2,))
        np.testing.assert_allclose(evaluate.sampler(setting, models)(models.params, keys), x, rtol=1e-5, atol=1e-5)


def test_the_noise_of_a_correction_is_not_that_of_the_start(models):
    """x0 + z has variance 2 in each coordinate; were z the noise of the start, it would be 4."""
    keys = evaluate.keys_of(0, 0, 4096)
    still = models._replace(params=models.params | {"flow": jnp.zeros(())})
    x = evaluate.sampler(Setting("", "", "euler", 1, at=(0,), alpha=0.0, beta=1.0), still)(still.params, keys)
    assert (np.abs(np.asarray(x).var(0) - 2) < 5 * 2 * np.sqrt(2 / 4096)).all()


def test_samples_are_kept_and_drawn_anew_for_other_parameters(models, tmp_path):
    setting = Setting("rk4, 2 steps", "rk4", "rk4", 2)
    draw = lambda models, identity: evaluate.draw(
        setting, models, seeds=2, samples=5, seed=0, directory=tmp_path / "s", identity=identity
    )
    first = draw(models, "a")
    again = evaluate.sampler(setting, models)
    for i in range(2):
        np.testing.assert_array_equal(first[i], again(models.params, evaluate.keys_of(0, i, 5)))
    other = models._replace(params=models.params | {"flow": jnp.zeros(())})
    assert (draw(other, "a") == first).all(), "read from its file"
    assert not (draw(other, "b") == first).all() and len(list((tmp_path / "s").iterdir())) == 2


def test_rows_and_verdicts_are_those_of_the_distances(models):
    s, base = (
        Setting(n, "rk4", "rk4", 2, at=a, alpha=0.5, baseline=b)
        for n, a, b in (("fix", (2,), "base"), ("base", (), None))
    )
    x = np.random.default_rng(0).normal(size=(6, 10, 3))
    drawn = {base: x + 1.0, s: x + 0.2}
    metrics = {"mean": lambda a: float(abs(a.mean())), "far": lambda a: float(a.max() ** 2)}
    rows, verdicts = evaluate.compare(drawn, metrics, x)
    assert [(r.name, r.nfe, r.corrections) for r in rows] == [("base", 8, 0), ("fix", 9, 1), ("training data", 0, 0)]
    each = np.abs((x + 1.0).mean((1, 2)))
    assert rows[0].distances["mean"] == pytest.approx((each.mean(), each.std(ddof=1) / np.sqrt(6)))
    assert [(v.name, v.baseline, v.metric) for v in verdicts] == [("fix", "base", "mean"), ("fix", "base", "far")]
    gaps = np.abs((x + 0.2).mean((1, 2))) - each
    assert verdicts[0].difference == pytest.approx(gaps.mean()) and verdicts[0].verdict == "helps"


def test_a_sampler_that_diverged_is_infinitely_far_and_the_page_can_still_be_made(models):
    base = Setting("base", "rk4", "rk4", 2)
    x = np.zeros((2, 4, 3))
    x[1, 0] = np.nan
    rows, _ = evaluate.compare({base: x}, {"mean": lambda a: float(a.mean())}, np.zeros((2, 4, 3)))
    assert rows[0].distances["mean"][0] == np.inf
    assert report.best_row(rows, "mean") is None


def test_keys_of_seeds_are_apart():
    a, b, c = (jax.random.key_data(evaluate.keys_of(*k, 3)) for k in ((0, 0), (0, 1), (1, 0)))
    assert (a == jax.random.key_data(evaluate.keys_of(0, 0, 5))[:3]).all()
    assert len({tuple(k) for k in np.concatenate([a, b, c]).tolist()}) == 9


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A conditional flow on the digits, hardly trained, evaluated as launch.evaluate does it."""
    path = tmp_path_factory.mktemp("flow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        cfg = config(classes=10, label_dropout=0.2, steps=3, **{"sampling.seeds": 2, "sampling.samples": 50})
        cfg.sampling.update({"euler": (2,), "rk4": (1,)})
        assemble.fit(cfg, path)
        evaluate.main(cfg, path)
        first = json.loads((path / "evaluation.json").read_text())
        cfg.guidance = 2.0
        evaluate.main(cfg, path)
    return cfg, path, first, json.loads((path / "evaluation.json").read_text())


def test_an_evaluation_tells_every_sampler_and_the_floor_with_errors(evaluated):
    cfg, path, first, guided = evaluated
    names = ["euler, 2 steps", "rk4, 1 step", "training data"]
    assert [r["name"] for r in first["rows"]] == names
    assert [r["nfe"] for r in first["rows"]] == [2, 4, 0] and [r["nfe"] for r in guided["rows"]] == [4, 8, 0]
    for row in first["rows"]:
        assert set(row["distances"]) == {"FD-small", "sliced W2", "energy distance"}
        assert all(se > 0 for _, se in row["distances"].values())
    assert first["rows"][0]["distances"] != guided["rows"][0]["distances"]
    assert first["rows"][2] == guided["rows"][2]
    assert "flow map" not in (path / "report.html").read_text()


def test_an_evaluation_draws_each_label_in_turn_from_the_averaged_flow(evaluated):
    cfg, path, *_ = evaluated
    plan = assemble.assemble(cfg)
    _, ema, _ = checkpoint.restore(path / "checkpoints", part="ema")
    keys = evaluate.keys_of(cfg.seed, 1, 50)
    step = solvers.euler(plan.method.velocity(ema))
    x0 = normal(fold_in(keys, 0), plan.data.shape)
    x = sampling.sample(step, x0, grids.uniform_grid(2), cond=jnp.arange(50) % 10)
    drawn = evaluate.draw(
        Setting("euler, 2 steps", "euler", "euler", 2), Models(
            plan.method, None, {}, {"flow": ema}, plan.data.shape, 10
        ),
        seeds=2, samples=50, seed=cfg.seed, directory=path / "again", identity="",
    )  # fmt: skip
    np.testing.assert_allclose(drawn[1], x, rtol=1e-4, atol=1e-5)


def test_a_sample_does_not_depend_on_the_chunk_it_is_drawn_in(models, tmp_path, monkeypatch):
    setting = Setting("rk4, 2 steps", "rk4", "rk4", 2)
    plain = models.flow.velocity(1.0)
    labelled = lambda p: lambda x, t, cond=None: plain(x, t) + cond[:, None]
    models = models._replace(flow=Method(loss=None, velocity=labelled), classes=3)
    draw = lambda name: evaluate.draw(
        setting, models, seeds=2, samples=10, seed=0, directory=tmp_path / name, identity=""
    )
    whole = draw("whole")
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    np.testing.assert_allclose(draw("chunks"), whole, rtol=1e-6)
    assert len(np.unique(whole)) == whole.size


def test_an_evaluation_without_a_flow_says_so(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"):
        evaluate.main(config(), tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_an_evaluation_of_a_map_jumps_with_it_and_guides_no_jump(tmp_path):
    cfg = config(method="progressive", steps=2, coupling="independent")
    with cfg.unlocked():
        cfg.sampling = {"seeds": 2, "samples": 20, "flow_map": (1, 2)}
    assemble.fit(cfg, tmp_path)
    evaluate.main(cfg, tmp_path)
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [(r["name"], r["nfe"]) for r in rows[:2]] == [("flow map, 1 step", 1), ("flow map, 2 steps", 2)]
    plan, (_, ema, _) = assemble.assemble(cfg), checkpoint.restore(tmp_path / "checkpoints", part="ema")
    x0 = normal(fold_in(evaluate.keys_of(cfg.seed, 0, 20), 0), plan.data.shape)
    (drawn,) = (tmp_path / "draws").glob("flow-map--1-step*.npy")
    np.testing.assert_allclose(np.load(drawn)[0], plan.method.flow_map(ema)(x0, 0.0, 1.0), rtol=1e-4, atol=1e-5)
    with cfg.unlocked():
        cfg.classes, cfg.label_dropout, cfg.guidance = 10, 0.1, 2.0
    with pytest.raises(ValueError, match="guidance=2.0 is of the velocity: a learned map has none"):
        evaluate.main(cfg, tmp_path)


def test_an_sde_sampler_is_refused_where_the_velocity_has_not_the_score(tmp_path):
    cfg = config(coupling="minibatch_ot", **{"sampling.euler": (2,)})
    with cfg.unlocked():
        cfg.sampling.euler_maruyama = (4,)
    with pytest.raises(ValueError, match="euler_maruyama takes its score .* coupling='independent' only"):
        evaluate.main(cfg, tmp_path)
    cfg.coupling = "independent"
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"):
        evaluate.main(cfg, tmp_path)


def test_an_sde_sampler_takes_its_score_along_the_path_of_the_flow():
    """Noise of strength one keeps the data's law only with the score of the right path."""
    path, n = paths.trigonometric(), 4000
    oracle = oracles.gaussian(jnp.full(3, MEAN), jnp.full(3, STD), path=path)
    flow = Method(loss=None, velocity=lambda p: oracle.velocity)
    setting = Setting("sde", "sde", "euler_maruyama", 100)
    x = evaluate.sampler(setting, Models(flow, None, {}, {"flow": ()}, (3,), path=path))
    wrong = evaluate.sampler(setting, Models(flow, None, {}, {"flow": ()}, (3,)))
    error = lambda draw: abs(float(draw({"flow": ()}, evaluate.keys_of(0, 0, n)).std()) / STD - 1)
    assert error(x) < 4 / (2 * 3 * n) ** 0.5 + 0.01 < error(wrong)  # 1 %: the bias of 100 steps of weak order 1
    assert [s.cost().nfe for s in evaluate.settings({"euler_maruyama": (5,), "stochastic_heun": (5,)}, {})] == [5, 10]


def test_an_sde_sampler_on_a_path_with_a_latent_takes_the_learned_score():
    path = paths.two_sided()
    oracle = oracles.gaussian(jnp.full(3, MEAN), jnp.full(3, STD), path=path)
    flow = Method(loss=None, velocity=lambda p: oracle.velocity, score=lambda p: lambda x, t, cond=None: p + 0 * x)
    x = evaluate.sampler(Setting("sde", "sde", "euler_maruyama", 1), Models(flow, None, {}, {}, (3,), path=path))
    keys = evaluate.keys_of(0, 0, 8)
    pushed, plain = (x({"flow": jnp.full((), p)}, keys) for p in (2.0, 0.0))
    np.testing.assert_allclose(pushed - plain, np.full((8, 3), 1.0), atol=1e-5)  # h g^2 / 2 of the score
