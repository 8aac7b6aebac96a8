"""What the backward pass keeps of a network's blocks and what it computes again (``jax.checkpoint``)."""

from __future__ import annotations

import flax.linen as nn


def _products(primitive, *_, **params) -> bool:
    """Convolutions, and matrix products with weights (those of attention have batch dimensions and are large)."""
    if primitive.name == "conv_general_dilated":
        return True
    return primitive.name == "dot_general" and not params["dimension_numbers"][1][0]


POLICIES = {"full": None, "dots": _products}


def rematerialised(block: type[nn.Module], remat: str, *, static: tuple[int, ...] = ()) -> type[nn.Module]:
    """A block as one that computes parts of itself again in the backward pass.

    Kept is everything (``remat="none"``), only what enters the block (``"full"``: it is computed twice), or also what
    its convolutions and dense layers give (``"dots"``). Numbers do not change. ``static`` are the places of those
    arguments of its ``__call__`` that are no arrays, ``self`` being 0. Raises ``ValueError`` for another name.
    """
    if remat == "none":
        return block
    if remat not in POLICIES:
        raise ValueError(f"remat of a network must be one of none, {', '.join(POLICIES)}, got {remat!r}")
    return nn.remat(block, policy=POLICIES[remat], static_argnums=static)
