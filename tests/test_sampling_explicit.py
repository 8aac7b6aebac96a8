"""Steps and solves against order conditions, published errors, closed forms and scipy."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy import integrate as quadrature

from fmjax import oracles, sampling
from fmjax.sampling import explicit, grids
from fmjax.training import sharding
from fmjax.types import expand, over_batch

ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "rk38": 4}
MIS_INDEXED = explicit.RK4._replace(c=(0, 0, 1 / 2, 1 / 2))  # torchdyn 1.0.6


def field(x, t, cond=None):
    """``dx/dt = cos(3t) x + t``: linear, smooth, and it depends on time in every term."""
    t = expand(over_batch(t, x), x)
    return jnp.cos(3 * t) * x + t


def exact(x, s, t):
    """``x(t) = e^{(sin 3t - sin 3s)/3} x + int_s^t r e^{(sin 3t - sin 3r)/3} dr``, by Gauss's rule of 60 points."""
    node, weight = np.polynomial.legendre.leggauss(60)
    r = s + (t - s) * (node + 1) / 2
    rate = lambda r: np.exp((np.sin(3 * t) - np.sin(3 * r)) / 3)
    return rate(s) * x + (t - s) / 2 * (weight @ (r * rate(r)))


def toy():
    """Eight modes on a circle and a smooth error field: a nonlinear flow in two dimensions."""
    angle = np.arange(8) * np.pi / 4
    oracle = oracles.mixture(2 * jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1)), 0.2)

    def velocity(x, t, cond=None):
        a, b = x[:, 0], x[:, 1]
        error = 0.6 * x + 0.5 * jnp.stack([-b, a], 1) + 0.5 * jnp.stack([jnp.sin(2 * b), jnp.cos(2 * a)], 1)
        return oracle.velocity(x, t) + 0.35 * error

    return oracle, velocity


def solve(method, n, x, start=0.0, stop=1.0, velocity=field):
    step = sampling.runge_kutta(velocity, method)
    ts = np.linspace(start, stop, n + 1)
    return jax.jit(lambda x: sampling.sample(step, x, ts))(x)


def error(method, n, x, start=0.0, stop=1.0):
    return abs(float(solve(method, n, jnp.full((1, 1), x), start, stop)[0, 0]) - exact(x, start, stop))


@pytest.mark.parametrize("name", ORDER)
def test_a_tableau_meets_the_order_conditions_and_no_more(name):
    """Butcher's conditions, one for each rooted tree; row sums are the abscissae."""
    a, b, c = explicit.TABLEAUS[name]
    n = len(b)
    a = np.array([list(row) + [0.0] * (n - len(row)) for row in a]).reshape(n, n)
    b, c = np.array(b, float), np.array(c, float)
    assert (np.triu(a) == 0).all()
    np.testing.assert_allclose(a.sum(1), c, atol=1e-15)
    conditions = [
        [(b.sum(), 1)],
        [(b @ c, 1 / 2)],
        [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        [(b @ c**3, 1 / 4), (b * c @ a @ c, 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
        [(b @ c**4, 1 / 5)],
    ]
    for order, group in enumerate(conditions, 1):
        holds = all(abs(got - want) < 1e-14 for got, want in group)
        assert holds == (order <= ORDER[name])
    assert getattr(sampling, name)(field).nfe == n == {1: 1, 2: 2, 4: 4}[ORDER[name]]


@pytest.mark.parametrize(
    ("method", "x", "published"),
    [
        (explicit.RK4, 1.0, {5: 1.7e-5, 10: 5.4e-7, 20: 1.6e-8}),
        (explicit.RK38, 1.0, {5: 2.1e-5, 10: 1.1e-6, 20: 6.4e-8}),
        (explicit.RK4, 0.0, {5: 1.1e-6, 10: 7.5e-8, 20: 4.3e-9, 40: 2.5e-10}),
        (MIS_INDEXED, 1.0, {5: 8.1e-2, 10: 3.9e-2, 20: 1.9e-2}),
    ],
)
def test_errors_on_a_time_dependent_field_are_the_published_ones(method, x, published, x64):
    """To the two digits given; the mis-indexed tableau shows that the test would see a wrong abscissa."""
    for n, value in published.items():
        assert error(method, n, x) == pytest.approx(value, rel=0.05)


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (1.0, 0.0)])
def test_the_error_falls_at_the_order_of_the_method_in_both_directions(name, start, stop, x64):
    method = explicit.TABLEAUS[name]  # from x = 0: from others the leading term of rk4 changes its sign, or vanishes
    slope = np.log2(error(method, 80, 0.0, start, stop) / error(method, 160, 0.0, start, stop))
    assert abs(slope - ORDER[name]) < 0.2


@pytest.mark.parametrize("name", ORDER)
def test_a_step_by_name_is_the_step_of_its_tableau(name, x64):
    x, s, t = jnp.array([[1.0, -2.0], [0.5, 3.0]]), jnp.array([0.1, 0.9]), jnp.array([0.4, 0.2])
    seen = []

    def velocity(x, t, cond=None):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return field(x, t)

    got = jax.block_until_ready(getattr(sampling, name)(velocity)(x, s, t))
    jax.effects_barrier()
    a, b, c = explicit.TABLEAUS[name]
    h, ks = (t - s)[:, None], []
    for row, ci in zip(a, c, strict=True):
        ks.append(field(x + h * sum(w * k for w, k in zip(row, ks, strict=True)), s + ci * (t - s)))
    np.testing.assert_allclose(got, x + h * sum(w * k for w, k in zip(b, ks, strict=True)), rtol=1e-14)
    assert len(seen) == getattr(sampling, name)(field).nfe  # evaluations, not only stages
    np.testing.assert_allclose(sorted(s[0] for s in seen), sorted(0.1 + 0.3 * ci for ci in c), rtol=1e-14)


def test_every_example_steps_over_its_own_interval_and_condition(x64):
    velocity = lambda x, t, cond: cond[:, None] * field(x, t)
    x, cond = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([1.0, -1.0, 0.5])
    s, t = jnp.array([0.0, 0.5, 1.0]), jnp.array([0.3, 0.5, 0.6])
    together = sampling.rk4(velocity)(x, s, t, cond)
    for i in range(3):
        alone = sampling.rk4(velocity)(x[i : i + 1], s[i], t[i], cond[i : i + 1])
        np.testing.assert_allclose(together[i], alone[0], rtol=1e-14)
    assert together[1, 0] == 2.0  # a step of no length is the identity


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


@pytest.mark.parametrize("ts", [(0.3, 0.4), (0.4, 0.3)])
def test_the_inverse_of_a_step_undoes_it_to_rounding(ts, x64):
    """The fixed point converges geometrically to the exact inverse, from the reverse step, which is not."""
    _, velocity = toy()
    x = jax.random.normal(jax.random.key(4), (16, 2), jnp.float64)
    step = sampling.rk4(velocity)
    y = step(x, *ts)
    gaps = [float(jnp.abs(sampling.inverse(step, iterations=k)(y, *ts[::-1]) - x).max()) for k in (0, 4, 60)]
    assert gaps[0] > 1e-6 and gaps[1] < gaps[0] / 10
    assert gaps[2] < 1e-13
    np.testing.assert_allclose(step(sampling.inverse(step, iterations=60)(x, *ts[::-1]), *ts), x, atol=1e-13)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 3), ("heun", 3), ("rk4", 5), ("rk38", 5)])
