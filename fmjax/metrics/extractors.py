"""Feature extractors that a config names: ``features="random_network"``, or ``{"name": "inception", "weights": ...}``.

A factory takes the data set and returns ``Features``; a factory outside the package (``"my_package.mod:factory"``) has
the same form. Files of weights are named by the user and read as data (``fmjax.convert.weights``): nothing in them is
executed, and nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fmjax.checks import Refusal, Seed
from fmjax.keys import generator
from fmjax.metrics import features as small
from fmjax.metrics import resizing
from fmjax.metrics.dinov2 import DEVIATION, MEAN, DinoV2
from fmjax.metrics.dinov2 import SIZE as DINO_SIZE
from fmjax.metrics.features import Features
from fmjax.metrics.inception import SIZE as INCEPTION_SIZE
from fmjax.metrics.inception import Inception
from fmjax.metrics.metric import DataLike
from fmjax.metrics.two_sample import median_distance
from fmjax.storage import files

# sha256 of the public file of the FID network: release fid_weights of pytorch-fid, v0.2.0 of torch-fidelity
FID_WEIGHTS = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
BLOCK = 32  # images that a large network takes at a time
FREQUENCIES = 8  # random directions at each of two scales
ROWS = 4096  # training examples that units are taken from
Extractor = Callable[[DataLike], Features]


def random_network(data: DataLike, *, seed: Seed = 0) -> Features:
    """Return 32 features of a random network, for unlabelled data of every kind.

    Images and series go through random convolutions, see ``random_features``; points and vectors through sines and
    cosines of random frequencies, half of them at the scale of the median distance and half at a quarter of it. All but
    images are in units of the training examples.

    Args:
        data: the data set.
        seed: the seed of the weights.

    Returns:
        The features.

    >>> from types import SimpleNamespace
    >>> x = np.random.default_rng(0).standard_normal((40, 3))
    >>> data = SimpleNamespace(train=SimpleNamespace(x=x, cond=None), kind="vector", levels=None, classes=0)
    >>> random_network(data).features(x).shape
    (40, 32)
    """
    shape = tuple(data.train.x.shape[1:])
    if data.kind == "image":
        return small.random_features(shape, levels=data.levels, seed=seed)
    rng = generator(seed)
    rows = np.asarray(data.train.x[np.sort(rng.permutation(len(data.train.x))[:ROWS])], np.float64)
    axes = tuple(range(rows.ndim - 1))
    centre, scale = rows.mean(axes), rows.std(axes)
    scale = np.where(scale > 0, scale, 1.0)
    unit = lambda x: (np.asarray(x, np.float64) - centre) / scale
    if data.kind == "series":
        net = small.random_features((shape[0], 1, shape[1]), seed=seed)
        weights = _sha256(net.weights.encode(), centre, scale)
        return Features(lambda x: net.features(unit(x)[:, :, None]), None, None, weights, "random")
    width = median_distance(unit(rows)) if len(rows) > 1 else 1.0
    directions = rng.standard_normal((shape[0], 2 * FREQUENCIES)) / (width or 1.0)
    directions[:, FREQUENCIES:] *= 4

    def waves(x):
        phase = unit(x) @ directions
        return np.concatenate([np.cos(phase), np.sin(phase)], 1)

    return Features(waves, None, None, _sha256(b"", centre, scale, directions), "random")


def small_network(data: DataLike, *, cache_dir: str | None = None) -> Features:
    """Return the features of a small classifier that is trained on the training split, see ``small_classifier``.

    Args:
        data: a data set of images with labels of two classes or more.
        cache_dir: the folder of trained classifiers; ``None`` takes ``features`` in ``storage.files.cache_folder()``.

    Returns:
        The features.

    Raises:
        ValueError: for data that are not images, or that have fewer than two classes.

    >>> from types import SimpleNamespace
    >>> small_network(SimpleNamespace(train=None, kind="points", levels=None, classes=0))
    Traceback (most recent call last):
    fmjax.checks.Refusal: kind='points': the small classifier is a network of images. Use random_network.
    """
    if data.kind != "image":
        raise Refusal("kind", data.kind, "the small classifier is a network of images", "Use random_network")
    if data.classes < 2:
        raise Refusal("classes", data.classes, "a classifier is trained on two classes or more", "Use random_network")
    folder = files.cache_folder() / "features" if cache_dir is None else cache_dir
    return small.small_classifier(data.train.x[:], data.train.cond, cache_dir=folder, levels=data.levels)


def raw(data: DataLike) -> Features:
    """Return the examples themselves, flattened, as features.

    Args:
        data: the data set.

    Returns:
        The features.

    >>> from types import SimpleNamespace
    >>> data = SimpleNamespace(train=None, kind="series", levels=None, classes=0)
    >>> raw(data).features(np.zeros((5, 2, 3))).shape
    (5, 6)
    """
    return Features(lambda x: np.asarray(x, np.float64).reshape(len(x), -1), None, data.levels, "none", "raw")


def inception(data: DataLike, *, weights: str, resize: resizing.Way = "legacy") -> Features:
    """Return the features of FID: pool 3 of the Inception network of 2015, and its logits without bias.

    With the public weights file the Frechet distance is FID, and the measures say so; with other weights they do not.

    Args:
        data: a data set of images with one or three colours; grey images get three equal colours.
        weights: the file ``pt_inception-2015-12-05-6726825d.pth`` or a copy of it, ``.pth`` or ``.safetensors``.
        resize: how images are enlarged to 299 pixels, see ``resizing.resize``: ``"legacy"`` as published numbers mostly
            do, ``"clean"`` as clean-fid does.

    Returns:
        The features, 2048.

    Raises:
        ValueError: for data that are not images, and a file that is damaged or of another network.

    >>> from types import SimpleNamespace
    >>> inception(SimpleNamespace(train=None, kind="points", levels=None, classes=0), weights="x.pth")
    Traceback (most recent call last):
    fmjax.checks.Refusal: kind='points': Inception takes images. Use random_network.
    """
    from fmjax.convert.extractors import inception_parameters

    channels = _channels(data, "Inception")
    params, digest = _read(weights, inception_parameters)
    net = Inception(classes=params["fc"]["kernel"].shape[1])
    _check(net, params, (1, 75, 75, 3), weights)

    @jax.jit
    def apply(params, u):
        u = resizing.resize(u, INCEPTION_SIZE, way=resize)
        return net.apply({"params": params}, (u - 128) / 128)

    outputs = functools.partial(_in_blocks, functools.partial(apply, jax.device_put(params)), channels)
    return Features(lambda x: outputs(x)[0], lambda x: outputs(x)[1], 256, digest, f"inception-{resize}", True)


def dinov2(data: DataLike, *, weights: str, resize: resizing.Way = "clean") -> Features:
    """Return the features of DINOv2: the class token of a vision transformer without registers.

    Args:
        data: a data set of images with one or three colours; grey images get three equal colours.
        weights: the file ``dinov2_vits14_pretrain.pth``, ``dinov2_vitb14_pretrain.pth`` or a larger network.
        resize: how images are enlarged to 224 pixels, see ``resizing.resize``.

    Returns:
        The features, 384 or more.

    Raises:
        ValueError: for data that are not images, and a file that is damaged or of another network.

    >>> from types import SimpleNamespace
    >>> dinov2(SimpleNamespace(train=None, kind="series", levels=None, classes=0), weights="x.pth")
    Traceback (most recent call last):
    fmjax.checks.Refusal: kind='series': DINOv2 takes images. Use random_network.
    """
    from fmjax.convert.extractors import dinov2_parameters

    channels = _channels(data, "DINOv2")
    (params, fields), digest = _read(weights, dinov2_parameters)
    net = DinoV2(**fields)
    _check(net, params, (1, DINO_SIZE, DINO_SIZE, 3), weights)

    @jax.jit
    def apply(params, u):
        x = resizing.resize(u, DINO_SIZE, way=resize) / 255
        return (net.apply({"params": params}, (x - jnp.array(MEAN)) / jnp.array(DEVIATION)),)

    outputs = functools.partial(_in_blocks, functools.partial(apply, jax.device_put(params)), channels)
    width = params["cls_token"].shape[-1]
    return Features(lambda x: outputs(x)[0], None, 256, digest, f"dinov2-{width}-{resize}", True)


def checked_features(factory: Extractor, data: DataLike) -> Features:
    """Return the features that a factory makes for a data set; refuse what else it may return.

    Args:
        factory: a factory of this module, or a factory outside the package.
        data: the data set.

    Returns:
        The features.

    Raises:
        ValueError: the factory returns another kind of object.
    """
    net = factory(data)
    if not isinstance(net, Features):
        name = getattr(factory, "__name__", repr(factory))
        raise Refusal("features", name, f"returns {type(net).__name__}", "Return fmjax.metrics.Features")
    return net


def feature_facts(net: Features) -> dict[str, str]:
    """Return what a reader needs to compare two values in a feature space.

    Args:
        net: the features.

    Returns:
        Text by name.
    """
    return {"features": f"{net.name}, weights {net.weights[:12]}", "grey levels": str(net.levels)}


def _channels(data: DataLike, network: str) -> int:
    if data.kind != "image":
        raise Refusal("kind", data.kind, f"{network} takes images", "Use random_network")
    channels = data.train.x.shape[-1]
    if channels not in (1, 3):
        raise Refusal("channels", channels, f"{network} takes images of one or three colours", "Use random_network")
    return channels


def _read(weights: str, convert: Callable[[Any], Any]) -> tuple[Any, str]:
    """Return the parameters in a file, and the digest of the file."""
    from fmjax.convert.weights import read_weights

    if not os.path.isfile(weights):
        raise Refusal("weights", weights, "no such file", "Download the weights, and name the file")
    try:
        state = read_weights(weights)
        if not hasattr(state, "items"):
            raise ValueError(f"holds {type(state).__name__}, no state dict")
        return convert(state), files.file_digest(weights)
    except ValueError as error:
        raise Refusal("weights", weights, str(error).rstrip("."), "Give the state dict of the network") from error


def _check(net: nn.Module, params: Any, shape: tuple[int, ...], weights: str) -> None:
    """Refuse parameters of other names or shapes than the network has."""
    expected = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))["params"]
    shapes = lambda tree: {jax.tree_util.keystr(k): a.shape for k, a in jax.tree_util.tree_leaves_with_path(tree)}
    theirs, ours = shapes(params), shapes(expected)
    for name in sorted(theirs | ours):
        if theirs.get(name) != ours.get(name):
            wrong = f"{name} has shape {theirs.get(name)}, and {ours.get(name)} in {type(net).__name__}"
            raise Refusal("weights", weights, wrong, "Give the state dict of this network")


def _in_blocks(apply: Callable, channels: int, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the outputs for images in [-1, 1], which go in as 8-bit numbers."""
    if x.ndim != 4 or x.shape[-1] != channels:
        raise Refusal("x", list(x.shape), f"not images of {channels} colours", "Give images [n, h, w, c]")
    outputs = []
    for i in range(0, len(x), BLOCK):
        part = np.rint((np.asarray(x[i : i + BLOCK], np.float32) + 1) * 127.5)
        part = part.repeat(3 // channels, -1)
        padded = np.concatenate([part, np.zeros((BLOCK - len(part), *part.shape[1:]), np.float32)])
        outputs.append([np.asarray(o)[: len(part)] for o in jax.device_get(apply(padded))])
    return tuple(np.concatenate(o) for o in zip(*outputs, strict=True))


def _sha256(head: bytes, *arrays: np.ndarray) -> str:
    digest = hashlib.sha256(head)
    for a in arrays:
        digest.update(f"{a.dtype.str} {a.shape}".encode() + np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()
