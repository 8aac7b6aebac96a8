"""A residual MLP with FiLM: the network for low-dimensional data and for small images, which it flattens."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.nets.embedding import TwoTimes, condition


class MLP(nn.Module):
    """``depth`` residual blocks ``h + W2 gelu(W1 (norm(h) (1 + a) + b))`` with ``a, b`` from the two times.

    ``classes > 0`` adds an embedding of integer labels ``cond: [B]`` (label ``classes`` is the null class), ``guided``
    one of guidance scales, of ``cond = (labels, scale)`` (see ``embedding.condition``).
    ``outputs > 1`` gives ``[B, ..., outputs C]`` for ``x: [B, ..., C]``, for methods that learn several fields at once;
    ``logit`` gives one number an example, ``[B]``, for those that classify.
    The output layer starts at zero. ``dtype`` is the compute type; parameters and times are float32.
    """

    width: int = 256
    depth: int = 3
    classes: int = 0
    guided: bool = False
    outputs: int = 1
    logit: bool = False
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        dense = lambda features, **kw: nn.Dense(features, dtype=self.dtype, **kw)
        e = TwoTimes(self.width)(s, t)
        e = nn.silu(condition(e, cond, classes=self.classes, guided=self.guided))
        h = dense(self.width, name="input")(x.reshape(x.shape[0], -1))
        for i in range(self.depth):
            film = dense(2 * self.width, name=f"film_{i}")(e)
            a, b = jnp.split(film, 2, -1)
            r = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h) * (1 + a) + b
            r = nn.gelu(dense(self.width, name=f"up_{i}")(r))
            r = nn.Dropout(self.dropout, deterministic=not train)(r)
            h += dense(self.width, name=f"down_{i}")(r)
        h = nn.LayerNorm(dtype=self.dtype)(h)
        if self.logit and self.outputs != 1:
            raise ValueError(f"logit=True gives one number an example: outputs={self.outputs} must then be 1")
        shape = x.shape[:1] if self.logit else (*x.shape[:-1], self.outputs * x.shape[-1])
        out = nn.Dense(math.prod(shape[1:]), kernel_init=nn.initializers.zeros, name="output")(h)
        return out.reshape(shape).astype(x.dtype)
