"""What reflow trains on: segments that start in noised data, sets of trajectories mixed and cut, round after round."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax import correction, oracles, paths, sampling
from fmjax.data import batches as data_batches
from fmjax.keys import as_keys, normal
from fmjax.methods.straighten import straighten
from fmjax.metrics import two_sample
from fmjax.nets import adapters
from fmjax.nets.mlp import MLP
from fmjax.sampling import diffusion, grids
from fmjax.straightening import segments
from fmjax.training import sharding
from fmjax.types import expand

BOUNDS = (0.0, 0.45, 1.0)
MEAN, STD = np.array([0.75, -0.5], np.float32), np.array([0.5, 1.5], np.float32)
LAW = oracles.gaussian(jnp.asarray(MEAN), jnp.asarray(STD))
DATA = np.asarray(LAW.sample(jax.random.key(0), 8192))
scaled = lambda solver: lambda params: solver(lambda x, t, cond=None: params * LAW.velocity(x, t))


def data(size, x=DATA, **options):
    return data_batches(x, np.arange(len(x)), batch_size=size, seed=0, **options)


def ends(t):
    return np.where(t == 0, np.float32(0.45), np.float32(1))


def error(batch):
    return np.abs(batch.x1 - LAW.flow_map(jnp.asarray(batch.x0), batch.t, ends(batch.t))).max()


def test_a_segment_from_data_ends_in_the_teachers_flow_map_of_its_start():
    """To the order of the solver, one with a memory included."""
    at = lambda solver, n: error(segments.from_data(data(512), scaled(solver), 1.0, BOUNDS, steps=n, seed=0)(3))
    assert at(sampling.rk4, 16) < 2e-6
    assert abs(np.log2(at(sampling.euler, 40) / at(sampling.euler, 80)) - 1) < 0.1
    assert at(sampling.dpmpp_2m, 16) < at(diffusion.ddim, 16) / 3


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()])
def test_a_segment_from_data_starts_in_the_law_of_its_bound(path):
    """Mean, variance, and the covariance with its own example of the data; segments are equally likely."""
    n, stay = 8192, lambda params: lambda x, s, t, cond=None, key=None: x
    real = data(n)
    batch = segments.from_data(real, stay, None, BOUNDS, steps=1, seed=1, path=path)(0)
    x = real(0).x1
    np.testing.assert_array_equal(batch.cond, real(0).cond)
    np.testing.assert_array_equal(batch.x1, batch.x0)
    assert abs((batch.t == 0).mean() - 0.5) < 4 * 0.5 / np.sqrt(n) and set(batch.t) == set(np.float32(BOUNDS[:2]))
    for bound in BOUNDS[:2]:
        mine = batch.t == np.float32(bound)
        alpha, beta = (float(a) for a in path.coefficients(jnp.float32(bound)))
        start, own = batch.x0[mine], (x[mine] - MEAN) / STD
        r = (start - beta * MEAN) / np.hypot(alpha, beta * STD)
        rho = beta * STD / np.hypot(alpha, beta * STD)
        for moment in (r, r**2 - 1, r * own - rho, r[:, ::-1] * own, r[1:] * own[:-1]):
            z = moment.mean(0) / (moment.std(0) / np.sqrt(len(moment)))
            assert np.abs(z).max() < 4.5, (bound, z)


def test_every_example_and_every_step_of_a_solve_has_a_key_of_its_own():
    """The end is the start and ``n`` independent normals; whatever the devices, the processes and the batch before."""
    walk = lambda params: lambda x, s, t, cond=None, key=None: x + normal(key, x.shape[1:])
    make = lambda real, **settings: segments.from_data(real, walk, None, (0.0, 1.0), steps=4, seed=5, **settings)
    whole = make(data(4096))
    batch = whole(2)
    moved = batch.x1 - batch.x0
    for moment in (moved, moved**2 - 4, moved * batch.x0, moved[1:] * moved[:-1], batch.x0[1:] * batch.x0[:-1]):
        z = moment.mean(0) / (moment.std(0) / np.sqrt(len(moment)))
        assert np.abs(z).max() < 4.5, z
    assert not (whole(1).x0 == batch.x0).any()
    over = make(data(4096), mesh=sharding.make_mesh(jax.devices()[:4]))(2)
    part = make(data(4096, process_index=1, process_count=2), process_index=1)(2)
    for a, b, c in zip(batch[:2], over[:2], part[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(a[2048:], c, rtol=1e-6, atol=1e-6)


def test_the_teacher_is_traced_once_as_an_argument_and_gets_conditions():
    seen = []

    def step(params):
        seen.append(params)
        return lambda x, s, t, cond=None, key=None: x + expand(params * cond * (t - s), x)

    batch = segments.from_data(data(64), step, np.float32(3), BOUNDS, steps=2, seed=0)
    for n in range(3):
        actual = batch(n)
        moved = 3 * actual.cond * (ends(actual.t) - actual.t)
        np.testing.assert_allclose(actual.x1 - actual.x0, np.stack([moved, moved], 1), rtol=1e-3)
    assert len(seen) == 1 and isinstance(seen[0], jax.core.Tracer)


def train(method, params, batch, *, rate, steps, size):
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def update(params, opt, batch, n):
        grads, _ = jax.grad(method.loss, has_aux=True)(params, params, batch, as_keys(jax.random.key(n), size))
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    opt = tx.init(params)
    for n in range(steps):
        params, opt = update(params, opt, batch(n), n)
    return params


def test_straightening_segments_from_data_learns_the_exact_chords():
    """Of a Gaussian ``x_t = a x_s + b``: both of each segment, from a net that knows no more than that."""
    edges = jnp.asarray(BOUNDS)
    end_of = lambda x: np.stack([LAW.flow_map(jnp.full((1, 2), x), s, t)[0] for s, t in itertools.pairwise(BOUNDS)])
    exact = (end_of(1.0) - end_of(0.0), end_of(0.0))

    def net(params, x, s, t, cond=None, key=None):
        k = jnp.clip(jnp.searchsorted(edges, s, side="right") - 1, 0, 1)
        a, b = (p[k] for p in params)
        width = (edges[k + 1] - edges[k])[:, None]
        share = (s - edges[k])[:, None] / width
        start = (x - share * b) / (1 - share + share * a)
        return ((a - 1) * start + b) / width

    method = straighten(net, bounds=BOUNDS)
    batch = segments.from_data(data(256), scaled(sampling.rk4), 1.0, BOUNDS, steps=8, seed=0)
    params = train(method, (jnp.ones((2, 2)), jnp.zeros((2, 2))), batch, rate=0.05, steps=200, size=256)
    for actual, expected in zip(params, exact, strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-3)


OTHER = oracles.gaussian(jnp.array([-3.0, 2.0]), jnp.array([0.7, 0.4]))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Forward trajectories of one Gaussian's flow, at the bounds, whole backward ones of another's data."""
    ts, at = segments.inserted(grids.uniform_grid(20), BOUNDS)
    built_sets = []
    for direction, law, inputs in (
        ("forward", LAW, {"count": 256, "shape": (2,), "steps": at}),
        ("backward", OTHER, {"data": np.asarray(OTHER.sample(jax.random.key(4), 128))}),
    ):
        folder = tmp_path_factory.mktemp(direction)
        velocity = lambda params, law=law: law.velocity
        correction.build_marginals(velocity, {}, ts, directory=folder, direction=direction, flow="gaussian", **inputs)
        built_sets.append((correction.read_marginals(folder), correction.read_marginals(folder, stream=True)))
    return built_sets


