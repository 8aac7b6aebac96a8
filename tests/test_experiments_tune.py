"""What is chosen for a run: on other noise than is reported, the numbers of the run's table, continued after a kill."""

import json
import shutil

import pytest
from laboratory import WHOLE, numbers, read, whole_run
from laboratory import laboratory as laboratory  # a fixture

from fmjax.experiments import drawing, pipeline, tune, workdir

pytestmark = pytest.mark.usefixtures("laboratory")
TUNED = {
    "by": "score", "solver": "rk4", "solver_steps": 2, "alpha": (0.2, 0.6), "beta": (0.0, 0.1), "seeds": 2,
    "metric": "sliced W2",
}  # fmt: skip
THREE = WHOLE | {"sampling": {"seeds": 3, "samples": 40}}


@pytest.fixture(scope="module")
def three():
    """The settings of a whole run with enough runs to report."""
    return read(**THREE)


@pytest.fixture(scope="module")
def tuned(laboratory, three, tmp_path_factory):
    path = shutil.copytree(whole_run(tmp_path_factory), tmp_path_factory.mktemp("tuned") / "w")
    tune.main(three, path, **TUNED)
    return path


def choice_of(path):
    return json.loads(next(path.glob("tuning/*/choice.json")).read_text())


def test_the_choice_is_reported_on_the_noise_of_the_run_s_table(tuned, tmp_path):
    choice = choice_of(tuned)
    assert [trial["placement"]["at"] for trial in choice["influence"]] == [[0], [1], [2]]
    assert not set(choice["keys"]["tuning"]) & set(choice["keys"]["reporting"])
    best = choice["chosen"]["placement"]
    assert best["at"] and choice["reported"]["placement"] == best
    # what was chosen, as the corrections of a config, gives the reported runs
    entry = {"solver": "rk4", "steps": 2, "by": "score", **best}
    pipeline.main(read(**THREE | {"corrections": {"tuned": entry}}), tuned)
    where = "at every step" if len(best["at"]) == 3 else f"at {', '.join(map(str, best['at']))}"
    rows = {r["name"]: r["distances"] for r in numbers(tuned)["rows"]}
    assert {"rk4, 2 steps", f"rk4, 2 steps, score {where}"} <= rows.keys()


def test_tuning_again_evaluates_nothing_and_says_the_same(tuned, three, monkeypatch, capsys):
    before, page = choice_of(tuned), next(tuned.glob("tuning/*/report.html"))
    text = page.read_text()
    monkeypatch.setattr(drawing, "in_chunks", None)  # a draw would fail
    tune.main(three, tuned, **TUNED)
    said = capsys.readouterr().out
    assert choice_of(tuned) == before and page.read_text() == text
    assert "24 runs" in said and f"open {page}" in said
    assert "corrections.tuned = {'solver': 'rk4', 'steps': 2, 'by': 'score', 'at': [" in said


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"by": "scor"}, "by='scor'.*did you mean 'score'.*classifier"),
        ({"metric": "sliced w2"}, "metric='sliced w2'.*did you mean 'sliced W2'"),
        ({"solver": "rk5"}, "solver|samplers.*'rk5'"),
        ({"solver_steps": 0}, "solver_steps=0"),
        ({"beta": (0.1, -0.1)}, r"beta\[1\]="),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line(changes, line, tuned, three):
    with pytest.raises(ValueError, match=line) as caught:
        tune.main(three, tuned, **TUNED | changes)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


def test_too_few_runs_to_report_and_no_run_are_refused(three, tmp_path):
    with pytest.raises(ValueError, match="^sampling.seeds=2"):
        tune.main(read(**WHOLE), tmp_path / "w", **TUNED)
    with pytest.raises(workdir.WorkdirError, match="no checkpoint"):
        tune.main(three, tmp_path / "w", **TUNED)
