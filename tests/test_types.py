"""Times and axes, null conditions, and what a step states of itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import types


def test_expand_scales_every_example_by_its_time():
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


def test_the_null_label_replaces_labels_and_keeps_the_guidance_scale():
    labels, scale = jnp.array([3, 1]), jnp.array([1.5, 2.0])
    replaced = types.with_null((labels, scale), 9)
    np.testing.assert_array_equal(replaced[0], [9, 9])
    assert replaced[1] is scale and types.with_null(labels, None) is None
    both = types.with_null({"a": labels, "b": scale}, {"a": 9, "b": 0.0})
    assert both["a"].dtype == labels.dtype and both["b"].dtype == scale.dtype
    np.testing.assert_array_equal(both["b"], [0.0, 0.0])


def test_an_example_is_null_where_all_leaves_are_null():
    cond = {"a": jnp.array([9, 9, 1]), "b": jnp.array([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])}
    np.testing.assert_array_equal(types.is_null(cond, {"a": 9, "b": jnp.zeros(2)}), [True, False, False])


def test_a_statement_is_read_through_jit_and_partial():
    step = types.Costed(lambda x: 2 * x, nfe=3)
    for wrapped in (step, functools.partial(step), jax.jit(step), functools.partial(jax.jit(step))):
        assert types.stated(wrapped) is step
    assert step(4) == 8 and jax.jit(step)(4) == jax.jit(step)(4) == 8  # twice: a tuple would end the process
    multistep = types.Multistep(lambda x: x, lambda memory, *args: (args[0], memory), nfe=2)
    assert types.stated(multistep) is multistep


def test_a_plain_function_states_no_cost_and_accepts_all_times():
    plain = types.stated(abs)
    assert plain.apply is abs and plain.nfe is None and plain.check([0.0, 2.0]) is None
