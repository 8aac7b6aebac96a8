"""Training times against their distribution functions; grids against the definition and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from fmjax import times
from fmjax.keys import as_keys

LEVEL = 1e-4  # of every goodness-of-fit test here: a correct distribution fails one seed in ten thousand
N = 20_000


@pytest.fixture
def keys(key):
    return as_keys(key, N)


@pytest.mark.parametrize(
    ("time", "cdf"),
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
        (times.u_shaped, lambda t: 0.5 * (1 + (np.expm1(4 * t) - np.expm1(4 * (1 - t))) / np.expm1(4))),
        (times.noise_level, lambda t: 1 - stats.norm.cdf(np.log((1 - t) / t), -1.1, 2.0)),
        (
            functools.partial(times.noise_angle, sigma=0.5),
            lambda t: 1 - stats.norm.cdf(np.log(0.5 * np.tan(np.pi / 2 * (1 - t))), -1.0, 1.4),
        ),
    ],
)
def test_training_times_have_the_stated_distribution(time, cdf, keys):
    t = np.asarray(time(keys), np.float64)
    assert stats.kstest(t, cdf).pvalue > LEVEL
    assert abs(np.corrcoef(t[1:], t[:-1])[0, 1]) * N**0.5 < 4.5
    ulp = 2e-7 if getattr(time, "func", time) is times.noise_angle else 0  # XLA's tangent depends on the batch
    np.testing.assert_allclose(time(keys[17:20]), t[17:20].astype(np.float32), rtol=ulp)


def test_interior_times_keep_their_margin(keys):
    t = np.asarray(times.interior(keys, margin=0.4))
    assert t.min() >= np.float32(0.4) and t.max() <= np.float32(0.6)
    for margin in (0.0, 0.5, -0.1):
        with pytest.raises(ValueError, match=f"margin={margin}"):
            times.interior(keys, margin=margin)


def test_an_ordered_pair_is_uniform_on_the_triangle(keys):
    """Density 2 on ``s <= t``: ``t ~ Beta(2, 1)``, ``s ~ Beta(1, 2)``, and ``s / t ~ U[0, 1]`` whatever ``t`` is."""
    s, t = (np.asarray(a, np.float64) for a in times.ordered_pair(keys))
    assert (s <= t).all()
    assert stats.kstest(s, stats.beta(1, 2).cdf).pvalue > LEVEL
    assert stats.kstest(t, stats.beta(2, 1).cdf).pvalue > LEVEL
    for part in (t < 0.5, t > 0.8):
        assert stats.kstest((s / t)[part], stats.uniform.cdf).pvalue > LEVEL


def test_an_ordered_pair_has_the_order_statistics_of_its_times(keys):
    """``P(s < a) = 1 - (1 - F(a))^2`` and ``P(t < a) = F(a)^2``."""
    s, t = (np.asarray(a, np.float64) for a in times.ordered_pair(keys, time=times.logit_normal))
    cdf = lambda a: stats.norm.cdf(special.logit(a))
    assert stats.kstest(s, lambda a: 1 - (1 - cdf(a)) ** 2).pvalue > LEVEL
    assert stats.kstest(t, lambda a: cdf(a) ** 2).pvalue > LEVEL


def test_the_earlier_time_is_the_start_of_an_ordered_pair(keys):
    time = functools.partial(times.logit_normal, mean=0.4)
    s, _ = times.ordered_pair(keys, time=time)
    np.testing.assert_array_equal(times.earlier(keys, time=time), s)
    assert stats.kstest(np.asarray(times.earlier(keys)), stats.beta(1, 2).cdf).pvalue > LEVEL


def test_a_terminal_pair_has_a_logit_normal_gap_and_truncated_end(keys):
    """``d ~ LN(-.8, 1)``; given it ``(F(t) - F(d)) / (1 - F(d)) ~ U[0, 1]``, whatever it is, ``F`` of ``LN(.4, 1)``."""
    s, t = (np.asarray(a, np.float64) for a in times.terminal_pair(keys))
    assert s.min() >= 0 and t.max() <= 1
    gap, normal = t - s, lambda mean: lambda t: stats.norm.cdf(special.logit(t), mean)
    assert stats.kstest(gap, normal(-0.8)).pvalue > LEVEL
    cdf = normal(0.4)
    quantile = (cdf(t) - cdf(gap)) / (1 - cdf(gap))
    for part in (gap < 0.2, (gap > 0.3) & (gap < 0.5), gap > 0.7):
        assert stats.kstest(quantile[part], stats.uniform.cdf).pvalue > LEVEL
    s, t = times.terminal_pair(keys, gap_mean=6.0)  # gaps up to one, where the tail has no digits left in float32
    assert jnp.isfinite(s).all() and (s >= 0).all() and (t <= 1).all()
    with pytest.raises(ValueError, match="std=0.0"):
        times.terminal_pair(keys, std=0.0)


def numbers(pair):
    return [np.asarray(a, np.float64) for a in pair]


def test_an_ordered_pair_has_a_longest_gap_and_a_diagonal(keys):
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
    for name, value in (("gap", 0.0), ("diagonal", -0.1), ("diagonal", 1.1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            times.ordered_pair(keys, **{name: value})


def test_two_times_are_independent_up_to_their_order(keys):
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


def test_pairs_in_either_order_fill_the_square_except_a_strip(keys):
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
        with pytest.raises(ValueError, match=f"least={least}"):
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


def test_dyadic_pairs_are_uniform_over_lengths_and_starts(keys):
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
    with pytest.raises(ValueError, match="levels=0"):
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


def at_progress(fraction, *progress, apart=0.5, **options):
    ones = jnp.ones(len(progress))
    return np.asarray(fraction(0.25 * ones, (0.25 + apart) * ones, jnp.array(progress), **options))


def test_the_fraction_of_alpha_flow_follows_a_sigmoid():
    """``1 - sigmoid(25 (p - 1/2))``, one and 0.005 beyond them (arXiv 2510.20771)."""
    progress = np.linspace(0, 1, 21)
    want = 1 - special.expit(25 * (progress - 0.5))
    want = np.where(want > 0.995, 1, np.maximum(want, 0.005))
    got = at_progress(times.sigmoid_fraction, *progress)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert (got[[0, -1]] == np.float32([1, 0.005])).all() and got[10] == 0.5
    later = at_progress(times.sigmoid_fraction, *(0.2 + 0.6 * progress), start=0.2, stop=0.8)
    np.testing.assert_allclose(later, want, rtol=1e-5)
    with pytest.raises(ValueError, match="stop=0.5"):
        at_progress(times.sigmoid_fraction, 0.5, start=1.0, stop=0.5)


def test_the_fraction_of_soflow_decreases_exponentially():
    progress = np.linspace(0, 1, 5)
    np.testing.assert_allclose(at_progress(times.exponential_fraction, *progress), 0.1 * 0.02**progress, rtol=1e-5)
    short = at_progress(times.exponential_fraction, *progress, apart=1e-3)
    np.testing.assert_allclose(short, 0.1, rtol=1e-4)  # of 1e-3, for the last ones
    assert at_progress(times.exponential_fraction, 0.0, 1.0, apart=0.0).tolist() == [1, 1]  # a jump of length zero
    for name, value in (("first", 0.0), ("last", 2.0), ("gap", 0.0)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            at_progress(times.exponential_fraction, 0.5, **{name: value})


def test_a_constant_fraction_is_constant():
    assert at_progress(times.constant_fraction, 0.0, 0.9, value=0.25).tolist() == [0.25, 0.25]
    with pytest.raises(ValueError, match="value=0"):
        at_progress(times.constant_fraction, 0.0, value=0.0)


def test_the_steps_of_a_grid_double_from_round_to_round(keys):
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
    for options, message in (({"steps": 20, "rounds": 4}, "steps=20"), ({"steps": 8, "rounds": 0}, "rounds=0")):
        with pytest.raises(ValueError, match=message):
            times.grid_pair(keys, **options)


def test_fractions_of_noise_levels_lie_in_their_range():
    """Their values: the consistency losses, in ``test_methods_consistency.py``."""
    s = jnp.array([0.0, 1e-4, 0.5, 1 - 1e-6, 1.0])
    for fraction in (times.level_fraction, times.ect_fraction):
        for progress in (0.0, 0.5, 1.0):
            a = np.asarray(fraction(s, jnp.ones(5), jnp.full(5, progress)))
            assert ((a > 0) & (a <= 1)).all() and a[-1] == 1
    ones = jnp.ones(1)
    for fraction, name, value in (
        (times.level_fraction, "levels", 0),
        (times.level_fraction, "last", 5),
        (times.level_fraction, "sigma_max", 0.001),
        (times.ect_fraction, "stages", 0),
        (times.ect_fraction, "base", 1.0),
    ):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            fraction(ones, ones, ones, **{name: value})
    with pytest.raises(ValueError, match="sigma=0.0"):
        times.noise_angle(as_keys(jax.random.key(0), 2), sigma=0.0)
    with pytest.raises(ValueError, match="sharpness=0.0"):
        times.u_shaped(as_keys(jax.random.key(0), 2), sharpness=0.0)
