"""A diffusion transformer (arXiv 2212.09748): patches, self-attention and MLP, modulated by times and label."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.nets.embedding import TwoTimes, condition
from fmjax.nets.remat import rematerialised

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads
ATTENTION = {"xla": "xla", "fused": "cudnn"}


def positions(height: int, width: int, dim: int) -> np.ndarray:
    """``[height width, dim]``: sinusoids of the row in the first half, of the column in the second, fixed.

    Each is ``[sin(w p), cos(w p)]`` with ``dim / 4`` frequencies ``w_i = 10000^(-i / (dim / 4))``, ``p = 0, 1, ...``.
    """
    w = 1e4 ** (-np.arange(dim // 4) / (dim // 4))
    half = lambda p: np.concatenate([np.sin(p[..., None] * w), np.cos(p[..., None] * w)], -1)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate([half(rows), half(columns)], -1).reshape(height * width, dim)


class Block(nn.Module):
    """``h + g1 attention(norm(h) (1 + a1) + b1)``, then ``h + g2 mlp(norm(h) (1 + a2) + b2)``: adaLN-Zero.

    The six modulations are linear in the embedding ``e`` and start at zero, so that a block starts as the identity.
    Queries and keys are RMS-normalised head by head, with a learned scale (arXiv 2302.05442).
    """

    heads: int
    dropout: float = 0.0
    attention: str = "xla"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, h: Array, e: Array, train: bool = False) -> Array:
        b, n, d = h.shape
        dense = lambda features, name, **kw: nn.Dense(features, dtype=self.dtype, name=name, **kw)
        norm = lambda x: nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(x)
        rms = lambda name: nn.RMSNorm(dtype=self.dtype, name=name)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        a1, b1, g1, a2, b2, g2 = jnp.split(dense(6 * d, "film", kernel_init=nn.initializers.zeros)(e)[:, None], 6, -1)
        qkv = dense(3 * d, "qkv")(norm(h) * (1 + a1) + b1).reshape(b, n, 3, self.heads, d // self.heads)
        q, k, v = rms("q_norm")(qkv[:, :, 0]), rms("k_norm")(qkv[:, :, 1]), qkv[:, :, 2]
        y = jax.nn.dot_product_attention(q, k, v, implementation=ATTENTION[self.attention]).reshape(b, n, d)
        h += g1 * dense(d, "out")(drop(y))
        y = nn.gelu(dense(4 * d, "up")(norm(h) * (1 + a2) + b2))
        return h + g2 * dense(d, "down")(drop(y))


class DiT(nn.Module):
    """``x: [B, H, W, C] -> [B, H, W, outputs C]`` through ``(H / patch)(W / patch)`` tokens, ``size`` S, B, L or XL.

    ``width``, ``depth`` and ``heads``, where not zero, stand for those of the size. ``attention="fused"`` takes cuDNN's
    kernel on a GPU in half precision; it has no jvp, so losses of flow maps take XLA's inside theirs (``from_linen``).
    ``classes``, ``guided``, ``outputs``, ``dropout``, ``dtype`` as in ``MLP``; times as in ``TwoTimes``, ``remat`` as
    in ``rematerialised``. The output starts at zero. ``DiT(size="XL", classes=1000, outputs=2)`` on latents
    ``[32, 32, 4]`` is the paper's DiT-XL/2 but for the second time and the norms of queries and keys.

    Layers are scanned (parameters ``blocks``, stacked) and keep their products, since that was best in ``python -m
    launch.bench --suite=layers`` (DiT-S/2 on 4 latents, 2 cores of x86_64, jax 0.10.2, float32, a busy machine):

    =================  =================  ========  ==========
    layers, ``remat``  trace + compile s  step, ms  memory, MB
    =================  =================  ========  ==========
    unrolled, none           6.0            2438       909
    unrolled, full           7.1            2986       891
    scanned, none            5.9            2941      1123
    scanned, dots            5.3            2404       363
    scanned, full            5.3            2744       237
    =================  =================  ========  ==========

    On a CPU recomputation saves memory in a scan only: XLA computes an unrolled layer again before it need.
    """

    size: str = "S"
    patch: int = 2
    width: int = 0
    depth: int = 0
    heads: int = 0
    attention: str = "xla"
    classes: int = 0
    guided: bool = False
    outputs: int = 1
    dropout: float = 0.0
    remat: str = "dots"
    scan: bool = True
    dtype: str = "float32"

    def _sizes(self, x: Array) -> tuple[int, int, int]:
        if self.size not in SIZES:
            raise ValueError(f"size of a DiT must be one of {', '.join(SIZES)}, got {self.size!r}")
        width, depth, heads = (
            a or b for a, b in zip((self.width, self.depth, self.heads), SIZES[self.size], strict=True)
        )
        if width % heads or width % 4:
            raise ValueError(f"the width of a DiT must divide by its heads and by 4, got width={width}, heads={heads}")
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(f"a DiT of patch={self.patch} needs images divisible by it, got {x.shape[1:3]}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention of a DiT must be one of {', '.join(ATTENTION)}, got {self.attention!r}")
        if self.attention == "fused" and (jax.default_backend() != "gpu" or self.dtype not in ("bfloat16", "float16")):
            raise ValueError(
                f"attention='fused' needs a GPU and dtype bfloat16 or float16, got {jax.default_backend()} and "
                f"{self.dtype}; use attention='xla'"
            )
        return width, depth, heads

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        width, depth, heads = self._sizes(x)
        b, height, columns, c = x.shape
        p, rows, columns = self.patch, height // self.patch, columns // self.patch
        e = TwoTimes(width, 256)(s, t)
        labels = nn.initializers.normal(0.02)
        e = nn.silu(condition(e, cond, classes=self.classes, guided=self.guided, init=labels))

        patches = x.reshape(b, rows, p, columns, p, c).swapaxes(2, 3).reshape(b, rows * columns, p * p * c)
        h = nn.Dense(width, dtype=self.dtype, name="input")(patches)
        h += positions(rows, columns, width).astype(h.dtype)
        block = rematerialised(Block, self.remat, static=(3,))
        how = (heads, self.dropout, self.attention, self.dtype)
        if self.scan:
            layers = nn.scan(
                lambda layer, h, _: (layer(h, e, train), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=depth,
            )
            h, _ = layers(block(*how, name="blocks"), h, None)
        else:
            for i in range(depth):
                h = block(*how, name=f"block_{i}")(h, e, train)
        shift = nn.Dense(2 * width, dtype=self.dtype, name="film", kernel_init=nn.initializers.zeros)(e)[:, None]
        a, b_ = jnp.split(shift, 2, -1)
        h = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h) * (1 + a) + b_
        out = nn.Dense(p * p * self.outputs * c, kernel_init=nn.initializers.zeros, name="output")(h)
        out = out.reshape(b, rows, columns, p, p, self.outputs * c).swapaxes(2, 3)
        return out.reshape(*x.shape[:-1], self.outputs * c).astype(x.dtype)
