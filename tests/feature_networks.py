"""Plain numpy versions of Inception (2015) and DINOv2, from state dicts in PyTorch's names, and random state dicts."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from fmjax.metrics.dinov2 import DinoV2
from fmjax.metrics.inception import Inception

EPS = 1e-3


def inception_state(seed=0, *, thin=16, classes=10):
    """A state dict with all statistics of the batch norms away from their initial values."""
    net, rng = Inception(classes=classes, thin=thin), np.random.default_rng(seed)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32))["params"]
    state = {"fc.weight": rng.normal(size=shapes["fc"]["kernel"].shape[::-1]) / 10, "fc.bias": rng.normal(size=classes)}
    for name in shapes:
        if name == "fc":
            continue
        h, w, i, o = shapes[name]["kernel"].shape
        state[f"{name}.conv.weight"] = rng.normal(size=(o, i, h, w)) * np.sqrt(2 / (h * w * i))
        state |= {f"{name}.bn.weight": rng.uniform(0.5, 1.5, o), f"{name}.bn.bias": rng.normal(size=o) / 5}
        state |= {f"{name}.bn.running_mean": rng.normal(size=o) / 5, f"{name}.bn.running_var": rng.uniform(0.5, 1.5, o)}
        state[f"{name}.bn.num_batches_tracked"] = np.array(7)
    return {k: np.asarray(a, np.float32 if a.dtype.kind == "f" else a.dtype) for k, a in state.items()}


def _windows(x, kernel, stride, pad, fill):
    x = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, kernel, (2, 3))[:, :, ::stride, ::stride]


def _conv(state, name, x, stride=1, pad=(0, 0)):
    """Convolution, batch norm and ReLU on [n, c, h, w]."""
    p = {k: state[f"{name}.{k}"].astype(np.float64) for k in ("conv.weight", "bn.weight", "bn.bias")}
    mean, var = (state[f"{name}.bn.running_{k}"].astype(np.float64) for k in ("mean", "var"))
    weight = p["conv.weight"]
    y = np.einsum("nchwij,ocij->nohw", _windows(x, weight.shape[2:], stride, pad, 0.0), weight, optimize=True)
    each = lambda a: a[:, None, None]
    return np.maximum(each(p["bn.weight"]) * (y - each(mean)) / np.sqrt(each(var) + EPS) + each(p["bn.bias"]), 0)


def _max(x, stride=2, pad=0):
    return _windows(x, (3, 3), stride, (pad, pad), -np.inf).max((4, 5))


def _mean(x):
    """The average of the pixels of a window that lie in the image."""
    inside = _windows(np.ones_like(x), (3, 3), 1, (1, 1), 0.0).sum((4, 5))
    return _windows(x, (3, 3), 1, (1, 1), 0.0).sum((4, 5)) / inside


# A block is a list of branches, and a branch a list of layers: name, stride, padding; "+" joins two ends of a branch.
WIDE, TALL, SAME, FIVE = (0, 3), (3, 0), (1, 1), (2, 2)
A = [[("branch1x1", 1, (0, 0))], [("branch5x5_1", 1, (0, 0)), ("branch5x5_2", 1, FIVE)],
     [("branch3x3dbl_1", 1, (0, 0)), ("branch3x3dbl_2", 1, SAME), ("branch3x3dbl_3", 1, SAME)],
     ["mean", ("branch_pool", 1, (0, 0))]]  # fmt: skip
B = [[("branch3x3", 2, (0, 0))],
     [("branch3x3dbl_1", 1, (0, 0)), ("branch3x3dbl_2", 1, SAME), ("branch3x3dbl_3", 2, (0, 0))], ["max2"]]  # fmt: skip
C = [[("branch1x1", 1, (0, 0))],
     [("branch7x7_1", 1, (0, 0)), ("branch7x7_2", 1, WIDE), ("branch7x7_3", 1, TALL)],
     [("branch7x7dbl_1", 1, (0, 0)), ("branch7x7dbl_2", 1, TALL), ("branch7x7dbl_3", 1, WIDE),
      ("branch7x7dbl_4", 1, TALL), ("branch7x7dbl_5", 1, WIDE)], ["mean", ("branch_pool", 1, (0, 0))]]  # fmt: skip
D = [[("branch3x3_1", 1, (0, 0)), ("branch3x3_2", 2, (0, 0))],
     [("branch7x7x3_1", 1, (0, 0)), ("branch7x7x3_2", 1, WIDE), ("branch7x7x3_3", 1, TALL),
      ("branch7x7x3_4", 2, (0, 0))], ["max2"]]  # fmt: skip
E = lambda pool: [
    [("branch1x1", 1, (0, 0))],
    [("branch3x3_1", 1, (0, 0)), ("branch3x3_2a", 1, (0, 1))],
    [("branch3x3_1", 1, (0, 0)), ("branch3x3_2b", 1, (1, 0))],
    [("branch3x3dbl_1", 1, (0, 0)), ("branch3x3dbl_2", 1, SAME), ("branch3x3dbl_3a", 1, (0, 1))],
    [("branch3x3dbl_1", 1, (0, 0)), ("branch3x3dbl_2", 1, SAME), ("branch3x3dbl_3b", 1, (1, 0))],
    [pool, ("branch_pool", 1, (0, 0))]]  # fmt: skip
BLOCKS = {
    "5b": A,
    "5c": A,
    "5d": A,
    "6a": B,
    "6b": C,
    "6c": C,
    "6d": C,
    "6e": C,
    "7a": D,
    "7b": E("mean"),
    "7c": E("max1"),
}
POOLS = {"mean": _mean, "max2": _max, "max1": lambda x: _max(x, 1, 1)}


def inception(state, x):
    """Features and logits of images [n, h, w, 3], float64."""
    x = _conv(state, "Conv2d_1a_3x3", np.asarray(x, np.float64).transpose(0, 3, 1, 2), 2)
    x = _conv(state, "Conv2d_2b_3x3", _conv(state, "Conv2d_2a_3x3", x), 1, SAME)
    x = _conv(state, "Conv2d_4a_3x3", _conv(state, "Conv2d_3b_1x1", _max(x)))
    x = _max(x)
    for name, block in BLOCKS.items():
        ends = []
        for branch in block:
            y = x
            for layer in branch:
                y = (
                    POOLS[layer](y)
                    if isinstance(layer, str)
                    else _conv(state, f"Mixed_{name}.{layer[0]}", y, *layer[1:])
                )
            ends.append(y)
        x = np.concatenate(ends, 1)
    features = x.mean((2, 3))
    return features, features @ state["fc.weight"].T.astype(np.float64)


def dinov2_state(seed=0, *, depth=2, grid=3, width=64):
    """A state dict of a small DINOv2 with patches of 14 pixels."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(shape[-1]))
    state = {
        "cls_token": normal(1, 1, width),
        "pos_embed": 4 * normal(1, grid**2 + 1, width),
        "mask_token": normal(1, width),
    }
    state |= {"patch_embed.proj.weight": normal(width, 3, 14, 14), "patch_embed.proj.bias": normal(width)}
    for i in range(depth):
        b = f"blocks.{i}"
        for name, o, k in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            state |= {f"{b}.{name}.weight": 2 * normal(o * width, k * width), f"{b}.{name}.bias": normal(o * width)}
        for name in ("norm1", "norm2"):
            state |= {f"{b}.{name}.weight": 1 + normal(width), f"{b}.{name}.bias": normal(width)}
        state |= {f"{b}.{name}.gamma": 4 * normal(width) for name in ("ls1", "ls2")}
    return state | {"norm.weight": 1 + normal(width), "norm.bias": normal(width)}