def test_reverse_steps_undo_a_solve_up_to_their_order(name, order, x64):
    """Back from data and forth again: the leading local errors of an even order cancel, which gains one order."""
    oracle, velocity = toy()
    method = explicit.TABLEAUS[name]

    def gap(n, examples=256):
        x = oracle.sample(jax.random.key(5), examples)
        back = solve(method, n, x, 1.0, 0.0, velocity)
        return float(jnp.sqrt(((solve(method, n, back, 0.0, 1.0, velocity) - x) ** 2).sum(1).mean()))

    n = 640 if order == 1 else 160
    assert abs(np.log2(gap(n) / gap(2 * n)) - order) < 0.3
    if name == "rk4":  # the published figures are of other points; those of three other seeds here spread by a quarter
        for n, value in {5: 3.3e-2, 10: 4.7e-3, 20: 3.7e-4, 40: 1.3e-5}.items():
            assert 0.6 < gap(n, 4000) / value < 1.7


def test_a_solve_that_leaves_finite_numbers_is_named_with_its_time(key):
    velocity = lambda x, t, cond=None: jnp.where(expand(t, x) > 0.55, jnp.nan, x)
    for ts, index in (grids.uniform_grid(10), 6), ([1.0, 0.5, 0.0], 1):
        xs, result = sampling.integrate(velocity, jax.random.normal(key, (3, 2)), ts)
        with pytest.raises(RuntimeError, match=f"the noise left finite numbers at time index {index} of {len(ts) - 1}"):
            sampling.checked_solve(xs, result, what="the noise")


def test_a_solve_that_runs_out_of_steps_says_so(key):
    x = jax.random.normal(key, (2, 2))
    options = {"solver": "Tsit5", "rtol": 1e-6, "atol": 1e-6}
    with pytest.raises(RuntimeError, match="the solve failed: .*maximum number of solver steps.* or raise max_steps"):
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


def test_unknown_solvers_and_half_a_tolerance_are_refused():
    x = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match="no fixed-step solver 'rk5'; did you mean 'rk4'.*euler, midpoint, heun"):
        sampling.tableau("rk5")
    with pytest.raises(ValueError, match="no solver 'tsit5'; did you mean 'Tsit5'"):
        sampling.integrate(field, x, [0.0, 1.0], solver="tsit5")
    for wrong in ("PIDController", "nothing"):  # in diffrax, but no solver
        with pytest.raises(ValueError, match=f"no solver '{wrong}'.*any diffrax solver by name"):
            sampling.integrate(field, x, [0.0, 1.0], solver=wrong)
    with pytest.raises(ValueError, match="both rtol and atol or neither, got rtol=0.1, atol=None"):
        sampling.integrate(field, x, [0.0, 1.0], rtol=0.1)
    with pytest.raises(ValueError, match="strictly"):
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
