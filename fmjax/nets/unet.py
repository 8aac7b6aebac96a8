"""A U-Net of the ADM family (arXiv 2105.05233): residual blocks, attention at chosen resolutions, skip connections."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.nets.embedding import TwoTimes


def _norm(x: Array, dtype: str) -> Array:
    """Group normalisation in float32 statistics; 32 groups, fewer where the channels do not divide."""
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if x.shape[-1] % g == 0 and x.shape[-1] >= 4 * g or g == 1)
    return nn.GroupNorm(groups, dtype=dtype)(x)


class Block(nn.Module):
    """Residual block: ``x + conv(silu(norm(conv(silu(norm(x))) + e)))``, the last convolution starting at zero."""

    features: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, e: Array, *, train: bool = False) -> Array:
        conv = lambda **kw: nn.Conv(self.features, (3, 3), dtype=self.dtype, **kw)
        h = conv(name="first")(nn.silu(_norm(x, self.dtype)))
        scale, shift = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="film")(e)[:, None, None], 2, -1)
        h = nn.silu(_norm(h, self.dtype) * (1 + scale) + shift)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(name="second", kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name="skip")(x)
        return x + h


class Attention(nn.Module):
    """Self-attention over the pixels; XLA's implementation, which has a jvp."""

    heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(_norm(x, self.dtype))
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, c // self.heads), 2, 0)
        out = jax.nn.dot_product_attention(q, k, v, implementation="xla").reshape(b, h, w, c)
        return x + nn.Dense(c, dtype=self.dtype, name="out", kernel_init=nn.initializers.zeros)(out)


class UNet(nn.Module):
    """``x: [B, H, W, C] -> [B, H, W, C]``; one level per entry of ``multipliers``, each half as wide as the last.

    ``attention`` lists the resolutions (heights) that get attention; it also stands in the middle where ``middle``.
    ``classes``, ``dropout``, ``dtype`` as in ``MLP``. The output convolution starts at zero.
    """

    channels: int = 64
    multipliers: Sequence[int] = (1, 2)
    blocks: int = 1
    attention: Sequence[int] = ()
    heads: int = 4
    middle: bool = True
    classes: int = 0
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        factor = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"a U-Net of {len(self.multipliers)} levels needs images divisible by {factor}, got {x.shape[1:3]}"
            )
        block = lambda features, h: Block(features, self.dropout, self.dtype)(h, e, train=train)
        attend = lambda h: Attention(self.heads, self.dtype)(h) if h.shape[1] in self.attention else h
        e = TwoTimes(4 * self.channels)(s, t)
        if self.classes:
            e += nn.Embed(self.classes + 1, 4 * self.channels)(cond)
        e = nn.silu(e)

        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="input")(x)
        skips = [h]
        for level, m in enumerate(self.multipliers):
            if level:
                h = nn.Conv(h.shape[-1], (3, 3), strides=2, dtype=self.dtype, name=f"down_{level}")(h)
                skips.append(h)
            for _ in range(self.blocks):
                h = attend(block(m * self.channels, h))
                skips.append(h)
        h = block(h.shape[-1], h)
        if self.middle:
            h = block(h.shape[-1], Attention(self.heads, self.dtype)(h))
        for level, m in reversed(list(enumerate(self.multipliers))):
            for _ in range(self.blocks + 1):
                h = attend(block(m * self.channels, jnp.concatenate([h, skips.pop()], -1)))
            if level:
                h = jnp.repeat(jnp.repeat(h, 2, 1), 2, 2)
                h = nn.Conv(h.shape[-1], (3, 3), dtype=self.dtype, name=f"up_{level}")(h)
        h = nn.silu(_norm(h, self.dtype))
        out = nn.Conv(x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros, name="output")(h)
        return out.astype(x.dtype)
