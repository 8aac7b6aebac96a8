"""The plain MLP of flow maps in the plane: both times are inputs like the others."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Plain(nn.Module):
    """``depth`` hidden layers of ``width`` with GELU on ``[x, s, t - s]``, for points ``[B, d]``: the least network.

    With ``waves = times = 0`` that of arXiv 2505.18825 (section 4.1: 4 layers of 512). Beside ``x`` it sees ``sin`` and
    ``cos`` of ``2^k pi x``, ``k < waves``, without which the edges of a checkerboard take very long, and beside the
    times ``sin`` and ``cos`` of theirs, ``k < times`` (few: their derivative in time grows as ``2^k``). What multiplies
    the jump ``t - s`` starts at zero and vanishes on the diagonal; the output layer starts at zero. ``logit`` gives
    one number an example, ``[B]``. No labels, no dropout; images are flattened.
    """

    width: int = 256
    depth: int = 4
    waves: int = 4
    times: int = 2
    logit: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        flat, gap = x.reshape(x.shape[0], -1), (t - s)[:, None]
        seen = [flat, s[:, None], *_waves(flat, self.waves), *_waves(s[:, None], self.times)]
        jump = [a - b for a, b in zip([gap, *_waves(gap, self.times)], [0, *_waves(0 * gap, self.times)], strict=True)]
        h = nn.Dense(self.width, name="input")(jnp.concatenate(seen, -1))
        zeros = nn.initializers.zeros
        h += nn.Dense(self.width, use_bias=False, kernel_init=zeros, name="jump")(jnp.concatenate(jump, -1))
        for i in range(self.depth - 1):
            h = nn.Dense(self.width, name=f"hidden_{i}")(nn.gelu(h))
        shape = x.shape[:1] if self.logit else x.shape
        return nn.Dense(math.prod(shape[1:]), kernel_init=zeros, name="output")(nn.gelu(h)).reshape(shape)


def _waves(x: Array, count: int) -> list[Array]:
    return [f(2**k * np.pi * x) for k in range(count) for f in (jnp.sin, jnp.cos)]
