"""The encoder half of the U-Net, pooled to one number per example: a classifier for images and series."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.nets.unet import GroupNorm, Levels


class Encoder(Levels):
    """Classify images ``[B, H, W, C]`` or series ``[B, L, C]`` with a logit ``[B]``: half a ``UNet``, then a pooling.

    The output layer starts at zero: the initial probability is one half. The other fields are the fields of ``UNet``.

    Attributes:
        pool: how the pixels become one vector: their ``"mean"``, or ``"attention"``, with the mean as the query, the
            pixels as keys and values, and as many heads as the U-Net's attention.

    Source: arXiv 2105.05233 (the classifier of ADM).

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> x = jnp.zeros((2, 4, 4, 1))
    >>> model = nets.from_linen(Encoder(channels=8, multipliers=(1,), middle=False, pool="mean"))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> jax.eval_shape(model.net, params, x, 0.5, 0.5).shape, model.net.logit
    ((2,), True)
    """

    logit = True  # a class attribute, not a field: an encoder always returns a logit
    pool: Literal["attention", "mean"] = "attention"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *grid c"], s: Array, t: Array, cond=None, *, train: bool = False
    ) -> Float[Array, " b"]:
        """Return logits ``[B]``."""
        h, _ = self._descend(x, self._embedding(x, s, t, cond), cond, train)
        h = nn.silu(GroupNorm(self.per_group, self.dtype)(h))
        b, c = h.shape[0], h.shape[-1]
        pixels = h.reshape(b, -1, c)
        h = pixels.mean(1, keepdims=True)
        if self.pool == "attention":
            dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)
            n = self._heads(c)
            heads = lambda a: a.reshape(b, -1, n, c // n)
            k, v = jnp.split(dense(2 * c, "pool_kv")(pixels), 2, -1)
            h = jax.nn.dot_product_attention(heads(dense(c, "pool_q")(h)), heads(k), heads(v), implementation="xla")
            h = dense(c, "pool_out")(h.reshape(b, 1, c))
        return nn.Dense(1, kernel_init=nn.initializers.zeros, name="output")(h)[:, 0, 0].astype(x.dtype)
