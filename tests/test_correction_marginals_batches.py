"""Batches from marginal sets: uniform, paired, resumed, held out, read from disk or by grain."""

import pickle

import jax
import numpy as np
import pytest
from test_correction_marginals import data, small

from fmjax import correction
from fmjax.storage import shards


def numbered(count=50, steps=5):
    """A set whose entries say which example and step they are."""
    x = (1000 * np.arange(steps)[None, :] + np.arange(count)[:, None]).astype(np.float32)
    return correction.Marginals(x[..., None], np.linspace(0, 1, steps, dtype=np.float32), None)


def test_batches_are_uniform_and_paired():
    m = numbered()
    f = correction.marginal_batches(m, batch_size=100, seed=3)
    drawn = [f(step) for step in range(100)]
    label = np.concatenate([b.x1[:, 0] for b in drawn]).astype(int)
    n, example = label // 1000, label % 1000
    np.testing.assert_array_equal(np.concatenate([b.t for b in drawn]), m.ts[n])
    for counts, dof in ((np.bincount(n), 4), (np.bincount(example), 49), (np.bincount(n * 50 + example), 249)):
        expected = 10_000 / (dof + 1)
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert len(counts) == dof + 1 and abs(chi2 - dof) < 4.5 * np.sqrt(2 * dof)


