"""What a run keeps as its best does not depend on how often it was interrupted."""

import jax
import numpy as np
import pytest

from fmjax import training
from fmjax.experiments import assemble
from fmjax.storage import checkpoint
from fmjax.training import hooks, loop, sharding

digits = pytest.importorskip("configs.digits")


def kept(directory):
    step, ema, metadata = checkpoint.restore(directory / "checkpoints", part="ema")
    return step, metadata["score"], ema["w"]


def drive(directory, scores, steps):
    """The hook of a process that sees these steps, whose averaged parameters are the steps' number."""
    told = dict(enumerate(scores, 1))
    hook = hooks.keep(directory, lambda ema: told[int(ema["w"][0])])
    for n in steps:
        hook(n, training.State(np.int32(n), None, None, {"w": np.full(2, n, np.float32)}))


SCORES = [5.0, 3.0, 4.0, float("nan"), 2.0, 2.0, 6.0]


@pytest.mark.parametrize(("until", "want"), [(1, (1, 5.0)), (4, (2, 3.0)), (7, (5, 2.0))])
def test_the_first_of_the_least_scores_is_kept_and_nothing_else(until, want, tmp_path):
    drive(tmp_path, SCORES, range(1, until + 1))
    step, score, w = kept(tmp_path)
    assert (step, score) == want and (w == step).all()
    assert checkpoint.all_steps(tmp_path / "checkpoints") == [step]


@pytest.mark.parametrize("back", [1, 3, 6])
def test_a_process_that_starts_again_earlier_changes_nothing(back, tmp_path):
    """It meets the same scores: what a killed one had found before its last checkpoint stays."""
    drive(tmp_path, SCORES, range(1, 6))
    drive(tmp_path, SCORES, range(back, 8))
    assert kept(tmp_path)[:2] == (5, 2.0)


def test_a_score_that_is_no_number_is_never_kept(tmp_path):
    drive(tmp_path, [float("nan"), float("inf")], [1, 2])
    assert checkpoint.latest_step(tmp_path / "checkpoints") is None


class Interrupt(Exception):
    pass


def test_a_run_killed_between_its_checkpoints_keeps_the_same_bits(tmp_path):
    """And what it keeps is the average of that record's step, which another run can start from."""
    cfg = digits.get_config()
    with cfg.unlocked():
        cfg.net.width, cfg.net.depth, cfg.batch_size, cfg.steps, cfg.log_every, cfg.save_every = 8, 0, 8, 8, 2, 5
    plan = assemble.assemble(cfg)._replace(mesh=sharding.make_mesh(jax.devices()[:1]))

    def train(name, kill=None):
        seen = []

        def score(ema):  # least at the third record
            seen.append(jax.device_get(ema))
            return abs(float(np.abs(ema["output"]["bias"]).sum()) - goal)

        def stop(n, state):
            if n == kill:
                raise Interrupt

        loop.train(plan, tmp_path / name, hooks=[hooks.keep(tmp_path / name / "best", score), stop])
        return seen

    goal = 0.0
    averages = train("dry")
    goal = float(np.abs(averages[2]["output"]["bias"]).sum())
    train("whole")
    with pytest.raises(Interrupt):
        train("parts", kill=8)
    train("parts")
    for name in ("whole", "parts"):
        assert checkpoint.latest_step(tmp_path / name / "best" / "checkpoints") == 6
        found = loop.given(plan, tmp_path / name / "best")
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(averages[2]), strict=True):
            np.testing.assert_array_equal(a, b)
