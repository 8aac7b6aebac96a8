"""The interleaved scan against plain loops, its keys, what it evaluates and what it costs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fmjax import oracles, paths, sampling
from fmjax.correction import correctors
from fmjax.keys import as_keys, fold_in, normal
from fmjax.sampling import grids
from fmjax.training import sharding
from fmjax.types import expand

TS = [0.0, 0.5, 0.75, 1.0]


def double(x, s, t, cond=None, key=None):
    """A step that does not commute with the correction below and shows both its times."""
    return 2 * x + expand(s + 10 * t, x)


def add_time(key, x, t, cond=None):
    return x + expand(100 + t, x), {}


def loop(x, ts, at):
    states = []
    for n, t in enumerate(ts):
        x = x + 100 + t if n in at else x
        states.append(x)
        x = 2 * x + t + 10 * ts[n + 1] if n + 1 < len(ts) else x
    return np.stack(states)


@pytest.fixture
def flow():
    oracle = oracles.mixture(jnp.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -2.0]]), 0.5)
    return oracle.velocity, lambda x, t, cond=None: 0.04 * oracle.score(x, t)


@pytest.mark.parametrize("at", [(), (0,), (3,), (1, 2), (0, 3), (0, 1, 2), (3, 1, 0, 2), range(4), [1, 1]])
@pytest.mark.parametrize("ts", [TS, TS[::-1]])
def test_it_corrects_before_a_step_and_the_end_last(at, ts, key):
    """Equals the plain loop, whose trajectory holds every state after its correction and ends with the sample."""
    x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    options = {"key": key, "corrector": add_time, "at": at}
    xs = sampling.sample(double, x, ts, trajectory=True, **options)
    np.testing.assert_array_equal(xs, loop(np.asarray(x), ts, tuple(at)))
    np.testing.assert_array_equal(sampling.sample(double, x, ts, **options), xs[-1])


def test_bad_requests_are_refused_before_any_work(key):
    def never(*args):
        raise AssertionError("evaluated")

    x = jnp.zeros((2, 1))
    run = lambda ts=TS, **options: sampling.sample(never, x, ts, **options)
    for at, first in [((0, 4), 4), ((-1,), -1), ((7, 5), 5)]:
        with pytest.raises(ValueError, match=f"at={first}: .* 0 .. 3"):
            run(corrector=never, key=key, at=at)
    with pytest.raises(ValueError, match=r"key=None: .*key=jax.random.key\(seed\)"):
        run(corrector=never, at=(0,))
    with pytest.raises(ValueError, match=r"at=None: .*at=\(0, 3\), or at=range\(4\)"):
        run(corrector=never, key=key)
    with pytest.raises(ValueError, match=r"at=\(0, 3\): "):
        run(key=key, at=(3, 0))
    with pytest.raises(ValueError, match=r"ts\[0\]=0: "):
        run(ts=[0.0, 0.0])
    with pytest.raises(TypeError, match="typed PRNG key"):
        run(key=0)
    with pytest.raises(ValueError, match="parallel=True: "):
        sampling.sample(double, x, TS, key=key, corrector=add_time, at=(0,), parallel=True)


def test_a_correction_of_no_size_leaves_the_plain_sample_to_the_bit(flow, key):
    velocity, direction = flow
    step, ts = sampling.rk4(velocity), grids.uniform_grid(6)
    x = jax.random.normal(key, (8, 2))
    plain = sampling.sample(step, x, ts)
    nothing = correctors.marginal_matching(direction, alpha=0.0, beta=0.0)
    something = correctors.marginal_matching(direction, alpha=0.5, beta=0.2)
    for parallel in (False, True):
        run = lambda fix, at: sampling.sample(step, x, ts, key=key, corrector=fix, at=at, parallel=parallel)  # noqa: B023
        for at in ((0, 3, 6), range(7)):
            np.testing.assert_array_equal(run(nothing, at), plain)
        np.testing.assert_array_equal(run(something, ()), plain)
        assert (run(something, (3,)) != plain).all()


@pytest.mark.parametrize("at", [(), (0,), (2, 4), range(5)])
@pytest.mark.parametrize("parallel", [False, True])
def test_what_is_evaluated_is_what_cost_says(at, parallel, key):
    """Counted on the host while the compiled program runs: a skipped correction is not computed."""
    counts = {"step": 0, "correction": 0}

    def counted(name):
        def f(x, t, cond=None):
            jax.debug.callback(lambda: counts.update({name: counts[name] + 1}))
            return -x

        return f

    step = sampling.midpoint(counted("step"))
    fix = correctors.marginal_matching(counted("correction"), alpha=0.1, beta=0.1)
    options = {"key": key, "corrector": fix, "at": at, "parallel": parallel}
    jax.block_until_ready(
        jax.jit(lambda x: sampling.sample(step, x, grids.uniform_grid(4), **options))(jnp.ones((2, 1)))
    )
    jax.effects_barrier()
    cost = sampling.cost(step, 4, at, fix, parallel=parallel)
    assert (counts["step"] + counts["correction"], counts["correction"]) == (cost.nfe, cost.c_nfe)


def always_run(text: str) -> str:
    """The lines of a compiled program that run whatever its data: all but the branches of conditionals."""
    bodies = {}
    for line in text.splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = "ENTRY" if start[1] else start[2]
            bodies[name] = []
        elif bodies:
            bodies[name].append(line)
    reached, todo = [], ["ENTRY"]
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.append(name)
        for line in bodies[name]:
            line = re.sub(r"(branch|true|false)_computations?=(\{.*?\}|\S+)", "", line)
            todo += [word for word in re.findall(r"[\w.\-]+", line.split("metadata=")[0]) if word in bodies]
    return "\n".join(line for name in reached for line in bodies[name])


@pytest.mark.parametrize("parallel", [False, True])
def test_a_skipped_correction_is_no_part_of_the_compiled_step(parallel, flow, key):
    """Its operations are in a branch; all are of the loop where every step is corrected, none where no step is.

    The program does not grow with the number of steps.
    """
    velocity, direction = flow

    def marked(x, t, cond=None):
        with jax.named_scope("correction"):
            return direction(x, t) @ jnp.eye(2)

    fix = correctors.marginal_matching(marked, alpha=0.5, beta=0.1)

    def program(n, at):
        run = lambda x: sampling.sample(
            sampling.rk4(velocity), x, grids.uniform_grid(n), key=key, corrector=fix, at=at, parallel=parallel
        )
        return jax.jit(run).lower(jnp.ones((4, 2))).compile().as_text()

    none, some, every = program(6, ()), program(6, (0, 3)), program(6, range(6))
    assert "correction/" not in none and "conditional(" not in none
    assert "correction/" in some and "correction/" not in always_run(some)
    assert "correction/" in always_run(every) and "conditional(" not in every
    assert program(60, (0, 30)).count(" = ") == some.count(" = ")


def test_correctors_of_one_grid_serve_another(flow, x64, key):
    """Trained at N = 10, stepping with N = 50: the shared times, each with its own alpha and beta, times one factor."""
    velocity, direction = flow
    coarse, fine = grids.uniform_grid(10), grids.uniform_grid(50)
    at = sampling.same_times((0, 5, 7, 10), coarse, fine)
    assert at == (0, 25, 35, 50)
    assert sampling.same_times(range(11), coarse, fine) == tuple(range(0, 51, 5))
    assert sampling.same_times((3,), coarse, coarse[::-1]) == (7,)
    alphas, betas = np.linspace(0.1, 1.1, 11), np.where(np.arange(11) % 5 == 0, 0.0, 0.3)
    schedules = {"alpha": grids.per_step(coarse, 0.4 * alphas), "beta": grids.per_step(coarse, betas)}
    fix = correctors.marginal_matching(direction, **schedules)
    x = start = jax.random.normal(key, (4, 2), jnp.float64)
    step = sampling.euler(velocity)
    got = sampling.sample(step, x, fine, key=key, corrector=fix, at=at)
    keys = as_keys(key, 4)
    for n, t in enumerate(fine):
        if n in at:
            x = x + betas[n // 5] * normal(fold_in(keys, 2 * n), (2,), jnp.float64)
            x = x + 0.4 * alphas[n // 5] * direction(x, t)
        x = step(x, t, fine[n + 1]) if n < 50 else x
    np.testing.assert_allclose(got, x, rtol=1e-6)  # the schedules are float32 on a float32 grid
    with pytest.raises(ValueError, match="t=0.02: "):
        jax.jit(lambda x: sampling.sample(step, x, fine, key=key, corrector=fix, at=(0, 1)))(start)
    with pytest.raises(ValueError, match="t=0.1: "):
        sampling.same_times((0, 1, 10), coarse, grids.uniform_grid(4))
    with pytest.raises(ValueError, match="at=11: "):
        sampling.same_times((11,), coarse, fine)


@pytest.mark.parametrize("parallel", [False, True])
def test_noise_changes_a_sample_through_its_key_alone(parallel, flow, key):
    """None: the same to the bit as without beta, by number and by step, whatever the key. Some: by the key."""
    velocity, direction = flow
    ts, x = grids.uniform_grid(4), jax.random.normal(key, (8, 2))

    def run(seed, **noise):
        fix = correctors.marginal_matching(direction, alpha=0.5, **noise)
        options = {"corrector": fix, "at": (0, 2, 4), "parallel": parallel}
        return jax.jit(lambda x: sampling.sample(sampling.rk4(velocity), x, ts, key=jax.random.key(seed), **options))(x)

    plain = run(0)
    for seed in (0, 1):
        np.testing.assert_array_equal(run(seed, beta=0.0), plain)
        np.testing.assert_array_equal(run(seed, beta=grids.per_step(ts, np.zeros(5))), plain)
    np.testing.assert_array_equal(run(0, beta=0.1), run(0, beta=0.1))
    assert (run(0, beta=0.1) != run(1, beta=0.1)).all() and (run(0, beta=0.1) != plain).all()


@pytest.mark.parametrize(
    ("n", "at", "w", "nfe", "c_nfe"),
    [
        (10, (10,), 1, 41, 1), (10, (0, 5, 10), 1, 43, 3), (10, range(11), 1, 51, 11),
        (10, (10,), 2, 42, 2), (10, (0, 5, 10), 2, 46, 6), (10, (0, 2, 5, 8, 10), 2, 50, 10),
        (10, range(11), 2, 62, 22),
        (50, (50,), 1, 201, 1), (50, (0, 25, 50), 1, 203, 3), (50, range(0, 51, 5), 1, 211, 11),
        (50, (50,), 2, 202, 2), (50, (0, 25, 50), 2, 206, 6), (50, (0, 10, 25, 40, 50), 2, 210, 10),
        (50, range(0, 51, 5), 2, 222, 22), (5, range(6), 1, 26, 6), (5, (0, 5), 1, 22, 2),
    ],
)  # fmt: skip
def test_costs_are_the_published_ones(n, at, w, nfe, c_nfe):
    """Marginal matching on CIFAR-10 and ImageNet-64 (OpenReview kRjLBXWn1T): score w = 1, classifier w = 2, RK4."""
    k = len(set(at))
    step = sampling.rk4(lambda x, t, cond=None: x)
    assert sampling.cost(step, n, at, w) == (nfe, k, c_nfe, nfe)
    assert sampling.cost(step, n, at, w, parallel=True) == (nfe, k, c_nfe, 4 * n + w)  # all of them correct the end
    assert sampling.cost(step, n, set(at) - {n}, w, parallel=True).depth == 4 * n


@pytest.mark.parametrize(
    ("n", "nfe"),
    [(10, 40), (11, 44), (12, 48), (13, 52), (14, 56), (15, 60), (20, 80), (40, 160), (50, 200), (100, 400), (8, 32)],
)
def test_costs_without_correction_are_the_published_ones(n, nfe):
    assert sampling.cost(sampling.rk4(lambda x, t, cond=None: x), n) == (nfe, 0, 0, nfe)
    with pytest.raises(ValueError, match=f"at={n + 1}: "):
        sampling.cost(4, n, (n + 1,))


def test_a_falling_grid_inverts(x64, key):
    """Exactly for an exact flow map and for the inverse step; corrections aside."""
    oracle = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.3, 2.0]))
    x, ts = jax.random.normal(key, (5, 2), jnp.float64), [0.0, 0.3, 0.35, 1.0]
    np.testing.assert_allclose(
        sampling.sample(oracle.flow_map, x, ts), oracle.flow_map(x, 0.0, 1.0), rtol=1e-6, atol=1e-6
    )
    there = sampling.sample(oracle.flow_map, x, ts, trajectory=True)
    back = sampling.sample(oracle.flow_map, there[-1], ts[::-1], trajectory=True)
    np.testing.assert_allclose(back[::-1], there, atol=1e-12)
    step, ts = sampling.rk4(oracle.velocity), grids.uniform_grid(20)
    there = sampling.sample(step, x, ts)
    assert np.abs(sampling.sample(step, there, ts[::-1]) - x).max() > 1e-9
    back = sampling.sample(sampling.inverse(step, iterations=60), there, ts[::-1])
    np.testing.assert_allclose(back, x, atol=1e-12)


def test_the_parallel_sampler_is_the_fused_update_for_euler(flow, x64, key):
    """``x' = x~ + h v(x~, t) + alpha h(x~, t)`` with ``x~ = x + beta z``, the end corrected in sequence."""
    velocity, direction = flow
    keys, ts = as_keys(key, 4), [0.0, 0.25, 0.5, 0.75]
    x = start = jax.random.normal(key, (4, 2), jnp.float64)
    want = []
    for n, t in enumerate(ts):
        noised = x + 0.2 * normal(fold_in(keys, 2 * n), (2,), jnp.float64) if n != 1 else x
        push = 0.5 * direction(noised, t) if n != 1 else 0
        want.append(noised + push)
        x = noised + push + 0.25 * velocity(noised, t)
    fix = correctors.marginal_matching(direction, alpha=0.5, beta=0.2)
    options = {"key": key, "corrector": fix, "at": (0, 2, 3), "parallel": True}
    got = sampling.sample(sampling.euler(velocity), start, ts, trajectory=True, **options)
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-13)
    np.testing.assert_array_equal(sampling.sample(sampling.euler(velocity), start, ts, **options), got[-1])