def dinov2(state, x):
    """The class token of images [n, h, w, 3] whose grid of patches is the grid of the embedding; float64."""
    w = {k: a.astype(np.float64) for k, a in state.items()}
    width = w["cls_token"].shape[-1]
    heads, side = width // 64, x.shape[1] // 14

    def norm(name, z):
        z = z - z.mean(-1, keepdims=True)
        return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    dense = lambda name, z: z @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    patches = np.asarray(x, np.float64).reshape(len(x), side, 14, side, 14, 3).transpose(0, 1, 3, 5, 2, 4)
    z = (
        patches.reshape(len(x), side**2, -1) @ w["patch_embed.proj.weight"].reshape(width, -1).T
        + w["patch_embed.proj.bias"]
    )
    z = np.concatenate([np.repeat(w["cls_token"], len(x), 0), z], 1) + w["pos_embed"]
    for i in range(sum(k.endswith("ls1.gamma") for k in w)):
        b = f"blocks.{i}"
        q, k, v = np.split(dense(f"{b}.attn.qkv", norm(f"{b}.norm1", z)), 3, -1)
        ends = []
        for h in range(heads):
            part = slice(64 * h, 64 * h + 64)
            scores = q[..., part] @ k[..., part].transpose(0, 2, 1) / np.sqrt(64)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            ends.append(p / p.sum(-1, keepdims=True) @ v[..., part])
        z = z + w[f"{b}.ls1.gamma"] * dense(f"{b}.attn.proj", np.concatenate(ends, -1))
        hidden = dense(f"{b}.mlp.fc1", norm(f"{b}.norm2", z))
        z = z + w[f"{b}.ls2.gamma"] * dense(f"{b}.mlp.fc2", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)
    return norm("norm", z)[:, 0]


def dinov2_net(state):
    """The network in Flax with the fields of a state dict."""
    from fmjax.convert.extractors import dinov2_parameters

    params, fields = dinov2_parameters(state, patches=3)
    return DinoV2(**fields), params
