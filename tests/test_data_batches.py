"""The input pipeline: epochs, resume, processes, couplings, and the thread that runs ahead."""

import threading
import time

import jax
import numpy as np
import pytest

from fmjax import couplings
from fmjax.data import Examples, batches, dataset, in_memory, mean, prefetch
from fmjax.data.batches import NEGATIVES

N, B = 23, 6  # 23 is prime: batches straddle epochs


def data(n=N, shape=(4, 6, 1), seed=0):
    x = np.random.default_rng(seed).uniform(-1, 1, (n, *shape)).astype(np.float32)
    return x, np.arange(n, dtype=np.int32)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("batch_size", [1, 6, 22, 23])
def test_each_example_is_seen_exactly_once_an_epoch(batch_size):
    x, y = data()
    f = batches(x, y, batch_size=batch_size, seed=0)
    seen = np.concatenate([f(step).cond for step in range(3 * N)])
    epochs = seen[: len(seen) // N * N].reshape(-1, N)
    assert (np.sort(epochs, 1) == np.arange(N)).all()
    assert not (epochs[0] == epochs[1]).all()


def test_examples_keep_their_label_and_value():
    x, y = data()
    f = batches(x, {"id": y}, batch_size=B, seed=0)
    for step in range(10):
        batch = f(step)
        assert (batch.x1 == x[batch.cond["id"]]).all() and batch.x0 is None and batch.t is None


def test_float_and_nested_conditions_follow_their_examples():
    x, index = data()
    cond = {"angle": np.linspace(0, 1, N), "image": -x, "pair": (index, index[:, None] / 2)}
    f = batches(x, cond, batch_size=B, seed=1, couple=couplings.minibatch_ot(by_class=False, replacement=True))
    for step in range(5):
        batch = f(step)
        rows = batch.cond["pair"][0]
        assert_equal(batch.cond, jax.tree.map(lambda leaf, rows=rows: leaf[rows], cond))
        assert_equal(batch.x1, x[rows])


def test_first_places_are_uniform_over_epochs():
    """Any example is first in an epoch equally often: 4,600 epochs, 4.5 binomial standard errors."""
    x, y = data(shape=(1,))
    f = batches(x, y, batch_size=N, seed=0)
    counts = np.bincount([f(step).cond[0] for step in range(200 * N)], minlength=N)
    assert np.abs(counts - 200).max() < 4.5 * np.sqrt(200 * (1 - 1 / N))


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("couple", [None, couplings.minibatch_ot(replacement=True, by_class=False)])
def test_any_step_is_bit_equal_whatever_came_before(couple, negatives):
    x, y = data()
    make = lambda: batches(x, y, batch_size=B, seed=3, couple=couple, negatives=negatives, flip=True)
    straight = make()
    run = [straight(step) for step in range(40)]
    for first in (39, 0, 17):
        assert_equal(make()(first), run[first])
    assert_equal(list(prefetch(make(), 11, 40)), run[11:])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"couple": couplings.independent()},
        {"couple": couplings.minibatch_ot(by_class=True)},
        {"negatives": "any"},
        {"negatives": "other_label", "couple": couplings.minibatch_ot(replacement=True, by_class=True)},
        {"negatives": "any", "source": data(seed=1)[0]},
    ],
)
@pytest.mark.parametrize("processes", [2, 3, 6])
def test_slices_of_the_processes_are_the_global_batch(kwargs, processes):
    x, y = data()
    y = {"id": y, "label": y % 3}
    make = lambda i, p: batches(x, y, batch_size=B, seed=0, flip=True, process_index=i, process_count=p, **kwargs)
    for step in (0, 3, 8):
        parts = [make(i, processes)(step) for i in range(processes)]
        assert_equal(jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts), make(0, 1)(step))


def test_seeds_and_steps_draw_different_batches_and_noise():
    x, y = data()
    couple = couplings.independent()
    a, b = (batches(x, y, batch_size=B, seed=seed, couple=couple) for seed in (0, 1))
    assert not (a(0).x0 == b(0).x0).any() and not (a(0).x0 == a(1).x0).any()
    assert not (a(0).cond == b(0).cond).all()


def test_source_noise_is_standard_normal():
    stats = pytest.importorskip("scipy.stats")
    x, _ = data()
    f = batches(x, batch_size=B, seed=0, couple=couplings.independent())
    noise = np.concatenate([f(step).x0.ravel() for step in range(200)])
    assert f(0).x0.dtype == np.float32 and f(0).cond is None
    assert stats.kstest(noise, "norm").pvalue > 1e-4


