"""The plain MLP against its formula in numpy, and its jump."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from fmjax.nets import adapters, plain


@pytest.fixture(scope="module")
def setting():
    """A network of 3 layers of 8 on points ``[5, 3]``, every parameter moved away from its first value."""
    model = adapters.from_linen(plain.Plain(width=8, depth=3, waves=2, times=1))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((5, 3), np.float32))
    s, t = jnp.linspace(0, 0.6, 5), jnp.linspace(0.9, 0.7, 5)
    first = model.init(jax.random.key(0), x)
    moved = jax.tree.map(lambda a: np.asarray(a) + 0.3 * rng.standard_normal(a.shape, np.float32), first)
    return jax.jit(model.net), first, moved, (x, s, t)


def test_it_is_its_formula(setting):
    net, _, p, args = setting
    x, s, t = map(np.asarray, args)
    gelu = lambda h: h * special.ndtr(h)
    dense = lambda name, h: h @ np.asarray(p[name]["kernel"]) + np.asarray(p[name].get("bias", 0))
    waves = lambda a, n: [f(2**k * np.pi * a) for k in range(n) for f in (np.sin, np.cos)]
    at = lambda a: a[:, None]
    gap = at(t - s)
    h = dense("input", np.concatenate([x, at(s), *waves(x, 2), *waves(at(s), 1)], 1))
    h = h + dense("jump", np.concatenate([gap, np.sin(np.pi * gap), np.cos(np.pi * gap) - 1], 1))
    for name in ("hidden_0", "hidden_1"):
        h = dense(name, gelu(h))
    # gelu's tanh form is within 5e-4 of the normal distribution's
    actual = np.asarray(net(p, *args))
    np.testing.assert_allclose(actual, dense("output", gelu(h)), atol=0.02)
    assert np.abs(actual - net(p, *args[:2], args[1])).max() > 0.2


def test_the_jump_starts_at_zero_and_vanishes_on_the_diagonal(setting):
    net, first, moved, (x, s, t) = setting
    assert not np.any(net(first, x, s, t))
    untrained = moved | {"jump": first["jump"]}
    np.testing.assert_array_equal(net(untrained, x, s, t), net(untrained, x, s, s))
    np.testing.assert_array_equal(net(moved, x, s, s), net(untrained, x, s, s))


def test_without_waves_its_inputs_are_the_point_and_the_times():
    model = adapters.from_linen(plain.Plain(width=8, depth=1, waves=0, times=0))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2)))
    assert params["input"]["kernel"].shape == (3, 8) and params["jump"]["kernel"].shape == (1, 8)
    assert sum(a.size for a in jax.tree.leaves(params)) == 3 * 8 + 8 + 8 + 8 * 2 + 2
