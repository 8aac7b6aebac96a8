"""Samplers of a config: their names, families and baselines, and what is refused before anything is drawn."""

import numpy as np
import pytest

from fmjax import sampling
from fmjax.experiments.samplers import corrected_samplers, plain_samplers, time_grid
from fmjax.sampling import grids

PLAIN = {"euler": (4,), "rk4": (2, 8), "flow_map": (1, 2)}
END = {"solver": "rk4", "steps": 2, "at": (2,), "by": "score", "alpha": 0.5, "beta": 0.1}
JUMP = {"solver": "flow_map", "steps": 2, "at": (1, 2)}
TRAINED = ["score", "classifier"]


def samplers(plain, corrections):
    plain = plain_samplers(plain)
    return plain + corrected_samplers(corrections, plain, TRAINED)


def test_samplers_have_names_families_and_baselines():
    everywhere = END | {"at": (0, 1, 2)}
    by_name = {s.name: s for s in samplers(PLAIN, {"end": END | {"beta": 0.0}, "all": everywhere})}
    control = "rk4, 2 steps, noise 0.1 at every step"
    assert list(by_name) == [
        "euler, 4 steps", "rk4, 2 steps", "rk4, 8 steps", "flow map, 1 step", "flow map, 2 steps", control,
        "rk4, 2 steps, score at 2", "rk4, 2 steps, score at every step",
    ]  # fmt: skip
    assert [s.baseline for s in by_name.values()] == [None] * 5 + ["rk4, 2 steps"] * 2 + [control]
    push, noise = by_name["rk4, 2 steps, score at every step"], by_name[control]
    assert noise.options == {"alpha": 0.0, "beta": 0.1} and push.options == {"alpha": 0.5, "beta": 0.1}
    assert noise.at == push.at == (0, 1, 2)
    assert {s.family for s in by_name.values()} == {"euler", "rk4", "flow map", "rk4 + corrections"}
    assert len({str(s.fields()) for s in by_name.values()}) == len(by_name)


def test_a_sampler_has_a_grid_and_options_of_its_solver():
    entries = {
        "levels": {"solver": "heun", "steps": (4, 6), "grid": {"name": "edm_grid", "rho": 5.0}},
        "noisy": {"solver": {"name": "ddim", "eta": 1.0}, "steps": 3},
    }
    first, second, third = plain_samplers(entries)
    assert (first.name, second.steps) == ("heun, 4 steps of edm_grid (rho=5.0)", 6)
    assert first.family == "heun on edm_grid (rho=5.0)"
    assert third.name == "ddim (eta=1.0), 3 steps"
    np.testing.assert_array_equal(time_grid(first.grid, 4), grids.edm_grid(4, rho=5.0))
    fix = {**entries["levels"], "steps": 4, "at": (2,), "by": "score", "alpha": 0.5, "parallel": True}
    (corrected,) = corrected_samplers({"x": fix}, [first, second], TRAINED)
    assert (corrected.grid, corrected.parallel, corrected.baseline) == (first.grid, True, first.name)


def test_grids_of_other_options_are_other_samplers():
    """``samplers`` that differ in the shift of their grid alone have names and families of their own."""
    shifted = lambda shift: {"solver": "unipc", "steps": 4, "grid": {"name": "shifted_grid", "shift": shift}}
    flux = {"solver": "unipc", "steps": 4, "grid": {"name": "resolution_grid", "tokens": 4096}}
    drawn = samplers({"a": shifted(2.0), "b": shifted(4.0), "c": flux}, {})
    assert len({s.name for s in drawn}) == len({s.family for s in drawn}) == 3
    np.testing.assert_allclose(time_grid(drawn[1].grid, 4), [0, 1 / 13, 1 / 5, 3 / 7, 1])
    np.testing.assert_array_equal(time_grid(drawn[2].grid, 4), sampling.resolution_grid(4, tokens=4096))
    with pytest.raises(ValueError, match=r"samplers.a.grid.shift=-1.0: .*above 0"):
        plain_samplers({"a": shifted(-1.0)})
    with pytest.raises(ValueError, match="samplers.a.grid: resolution_grid needs the option 'tokens'"):
        plain_samplers({"a": {"solver": "unipc", "steps": 4, "grid": "resolution_grid"}})


