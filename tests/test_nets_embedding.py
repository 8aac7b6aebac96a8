"""The embedding of two times against its formula."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.nets import embedding


def phi(t, n=64, top=16.0):
    angle = np.asarray(t)[:, None] * top ** (np.arange(n // 2) / (n // 2 - 1))
    return np.concatenate([np.cos(angle), np.sin(angle)], 1)


def test_sinusoids_are_log_spaced_up_to_the_stated_frequency(x64):
    t = jnp.array([0.0, 0.3, 1.0])
    features = jax.jit(lambda t: jax.jvp(lambda t: embedding.sinusoid(t, 64), (t,), (jnp.ones_like(t),)))
    np.testing.assert_allclose(features(t)[0], phi(t), atol=1e-13)
    fast = jax.jit(lambda t: embedding.sinusoid(t, 8, max_frequency=100.0))
    np.testing.assert_allclose(fast(t), phi(t, 8, 100.0), atol=1e-12)
    _, speed = features(np.linspace(0, 1, 200))
    assert 15.9 < np.abs(speed).max() <= 16  # the time derivative does not explode


def test_slow_sinusoids_are_those_of_ddpm_at_times_in_0_1(x64):
    """Frequencies from 1 down to 10000^(-(n - 1) / n) radians, cosines first, as torchcfm has them."""
    t = np.array([0.0, 0.3, 1.0])
    angle = t[:, None] * np.array([1, 0.1, 0.01, 0.001])
    want = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    np.testing.assert_allclose(embedding.slow_sinusoid(jnp.asarray(t), 8), want, atol=1e-13)
    angle = t[:, None] * 1e4 ** -(np.arange(4) / 3)  # to the end of the range, as score SDE has them
    want = np.concatenate([np.cos(angle), np.sin(angle)], 1)
    np.testing.assert_allclose(embedding.slow_sinusoid(jnp.asarray(t), 8, endpoint=True), want, atol=1e-13)


def test_an_unknown_spectrum_is_refused():
    with pytest.raises(ValueError, match="spectrum='fast'"):
        embedding.TwoTimes(4, spectrum="fast")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_times_are_embedded_in_float32_at_least(dtype):
    t = jnp.array([0.0, 0.25, 0.75], dtype)  # exact in every type
    got = embedding.sinusoid(t, 64)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, phi([0.0, 0.25, 0.75]), atol=2e-6)


def test_two_times_are_a_source_and_a_jump_that_vanishes_at_zero(x64, key):
    """``mix(silu(source(phi(s)) + W (phi(t - s) - phi(0))))`` with random weights, in float64."""
    module = embedding.TwoTimes(12)
    s, t = np.array([0.1, 0.5, 0.9, 0.4]), np.array([0.7, 0.5, 0.95, 0.0])
    first = jax.jit(lambda s, t: module.init(key, s, t)["params"])(s, t)
    assert not np.any(first["jump"]["kernel"]) and set(first) == {"source", "jump", "mix"}
    rng = np.random.default_rng(0)
    p = jax.tree.map(lambda a: rng.standard_normal(a.shape), first)
    e = phi(s) @ p["source"]["kernel"] + p["source"]["bias"] + (phi(t - s) - phi(0 * s)) @ p["jump"]["kernel"]
    want = e / (1 + np.exp(-e)) @ p["mix"]["kernel"] + p["mix"]["bias"]
    apply = jax.jit(lambda *args: module.apply({"params": p}, *args))
    np.testing.assert_allclose(apply(s, t), want, atol=1e-12)
    np.testing.assert_allclose(apply(s - 1, t - 1, phi(s)), want, atol=1e-12)  # features given, not computed from s
    assert sum(a.size for a in jax.tree.leaves(p)) == (64 * 12 + 12) + 64 * 12 + (12 * 12 + 12)


def test_a_guidance_scale_is_embedded_as_its_gain_less_that_of_no_guidance(x64):
    """``e + E[label] + W (phi(1 - 1/w) - phi(0))`` with random weights, in float64."""
    rng = np.random.default_rng(0)
    e, table, w = rng.standard_normal((3, 8)), rng.standard_normal((4, 8)), rng.standard_normal((64, 8))

    class Conditioned(nn.Module):
        @nn.compact
        def __call__(self, e, cond):
            return embedding.condition(e, cond, classes=3, guided=True)

    params = {"Embed_0": {"embedding": jnp.asarray(table)}, "scale": {"kernel": jnp.asarray(w)}}
    label, scale = np.array([0, 3, 1]), np.array([1.0, 2.0, 8.0])
    got = jax.jit(lambda *cond: Conditioned().apply({"params": params}, jnp.asarray(e), cond))(label, scale)
    want = e + table[label] + (phi(1 - 1 / scale) - phi(0 * scale)) @ w
    np.testing.assert_allclose(got, want, atol=1e-12)
