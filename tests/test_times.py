"""Laws of training times against their distribution functions; grids against the definition and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from fmjax import times
from fmjax.keys import as_keys
from fmjax.sampling import grids

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
        # log sigma = log((1 - t) / t) and log(sigma_d tan(pi / 2 (1 - t))) are normal; both fall with t
        (times.noise_level, lambda t: 1 - stats.norm.cdf(np.log((1 - t) / t), -1.1, 2.0)),
        (
            functools.partial(times.noise_angle, sigma=0.5),
            lambda t: 1 - stats.norm.cdf(np.log(0.5 * np.tan(np.pi / 2 * (1 - t))), -1.0, 1.4),
        ),
    ],
)
def test_laws_of_training_times_have_their_distribution(law, cdf, keys):
    t = np.asarray(law(keys), np.float64)
    assert stats.kstest(t, cdf).pvalue > LEVEL
    assert abs(np.corrcoef(t[1:], t[:-1])[0, 1]) * N**0.5 < 4.5
    ulp = 2e-7 if getattr(law, "func", law) is times.noise_angle else 0  # XLA's tangent depends on the batch
    np.testing.assert_allclose(law(keys[17:20]), t[17:20].astype(np.float32), rtol=ulp)


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
    s, t = (np.asarray(a, np.float64) for a in times.ordered_pair(keys, time=times.logit_normal))
    cdf = lambda a: stats.norm.cdf(special.logit(a))
    assert stats.kstest(s, lambda a: 1 - (1 - cdf(a)) ** 2).pvalue > LEVEL
    assert stats.kstest(t, lambda a: cdf(a) ** 2).pvalue > LEVEL


def test_the_earlier_of_two_draws_is_where_an_ordered_pair_starts(keys):
    law = functools.partial(times.logit_normal, mean=0.4)
    s, _ = times.ordered_pair(keys, time=law)
    np.testing.assert_array_equal(times.earlier(keys, time=law), s)
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


def numbers(pair):
    return [np.asarray(a, np.float64) for a in pair]


def test_an_ordered_pair_is_cut_at_its_gap_and_put_on_the_diagonal_by_chance(keys):
    """The free gap has density ``2 (1 - d)``; ``s`` stays, and who lies on the diagonal is drawn apart."""
    s, t = numbers(times.ordered_pair(keys, gap=0.25, diagonal=0.3))
    free_s, free_t = numbers(times.ordered_pair(keys))
    on = s == t
    assert stats.binomtest(int(on.sum()), N, 0.3).pvalue > LEVEL
    assert stats.kstest((free_t - free_s)[on], stats.beta(1, 2).cdf).pvalue > LEVEL  # chance does not see the pair
    np.testing.assert_array_equal(s, free_s)
    np.testing.assert_allclose((t - s)[~on], np.minimum(free_t - free_s, 0.25)[~on], atol=1e-7)
    assert stats.binomtest(int(((t - s)[~on] > 0.2499).sum()), int((~on).sum()), 0.75**2).pvalue > LEVEL
    assert (times.ordered_pair(keys, diagonal=1.0)[1] == times.ordered_pair(keys)[0]).all()
    for options in ({"gap": 0.0}, {"diagonal": -0.1}, {"diagonal": 1.1}):
        with pytest.raises(ValueError, match=r"ordered_pair needs gap > 0 and diagonal in \[0, 1\], got gap="):
            times.ordered_pair(keys, **options)


def test_two_laws_are_independent_and_the_end_is_not_before_the_start(keys):
    """``P(t < a) = F_s(a) F_t(a)``, with an atom of ``t = s`` where the second draw was the smaller."""
    start = functools.partial(times.logit_normal, mean=0.6, std=1.6)
    stop = functools.partial(times.logit_normal, mean=4.0, std=1.6)
    s, t = numbers(times.two_times(keys, start=start, stop=stop))
    first, second = (lambda a, m=m: stats.norm.cdf(special.logit(a), m, 1.6) for m in (0.6, 4.0))
    assert stats.kstest(s, first).pvalue > LEVEL
    assert stats.kstest(t, lambda a: first(a) * second(a)).pvalue > LEVEL
    assert stats.binomtest(int((s == t).sum()), N, stats.norm.cdf(-3.4 / (1.6 * 2**0.5))).pvalue > LEVEL
    s, t = numbers(times.two_times(keys, start=times.uniform, stop=functools.partial(times.uniform, low=0.0)))
    assert (s <= t).all() and stats.binomtest(int((s == t).sum()), N, 0.5).pvalue > LEVEL


def test_pairs_in_either_order_fill_the_square_but_for_a_strip(keys):
    """Both orders alike; the gap has density ``2 (1 - d) / (1 - least)^2``, the lower time is uniform given it."""
    for least in (0.02, 0.3):
        s, t = numbers(times.either_order(keys, least=least))
        gap, low = np.abs(t - s), np.minimum(s, t)
        assert gap.min() > least - 1e-6 and low.min() >= 0 and np.maximum(s, t).max() <= 1 + 1e-6
        assert stats.binomtest(int((t < s).sum()), N, 0.5).pvalue > LEVEL
        assert stats.kstest(gap, lambda d, a=least: 1 - ((1 - np.clip(d, a, 1)) / (1 - a)) ** 2).pvalue > LEVEL
        for part in (gap < 0.4, gap > 0.6, t < s):
            assert stats.kstest((low / (1 - gap))[part], stats.uniform.cdf).pvalue > LEVEL
    for least in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"either_order needs 0 <= least < 1, got least={least}"):
            times.either_order(keys, least=least)


def test_a_pair_by_its_gap_has_a_uniform_start(keys):
    s, t = numbers(times.gap_pair(keys, time=functools.partial(times.logit_normal, mean=-0.8)))
    gap = t - s
    assert stats.kstest(gap, lambda d: stats.norm.cdf(special.logit(np.clip(d, 1e-9, 1 - 1e-9)), -0.8)).pvalue > LEVEL
    for part in (gap < 0.2, gap > 0.5):
        assert stats.kstest((s / (1 - gap))[part], stats.uniform.cdf).pvalue > LEVEL
    assert s.min() >= 0 and t.max() <= 1 + 1e-6


@pytest.mark.parametrize("pair", [times.to_data, times.from_source])
def test_pairs_with_one_end_fixed(pair, keys):
    ends = dict(zip(("s", "t"), numbers(pair(keys, time=times.logit_normal)), strict=True))
    fixed, free = ("t", "s") if pair is times.to_data else ("s", "t")
    assert (ends[fixed] == (fixed == "t")).all()
    assert stats.kstest(ends[free], lambda a: stats.norm.cdf(special.logit(a))).pvalue > LEVEL


def test_dyadic_pairs_have_every_length_and_every_place_alike(keys):
    """Chi-squared over the levels, and within each over the multiples of the gap."""
    s, t = numbers(times.dyadic(keys, levels=4))
    gaps, count = np.unique(t - s, return_counts=True)
    np.testing.assert_array_equal(gaps, [1 / 8, 1 / 4, 1 / 2, 1])
    assert stats.chisquare(count).pvalue > LEVEL
    for gap in gaps[:-1]:
        place, count = np.unique(s[t - s == gap] / gap, return_counts=True)
        np.testing.assert_array_equal(place, np.arange(1 / gap))
        assert stats.chisquare(count).pvalue > LEVEL
    assert (numbers(times.dyadic(keys, levels=1))[1] == 1).all()
    assert len(np.unique(numbers(times.dyadic(keys))[1] - numbers(times.dyadic(keys))[0])) == 7
    with pytest.raises(ValueError, match="dyadic needs at least one level, got levels=0"):
        times.dyadic(keys, levels=0)


@pytest.mark.parametrize(
    "pair",
    [times.ordered_pair, times.two_times, times.either_order, times.gap_pair, times.to_data, times.from_source]
    + [times.dyadic, functools.partial(times.ordered_pair, diagonal=0.5)],
)
def test_a_pair_belongs_to_its_example(pair, keys):
    """Drawn from its key alone: neighbours are uncorrelated, a slice of keys gives a slice of pairs."""
    some = keys[:2000]
    for whole, part in zip(pair(some), pair(some[17:20]), strict=True):
        np.testing.assert_array_equal(part, whole[17:20])
        spread = np.std(whole)
        assert spread == 0 or abs(np.corrcoef(whole[1:], whole[:-1])[0, 1]) * 2000**0.5 < 4.5


def test_a_uniform_grid_has_n_equal_steps_and_exact_ends():
    for n in (1, 7, 10):
        grid = grids.uniform_grid(n)
        assert grid.dtype == np.float32 and grid[0] == 0 and grid[-1] == 1
        np.testing.assert_allclose(grid, np.arange(n + 1) / n, atol=6e-8)
    np.testing.assert_array_equal(grids.uniform_grid(4, start=1.0, stop=0.5), [1, 0.875, 0.75, 0.625, 0.5])
    for n in (0, -1):
        with pytest.raises(ValueError, match=f"at least one step, got n={n}"):
            grids.uniform_grid(n)


@pytest.mark.parametrize("grid", [[0.0, 0.1, 1.0], (1, 0.5, 0), np.linspace(0, 1, 3), jnp.array([0.25, 0.5])])
def test_a_strictly_monotone_grid_passes_unchanged(grid):
    checked = grids.check_grid(grid)
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
        grids.check_grid(grid)


def test_a_traced_grid_is_refused():
    with pytest.raises(TypeError, match="static: pass a numpy array or a list from outside jit"):
        jax.jit(grids.check_grid)(jnp.array([0.0, 1.0]))


def at_progress(share, *progress, apart=0.5, **options):
    one = jnp.ones(len(progress))
    return np.asarray(share(0.25 * one, (0.25 + apart) * one, jnp.array(progress), **options))


def test_alpha_flows_share_falls_from_one_to_its_least_along_a_sigmoid():
    """``1 - sigmoid(25 (p - 1/2))``, one and 0.005 beyond them (arXiv 2510.20771)."""
    progress = np.linspace(0, 1, 21)
    want = 1 - special.expit(25 * (progress - 0.5))
    want = np.where(want > 0.995, 1, np.maximum(want, 0.005))
    got = at_progress(times.sigmoid_fraction, *progress)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (got[[0, -1]] == np.float32([1, 0.005])).all() and got[10] == 0.5
    later = at_progress(times.sigmoid_fraction, *(0.2 + 0.6 * progress), start=0.2, stop=0.8)
    np.testing.assert_allclose(later, want, rtol=1e-5)
    with pytest.raises(ValueError, match="start < stop"):
        at_progress(times.sigmoid_fraction, 0.5, start=1.0, stop=0.5)


def test_soflows_share_falls_exponentially_and_its_step_has_a_least_length():
    progress = np.linspace(0, 1, 5)
    np.testing.assert_allclose(at_progress(times.exponential_fraction, *progress), 0.1 * 0.02**progress, rtol=1e-5)
    short = at_progress(times.exponential_fraction, *progress, apart=1e-3)
    np.testing.assert_allclose(short, 0.1, rtol=1e-4)  # of 1e-3, for the last ones
    assert at_progress(times.exponential_fraction, 0.0, 1.0, apart=0.0).tolist() == [
        1,
        1,
    ]  # of no length: the whole of it
    for options in ({"first": 0.0}, {"last": 2.0}, {"gap": 0.0}):
        with pytest.raises(ValueError, match="exponential_fraction needs shares in"):
            at_progress(times.exponential_fraction, 0.5, **options)


def test_a_constant_share_is_constant_and_a_share():
    assert at_progress(times.constant_fraction, 0.0, 0.9, value=0.25).tolist() == [0.25, 0.25]
    with pytest.raises(ValueError, match="0 < value <= 1, got 0"):
        at_progress(times.constant_fraction, 0.0, value=0.0)


def test_a_grids_jumps_double_from_round_to_round_and_start_anywhere_on_it(keys):
    progress = jnp.arange(N) % 4 / 4.0 + 0.2
    s, t = (np.asarray(a, np.float64) for a in times.grid_pair(keys, progress, steps=24, rounds=4))
    for r in range(4):
        count = 24 // 2**r
        mine = np.arange(N) % 4 == r
        np.testing.assert_allclose((t - s)[mine], 1 / count, rtol=1e-5)
        places, seen = np.unique(np.round(s[mine] * count).astype(int), return_counts=True)
        np.testing.assert_allclose(s[mine] * count, np.round(s[mine] * count), atol=1e-4)
        assert places.tolist() == list(range(count)) and stats.chisquare(seen).pvalue > LEVEL
    last = times.grid_pair(keys, steps=24, rounds=4)
    np.testing.assert_array_equal(last, times.grid_pair(keys, jnp.ones(N), steps=24, rounds=4))
    np.testing.assert_allclose(last[1] - last[0], 1 / 3, rtol=1e-5)
    for options in ({"steps": 20, "rounds": 4}, {"steps": 8, "rounds": 0}):
        with pytest.raises(ValueError, match="grid_pair halves its steps"):
            times.grid_pair(keys, **options)


def test_shares_of_noise_levels_are_shares_up_to_the_ends_and_refuse_what_makes_none():
    """Their values: the consistency losses, in ``test_methods_consistency.py``."""
    s = jnp.array([0.0, 1e-4, 0.5, 1 - 1e-6, 1.0])
    for share in (times.level_fraction, times.ect_fraction):
        for progress in (0.0, 0.5, 1.0):
            a = np.asarray(share(s, jnp.ones(5), jnp.full(5, progress)))
            assert ((a > 0) & (a <= 1)).all() and a[-1] == 1
    one = jnp.ones(1)
    for share, options in (
        (times.level_fraction, {"levels": 0}),
        (times.level_fraction, {"last": 5}),
        (times.level_fraction, {"sigma_min": 90.0}),
        (times.ect_fraction, {"stages": 0}),
        (times.ect_fraction, {"base": 1.0}),
    ):
        with pytest.raises(ValueError, match=f"{share.__name__} needs"):
            share(one, one, one, **options)
    with pytest.raises(ValueError, match="noise_angle needs sigma > 0"):
        times.noise_angle(as_keys(jax.random.key(0), 2), sigma=0.0)


@pytest.mark.parametrize(("m", "n"), [(10, 50), (7, 21), (10, 10), (50, 1000)])
def test_every_time_of_a_grid_is_found_on_one_that_refines_it(m, n):
    coarse, fine = grids.uniform_grid(m), grids.uniform_grid(n)
    assert grids.steps_at(fine, coarse) == tuple(range(0, n + 1, n // m))
    assert grids.steps_at(fine[::-1], coarse[1:3]) == (n - n // m, n - 2 * n // m)
    assert grids.steps_at(fine, []) == ()


def test_a_time_that_a_grid_does_not_have_is_named():
    with pytest.raises(ValueError, match="t=0.5 is not among these 6 times, whose nearest is 0.4"):
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
    with pytest.raises(ValueError, match="t=0.25 is not among these 11 times"):
        grids.per_step(ts, values).check([0.2, 0.25])
    for bad in (values[:-1], 0.5):
        with pytest.raises(ValueError, match="per_step needs one value a time"):
            grids.per_step(ts, bad)
