"""Keys per example: their distribution, their invariances, and the refusal of other keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fmjax import times
from fmjax.keys import as_keys, example_keys, fold_in, is_key, normal, split

LEVEL = 1e-4  # of every goodness-of-fit test here: a correct distribution fails one seed in ten thousand


def data(key):
    return np.asarray(jax.random.key_data(key))


def test_an_examples_key_is_folded_with_its_global_index(key):
    got = example_keys(key, jnp.array([5, 0, 17]))
    want = np.stack([data(jax.random.fold_in(key, i)) for i in (5, 0, 17)])
    assert (data(got) == want).all()


def test_one_key_gives_the_same_example_keys_for_every_batch_size(key):
    assert (data(as_keys(key, 8)) == data(as_keys(key, 32)[:8])).all()
    assert (data(as_keys(key, 3)) == data(example_keys(key, jnp.arange(3)))).all()
    own = example_keys(key, jnp.array([9, 4]))
    assert as_keys(own, 2) is own


def test_keys_of_the_wrong_kind_or_number_are_refused(key):
    for wrong in (0, None, jax.random.PRNGKey(0), np.zeros(2, np.uint32)):
        assert not is_key(wrong)
        with pytest.raises(TypeError, match=r"key=.*jax.random.key\(seed\)"):
            as_keys(wrong, 2)
    with pytest.raises(ValueError, match=r"key.shape=\(3,\).*\(2,\)"):
        as_keys(jax.random.split(key, 3), 2)


def test_no_two_derived_keys_are_the_same(key):
    """Split three ways or folded with three steps, 64 examples. (Not both: JAX folds with ``i`` as it splits.)"""
    keys = as_keys(key, 64)
    for parts in (split(keys, 3), tuple(fold_in(keys, i) for i in range(3))):
        assert all(part.shape == (64,) for part in parts)
        assert len(np.unique(np.concatenate([data(part) for part in (keys, *parts)]), axis=0)) == 4 * 64


def test_split_and_fold_in_act_example_by_example(key):
    keys = as_keys(key, 6)
    for whole, part in zip(split(keys, 2), split(keys[2:4], 2), strict=True):
        assert (data(whole)[2:4] == data(part)).all()
    assert (data(fold_in(keys, 3))[2:4] == data(fold_in(keys[2:4], 3))).all()
    assert (data(fold_in(keys, 3)[1]) == data(jax.random.fold_in(keys[1], 3))).all()


def test_noise_is_standard_normal_and_independent(key):
    n = 20_000
    z = np.asarray(normal(as_keys(key, n), (2, 3)), np.float64)
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > LEVEL
    flat = z.reshape(n, 6)
    pairs = [(flat[:, i], flat[:, j]) for i in range(6) for j in range(i)] + [
        (flat[1:, i], flat[:-1, i]) for i in (0, 5)
    ]
    for a, b in pairs:  # E[ab] = 0 with standard error 1 / sqrt(n)
        assert abs((a * b).mean()) * len(a) ** 0.5 < 4.5


def test_noise_has_the_requested_type(x64, key):
    keys = as_keys(key, 2)
    assert normal(keys, (3,)).dtype == jnp.float32
    assert normal(keys, (3,), jnp.float64).dtype == jnp.float64


def test_one_key_acts_as_the_key_of_one_example(key):
    """Functions of keys, and time distributions, accept one key as well as ``[B]`` keys."""

    @jax.jit
    def draws(k):
        pair, grid = times.ordered_pair(k, diagonal=0.5), times.grid_pair(k)
        return (
            normal(k, (2,)),
            *map(jax.random.key_data, (*split(k, 2), fold_in(k, 5))),
            times.u_shaped(k),
            *pair,
            *grid,
        )

    single = as_keys(key, 3)[1]
    for alone, batched in zip(draws(single), draws(single[None]), strict=True):
        np.testing.assert_array_equal(alone, batched[0])
