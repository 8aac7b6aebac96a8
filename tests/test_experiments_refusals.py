"""Bad values of every field: one line of at most 300 characters that begins with the field, before any work."""

import functools
import re
import signal

import pytest
from laboratory import CLASSIFIER, MAP, RK4, SCORE, base, config
from laboratory import laboratory as laboratory  # a fixture

from fmjax.experiments import pipeline, reflow, settings, stages
from fmjax.experiments.command_line import field_names

pytestmark = pytest.mark.usefixtures("laboratory")
BAD = (-1, 0, 0.5, 10**11, float("nan"), "nonsense", (), None)
SECONDS = 30
MLP = {"name": "mlp", "width": 8, "depth": 1, "dropout": 0.0, "dtype": "float32", "outputs": 1, "guided": False}
WITH = {  # what a config needs for the fields of one part to matter
    "correctors.score": {"correctors": {"score": SCORE}},
    "correctors.classifier": {"correctors": {"classifier": CLASSIFIER}},
    "flow_map": {"flow_map": MAP},
    "corrections": {
        "correctors": {"score": SCORE},
        "corrections": {"end": {**RK4, "at": (2,), "by": "score", "alpha": 0.5, "beta": 0.1, "parallel": False}},
    },
    "straighten": {"straighten": True},
    "marginals": {"correctors": {"score": SCORE}},
    "net": {"net": MLP},
    "label_dropout": {
        "conditional": True, "net": MLP, "data": {"name": "two_moons", "labels": True, "train": 240, "test": 80},
    },
    "guidance": {
        "conditional": True, "label_dropout": 0.1, "net": MLP,
        "data": {"name": "two_moons", "labels": True, "train": 240, "test": 80},
    },
}  # fmt: skip
GOOD = {  # values that mean something, by the last part of the field; all others are refused
    **dict.fromkeys(("init", "teacher", "negatives", "weighting", "correctors", "corrections", "flow_map"), (None,)),
    **dict.fromkeys(("learning_rate", "beta2"), (0.5,)),
    **dict.fromkeys(("weight_decay", "ema", "label_dropout", "diagonal", "dropout"), (0, 0.5)),
    **dict.fromkeys(("log_every", "save_every", "keep"), (10**11,)),
    **dict.fromkeys(("warmup", "seed", "depth", "waves", "times", "at"), (0,)),
    **dict.fromkeys(("euler", "rk4", "baselines"), ((),)),
    "clip": (0.5, 10**11, None), "eps": (0, 0.5, 10**11, None), "sigma": (0.5, 10**11), "beta": (0, 0.5, 10**11),
    "alpha": (-1, 0.5, 10**11), "guidance": (-1, 0, 0.5), "metrics": ((), None), "sample_every": (0, 10**11),
}  # fmt: skip
INHERITED = ("correctors.score.net", "flow_map.net", "straighten.net")  # None stands for the network of the flow
ELSEWHERE = {("teacher", "nonsense"): "target='self'", ("keep", 10**11): "workdir="}
MARGINALS = ("solver", "solver_steps", "backward_map", "forward_examples")


class Ready(Exception):
    """Every check has passed: the first stage would work now."""


def part_of(field):
    """The part of the config that a field belongs to."""
    if field in MARGINALS:
        return "marginals"
    return next((part for part in WITH if field == part or field.startswith(f"{part}.")), "")


def prepared(part):
    """A small config in which the fields of a part matter."""
    changes = dict(WITH.get(part, {}))
    straighten = changes.pop("straighten", False)
    c = config(**changes)
    with c.unlocked(), c.ignore_type():
        if straighten:
            small = {"grid_steps": 4, "examples": 40, "reference_steps": 4, "allocations": ((1, 1),), "baselines": (2,)}
            c.straighten = base.straighten(c, **small, parts={"late": (1,)}, sharing=("gated",), full=False, probes=8)
    return c


def changed(field, value):
    """A small config in which one field has another value."""
    c = prepared(part_of(field))
    *parents, last = field.split(".")
    with c.unlocked(), c.ignore_type():
        functools.reduce(lambda node, name: node[name], parents, c)[last] = value
    return c


def outcome(field, value, path, monkeypatch):
    """The refusal of a value, or ``"accepted"``."""

    def ready(every, path):
        raise Ready

    def late(number, frame):
        raise AssertionError(f"{field}={value!r} takes longer than {SECONDS} s")

    monkeypatch.setattr(stages, "run_all", ready)
    run = reflow.main if field.startswith("straighten") else pipeline.main
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        run(settings.read(changed(field, value)), path / "w")
    except Ready:
        return "accepted"
    except (ValueError, OSError, RuntimeError) as error:
        assert not list(path.rglob("checkpoints"))
        return str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fields():
    """Every field of the base config with its stages, by dotted name."""
    names = {name for part in ("", *WITH) for name in field_names(prepared(part)) if part_of(name) == part}
    return sorted(names)


def is_good(field, value):
    good = GOOD.get(field.rpartition(".")[2], ())
    return any(value is g or (value == g and type(value) is type(g)) for g in good) or (
        value is None and field in INHERITED
    )


def check(field, value, tmp_path, monkeypatch):
    line = outcome(field, value, tmp_path, monkeypatch)
    if line == "accepted":
        assert is_good(field, value), f"{field}={value!r} is accepted"
        return
    assert "\n" not in line and len(line) <= 300, line
    names = [field.rsplit(".", k)[0] for k in range(field.count(".") + 1)]  # the field, or what holds it
    begins = any(re.match(rf"{re.escape(name)}[\[.=:]", line) for name in names)
    assert begins or line.startswith(ELSEWHERE.get((field, value), "?")), f"{field}={value!r}: {line}"
    assert re.search(r"[.?] \S.*[.…]$", line), f"no way on: {line}"
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_every_bad_value_of_every_field_is_refused_in_one_line(tmp_path, monkeypatch):
    """1200 configs: no traceback, no hang, nothing accepted that means nothing."""
    names = fields()
    assert len(names) > 120 and {name.split(".")[0] for name in names} >= set(base.get_config())
    for n, field in enumerate(names):
        for i, value in enumerate(BAD):
            check(field, value, tmp_path / f"{n}-{i}", monkeypatch)


@pytest.mark.parametrize(
    "field",
    [
        "batch_size", "clip", "conditional", "corrections.end.alpha", "corrections.end.at", "corrections.end.by",
        "correctors.score.method.sigma", "correctors.classifier.coupling", "coupling", "data", "data.train", "ema",
        "flow_map.method", "forward_examples", "guidance", "init", "learning_rate", "metrics", "negatives", "net.width",
        "net.dtype", "net.name", "path", "samplers.euler", "sampling.samples", "seed", "solver", "solver_steps",
        "source", "source.name", "steps", "straighten.allocations", "straighten.bounds", "straighten.parts", "teacher",
        "weighting",
    ],
)  # fmt: skip
def test_bad_values_are_refused_in_one_line(field, tmp_path, monkeypatch):
    for value in BAD:
        if not is_good(field, value):
            check(field, value, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 2**32), ("steps", True), ("net", {"name": "mlp", "width": "9"}), ("samplers.euler", (0,)), ("keep", "2"),
     ("net.width", 3.0), ("sampling", {"seeds": 2}), ("target", "frozen"), ("path", {"name": "vp", "beta": 1.0})],
)  # fmt: skip
def test_values_of_another_kind_are_refused_in_one_line(field, value, tmp_path, monkeypatch):
    check(field, value, tmp_path, monkeypatch)