def is_of(law, batch):
    """Which pairs lie on the flow of a distribution."""
    end = law.flow_map(jnp.asarray(batch.x0), batch.t, ends(batch.t))
    return np.abs(end - batch.x1).max(1) < 1e-3


def test_backward_marginals_are_trajectories_that_end_in_data(sets):
    backward = sets[1][0]
    batch = segments.segment_batches(backward, BOUNDS, batch_size=2048, seed=0)(0)
    assert is_of(OTHER, batch).all()
    late, real = batch.x1[batch.t > 0], np.asarray(OTHER.sample(jax.random.key(4), 128))
    assert {x.tobytes() for x in late} == {x.tobytes() for x in real}


@pytest.mark.parametrize("fractions", [None, (1.0, 3.0), (0.0, 2.0)])
def test_sets_are_mixed_by_their_shares_and_no_pair_is_of_two(sets, fractions):
    mixed = segments.segment_batches([m for m, _ in sets], BOUNDS, batch_size=32_768, seed=0, fractions=fractions)
    batch, chance = mixed(7), 0.5 if fractions is None else fractions[0] / sum(fractions)
    first, second = is_of(LAW, batch), is_of(OTHER, batch)
    assert (first ^ second).all()
    assert abs(first.mean() - chance) <= 4.5 * np.sqrt(chance * (1 - chance) / 32_768)
    for mine, (m, _) in zip((first, second), sets, strict=True):
        early = mine & (batch.t == 0)
        result, counts = np.unique(batch.x0[early], axis=0, return_counts=True)
        if early.any():  # all of a set's examples, equally often
            assert len(result) == len(m.x) and abs(mine[batch.t == 0].mean() - mine.mean()) < 0.01
            chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
            assert abs(chi2 - len(result)) < 4.5 * np.sqrt(2 * len(result))


