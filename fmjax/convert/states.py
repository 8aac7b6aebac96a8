"""A PyTorch state dict that records which of its tensors a converter has used."""

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


class StateDict:
    """Give out the tensors of a state dict in Flax's layout, each once.

    Attributes:
        left: the tensors that are not yet used, by name.
        source: name of the network, for messages.
    """

    def __init__(self, state: Mapping[str, Any], source: str, prefix: str = "module."):
        """Take a state dict and drop ``prefix`` from its names."""
        self.left = {name.removeprefix(prefix): np.asarray(a) for name, a in state.items()}
        self.source = source

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; ``ValueError`` if the state dict does not have it."""
        if name not in self.left:
            raise ValueError(
                f"state: {name!r} is missing ({_first(self.left)}). Give a state dict of {self.source}, whole."
            )
        return self.left[name].shape

    def take(self, name: str) -> np.ndarray:
        """Remove a tensor and return it as float32."""
        self.shape(name)
        return self.left.pop(name).astype(np.float32)

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """Remove a norm and return its parameters."""
        return {"scale": self.take(f"{name}.weight"), "bias": self.take(f"{name}.bias")}

    def dense(self, name: str) -> dict[str, np.ndarray]:
        """Remove a linear layer or a one-pixel convolution and return it: ``[out, in, 1 ...]`` to ``[in, out]``."""
        w = self.take(f"{name}.weight")
        return {"kernel": w.reshape(w.shape[:2]).T, "bias": self.take(f"{name}.bias")}

    def conv(self, name: str) -> dict[str, np.ndarray]:
        """Remove a convolution and return it: ``[out, in, height, width]`` to ``[height, width, in, out]``."""
        return {"kernel": self.take(f"{name}.weight").transpose(2, 3, 1, 0), "bias": self.take(f"{name}.bias")}

    def checked(self, module: nn.Module, params: Params, size: int) -> Params:
        """Return ``params`` as JAX arrays, if they are the parameters of ``module`` and no tensor is left.

        Args:
            module: the network in fmjax.
            params: its parameters, as numpy arrays.
            size: height of its images.

        Returns:
            The parameters.

        Raises:
            ValueError: a tensor is left over, missing or has another shape.
        """
        network = _describe(module)
        if self.left:
            raise ValueError(
                f"state: {_first(self.left)} has no place in {network}. Give a state dict of {self.source} alone."
            )
        x = jnp.zeros((1, size, size, params["input"]["kernel"].shape[2]))
        cond = jnp.zeros(1, "int32") if module.classes else None
        shapes = lambda tree: {jax.tree_util.keystr(k): a.shape for k, a in jax.tree_util.tree_leaves_with_path(tree)}
        expected, actual = shapes(jax.eval_shape(from_linen(module).init, jax.random.key(0), x, cond)), shapes(params)
        for name in sorted(expected | actual):
            if expected.get(name) != actual.get(name):
                raise ValueError(
                    f"state: {name} has shape {actual.get(name)}, and {expected.get(name)} in {network}. "
                    f"Give a state dict of {self.source}, whole."
                )
        return jax.tree.map(jnp.asarray, params)


def _first(names) -> str:
    """The first three of some names, and the number of the others."""
    names = sorted(names)
    if not names:
        return "nothing left"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _describe(module: nn.Module) -> str:
    """A module with the fields that differ from their defaults."""
    fields = [f for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    changed = [f"{f.name}={v!r}" for f in fields if (v := getattr(module, f.name)) != f.default]
    return f"{type(module).__name__}({', '.join(changed)})"
