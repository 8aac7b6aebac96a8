"""Drawing from a Gaussian whose flow is known: paired noise, corrections by their formula, costs, files of samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import correction, oracles, paths, sampling, sources
from fmjax.experiments import comparison, drawing, stored
from fmjax.experiments.drawing import Draws, Models
from fmjax.experiments.report import best_row
from fmjax.experiments.samplers import Sampler, corrected_samplers, plain_samplers
from fmjax.keys import fold_in, normal
from fmjax.metrics import Metric
from fmjax.sampling import grids
from fmjax.types import Method

MEAN, STD, SIGMA = 1.5, 0.5, 0.4
RK4 = Sampler("rk4, 2 steps", "rk4", "rk4", 2)


@pytest.fixture(scope="module")
def models():
    """The exact flow and map of a Gaussian, and the exact score of its noised end; all scaled by their parameters."""
    oracle = oracles.gaussian(jnp.full(3, MEAN), jnp.full(3, STD))
    push = lambda p: lambda x, t, cond=None: p * SIGMA**2 * (MEAN - x) / (STD**2 + SIGMA**2)
    methods = {
        "flow": Method(None, velocity=lambda p: lambda x, t, cond=None: p * oracle.velocity(x, t, cond)),
        "flow_map": Method(None, flow_map=lambda p: lambda x, s, t, cond=None, key=None: p * oracle.flow_map(x, s, t)),
        "score": Method(None, direction=push),
        "classifier": Method(None, direction=push),
    }
    return Models(methods, dict.fromkeys(methods, jnp.ones(())), (3,), paths.linear())


def draw(sampler, models, n=64, **options):
    keys = drawing.sample_keys(0, 0, n)
    return np.asarray(drawing.program(sampler, models)(models.params, keys, None, options or None))


def corrected(by="score", at=(2,), **options):
    return RK4._replace(at=at, by=by, options={"beta": 0.0} | options)


def test_samplers_share_their_noise_and_have_the_distribution_of_the_data(models):
    """The exact map carries each example's noise to its own end; so does RK4 with many steps, and Euler nearly so."""
    sample = lambda solver, n: draw(Sampler("", "", solver, n), models, 4096)
    exact = sample("flow_map", 1)
    np.testing.assert_allclose(sample("flow_map", 4), exact, atol=2e-6)
    np.testing.assert_allclose(sample("rk4", 16), exact, atol=1e-4)
    assert 1e-4 < np.abs(sample("euler", 64) - exact).max() < 0.1
    assert (np.abs(exact.mean(0) - MEAN) < 4 * STD / 64).all()
    assert (np.abs(exact.std(0) - STD) < 4 * STD / np.sqrt(2 * 4096)).all()
    states = drawing.program(RK4, models, trajectory=True)(models.params, drawing.sample_keys(0, 0, 64))
    assert states.shape == (3, 64, 3)
    np.testing.assert_array_equal(states[-1], draw(RK4, models))


def test_mala_of_a_config_leaves_the_distribution_of_the_flow_at_its_time(models):
    """The density at t = 1/2 is ``p_{1/2}``: with another density Metropolis would move the samples to another end."""
    oracle = oracles.gaussian(jnp.full(3, MEAN), jnp.full(3, STD))
    density = jax.jit(drawing._log_density(oracle.velocity, paths.linear(), sources.gaussian_noise()))
    x = oracle.sample(jax.random.key(0), 6)
    np.testing.assert_allclose(density(x, jnp.full(6, 0.6)), oracle.log_density(x, 0.6), atol=1e-3)
    x = draw(Sampler("", "", "rk4", 8, at=(4,), by="mala", options={"step": 0.2}), models, 2048)
    assert (np.abs(x.mean(0) - MEAN) < 4 * STD / np.sqrt(2048)).all()
    assert (np.abs(x.std(0) / STD - 1) < 4 / np.sqrt(2 * 2048)).all()


def test_a_correction_pulls_as_its_formula_says(models):
    """One deterministic push at the end: x + alpha sigma^2 (m - x) / (b^2 + sigma^2)."""
    plain = draw(RK4, models)
    expected = plain + 0.5 * SIGMA**2 * (MEAN - plain) / (STD**2 + SIGMA**2)
    np.testing.assert_allclose(draw(corrected(alpha=0.5), models), expected, atol=1e-6)


