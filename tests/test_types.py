"""How randomness is handed out, against its law and its invariances; times and axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fmjax import types
from fmjax.keys import as_keys, example_keys, fold_in, is_key, normal, split

LEVEL = 1e-4  # of every goodness-of-fit test here: a correct law fails one seed in ten thousand


def data(key):
    return np.asarray(jax.random.key_data(key))


def test_an_examples_key_is_the_runs_key_folded_with_its_global_index(key):
    got = example_keys(key, jnp.array([5, 0, 17]))
    want = np.stack([data(jax.random.fold_in(key, i)) for i in (5, 0, 17)])
    assert (data(got) == want).all()


def test_a_single_key_becomes_the_keys_of_the_first_examples_whatever_the_batch(key):
    assert (data(as_keys(key, 8)) == data(as_keys(key, 32)[:8])).all()
    assert (data(as_keys(key, 3)) == data(example_keys(key, jnp.arange(3)))).all()
    own = example_keys(key, jnp.array([9, 4]))
    assert as_keys(own, 2) is own


def test_keys_of_the_wrong_kind_or_number_are_refused(key):
    for wrong in (0, None, jax.random.PRNGKey(0), np.zeros(2, np.uint32)):
        assert not is_key(wrong)
        with pytest.raises(TypeError, match=r"typed PRNG key from jax.random.key\(seed\), got "):
            as_keys(wrong, 2)
    with pytest.raises(ValueError, match=r"key has shape \(3,\); give one key, or one per example: shape \(2,\)"):
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


def test_noise_is_standard_normal_and_independent_between_and_within_examples(key):
    n = 20_000
    z = np.asarray(normal(as_keys(key, n), (2, 3)), np.float64)
    assert stats.kstest(z.ravel(), stats.norm.cdf).pvalue > LEVEL
    flat = z.reshape(n, 6)
    pairs = [(flat[:, i], flat[:, j]) for i in range(6) for j in range(i)] + [
        (flat[1:, i], flat[:-1, i]) for i in (0, 5)
    ]
    for a, b in pairs:  # E[ab] = 0 with standard error 1 / sqrt(n)
        assert abs((a * b).mean()) * len(a) ** 0.5 < 4.5


def test_noise_has_the_type_that_was_asked_for(x64, key):
    keys = as_keys(key, 2)
    assert normal(keys, (3,)).dtype == jnp.float32
    assert normal(keys, (3,), jnp.float64).dtype == jnp.float64


def test_expand_scales_every_example_by_its_own_time():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    t = jnp.array([2.0, -1.0])
    np.testing.assert_array_equal(types.expand(t, x) * x, np.stack([2 * x[0], -x[1]]))
    np.testing.assert_array_equal(types.expand(jnp.float32(3), x) * x, 3 * x)
    square = jnp.ones((2, 2))  # where broadcasting along the wrong axis goes unnoticed by shapes
    np.testing.assert_array_equal(types.expand(t, square) * square, [[2, 2], [-1, -1]])


def test_times_are_float32_unless_the_state_is_float64(x64):
    for dtype, want in [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]:
        x = jnp.zeros((3, 2), dtype)
        assert types.over_batch(0.1, x).dtype == want
        assert types.over_batch(jnp.full((3,), 0.1, "float32"), x).dtype == want
    np.testing.assert_array_equal(types.over_batch(0.1, jnp.zeros((3, 2))), [0.1, 0.1, 0.1])
    np.testing.assert_array_equal(types.over_batch(jnp.arange(3.0), jnp.zeros((3, 2))), [0.0, 1.0, 2.0])
    with pytest.raises(ValueError):
        types.over_batch(jnp.zeros(4), jnp.zeros((3, 2)))
