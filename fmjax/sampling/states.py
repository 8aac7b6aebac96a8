"""The precision in which samplers carry a state."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax import checks


def wide_state(name: str, x: Any) -> tuple[Array, Any]:
    """Return a state in float32, or float64 where it is float64, and the precision to return it in.

    Args:
        name: the argument's name, for the error.
        x: states ``[B, ...]`` of a floating type.

    Returns:
        The state in the precision in which it is carried, and the type of ``x``.

    Raises:
        TypeError: for integers and other types that are not floating, and for what is no array.
        ValueError: for a state without a batch axis.
    """
    x = jnp.asarray(x) if isinstance(x, (list, tuple, np.ndarray)) and np.asarray(x).dtype.kind in "biufc" else x
    checks.check_state(name, x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)), x.dtype


def token_state(name: str, x: Any) -> tuple[Array, Any]:
    """Return a state of discrete data, and its type.

    Args:
        name: the argument's name, for the error.
        x: tokens ``[B, ...]``, integers.

    Returns:
        The state as an array, and its type.

    Raises:
        TypeError: for types that are not integers.
        ValueError: for a state without a batch axis.
    """
    x = jnp.asarray(x) if isinstance(x, (list, tuple, np.ndarray)) else x
    checks.check_state(name, x, tokens=True)
    return x, x.dtype


def time_dtype(x: Array) -> Any:
    """Return the precision of times for a state: float32, or float64 where the state is float64.

    Args:
        x: states ``[B, ...]``.

    Returns:
        A dtype.
    """
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32