def test_strengths_are_one_number_or_one_a_step_or_arguments_of_the_program(models):
    two = draw(corrected(at=(0, 2), alpha=(0.3, 0.5), beta=(0.1, 0.0)), models)
    one = draw(corrected(at=(0, 2), alpha=0.3, beta=0.1), models)
    assert (one != two).all()
    everywhere = corrected(at=(0, 1, 2), alpha=1.0)
    strengths = {"alpha": jnp.array([0.3, 0.0, 0.5]), "beta": jnp.array([0.1, 0.0, 0.0])}
    np.testing.assert_array_equal(two, draw(everywhere, models, **strengths))
    np.testing.assert_array_equal(draw(RK4, models), draw(everywhere, models, alpha=jnp.zeros(3), beta=jnp.zeros(3)))
    first = corrected(at=(0, 2), alpha=(0.3, 0.0), beta=(0.1, 0.0))  # each strength at its own step
    np.testing.assert_array_equal(draw(first, models), draw(corrected(at=(0,), alpha=0.3, beta=0.1), models))


def test_every_corrector_costs_what_it_evaluates(models):
    end = {"solver": "rk4", "steps": 2, "at": (2,), "by": "score", "alpha": 0.5, "beta": 0.1}
    jump = {"solver": "flow_map", "steps": 2, "at": (1, 2)}
    plain = plain_samplers({"euler": (4,), "rk4": (2,), "flow_map": (2,), "euler_maruyama": (5,)})
    fixes = {
        "score": end, "classifier": end | {"by": "classifier", "at": (0, 2), "beta": 0.0},
        "drift": {**jump, "by": "drift", "alpha": 1.0, "bandwidth": 0.5},
        "jump": {**jump, "by": "restart", "to": 0.25, "loops": 3},
        "ode": {"solver": "rk4", "steps": 2, "at": (2,), "by": {"name": "restart", "to": 0.25, "steps": 2}},
    }  # fmt: skip
    bank = {"drift": {name: jnp.zeros((4, 3, 3)) for name in ("p", "q")}}
    models = models._replace(params=models.params | bank, ts=grids.uniform_grid(2))
    samplers = plain + corrected_samplers(fixes, plain, ["score", "classifier"])
    assert {s.name: tuple(drawing.sampler_cost(s, models)[:2]) for s in samplers} == {
        "euler, 4 steps": (4, 0), "rk4, 2 steps": (8, 0), "flow map, 2 steps": (2, 0),
        "euler_maruyama, 5 steps": (5, 0),
        "flow map, 2 steps, drift at 1, 2": (2, 2), "flow map, 2 steps, restart at 1, 2": (8, 2),
        "rk4, 2 steps, classifier at 0, 2": (10, 2), "rk4, 2 steps, restart at 2": (16, 1),
        "rk4, 2 steps, noise 0.1 at 2": (8, 1), "rk4, 2 steps, score at 2": (9, 1),
    }  # fmt: skip


def test_a_restart_uses_the_samplers_own_step_and_a_drift_the_banks(models):
    keys, rng = drawing.sample_keys(0, 0, 64), np.random.default_rng(0)
    ts, noise = grids.uniform_grid(2), normal(fold_in(keys, 0), (3,))
    bank = {name: jnp.asarray(rng.standard_normal((50, 3, 3)), jnp.float32) for name in ("p", "q")}
    models = models._replace(params=models.params | {"drift": bank}, ts=ts)
    jump = models.methods["flow_map"].flow_map(jnp.ones(()))
    drift = correction.kernel_drift(**bank, ts=ts, bandwidth=0.7)
    map_2 = Sampler("", "", "flow_map", 2, None, (2,))
    expected = [
        (map_2._replace(by="restart", options={"to": 0.3, "loops": 2}), correction.restart(jump, to=0.3, loops=2)),
        (
            map_2._replace(by="drift", options={"bandwidth": 0.7, "alpha": 0.5, "beta": 0.1}),
            correction.marginal_matching(drift, alpha=0.5, beta=0.1),
        ),
    ]
    for sampler, fix in expected:
        x = jax.jit(lambda k, fix=fix: sampling.sample(jump, noise, ts, key=k, corrector=fix, at=(2,)))(
            fold_in(keys, 1)
        )
        np.testing.assert_allclose(draw(sampler, models), x, rtol=1e-5, atol=1e-5)


