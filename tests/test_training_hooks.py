"""What a run keeps as its best does not depend on how often it was interrupted; samples are drawn by kind of data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import plan

from fmjax import training
from fmjax.keys import as_keys, normal
from fmjax.methods import lagrangian
from fmjax.storage import checkpoint, images
from fmjax.training import pictures
from fmjax.types import Batch


def kept(directory):
    step, ema, metadata = checkpoint.restore(directory / "checkpoints", part="ema")
    return step, metadata["score"], ema["w"]


def drive(directory, scores, steps):
    """The hook of a process that sees these steps, whose averaged parameters are the number of the step."""
    scores = dict(enumerate(scores, 1))
    hook = training.keep_best(directory, lambda ema: scores[int(ema["w"][0])])
    for n in steps:
        hook(n, training.State(np.int32(n), None, None, {"w": np.full(2, n, np.float32)}))


SCORES = [5.0, 3.0, 4.0, float("nan"), 2.0, 2.0, 6.0]


@pytest.mark.parametrize(("until", "best"), [(1, (1, 5.0)), (4, (2, 3.0)), (7, (5, 2.0))])
def test_the_first_of_the_least_scores_is_kept_and_nothing_else(until, best, tmp_path):
    drive(tmp_path, SCORES, range(1, until + 1))
    step, score, w = kept(tmp_path)
    assert (step, score) == best and (w == step).all()
    assert checkpoint.all_steps(tmp_path / "checkpoints") == [step]


@pytest.mark.parametrize("back", [1, 3, 6])
def test_a_process_that_starts_again_earlier_changes_nothing(back, tmp_path):
    """It meets the same scores: what a killed one had found before its last checkpoint stays."""
    drive(tmp_path, SCORES, range(1, 6))
    drive(tmp_path, SCORES, range(back, 8))
    assert kept(tmp_path)[:2] == (5, 2.0)


def test_a_score_that_is_not_finite_is_never_kept(tmp_path):
    drive(tmp_path, [float("nan"), float("inf")], [1, 2])
    assert checkpoint.latest_step(tmp_path / "checkpoints") is None


class Interrupt(Exception):
    pass


def test_a_run_killed_between_its_checkpoints_keeps_the_same_bits(tmp_path):
    """And what it keeps is the average of that record's step, which another run can start from."""
    ready = plan(steps=8, log_every=2, save_every=5)

    def train(name, kill=None):
        averages = []

        def score(ema):  # least at the third record
            averages.append(jax.device_get(ema))
            return abs(float(np.abs(ema["output"]["bias"]).sum()) - goal)

        def stop(n, state):
            if n == kill:
                raise Interrupt

        training.train(ready, tmp_path / name, hooks=[training.keep_best(tmp_path / name / "best", score), stop])
        return averages

    goal = 0.0
    averages = train("dry")
    goal = float(np.abs(averages[2]["output"]["bias"]).sum())
    train("whole")
    with pytest.raises(Interrupt):
        train("parts", kill=8)
    train("parts")
    for name in ("whole", "parts"):
        assert checkpoint.latest_step(tmp_path / name / "best" / "checkpoints") == 6
        best = training.load_average(ready, tmp_path / name / "best")
        for a, b in zip(jax.tree.leaves(best), jax.tree.leaves(averages[2]), strict=True):
            np.testing.assert_array_equal(a, b)


def state_of(ready):
    params = training.initial_parameters(ready)
    params = jax.tree.map(lambda a: a + 0.1 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), params)
    return training.init(params, ready.optimiser.tx, mesh=ready.mesh)


def with_shape(shape):
    return plan(shape=shape, batch=lambda n: Batch(np.zeros((32, *shape), np.float32)))


def test_pictures_of_images_are_written_every_so_many_steps(tmp_path):
    from PIL import Image

    ready = with_shape((8, 8, 1)).replace(steps=4, log_every=1)
    training.train(ready, tmp_path, hooks=[training.draw_samples(ready, tmp_path, every=2)])
    names = sorted(p.name for p in (tmp_path / "samples").iterdir())
    assert names == ["step-0000002.png", "step-0000004.png"]
    with Image.open(tmp_path / "samples" / names[0]) as image:
        assert image.size == (6 * 42 + 2, 6 * 42 + 2)  # 36 images, each pixel a square of 5, with gaps of 2


def test_pictures_of_a_map_are_single_jumps_of_the_averaged_parameters(tmp_path):
    ready = with_shape((8, 8, 1))
    ready = ready.replace(method=lagrangian(ready.model.net))
    state = state_of(ready)
    training.draw_samples(ready, tmp_path, every=1)(1, state._replace(params=None))
    x0 = normal(as_keys(jax.random.fold_in(jax.random.key(ready.seed), 2), 36), ready.data.shape)
    images.save_png(tmp_path / "expected.png", np.asarray(ready.method.flow_map(state.ema)(x0, 0.0, 1.0)))
    images.save_png(tmp_path / "noise.png", np.asarray(x0))
    drawn = (tmp_path / "samples" / "step-0000001.png").read_bytes()
    assert drawn == (tmp_path / "expected.png").read_bytes() != (tmp_path / "noise.png").read_bytes()


@pytest.mark.parametrize(("shape", "count"), [((2,), 1024), ((16, 3), 8), ((5,), None), ((4, 4, 2), None), ((), None)])
def test_the_picture_fits_the_kind_of_data(shape, count, tmp_path):
    from PIL import Image

    ready, blank = with_shape(shape), training.State(np.int32(1), None, None, None)
    training.draw_samples(ready, tmp_path, every=1)(1, state_of(ready) if count else blank)
    files = list(tmp_path.glob("samples/*"))
    assert len(files) == (count is not None) and (pictures.writer_for(shape) is None) == (count is None)
    if count:
        assert pictures.writer_for(shape).count == count
        with Image.open(files[0]) as image:
            assert image.size == ((480, 480) if shape == (2,) else (720, 960))
            assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_draw_and_write_of_a_user_are_taken_instead(tmp_path):
    """So can vectors be shown, and conditions follow one another."""
    ready = with_shape((5,))
    write = lambda path, samples: path.with_suffix(".txt").write_text(str(samples.shape))
    hook = training.draw_samples(ready, tmp_path, every=2, draw=lambda ema: jnp.zeros((3, 5)), write=write)
    for n in (1, 2, 3):
        hook(n, state_of(ready))
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-0000002.txt"]
    conditions = []
    velocity = lambda params: lambda x, t, cond=None: (conditions.append(cond.shape), 0 * x + cond[:, None])[1]
    labelled = ready.replace(cond=np.arange(3), method=ready.method._replace(velocity=velocity))
    x = training.average_samples(labelled, count=7, steps=1)({"w": jnp.zeros(())})
    plain = training.average_samples(labelled.replace(cond=np.zeros(1, int)), count=7, steps=1)({"w": jnp.zeros(())})
    np.testing.assert_allclose((x - plain)[:, 0], np.arange(7) % 3, atol=1e-6)
    assert conditions[0] == (7,)


def test_points_that_are_not_finite_are_left_out_of_a_scatter_plot(tmp_path):
    points = np.random.default_rng(0).standard_normal((50, 2))
    points[3] = np.nan
    pictures.write_scatter(tmp_path / "a.png", points)
    pictures.write_scatter(tmp_path / "b.png", points)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pictures.write_scatter(tmp_path / "c.png", np.delete(points, 3, 0))
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()  # the title tells of it
