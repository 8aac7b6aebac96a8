"""FD-small and FD-random: Frechet distances in the features of a small network, trained here or random.

They need no download and no accelerator. They are not FID and must not be called so. FD-small needs labels: the network
is trained to classify the training split, by a fixed recipe. Report its held-out accuracy beside every value, and the
floor: held-out data against the reference at the same count. FD-random needs no labels: the weights stay random.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Num

from fmjax import checks
from fmjax.checks import Range
from fmjax.keys import from_seed
from fmjax.metrics import checking
from fmjax.metrics.frechet import frechet

Images = Num[np.ndarray | jax.Array, "n h w c"]

# Everything that decides the weights, beside the data; its hash is part of the file's name. A change of the code of
# `_train` or `_apply` needs another version.
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
    """A feature extractor of examples ``[n, ...]``.

    Attributes:
        features: ``features(x)``, ``[n, d]``.
        logits: ``logits(x)``, ``[n, classes]``; ``None`` for a network that does not classify.
        levels: the number of grey levels that images are rounded to, or ``None`` for no rounding.
        weights: the sha256 of the parameters; two distances compare only if it is the same.
        name: the extractor and its preprocessing, which the names of measures carry: ``"inception-legacy"``.
        slow: whether features of reference examples are worth a file.
    """

    features: Callable[[np.ndarray], np.ndarray]
    logits: Callable[[np.ndarray], np.ndarray] | None
    levels: int | None
    weights: str
    name: str = "own"
    slow: bool = False


def quantise(x: Num[np.ndarray | jax.Array, "*s"], levels: Annotated[int, Range(low=2)]) -> Float[np.ndarray, "*s"]:
    """Round images to equally spaced grey levels in [-1, 1], and clip them.

    Data sets hold grey levels, samplers real numbers; a metric that detects the difference measures the file format.

    Args:
        x: images in [-1, 1], of any shape.
        levels: the number of grey levels: 256 for 8-bit images (this agrees with
            ``uint8(clip(127.5 x + 128, 0, 255))``), 17 for the 8x8 digits.

    Returns:
        The nearest level of each value, float32.

    Raises:
        ValueError: for another number of levels, and for images on another scale or with values that are not finite.

    >>> quantise(np.array([-1.2, -0.1, 0.3, 0.9]), 3).tolist()
    [-1.0, 0.0, 0.0, 1.0]
    """
    checks.check_hints(quantise, {"levels": levels})
    checks.check_pixels("x", x)
    top = levels - 1
    steps = np.clip(np.floor((np.asarray(x, np.float64) + 1) / 2 * top + 0.5), 0, top)
    return (steps / top * 2 - 1).astype(np.float32)


def small_classifier(
    train_x: Images,
    train_y: Int[np.ndarray | jax.Array, " n"],
    *,
    cache_dir: str | os.PathLike,
    levels: int | None = 17,
) -> Features:
    """Train the classifier of FD-small, or read it from the cache.

    The network has three 3x3 convolutions, global mean and maximum, a leaky dense layer of 32 units (the features;
    leaky, because dead units make the covariance singular) and a linear head. It is trained by AdamW with a cosine
    schedule on random shifts by up to one pixel, in some seconds on two CPU cores. The same recipe, data and machine
    give the same weights to the bit. Another number of cores adds in another order: compare ``weights``, or copy the
    file.

    The file ``fd-small-<sha256 of recipe and data>.npz`` in ``cache_dir`` states the hash of its weights. A torn or
    altered file is named in a warning, and replaced by a new training.

    Args:
        train_x: images ``[n, h, w, c]`` in [-1, 1], at least 128.
        train_y: labels ``[n]`` of two classes or more.
        cache_dir: the folder of trained classifiers.
        levels: the number of grey levels that ``fd_small`` rounds images to; ``None`` for no rounding.

    Returns:
        The features.

    Raises:
        ValueError: for images outside [-1, 1], labels that do not match or are all equal, and a ``cache_dir`` that
            cannot be written.

    >>> small_classifier(np.zeros((200, 8, 8, 1)), np.zeros(200, int), cache_dir="cache")
    Traceback (most recent call last):
    ValueError: train_y=[200]: all labels are 0, so that there is nothing to classify. Use random_features.
    """
    checks.check_pixels("train_x", train_x)
    x = np.asarray(train_x, np.float32)
    if x.ndim != 4 or len(x) < RECIPE["batch"]:
        raise ValueError(f"train_x={x.shape}: not {RECIPE['batch']} images or more. Give images [n, h, w, c].")
    y = _labels("train_y", train_y, len(x))
    if not np.abs(x).max() <= 1 or y.min() < 0:
        raise ValueError(
            "train_x: images lie in [-1, 1] without NaN, and labels are 0 or above. Scale or correct them."
        )
    if (y == y[0]).all():
        raise ValueError(
            f"train_y=[{len(y)}]: all labels are {y[0]}, so that there is nothing to classify. Use random_features."
        )
    directory = Path(cache_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache_dir={directory}: {error}. Give a folder that can be written.") from error

    digest = _sha256(json.dumps(RECIPE, sort_keys=True).encode(), {"x": x, "y": y})
    file = directory / f"fd-small-{digest[:16]}.npz"
    params = _read(file, digest) if file.exists() else None
    if params is None:
        params = jax.device_get(_train(jnp.asarray(x), jnp.asarray(y), classes=int(y.max()) + 1))
        _write(file, digest, params)
    return _features(params, x.shape[1:], levels)._replace(name="small")


def random_features(shape: tuple[int, ...], *, levels: int | None = None, seed: int = 0) -> Features:
    """Return the features of the network of ``small_classifier`` with its initial weights: they need no labels.

    Args:
        shape: the shape ``(h, w, c)`` of an image.
        levels: the number of grey levels that ``fd_small`` rounds images to; ``None`` for no rounding.
        seed: the seed of the weights.

    Returns:
        The features.

    >>> random_features((8, 8, 1)).features(np.zeros((5, 8, 8, 1))).shape
    (5, 32)
    """
    return _features(jax.device_get(_init(from_seed(seed), shape[-1], classes=1)), tuple(shape), levels)._replace(
        name="random"
    )


def label_accuracy(features: Features, x: Images, y: Int[np.ndarray | jax.Array, " n"]) -> float:
    """Return the fraction of images whose largest logit belongs to their label.

    Args:
        features: a trained classifier.
        x: images ``[n, h, w, c]``, held out from its training.
        y: labels ``[n]``.

    Returns:
        The accuracy, to be reported beside FD-small.

    >>> net = Features(None, lambda x: np.eye(2)[[0, 1, 1]], None, "")
    >>> round(label_accuracy(net, np.zeros((3, 8, 8, 1)), np.array([0, 1, 0])), 3)
    0.667
    """
    y = _labels("y", y, len(x))
    return float((features.logits(x).argmax(1) == y).mean())


def fd_small(features: Features, samples: Images, reference: Num[np.ndarray | jax.Array, "m h w c"]) -> float:
    """Return the Frechet distance of samples to reference images in the features of a small network.

    Both are rounded to ``features.levels`` grey levels first. The value is biased upwards by about ``c/n``: compare
    only values of one sample count, and draw random subsets of a data set, never its first n.

    Args:
        features: the features, of ``small_classifier`` or ``random_features``.
        samples: images ``[n, h, w, c]``.
        reference: images ``[m, h, w, c]``.

    Returns:
        The squared distance.

    Raises:
        ValueError: for images that are not finite or of another shape, and fewer than two of them.

    >>> x = np.random.default_rng(0).uniform(-1, 1, (40, 8, 8, 1))
    >>> abs(fd_small(random_features((8, 8, 1)), x, x)) < 1e-6
    True
    """
    pair = checking.pair(samples, reference, ("samples", "reference"))
    return frechet(*(embed(features, x) for x in pair))


def embed(features: Features, x: Num[np.ndarray | jax.Array, "n ..."]) -> Float[np.ndarray, "n d"]:
    """Return the features of examples, after images are rounded to the grey levels of the extractor.

    Args:
        features: the extractor.
        x: examples ``[n, ...]``.

    Returns:
        Features ``[n, d]``.

    >>> embed(random_features((8, 8, 1)), np.zeros((5, 8, 8, 1))).shape
    (5, 32)
    """
    return features.features(quantise(x, features.levels) if features.levels else np.asarray(x))


def _labels(name: str, y, count: int) -> np.ndarray:
    """Return integer labels ``[n]``, one for each image."""
    y = np.asarray(y)
    if y.dtype.kind not in "iu" or y.shape != (count,):
        raise ValueError(f"{name}={y.dtype}{list(y.shape)}: there are {count} images. Give integer labels [{count}].")
    return y.astype(np.int32)


def _features(params: dict, shape: tuple[int, ...], levels: int | None) -> Features:
    apply = functools.partial(_in_blocks, params, shape=shape)
    return Features(lambda x: apply(x)[0], lambda x: apply(x)[1], levels, _sha256(b"", params))


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
    tx, step = _step(tuple(RECIPE.items()), classes)
    k_init, k_steps = jax.random.split(jax.random.key(RECIPE["seed"]))
    params = _init(k_init, x.shape[-1], classes)
    opt = tx.init(params)
    # No lax.scan: on a CPU, XLA runs a convolution inside a loop without its fast kernel, 13 times slower.
    for key in jax.random.split(k_steps, RECIPE["steps"]):
        params, opt = step(params, opt, x, y, key)
    return params


@functools.cache
def _step(recipe: tuple, classes: int):
    """Return the optimiser and its jitted step, one for all trainings of a recipe."""
    import optax

    recipe = dict(recipe)
    schedule = optax.cosine_decay_schedule(recipe["learning_rate"], recipe["steps"])
    tx = optax.adamw(schedule, weight_decay=recipe["weight_decay"])

    def loss(params, x, y):
        target = optax.smooth_labels(jax.nn.one_hot(y, classes), recipe["label_smoothing"])
        return optax.softmax_cross_entropy(_apply(params, x)[1], target).mean()

    @jax.jit
    def step(params, opt, x, y, key):
        k_index, k_shift = jax.random.split(key)
        index = jax.random.randint(k_index, (recipe["batch"],), 0, len(x))
        padded = jnp.pad(x[index], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
        dy, dx = jax.random.randint(k_shift, (2,), 0, 3)
        shifted = jax.lax.dynamic_slice(padded, (0, dy, dx, 0), (len(index), *x.shape[1:]))
        updates, opt = tx.update(jax.grad(loss)(params, shifted, y[index]), opt, params)
        return optax.apply_updates(params, updates), opt

    return tx, step


_jit_apply = jax.jit(_apply)


def _in_blocks(params, x, *, shape, block: int = 512):
    x = np.asarray(x, np.float32)
    if x.shape[1:] != shape or not len(x):
        raise ValueError(
            f"x={x.shape}: the features are of images [n, {', '.join(map(str, shape))}]. Give such images."
        )
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
        raise ValueError(f"cache_dir={file.parent}: {error}. Give a folder that can be written.") from error


def _read(file: Path, digest: str) -> dict | None:
    """Return the parameters, or ``None`` after a warning that names the fault of the file."""
    try:
        with np.load(file, allow_pickle=False) as z:
            content = {name: z[name] for name in z.files}
        stated, weights = str(content.pop("recipe_and_data")), str(content.pop("weights"))
        wrong = (
            f"comes from another recipe or from other data (sha256 {stated[:16]}, expected {digest[:16]})"
            if stated != digest
            else "does not hold the weights whose sha256 it states"
            if weights != _sha256(b"", content)
            else None
        )
    except Exception as error:  # a torn zip raises half a dozen types
        wrong = f"cannot be read ({type(error).__name__}: {error})"
    if wrong is None:
        return content
    warnings.warn(f"cached classifier {file} {wrong}: it is trained again and the file replaced", stacklevel=3)
    return None