def test_a_langevin_correction_of_a_config_is_the_correctors_own(models):
    sampler = RK4._replace(at=(1,), by="langevin", options={"snr": 0.1})
    keys, ts = drawing.sample_keys(0, 0, 64), grids.uniform_grid(2)
    velocity = models.methods["flow"].velocity(jnp.ones(()))
    fix = correction.langevin(correction.score_of(velocity), snr=0.1)
    step, noise = sampling.rk4(velocity), normal(fold_in(keys, 0), (3,))
    x = jax.jit(lambda k: sampling.sample(step, noise, ts, key=k, corrector=fix, at=(1,)))(fold_in(keys, 1))
    np.testing.assert_allclose(draw(sampler, models), x, rtol=1e-5, atol=1e-5)


def test_the_noise_of_a_correction_is_not_the_noise_of_the_start(models):
    """x0 + z has variance 2 in each coordinate; were z the noise of the start, it would be 4."""
    still = models._replace(params=models.params | {"flow": jnp.zeros(())})
    noisy = Sampler("", "", "euler", 1, None, (0,), "noise", {"alpha": 0.0, "beta": 1.0})
    assert (np.abs(draw(noisy, still, 4096).var(0) - 2) < 5 * 2 * np.sqrt(2 / 4096)).all()


def test_samples_are_kept_verified_and_drawn_again_for_other_parameters(models, tmp_path, capsys):
    read = lambda models, identity: stored.draw(RK4, models, Draws(2, 5, 0), directory=tmp_path, identity=identity)
    first = read(models, "a")
    again = drawing.program(RK4, models)
    for i in range(2):
        np.testing.assert_array_equal(first[i], again(models.params, drawing.sample_keys(0, i, 5)))
    other = models._replace(params=models.params | {"flow": jnp.zeros(())})
    np.testing.assert_array_equal(read(other, "a"), first)  # read from its files
    assert not (read(other, "b") == first).all() and len(list(tmp_path.iterdir())) == 2
    (folder,) = (f for f in tmp_path.iterdir() if (np.load(f / "0.npy") == first[0]).all())
    damaged = bytearray((folder / "1.npy").read_bytes())
    damaged[150] ^= 1
    (folder / "1.npy").write_bytes(damaged)
    np.testing.assert_array_equal(read(models, "a"), first)
    assert "1.npy" in (line := capsys.readouterr().err) and "drawn again" in line


def test_a_sample_does_not_depend_on_the_chunk_it_is_drawn_in(models, tmp_path, monkeypatch):
    plain = models.methods["flow"].velocity(1.0)
    labelled = lambda p: lambda x, t, cond=None: plain(x, t) + cond[:, None]
    models = models._replace(methods={"flow": Method(None, velocity=labelled)})
    draws = Draws(2, 10, 0, np.arange(10) % 3)
    whole = stored.draw(RK4, models, draws, directory=tmp_path / "whole", identity="")
    monkeypatch.setattr(drawing.in_chunks, "__kwdefaults__", {"size": 4})
    chunks = stored.draw(RK4, models, draws, directory=tmp_path / "chunks", identity="")
    np.testing.assert_allclose(chunks, whole, rtol=1e-6)
    assert len(np.unique(whole)) == whole.size


def test_keys_of_runs_and_seeds_differ():
    a, b, c = (jax.random.key_data(drawing.sample_keys(*k, 3)) for k in ((0, 0), (0, 1), (1, 0)))
    assert (a == jax.random.key_data(drawing.sample_keys(0, 0, 5))[:3]).all()
    assert len({tuple(k) for k in np.concatenate([a, b, c]).tolist()}) == 9


