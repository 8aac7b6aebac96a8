"""The pipeline on points: what it writes, what a second run reads, and that no interruption changes a number."""

import html
import json
import re
import shutil
import urllib.parse

import numpy as np
import pytest
import scipy.stats
from laboratory import (
    CLASSIFIER,
    CORRECTIONS,
    MAP,
    RK4,
    SCORE,
    WHOLE,
    digest,
    no_checkpoint,
    numbers,
    read,
    records,
    refused,
    run,
    stamps,
    whole_run,
)
from laboratory import laboratory as laboratory  # a fixture

from fmjax import correction, metrics
from fmjax.experiments import build, command_line, pipeline, settings, side_by_side, workdir
from fmjax.experiments.contents import VERDICTS
from fmjax.storage import checkpoint, files
from fmjax.training import loop

pytestmark = pytest.mark.usefixtures("laboratory")
TRAINED = ("flow", "correctors/score", "correctors/classifier", "flow_map")


@pytest.fixture(scope="module")
def finished(laboratory, tmp_path_factory):
    return whole_run(tmp_path_factory)


def test_every_stage_leaves_its_work(finished):
    for stage in TRAINED:
        assert [r["step"] for r in files.read_jsonl(finished / stage / "metrics.jsonl")] == [4, 8]
    forward, backward = (correction.read_marginals(finished / "marginals" / d) for d in ("forward", "backward"))
    assert forward.x.shape == (64, 3, 2) and backward.x.shape == (240, 3, 2)
    np.testing.assert_array_equal(backward.x[:, -1], build.data(read().common.data).train.x)
    assert forward.manifest.flow == backward.manifest.flow == digest(finished / "flow")
    assert {"config.json", "environment.json", "metrics.json", "report.html"} <= {p.name for p in finished.iterdir()}
    assert not (finished / "owner.lock").exists()


def test_the_numbers_have_costs_errors_floor_and_verdicts(finished):
    found = numbers(finished)
    rows = {r["name"]: r for r in found["rows"]}
    assert {n: r["nfe"] for n, r in rows.items()} == {
        "euler, 2 steps": 2, "rk4, 2 steps": 8, "flow map, 1 step": 1, "flow map, 2 steps": 2,
        "rk4, 2 steps, noise 0.1 at 2": 8, "rk4, 2 steps, score at 2": 9, "rk4, 2 steps, classifier at 1, 2": 12,
        "flow map, 2 steps, drift at 2": 2, "flow map, 2 steps, restart at 1": 3, "training data": 0,
    }  # fmt: skip
    floor = rows["training data"]["distances"]
    assert set(floor) == {"sliced W2", "energy distance"}
    for name, row in rows.items():
        assert all(se > 0 for _, se in row["distances"].values())
        assert name == "training data" or row["distances"]["sliced W2"][0] > floor["sliced W2"][0], name
    assert {(v["name"], v["baseline"]) for v in found["verdicts"]} == {
        ("rk4, 2 steps, noise 0.1 at 2", "rk4, 2 steps"), ("rk4, 2 steps, score at 2", "rk4, 2 steps, noise 0.1 at 2"),
        ("rk4, 2 steps, classifier at 1, 2", "rk4, 2 steps"), ("flow map, 2 steps, drift at 2", "flow map, 2 steps"),
        ("flow map, 2 steps, restart at 1", "flow map, 2 steps"),
    }  # fmt: skip
    gap, floor = found["gaps"]["p_n and q_n"], found["gaps"]["floor: p_n and other samples of p_n"]
    assert gap["t"] == [0.0, 0.5, 1.0]
    assert gap["distance"][-1] > 1.5 * floor["distance"][-1], "an untrained flow does not end at the data"
    test = build.data(read().common.data).test.x
    assert found["variance"]["test data"] == pytest.approx(test.var(0).sum(), rel=1e-5)
    assert len(found["auc"]["classifier"]) == 3 and found["straightness"][0] == found["straightness"][-1] == 0.0


def test_the_page_stands_alone_and_names_every_sampler(finished):
    page = (finished / "report.html").read_text()
    assert "http://" not in page and "https://" not in page
    for row in numbers(finished)["rows"]:
        assert row["name"] in page
    for part in ("test data", "backward: from training data", "energy distance", "AUC of the classifier"):
        assert part in page


