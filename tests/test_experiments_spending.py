"""Costs of a report: FLOPs of samplers by the size of their networks, seconds from the records of a run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import paths, sampling
from fmjax.experiments import spending, stored
from fmjax.experiments.drawing import Draws, Models
from fmjax.experiments.samplers import NOISE, Sampler
from fmjax.storage import files
from fmjax.types import Method

D = 4
MATRICES = lambda n: lambda params: lambda x, t, cond=None: sum(x @ params[i] for i in range(n))
MODELS = Models(
    {"flow": Method(None, velocity=MATRICES(1)), "score": Method(None, direction=MATRICES(3))},
    {"flow": jnp.zeros((1, D, D)), "score": jnp.zeros((3, D, D))},
    (D,),
    paths.linear(),
)
PLAIN = Sampler("plain", "rk4", "rk4", 2)
FIX = PLAIN._replace(name="fix", at=(1, 2), by="score", options={"alpha": 0.5, "beta": 0.0})


def test_operations_are_evaluations_times_the_operations_of_each_network():
    alone = FIX._replace(name="alone", by=NOISE)
    free = FIX._replace(name="free", by="langevin")
    costs = {"plain": sampling.Cost(8, 0, 0, 8), "fix": sampling.Cost(10, 2, 2, 10)}
    costs |= {"alone": sampling.Cost(8, 2, 0, 8), "free": sampling.Cost(14, 2, 6, 14)}
    operations = spending.sampler_flops([PLAIN, FIX, alone, free], MODELS, costs, None)
    matrix = 2 * D * D  # a product of a row and a matrix: D * D multiplications and additions
    sums = 3 * D  # of the three products of the corrector, and 0 + the first
    assert operations["plain"] == pytest.approx(8 * matrix, abs=8 * D)
    assert operations["fix"] == pytest.approx(8 * matrix + 2 * (3 * matrix + sums), abs=8 * D + 2 * D)
    assert operations["alone"] == operations["plain"]
    assert operations["free"] == pytest.approx(14 * matrix, abs=14 * D)


def test_seconds_of_a_training_are_steps_over_its_median_speed(tmp_path):
    """The first record includes compilation."""
    folder = tmp_path / "flow"
    folder.mkdir()
    for step, speed in ((10, 0.5), (20, 10.0), (30, 10.0)):
        files.append_jsonl(folder / "metrics.jsonl", {"step": step, "loss": 1.0, "steps_per_s": speed})
    assert spending.trainings(tmp_path, ["flow", "samples"]) == [spending.TrainingTime("flow", 30, 3.0)]


def test_the_time_of_samples_is_recorded_where_they_are_drawn(tmp_path):
    draws = Draws(2, 5, 0)
    x = stored.draw(PLAIN, MODELS, draws, directory=tmp_path, identity="i")
    folder = stored.folder_of(PLAIN, draws, directory=tmp_path, identity="i")
    each = [files.read_json(folder / f"{i}.json")["seconds"] for i in range(2)]
    assert stored.seconds(folder, 2) == min(each) > 0
    np.testing.assert_array_equal(stored.read_first(folder), x[0])
    (folder / "0.json").write_text("{}")
    assert stored.seconds(folder, 2) == each[1]  # a damaged time is no time
    assert math.isnan(stored.seconds(tmp_path / "none", 2)) and stored.read_first(tmp_path / "none") is None
    assert jax.tree.leaves(x)[0].shape == (2, 5, D)
