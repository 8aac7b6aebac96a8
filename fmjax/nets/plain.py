"""The plain MLP of flow maps in the plane: both times are inputs like the coordinates."""

from __future__ import annotations

import math
from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.checks import Range
from fmjax.nets import base
from fmjax.nets.embedding import refuse_condition

Octaves = Annotated[int, Range(0, 32)]


class Plain(base.Checked):
    """Map points ``[B, d]`` by hidden layers with GELU on ``[x, s, t - s]``: the smallest network.

    With ``waves = times = 0``, depth 4 and width 512 it is the network of arXiv 2505.18825, section 4.1. The inputs
    that depend on the jump ``t - s`` have weights that start at zero, and they vanish on the diagonal; the output
    layer starts at zero. The network has no labels and no dropout; it flattens images.

    Attributes:
        width: width of the hidden layers.
        depth: number of hidden layers.
        waves: number of octaves of ``sin(2^k pi x)`` and ``cos(2^k pi x)`` beside ``x``. Without them the edges of a
            checkerboard are learned very slowly.
        times: number of octaves beside the times. Keep it small: the derivative in time grows as ``2^times``.
        logit: whether the network returns one number per example, ``[B]``.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> model = nets.from_linen(Plain(width=8, depth=1))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))
    >>> jax.eval_shape(model.net, params, jnp.ones((3, 2)), 0.0, 1.0).shape
    (3, 2)
    """

    width: base.Width = 256
    depth: Annotated[int, Range(1, 1024)] = 4
    waves: Octaves = 4
    times: Octaves = 2
    logit: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        """Return values of the shape of ``x``, or logits ``[B]``."""
        refuse_condition(cond, "the network 'plain' has no labels", "Use the network 'mlp' with classes, or omit cond")
        flat, gap = x.reshape(x.shape[0], -1), (t - s)[:, None]
        inputs = [flat, s[:, None], *_waves(flat, self.waves), *_waves(s[:, None], self.times)]
        jump = [a - b for a, b in zip([gap, *_waves(gap, self.times)], [0, *_waves(0 * gap, self.times)], strict=True)]
        h = nn.Dense(self.width, name="input")(jnp.concatenate(inputs, -1))
        zeros = nn.initializers.zeros
        h += nn.Dense(self.width, use_bias=False, kernel_init=zeros, name="jump")(jnp.concatenate(jump, -1))
        for i in range(self.depth - 1):
            h = nn.Dense(self.width, name=f"hidden_{i}")(nn.gelu(h))
        shape = x.shape[:1] if self.logit else x.shape
        return nn.Dense(math.prod(shape[1:]), kernel_init=zeros, name="output")(nn.gelu(h)).reshape(shape)


def _waves(x: Array, count: int) -> list[Array]:
    return [f(2**k * np.pi * x) for k in range(count) for f in (jnp.sin, jnp.cos)]
