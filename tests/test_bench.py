"""The benchmark suites: all are listed, and the test beds train and draw at small sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import correction
from fmjax.experiments import settings
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP

beds = pytest.importorskip("launch.bench.beds")
from launch.bench import __main__ as bench  # noqa: E402
from launch.bench import corrected, learned, runs, straightened  # noqa: E402

SHORT = {"steps": 2, "warmup": 1, "log_every": 1, "save_every": 2, "batch_size": 16, "coupling": "independent"}
SMALL = {"name": "mlp", "width": 8, "depth": 1}
METRICS = ({"name": "sliced_w2_to", "directions": 16},)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The digits with networks of a few hundred parameters, and the folder of the runs."""
    problem = beds.PROBLEMS["digits"]._replace(
        fields={**SHORT, "net": SMALL, "metrics": METRICS},
        score=SMALL,
        classifier=SMALL | {"logit": True},
        steps=dict.fromkeys(("score", "classifier", "residual"), 2),
        examples=(32, 32),
        samples=40,
        base=(10,),
        seeds=3,
        tuning=1,
        at={"score": ((10,),)},
        at_long={"score": ((10,),)},
        fractions=(1.0,),
        betas=(0.1,),
    )
    monkeypatch.setitem(beds.PROBLEMS, "digits", problem)
    monkeypatch.setattr(beds, "FOLDER", tmp_path)
    monkeypatch.setattr(beds, "ALPHAS", {name: values[:1] for name, values in beds.ALPHAS.items()})
    return problem


def test_every_suite_is_a_documented_function_of_its_own_name():
    assert {"sampler", "corrections_digits", "checkerboard_maps", "straightened_corrected"} <= set(bench.SUITES)
    for name, suite in bench.SUITES.items():
        assert suite.__name__ == name and suite.__doc__
    assert sum(len(module.SUITES) for module in bench.MODULES) == len(bench.SUITES)


@pytest.mark.parametrize("name", beds.PROBLEMS)
def test_the_config_of_a_test_bed_is_read(name):
    assert beds.configured(beds.PROBLEMS[name]).flow.steps > 1000


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_the_configs_of_the_suites_on_maps_are_read(name):
    fields = {"method": {"name": "lagrangian"}, "corrections": {}, "samplers": {"flow_map": runs.JUMPS}}
    assert tuple(settings.read(runs.config(name, fields)).samplers["flow_map"]) == runs.JUMPS


@pytest.mark.parametrize("row", ["LSD", "PFMM", "flow by RK4"])
def test_a_plan_of_the_suites_on_learned_maps_is_assembled(row):
    problem, recipe = learned.oracle("gaussian"), learned.RECIPES[row]
    plan = learned.plan_of(problem, recipe.methods[-1], steps=4, seed=0, teacher=None)
    assert plan.schedule.steps == 4 and plan.data.batch(0).x1.shape == (256, 2)


def test_learned_maps_are_drawn_by_the_program_of_the_laboratory(key):
    method = learned.plan_of(learned.oracle("gaussian"), {"name": "lagrangian"}, steps=4, seed=0, teacher=None).method
    still = method._replace(flow_map=lambda params: lambda x, s, t, cond=None, key=None: x + params)
    keys = jax.random.split(key, 5)
    one, two = (np.asarray(learned.drawer(still, 1.0, n, "euler")(keys)) for n in (1, 2))
    np.testing.assert_allclose(two - one, 1.0, atol=1e-5)


def test_a_row_is_drawn_with_the_strength_of_the_placement(tiny):
    b = beds.bed("digits")
    data = b.data.train.x[:32]
    p = beds.Marginals(np.zeros((32, 1, 8, 8, 1), np.float32), np.array([1.0], np.float32), None)
    models = beds.networks(b, {}, beds.bank(p, p._replace(x=data[:, None])), ts=p.ts)
    sampler = beds.corrected(beds.plain("euler", 2), DRIFT, (2,))
    row = beds.row(b, {"corrector": "drift"}, sampler, models, 2, DRIFT)
    key = beds.keys(0, 1)[0]
    place = lambda alpha: beds.Placement((2,), (alpha,), (0.0,))
    none, half, whole = (row.draw(key, place(alpha)) for alpha in (0.0, 0.5, 1.0))
    assert none.shape == (40, 8, 8, 1) and row.cost.nfe == 2
    banks = models.params[DRIFT]
    push = correction.kernel_drift(banks["p"], banks["q"], ts=p.ts, bandwidth=beds.BANDWIDTH)(jnp.asarray(none), 1.0)
    np.testing.assert_allclose(half, none + push / 2, atol=1e-5)
    np.testing.assert_allclose(whole, none + push, atol=1e-5)
    assert np.abs(push).max() > 0.1


@pytest.mark.slow
def test_the_table_of_corrections_has_a_row_for_every_corrector(tiny):
    rows = corrected.corrections_digits(1)
    names = [row["corrector"] for row in rows]
    assert names[0] == "none" and names[1] == "residual" and names[-1] == "training data"
    assert {"score, trained at N = 10", "kernel drift", "restart to 0.5, 4 RK4 steps"} <= set(names)
    nfe = {row["corrector"]: row["NFE"] for row in rows}
    assert nfe["none"] == 40 and nfe["kernel drift"] == 40 and nfe["restart to 0.5, 4 RK4 steps"] == 56
    assert nfe["score, 20 Langevin steps"] == 60


def test_a_segment_is_a_flow_map_on_its_own_grid(tiny):
    b = beds.bed("digits")
    grid = np.array([0.0, 0.5, 0.75, 1.0], np.float32)
    step_of = lambda shift: lambda x, s, t, cond=None, key=None: x + shift
    networks = beds.networks(b, {FLOW_MAP: straightened.Method(None, flow_map=step_of)}, {FLOW_MAP: 2.0})
    row = beds.row(b, {"sampler": "shift"}, beds.plain(FLOW_MAP, grid), networks, 3)
    still = beds.networks(b, {FLOW_MAP: straightened.Method(None, flow_map=step_of)}, {FLOW_MAP: 0.0})
    start = beds.row(b, {"sampler": "still"}, beds.plain(FLOW_MAP, grid), still, 3)
    key, none = beds.keys(0, 1)[0], beds.Placement()
    np.testing.assert_allclose(row.draw(key, none) - start.draw(key, none), 6.0, atol=1e-5)
    assert row.cost.nfe == 3 and FLOW in networks.methods
