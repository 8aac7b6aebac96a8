"""The DiT: published sizes, its formula in numpy, its start as the identity, derivatives, layers scanned or not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from fmjax.nets import adapters, dit, embedding

PUBLISHED = {"S": 32_963_360, "B": 130_512_416, "L": 458_102_816, "XL": 675_129_632}
SMALL = {"width": 8, "depth": 2, "heads": 2, "classes": 3}


def random_like(tree, kind="float64"):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: np.asarray(0.4 * rng.standard_normal(a.shape), kind), tree)


def normal(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_number_of_parameters_is_the_published_one(size, key):
    """Table 4 of the paper: 33M, 130M, 458M, 675M, exactly those of the authors' patch-2 models on latents.

    Theirs count the 256 fixed positions; ours add a second time, and a scale for queries and keys in each block.
    """
    width, depth, heads = dit.SIZES[size]
    model = adapters.from_linen(dit.DiT(size=size, classes=1000, outputs=2))
    params = jax.eval_shape(model.init, key, jnp.zeros((1, 32, 32, 4)), jnp.zeros(1, "int32"))
    added = params["TwoTimes_0"].pop("jump")["kernel"].size
    assert added == 64 * width
    added = sum(params["blocks"].pop(n)["scale"].size for n in ("q_norm", "k_norm"))
    assert added == 2 * depth * width // heads
    assert sum(a.size for a in jax.tree.leaves(params)) == PUBLISHED[size] - 256 * width
    assert {"S": 33, "B": 130, "L": 458, "XL": 675}[size] == pytest.approx(PUBLISHED[size] / 1e6, abs=0.6)


def formula(p, x, e, *, heads, patch):
    """A DiT on ``x: [B, H, W, C]`` with the embedding ``e`` given, written out token by token."""
    b, height, width, c = x.shape
    rows, columns, d = height // patch, width // patch, e.shape[1]
    dense = lambda h, p: h @ p["kernel"] + p["bias"]
    norm = lambda h: (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    rms = lambda h, p: h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p["scale"]
    gelu = lambda h: h / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    e = e * special.expit(e)
    tokens = []
    for i in range(rows):
        for j in range(columns):
            w = 1e4 ** (-np.arange(d // 4) / (d // 4))
            place = np.concatenate([np.sin(i * w), np.cos(i * w), np.sin(j * w), np.cos(j * w)])
            piece = x[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch].reshape(b, -1)
            tokens.append(dense(piece, p["input"]) + place)
    h = np.stack(tokens, 1)
    for n in range(len(p["blocks"]["qkv"]["bias"])):
        q = jax.tree.map(lambda a, n=n: a[n], p["blocks"])
        a1, b1, g1, a2, b2, g2 = np.split(dense(e, q["film"])[:, None], 6, -1)
        qkv = np.split(dense(norm(h) * (1 + a1) + b1, q["qkv"]), 3, -1)
        y = []
        for head in np.split(np.arange(d), heads):
            queries, keys = rms(qkv[0][..., head], q["q_norm"]), rms(qkv[1][..., head], q["k_norm"])
            y.append(special.softmax(queries @ keys.swapaxes(1, 2) / np.sqrt(len(head)), -1) @ qkv[2][..., head])
        h = h + g1 * dense(np.concatenate(y, -1), q["out"])
        h = h + g2 * dense(gelu(dense(norm(h) * (1 + a2) + b2, q["up"])), q["down"])
    a, shift = np.split(dense(e, p["film"])[:, None], 2, -1)
    out = dense(norm(h) * (1 + a) + shift, p["output"])
    image = np.zeros((b, height, width, out.shape[-1] // patch**2))
    for k in range(rows * columns):
        i, j = divmod(k, columns)
        piece = out[:, k].reshape(b, patch, patch, -1)
        image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = piece
    return image


def test_the_network_is_its_formula(x64, key):
    """On a picture that is not square; to float32, in which jax takes the softmax."""
    model = adapters.from_linen(dit.DiT(**SMALL, outputs=2, dtype="float64"))
    x, label = normal(3, 4, 6, 2, dtype="float64"), jnp.array([0, 3, 1])
    s, t = jnp.array([0.1, 0.5, 0.9]), jnp.array([0.4, 0.5, 1.0])
    params = random_like(jax.eval_shape(model.init, key, x, label))
    p = jax.tree.map(np.asarray, params)
    e = jax.jit(embedding.TwoTimes(8, 256).apply)({"params": params["TwoTimes_0"]}, s, t)
    want = formula(p, np.asarray(x), np.asarray(e) + p["Embed_0"]["embedding"][np.asarray(label)], heads=2, patch=2)
    assert want.std() > 0.3
    np.testing.assert_allclose(jax.jit(model.net)(params, x, s, t, label), want, rtol=2e-6, atol=2e-6)


def test_every_block_starts_as_the_identity(key):
    """adaLN-Zero: whatever the other weights, what leaves a block is what entered it."""
    module = dit.Block(2)
    h, e = normal(2, 5, 8), normal(2, 6)
    params = jax.jit(module.init)(key, h, e)["params"]
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": params}, h, e), h)
    film = params.pop("film")
    assert all((a == 0).all() for a in film.values())
    moved = random_like(params, "float32") | {"film": film}
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": moved}, h, e), h)


def test_patches_return_to_their_places_and_tokens_know_theirs(key, monkeypatch):
    """Patches exchanged in the picture are exchanged in the result but for the positions, which make it differ."""
    model = adapters.from_linen(dit.DiT(**SMALL))
    x, half = np.asarray(normal(1, 4, 8, 1)), jnp.full(1, 0.5)
    params = random_like(jax.eval_shape(model.init, key, x, jnp.zeros(1, "int32")), "float32")
    compiled = lambda: jax.jit(lambda x: model.net(params, x, half, half, jnp.zeros(1, "int32")))
    net = lambda compiled, x: np.asarray(compiled(jnp.asarray(x)))
    placed = compiled()
    turned = net(placed, np.roll(x, 2, 2))
    assert np.abs(np.roll(turned, -2, 2) - net(placed, x)).max() > 0.01
    monkeypatch.setattr(dit, "positions", lambda rows, columns, d: np.zeros((rows * columns, d)))
    free = compiled()
    np.testing.assert_allclose(np.roll(net(free, np.roll(x, 2, 2)), -2, 2), net(free, x), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_derivative_in_time_passes_attention(x64, key):
    """Five-point differences of step 1e-3: a softmax in float32 (6e-8) leaves 1e-4 of the value, truncation less."""
    model = adapters.from_linen(dit.DiT(**SMALL, dtype="float64"))
    x, label = normal(2, 4, 4, 1, dtype="float64"), jnp.array([0, 3])
    s, t = jnp.array([0.1, 0.5]), jnp.array([0.4, 0.8])
    params = random_like(jax.eval_shape(model.init, key, x, label))
    towards = jax.tree.map(lambda a: np.sin(np.arange(a.size, dtype=a.dtype)).reshape(a.shape), params)
    move = lambda h: jax.tree.map(lambda a, b: a + h * b, params, towards)
    dx, x, t = np.cos(x), np.asarray(x), np.asarray(t)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(p, x, t):
        f, rate = jax.jvp(lambda x, t: model.net(p, x, s, t, label), (x, t), (jnp.asarray(dx), jnp.ones_like(t)))
        return jnp.mean(rate**2), (f, rate)

    def slope(f, h=1e-3):
        return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)

    (_, (_, rate)), grads = loss(params, x, t)
    assert np.abs(rate).max() > 0.1
    want = slope(lambda h: np.asarray(loss(params, x + h * dx, t + h)[0][1][0]))
    np.testing.assert_allclose(rate, want, atol=3e-4 * np.abs(want).max())
    along = sum(jax.tree.leaves(jax.tree.map(np.vdot, grads, towards)))
    assert float(along) == pytest.approx(float(slope(lambda h: float(loss(move(h), x, t)[0][0]))), rel=1e-3)


def test_scanned_layers_give_what_unrolled_ones_give(key):
    unrolled, scanned = (adapters.from_linen(dit.DiT(**SMALL, scan=scan, remat="none")) for scan in (False, True))
    x, label = normal(2, 4, 4, 1), jnp.array([0, 3])
    params = random_like(jax.eval_shape(scanned.init, key, x, label), "float32")
    blocks = params["blocks"]
    apart = {k: v for k, v in params.items() if k != "blocks"}
    apart |= {f"block_{i}": jax.tree.map(lambda a, i=i: a[i], blocks) for i in range(2)}
    s, t = jnp.array([0.1, 0.5]), jnp.array([0.4, 0.8])
    value = lambda model: jax.jit(jax.value_and_grad(lambda p: jnp.mean(model.net(p, x, s, t, label) ** 2)))
    one, two = (jax.tree.map(np.asarray, v) for v in (value(unrolled)(apart), value(scanned)(params)))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    for i in range(2):
        layer = jax.tree.map(lambda a, i=i: a[i], two[1]["blocks"])
        chex.assert_trees_all_close(one[1][f"block_{i}"], layer, rtol=1e-4, atol=1e-5)
    assert np.abs(blocks["up"]["kernel"][0] - blocks["up"]["kernel"][1]).max() > 0.1


def test_scanned_layers_start_apart(key):
    """Each layer has its own first weights."""
    model = adapters.from_linen(dit.DiT(**SMALL))
    params = model.init(key, jnp.zeros((2, 4, 4, 1)), jnp.zeros(2, "int32"))
    kernel = np.asarray(params["blocks"]["up"]["kernel"])
    assert kernel.shape == (2, 8, 32) and np.abs(kernel[0] - kernel[1]).min(0).max() > 0
    assert np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1] < 0.3


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"size": "M"}, (4, 4, 1), "size='M'"),
        ({"patch": 3}, (4, 6, 1), r"patch=3: .*\(1, 4, 6, 1\)"),
        ({"heads": 5}, (4, 4, 1), "width=384: .*heads=5"),
        ({"width": 6, "heads": 2}, (4, 4, 1), "width=6: .*heads=2"),
        ({"attention": "flash"}, (4, 4, 1), "attention='flash'"),
        ({"remat": "some"}, (4, 4, 1), "remat='some'"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_sentence(options, shape, message, key):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(adapters.from_linen(dit.DiT(**options)).init, key, jnp.zeros((1, *shape)))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there it works")
def test_fused_attention_is_refused_where_it_cannot_work(key):
    model = adapters.from_linen(dit.DiT(**SMALL, attention="fused", dtype="bfloat16"))
    with pytest.raises(ValueError, match="attention='fused': .* 'cpu' and dtype='bfloat16'"):
        jax.eval_shape(model.init, key, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, "int32"))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there the kernel runs, in half precision")
def test_a_fused_network_has_xlas_attention_for_a_jvp(key):
    fused = adapters.from_linen(dit.DiT(**SMALL, attention="fused")).net
    model = adapters.from_linen(dit.DiT(**SMALL))
    x, label = normal(2, 4, 4, 1), jnp.zeros(2, "int32")
    params = random_like(jax.eval_shape(model.init, key, x, label), "float32")
    s, t = jnp.array([0.1, 0.3]), jnp.array([0.9, 0.5])
    both = jax.jit(lambda *args: (fused.for_jvp(*args), model.net(*args)))(params, x, s, t, label)
    np.testing.assert_array_equal(*both)
    plain = jax.jit(model.net.for_jvp)(params, x, s, t, label)  # without a fused kernel: the network itself
    np.testing.assert_array_equal(plain, both[1])
    with pytest.raises(ValueError, match="attention='fused'"):
        fused(params, x, s, t, label)
