"""Convert the state dicts of the networks whose features are compared: Inception of 2015 (FID) and DINOv2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fmjax.convert.states import StateDict, damage
from fmjax.types import Params

BATCH_NORM_EPS = 1e-3
HEAD = 64  # channels of an attention head in DINOv2


def inception_parameters(state: Mapping[str, Any]) -> Params:
    """Convert the state dict of the Inception network (``pt_inception-2015-12-05-6726825d.pth`` and its copies).

    Each batch norm becomes a part of the convolution before it. The bias of the last layer is left out, as in the
    published Inception score.

    Args:
        state: arrays by the names of the state dict.

    Returns:
        Parameters of ``metrics.inception.Inception``.

    Raises:
        ValueError: a tensor is missing or of an impossible shape.
    """
    source = "the Inception network of FID"
    with damage(source):
        state = StateDict({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, source)
        params = {"fc": {"kernel": state.take("fc.weight").T}}
        state.left.pop("fc.bias", None)
        while state.left:
            name = next(iter(state.left)).rpartition(".")[0].rpartition(".")[0]
            params[name] = _folded(state, name)
        return params


def _folded(state: StateDict, name: str) -> dict[str, np.ndarray]:
    """Remove a convolution and its batch norm, and return the one convolution that does the same."""
    kernel = state.take(f"{name}.conv.weight").astype(np.float64)
    weight, bias, mean, variance = (
        state.take(f"{name}.bn.{part}").astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / np.sqrt(variance + BATCH_NORM_EPS)
    folded = {"kernel": kernel.transpose(2, 3, 1, 0) * scale, "bias": bias - mean * scale}
    return {key: a.astype(np.float32) for key, a in folded.items()}


def dinov2_parameters(state: Mapping[str, Any], *, patches: int = 16) -> tuple[Params, dict[str, int]]:
    """Convert the state dict of a DINOv2 network without registers, such as ``dinov2_vits14_pretrain.pth``.

    Args:
        state: arrays by the names of the state dict.
        patches: the number of patches on a side of an image, to which the embedding of places is interpolated.

    Returns:
        ``(params, fields)``: parameters of ``metrics.dinov2.DinoV2(**fields)``.

    Raises:
        ValueError: a tensor is missing, left over or of an impossible shape.
    """
    source = "DINOv2"
    with damage(source):
        state = StateDict({k: v for k, v in state.items() if k != "mask_token"}, source)
        width, _, patch, _ = state.shape("patch_embed.proj.weight")
        params: dict[str, Any] = {"patch_embed": state.conv("patch_embed.proj"), "norm": state.norm("norm")}
        params["cls_token"], places = state.take("cls_token"), state.take("pos_embed")
        params["pos_embed"] = np.concatenate([places[:, :1], _interpolated(places[:, 1:], patches)], 1)
        depth = 0
        while f"blocks.{depth}.norm1.weight" in state:
            block = f"blocks.{depth}"
            params |= {f"{block}.{n}": state.norm(f"{block}.{n}") for n in ("norm1", "norm2")}
            params |= {
                f"{block}.{n}": state.dense(f"{block}.{n}") for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
            }
            params |= {f"{block}.{n}": state.take(f"{block}.{n}.gamma") for n in ("ls1", "ls2")}
            depth += 1
        if state.left:
            wrong = (
                f"{sorted(state.left)[0]:.60} and {len(state.left) - 1} more have no place in DINOv2 without registers"
            )
            raise ValueError(f"state: {wrong}. Give dinov2_vits14, vitb14 or vitl14, without '_reg'.")
        return params, {"depth": depth, "heads": width // HEAD, "patch": patch}


def _interpolated(places: np.ndarray, patches: int) -> np.ndarray:
    """Return the embedding of places ``[1, n, d]`` on a grid of another size, as the authors do it: bicubic (a = -3/4).

    Their scale is ``(patches + 0.1)`` over the size, and the border is repeated.
    """
    size = round(places.shape[1] ** 0.5)
    if size == patches:
        return places
    target = (np.arange(patches) + 0.5) * size / (patches + 0.1) - 0.5
    matrix, low = np.zeros((patches, size)), np.floor(target).astype(int)
    for k in range(-1, 3):
        far = np.abs(target - (low + k))
        near = (1.25 * far - 2.25) * far**2 + 1
        weight = np.where(far <= 1, near, -0.75 * (((far - 5) * far + 8) * far - 4))
        np.add.at(matrix, (np.arange(patches), np.clip(low + k, 0, size - 1)), weight)
    grid = places.reshape(size, size, -1).astype(np.float64)
    return np.einsum("ai,bj,ijd->abd", matrix, matrix, grid).reshape(1, patches**2, -1).astype(np.float32)