def test_parallel_and_serial_agree_up_to_the_step(flow, x64, key):
    """Halving the step halves their difference; corrected at the end alone they are the same."""
    velocity, direction = flow
    x = jax.random.normal(key, (32, 2), jnp.float64)
    fix = correctors.marginal_matching(direction, alpha=0.5)
    step = sampling.rk4(velocity)

    def gap(n, at):
        run = lambda parallel: sampling.sample(
            step, x, grids.uniform_grid(n), key=key, corrector=fix, at=at, parallel=parallel
        )
        return float(jnp.abs(run(True) - run(False)).mean())

    gaps = [gap(n, (0, n // 2, n)) for n in (32, 64, 128)]
    ratios = np.array(gaps[1:]) / np.array(gaps[:-1])
    assert (np.abs(ratios - 0.5) < 0.02).all()  # the next term of the expansion, of relative size 1/N
    assert gap(8, (8,)) == 0


def tape(x, key):
    """Shifts a draw of ``key`` into the state, so that the final state holds the draws in their order."""
    return jnp.concatenate([x[:, 1:], normal(key, (1,))], 1)


def test_every_step_and_correction_of_every_example_has_a_key_of_its_own(key):
    step = lambda x, s, t, cond=None, key=None: tape(x, key)
    fix = lambda key, x, t, cond=None: (tape(x, key), {})
    n, b = 3, 6
    draws = sampling.sample(step, jnp.zeros((b, 2 * n + 1)), grids.uniform_grid(n), key=key, corrector=fix, at=range(4))
    assert (draws != 0).all() and len(np.unique(draws)) == b * (2 * n + 1)
    sparse = sampling.sample(step, jnp.zeros((b, n + 1)), grids.uniform_grid(n), key=key, corrector=fix, at=(2,))
    np.testing.assert_array_equal(sparse, draws[:, [1, 3, 4, 5]])  # a correction left out shifts no other draw
    other = sampling.sample(step, jnp.zeros((b, n)), grids.uniform_grid(n), key=jax.random.key(1))
    assert not np.isin(other, draws).any()


def test_sample_17_is_the_same_whatever_the_batch_and_the_devices(flow, key):
    velocity, direction = flow
    fix = correctors.marginal_matching(direction, alpha=0.5, beta=0.3)
    step, ts = sampling.rk4(velocity), grids.uniform_grid(4)
    x = normal(as_keys(jax.random.key(9), 32), (2,))
    run = lambda x, key: sampling.sample(step, x, ts, key=key, corrector=fix, at=(0, 2, 4))
    whole = jax.jit(run)(x, key)
    close = lambda got: np.testing.assert_allclose(got, whole[17], rtol=2e-6, atol=2e-6)  # of another program
    close(jax.jit(run)(x[:18], key)[17])
    close(jax.jit(run)(x[17:18], as_keys(key, 32)[17:18])[0])
    mesh = sharding.make_mesh()
    spread = jax.device_put(x, NamedSharding(mesh, P("data")))
    assert len(spread.sharding.device_set) == 8
    close(jax.jit(run)(spread, key)[17])
    local = jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    close(jax.jit(local)(x, as_keys(key, 32))[17])
    assert (np.abs(jax.jit(run)(x, jax.random.key(1))[17] - whole[17]) > 1e-3).all()


def test_the_condition_reaches_step_and_correction(key):
    label = jnp.array([1.0, -2.0])
    step = lambda x, s, t, cond=None, key=None: x + expand(cond["a"], x)
    fix = lambda key, x, t, cond=None: (x + 10 * expand(cond["a"], x), {})
    x = sampling.sample(step, jnp.zeros((2, 1)), TS, key=key, cond={"a": label}, corrector=fix, at=(1, 3))
    np.testing.assert_array_equal(x, 23 * label[:, None])


@pytest.mark.parametrize("path", [paths.linear, paths.trigonometric])
@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_a_renoised_jump_of_the_exact_map_keeps_the_marginals(path, fraction, x64):
    """Mean and variance of the Gaussian oracle at every time, 65,536 samples; and it is not the jump itself."""
    mean, std, n = jnp.array([0.75, -0.5]), jnp.array([0.5, 1.5]), 1 << 16
    oracle, ts = oracles.gaussian(mean, std, path=path()), np.array([0.0, 0.4, 0.7, 1.0])
    step = sampling.renoised(oracle.flow_map, path=path(), fraction=fraction)
    x0 = jax.random.normal(jax.random.key(0), (n, 2))
    xs = sampling.sample(step, x0, ts, key=jax.random.key(1), trajectory=True)
    for x, t in zip(xs, ts, strict=True):
        alpha, beta = (float(a) for a in path().coefficients(jnp.asarray(t)))
        var = alpha**2 + (beta * std) ** 2
        assert np.abs((x.mean(0) - beta * mean) / np.sqrt(var / n)).max() < 4.5
        assert np.abs((x.var(0) / var - 1) * (n / 2) ** 0.5).max() < 4.5
    plain = sampling.sample(oracle.flow_map, x0, ts, trajectory=True)
    assert np.abs(xs[1] - plain[1]).mean() > 0.1 and np.abs(xs[3] - plain[3]).mean() > 0.1


def test_renoising_by_no_fraction_is_the_jump(key):
    oracle = oracles.gaussian(0.3, 0.7)
    x, step = jax.random.normal(key, (5, 2)), sampling.renoised(oracle.flow_map, fraction=0.0)
    np.testing.assert_array_equal(step(x, 0.2, 0.6), oracle.flow_map(x, 0.2, 0.6))
    nearly = sampling.renoised(oracle.flow_map, fraction=1e-6)(x, 0.2, 0.6, key=key)
    np.testing.assert_allclose(nearly, oracle.flow_map(x, 0.2, 0.6), atol=5e-3)
    with pytest.raises(ValueError, match="key=None: "):
        sampling.renoised(oracle.flow_map)(x, 0.2, 0.6)
    with pytest.raises(ValueError, match="fraction=1.5: "):
        sampling.renoised(oracle.flow_map, fraction=1.5)
