"""Recomputing blocks changes no number, saves memory, and pays in operations, as the compiler counts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.nets import adapters, dit, unet

CASES = {
    "dit": (dit.DiT, {"width": 32, "depth": 2, "heads": 2, "patch": 1, "scan": False}, (8, 8, 1)),
    "scanned dit": (dit.DiT, {"width": 32, "depth": 4, "heads": 2, "patch": 1}, (8, 8, 1)),
    "unet": (unet.UNet, {"channels": 8, "multipliers": (1,), "blocks": 1, "heads": 2}, (8, 8, 1)),
}


# the scanned one is the default; unrolled layers are tested here, too, by the U-Net
@pytest.mark.parametrize("name", ["scanned dit", "unet", pytest.param("dit", marks=pytest.mark.slow)])
def test_the_gradient_is_the_same_for_less_memory_and_more_operations(name, key):
    module, sizes, shape = CASES[name]
    x, rng = jax.random.normal(key, (8, *shape)), np.random.default_rng(0)
    t = jnp.linspace(0.1, 0.9, 8)
    model = adapters.from_linen(module(**sizes))
    shapes = jax.eval_shape(model.init, key, x)
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), "float32"), shapes)
    gradients, kept, memory, operations = {}, {}, {}, {}
    for remat in ("none", "dots", "full"):
        net = adapters.from_linen(module(**sizes, remat=remat)).net
        loss = lambda p, net=net: jnp.mean((net(p, x, t, t) - x) ** 2)
        residuals = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        kept[remat] = sum(a.size for a in jax.tree.leaves(residuals))
        if remat == "dots" and "scanned" not in name:
            continue
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        gradients[remat] = compiled(params)
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        operations[remat] = compiled.cost_analysis()["flops"]
    for got in gradients.values():
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients["none"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(1, float(jnp.abs(b).max())))
    assert kept["full"] < 0.5 * kept["none"] and kept["full"] < kept["dots"] < 0.8 * kept["none"]
    assert operations["full"] > 1.1 * operations["none"]
    if "scanned" in name:  # on a CPU only a loop keeps XLA from computing all of it early
        assert memory["full"] < memory["dots"] < 0.8 * memory["none"]
        assert operations["full"] > operations["dots"]


def test_it_has_a_derivative_forward_and_back(key):
    """The gradient of a jvp in time through recomputed blocks is that through plain ones."""
    module, sizes, shape = CASES["dit"]
    sizes = sizes | {"depth": 1}
    x, t, rng = jax.random.normal(key, (2, *shape)), jnp.array([0.2, 0.7]), np.random.default_rng(0)
    shapes = jax.eval_shape(adapters.from_linen(module(**sizes)).init, key, x)
    params = jax.tree.map(lambda a: jnp.asarray(0.3 * rng.standard_normal(a.shape), "float32"), shapes)

    def gradient(remat):
        net = adapters.from_linen(module(**sizes, remat=remat)).net
        rate = lambda p: jax.jvp(lambda t: net(p, x, 0 * t, t), (t,), (jnp.ones_like(t),))[1]
        return jax.jit(jax.grad(lambda p: jnp.mean(rate(p) ** 2)))(params)

    for a, b in zip(*map(jax.tree.leaves, map(gradient, ("none", "full"))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(1, float(jnp.abs(a).max())))