def test_batches_resume_and_split():
    m = numbered()
    whole = correction.marginal_batches(m, batch_size=12, seed=3)
    parts = [
        correction.marginal_batches(m, batch_size=12, seed=3, process_index=i, process_count=3)(7) for i in range(3)
    ]
    np.testing.assert_array_equal(np.concatenate([b.x1 for b in parts]), whole(7).x1)
    np.testing.assert_array_equal(np.concatenate([b.t for b in parts]), whole(7).t)
    assert (whole(7).x1 != whole(8).x1).any()
    assert (whole(7).x1 != correction.marginal_batches(m, batch_size=12, seed=4)(7).x1).any()
    with pytest.raises(ValueError, match="batch_size=12.*process_count=5"):
        correction.marginal_batches(m, batch_size=12, seed=3, process_count=5)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Forward and backward sets of one flow on one grid, 90 and 70 examples in several shards."""
    folders = {way: tmp_path_factory.mktemp(way) for way in ("forward", "backward")}
    small(folders["forward"])
    small(folders["backward"], direction="backward", data=data(70, 3), count=None, shape=None)
    return folders


def test_a_set_on_disk_is_the_set_in_memory(built):
    """Rows, single examples, slices and steps of them; batches of one seed have the same bits."""
    whole, disk = (correction.read_marginals(built["forward"], stream=stream) for stream in (False, True))
    assert disk.x.shape == whole.x.shape and len(disk.x) == 90 and disk.x.dtype == whole.x.dtype
    rows, n = np.array([88, 0, 31, 32, -1, 31]), np.array([0, 4, 2, 2, 1, 3])
    for at in (3, rows, slice(60, None, 7), slice(5, 5), (rows, n), (rows, 2), (4, 2), (slice(None), slice(1, 3))):
        np.testing.assert_array_equal(disk.x[at], whole.x[at])
    a, b = (correction.marginal_batches(m, batch_size=32, seed=1) for m in (whole, disk))
    for step in range(3):
        assert all((x == y).all() for x, y in zip(jax.tree.leaves(a(step)), jax.tree.leaves(b(step)), strict=True))
    with pytest.raises(ValueError, match="90 examples on disk are read by rows"):
        np.asarray(disk.x)
    again = pickle.loads(pickle.dumps(disk.x))  # as grain sends it to its workers
    np.testing.assert_array_equal(again[rows], whole.x[rows])
    np.testing.assert_allclose(correction.straightness_defect(disk), correction.straightness_defect(whole), rtol=1e-6)


def test_a_damaged_set_is_not_opened(built, tmp_path):
    for path in built["forward"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "shard-00001-of-00003.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="shard-00001.* is torn or was changed.*rebuilds this shard alone"):
        correction.read_marginals(tmp_path, stream=True)


def test_grain_reads_a_set_shuffled_and_resumes_exactly(built):
    grain = pytest.importorskip("grain")
    m = correction.read_marginals(built["forward"], stream=True)

    def iterator():
        return iter(grain.MapDataset.source(m.x).shuffle(seed=3).repeat().batch(20).to_iter_dataset())

    whole, parts = iterator(), iterator()
    expected = [next(whole) for _ in range(12)]
    epoch = np.concatenate(expected)[:90, 0]
    np.testing.assert_array_equal(np.sort(epoch, 0), np.sort(m.x[:][:, 0], 0))  # all of them, once
    assert (epoch != m.x[:][:, 0]).any()
    for _ in range(5):
        next(parts)
    state, resumed = parts.get_state(), iterator()
    resumed.set_state(state)
    np.testing.assert_array_equal([next(resumed) for _ in range(7)], expected[5:])


def test_steps_and_examples_are_those_asked_for():
    m = numbered()._replace(manifest=MANIFEST._replace(steps=(0, 2, 4, 6, 8), ts=tuple(range(9))))
    f = correction.marginal_batches(m, batch_size=400, seed=3, steps=(8, 2), examples=slice(None, -10))
    label = f(0).x1[:, 0].astype(int)
    assert set(label // 1000) == {1, 4} and set(label % 1000) == set(range(40))
    held_out = correction.marginal_batches(m, batch_size=400, seed=3, examples=range(40, 50, 3))(0).x1[:, 0].astype(int)
    assert set(held_out % 1000) == {40, 43, 46, 49}
    for wrong, message in (
        ({"steps": (1,)}, r"steps=\(1,\).* \(0, 2, 4, 6, 8\)"),
        ({"steps": ()}, r"steps=\(\)"),
        ({"examples": range(45, 55)}, r"examples=range\(45, 55\).* 0 .. 49"),
        ({"examples": slice(60, None)}, r"examples=range\(50, 50\).* 0 .. 49"),
    ):
        with pytest.raises(ValueError, match=message):
            correction.marginal_batches(m, batch_size=8, seed=0, **wrong)


MANIFEST = shards.Manifest(
    version=shards.VERSION, direction="backward", flow="a", solver="rk4", backward_map="reverse",
    ts=(0.0, 0.25, 0.5, 0.75, 1.0), steps=(0, 1, 2, 3, 4), dtype="float32", shape=(1,), count=50, seed=None, data="d",
    shard_size=50,
)  # fmt: skip


def test_pairs_are_at_one_step_and_independent():
    """Backward examples are numbered from 0, forward ones from 500: steps agree, every combination is as likely."""
    q = numbered(20)._replace(manifest=MANIFEST)
    p = q._replace(x=numbered(30).x + 500, manifest=MANIFEST._replace(direction="forward", count=30))
    f = correction.marginal_pairs(p, q, batch_size=500, seed=3, examples=slice(None, -4))
    drawn = [f(step) for step in range(60)]
    i, j = (np.concatenate([getattr(b, x)[:, 0] for b in drawn]).astype(int) for x in ("x1", "x0"))
    n = i // 1000
    np.testing.assert_array_equal(j // 1000, n)
    np.testing.assert_array_equal(np.concatenate([b.t for b in drawn]), q.ts[n])
    i, j = i % 1000, j % 1000 - 500
    assert set(i) == set(range(16)) and set(j) == set(range(26))
    cells = 16 * 26
    chi2 = ((np.bincount(i * 26 + j, minlength=cells) - len(i) / cells) ** 2 / (len(i) / cells)).sum()
    assert abs(chi2 - (cells - 1)) < 4.5 * np.sqrt(2 * (cells - 1))
    part = correction.marginal_pairs(
        p, q, batch_size=500, seed=3, examples=slice(None, -4), process_index=1, process_count=2
    )(7)
    np.testing.assert_array_equal(part.x0, drawn[7].x0[250:])
    np.testing.assert_array_equal(part.x1, drawn[7].x1[250:])


def test_pairs_are_of_one_flow_on_one_grid(built, tmp_path):
    p, q = (correction.read_marginals(built[way]) for way in ("forward", "backward"))
    batch = correction.marginal_pairs(p, q, batch_size=8, seed=0, steps=(4,))(0)
    assert (batch.t == 1).all() and all((row == data(70, 3)).all(1).any() for row in batch.x1)
    for name, value in (("ts", (0.0, 0.1, 0.5, 0.75, 1.0)), ("flow", "b"), ("solver", "rk4"), ("steps", (0, 1))):
        with pytest.raises(ValueError, match=f"{name}=.* the backward set has"):
            correction.marginal_pairs(
                p, q._replace(manifest=q.manifest._replace(**{name: value})), batch_size=8, seed=0
            )


def test_half_precision_trains_in_single(tmp_path):
    small(tmp_path, dtype="float16")
    batch = correction.marginal_batches(correction.read_marginals(tmp_path), batch_size=8, seed=0)(0)
    assert batch.x1.dtype == batch.t.dtype == np.float32


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_examples():
    """Eight times as many: building forward and backward, and reading shuffled batches from a set of 0.5 GB."""
    bench = pytest.importorskip("launch.bench.costs")
    rows = bench.marginal_memory(1)
    assert [row["examples"] for row in rows] == [1000, 8000] * 3
    assert all(row["ratio"] < 1.1 for row in rows), rows  # 0.4 GB more would be a ratio of two