def test_every_training_free_corrector_can_be_named():
    for name in ("langevin", "mala", "restart"):
        with pytest.raises(ValueError, match=f"corrections.x.nonsense=1.0: '{name}' has no such option"):
            samplers(PLAIN, {"x": {"solver": "rk4", "steps": 2, "at": (1,), "by": name, "nonsense": 1.0}})


@pytest.mark.parametrize(
    ("plain", "corrections", "message"),
    [
        ({"rk5": (2,)}, {}, "samplers.rk5='rk5'.*did you mean 'rk4'"),
        ({"rk4": (0,)}, {}, "samplers.rk4.steps=0"),
        ({"rk4": (2.0,)}, {}, "samplers.rk4.steps=2.0"),
        ({"rk4": (True,)}, {}, "samplers.rk4.steps=True"),
        ({"rk4": "8"}, {}, "samplers.rk4.steps='8'"),
        ({"rk4": None}, {}, "samplers.rk4.steps=None"),
        ({"x": {"solver": "rk4"}}, {}, "samplers.x: has no steps"),
        ({"x": {"solver": "rk4", "steps": 2, "at": (1,)}}, {}, "samplers.x.at="),
        ({"x": {"solver": 3, "steps": 2}}, {}, "samplers.x.solver=3"),
        (PLAIN, {"x": 3}, "corrections.x=3"),
        (PLAIN, {"x": {"solver": "rk4"}}, "corrections.x: has no 'steps'"),
        (PLAIN, {"x": END | {"at": (3,)}}, r"corrections.x.at=3: .* 0 \.\. 2"),
        (PLAIN, {"x": END | {"at": (0.5,)}}, "corrections.x.at=0.5"),
        (PLAIN, {"x": END | {"at": (2, 1)}}, r"corrections.x.at=\(2, 1\)"),
        (PLAIN, {"x": END | {"at": ()}}, r"corrections.x.at=\(\)"),
        (PLAIN, {"x": END | {"at": "every"}}, "corrections.x.at='every'"),
        (PLAIN, {"x": END | {"steps": 4}}, "corrections.x='rk4, 4 steps': this plain sampler is not drawn"),
        (PLAIN, {"x": END | {"beta": -1.0}}, "corrections.x.beta=-1.0"),
        (PLAIN, {"x": END | {"alpha": 0.0}}, "corrections.x.alpha=0.0"),
        (PLAIN, {"x": END | {"alpha": float("nan")}}, "corrections.x.alpha=nan"),
        (PLAIN, {"x": END | {"alpha": "1"}}, "corrections.x.alpha='1'"),
        (PLAIN, {"x": END | {"alpha": (1.0, 2.0)}}, r"corrections.x.alpha=\(1.0, 2.0\)"),
        (PLAIN, {"x": END | {"parallel": "yes"}}, "corrections.x.parallel='yes'"),
        (PLAIN, {"x": {k: v for k, v in END.items() if k != "alpha"}}, "corrections.x.alpha: 'score' needs it"),
        (PLAIN, {"x": END, "y": END | {"alpha": 0.2}}, "corrections='rk4, 2 steps, score at 2'"),
        (PLAIN, {"x": END | {"by": "scor"}}, "corrections.x.by='scor'.*did you mean 'score'"),
        (PLAIN, {"x": END | {"by": 3}}, "corrections.x.by=3"),
        (PLAIN, {"x": END | {"bandwidth": 1.0}}, "corrections.x.bandwidth=1.0: 'score' has no such option"),
        (PLAIN, {"x": {**JUMP, "by": "drift", "alpha": 1.0}}, "corrections.x.bandwidth: 'drift' needs it"),
        (PLAIN, {"x": {**JUMP, "at": (0,), "by": "restart", "to": 0.5}}, "corrections.x.to=0.5"),
        (PLAIN, {"x": {**JUMP, "by": "restart", "to": 1.5}}, "corrections.x.to=1.5"),
    ],
)  # fmt: skip
def test_bad_samplers_are_refused_by_field_and_value(plain, corrections, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        samplers(plain, corrections)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300
