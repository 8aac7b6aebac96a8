"""Laws of training times against their distribution functions; grids against the definition and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from fmjax import times
from fmjax.types import as_keys

LEVEL = 1e-4  # of every goodness-of-fit test here: a correct law fails one seed in ten thousand
N = 20_000


@pytest.fixture
def keys(key):
    return as_keys(key, N)


@pytest.mark.parametrize(
    ("law", "cdf"),
    [
        (times.uniform, stats.uniform.cdf),
        (functools.partial(times.uniform, low=0.2, high=0.7), stats.uniform(0.2, 0.5).cdf),
        (times.interior, stats.uniform(1e-3, 1 - 2e-3).cdf),
        (functools.partial(times.interior, margin=0.1), stats.uniform(0.1, 0.8).cdf),
        (times.logit_normal, lambda t: stats.norm.cdf(special.logit(t))),
        (
            functools.partial(times.logit_normal, mean=-0.4, std=1.6),
            lambda t: stats.norm.cdf(special.logit(t), -0.4, 1.6),
        ),
    ],
)
def test_laws_of_training_times_have_their_distribution(law, cdf, keys):
    t = np.asarray(law(keys), np.float64)
    assert stats.kstest(t, cdf).pvalue > LEVEL
    assert abs(np.corrcoef(t[1:], t[:-1])[0, 1]) * N**0.5 < 4.5
    np.testing.assert_array_equal(law(keys[17:20]), t[17:20].astype(np.float32))


def test_interior_times_keep_their_margin_and_a_margin_that_leaves_none_is_refused(keys):
    t = np.asarray(times.interior(keys, margin=0.4))
    assert t.min() >= np.float32(0.4) and t.max() <= np.float32(0.6)
    for margin in (0.0, 0.5, -0.1):
        with pytest.raises(ValueError, match=f"0 < margin < 1/2, got margin={margin}"):
            times.interior(keys, margin=margin)


def test_an_ordered_pair_is_uniform_on_the_triangle(keys):
    """Density 2 on ``s <= t``: ``t ~ Beta(2, 1)``, ``s ~ Beta(1, 2)``, and ``s / t ~ U[0, 1]`` whatever ``t`` is."""
    s, t = (np.asarray(a, np.float64) for a in times.ordered_pair(keys))
    assert (s <= t).all()
    assert stats.kstest(s, stats.beta(1, 2).cdf).pvalue > LEVEL
    assert stats.kstest(t, stats.beta(2, 1).cdf).pvalue > LEVEL
    for part in (t < 0.5, t > 0.8):
        assert stats.kstest((s / t)[part], stats.uniform.cdf).pvalue > LEVEL


def test_an_ordered_pair_of_another_law_has_its_order_statistics(keys):
    """``P(s < a) = 1 - (1 - F(a))^2`` and ``P(t < a) = F(a)^2``."""
    s, t = (np.asarray(a, np.float64) for a in times.ordered_pair(keys, law=times.logit_normal))
    cdf = lambda a: stats.norm.cdf(special.logit(a))
    assert stats.kstest(s, lambda a: 1 - (1 - cdf(a)) ** 2).pvalue > LEVEL
    assert stats.kstest(t, lambda a: cdf(a) ** 2).pvalue > LEVEL


def test_the_earlier_of_two_draws_is_where_an_ordered_pair_starts(keys):
    law = functools.partial(times.logit_normal, mean=0.4)
    s, _ = times.ordered_pair(keys, law=law)
    np.testing.assert_array_equal(times.earlier(keys, law=law), s)
    assert stats.kstest(np.asarray(times.earlier(keys)), stats.beta(1, 2).cdf).pvalue > LEVEL


def test_a_terminal_pair_has_a_logit_normal_gap_and_a_truncated_end(keys):
    """``d ~ LN(-.8, 1)``; given it ``(F(t) - F(d)) / (1 - F(d)) ~ U[0, 1]``, whatever it is, ``F`` of ``LN(.4, 1)``."""
    s, t = (np.asarray(a, np.float64) for a in times.terminal_pair(keys))
    assert s.min() >= 0 and t.max() <= 1
    gap, normal = t - s, lambda mean: lambda t: stats.norm.cdf(special.logit(t), mean)
    assert stats.kstest(gap, normal(-0.8)).pvalue > LEVEL
    cdf = normal(0.4)
    share = (cdf(t) - cdf(gap)) / (1 - cdf(gap))
    for part in (gap < 0.2, (gap > 0.3) & (gap < 0.5), gap > 0.7):
        assert stats.kstest(share[part], stats.uniform.cdf).pvalue > LEVEL
    s, t = times.terminal_pair(keys, gap_mean=6.0)  # gaps up to one, where the tail has no digits left in float32
    assert jnp.isfinite(s).all() and (s >= 0).all() and (t <= 1).all()
    with pytest.raises(ValueError, match="needs std > 0 and gap_std > 0, got std=0.0"):
        times.terminal_pair(keys, std=0.0)


def test_a_uniform_grid_has_n_equal_steps_and_exact_ends():
    for n in (1, 7, 10):
        grid = times.uniform_grid(n)
        assert grid.dtype == np.float32 and grid[0] == 0 and grid[-1] == 1
        np.testing.assert_allclose(grid, np.arange(n + 1) / n, atol=6e-8)
    np.testing.assert_array_equal(times.uniform_grid(4, start=1.0, stop=0.5), [1, 0.875, 0.75, 0.625, 0.5])
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"at least one step, got n={n}"):
            times.uniform_grid(n)


@pytest.mark.parametrize("grid", [[0.0, 0.1, 1.0], (1, 0.5, 0), np.linspace(0, 1, 3), jnp.array([0.25, 0.5])])
def test_a_strictly_monotone_grid_passes_unchanged(grid):
    checked = times.check_grid(grid)
    assert isinstance(checked, np.ndarray) and checked.dtype == np.float32
    np.testing.assert_array_equal(checked, np.asarray(grid, np.float32))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([0.5], r"at least two times in one axis, got shape \(1,\): \[0.5\]"),
        ([], r"at least two times in one axis, got shape \(0,\)"),
        (0.5, r"at least two times in one axis, got shape \(\)"),
        ([[0.0, 1.0]], r"at least two times in one axis, got shape \(1, 2\)"),
        ([0.0, float("nan"), 1.0], r"finite times, got \[0.0, nan, 1.0\]"),
        ([0.0, float("inf")], "finite times"),
        ([0.0, 0.5, 0.25, 1.0], r"ts\[1\]=0.5 is followed by ts\[2\]=0.25; sort it"),
        ([1.0, 0.5, 0.75], r"ts\[1\]=0.5 is followed by ts\[2\]=0.75"),
        ([0.0, 0.5, 0.5, 1.0], r"ts\[1\]=0.5 is followed by ts\[2\]=0.5; .*drop the repeated time"),
        ([0.0, 0.0, 1.0], r"ts\[0\]=0 is followed by ts\[1\]=0"),
        ([0.0, 1.0, 1.0 + 1e-9], r"ts\[1\]=1 is followed by ts\[2\]=1"),
    ],
)
def test_a_grid_that_cannot_be_stepped_is_refused_and_named(grid, message):
    with pytest.raises(ValueError, match=message):
        times.check_grid(grid)


def test_a_traced_grid_is_refused():
    with pytest.raises(TypeError, match="static: pass a numpy array or a list from outside jit"):
        jax.jit(times.check_grid)(jnp.array([0.0, 1.0]))