def test_optimal_transport_lowers_the_cost_of_the_same_noise_and_data():
    x, y = data()
    free, ot = (
        batches(x, y, batch_size=B, seed=0, couple=c)(0)
        for c in (couplings.independent(), couplings.minibatch_ot(by_class=False))
    )
    assert_equal((ot.x1, ot.cond), (free.x1, free.cond))
    assert sorted(map(bytes, ot.x0)) == sorted(map(bytes, free.x0))
    assert ((ot.x0 - ot.x1) ** 2).sum() < ((free.x0 - free.x1) ** 2).sum()


def test_flip_mirrors_half_of_the_images_left_to_right():
    x, y = data()
    f = batches(x, y, batch_size=N, seed=0, flip=True)
    mirrored = 0
    for step in range(100):
        batch = f(step)
        kept = (batch.x1 == x[batch.cond]).all((1, 2, 3))
        assert (kept | (batch.x1 == x[batch.cond][:, :, ::-1]).all((1, 2, 3))).all()
        mirrored += (~kept).sum()
    assert abs(mirrored - 50 * N) < 4.5 * np.sqrt(25 * N)
    assert_equal(x, data()[0])  # the data themselves are untouched


@pytest.mark.parametrize("couple", [None, couplings.minibatch_ot(replacement=True, by_class=False)])
@pytest.mark.parametrize("negatives", ["any", "other_label"])
def test_negatives_are_uniform_over_what_is_allowed_and_never_the_rows_own(negatives, couple):
    """Counts of (own, negative) over 340 batches are binomial given how often each was own, with a mean near 18.

    There a Poisson variable exceeds its mean by 5.5 standard deviations once in 5e5: 3e-4 for all 121 counts.
    """
    n = 11  # a batch is in two epochs, as with N
    x, y = np.arange(n, dtype=np.float32)[:, None], np.arange(n) % 3
    f = batches(x, y, batch_size=B, seed=0, negatives=negatives, couple=couple)
    counts = np.zeros((n, n))
    for step in range(340):
        batch = f(step)
        assert (batch.cond == batch.x1[:, 0] % 3).all()
        np.add.at(counts, (batch.x1[:, 0].astype(int), batch.negative[:, 0].astype(int)), 1)
    allowed = ~np.eye(n, dtype=bool) if negatives == "any" else y[:, None] != y
    assert (counts[~allowed] == 0).all()
    p = allowed / allowed.sum(1, keepdims=True)
    mean = counts.sum(1, keepdims=True) * p
    assert np.abs((counts - mean)[allowed] / np.sqrt(mean * (1 - p))[allowed]).max() < 5.5


def test_negatives_leave_the_rest_of_the_batch_as_it_was():
    x, y = data()
    for kwargs in ({"flip": True}, {"couple": couplings.minibatch_ot(by_class=False), "flip": True}):
        with_, without = (
            batches(x, y, batch_size=B, seed=0, negatives=negatives, **kwargs)(5) for negatives in ("any", None)
        )
        assert without.negative is None
        assert_equal(with_._replace(negative=None), without)


def test_negatives_are_mirrored_half_the_time_and_never_the_mirrored_own():
    x, y = data(n=2)
    f = batches(x, y, batch_size=2, seed=0, negatives="any", flip=True)
    mirrored = 0
    for step in range(400):
        batch = f(step)
        other = x[1 - batch.cond]
        kept = (batch.negative == other).all((1, 2, 3))
        assert (kept | (batch.negative == other[:, :, ::-1]).all((1, 2, 3))).all()
        mirrored += (~kept).sum()
    assert abs(mirrored - 400) < 4.5 * np.sqrt(200)


