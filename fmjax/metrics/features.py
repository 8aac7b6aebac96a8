"""FD-small: a Frechet distance in the features of a small classifier that is trained here by a fixed recipe.

It needs no download and no accelerator. It is not FID and must not be called so: the network, its 32 features and the
8x8 digits it was trained on are our own. The classifier sees the training split only; report its held-out accuracy
beside every value, and the floor: held-out data against the reference at the same count.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Num

from fmjax.metrics.frechet import frechet

Images = Num[np.ndarray | jax.Array, "n h w c"]

# Everything that decides the weights, beside the data; its hash is part of the file's name. Change the code of `_train`
# or `_apply` and the version must change too.
RECIPE = {
    "version": 1,
    "widths": (16, 32, 64),
    "features": 32,
    "leak": 0.1,
    "steps": 600,
    "batch": 128,
    "learning_rate": 3e-3,
    "weight_decay": 1e-3,
    "label_smoothing": 0.1,
    "seed": 0,
}


class Features(NamedTuple):
    """A trained feature extractor: ``features(x): [n, 32]``, ``logits(x): [n, classes]`` of images ``[n, h, w, c]``.

    ``weights`` is the sha256 of the parameters: two values of FD-small compare only when it is the same.
    """

    features: Callable[[Images], np.ndarray]
    logits: Callable[[Images], np.ndarray]
    levels: int
    weights: str


def quantise(x: Num[np.ndarray | jax.Array, "*s"], levels: int) -> Float[np.ndarray, "*s"]:
    """The nearest of ``levels`` equally spaced values in [-1, 1], clipped; float32. 256: the 8 bits of an image file.

    Data sets hold grey levels, samplers real numbers; a metric that sees the difference measures the file format.
    ``levels=256`` agrees with ``uint8(clip(127.5 x + 128, 0, 255))``; the 8x8 digits have 17.
    """
    if levels < 2:
        raise ValueError(f"levels={levels} must be at least 2 (digits: 17, 8-bit images: 256)")
    top = levels - 1
    steps = np.clip(np.floor((np.asarray(x, np.float64) + 1) / 2 * top + 0.5), 0, top)
    return (steps / top * 2 - 1).astype(np.float32)


def small_classifier(
    train_x: Images, train_y: Int[np.ndarray | jax.Array, " n"], *, cache_dir: str | os.PathLike, levels: int = 17
) -> Features:
    """The classifier of FD-small on images ``[n, h, w, c]`` in [-1, 1] with labels ``[n]``, trained or read from cache.

    Three 3x3 convolutions, global mean and maximum, a leaky dense layer of 32 units (the features; leaky, because dead
    units make the covariance singular), a linear head. AdamW with a cosine schedule, random shifts by up to one pixel.
    Some seconds on two CPU cores. The same recipe, data and machine give the same weights to the bit; another number of
    cores does not (sums in another order), so compare ``weights`` or share the file.

    The file ``fd-small-<sha256 of recipe and data>.npz`` in ``cache_dir`` carries the hash of its weights; one that is
    torn or altered is named in a warning, retrained and replaced. ``levels``: see ``fd_small``.
    Raises ``ValueError`` for images outside [-1, 1], labels that do not match, and an unwritable ``cache_dir``.
    """
    x, y = np.asarray(train_x, np.float32), np.asarray(train_y, np.int32)
    if x.ndim != 4 or y.shape != x.shape[:1] or len(x) < RECIPE["batch"]:
        raise ValueError(
            f"small_classifier needs images [n, h, w, c] and labels [n] with n >= {RECIPE['batch']}, "
            f"got {x.shape} and {y.shape}"
        )
    if not np.abs(x).max() <= 1 or y.min() < 0:
        raise ValueError("images must lie in [-1, 1] without NaN, labels must be 0 or above")
    directory = Path(cache_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache_dir {directory} cannot be made: {error}; give a writable directory") from error

    digest = _sha256(json.dumps(RECIPE, sort_keys=True).encode(), {"x": x, "y": y})
    file = directory / f"fd-small-{digest[:16]}.npz"
    params = _read(file, digest) if file.exists() else None
    if params is None:
        params = jax.device_get(_train(jnp.asarray(x), jnp.asarray(y), classes=int(y.max()) + 1))
        _write(file, digest, params)
    apply = functools.partial(_in_blocks, params, shape=x.shape[1:])
    return Features(lambda x: apply(x)[0], lambda x: apply(x)[1], levels, _sha256(b"", params))


def accuracy(features: Features, x: Images, y: Int[np.ndarray | jax.Array, " n"]) -> float:
    """Share of images whose largest logit is that of their label; on held-out images, reported beside FD-small."""
    return float((features.logits(x).argmax(1) == np.asarray(y)).mean())


def fd_small(features: Features, samples: Images, reference: Num[np.ndarray | jax.Array, "m h w c"]) -> float:
    """Frechet distance of ``samples`` to ``reference`` in the features of the small classifier.

    Both are quantised to ``features.levels`` grey levels first. Biased upwards by about ``c/n``: compare only values of
    one sample count, and draw random subsets of a data set, never its first n. Raises as ``frechet`` does.
    """
    a, b = (features.features(quantise(x, features.levels)) for x in (samples, reference))
    return frechet(a, b)


def _init(key, channels: int, classes: int) -> dict:
    shapes, width = {}, channels
    for i, out in enumerate(RECIPE["widths"]):
        shapes[f"conv{i}"], width = (3, 3, width, out), out
    shapes["dense"] = (2 * width, RECIPE["features"])
    shapes["head"] = (RECIPE["features"], classes)
    params = {}
    for k, (name, shape) in zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True):
        scale = 0.05 if name == "head" else np.sqrt(2 / np.prod(shape[:-1]))
        params[f"{name}_w"] = scale * jax.random.normal(k, shape)
        params[f"{name}_b"] = jnp.zeros(shape[-1])
    return params


def _apply(params: dict, x):
    for i in range(len(RECIPE["widths"])):
        stride = (2, 2) if i == 1 else (1, 1)
        x = jax.lax.conv_general_dilated(
            x, params[f"conv{i}_w"], stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        x = jax.nn.relu(x + params[f"conv{i}_b"])
    pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1)
    hidden = jnp.dot(pooled, params["dense_w"], precision="highest") + params["dense_b"]
    features = jax.nn.leaky_relu(hidden, RECIPE["leak"])
    return features, jnp.dot(features, params["head_w"], precision="highest") + params["head_b"]


def _train(x, y, *, classes: int) -> dict:
    import optax

    schedule = optax.cosine_decay_schedule(RECIPE["learning_rate"], RECIPE["steps"])
    tx = optax.adamw(schedule, weight_decay=RECIPE["weight_decay"])

    def loss(params, x, y):
        target = optax.smooth_labels(jax.nn.one_hot(y, classes), RECIPE["label_smoothing"])
        return optax.softmax_cross_entropy(_apply(params, x)[1], target).mean()

    @jax.jit
    def step(params, opt, x, y, key):
        k_index, k_shift = jax.random.split(key)
        index = jax.random.randint(k_index, (RECIPE["batch"],), 0, len(x))
        padded = jnp.pad(x[index], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
        dy, dx = jax.random.randint(k_shift, (2,), 0, 3)
        shifted = jax.lax.dynamic_slice(padded, (0, dy, dx, 0), (len(index), *x.shape[1:]))
        updates, opt = tx.update(jax.grad(loss)(params, shifted, y[index]), opt, params)
        return optax.apply_updates(params, updates), opt

    k_init, k_steps = jax.random.split(jax.random.key(RECIPE["seed"]))
    params = _init(k_init, x.shape[-1], classes)
    opt = tx.init(params)
    # No lax.scan: on a CPU, XLA runs a convolution inside a loop without its fast kernel, 13 times slower.
    for key in jax.random.split(k_steps, RECIPE["steps"]):
        params, opt = step(params, opt, x, y, key)
    return params


_jit_apply = jax.jit(_apply)


def _in_blocks(params, x, *, shape, block: int = 512):
    x = np.asarray(x, np.float32)
    if x.shape[1:] != shape or not len(x):
        raise ValueError(f"the classifier was trained on images [n, {', '.join(map(str, shape))}], got {x.shape}")
    outputs = []
    for i in range(0, len(x), block):
        part = x[i : i + block]
        pad = np.zeros((block - len(part), *x.shape[1:]), np.float32)  # one shape, one compilation
        outputs.append([np.asarray(o)[: len(part)] for o in _jit_apply(params, np.concatenate([part, pad]))])
    features, logits = zip(*outputs, strict=True)
    return np.concatenate(features), np.concatenate(logits)


def _sha256(head: bytes, arrays: dict) -> str:
    h = hashlib.sha256(head)
    for name, array in sorted(arrays.items()):
        a = np.ascontiguousarray(array)
        h.update(f"{name} {a.dtype.str} {a.shape}".encode() + a.tobytes())
    return h.hexdigest()


def _write(file: Path, digest: str, params: dict) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            np.savez(f, recipe_and_data=digest, weights=_sha256(b"", params), **params)
        part.replace(file)  # readers see the whole file or none
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error}; give a writable cache_dir") from error


def _read(file: Path, digest: str) -> dict | None:
    """The parameters, or None with a warning that names what is wrong with the file."""
    try:
        with np.load(file, allow_pickle=False) as z:
            content = {name: z[name] for name in z.files}
        found, weights = str(content.pop("recipe_and_data")), str(content.pop("weights"))
        wrong = (
            f"was made by another recipe or from other data (sha256 {found[:16]}, expected {digest[:16]})"
            if found != digest
            else "does not hold the weights whose sha256 it states"
            if weights != _sha256(b"", content)
            else None
        )
    except Exception as error:  # a torn zip raises half a dozen types
        wrong = f"cannot be read ({type(error).__name__}: {error})"
    if wrong is None:
        return content
    warnings.warn(f"cached classifier {file} {wrong}: training it anew and replacing the file", stacklevel=3)
    return None
