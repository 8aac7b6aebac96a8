"""Marginals with conditions: a labelled Gaussian mixture whose conditional marginals have closed forms."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from test_correction_marginals import contents, data, small

from fmjax import correction, oracles, sampling
from fmjax.keys import as_keys, example_keys, normal
from fmjax.sampling import grids
from fmjax.storage import columns, shards

MEANS = np.array([[-3.0, 0.0], [0.0, 2.0], [4.0, 1.0]], np.float32)
STD, FREQUENCIES, N = 0.5, (0.6, 0.3, 0.1), 600
TS = grids.uniform_grid(4)
LABELS = np.random.default_rng(0).choice(3, N, p=FREQUENCIES)
DATA = MEANS[LABELS] + STD * np.random.default_rng(1).standard_normal((N, 2)).astype(np.float32)


def exact_map(params):
    """The flow map of the class ``cond``: ``x_t = t mean + c_t z`` along every trajectory."""
    spread = lambda t: jnp.sqrt((1 - t) ** 2 + (t * STD) ** 2)[:, None]

    def jump(x, s, t, cond=None, key=None):
        mean = params[cond]
        return t[:, None] * mean + (x - s[:, None] * mean) * spread(t) / spread(s)

    return jump


def spread(t):
    return np.sqrt((1 - t) ** 2 + (t * STD) ** 2)


def build(folder, view=exact_map, **changes):
    options = {"flow": "labelled", "solver": "flow_map", "batch": 64, "shard_size": 256} | changes
    return correction.build_marginals(view, jnp.asarray(MEANS), TS, directory=folder, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Forward and backward sets; the forward labels are drawn with the frequencies of the data."""
    drawn = correction.draw_conditions(jax.random.key(5), LABELS, count=N)
    folders = [tmp_path_factory.mktemp(name) for name in ("forward", "backward")]
    build(folders[0], direction="forward", count=N, shape=(2,), seed=3, cond=drawn)
    build(folders[1], direction="backward", data=DATA, cond=LABELS)
    return folders


@pytest.fixture(scope="module")
def sets(folders):
    return [correction.read_marginals(folder) for folder in folders]


def test_conditional_marginals_are_the_closed_forms(sets):
    """Every example follows the flow of its label, from its own noise or data; the label is stored with it."""
    p, q = sets
    z = np.asarray(normal(example_keys(jax.random.key(3), jnp.arange(N)), (2,)))
    for n, t in enumerate(TS):
        np.testing.assert_allclose(p.x[:, n], t * MEANS[p.cond] + spread(t) * z, atol=2e-5)
        np.testing.assert_allclose(q.x[:, n], t * MEANS[LABELS] + spread(t) / STD * (DATA - MEANS[LABELS]), atol=2e-5)
    np.testing.assert_array_equal(q.cond, LABELS)
    assert p.cond.dtype == q.cond.dtype == np.int32 and p.manifest.cond == q.manifest.cond == '"int32[]"'


def test_a_solver_and_exact_inverse_steps_get_the_conditions_too(folders, sets, tmp_path):
    """Runge-Kutta steps through diffrax and inverse steps of the exact velocity, to the order of the solver."""
    each = jax.vmap(lambda mean, x, t: oracles.gaussian(mean, STD).velocity(x[None], t[None])[0])
    velocity = lambda params: lambda x, t, cond=None: each(params[cond], x, t)
    options = {"view": velocity, "solver": "rk4", "direction": "backward", "data": DATA[:64], "cond": LABELS[:64]}
    for backward_map in ("reverse", "inverse"):
        build(tmp_path / backward_map, **options, backward_map=backward_map)
        m = correction.read_marginals(tmp_path / backward_map)
        np.testing.assert_allclose(m.x, sets[1].x[:64], atol=3e-2)
        trip = functools.partial(correction.round_trip, velocity, jnp.asarray(MEANS), jnp.asarray(DATA[:64]), TS)
        assert trip(jnp.asarray(LABELS[:64]), backward_map=backward_map) < (1e-4 if backward_map == "inverse" else 0.05)


