"""The vision transformer DINOv2 (arXiv 2304.07193), whose class token gives the features of FD-DINOv2."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.checks import Positive, check_fields

SIZE = 224  # pixels on a side of an image
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, on the scale 0 .. 1
DEVIATION = (0.229, 0.224, 0.225)


class DinoV2(nn.Module):
    """The network without registers; ``__call__`` returns the normalised class token.

    Attributes:
        depth: the number of blocks.
        heads: the number of attention heads, of 64 channels each.
        patch: the number of pixels on a side of a patch.
    """

    depth: Positive = 12
    heads: Positive = 6
    patch: Positive = 14

    def __post_init__(self):
        """Check the fields."""
        check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "n h w 3"]) -> Float[Array, "n features"]:
        """Return the features of images.

        Args:
            x: images ``[n, h, w, 3]`` whose sides are multiples of the patch, normalised by the mean and the deviation
                of ImageNet.

        Returns:
            Features ``[n, 64 heads]``.
        """
        d, p = 64 * self.heads, (self.patch, self.patch)
        x = nn.Conv(d, p, p, "VALID", precision="highest", name="patch_embed")(x)
        x = x.reshape(len(x), -1, d)
        first = self.param("cls_token", nn.initializers.zeros, (1, 1, d))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, d)), x], 1)
        x = x + self.param("pos_embed", nn.initializers.zeros, (1, x.shape[1], d))
        for i in range(self.depth):
            b = f"blocks.{i}"
            scale = lambda name, b=b: self.param(f"{b}.{name}", nn.initializers.ones, (d,))
            x = x + scale("ls1") * self._attention(b, _norm(f"{b}.norm1")(x))
            hidden = nn.gelu(_dense(4 * d, f"{b}.mlp.fc1")(_norm(f"{b}.norm2")(x)), approximate=False)
            x = x + scale("ls2") * _dense(d, f"{b}.mlp.fc2")(hidden)
        return _norm("norm")(x)[:, 0]

    def _attention(self, b: str, x: Array) -> Array:
        n, length, d = x.shape
        qkv = _dense(3 * d, f"{b}.attn.qkv")(x).reshape(n, length, 3, self.heads, 64)
        q, k, v = (qkv[:, :, i] for i in range(3))
        weights = jax.nn.softmax(jnp.einsum("nqhc,nkhc->nhqk", q, k, precision="highest") / 8, axis=-1)
        mixed = jnp.einsum("nhqk,nkhc->nqhc", weights, v, precision="highest")
        return _dense(d, f"{b}.attn.proj")(mixed.reshape(n, length, d))


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


def _dense(width: int, name: str) -> nn.Dense:
    return nn.Dense(width, precision="highest", name=name)
