"""The recommendation of a report: chosen on validation, its gain on test examples, five lines of summary."""

import numpy as np
import pytest

from fmjax import sampling
from fmjax.experiments import comparison, recommend
from fmjax.experiments.samplers import NOISE, Sampler
from fmjax.metrics import Metric

PLAIN = [Sampler("rk4, 2 steps", "rk4", "rk4", 2), Sampler("euler, 8 steps", "euler", "euler", 8)]
FIX = Sampler("rk4, 2 steps, fix at 2", "rk4 + corrections", "rk4", 2, None, (2,), "fix", baseline=PLAIN[0].name)
ALONE = FIX._replace(name="rk4, 2 steps, noise", by=NOISE)
NAMES = [*PLAIN, FIX, ALONE]
COSTS = {s.name: sampling.Cost(nfe, len(s.at), nfe - 8, nfe) for s, nfe in zip(NAMES, (8, 8, 9, 8), strict=True)}


def values(*means, spread=0.01):
    """Return three runs of two distances for each sampler, around its mean."""
    runs = lambda m: [m - spread, float(m), m + spread]
    return {s.name: {"a": runs(m), "b": runs(2 * m)} for s, m in zip(NAMES, means, strict=True)}


def test_the_choice_sees_validation_and_the_gain_is_of_test_examples():
    validation, test = values(1.0, 0.8, 0.5, 0.7), values(1.0, 0.9, 0.6, 0.1)
    choice = recommend.recommend(NAMES, COSTS, validation, test)
    assert choice.sampler is FIX and choice.baseline is PLAIN[1] and choice.cheaper
    assert [v.difference for v in choice.changes] == pytest.approx([-0.3, -0.6])
    first, gain = recommend.advice(choice, COSTS, test)
    assert first == "Use first: rk4, 2 steps, fix at 2 (NFE 9); the best of 4 samplers on validation examples."
    assert "against euler, 8 steps (NFE 8), the best without corrections at no more NFE" in gain
    assert gain.endswith("a \u221233.3 ± 0.0 %, b \u221233.3 ± 0.0 %.")  # (0.6 - 0.9) / 0.9; paired runs have no error


def test_a_baseline_costs_no_more_than_the_recommended_sampler():
    costs = COSTS | {"euler, 8 steps": sampling.Cost(80, 0, 0, 80)}
    choice = recommend.recommend(NAMES, costs, values(1.0, 0.8, 0.5, 0.7), values(1.0, 0.9, 0.6, 0.1))
    assert choice.baseline is PLAIN[0]
    dear = {s.name: sampling.Cost(100, 0, 0, 100) for s in PLAIN} | {FIX.name: COSTS[FIX.name]}
    choice = recommend.recommend([*PLAIN, FIX], dear, values(1.0, 0.8, 0.5, 0.7), values(1.0, 0.9, 0.6, 0.1))
    assert not choice.cheaper and choice.baseline is PLAIN[0]


def test_noise_alone_is_named_as_such_and_what_diverged_is_never_chosen():
    choice = recommend.recommend(NAMES, COSTS, values(1.0, 0.8, np.nan, 0.7), values(1.0, 0.9, 0.6, 0.1))
    assert choice.sampler is ALONE
    assert "a control: noise alone, no corrector is better" in recommend.advice(choice, COSTS, values(1, 1, 1, 1))[0]
    assert recommend.recommend(NAMES, COSTS, values(*[np.inf] * 4), values(1, 1, 1, 1)) is None


def test_a_gain_that_is_not_significant_is_said_to_be_none():
    wide = values(1.0, 0.9, 0.6, 0.1)
    wide[FIX.name] = {"a": [0.1, 0.9, 1.7], "b": [1.2, 1.2, 1.2]}
    choice = recommend.recommend(NAMES, COSTS, values(1.0, 0.8, 0.5, 0.7), wide)
    gain = recommend.advice(choice, COSTS, wide)[1]
    assert "(no significant difference), b" in gain and gain.count("no significant") == 1


def test_the_summary_has_five_lines():
    test = values(1.0, 0.9, 0.6, 0.1)
    drawn = {s.name: np.reshape(test[s.name]["a"], (3, 1, 1)) for s in NAMES}
    distances = [Metric("a", lambda x: float(x.mean())), Metric("b", lambda x: 2 * float(x.mean()))]
    floor = np.reshape([0.01, 0.03], (2, 1, 1))
    rows, verdicts = comparison.compare(NAMES, drawn, COSTS, distances, floor)
    lines = recommend.five_lines(rows, verdicts, ["Use first: x.", "Gain: y."])
    assert [line.partition(" ")[0] for line in lines] == ["Use", "Gain:", "Least", "Corrections", "Floor,"]
    assert "a 0.100 ± 0.006 by rk4, 2 steps, noise (NFE 8, noise alone)" in lines[2]
    assert "a 0.020 ± 0.010" in lines[4]
    assert len(recommend.five_lines(rows, [], [])) == 5
