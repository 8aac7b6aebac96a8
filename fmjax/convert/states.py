"""A PyTorch state dict that records which of its tensors a converter has used."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmjax.convert.parts import bare
from fmjax.nets.adapters import from_linen
from fmjax.types import Params

MOST_TENSORS = 2000  # a network of more tensors takes too long to trace


def check_tensor(name: str, array: np.ndarray) -> None:
    """Refuse a tensor that is empty or has values that are not finite in float32.

    Args:
        name: name of the tensor, for the message.
        array: the tensor.

    Raises:
        ValueError: an empty tensor, another kind of values, or values that are not finite.
    """
    try:
        with np.errstate(over="ignore"):
            values = array.astype(np.float32, copy=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state: {name:.60} holds no numbers. Give a state dict of tensors.") from error
    if array.dtype.kind == "c" or not array.size:
        raise ValueError(f"state: {name:.60} is complex or empty. Give a state dict of real weights.")
    if not np.isfinite(values).all():
        raise ValueError(f"state: {name:.60} has values that are not finite. Give a checkpoint of an earlier step.")


@contextlib.contextmanager
def damage(source: str) -> Iterator[None]:
    """Turn what a state dict of impossible shapes causes into one refusal.

    Args:
        source: name of the network, for the message.

    Yields:
        Nothing.

    Returns:
        A context.
    """
    try:
        yield
    except (ArithmeticError, LookupError, AttributeError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"state: its tensors do not make a network ({type(error).__name__}). Give a state dict of {source}, whole."
        ) from error


class StateDict:
    """Give out the tensors of a state dict in Flax's layout, each once.

    Attributes:
        left: the tensors that are not yet used, by name.
        source: name of the network, for messages.
    """

    def __init__(self, state: Mapping[str, Any], source: str):
        """Take a state dict of finite numbers and drop the prefixes of wrappers from its names."""
        if len(state) > MOST_TENSORS:
            raise ValueError(f"state: it has {len(state)} tensors. Give a state dict of {source} alone.")
        self.left, self.source = {}, source
        for name, a in state.items():
            inner = bare(name)
            if inner in self.left:
                raise ValueError(f"state: two tensors are named {inner:.60}. Give the state dict of one network.")
            check_tensor(name, self.left.setdefault(inner, np.asarray(a)))
        if "n_averaged" in self.left and self.left["n_averaged"].size == 1:  # the counter of torch's AveragedModel
            del self.left["n_averaged"]

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
        x = jax.ShapeDtypeStruct((1, size, size, params["input"]["kernel"].shape[2]), jnp.float32)
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
    return ", ".join(f"{name:.60}" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _describe(module: nn.Module) -> str:
    """A module with the fields that differ from their defaults."""
    fields = [f for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "name")]
    changed = [f"{f.name}={v!r}" for f in fields if (v := getattr(module, f.name)) != f.default]
    return f"{type(module).__name__}({', '.join(changed)})"
