"""The loop: what is recorded, what ends a run, and that an interruption changes no number."""

import os
import signal
import subprocess
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import batch as points
from plans import plan

from fmjax import training
from fmjax.storage import Owned, checkpoint, files, owned
from fmjax.training import loop
from fmjax.types import Batch

SPEEDS = ("steps_per_s", "examples_per_s")
WEIGHT = {"w": jnp.ones(())}


def records(path):
    return [{k: v for k, v in r.items() if k not in SPEEDS} for r in files.read_jsonl(path / "metrics.jsonl")]


def same(a, b):
    chex.assert_trees_all_equal(jax.device_get(a), jax.device_get(b))


class Interrupt(Exception):
    pass


def at(step, act):
    """A hook that acts at one step."""
    return lambda n, state: act() if n == step else None


def interrupt():
    raise Interrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the last state of an uninterrupted run; tests only read them."""
    path = tmp_path_factory.mktemp("whole")
    return path, training.train(plan(), path)


@pytest.mark.parametrize("step", [5, 10])
def test_an_interrupted_run_resumes_to_the_same_bits(step, whole, tmp_path):
    """Killed at a record that is later than the last checkpoint: parameters, averages, moments and records agree."""
    with pytest.raises(Interrupt):
        training.train(plan(), tmp_path, hooks=[at(step, interrupt)])
    assert checkpoint.latest_step(tmp_path / "checkpoints") < step
    same(whole[1], training.train(plan(), tmp_path))
    assert records(whole[0]) == records(tmp_path)
    assert [r["step"] for r in records(tmp_path)] == [5, 10, 12]
    assert not (tmp_path / "owner.lock").exists()
    same(whole[1], training.train(plan(), tmp_path))  # a complete run is read, not trained on


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_exits_with_its_status_and_resumes(name, status, whole, tmp_path, capsys):
    """The signal comes at the record of step 5: that step is saved, though 4 and 8 are the steps of a checkpoint."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.raises(SystemExit) as end:
        training.train(plan(), tmp_path, hooks=[at(5, lambda: signal.raise_signal(getattr(signal, name)))])
    assert end.value.code == status
    assert checkpoint.latest_step(tmp_path / "checkpoints") in (5, 6)  # it is seen after the step that follows
    (line,) = [line for line in capsys.readouterr().err.splitlines() if name in line]
    assert f"flow: {name} after step" in line and "run again to resume" in line
    assert handlers == {s: signal.getsignal(s) for s in handlers}
    same(whole[1], training.train(plan(), tmp_path))
    assert records(whole[0]) == records(tmp_path)


def test_an_ignored_signal_stays_ignored_and_a_thread_sets_no_handler(whole, tmp_path):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        hook = at(5, lambda: signal.raise_signal(signal.SIGHUP))
        same(whole[1], training.train(plan(), tmp_path / "nohup", hooks=[hook]))
    finally:
        signal.signal(signal.SIGHUP, former)
    states = []
    thread = threading.Thread(target=lambda: states.append(training.train(plan(), tmp_path / "thread")))
    thread.start()
    thread.join()
    same(whole[1], states[0])


