"""Rematerialisation: which values of a network's blocks the backward pass keeps, and which it computes again."""

from __future__ import annotations

import flax.linen as nn


def _products(primitive, *_, **params) -> bool:
    """Convolutions, and matrix products with weights (attention's products have batch dimensions and are large)."""
    if primitive.name == "conv_general_dilated":
        return True
    return primitive.name == "dot_general" and not params["dimension_numbers"][1][0]


POLICIES = {"full": None, "dots": _products}


def rematerialised(block: type[nn.Module], remat: str, *, static: tuple[int, ...] = ()) -> type[nn.Module]:
    """Return a block that computes parts of itself again in the backward pass (``jax.checkpoint``).

    The numbers do not change.

    Args:
        block: class of the block.
        remat: what is kept: everything (``"none"``); the inputs of the block and the results of its convolutions and
            dense layers (``"dots"``); the inputs of the block only (``"full"``).
        static: positions of the arguments of ``__call__`` that are not arrays; ``self`` is position 0.

    Returns:
        A class of modules with the same parameters.

    Raises:
        ValueError: ``remat`` is not a choice.
    """
    if remat == "none":
        return block
    if remat not in POLICIES:
        raise ValueError(f"remat={remat!r}: not a choice. Give one of 'none', {', '.join(map(repr, POLICIES))}.")
    return nn.remat(block, policy=POLICIES[remat], static_argnums=static)