def test_drawn_labels_have_the_frequencies_of_the_data(sets):
    """A chi-squared test against the data's own counts; label ``i`` depends on key ``i`` only."""
    counts, data_counts = np.bincount(sets[0].cond), np.bincount(LABELS)
    assert (((counts - data_counts) ** 2) / data_counts).sum() < 14  # two degrees of freedom: 0.1 %
    assert (counts != data_counts).any()
    keys = as_keys(jax.random.key(5), N)
    part = correction.draw_conditions(keys[100:103], LABELS, count=3)
    np.testing.assert_array_equal(part, sets[0].cond[100:103])
    for bad, message in (((LABELS, 0), "count=0"), ((None, 3), "cond=None"), ((LABELS[:0], 3), "cond=")):
        with pytest.raises(ValueError, match=message):
            correction.draw_conditions(jax.random.key(0), bad[0], count=bad[1])


def test_batches_give_each_example_with_its_label(sets):
    q = sets[1]
    batch = correction.marginal_batches(q, batch_size=512, seed=1)(2)
    mean = batch.t[:, None] * MEANS[batch.cond]
    assert np.abs((batch.x1 - mean) / spread(batch.t)[:, None]).max() < 5 and set(batch.cond) == {0, 1, 2}
    rows = [
        np.flatnonzero((q.x[:, n] == x).all(1))[0]
        for x, n in zip(batch.x1, np.searchsorted(q.ts, batch.t), strict=True)
    ]
    np.testing.assert_array_equal(batch.cond, LABELS[rows])
    parts = [
        correction.marginal_batches(q, batch_size=512, seed=1, process_index=i, process_count=2)(2) for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate([part.cond for part in parts]), batch.cond)


def test_pairs_share_their_label_and_partners_are_uniform(sets):
    """Labels have the data's frequencies; within a label all pairs are equally likely."""
    p, q = sets
    draws = [correction.marginal_pairs(p, q, batch_size=600, seed=1, steps=(4,))(step) for step in range(30)]
    x0, x1, cond = (np.concatenate([getattr(batch, name) for batch in draws]) for name in ("x0", "x1", "cond"))
    rows = [{x.tobytes(): i for i, x in enumerate(m.x[:, 4])} for m in sets]
    j, i = (np.array([row[each.tobytes()] for each in x]) for row, x in zip(rows, (x0, x1), strict=True))
    np.testing.assert_array_equal(LABELS[i], cond)
    np.testing.assert_array_equal(p.cond[j], cond)
    assert (abs(np.bincount(cond) / len(cond) - np.bincount(LABELS) / N) < 4.5 * 0.5 / np.sqrt(len(cond))).all()
    rare = np.flatnonzero(p.cond == 2)
    counts = np.bincount(np.searchsorted(rare, j[cond == 2]), minlength=len(rare))
    chi2, dof = ((counts - counts.mean()) ** 2 / counts.mean()).sum(), len(rare) - 1
    assert abs(chi2 - dof) < 4.5 * np.sqrt(2 * dof)
    assert abs(np.corrcoef(i[cond == 0], j[cond == 0])[0, 1]) < 4.5 / np.sqrt((cond == 0).sum())


def test_pairs_without_a_common_condition_are_refused(sets):
    p, q = sets
    rare = p._replace(x=p.x[p.cond != 2], cond=p.cond[p.cond != 2])
    with pytest.raises(ValueError, match="cond=2: backward example .* no forward example"):
        correction.marginal_pairs(rare, q, batch_size=8, seed=0)
    plain = q._replace(cond=None, manifest=q.manifest._replace(cond=None))
    with pytest.raises(ValueError, match=r"cond=None: the backward set has \"int32"):
        correction.marginal_pairs(plain, q, batch_size=8, seed=0)


def test_a_set_on_disk_has_the_conditions_of_the_set_in_memory(folders, sets):
    for folder, whole in zip(folders, sets, strict=True):
        disk = correction.read_marginals(folder, stream=True)
        rows = np.array([0, 255, 256, 599, -1, 300])
        np.testing.assert_array_equal(disk.cond[rows], whole.cond[rows])
        np.testing.assert_array_equal(disk.x[rows, 2], whole.x[rows, 2])
        a, b = (correction.marginal_batches(m, batch_size=64, seed=1)(0) for m in (whole, disk))
        for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(left, right)
    disk = [correction.read_marginals(folder, stream=True) for folder in folders]
    a, b = (correction.marginal_pairs(*pair, batch_size=64, seed=1)(0) for pair in (sets, disk))
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


TREE = {"text": np.random.default_rng(2).standard_normal((90, 4)), "pair": (np.arange(90) % 7, np.arange(90) % 2 == 0)}


def shifted(params):
    """A flow that moves by what every part of the conditions says."""

    def jump(x, s, t, cond=None, key=None):
        label, flag = cond["pair"]
        return x + (t - s)[:, None] * (cond["text"][:, :3] + params * (label + 10 * flag)[:, None])

    return jump


