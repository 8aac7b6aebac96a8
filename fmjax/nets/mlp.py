"""A residual MLP with FiLM: a network for low-dimensional data and for small images, which it flattens."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.nets import base
from fmjax.nets.embedding import TwoTimes, condition


class MLP(base.Checked):
    """Map ``x: [B, ..., C]`` to ``[B, ..., outputs C]`` by residual blocks that are modulated by the two times.

    A block is ``h + W2 gelu(W1 (norm(h) (1 + a) + b))``, with ``a`` and ``b`` linear in the embedding of the times and
    of the condition. The output layer starts at zero.

    Attributes:
        width: width of the blocks.
        depth: number of blocks.
        classes: number of labels; 0: the network takes no condition. Label ``classes`` is the null label.
        guided: whether the condition may be a pair ``(labels, scale)`` (``embedding.condition``).
        floats: whether the network takes float conditions ``[B, ...]`` (``embedding.condition``).
        outputs: number of fields of the shape of ``x``, for methods that learn several at once.
        logit: whether the network returns one number per example, ``[B]``, for methods that classify.
        dropout: probability that a hidden unit is dropped, in training.
        dtype: type of the computation; parameters and times are float32.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> model = nets.from_linen(MLP(width=8, depth=1))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))
    >>> jax.eval_shape(model.net, params, jnp.ones((3, 2)), 0.0, 1.0).shape
    (3, 2)
    """

    width: base.Width = 256
    depth: base.Depth = 3
    classes: base.Classes = 0
    guided: bool = False
    floats: bool = False
    outputs: base.Outputs = 1
    logit: bool = False
    dropout: base.Dropout = 0.0
    dtype: base.Dtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        if self.logit and self.outputs != 1:
            raise ValueError(f"outputs={self.outputs}: a logit is one number per example. Set outputs=1.")

    @nn.compact
    def __call__(self, x: Float[Array, "b ..."], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        """Return the outputs ``[B, ..., outputs C]``, or logits ``[B]``."""
        dense = lambda features, **kw: nn.Dense(features, dtype=self.dtype, **kw)
        e = TwoTimes(self.width)(s, t)
        e = nn.silu(condition(e, cond, classes=self.classes, guided=self.guided, floats=self.floats))
        h = dense(self.width, name="input")(x.reshape(x.shape[0], -1))
        for i in range(self.depth):
            film = dense(2 * self.width, name=f"film_{i}")(e)
            a, b = jnp.split(film, 2, -1)
            r = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h) * (1 + a) + b
            r = nn.gelu(dense(self.width, name=f"up_{i}")(r))
            r = nn.Dropout(self.dropout, deterministic=not train)(r)
            h += dense(self.width, name=f"down_{i}")(r)
        h = nn.LayerNorm(dtype=self.dtype)(h)
        shape = x.shape[:1] if self.logit else (*x.shape[:-1], self.outputs * x.shape[-1])
        out = nn.Dense(math.prod(shape[1:]), kernel_init=nn.initializers.zeros, name="output")(h)
        return out.reshape(shape).astype(x.dtype)
