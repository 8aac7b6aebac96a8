"""Find the state dict in a checkpoint: which entry it is, and the bare names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fmjax.checks import Refusal

# of DataParallel, Lightning, averages, torch.compile, FSDP and DeepSpeed
WRAPPERS = re.compile(
    r"(?:(?:module|model|net|network|unet|ema|ema_model|model_ema|_orig_mod|_fsdp_wrapped_module|_forward_module)\.)+"
)
DEPTH = 4  # of dictionaries in dictionaries: {"ema": {"module": {...}}}
TORCHCFM = {"net_model", "ema_model"}  # torchcfm's own checkpoints: the trained and the averaged network
MARKS = {"edm": "map_layer0.weight", "torchcfm": "time_embed.0.weight"}


def bare(name: str) -> str:
    """Return the name of a tensor without the prefixes of wrappers.

    Args:
        name: name in a state dict.

    Returns:
        The name inside the network.

    >>> bare("module._orig_mod.out.0.weight"), bare("out._orig_mod.0.weight")
    ('out.0.weight', 'out.0.weight')
    """
    wrappers = WRAPPERS.match(name)
    return name[wrappers.end() if wrappers else 0 :].replace("_orig_mod.", "")


def network_kind(state: Mapping[str, Any]) -> str | None:
    """Return whose names a state dict has.

    Args:
        state: arrays by name.

    Returns:
        ``"edm"``, ``"torchcfm"``, or ``None`` for other names.
    """
    names = {bare(name) for name in state if isinstance(name, str)}
    return next((kind for kind, mark in MARKS.items() if mark in names), None)


def state_dict(content: Any, *, part: str | None = None) -> tuple[dict[str, np.ndarray], str | None]:
    """Return the state dict of a checkpoint: the whole file, or the one entry that can be meant.

    An entry may lie deeper, as ``"ema.module"`` in ``{"ema": {"module": average}}``. Where several entries are
    networks, as in ``{"model": raw, "model_ema": average}``, the choice is the user's. Of
    torchcfm's own ``net_model`` and ``ema_model`` the average is taken.

    Args:
        content: what ``weights.read`` returns.
        part: the entry; ``None`` takes the only one that can be meant.

    Returns:
        The state dict, arrays by name, and the name of its entry (``None``: the whole file).

    Raises:
        ValueError: no state dict, or several.

    >>> network = {"time_embed.0.weight": np.zeros((4, 1))}
    >>> state_dict({"model": network, "sigma": np.ones(3), "epoch": 7})[1]
    'model'
    >>> state_dict({"model": network, "model_ema": network})
    Traceback (most recent call last):
    fmjax.checks.Refusal: part=None: the file has several networks, model, model_ema. Give one of them as --part.
    """
    entries = content if isinstance(content, dict) else {}
    states: dict[str | None, dict[str, np.ndarray]] = {None: _arrays(entries), **_within(entries)}
    states = {name: state for name, state in states.items() if state}
    offered = ", ".join(f"{name:.40}" for name in states if name is not None) or "none"
    if part is not None:
        if part not in states:
            raise Refusal("part", part, f"the file has no such state dict; it has {offered}", "Give one of its parts")
        return states[part], part
    networks = [name for name, state in states.items() if network_kind(state)]
    chosen = networks or ([None] if None in states else list(states))
    if set(chosen) == TORCHCFM:
        chosen = ["ema_model"]
    if not chosen:
        raise Refusal("part", None, "the file has no state dict, a dictionary of tensors", "Give another file")
    if len(chosen) > 1:
        names = ", ".join("the file itself" if name is None else f"{name:.40}" for name in chosen)
        raise Refusal("part", None, f"the file has several networks, {names}", "Give one of them as --part")
    return states[chosen[0]], chosen[0]


def _within(content: dict) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every dictionary inside a dictionary, by the path to it; each object is entered once."""
    states, level, seen = {}, [("", content)], {id(content)}
    for _ in range(DEPTH):
        following = []
        for path, entry in level:
            for name, inner in entry.items():
                if isinstance(name, str) and isinstance(inner, dict):
                    states[f"{path}{name}"] = _arrays(inner)
                    if id(inner) not in seen:
                        seen.add(id(inner))
                        following.append((f"{path}{name}.", inner))
        level = following
    return states


def _arrays(entry: Any) -> dict[str, np.ndarray]:
    """The arrays of a dictionary by name; nothing of another object."""
    if not isinstance(entry, dict):
        return {}
    return {name: a for name, a in entry.items() if isinstance(name, str) and isinstance(a, np.ndarray)}