def test_a_second_run_reads_everything(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / "w")
    before = stamps(path)
    pipeline.main(read(**WHOLE), path)
    changed = {str(p) for p, time in stamps(path).items() if before.get(p) != time}
    assert changed <= {"environment.json", "config.json", "samples/stage.json"}
    assert "[7/7] comparison: complete" in capsys.readouterr().out


def test_other_corrections_are_compared_on_the_same_networks(finished, tmp_path, capsys, monkeypatch):
    path = shutil.copytree(finished, tmp_path / "again")
    before = stamps(path)
    each = {"each": {**CORRECTIONS["apart"], "alpha": (0.1, 0.3)}}
    write = files.write_json
    with monkeypatch.context() as patch:  # killed where all but the last file is written
        patch.setattr(files, "write_json", lambda file, *a: write(file, *a) if file.name != "metrics.json" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pipeline.main(read(**WHOLE | {"corrections": each}), path)
    pipeline.main(read(**WHOLE | {"corrections": each}), path)
    assert "metrics.json is of other samplers or networks: computed again" in capsys.readouterr().err
    old, new = ({r["name"]: r["distances"] for r in numbers(p)["rows"]} for p in (finished, path))
    assert set(new) == {name for name in old if " at " not in name} | {"rk4, 2 steps, classifier at 1, 2"}
    assert all((old[name] == new[name]) == (" at " not in name) for name in new)
    after = stamps(path)
    kept = [p for p in before if p.parts[0] in ("flow", "marginals", "correctors", "flow_map")]
    assert kept and all(after[p] == before[p] for p in kept)


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def rebuilt(finished, tmp_path_factory):
    """A run that lost all but its flow, a shard torn: stages alone by commands, one killed, then the pipeline."""
    path = shutil.copytree(finished, tmp_path_factory.mktemp("rebuilt") / "w")
    for folder in ("correctors", "flow_map", "samples", "comparison"):
        shutil.rmtree(path / folder)
    (path / "metrics.json").unlink()
    shard = next((path / "marginals" / "backward").glob("shard*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    save = checkpoint.save

    def save_until_killed(manager, step, state, **options):
        if options["metadata"]["stage"] == "correctors.score" and step == 8:
            raise Killed
        return save(manager, step, state, **options)

    run("train", f"--workdir={path}", "--stage=marginals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", save_until_killed)
        with pytest.raises(Killed):
            run("train", f"--workdir={path}", "--stage=correctors.score")
    assert checkpoint.latest_step(path / "correctors" / "score" / "checkpoints") == 4
    for stage in ("correctors.score", "flow_map"):
        run("train", f"--workdir={path}", f"--stage={stage}")
    return path


@pytest.mark.parametrize("stage", ["correctors/score", "flow_map"])
def test_a_stage_alone_is_what_the_pipeline_trains_to_the_bit(stage, rebuilt, finished):
    assert digest(rebuilt / stage) == digest(finished / stage)
    assert records(rebuilt / stage) == records(finished / stage)


def test_a_run_that_lost_its_end_goes_on_to_the_same_numbers(rebuilt, finished, capsys):
    before = stamps(rebuilt)
    run("pipeline", f"--workdir={rebuilt}")
    assert numbers(rebuilt) == numbers(finished)
    after = stamps(rebuilt)
    assert all(after[p] == t for p, t in before.items() if p.parts[0] in ("flow", "flow_map", "marginals"))
    assert digest(rebuilt / "correctors" / "classifier") == digest(finished / "correctors" / "classifier")


def test_a_stage_of_another_flow_is_refused_and_deleting_it_is_a_way_on(finished, tmp_path):
    """The flow is trained again from another seed behind the back of the run folder."""
    path = shutil.copytree(finished, tmp_path / "w")
    shutil.rmtree(path / "flow")
    other = read(seed=1)
    stage = pipeline.flow_stage(other, build.data(other.common.data))
    loop.train(stage.plan, workdir.begin_stage(path, "flow", pipeline.assemble.flow_fields(read()), stage.data))
    with pytest.raises(workdir.WorkdirError, match="'marginals' was made from another result of 'flow'"):
        pipeline.main(read(**WHOLE), path)
    for name in ("marginals", "correctors"):
        shutil.rmtree(path / name)
    with pytest.raises(workdir.WorkdirError, match="'flow_map' was made from another result of 'flow'"):
        pipeline.main(read(**WHOLE | {"correctors": {}, "corrections": {}}), path)
    shutil.rmtree(path / "flow_map")
    pipeline.main(read(samplers={"euler": (2,)}), path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correctors": {"score": {"method": {"name": "score_corector"}}}}, "correctors.score.method='score_corector'"),
        ({"correctors": {"score": {"method": "flow_matching"}}}, "correctors.score.method='flow_matching'"),
        ({"correctors": {"x": CLASSIFIER | {"batch_size": 0}}}, "correctors.x.batch_size=0"),
        ({"flow_map": MAP | {"method": "flow_matching"}}, "flow_map.method='flow_matching'"),
        ({"flow_map": MAP | {"batch_size": 30}}, "cannot be split at 0.75"),
        ({"solver_steps": 0}, "solver_steps=0"),
        ({"sampling.samples": 10_000}, "sampling.samples=10000: .* there are 240"),
        ({"sampling.seeds": 0}, "sampling.seeds=0"),
        ({"solver": "rk5", "correctors": {"score": SCORE}}, "solver='rk5'"),
        ({"backward_map": "revers", "correctors": {"score": SCORE}}, "backward_map='revers'"),
        ({"samplers": {"rk5": (2,)}}, "samplers.rk5='rk5'"),
        ({"samplers": {"flow_map": (2,)}}, "samplers.flow_map="),
        ({"samplers": {}}, "samplers="),
        ({"samplers": {"heun": {"steps": (2,), "grid": "edm_gird"}}}, "samplers.heun.grid='edm_gird'"),
        ({"metrics": ("sliced_w3_to",)}, "metrics='sliced_w3_to'"),
        ({"metrics": ("fd_small_to",)}, "FD-small"),
        ({"corrections": {"x": {**RK4, "at": (5,), "by": "score", "alpha": 0.5}}}, "corrections.x.at=5"),
        ({"corrections": {"x": {**RK4, "at": (2,), "by": "drift", "alpha": 0.5, "bandwidth": -1.0}}}, "bandwidth"),
        ({"corrections": {"x": {**RK4, "at": (0,), "by": "restart", "to": 0.5}}}, "restart"),
        ({"data": "eight_gausians"}, "data='eight_gausians'.*did you mean 'eight_gaussians'"),
        ({"target": "frozen"}, "target='frozen'"),
    ],
)
def test_what_a_late_stage_would_refuse_is_refused_before_the_first(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        pipeline.main(read(**changes), tmp_path / "w")
    assert no_checkpoint(tmp_path) and "\n" not in str(caught.value) and len(str(caught.value)) <= 300
    assert not (tmp_path / "w").exists()


def test_the_page_shows_the_numbers_of_the_record(finished):
    """Recommendation, costs, effects and the reproducing config are those of metrics.json and config.json."""
    record, page = json.loads((finished / "metrics.json").read_text()), (finished / "report.html").read_text()
    text = html.unescape(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL))
    text = " ".join(text.split())
    for line in record["lines"]:
        assert " ".join(line.split()) in text
    assert record["lines"][:2] == record["recommendation"]["sentences"] and len(record["lines"]) == 5
    best = record["recommendation"]["sampler"]
    shown = page[page.index('<section id="look"') : page.index('<section id="summary"')]
    assert f"points: {best}." in html.unescape(shown) and "points: test data." in shown
    for name, cost in record["costs"].items():
        row = re.search(rf">{re.escape(html.escape(name))}</th>((?:<td[^>]*>[^<]*</td>){{3}})</tr>", page)[1]
        values = [float(v) for v in re.findall(r'data-value="([^"]*)"', row)]
        assert values == [cost["nfe"], cost["flops"], cost["seconds"]] and cost["flops"] > 0 and cost["seconds"] > 0
    levels = {r["name"]: r["distances"] for r in record["rows"]}
    section = page[page.index('<section id="corrections"') : page.index('<section id="costs"')]
    for v in record["verdicts"]:
        line = re.search(rf">{re.escape(html.escape(v['name']))}</th>(.*?)</tr>", section, re.DOTALL)[1]
        values = [float(x) for x in re.findall(r'data-value="([^"]*)"', line)[2:]]
        relative = v["difference"] / levels[v["baseline"]][v["metric"]][0]
        assert any(value == pytest.approx(relative) for value in values), v
    near = record["neighbours"]
    assert f"{near['median']:.3g}; of test examples {near['median of test data']:.3g}." in text
    offered = re.search(r'download="config.json" href="data:application/json;charset=utf-8,([^"]*)"', page)[1]
    stored = json.loads(urllib.parse.unquote(offered))
    assert stored == json.loads((finished / "config.json").read_text())
    assert len(page) < 5e6 and page.count('class="player"') == 3


def test_the_offered_config_reproduces_the_run(finished, tmp_path):
    """As the page says: the config in an empty folder, then the command."""
    page = (finished / "report.html").read_text()
    offered = re.search(r'download="config.json" href="data:application/json;charset=utf-8,([^"]*)"', page)[1]
    (tmp_path / "config.json").write_text(urllib.parse.unquote(offered))
    assert "python -m launch.pipeline --workdir=W" in page
    config = command_line._read_config([], tmp_path)
    plan = settings.read(config)
    assert workdir.plain(plan.config) == files.read_json(finished / "config.json")


def test_the_last_lines_are_five_and_the_path(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / "w")
    run("pipeline", f"--workdir={path}")
    *_, a, b, c, d, e, end = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in (a, b, c, d, e)] == ["Use", "Gain", "Least", "Corrections", "Floor,"]
    assert end.endswith(f"open {path / 'report.html'}")


def test_two_runs_stand_side_by_side(finished, tmp_path, capsys):
    """The second run is the first with every distance of one sampler halved."""
    other = shutil.copytree(finished, tmp_path / "other")
    record = files.read_json(other / "metrics.json")
    row = next(r for r in record["rows"] if r["name"] == "euler, 2 steps")
    row["distances"] = {m: (v / 2, se) for m, (v, se) in row["distances"].items()}
    files.write_json(other / "metrics.json", record)
    out = tmp_path / "both.html"
    run("report", finished, other, f"--out={out}")
    page = html.unescape(out.read_text())
    assert f"open {out}" in capsys.readouterr().out
    section = page[page.index('<section id="corrections"') : page.index("The same in sentences")]
    rows = dict(re.findall(r'<th scope="row"[^>]*>([^<]*)</th>(.*?)</tr>', section, re.DOTALL))
    changes = {name: [float(x) for x in re.findall(r'data-value="([^"]*)"', r)[2:]] for name, r in rows.items()}
    assert changes.pop("other: euler, 2 steps") == [-0.5, -0.5]
    assert len(changes) == 8 and all(c == [0.0, 0.0] for c in changes.values())
    for name in ("other: rk4, 2 steps", f"{side_by_side.labels([str(finished), str(other)])[0]}: rk4, 2 steps"):
        assert f"points: {name}." in page  # stored samples of both
    for bad, field in (
        ((finished,), "run="),
        ((finished, tmp_path / "none"), "workdir="),
        ((finished, other, "--out=x"), "out="),
    ):
        assert refused("report", *bad).startswith(field)


@pytest.mark.parametrize("runs", [(3, 3), (2, 6), (40, 5)])
def test_the_comparison_of_two_runs_is_welchs_test(runs):
    rng = np.random.default_rng(sum(runs))
    for shift in np.linspace(-2, 2, 21):
        new, old = rng.normal(5 + shift, 1, runs[0]), rng.normal(5, 0.3, runs[1])
        v = side_by_side.welch("a", "b", "W2", metrics.mean_se(new), metrics.mean_se(old), runs)
        test = scipy.stats.ttest_ind(new, old, equal_var=False)
        kind = 1 if test.pvalue >= 0.05 else 0 if test.statistic < 0 else 2
        assert v.verdict == VERDICTS[kind] and v.difference / v.se == pytest.approx(test.statistic)
