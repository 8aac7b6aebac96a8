"""What converters share: a PyTorch state dict that knows what of it has found its place in a network of fmjax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax.nets.adapters import from_linen
from fmjax.types import Params


class State:
    """A state dict of ``what``, a prefix of all its names dropped; tensors leave it in the layout of Flax."""

    def __init__(self, state: Mapping[str, Any], what: str, prefix: str = "module."):
        self.left = {name.removeprefix(prefix): np.asarray(a) for name, a in state.items()}
        self.what = what

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.left:
            raise ValueError(f"not a state dict of {self.what}: it has no {name!r} ({_some(self.left)})")
        return self.left[name].shape

    def take(self, name: str) -> np.ndarray:
        self.shape(name)
        return self.left.pop(name).astype(np.float32)

    def norm(self, name: str) -> dict[str, np.ndarray]:
        return {"scale": self.take(f"{name}.weight"), "bias": self.take(f"{name}.bias")}

    def dense(self, name: str) -> dict[str, np.ndarray]:
        """A linear layer or a convolution of one pixel: ``[out, in, 1 ...]`` to ``[in, out]``."""
        w = self.take(f"{name}.weight")
        return {"kernel": w.reshape(w.shape[:2]).T, "bias": self.take(f"{name}.bias")}

    def conv(self, name: str) -> dict[str, np.ndarray]:
        """``[out, in, height, width]`` to ``[height, width, in, out]``."""
        return {"kernel": self.take(f"{name}.weight").transpose(2, 3, 1, 0), "bias": self.take(f"{name}.bias")}

    def checked(self, module: nn.Module, params: Params, size: int) -> Params:
        """``params`` as JAX arrays, if they are those of ``module`` on images of height ``size`` and nothing is left.

        Raises ``ValueError`` naming what is left over, missing or of another shape.
        """
        told = _told(module)
        if self.left:
            raise ValueError(f"this is more than {self.what}: {_some(self.left)} has no place in {told}")
        x = jnp.zeros((1, size, size, params["input"]["kernel"].shape[2]))
        cond = jnp.zeros(1, "int32") if module.classes else None
        flat = lambda tree: {jax.tree_util.keystr(k): a.shape for k, a in jax.tree_util.tree_leaves_with_path(tree)}
        want, got = flat(jax.eval_shape(from_linen(module).init, jax.random.key(0), x, cond)), flat(params)
        for name in sorted(want | got):
            if want.get(name) != got.get(name):
                raise ValueError(f"{name} has shape {got.get(name)} here and {want.get(name)} in {told}")
        return jax.tree.map(jnp.asarray, params)


def _some(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing left"


def _told(module: nn.Module) -> str:
    fields = [f for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    told = [f"{f.name}={v!r}" for f in fields if (v := getattr(module, f.name)) != f.default]
    return f"{type(module).__name__}({', '.join(told)})"
