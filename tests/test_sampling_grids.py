"""Grids of sampling times against published values, exact integrals and every other choice there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import paths
from fmjax.sampling import grids

# EDM's 18 levels and the data, in the time of the linear path
PUBLISHED = [.0123, .0171, .0239, .0340, .0491, .0719, .1064, .1583, .2349, .3421, .4789, .6308, .7713, .8776, .9434,
             .9776, .9925, .9980, 1]  # fmt: skip


def test_the_grid_of_edm_is_the_published_one():
    grid = grids.edm_grid(18)
    np.testing.assert_allclose(grid, PUBLISHED, atol=5.1e-5)
    assert (grid[:-1] < 0.5).sum() == 11 and grid.dtype == np.float64
    np.testing.assert_allclose([grid[0], grid[-2]], [1 / 81, 1 / 1.002], rtol=1e-6)
    assert grids.edm_grid(1).tolist() == [1 / 81, 1]


@pytest.mark.parametrize(("make", "even"), [
    (functools.partial(grids.edm_grid, rho=3.0), lambda sigma: sigma ** (1 / 3)),
    (grids.edm_grid, lambda sigma: sigma ** (1 / 7)),
    (grids.log_snr_grid, np.log),
])  # fmt: skip
@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric(), paths.vp(), paths.ve(sigma_max=90.0)])
def test_levels_are_even_in_what_they_say_on_every_path(make, even, path):
    grid = make(9, sigma_min=0.03, sigma_max=80.0, path=path)
    with jax.enable_x64(True):
        alpha, beta = path.coefficients(jnp.asarray(grid[:-1]))
    sigma = np.asarray(alpha / beta)
    np.testing.assert_allclose(sigma[[0, -1]], [80.0, 0.03], rtol=1e-9)
    steps = np.diff(even(sigma))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-6)
    assert grid[-1] == 1 and len(grid) == 10
    assert jax.jit(lambda: jnp.asarray(make(9, sigma_min=0.03, path=path)))().shape == (10,)  # static under jit


def test_levels_that_a_path_does_not_have_are_refused_and_bad_numbers_too():
    with pytest.raises(ValueError, match="sigma=80: "):
        grids.edm_grid(5, path=paths.ve())
    with pytest.raises(ValueError, match="n=0: "):
        grids.edm_grid(0)
    with pytest.raises(ValueError, match="sigma_min=3.0: .*sigma_max=2.0"):
        grids.log_snr_grid(4, sigma_min=3.0, sigma_max=2.0)
    with pytest.raises(ValueError, match="rho=inf: "):
        grids.edm_grid(4, rho=np.inf)
    with pytest.raises(ValueError, match="latent"):
        grids.edm_grid(4, path=paths.two_sided())


def test_a_uniform_grid_has_n_equal_steps_and_exact_ends():
    for n in (1, 7, 10):
        grid = grids.uniform_grid(n)
        assert grid.dtype == np.float64 and grid[0] == 0 and grid[-1] == 1
        np.testing.assert_allclose(grid, np.arange(n + 1) / n, rtol=1e-15)
    np.testing.assert_array_equal(grids.uniform_grid(4, start=1.0, stop=0.5), [1, 0.875, 0.75, 0.625, 0.5])
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"n={n}: "):
            grids.uniform_grid(n)


@pytest.mark.parametrize("grid", [[0.0, 0.1, 1.0], (1, 0.5, 0), np.linspace(0, 1, 3), jnp.array([0.25, 0.5])])
def test_a_strictly_monotone_grid_passes_unchanged(grid):
    checked = grids.check_grid(grid)
    assert isinstance(checked, np.ndarray) and checked.dtype == np.float64
    np.testing.assert_array_equal(checked, np.asarray(grid))
    assert grids.check_grid(grid, dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([0.5], r"ts=\[0.5\]: shape \(1,\)"),
        ([], r"ts=\[\]: shape \(0,\)"),
        (0.5, r"ts=0.5: shape \(\)"),
        ([[0.0, 1.0]], r"ts=.*: shape \(1, 2\)"),
        ([0.0, float("nan"), 1.0], r"ts=\[0.0, nan, 1.0\]: "),
        ([0.0, float("inf")], r"ts=\[0.0, inf\]: "),
        ([0.0, 0.5, 0.25, 1.0], r"ts\[1\]=0.5: followed by ts\[2\]=0.25"),
        ([1.0, 0.5, 0.75], r"ts\[1\]=0.5: followed by ts\[2\]=0.75"),
        ([0.0, 0.5, 0.5, 1.0], r"ts\[1\]=0.5: followed by ts\[2\]=0.5"),
        ([0.0, 0.0, 1.0], r"ts\[0\]=0: followed by ts\[1\]=0"),
        ([0.0, 1.0 - 1e-9, 1.0], r"ts\[1\]=1: followed by ts\[2\]=1"),
        ([0.0, 500.0, 1000.0], "ts=500: "),
        ([-0.5, 0.5], "ts=-0.5: "),
        (0, "n=0: "),
    ],
)
def test_a_grid_that_cannot_be_stepped_is_refused_and_named(grid, message):
    with pytest.raises(ValueError, match=message):
        grids.check_grid(grid, dtype=np.float32)


def test_of_a_traced_grid_only_the_shape_is_checked():
    np.testing.assert_array_equal(jax.jit(grids.check_grid)(jnp.array([0.0, 2.0])), [0.0, 2.0])
    with pytest.raises(ValueError, match=r"shape \(1,\)"):
        jax.jit(grids.check_grid)(jnp.array([0.0]))


@pytest.mark.parametrize(("m", "n"), [(10, 50), (7, 21), (10, 10), (50, 1000)])
def test_a_finer_grid_contains_the_times_of_a_coarser_one(m, n):
    coarse, fine = grids.uniform_grid(m), grids.uniform_grid(n)
    assert grids.steps_at(fine, coarse) == tuple(range(0, n + 1, n // m))
    assert grids.steps_at(fine[::-1], coarse[1:3]) == (n - n // m, n - 2 * n // m)
    assert grids.steps_at(fine, []) == ()


def test_a_time_that_a_grid_does_not_have_is_named():
    with pytest.raises(ValueError, match="t=0.5: not among these 6 times .*0.4"):
        grids.steps_at(grids.uniform_grid(5), grids.uniform_grid(10)[[2, 5, 7]])


def test_a_schedule_by_step_is_its_array_on_any_grid_with_those_times():
    """And no number elsewhere. A change of the values compiles nothing."""
    ts, values, traced = grids.uniform_grid(10), np.linspace(-1, 2, 11), []

    @jax.jit
    def at(values, t):
        traced.append(1)
        return grids.per_step(ts, values)(t)

    for v in (values, values**2):
        np.testing.assert_allclose(at(v, jnp.asarray(grids.uniform_grid(50)[::5])), v, rtol=1e-6)
    assert len(traced) == 1
    assert np.isnan(grids.per_step(ts, values)(jnp.array([0.05, 0.55, 1.1]))).all()
    assert grids.per_step(ts, values)(jnp.float32(0.3)) == np.float32(values[3])  # a scalar, too
    grids.per_step(ts, values).check(ts[2:4])
    with pytest.raises(ValueError, match="t=0.25: "):
        grids.per_step(ts, values).check([0.2, 0.25])
    for bad in (values[:-1], 0.5):
        with pytest.raises(ValueError, match=r"values=\("):
            grids.per_step(ts, bad)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "ts",
    [["0", "1"], "01", [False, True], np.array([0, 1], object), {0.0: 1.0}, (i for i in (0, 1)), [0, 1j], None],
)
def test_what_is_no_list_of_numbers_is_no_grid(ts):
    for take in (grids.check_grid, lambda ts: grids.per_step(ts, [1.0, 2.0]), lambda ts: grids.same_times((0,), ts, 4)):
        with pytest.raises(ValueError, match="^ts=") as error:
            take(ts)
        assert len(str(error.value)) <= 300


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    "at", [(0.5,), (1.0,), ("0",), "12", (True,), (np.nan,), (None,), 3, ((0, 1),), np.array([0.5])]
)
def test_a_step_that_is_no_whole_number_is_refused_not_rounded(at):
    with pytest.raises(ValueError, match="^at="):
        grids.check_at(at, 4)
    assert grids.check_at(np.array([3, 0]), 4) == grids.check_at([0, np.int64(3)], 4) == (0, 3)


@pytest.mark.usefixtures("as_users_call")
def test_a_uniform_grid_lies_in_the_unit_interval_and_has_steps():
    for options in ({"start": -0.5}, {"stop": 2.0}, {"start": np.nan}, {"stop": np.inf}, {"start": 1.0}, {"stop": "1"}):
        with pytest.raises(ValueError, match=f"^({'|'.join(options)}|stop)="):
            grids.uniform_grid(4, **options)
    for make in (grids.uniform_grid, grids.edm_grid, grids.log_snr_grid):
        for n in (0, -1, 2.0, True, None, "3", np.nan):
            with pytest.raises(ValueError, match="^n="):
                make(n)
    for ts in ([0.0, 500.0], [np.nan, 1.0], [-0.1, 1.0]):
        with pytest.raises(ValueError, match="^ts="):
            grids.per_step(ts, [1.0, 2.0])
