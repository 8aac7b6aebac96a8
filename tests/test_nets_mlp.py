"""The MLP against its formula in numpy, and its parameters against their count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.nets import adapters, embedding, mlp


def count(width, depth, d, classes):
    dense = lambda i, o: i * o + o
    times = dense(64, width) + 64 * width + dense(width, width)
    labels = (classes + 1) * width if classes else 0
    block = dense(width, 2 * width) + 2 * dense(width, width)
    return times + labels + dense(d, width) + depth * block + 2 * width + dense(width, d)


@pytest.mark.parametrize(
    ("width", "depth", "shape", "classes"), [(16, 2, (5,), 0), (256, 3, (8, 8, 1), 10), (8, 0, (2, 3), 1)]
)
def test_the_number_of_parameters(width, depth, shape, classes, key):
    model = adapters.from_linen(mlp.MLP(width=width, depth=depth, classes=classes))
    labels = jnp.zeros((2,), jnp.int32) if classes else None
    params = jax.eval_shape(model.init, key, jnp.zeros((2, *shape)), labels)
    assert sum(a.size for a in jax.tree.leaves(params)) == count(width, depth, int(np.prod(shape)), classes)


def test_the_network_is_its_formula(x64, key):
    """FiLM by the two times and the label, ``h + W2 gelu(W1 (norm(h) (1 + a) + b))``, in float64."""
    width, depth, shape = 8, 2, (2, 3)
    model = adapters.from_linen(mlp.MLP(width=width, depth=depth, classes=2, dtype="float64"))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, *shape)))
    s, t, label = jnp.array([0.1, 0.2, 0.3, 0.4]), jnp.array([0.9, 0.2, 0.6, 0.8]), jnp.array([0, 1, 2, 0])
    shapes, rng = jax.eval_shape(model.init, key, x, label), np.random.default_rng(0)
    p = jax.tree.map(lambda a: 0.5 * rng.standard_normal(a.shape), shapes)

    dense = lambda h, name: h @ p[name]["kernel"] + p[name]["bias"]
    norm = lambda h: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    gelu = lambda h: h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    e = jax.jit(embedding.TwoTimes(width).apply)({"params": p["TwoTimes_0"]}, s, t)
    e = np.asarray(e) + p["Embed_0"]["embedding"][np.asarray(label)]
    e = e / (1 + np.exp(-e))
    h = dense(np.asarray(x).reshape(4, 6), "input")
    for i in range(depth):
        a, b = np.split(dense(e, f"film_{i}"), 2, 1)
        h = h + dense(gelu(dense(norm(h) * (1 + a) + b, f"up_{i}")), f"down_{i}")
    scale = p[f"LayerNorm_{depth}"]
    want = dense(norm(h) * scale["scale"] + scale["bias"], "output").reshape(x.shape)
    np.testing.assert_allclose(jax.jit(model.net)(p, x, s, t, label), want, rtol=1e-10, atol=1e-10)