def test_a_sampler_that_cannot_be_drawn_is_refused_on_shapes_alone(models):
    shapes = models._replace(params=jax.eval_shape(lambda: models.params))
    drawing.check_sampler(corrected(alpha=0.5), shapes)
    for sampler, message in [
        (RK4._replace(at=(1,), by="langevin", options={}), r"^corrections\['rk4, 2 steps'\]: .*snr"),
        (corrected("drift", alpha=0.5, bandwidth=1.0), "by='drift'"),
    ]:
        with pytest.raises(ValueError, match=message):
            drawing.check_sampler(sampler, shapes)
    without = shapes._replace(methods={"flow": models.methods["flow"]})
    with pytest.raises(ValueError, match="samplers.flow_map=1"):
        drawing.check_sampler(Sampler("", "", "flow_map", 1), without)


def test_rows_and_verdicts_are_computed_from_the_distances():
    base, fix = RK4._replace(name="base"), RK4._replace(name="fix", at=(2,), baseline="base")
    x = np.random.default_rng(0).normal(size=(6, 10, 3))
    drawn = {"base": x + 1.0, "fix": x + 0.2}
    metrics = [Metric("mean", lambda a: float(abs(a.mean())), {}), Metric("far", lambda a: float(a.max() ** 2), {})]
    costs = {"base": sampling.Cost(8, 0, 0, 8), "fix": sampling.Cost(9, 1, 1, 9)}
    rows, verdicts = comparison.compare([base, fix], drawn, costs, metrics, x)
    assert [(r.name, r.nfe, r.corrections) for r in rows] == [("base", 8, 0), ("fix", 9, 1), ("training data", 0, 0)]
    each = np.abs((x + 1.0).mean((1, 2)))
    assert rows[0].distances["mean"] == pytest.approx((each.mean(), each.std(ddof=1) / np.sqrt(6)))
    assert [(v.name, v.baseline, v.metric) for v in verdicts] == [("fix", "base", "mean"), ("fix", "base", "far")]
    gaps = np.abs((x + 0.2).mean((1, 2))) - each
    assert verdicts[0].difference == pytest.approx(gaps.mean()) and verdicts[0].verdict == "helps"


def test_a_sampler_that_diverged_is_infinitely_far_and_never_the_best():
    x = np.zeros((2, 4, 3))
    x[1, 0] = np.nan
    metric, cost = Metric("mean", lambda a: float(a.mean()), {}), {"base": sampling.Cost(8, 0, 0, 8)}
    rows, _ = comparison.compare([RK4._replace(name="base")], {"base": x}, cost, [metric], np.zeros((2, 4, 3)))
    assert rows[0].distances["mean"][0] == np.inf
    assert best_row(rows, "mean") is None


def test_an_sde_sampler_takes_its_score_along_the_path_of_the_flow():
    """Noise of strength one keeps the distribution of the data only with the score of the right path."""
    path, n = paths.trigonometric(), 4000
    oracle = oracles.gaussian(jnp.full(3, MEAN), jnp.full(3, STD), path=path)
    methods = {"flow": Method(None, velocity=lambda p: oracle.velocity)}
    sampler = Sampler("sde", "sde", "euler_maruyama", 100)
    error = lambda path: abs(float(draw(sampler, Models(methods, {"flow": ()}, (3,), path), n).std()) / STD - 1)
    limit = 4 / (2 * 3 * n) ** 0.5 + 0.01  # 1 %: the bias of 100 steps of weak order 1
    assert error(path) < limit < error(paths.linear())


def test_an_sde_sampler_on_a_path_with_a_latent_takes_the_learned_score():
    path = paths.two_sided()
    oracle = oracles.gaussian(jnp.full(3, MEAN), jnp.full(3, STD), path=path)
    flow = Method(None, velocity=lambda p: oracle.velocity, score=lambda p: lambda x, t, cond=None: p + 0 * x)
    models = Models({"flow": flow}, {"flow": jnp.zeros(())}, (3,), path)
    sampler = Sampler("sde", "sde", "euler_maruyama", 1)
    pushed = draw(sampler, models._replace(params={"flow": jnp.full((), 2.0)}), 8)
    np.testing.assert_allclose(pushed - draw(sampler, models, 8), np.full((8, 3), 1.0), atol=1e-5)  # h g^2 / 2 score