def labelled(folder, **changes):
    return small(folder, velocity=shifted, solver="flow_map", cond=TREE, **changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    labelled(folder)
    return folder


def test_conditions_may_be_a_tree_of_floats_integers_and_booleans(reference):
    for stream in (False, True):
        m = correction.read_marginals(reference, stream=stream)
        cond = jax.tree.map(lambda column: column[:], m.cond)
        assert jax.tree.structure(cond) == jax.tree.structure(TREE)
        np.testing.assert_array_equal(cond["text"], TREE["text"].astype(np.float32))
        np.testing.assert_array_equal(cond["pair"][0], TREE["pair"][0])
        np.testing.assert_array_equal(cond["pair"][1], TREE["pair"][1])
        x = m.x[:]
        move = TREE["text"][:, :3] + 0.1 * (TREE["pair"][0] + 10 * TREE["pair"][1])[:, None]
        np.testing.assert_allclose(x[:, 4] - x[:, 0], move, atol=1e-5)
        batch = correction.marginal_batches(m, batch_size=32, seed=0, steps=(4,))(0)
        rows = [np.flatnonzero((x[:, 4] == each).all(1))[0] for each in batch.x1]
        np.testing.assert_array_equal(batch.cond["pair"][0], TREE["pair"][0][rows])
    drawn = correction.draw_conditions(jax.random.key(0), TREE, count=5)
    rows = [np.flatnonzero((TREE["text"].astype(np.float32) == text).all(1))[0] for text in drawn["text"]]
    np.testing.assert_array_equal(drawn["pair"][0], TREE["pair"][0][rows])  # the parts of a row stay together


def test_a_labelled_build_resumes_and_processes_write_the_same_files(reference, tmp_path):
    """A kill in the second shard; a torn shard; three processes in any order."""

    def kill(done, total):
        if done == 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        labelled(tmp_path / "killed", progress=kill)
    assert len(shards.read_manifest(tmp_path / "killed").shards) == 1
    labelled(tmp_path / "killed")
    assert {k: v for k, v in contents(tmp_path / "killed").items() if not k.endswith("tmp")} == contents(reference)
    torn = tmp_path / "killed" / "shard-00001-of-00003.array_record"
    torn.write_bytes(torn.read_bytes()[:-1])
    labelled(tmp_path / "killed")
    for i in (2, 0, 1):
        labelled(tmp_path / "processes", process_index=i, process_count=3)
    records = lambda folder: {k: v for k, v in contents(folder).items() if k.endswith("array_record")}
    assert records(tmp_path / "killed") == records(tmp_path / "processes") == records(reference)
    m = correction.read_marginals(tmp_path / "processes")
    np.testing.assert_array_equal(m.cond["pair"][0], TREE["pair"][0])


def test_eight_devices_give_the_same_labelled_set(reference, tmp_path):
    labelled(tmp_path, mesh=Mesh(np.array(jax.devices()), ("data",)))
    a, b = correction.read_marginals(reference), correction.read_marginals(tmp_path)
    np.testing.assert_allclose(a.x, b.x, atol=2e-6)
    np.testing.assert_array_equal(a.cond["text"], b.cond["text"])


def test_conditions_are_part_of_the_identity_of_a_set(reference):
    before = contents(reference)
    other = TREE | {"pair": (TREE["pair"][0] + 1, TREE["pair"][1])}
    for cond, field in ((other, "cond_digest"), (TREE["text"], "cond"), (None, "cond")):
        with pytest.raises(ValueError, match=f"{field}: "):
            small(reference, velocity=shifted, solver="flow_map", cond=cond)
    assert contents(reference) == before


def test_a_set_without_conditions_is_stored_as_before(tmp_path):
    """The manifest has the fields of format 1 and no others; a shard has one record per example."""
    small(tmp_path)
    fields = json.loads((tmp_path / "manifest.json").read_text())
    assert set(fields) == {
        "version", "direction", "flow", "solver", "backward_map", "ts", "steps", "dtype", "shape", "count", "seed",
        "data", "shard_size", "shards", "sha256",
    }  # fmt: skip
    m = correction.read_marginals(tmp_path)
    assert m.cond is None and correction.marginal_batches(m, batch_size=4, seed=0)(0).cond is None
    assert shards.size(m.manifest, shards.ranges(m.manifest)) < shards.size(
        m.manifest._replace(cond='"float32[4096]"'), shards.ranges(m.manifest)
    )


def test_the_estimate_counts_the_bytes_of_conditions(tmp_path):
    view = lambda params: lambda x, s, t, cond=None, key=None: x + 0 * cond[:, :1]
    for width in (1, 3000):
        cond = np.zeros((90, width), np.float32)
        options = {"direction": "forward", "count": 90, "shape": (3,), "shard_size": 32, "solver": "flow_map"}
        estimate = correction.estimate_cost(view, 0.0, TS, cond=cond, **options)
        folder = tmp_path / str(width)
        m = correction.build_marginals(view, 0.0, TS, directory=folder, flow="a", cond=cond, **options)
        size = sum((folder / shard.file).stat().st_size for shard in m.shards)
        assert size <= estimate.bytes <= size + 3 * shards.BLOCK * len(m.shards)


def test_interpolated_marginals_keep_their_conditions(folders, tmp_path):
    build(tmp_path, direction="backward", data=DATA, cond=LABELS, steps=(0,))
    m = correction.interpolate_marginals(correction.read_marginals(tmp_path), data=DATA)
    batch = correction.marginal_batches(m, batch_size=64, seed=0, steps=(4,))(0)
    rows = [np.flatnonzero((DATA == x).all(1))[0] for x in batch.x1]
    np.testing.assert_array_equal(batch.cond, LABELS[rows])


def test_another_source_starts_the_forward_marginals(tmp_path):
    """The variance-exploding path starts at ``sigma_max z``; the manifest names the function, so no two are mixed."""
    m = small(tmp_path, start=wide, seed=4)
    x = correction.read_marginals(tmp_path).x[:, 0]
    np.testing.assert_allclose(x, 50 * normal(example_keys(jax.random.key(4), jnp.arange(90)), (3,)), rtol=1e-6)
    assert m.start == "test_correction_marginals_conditions.wide"
    with pytest.raises(ValueError, match="start: "):
        small(tmp_path, seed=4)
    partial = small(tmp_path / "partial", start=functools.partial(scaled, scale=2.0))
    assert partial.start.endswith("scaled(scale=2.0)")


def wide(keys, shape):
    return 50 * normal(keys, shape)


def scaled(keys, shape, scale):
    return scale * normal(keys, shape)


def test_the_columns_of_conditions_are_rebuilt_from_their_bytes():
    tree = (np.arange(4, dtype=np.uint8), None, {"b": np.ones((4, 2, 3), np.float16), "a": np.zeros(4, bool)})
    text = columns.describe(tree)
    assert text == '["uint8[]", null, {"a": "bool[]", "b": "float16[2,3]"}]' and columns.row_bytes(text) == 14
    row = list(columns.condition_rows(tree, 3, 4))[0]
    parts = [np.frombuffer(row[c.start : c.stop], c.dtype).reshape(c.shape) for c in columns.layout(text)]
    again = columns.rebuild(text, parts)
    assert again[1] is None and again[0] == 3 and again[2]["a"] == 0 and (again[2]["b"] == 1).all()
    assert list(columns.condition_rows(None, 0, 4)) == []


@pytest.mark.parametrize("tree", [False, True])
def test_the_drift_of_a_class_is_the_drift_between_its_own_banks(tree, sets, x64, key):
    """With labels, the drift of each example is the unlabelled drift of the rows of its label, at its own time."""
    p, q = (m._replace(x=jnp.asarray(m.x, jnp.float64)) for m in sets)
    cond, t = jnp.array([2, 0, 1, 0, 2]), jnp.array([1.0, 0.25, 0.5, 0.25, 1.0])
    x = jax.random.normal(key, (5, 2), jnp.float64)
    wrap = (lambda label: {"class": label, "parity": label % 2 == 0}) if tree else lambda label: label
    drift = correction.kernel_drift(p.x, q.x, wrap(p.cond), wrap(q.cond), ts=TS, bandwidth=0.7)
    moved = jax.jit(drift)(x, t, wrap(cond))
    for label in range(3):
        of = lambda m, label=label: m.x[m.cond == label]
        alone = jax.jit(correction.kernel_drift(of(p), of(q), ts=TS, bandwidth=0.7))(x, t)
        mask = np.asarray(cond == label)
        np.testing.assert_allclose(moved[mask], alone[mask], rtol=1e-9, atol=1e-12)
    mixed = jax.jit(correction.kernel_drift(p.x, q.x, ts=TS, bandwidth=0.7))(x, t)
    assert np.abs(mixed - moved).max() > 0.5
    assert drift.nfe == 0


def test_the_mean_of_each_class_moves_by_its_fraction_of_its_gap(key):
    """``alpha h^2 / (C + h^2)`` of the gap of the class, over independent banks; the classes have opposite gaps."""
    gaps, var, h, alpha, m = np.array([0.8, -0.4]), 0.5, 0.7, 0.6, 2000
    labels = np.arange(m) % 2

    @jax.jit
    def fixed(p, q, x, cond, key):
        drift = correction.kernel_drift(p, q, labels, labels, ts=[1.0], bandwidth=h)
        return correction.marginal_matching(drift, alpha=alpha)(key, x, 1.0, cond)[0]

    moves, cond = [], jnp.arange(500) % 2
    for k in jax.random.split(key, 24):
        kp, kq, kx = jax.random.split(k, 3)
        p = var**0.5 * jax.random.normal(kp, (m, 1, 1))
        q = var**0.5 * jax.random.normal(kq, (m, 1, 1)) + gaps[labels][:, None, None]
        x = var**0.5 * jax.random.normal(kx, (500, 1))
        move = np.asarray(fixed(p, q, x, cond, k) - x)[:, 0]
        moves.append([move[cond == c].mean() for c in (0, 1)])
    expected = alpha * h**2 / (var + h**2) * gaps
    error = np.std(moves, axis=0, ddof=1) / len(moves) ** 0.5
    assert (np.abs(np.mean(moves, axis=0) - expected) < 4.5 * error).all() and (error < 0.02 * np.abs(gaps).max()).all()


def test_a_labelled_drift_corrects_a_conditional_sampler(sets):
    """A conditional flow whose classes are shifted: the corrected samples of each class are nearer to their mean."""
    p, q = sets
    error = jnp.array([[1.0, 0.0], [0.0, -1.0], [-1.0, 1.0]])
    p = p._replace(x=p.x + np.asarray(error)[p.cond][:, None])
    cond = jnp.arange(300) % 3
    start = MEANS[cond] + error[cond] + STD * jax.random.normal(jax.random.key(1), (300, 2))
    fix = correction.marginal_matching(
        correction.kernel_drift(p.x, q.x, jnp.asarray(p.cond), jnp.asarray(q.cond), ts=TS, bandwidth=0.5), alpha=1.0
    )
    still = lambda x, s, t, cond=None, key=None: x
    y = sampling.sample(still, start, TS, key=jax.random.key(0), cond=cond, corrector=fix, at=(4,))
    gap = lambda x: np.array([np.linalg.norm((x[cond == c] - MEANS[c]).mean(0)) for c in range(3)])
    assert (gap(np.asarray(y)) < 0.75 * gap(np.asarray(start))).all()


def test_labels_and_banks_that_do_not_fit_are_refused(sets):
    p, q = sets
    make = functools.partial(correction.kernel_drift, p.x, q.x, ts=TS, bandwidth=0.5)
    x, cond = jnp.zeros((4, 2)), jnp.zeros(4, int)
    for labels, message in (
        ((p.cond, None), "p_labels=ndarray"),
        ((p.cond[:-1], q.cond), r"p_labels=int32\(599,\).* 600 examples"),
        ((p.cond, q.cond.astype(np.float32)), r"q_labels=float32"),
        (({"a": p.cond}, q.cond), "p_labels=dict"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*labels)
    with pytest.raises(ValueError, match="cond=given"):
        make()(x, 1.0, cond)
    with pytest.raises(ValueError, match="cond=NoneType"):
        make(p.cond, q.cond)(x, 1.0)
    absent = jax.jit(make(p.cond, q.cond))(x, 1.0, cond.at[1].set(7))
    np.testing.assert_array_equal(np.isnan(absent[:, 0]), [False, True, False, False])


def test_a_view_that_ignores_its_conditions_is_another_flow(tmp_path):
    """The data must not leak into the seed: forward examples without and with conditions start from one noise."""
    small(tmp_path / "a", velocity=lambda p: sampling.euler(lambda x, t, cond=None: 0 * x), solver="flow_map")
    labelled(tmp_path / "b")
    a, b = (correction.read_marginals(tmp_path / name) for name in "ab")
    np.testing.assert_array_equal(a.x[:, 0], b.x[:, 0])
    assert data(90, 3).shape == a.x[:, 0].shape
