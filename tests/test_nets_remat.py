"""Recomputing blocks changes no number, saves memory, and pays in operations, as the compiler counts them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.nets import adapters, dit, unet
from fmjax.nets.remat import rematerialised

CASES = {
    "dit": (dit.DiT, {"width": 32, "depth": 2, "heads": 2, "patch": 1, "scan": False}, (8, 8, 1)),
    "scanned dit": (dit.DiT, {"width": 32, "depth": 4, "heads": 2, "patch": 1}, (8, 8, 1)),
    "unet": (unet.UNet, {"channels": 8, "multipliers": (1,), "blocks": 0, "heads": 2}, (8, 8, 1)),
}


# the scanned one is the default; unrolled layers are tested here, too, by the U-Net
@pytest.mark.parametrize("name", ["scanned dit", "unet", pytest.param("dit", marks=pytest.mark.slow)])
def test_the_gradient_is_the_same_for_less_memory_and_more_operations(name, key):
    module, sizes, shape = CASES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, *shape)), "float32")
    t = jnp.linspace(0.1, 0.9, 8)
    model = adapters.from_linen(module(**sizes))
    shapes = jax.eval_shape(model.init, key, x)
    params = jax.tree.map(lambda a: np.asarray(0.3 * rng.standard_normal(a.shape), "float32"), shapes)
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
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(1, float(np.abs(b).max())))
    assert kept["full"] < 0.5 * kept["none"] and kept["full"] < kept["dots"] < 0.8 * kept["none"]
    assert operations["full"] > 1.1 * operations["none"]
    if "scanned" in name:  # on a CPU only a loop keeps XLA from computing all of it early
        assert memory["full"] < memory["dots"] < 0.8 * memory["none"]
        assert operations["full"] > operations["dots"]


def test_recomputed_blocks_have_a_derivative_forward_and_back(key):
    """The gradient of a jvp through a recomputed block is the gradient through a plain one."""
    rng = np.random.default_rng(0)
    h, dh, e = (jnp.asarray(rng.standard_normal(shape), "float32") for shape in ((2, 9, 8), (2, 9, 8), (2, 6)))
    shapes = jax.eval_shape(dit.Block(2).init, key, h, e)
    params = jax.tree.map(lambda a: np.asarray(0.3 * rng.standard_normal(a.shape), "float32"), shapes)

    def gradient(remat):
        block = rematerialised(dit.Block, remat, static=(3,))(2)
        rate = lambda p: jax.jvp(lambda h: block.apply(p, h, e, False), (h,), (dh,))[1]
        return jax.jit(jax.grad(lambda p: jnp.mean(rate(p) ** 2)))(params)

    plain = jax.tree.map(np.asarray, gradient("none"))
    for a, b in zip(*map(jax.tree.leaves, (plain, gradient("full"))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * max(1, float(np.abs(a).max())))
    assert max(np.abs(a).max() for a in jax.tree.leaves(plain)) > 0.01
