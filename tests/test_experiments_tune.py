"""What is chosen for a run: on other noise than is reported, the numbers of the run's own table, taken up again."""

import json

import pytest
from test_experiments_pipeline import TINY, numbers, small_cache  # noqa: F401 (a fixture)
from test_training_loop import config

from fmjax.experiments import evaluate, pipeline, tune

TUNED = {
    "by": "score",
    "solver": "rk4",
    "steps": 2,
    "alphas": (0.2, 0.6),
    "betas": (0.0, 0.1),
    "seeds": 2,
    "metric": "sliced W2",
}


@pytest.fixture(scope="module")
def three():
    """The tiny config with seeds enough to report, and no corrections of its own."""
    return config(**TINY | {"sampling.seeds": 3, "corrections": {}})


@pytest.fixture(scope="module")
def tuned(three, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        path = tmp_path_factory.mktemp("tuned")
        pipeline.main(three, path)
        tune.main(three, path, **TUNED)
    return path


def choice_of(path):
    return json.loads(next(path.glob("tuning/*/choice.json")).read_text())


def test_what_is_tuned_is_measured_on_the_noise_of_the_runs_own_table(tuned, three):
    found, rows = choice_of(tuned), {r["name"]: r["distances"] for r in numbers(tuned)["rows"]}
    assert [one["setting"]["at"] for one in found["influence"]] == [[0], [1], [2]]
    assert found["plain"]["mean"] == pytest.approx(rows["rk4, 2 steps"]["sliced W2"][0], rel=1e-6)
    best = found["chosen"]["setting"]
    assert best["at"] and found["reported"]["setting"] == best
    assert not set(found["keys"]["tuning"]) & set(found["keys"]["reporting"])
    other = three.copy_and_resolve_references().unlock()
    other.corrections = {"tuned": {"solver": "rk4", "steps": 2, "by": "score", **best}}
    pipeline.main(other, tuned)  # what was chosen, as a config's corrections, gives the reported number
    where = "at every step" if len(best["at"]) == 3 else f"at {', '.join(map(str, best['at']))}"
    rows = {r["name"]: r["distances"] for r in numbers(tuned)["rows"]}
    assert found["reported"]["mean"] == pytest.approx(rows[f"rk4, 2 steps, score {where}"]["sliced W2"][0], rel=1e-6)


def test_tuning_again_evaluates_nothing_and_says_the_same(tuned, three, monkeypatch, capsys):
    before, page = choice_of(tuned), next(tuned.glob("tuning/*/report.html"))
    text = page.read_text()
    monkeypatch.setattr(evaluate, "CHUNK", None)  # what draws would fail
    tune.main(three, tuned, **TUNED)
    told = capsys.readouterr().out
    assert choice_of(tuned) == before and page.read_text() == text and "What one correction does alone" in text
    assert "rk4, 2 steps, score: 24 runs of 64 samples" in told and f"open {page}" in told
    assert "corrections.tuned = {'solver': 'rk4', 'steps': 2, 'at': (" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "scor"}, r"no corrector 'scor'; did you mean 'score'\? \(there are classifier, score\)"),
        ({"metric": "sliced w2"}, r"no distance 'sliced w2'; did you mean 'sliced W2'"),
        ({"solver": "rk5"}, "no fixed-step solver 'rk5'"),
        ({"seeds": 0}, "seeds=0 1 or more"),
        ({"betas": (0.1, -0.1)}, r"betas=.0.1, -0.1. are standard deviations"),
    ],
)
def test_what_cannot_be_tuned_is_refused(changes, message, tuned, three):
    with pytest.raises(ValueError, match=message):
        tune.main(three, tuned, **TUNED | changes)


def test_a_run_that_is_not_at_its_end_is_not_tuned(three, tmp_path):
    with pytest.raises(ValueError, match="is not at its end: start it again by launch.pipeline"):
        tune.main(three, tmp_path / "w", **TUNED)
    assert not (tmp_path / "w").exists()
