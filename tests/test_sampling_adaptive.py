"""Solves through diffrax against closed forms, scipy and the hand-written steps."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flows import ORDER, field, toy
from jax.sharding import PartitionSpec as P
from scipy import integrate as quadrature

from fmjax import oracles, sampling
from fmjax.sampling import grids
from fmjax.training import sharding
from fmjax.types import expand


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("ts", [grids.uniform_grid(10), [1.0, 0.85, 0.4, 0.3, 0.0]])
def test_the_hand_written_scan_agrees_with_diffrax(name, ts, x64):
    """Saved states at every time, on even and uneven grids, rising and falling, to rounding."""
    _, velocity = toy()
    x = jax.random.normal(jax.random.key(1), (4, 2), jnp.float64)
    by_hand = sampling.sample(getattr(sampling, name)(velocity), x, ts, trajectory=True)
    xs, result = jax.jit(lambda x: sampling.integrate(velocity, x, ts, solver=name))(x)
    np.testing.assert_allclose(sampling.checked_solve(xs, result), by_hand, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["heun", "rk4"])
def test_in_float32_they_agree_to_its_rounding(name):
    """A rounding of 2^-24 in each of 40 evaluations, times the size of the states (2) and their stretch (below 10)."""
    x = jnp.linspace(-1, 1, 6).reshape(3, 2)
    for ts in (grids.uniform_grid(10), grids.uniform_grid(10)[::-1]):
        by_hand = sampling.sample(getattr(sampling, name)(field), x, ts, trajectory=True)
        xs, _ = sampling.integrate(field, x, ts, solver=name)
        assert xs.dtype == by_hand.dtype == jnp.float32
        np.testing.assert_allclose(xs, by_hand, atol=40 * 20 * 2.0**-24)


@pytest.mark.parametrize("ts", [[0.0, 0.3, 1.0], [1.0, 0.2, 0.0]])
def test_an_adaptive_solve_meets_its_tolerance_on_a_gaussian(ts, x64):
    """Errors against the closed-form flow map are of the size of the tolerance, and fall with it."""
    oracle = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.3, 2.0]))
    x = jax.random.normal(jax.random.key(2), (8, 2), jnp.float64)
    true = jnp.stack([oracle.flow_map(x, ts[0], t) for t in np.float32(ts).astype(float)])
    for tol in (1e-4, 1e-7):
        xs, result = sampling.integrate(oracle.velocity, x, ts, solver="Tsit5", rtol=tol, atol=tol)
        gap = float(jnp.abs(sampling.checked_solve(xs, result) - true).max())
        assert tol / 1000 < gap < 30 * tol


def test_an_adaptive_solve_agrees_with_scipy(x64):
    _, velocity = toy()
    x = jax.random.normal(jax.random.key(3), (4, 2), jnp.float64)
    flat = jax.jit(lambda t, y: velocity(y.reshape(4, 2), t).ravel())
    want = quadrature.solve_ivp(flat, (0.0, 1.0), np.asarray(x).ravel(), method="DOP853", rtol=1e-11, atol=1e-11)
    want = want.y[:, -1].reshape(4, 2)
    xs, result = sampling.integrate(velocity, x, [0.0, 1.0], solver=diffrax.Dopri8(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(sampling.checked_solve(xs, result)[-1], want, atol=1e-6)
    step = sampling.from_diffrax(velocity, rtol=1e-9, atol=1e-9)
    there = sampling.sample(step, x, [0.0, 0.6, 1.0])
    np.testing.assert_allclose(there, want, atol=1e-6)
    np.testing.assert_allclose(sampling.sample(step, there, [1.0, 0.6, 0.0]), x, atol=1e-6)


def test_the_hardest_example_sets_the_step(x64):
    """Among 63 examples that do not move it is solved as if alone: the error is not diluted by a mean."""
    velocity = lambda x, t, cond=None: 8 * expand(jnp.cos(10 * t), x) * x
    hard, crowd = jnp.ones((1, 2)), jnp.zeros((64, 2)).at[5].set(1.0)
    alone, _ = sampling.integrate(velocity, hard, [0.0, 1.0], solver="Tsit5", rtol=1e-3, atol=1e-3)
    among, _ = sampling.integrate(velocity, crowd, [0.0, 1.0], solver="Tsit5", rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(among[:, 5], alone[:, 0], rtol=1e-12)
    step = sampling.from_diffrax(velocity, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(step(crowd, 0.0, 1.0)[5], step(hard, 0.0, 1.0)[0], rtol=1e-12)


def test_a_solve_that_leaves_finite_numbers_is_named_with_its_time(key):
    velocity = lambda x, t, cond=None: jnp.where(expand(t, x) > 0.55, jnp.nan, x)
    for ts, index in (grids.uniform_grid(10), 6), ([1.0, 0.5, 0.0], 1):
        xs, result = sampling.integrate(velocity, jax.random.normal(key, (3, 2)), ts)
        with pytest.raises(
            RuntimeError, match=f"the noise has non-finite values at time index {index} of {len(ts) - 1}"
        ):
            sampling.checked_solve(xs, result, what="the noise")


def test_a_solve_that_runs_out_of_steps_says_so(key):
    x = jax.random.normal(key, (2, 2))
    options = {"solver": "Tsit5", "rtol": 1e-6, "atol": 1e-6}
    with pytest.raises(RuntimeError, match="the solve failed: .*maximum number of solver steps.*max_steps"):
        sampling.checked_solve(*sampling.integrate(field, x, [0.0, 1.0], max_steps=2, **options))
    for late in (False, True):  # in whichever interval it happens
        fast = lambda x, t, cond=None: x * jnp.where((expand(t, x) > 0.5) == late, 20 * jnp.cos(40 * t[0]), 0)  # noqa: B023
        with pytest.raises(RuntimeError, match="maximum number of solver steps"):
            sampling.checked_solve(*sampling.integrate(fast, x, [0.0, 0.5, 1.0], max_steps=9, **options))
    enough = sampling.integrate(field, x, [0.0, 1.0], **options)
    assert sampling.checked_solve(*enough) is enough[0]
    # a step has no result code: it turns to NaN, which the caller sees
    hopeless = sampling.from_diffrax(lambda x, t, cond=None: x**2, rtol=1e-5, atol=1e-5)
    assert jnp.isnan(hopeless(jnp.full((1, 1), 10.0), 0.0, 1.0)).all()
    few, many = (sampling.from_diffrax(field, rtol=1e-6, atol=1e-6, max_steps=n)(x, 0.0, 1.0) for n in (2, 64))
    assert jnp.isnan(few).all() and jnp.isfinite(many).all()


def test_unknown_solvers_and_half_a_tolerance_are_refused():
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="solver='rk5': .*did you mean 'rk4'"):
        sampling.tableau("rk5")
    with pytest.raises(ValueError, match="solver='tsit5': .*did you mean 'Tsit5'"):
        sampling.integrate(field, x, [0.0, 1.0], solver="tsit5")
    for wrong in ("PIDController", "nothing"):  # in diffrax, but no solver
        with pytest.raises(ValueError, match=f"solver='{wrong}': "):
            sampling.integrate(field, x, [0.0, 1.0], solver=wrong)
    with pytest.raises(ValueError, match="rtol=0.1, atol=None: "):
        sampling.integrate(field, x, [0.0, 1.0], rtol=0.1)
    with pytest.raises(ValueError, match=r"ts\[0\]=0: "):
        sampling.integrate(field, x, [0.0, 0.0])


def test_no_host_callback_is_in_the_program():
    """It would force collectives and defeat the compilation cache; one of diffrax's own shows what it looks like."""
    text = lambda f: str(jax.make_jaxpr(f)(jnp.zeros((2, 2)))) + jax.jit(f).lower(jnp.zeros((2, 2))).as_text()
    throwing = lambda x: diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, c: -y), diffrax.Tsit5(), 0.0, 1.0, None, x,
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
    ).ys  # fmt: skip
    assert "callback" in text(throwing)
    assert "callback" not in text(lambda x: sampling.integrate(field, x, [0.0, 0.7, 1.0]))
    adaptive = {"solver": "Tsit5", "rtol": 0.1, "atol": 0.1}
    assert "callback" not in text(lambda x: sampling.integrate(field, x, [1.0, 0.5, 0.2, 0.0], **adaptive))
    assert "callback" not in text(lambda x: sampling.from_diffrax(field)(x, 0.0, 1.0))


@pytest.mark.parametrize("solver", ["rk4", "Tsit5"])
def test_eight_devices_solve_what_one_solves(solver):
    _, velocity = toy()
    x = jax.random.normal(jax.random.key(6), (16, 2))
    run = functools.partial(sampling.integrate, velocity, ts=[1.0, 0.6, 0.1, 0.0], solver=solver)
    spread = jax.shard_map(
        lambda x: run(x)[0], mesh=sharding.make_mesh(), in_specs=P("data"), out_specs=P(None, "data"), check_vma=False
    )
    assert sharding.make_mesh().size == 8
    np.testing.assert_allclose(jax.jit(spread)(x), jax.jit(run)(x)[0], rtol=1e-6, atol=1e-6)
