"""The recursion of discrete consistency training: its order, and that the loss of the library has it as minimiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import methods, oracles
from fmjax.keys import as_keys
from fmjax.types import Batch


@pytest.mark.parametrize("variance", [0.5, 2.0])
def test_the_bias_is_of_order_one_and_shrinks_the_variance(variance):
    ns = np.array([50, 100, 200, 400, 800])
    ends = np.array([oracles.consistency_maps(variance, int(n))[-1] for n in ns])
    assert (ends < variance**0.5).all()
    order = -np.polyfit(np.log(ns), np.log(variance**0.5 - ends), 1)[0]
    assert abs(order - 1) < 0.03
    if variance == 0.5:
        assert abs(0.5**0.5 - ends[1] - 9.4e-3) < 1e-4


def test_the_consistency_loss_has_the_recursion_as_minimiser(x64):
    """``X_{s,1}(x) = a x`` at neighbours of the grid, the earlier map as the target: the gradient is zero at a_i."""
    n, variance, i = 10, 0.5, 4
    maps = oracles.consistency_maps(variance, n)
    s, m = 1 - i / n, 1 - (i - 1) / n
    net = lambda params, x, s, t, cond=None, key=None: (params - 1) * x / (t - s)[:, None]
    loss = methods.consistency(
        net, time=lambda key: jnp.full(key.shape, s), distance="squared", weight="none", bootstrap="target",
        fraction=lambda s, t, progress: jnp.full_like(s, (m - s) / (1 - s)),
    ).loss  # fmt: skip
    x1 = variance**0.5 * jax.random.normal(jax.random.key(0), (200_000, 1))
    each = lambda a: loss(a, jnp.asarray(maps[i - 1]), Batch(x1), as_keys(jax.random.key(1), len(x1)))[1]["per_example"]
    slope = lambda a: jax.jvp(each, (jnp.asarray(a),), (jnp.ones(()),))[1]
    at, away = slope(maps[i]), slope(maps[i] + 0.02)
    error = at.std() / len(at) ** 0.5
    assert abs(at.mean()) < 4.5 * error and away.mean() > 9 * error


def test_the_number_of_steps_is_the_smallest_within_the_bound():
    bound = lambda t, d, scale: scale**3 * d**2.5 * np.log(t) ** 5 / t
    for d, eps, scale in ((2, 1.0, 1.0), (16, 0.1, 2.0)):
        n = oracles.sufficient_steps(d, eps, lipschitz=scale)
        assert bound(n, d, scale) <= eps < bound(n - 1, d, scale)
    ratio = oracles.sufficient_steps(64, 0.01) / oracles.sufficient_steps(32, 0.01)
    assert 2**2.5 < ratio < 2**2.5 * 1.6  # d^(5/2) and a logarithm
    with pytest.raises(ValueError, match="^dim=0"):
        oracles.sufficient_steps(0, 1.0)
