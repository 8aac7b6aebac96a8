"""Costs of a report: FLOPs of samplers by the size of their networks, seconds from the records of a run."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import nets, paths, sampling
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
    assert operations == {
        "plain": 8 * matrix,
        "fix": 8 * matrix + 2 * 3 * matrix,
        "alone": 8 * matrix,
        "free": 14 * matrix,
    }


def test_layers_under_a_scan_count_as_often_as_they_run():
    """A transformer with and without the scan; and the attention and layers of one block more, by hand."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def count(depth, scan):
        model = nets.from_linen(nets.DiT(width=16, depth=depth, heads=2, patch=2, scan=scan))
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        return spending.flops(lambda params, x: model.net(params, x, 0.5, 0.5), params, x)

    rows, tokens, width = 2, 16, 16
    block = 2 * rows * tokens * width * width * (4 + 8)  # query, key, value, output; two layers of 4 times the width
    block += 2 * 2 * rows * tokens * tokens * width  # logits and weighted values
    block += 2 * rows * width * 6 * width  # shifts, scales and gates
    assert count(5, True) == count(5, False)
    assert count(5, True) - count(4, True) == block


def test_of_a_condition_the_largest_branch_counts():
    w = jnp.ones((D, D))
    function = lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: x @ w @ w, x)
    assert spending.flops(function, jnp.ones((1, D))) == 2 * 2 * D * D


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
