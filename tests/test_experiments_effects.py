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


def test_the_chart_names_every_correction_with_its_change():
    chart = effects.effect_chart("W2", effects.effects(VERDICTS, ROWS))
    assert chart.alt == "strong \u221220.0 ± 4.0 %; weak \u22120.4 ± 0.0 %; noise \u221210.0 ± 4.0 %."
    assert effects.effect_chart("odd", effects.effects(VERDICTS, ROWS)) is None


def test_the_csv_holds_the_numbers_of_the_rows():
    rows = list(csv.DictReader(io.StringIO(effects.as_csv(list(ROWS.values())))))
    assert [float(row["W2 mean"]) for row in rows] == [0.5, 0.45, 0.4, 0.498]
    assert rows[1]["control"] == "True" and rows[1]["odd mean"] == ""
