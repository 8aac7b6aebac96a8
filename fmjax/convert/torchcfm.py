"""Convert a state dict of torchcfm's U-Net, or of guided-diffusion's original, to parameters of ``UNet``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fmjax.convert.states import StateDict, damage
from fmjax.nets.unet import UNet
from fmjax.types import Params


class _State(StateDict):
    """A state dict whose blocks become parameters of ``unet.Block``."""

    def block(self, name: str, film: bool) -> Params:
        p = {"GroupNorm_0": self.norm(f"{name}.in_layers.0"), "first": self.conv(f"{name}.in_layers.2")}
        p["film" if film else "shift"] = self.dense(f"{name}.emb_layers.1")
        p |= {"GroupNorm_1": self.norm(f"{name}.out_layers.0"), "second": self.conv(f"{name}.out_layers.3")}
        return p | ({"skip": self.dense(f"{name}.skip_connection")} if f"{name}.skip_connection.weight" in self else {})

    def attention(self, name: str, heads: int, by_head: bool) -> Params:
        """Return an attention; ``by_head``: its ``qkv`` is ordered (head, 3, channel) and not (3, head, channel)."""
        qkv = self.dense(f"{name}.qkv")
        if by_head:
            for key, a in qkv.items():
                qkv[key] = a.reshape(*a.shape[:-1], heads, 3, -1).swapaxes(-3, -2).reshape(a.shape)
        return {"GroupNorm_0": self.norm(f"{name}.norm"), "qkv": qkv, "out": self.dense(f"{name}.proj_out")}


def unet(
    state: Mapping[str, Any],
    *,
    size: int,
    heads: int = 1,
    head_channels: int = 0,
    new_attention_order: bool = False,
    null_class: bool = False,
) -> tuple[Params, dict[str, Any]]:
    """Convert a state dict of torchcfm's ``UNetModel``.

    The second time starts at zero. A table of labels has no null label in torchcfm: the result gets one as a row of
    zeros, unless ``null_class`` is set.

    Args:
        state: arrays by the names of the state dict; prefixes of wrappers (``module.``, ``_orig_mod.``) are dropped.
        size: height of the images, in pixels.
        heads: torchcfm's ``num_heads``.
        head_channels: torchcfm's ``num_head_channels``; if positive, it replaces ``heads``.
        new_attention_order: torchcfm's ``use_new_attention_order``.
        null_class: whether the last row of the table was trained as the null label.

    Returns:
        ``(params, fields)``: ``UNet(**fields)`` with ``params`` is torchcfm's network on the diagonal.

    Raises:
        ValueError: a tensor is missing, left over, or of a shape that ``UNet`` does not have.
    """
    with damage("torchcfm's U-Net"):
        state = _State(state, "torchcfm's U-Net")
        return _unet(state, size, heads, head_channels, new_attention_order, null_class)


def _unet(
    state: _State, size: int, heads: int, head_channels: int, new_attention_order: bool, null_class: bool
) -> tuple[Params, dict[str, Any]]:
    fields = _fields(state, size, heads, head_channels, null_class)
    net = UNet(**fields)
    params = {"TwoTimes_0": {"source": state.dense("time_embed.0"), "mix": state.dense("time_embed.2")}}
    params["TwoTimes_0"]["jump"] = {"kernel": np.zeros((64, 4 * net.channels), np.float32)}
    if net.classes:
        table = state.take("label_emb.weight")
        null = np.zeros((0 if null_class else 1, table.shape[1]), np.float32)
        params["Embed_0"] = {"embedding": np.concatenate([table, null])}

    def put(name: str, theirs: str, width: int = 0) -> None:
        """Convert block ``theirs.0`` and the attention after it, if there is one."""
        params[name] = state.block(f"{theirs}.0", net.film)
        if f"{theirs}.1.qkv.weight" in state:
            attend(name, f"{theirs}.1", width * channels)

    def attend(name: str, theirs: str, width: int) -> None:
        n = width // head_channels if head_channels else heads
        params[f"{name}_attention"] = state.attention(theirs, n, not new_attention_order)

    def join(name: str, theirs: str, conv: str) -> None:
        block = net.resample == "block"
        params[name] = state.block(theirs, net.film) if block else state.conv(f"{theirs}.{conv}")

    channels, levels, at = net.channels, list(enumerate(net.multipliers)), 1
    params["input"] = state.conv("input_blocks.0.0")
    for level, m in levels:
        if level:
            join(f"down_{level}", f"input_blocks.{at}.0", "op")
            at += 1
        for i in range(net.blocks):
            put(f"in_{level}_{i}", f"input_blocks.{at}", m)
            at += 1
    for i, j in ((0, 0), (1, 2)):
        params[f"middle_{i}"] = state.block(f"middle_block.{j}", net.film)
    attend("middle", "middle_block.1", net.multipliers[-1] * channels)
    at = 0
    for level, m in reversed(levels):
        for i in range(net.blocks + 1):
            last = f"output_blocks.{at}.{2 if f'output_blocks.{at}.1.qkv.weight' in state else 1}"
            put(f"out_{level}_{i}", f"output_blocks.{at}", m)
            at += 1
        if level:
            join(f"up_{level}", last, "conv")
    params |= {"GroupNorm_0": state.norm("out.0"), "output": state.conv("out.2")}
    return state.checked(net, params, size), fields


def _fields(state: _State, size: int, heads: int, head_channels: int, null_class: bool) -> dict[str, Any]:
    """The fields of ``UNet`` that a state dict determines: all but the heads and the height of the images."""
    channels = state.shape("time_embed.0.weight")[1]
    colours = state.shape("input_blocks.0.0.weight")[1]
    outputs = state.shape("out.2.weight")[0]
    out = 0
    while f"output_blocks.{out}.0.in_layers.2.weight" in state:
        out += 1
    has = lambda i, part: [f"output_blocks.{i}.{j}.{part}.weight" in state for j in (1, 2)]
    convs, blocks = (sum(any(has(i, part)) for i in range(out)) for part in ("conv", "in_layers.2"))
    levels = 1 + convs + blocks
    if out == 0 or out % levels or out == levels or convs and blocks:
        raise ValueError(
            f"state: {convs + blocks} of its {out} output blocks double the size, which is no torchcfm U-Net. "
            "Give a network with learned resampling (conv_resample=True)."
        )
    each = out // levels
    width = lambda level: state.shape(f"output_blocks.{each * (levels - 1 - level)}.0.out_layers.3.weight")[0]
    attends = [level for level in range(levels) if has(each * (levels - 1 - level), "qkv")[0]]
    film, features = (state.shape(f"middle_block.0.{n}")[0] for n in ("emb_layers.1.bias", "out_layers.3.bias"))
    for name, value, unit in (
        ("a channel multiplier", width(0), channels),
        ("the number of outputs", outputs, colours),
    ):
        if value % unit:
            raise ValueError(f"state: {name} is {value}/{unit}, not a whole number. fmjax's U-Net cannot represent it.")
    classes = state.shape("label_emb.weight")[0] - null_class if "label_emb.weight" in state else 0
    return {
        "channels": channels,
        "multipliers": tuple(width(level) // channels for level in range(levels)),
        "blocks": each - 1,
        "attention": tuple(size // 2**level for level in attends),
        "heads": heads,
        "head_channels": head_channels,
        "film": film == 2 * features,
        "per_group": 1,
        "spectrum": "slow",
        "resample": "block" if blocks else "conv",
        "classes": classes,
        "outputs": outputs // colours,
    }