def test_sets_on_disk_give_the_same_batches(sets):
    options = {"batch_size": 64, "seed": 3, "fractions": (1.0, 2.0), "longest": 0.2}
    for a, b in zip(
        *(segments.segment_batches([s[i] for s in sets], BOUNDS, **options)(1)[:2] for i in (0, 1)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_longest_trajectories_are_left_out_of_each_set(sets):
    batch = segments.segment_batches([m for m, _ in sets], BOUNDS, batch_size=8192, seed=0, longest=0.25)(0)
    for m, _ in sets:
        length = np.linalg.norm(m.x[:, -1] - m.x[:, 0], axis=1)
        short = m.x[length <= np.quantile(length, 0.75), 0]
        inputs = {x.tobytes() for x in batch.x0[batch.t == 0]} & {x.tobytes() for x in m.x[:, 0]}
        assert inputs == {x.tobytes() for x in short} and len(short) == 0.75 * len(m.x)


def test_what_cannot_be_mixed_or_solved_is_refused(sets):
    forward, backward = (m for m, _ in sets)
    make = lambda m, **options: segments.segment_batches(m, BOUNDS, batch_size=8, seed=0, **options)
    for fractions in ((1.0,), (1.0, -1.0), (0.0, 0.0), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="fractions=.*2 sets"):
            make([forward, backward], fractions=fractions)
    with pytest.raises(ValueError, match="m shapes="):
        make([forward, backward._replace(x=np.zeros((4, 3, 5)))])
    with pytest.raises(ValueError, match="bounds=0.45"):
        make([forward, backward._replace(ts=np.float32([0, 0.5, 1]))])
    for longest in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"longest={longest}"):
            make(forward, longest=longest)
    solved = lambda **settings: segments.from_data(
        data(6), scaled(sampling.rk4), 1.0, BOUNDS, **{"steps": 1, "seed": 0} | settings
    )
    with pytest.raises(ValueError, match="steps=0"):
        solved(steps=0)
    with pytest.raises(ValueError, match="straightening"):
        solved(path=paths.two_sided())
    with pytest.raises(ValueError, match="batch=6.* 4 devices"):
        solved(mesh=sharding.make_mesh(jax.devices()[:4]))


@pytest.mark.slow
def test_rounds_of_reflow_shorten_the_way_and_straighten_the_flow(tmp_path):
    """``E |x1 - x0|^2`` never rises, the flow straightens, the distribution stays, by rounds (arXiv 2209.03003)."""
    law = oracles.mixture(jnp.array([[2.0, 0.5], [-1.5, 1.0], [0.3, -2.0]]), jnp.array([0.3, 0.4, 0.6]))
    model, ts, (count, size) = adapters.from_linen(MLP(64, 2)), grids.uniform_grid(16), (4096, 256)
    method, first = straighten(model.net), model.init(jax.random.key(0), jnp.zeros((1, 2)))
    view, params, batch = (lambda params: law.velocity), {}, None
    costs, bends = [float(jnp.mean(jnp.sum(law.sample(jax.random.key(9), 4096) ** 2, 1))) + 2], []
    for n in range(3):
        if n:
            params, view = train(method, first, batch, rate=3e-3, steps=500, size=size), method.velocity
        settings = {"directory": tmp_path / str(n), "direction": "forward", "flow": str(n)}
        correction.build_marginals(view, params, ts, **settings, count=count, shape=(2,), steps=(0, 16))
        pairs = correction.read_marginals(tmp_path / str(n))
        batch = segments.segment_batches(pairs, (0.0, 1.0), batch_size=size, seed=n)
        start, end = jnp.asarray(pairs.x[:, 0]), jnp.asarray(pairs.x[:, 1])
        costs.append(float(jnp.mean(jnp.sum((end - start) ** 2, 1))))
        bends.append(float(segments.segment_straightness(view(params), start, 0.0, 1.0)))
        assert float(two_sample.energy_distance(end[:2000], law.sample(jax.random.key(7), 2000))) < 0.02
    assert costs[1] < costs[0] / 2 and costs[2] < 1.005 * costs[1] and costs[3] < 1.005 * costs[2], costs
    assert bends[1] < bends[0] / 100 and bends[2] < bends[1], bends


def test_batches_carry_the_conditions_of_trajectories_and_of_data(sets):
    """Every example has the label of its trajectory or of its data; sets with and without labels are not mixed."""
    forward, backward = (m for m, _ in sets)
    labels = [np.arange(len(m.x), dtype=np.int32) + 1000 * i for i, m in enumerate((forward, backward))]
    labelled = [m._replace(cond={"row": cond}) for m, cond in zip((forward, backward), labels, strict=True)]
    real = np.arange(50, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    settings = {"batch_size": 512, "seed": 0, "keep": (1,), "real": 1e4 * real}
    batch = segments.segment_batches(labelled, BOUNDS, **settings, real_cond={"row": np.arange(50) - 50})(3)
    rows = batch.cond["row"]
    kept = rows < 0
    assert kept.sum() == 256 and (batch.t[kept] >= np.float32(0.45)).all()
    late = kept & (batch.t > 0.5)  # the data are far larger than the noise
    np.testing.assert_array_equal(np.round(batch.x1[late, 0] / batch.t[late] / 1e4), rows[late] + 50)
    for i, m in enumerate((forward, backward)):
        mine = ~kept & (rows // 1000 == i)
        states = m.x[rows[mine] - 1000 * i]
        at = [int(np.flatnonzero(m.ts == np.float32(b))[0]) for b in BOUNDS[:2]]
        np.testing.assert_array_equal(batch.x0[mine], states[:, at[0]])
        np.testing.assert_array_equal(batch.x1[mine], states[:, at[1]])
        assert mine.any()
    with pytest.raises(ValueError, match="m cond="):
        segments.segment_batches([labelled[0], backward], BOUNDS, batch_size=8, seed=0)
    with pytest.raises(ValueError, match="real_cond=NoneType"):
        segments.segment_batches(labelled, BOUNDS, **settings)


def test_kept_segments_follow_the_path_of_the_flow(sets):
    """Noise and data in the fractions of the path, at the time of the example."""
    path, real = paths.trigonometric(), np.full((4, 2), 3, np.float32)
    make = lambda **settings: segments.segment_batches(
        sets[0][0], BOUNDS, batch_size=8192, seed=0, keep=(1,), real=real, **settings
    )
    batch = make(path=path)(0)
    kept = batch.t >= np.float32(0.45)
    alpha, beta = (np.asarray(c)[:, None] for c in path.coefficients(jnp.asarray(batch.t[kept])))
    z = ((batch.x1[kept] - 3 * beta) / np.maximum(alpha, 1e-3))[alpha[:, 0] > 0.02]
    assert abs(z.mean()) < 4 / np.sqrt(z.size) and abs(z.std() - 1) < 4 / np.sqrt(2 * z.size)
