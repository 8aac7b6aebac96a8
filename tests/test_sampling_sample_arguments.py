"""What the sampler takes and returns: grids, states, starts, diagnostics, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fmjax import oracles, paths, sampling
from fmjax.correction import correctors
from fmjax.keys import as_keys, normal
from fmjax.sampling import grids
from fmjax.training import sharding
from fmjax.types import Costed, expand

TS = [0.0, 0.5, 0.75, 1.0]


def add_time(key, x, t, cond=None):
    return x + expand(100 + t, x), {}


@pytest.fixture
def flow():
    oracle = oracles.mixture(jnp.array([[1.5, 0.0], [-1.0, 1.0], [0.0, -2.0]]), 0.5)
    return oracle.velocity, lambda x, t, cond=None: 0.04 * oracle.score(x, t)


def test_the_number_of_steps_stands_for_a_uniform_grid(key):
    step, x = sampling.euler(lambda x, t, cond=None: -x), jnp.ones((2, 1))
    for n in (10, np.int64(10)):
        np.testing.assert_array_equal(sampling.sample(step, x, n), sampling.sample(step, x, grids.uniform_grid(10)))


def test_first_slips_are_answered_in_one_sentence():
    velocity, x = lambda x, t, cond=None: -x, jnp.ones((2, 1))
    step = sampling.euler(velocity)
    for wrong in (velocity, lambda x, t: -x, functools.partial(velocity, cond=None), jax.jit(velocity)):
        with pytest.raises(TypeError, match=r"step=.*pass sampling.rk4\(velocity\)"):
            sampling.sample(wrong, x, 10)
    with pytest.raises(TypeError, match=r"x0=int32\[1, 2\]: "):
        sampling.sample(step, jnp.full((1, 2), 3), 10)
    with pytest.raises(ValueError, match=r"x0=float32\[\]: "):
        sampling.sample(step, jnp.float32(1), 10)
    for ts, time in (([0, 500, 1000], "500"), ([-0.5, 0.5], "-0.5"), ([1.0, 0.0, -0.25], "-0.25")):
        with pytest.raises(ValueError, match=rf"ts={time}: outside \[0, 1\]"):
            sampling.sample(step, x, ts)
    for message in (str(e.value) for e in [pytest.raises(TypeError, sampling.sample, velocity, x, 10)]):
        assert "\n" not in message and len(message) <= 300


def test_many_small_steps_of_a_short_state_are_not_lost():
    step = sampling.euler(lambda x, t, cond=None: jnp.ones_like(x))
    end = jax.jit(lambda x: sampling.sample(step, x, 1000))(jnp.zeros((1, 1), jnp.bfloat16))
    assert end.dtype == jnp.bfloat16 and end[0, 0] == 1


def test_a_float64_state_has_float64_times(x64):
    """``sin`` over [0, 0.7]: rounding 0.7 to float32 alone would cost 1e-8."""
    step = sampling.from_diffrax(lambda x, t, cond=None: jnp.cos(t)[:, None] + 0 * x, rtol=1e-12, atol=1e-12)
    assert abs(sampling.sample(step, jnp.zeros((1, 1)), [0.0, 0.7])[0, 0] - np.sin(0.7)) < 1e-11


def test_a_grid_may_be_traced_in_whole_or_in_part(key):
    step, x = sampling.rk4(lambda x, t, cond=None: -x), jnp.ones((2, 1))
    plain = sampling.sample(step, x, [0.0, 0.3, 1.0], key=key, corrector=add_time, at=(1, 2))
    for run in (lambda t: [0.0, t, 1.0], lambda t: jnp.stack([0 * t, t, 1 + 0 * t])):
        at = jax.jit(lambda t: sampling.sample(step, x, run(t), key=key, corrector=add_time, at=(1, 2)))  # noqa: B023
        np.testing.assert_allclose(at(0.3), plain, rtol=1e-6)
    with pytest.raises(ValueError, match="shape"):
        jax.jit(lambda t: sampling.sample(step, x, t))(jnp.float32(0.3))


@pytest.mark.parametrize("at", [(), (0,), (4,), (1, 3), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("parallel", [False, True])
def test_info_has_the_diagnostics_of_the_corrected_steps(at, parallel, key):
    """One row for each correction, in order, as the corrector gave it; a memory of a multistep step at its end."""

    def report(key, x, t, cond=None):
        return x + 1, {"time": t, "mean": x.mean(), "moved": jnp.ones(len(x), bool), "noised": x}

    x, ts = jnp.ones((3, 2)), np.linspace(0, 1, 5)
    step = sampling.dpmpp_2m(lambda x, t, cond=None: -x)
    options = {"key": key, "corrector": report, "at": at, "parallel": parallel}
    got, info = jax.jit(lambda x: sampling.sample(step, x, ts, info=True, **options))(x)
    np.testing.assert_allclose(got, sampling.sample(step, x, ts, **options), rtol=1e-6)
    assert info.steps.tolist() == list(at)
    if at:
        np.testing.assert_allclose(info.corrections["time"], np.repeat(ts[list(at)][:, None], 3, 1), rtol=1e-6)
        assert info.corrections["mean"].shape == (len(at),) and info.corrections["noised"].shape == (len(at), 3, 2)
        assert info.corrections["moved"].all()
        states = sampling.sample(step, x, ts, trajectory=True, **options)
        np.testing.assert_allclose(info.corrections["noised"] + 1, states[np.array(at)], rtol=1e-6)
    else:
        assert info.corrections == {}
    (data,), (level,) = info.memory
    assert data.shape == x.shape and np.allclose(level, 1 / 3)  # of the last step's start, t = 3/4
    assert sampling.sample(sampling.rk4(lambda x, t, cond=None: -x), x, 2, info=True)[1].memory is None


def test_info_is_the_same_on_eight_devices(flow, key):
    velocity, direction = flow
    fix, step = correctors.marginal_matching(direction, alpha=0.5, beta=0.3), sampling.euler(velocity)
    run = lambda x, key: sampling.sample(step, x, 4, key=key, corrector=fix, at=(1, 4), info=True)[1].corrections
    x = normal(as_keys(jax.random.key(9), 16), (2,))
    local = jax.shard_map(run, mesh=sharding.make_mesh(), in_specs=P("data"), out_specs=P(None, "data"))
    for a, b in zip(*map(jax.tree.leaves, (local(x, as_keys(key, 16)), run(x, key))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_step_refuses_grids_that_it_cannot_take_under_jit_too(key):
    check = lambda ts: sampling.steps_at([0.0, 0.5, 1.0], ts)
    step = Costed(lambda x, s, t, cond=None, key=None: x, 1, check)
    fix = Costed(lambda key, x, t, cond=None: (x, {}), 1, check)
    for wrapped in (step, jax.jit(step), functools.partial(step)):
        with pytest.raises(ValueError, match="t=0.25: "):
            jax.jit(lambda x: sampling.sample(wrapped, x, 4))(jnp.ones((2, 1)))  # noqa: B023
        sampling.sample(wrapped, jnp.ones((2, 1)), 2)
    with pytest.raises(ValueError, match="t=0.25: "):
        sampling.sample(sampling.euler(lambda x, t, cond=None: x), jnp.ones((2, 1)), 4, key=key, corrector=fix, at=(1,))


@pytest.mark.parametrize("name", ["linear", "trigonometric", "vp", "sub_vp", "ve"])
def test_the_start_and_the_grid_of_a_path_give_samples_of_the_data(name):
    """Data ``N(0.3, 0.5^2)``, exact velocity, RK4: mean and deviation within their standard errors."""
    path, n = getattr(paths, name)(), 1 << 14
    oracle = oracles.gaussian(0.3, 0.5, path=path)
    ts = grids.default_grid(path, 200)
    x0 = sampling.source_sample(path, jax.random.key(1), (n, 1))
    x = np.asarray(jax.jit(lambda x: sampling.sample(sampling.rk4(oracle.velocity), x, ts))(x0))
    assert ts[-1] == (0.999 if name == "vp" else 1)
    assert abs(x.mean() - 0.3) < 4 * 0.5 / n**0.5 + 0.005
    assert abs(x.std() / 0.5 - 1) < 4 / (2 * n) ** 0.5 + 0.005


def test_the_start_belongs_to_its_example_and_knows_a_later_time():
    path, key = paths.ve(sigma_max=50.0), jax.random.key(3)
    whole = sampling.source_sample(path, key, (8, 3))
    np.testing.assert_array_equal(sampling.source_sample(path, as_keys(key, 8)[2:4], (2, 3)), whole[2:4])
    np.testing.assert_allclose(whole, 50 * normal(as_keys(key, 8), (3,)), rtol=1e-6)
    ts = grids.edm_grid(5)
    later = sampling.source_sample(paths.linear(), key, (8, 3), start=ts[0])
    np.testing.assert_allclose(later, (1 - ts[0]) * normal(as_keys(key, 8), (3,)), rtol=1e-6)
    latent = sampling.source_sample(paths.two_sided(scale=2.0), key, (8, 3), start=0.5)
    np.testing.assert_allclose(latent, np.sqrt(0.25 + 4 * 0.25) * normal(as_keys(key, 8), (3,)), rtol=1e-6)