@pytest.mark.parametrize("flip", [False, True])
def test_fixed_pairs_stay_together_in_the_order_of_the_epochs(flip):
    x, y = data()
    source = np.random.default_rng(1).standard_normal(x.shape, dtype=np.float32)
    kwargs = {"batch_size": B, "seed": 0, "flip": flip}
    f, plain = batches(x, y, source=source, **kwargs), batches(x, y, **kwargs)
    for step in range(8):
        batch = f(step)
        assert_equal(batch._replace(x0=None), plain(step))
        for x0, x1, i in zip(batch.x0, batch.x1, batch.cond, strict=True):
            turn = (lambda a: a) if (x1 == x[i]).all() else (lambda a: a[:, ::-1])
            assert (x1 == turn(x[i])).all() and (x0 == turn(source[i])).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": N + 1}, r"batch_size=24: .* 1\.\.23"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_count": 4}, "batch_size=6: .* 4 processes. Use 4"),
        ({"process_count": 2, "process_index": 2}, "process_index=2"),
        ({"x": np.zeros((N, 2), np.uint8)}, "x=uint8: .*127.5"),
        ({"x": np.zeros((N, 2), np.float32), "flip": True}, "flip=True"),
        ({"cond": np.zeros(N - 1)}, r"cond=\[22\]"),
        ({"cond": {"a": np.arange(N), "b": np.full(N, np.nan)}}, r"cond\['b'\]: row 0"),
        ({"cond": np.array(["a"] * N)}, "cond=<U1"),
        ({"seed": -1}, "seed=-1"),
        ({"source": np.zeros((N, 4, 6, 1), np.float32), "couple": couplings.independent()}, "source=float32 .* couple"),
        ({"source": np.zeros((N, 4, 6), np.float32)}, r"source=float32 \(23, 4, 6\): .*\(23, 4, 6, 1\)"),
        ({"source": np.zeros((N, 4, 6, 1), int)}, "source=int64"),
        ({"negatives": "other_lable"}, "negatives='other_lable': .*did you mean 'other_label'"),
        ({"negatives": "other_label", "cond": np.zeros(N)}, r"negatives='other_label'.*\['float64'\]"),
        ({"negatives": "other_label", "cond": None}, "negatives='other_label': cond has no integer leaf"),
        ({"negatives": "other_label", "cond": np.ones(N, int)}, "negatives='other_label': all labels are equal"),
        ({"negatives": "any", "x": np.ones((N, 2), np.float32)}, "negatives='any': all examples are equal"),
    ],
)
def test_bad_input_is_refused_before_the_first_batch(change, message):
    x, y = data()
    kwargs = {"x": x, "cond": y, "batch_size": B, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        batches(kwargs.pop("x"), kwargs.pop("cond"), **kwargs)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="step=-1"):
        batches(data()[0], batch_size=B, seed=0)(-1)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [1, 2, 5, 50])
def test_prefetch_is_map_in_order(depth):
    assert list(prefetch(lambda step: step**2, 3, 20, depth=depth)) == [step**2 for step in range(3, 20)]
    assert list(prefetch(lambda step: step, 5, 5, depth=depth)) == []
    assert not threads()


def test_prefetch_runs_ahead_by_depth_and_no_further():
    """While the consumer holds value 0, the thread works on 1..depth; it never starts depth + 1."""
    called, reached = [], threading.Event()

    def f(step):
        called.append(step)
        if step == 3:
            reached.set()
        return step

    values = prefetch(f, 0, 100, depth=3)
    assert next(values) == 0
    assert reached.wait(10)
    time.sleep(0.05)
    assert called == [0, 1, 2, 3]
    values.close()
    assert not threads()


def test_prefetch_raises_where_the_value_was_due_and_ends():
    def f(step):
        if step == 4:
            raise KeyError("step four")
        return step

    values = prefetch(f, 0, 100, depth=3)
    assert [next(values) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyError, match="step four"):
        next(values)
    assert not threads()


def test_prefetch_refuses_no_depth_at_the_call():
    with pytest.raises(ValueError, match="depth=0"):
        prefetch(lambda step: step, 0, 1, depth=0)


class OnDisk:
    """Rows that are read when needed."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.ndim = x, x.shape, x.dtype, x.ndim

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        return self.x[rows].copy()


def test_the_mean_of_rows_on_disk_is_that_of_the_array():
    x = np.random.default_rng(0).standard_normal((1000, 3), np.float32)
    np.testing.assert_allclose(mean(OnDisk(x), chunk=64), x.mean(0, dtype=np.float64), atol=1e-7)


def test_rows_on_disk_come_to_memory_at_random_with_their_labels():
    x, y = np.arange(500, dtype=np.float32)[:, None], np.arange(500)
    held_out = Examples(OnDisk(x[:50]), y[:50])
    data = in_memory(dataset(Examples(OnDisk(x), y), held_out, held_out), train=200, validation=20, test=100, seed=3)
    assert isinstance(data.train.x, np.ndarray)
    assert (data.train.count, data.validation.count, data.test.count) == (200, 20, 50)
    for examples in (data.train, data.validation, data.test):
        np.testing.assert_array_equal(examples.x[:, 0], examples.cond)
    assert len(set(data.train.cond)) == 200 and abs(data.train.cond.mean() - 249.5) < 4 * 144 / 200**0.5
    same = dataset(*[Examples(x, y)] * 3)
    assert in_memory(same, train=2, validation=2, test=2, seed=0).train.x is x
