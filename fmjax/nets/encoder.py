"""The encoder half of the U-Net, pooled to one number an example: the classifier's network for images."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.nets.unet import GroupNorm, Levels

POOLS = ("attention", "mean")


class Encoder(Levels):
    """``x: [B, H, W, C] -> [B]``, a logit: ``UNet``'s way down and middle, with its options (arXiv 2105.05233).

    What the middle gives is pooled over its pixels: their ``"mean"``, or ``"attention"``, in which that mean asks, with
    the heads of ``UNet``'s attention, and the pixels answer. The output layer starts at zero: probability one half.
    Raises ``ValueError`` for another ``pool``, and as ``UNet`` does.
    """

    logit = True  # no field: there is nothing to choose
    pool: str = "attention"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], s: Array, t: Array, cond=None, *, train: bool = False
    ) -> Float[Array, " b"]:
        if self.pool not in POOLS:
            raise ValueError(f"pool of an encoder is one of {', '.join(POOLS)}, got {self.pool!r}")
        h, _ = self._descend(x, self._embedding(s, t, cond), train)
        h = nn.silu(GroupNorm(self.per_group, self.dtype)(h))
        b, *_, c = h.shape
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