ENDLESS = """
import sys, time
sys.path[:0] = {path!r}
from plans import batch, plan
from fmjax import training
slow = lambda n: (time.sleep(0.05), batch(n))[1]
def hook(n, state):
    print(n, flush=True)
    if sys.argv[2] == "stuck" and n == 2:
        print("stuck", flush=True)
        time.sleep(600)
training.train(plan(steps=100_000, log_every=1, save_every=10_000, batch=slow), sys.argv[1], hooks=[hook])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_saves_and_the_second_kills(name, tmp_path):
    """Real processes: one that runs, and one that is stuck in a hook."""
    number = getattr(signal, name)
    code = ENDLESS.format(path=[os.path.dirname(__file__), *sys.path])
    env = os.environ | {"XLA_FLAGS": ""}

    def start(*arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    with start(tmp_path / "a", "runs") as child:
        for _ in range(3):
            child.stdout.readline()
        child.send_signal(number)
        _, err = child.communicate(timeout=60)
    lines = [line for line in err.splitlines() if line.strip()]
    assert child.returncode == 128 + number and len(lines) == 1 and f"flow: {name} after step" in lines[0], err
    assert checkpoint.latest_step(tmp_path / "a" / "checkpoints") >= 3
    with start(tmp_path / "b", "stuck") as child:
        while child.stdout.readline() != "stuck\n":
            assert child.poll() is None
        child.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        child.send_signal(number)
        assert child.wait(10) == -number


def test_two_runs_in_one_folder_are_refused(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys\nfrom fmjax.storage import owned\nwith owned(sys.argv[1]): print('x', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdin=-1, stdout=-1, text=True, env=env) as other:
        assert other.stdout.readline() == "x\n"
        with pytest.raises(Owned, match=f"process {other.pid}"):
            training.train(plan(), tmp_path)
        other.communicate("\n")
    with owned(tmp_path):  # the laboratory's own lock of the same folder
        training.train(plan(steps=1), tmp_path)


def test_a_record_holds_the_means_since_the_last_one_and_the_rates(tmp_path):
    for every in (1, 3):
        training.train(plan(steps=6, log_every=every), tmp_path / str(every))
    each, third = records(tmp_path / "1"), records(tmp_path / "3")
    assert [r["step"] for r in third] == [3, 6]
    for name in ("loss", "grad_norm"):
        for i, r in enumerate(third):
            assert r[name] == pytest.approx(np.mean([e[name] for e in each[3 * i : 3 * i + 3]]), rel=1e-12)
    assert each[0]["learning_rate"] == 0 and each[1]["learning_rate"] == pytest.approx(0.0025)
    last = files.read_jsonl(tmp_path / "3" / "metrics.jsonl")[-1]
    assert last["examples_per_s"] == pytest.approx(last["steps_per_s"] * 32) and last["steps_per_s"] > 0
    assert list((tmp_path / "3" / "tensorboard").glob("events*"))


def test_records_that_were_lost_are_told_and_training_goes_on(whole, tmp_path):
    """Records are sealed by each checkpoint: their number and digest."""
    with pytest.raises(Interrupt):
        training.train(plan(), tmp_path, hooks=[at(10, interrupt)])
    log = tmp_path / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 5', '"step": 4'))
    with pytest.warns(UserWarning, match=r"metrics\.jsonl is not as it was left at step 8"):
        same(whole[1], training.train(plan(), tmp_path))
    log.unlink()
    training.train(plan(), tmp_path)  # a complete run is read


def test_records_are_on_disk_before_the_checkpoint_that_counts_them(tmp_path, monkeypatch):
    order = []
    sync, save = files.sync, checkpoint.save
    monkeypatch.setattr(files, "sync", lambda path: (order.append(os.path.basename(path)), sync(path)))
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: (order.append("save"), save(*a, **k)))
    training.train(plan(steps=5), tmp_path)
    steps = [name for name in order if name in ("metrics.jsonl", "save")]
    assert steps[-2:] == ["metrics.jsonl", "save"] and steps.count("save") == 2


def test_a_full_disk_is_refused_before_the_first_step(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(checkpoint.CheckpointError, match="are free"):
        training.train(plan(), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def poisoned(step):
    """The tenth step's batch holds one NaN."""
    b = points(step)
    return b._replace(x1=b.x1 + (np.nan if step == 9 else 0.0) * (np.arange(len(b.x1)) == 3)[:, None])


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(whole, tmp_path):
    with pytest.raises(training.Diverged, match=r"step 10: .*loss is nan.*step 8 in .*has x1 that is not finite"):
        training.train(plan(steps=40, batch=poisoned), tmp_path)
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 8
    assert [r["step"] for r in records(tmp_path)] == [5]
    chex.assert_tree_all_finite(checkpoint.restore(tmp_path / "checkpoints")[1]["params"])
    training.train(plan(), tmp_path)
    assert checkpoint.latest_step(tmp_path / "checkpoints") == 12


def with_loss(loss, **changes):
    ready = plan(**changes)
    return ready.replace(method=ready.method._replace(loss=loss))


def test_a_term_alone_is_named(tmp_path):
    def loss(params, target, batch, key):
        per = batch.x1.sum(1) * params["w"]
        return per.mean(), {"per_example": per, "penalty": jnp.full(len(per), jnp.inf)}

    with pytest.raises(training.Diverged, match="step 1: penalty is inf; there is no checkpoint yet; lower learning"):
        training.train(with_loss(loss, steps=2), tmp_path, params=WEIGHT)


def growing(params, target, batch, key):
    """A finite term, 1 in the first step and then 10^step: 1000 times the first step's loss at step 4."""
    n = jnp.round(batch.progress * 12)
    pull = jnp.where(n > 0, 10.0**n, 1.0) * params["w"] / params["w"]
    return pull.mean(), {"per_example": pull, "residual": pull, "s": 0 * pull, "t": 0 * pull + 0.3}


def test_a_loss_that_blows_up_is_stopped_at_the_record_that_shows_it(tmp_path):
    message = "flow diverged at step 5: residual_gap_0.25_0.5 is 1e.04, loss is 1e.04, residual is 1e.04; .* step 3 in"
    with pytest.raises(training.Diverged, match=message):
        training.train(with_loss(growing, log_every=1, save_every=3), tmp_path, params=WEIGHT)
    assert [r["residual_gap_0.25_0.5"] for r in records(tmp_path)] == [1, 10, 100, 1000]
    with pytest.raises(training.Diverged, match="step 6: .*; there is no checkpoint yet"):  # in its first record
        training.train(with_loss(growing, log_every=6, save_every=12), tmp_path / "late", params=WEIGHT)


