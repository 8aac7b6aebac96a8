"""Effects of corrections: relative changes, what is grey, controls last, the table as CSV."""

import csv
import io
import math

import pytest

from fmjax.experiments import effects
from fmjax.experiments.figures import Row
from fmjax.experiments.report import Verdict

ROWS = {
    "plain": Row("plain", "rk4", 8, 0, {"W2": (0.5, 0.01), "odd": (0.0, 0.1)}),
    "noise": Row("noise", "rk4 + corrections", 8, 1, {"W2": (0.45, 0.01)}, control=True),
    "strong": Row("strong", "rk4 + corrections", 10, 1, {"W2": (0.4, 0.01), "odd": (0.1, 0.1)}),
    "weak": Row("weak", "rk4 + corrections", 10, 1, {"W2": (0.498, 0.01)}),
}
VERDICTS = [
    Verdict("noise", "plain", "W2", -0.05, 0.02, "helps"),
    Verdict("strong", "plain", "W2", -0.1, 0.02, "helps"),
    Verdict("strong", "plain", "odd", 0.1, 0.02, "harms"),
    Verdict("weak", "plain", "W2", -0.002, 0.0001, "helps"),
]


def test_changes_are_relative_and_below_one_percent_grey():
    found = {e.row.name: e.changes for e in effects.effects(VERDICTS, ROWS)}
    assert found["strong"]["W2"][:2] == pytest.approx((-0.2, 0.04)) and found["strong"]["W2"].kind == "helps"
    assert found["weak"]["W2"].relative == pytest.approx(-0.004) and found["weak"]["W2"].kind == "none"
    assert math.isnan(found["strong"]["odd"].relative)  # a distance of 0 has no relative change
    assert effects.percent(found["strong"]["odd"]) == "n/a"


def test_controls_stand_last_and_name_their_baseline():
    every = effects.effects(VERDICTS, ROWS)
    assert [e.row.name for e in every] == ["strong", "weak", "noise"]
    assert {e.baseline.name for e in every} == {"plain"}


def test_dots_of_a_distance_lie_on_one_axis_with_two_standard_errors():
    every = effects.effects(VERDICTS, ROWS)
    low, high = effects.axis("W2", every)
    assert low < -0.28 and 0.0 < high < 0.02  # -0.2 - 2 * 0.04 is the least; no change is the greatest
    strong, weak, noise = (effects.dot(e.changes["W2"], (low, high)) for e in every)
    value = lambda place: low + place / 100 * (high - low)
    assert [value(v) for v in strong] == pytest.approx([-0.2, -0.28, -0.12, 0.0], abs=1e-3)
    assert value(weak.at) == pytest.approx(-0.004, abs=1e-3) and strong.zero == weak.zero == noise.zero
    assert effects.dot(every[0].changes["odd"], (low, high)) is None


def test_a_dot_beyond_the_axis_lies_at_its_end():
    """A correction that harms by 500 % leaves room for the others."""
    wild = effects.Change(5.0, 0.1, "harms")
    every = [*effects.effects(VERDICTS, ROWS), effects.Effect(ROWS["weak"], ROWS["plain"], {"W2": wild})]
    ends = effects.axis("W2", every)
    assert ends[1] == pytest.approx(1.0, abs=0.06) and effects.dot(wild, ends)[:3] == (100, 100, 100)


def test_the_csv_holds_the_numbers_of_the_rows():
    rows = list(csv.DictReader(io.StringIO(effects.as_csv(list(ROWS.values())))))
    assert [float(row["W2 mean"]) for row in rows] == [0.5, 0.45, 0.4, 0.498]
    assert rows[1]["control"] == "True" and rows[1]["odd mean"] == ""