def test_an_explosion_is_never_saved_and_clean_data_resume(whole, tmp_path):
    """One batch times 1e5 before a checkpoint between two records: the checkpoint would carry it in its sums."""
    bad = lambda n: points(n)._replace(x1=points(n).x1 * (1e5 if n == 6 else 1))
    with pytest.raises(training.Diverged, match="step 8: .*step 4 in"):
        training.train(plan(batch=bad, log_every=12), tmp_path)
    clean = training.train(plan(log_every=12), tmp_path)
    same(clean.params, whole[1].params)


def test_a_damaged_newest_checkpoint_falls_back_and_the_numbers_stay(tmp_path):
    state = training.train(plan(), tmp_path)
    (tmp_path / "checkpoints" / "12" / "metadata" / "metadata").write_text("{")
    with pytest.warns(UserWarning, match="12 is damaged.*falling back to step 8"):
        same(state, training.train(plan(), tmp_path))


def test_batches_that_come_later_state_the_progress_too(tmp_path):
    """As batches of marginals, which do not exist when a run is planned."""

    def loss(params, target, batch, key):
        return batch.progress.mean() + 0 * params["w"], {"per_example": batch.progress}

    late = with_loss(loss, steps=4, log_every=1).replace(batch=lambda n: Batch(np.ones((8, 2), np.float32)))
    training.train(late, tmp_path, params=WEIGHT)
    assert [r["loss"] for r in records(tmp_path)] == [0, 0.25, 0.5, 0.75]


def test_other_parameters_or_another_teacher_are_refused_at_resume(tmp_path):
    start = loop.initial_parameters(plan())
    other = jax.tree.map(lambda a: a + 1, start)
    training.train(plan(steps=2), tmp_path, params=start)
    with pytest.raises(ValueError, match="^params: differ .* Take another workdir"):
        training.train(plan(), tmp_path, params=other)
    frozen = {"target": "frozen", "steps": 2}
    training.train(plan(**frozen), tmp_path / "t", teacher=start)
    with pytest.raises(ValueError, match="^teacher: differ"):
        training.train(plan(target="frozen"), tmp_path / "t", teacher=other)


def test_parameters_of_a_smaller_network_are_completed_and_others_refused(tmp_path):
    state = training.train(plan(steps=2), tmp_path)
    ready = plan()
    same(training.load_average(ready, tmp_path), state.ema)
    more = lambda key, x, cond=None: ready.model.init(key, x) | {"scale": jnp.full(3, 7.0)}
    larger = ready.replace(model=ready.model._replace(init=more))
    merged = training.load_average(larger, tmp_path, "init")
    same(merged, jax.device_get(state.ema) | {"scale": np.full(3, 7.0, np.float32)})
    with pytest.raises(ValueError, match=r"teacher='.*': .* \['scale'\] \(3,\) does not exist in this one"):
        training.merge_parameters(ready, merged, f"teacher={str(tmp_path)!r}")
    with pytest.raises(ValueError, match=r"\['hidden'\] \(2, 16\) has shape \(3, 16\)"):
        training.merge_parameters(ready, merged | {"hidden": np.zeros((2, 16))})
    half = training.merge_parameters(ready, jax.tree.map(lambda a: a.astype(jnp.float64), state.ema))
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"), ({"log_every": 0}, "log_every=0"), ({"save_every": -1}, "save_every=-1"),
        ({"keep": 0}, "keep=0"), ({"batch_size": 0}, "batch_size=0"), ({"ema": 1.0}, "ema=1.0"),
        ({"target": "emma"}, "target='emma'"), ({"shape": (3,)}, "."),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_work_is_refused_before_anything_is_compiled(changes, message):
    loop.check_plan(plan())
    with pytest.raises((ValueError, TypeError), match=message):
        loop.check_plan(plan(**changes))


def test_a_plan_is_built_by_name_changed_by_name_and_short_in_print():
    ready = plan()
    assert repr(ready) == "Plan(flow: 12 steps of 32 examples [2] on 1 devices, seed 0)"
    changed = ready.replace(steps=3, batch_size=8, seed=1)
    assert (changed.schedule.steps, changed.data.batch_size, changed.seed, ready.schedule.steps) == (3, 8, 1, 12)
    assert changed.replace(schedule=training.Schedule(7), keep=5).schedule == training.Schedule(7, keep=5)
    with pytest.raises(TypeError, match="stepz"):
        ready.replace(stepz=3)
    with pytest.raises(TypeError):
        training.Plan("flow")


def test_float_conditions_reach_the_network_at_its_start():
    shapes = []

    def init(key, x, cond=None):
        shapes.append(jax.tree.map(lambda a: (a.shape, a.dtype), cond))
        return {"w": jnp.zeros(())}

    ready = plan(cond={"age": np.zeros((4, 3), np.float32), "label": np.arange(4)})
    loop.initial_parameters(ready.replace(model=ready.model._replace(init=init)))
    assert shapes == [{"age": ((1, 3), jnp.float32), "label": ((1,), jnp.int32)}]
