"""A diffusion transformer (arXiv 2212.09748): patches, self-attention and MLP, modulated by times and label."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.checks import Positive
from fmjax.nets import base
from fmjax.nets.embedding import TwoTimes, by_channels, condition
from fmjax.nets.remat import rematerialised

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # width, depth, heads
ATTENTION = {"xla": "xla", "fused": "cudnn"}


def positions(height: int, width: int, dim: int) -> np.ndarray:
    """Return fixed embeddings of the positions in a grid: sinusoids of the row, then of the column.

    Each half is ``[sin(w p), cos(w p)]`` with ``dim / 4`` frequencies ``w_i = 10000^(-i / (dim / 4))`` and
    ``p = 0, 1, ...``.

    Args:
        height: number of rows.
        width: number of columns.
        dim: width of the embedding, divisible by 4.

    Returns:
        Embeddings ``[height width, dim]``, row by row.
    """
    w = 1e4 ** (-np.arange(dim // 4) / (dim // 4))
    half = lambda p: np.concatenate([np.sin(p[..., None] * w), np.cos(p[..., None] * w)], -1)
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate([half(rows), half(columns)], -1).reshape(height * width, dim)


def positions_of_series(length: int, dim: int) -> np.ndarray:
    """Return fixed embeddings of the positions in a series, ``[sin(w p), cos(w p)]`` with ``dim / 2`` frequencies.

    Args:
        length: number of tokens.
        dim: width of the embedding, even; the frequencies are ``w_i = 10000^(-i / (dim / 2))``.

    Returns:
        Embeddings ``[length, dim]``.
    """
    angle = np.arange(length)[:, None] * 1e4 ** (-np.arange(dim // 2) / (dim // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], -1)


def _patches(x: Array, p: int) -> Array:
    """Return the patches of images or series as tokens ``[B, n, p^2 C]`` or ``[B, n, p C]``, row by row."""
    if x.ndim == 3:
        return x.reshape(x.shape[0], x.shape[1] // p, p * x.shape[2])
    b, height, width, c = x.shape
    tiles = x.reshape(b, height // p, p, width // p, p, c).swapaxes(2, 3)
    return tiles.reshape(b, height * width // p**2, p * p * c)


def _whole(tokens: Array, p: int, shape: tuple[int, ...]) -> Array:
    """Return tokens as images or series of a shape: the inverse of ``_patches``."""
    if len(shape) == 3:
        return tokens.reshape(shape)
    b, height, width, c = shape
    return tokens.reshape(b, height // p, width // p, p, p, c).swapaxes(2, 3).reshape(shape)


class Block(nn.Module):
    """Apply attention and an MLP: ``h + g1 attention(norm(h) (1 + a1) + b1)``, ``h + g2 mlp(norm(h) (1 + a2) + b2)``.

    The six modulations are linear in the embedding ``e`` and start at zero (adaLN-Zero), so that a block starts as
    the identity. Queries and keys are RMS-normalised per head, with a learned scale (arXiv 2302.05442).

    Attributes:
        heads: number of attention heads.
        dropout: probability that a hidden unit is dropped, in training.
        attention: implementation of attention, a key of ``ATTENTION``.
        dtype: type of the computation.
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


class DiT(base.Checked):
    """Map images ``[B, H, W, C]`` or series ``[B, L, C]`` to ``[..., outputs C]`` by a transformer on patches.

    Images give ``(H / patch)(W / patch)`` tokens, series ``L / patch``. The output starts at zero. Float conditions on
    the grid of ``x`` are further channels of its patches, and others are embedded with the times.

    ``DiT(size="XL", classes=1000, outputs=2)`` on latents ``[32, 32, 4]`` is the paper's
    DiT-XL/2, except for the second time and the norms of queries and keys.

    Attributes:
        size: one of the published sizes, which sets width, depth and heads.
        patch: height and width of a patch of images, length of a patch of series.
        width: width of a token; if positive, it replaces the width of ``size``.
        depth: number of blocks; if positive, it replaces the depth of ``size``.
        heads: number of attention heads; if positive, it replaces the heads of ``size``.
        attention: ``"xla"``, or ``"fused"`` for cuDNN's kernel, on a GPU in half precision. The kernel has no jvp;
            losses of flow maps use XLA's attention inside their jvp (``Network.for_jvp``).
        classes: see ``MLP``.
        guided: see ``MLP``.
        floats: see ``MLP``.
        outputs: see ``MLP``.
        dropout: see ``MLP``.
        remat: see ``remat.rematerialised``.
        scan: whether the blocks are one scanned block with stacked parameters ``blocks``.
        dtype: see ``MLP``.

    The defaults of ``remat`` and ``scan`` were the best in ``python -m launch.bench --suite=layers`` (DiT-S/2 on 4
    latents, 2 cores of x86_64, jax 0.10.2, float32, a busy machine):

    =================  =================  ========  ==========
    layers, ``remat``  trace + compile s  step, ms  memory, MB
    =================  =================  ========  ==========
    unrolled, none           6.0            2438       909
    unrolled, full           7.1            2986       891
    scanned, none            5.9            2941      1123
    scanned, dots            5.3            2404       363
    scanned, full            5.3            2744       237
    =================  =================  ========  ==========

    On a CPU rematerialisation saves memory in a scan only: XLA computes an unrolled layer again earlier than needed.

    Source: arXiv 2212.09748.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> x = jnp.zeros((2, 4, 4, 1))
    >>> model = nets.from_linen(DiT(width=8, depth=1, heads=1))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> jax.eval_shape(model.net, params, x, 0.0, 1.0).shape
    (2, 4, 4, 1)
    """

    size: Literal["S", "B", "L", "XL"] = "S"
    patch: Positive = 2
    width: base.Depth = 0
    depth: base.Depth = 0
    heads: base.Depth = 0
    attention: Literal["xla", "fused"] = "xla"
    classes: base.Classes = 0
    guided: bool = False
    floats: bool = False
    outputs: base.Outputs = 1
    dropout: base.Dropout = 0.0
    remat: base.Remat = "dots"
    scan: bool = True
    dtype: base.Dtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        width, _, heads = self._sizes()
        if width % heads or width % 4:
            raise ValueError(f"width={width}: not divisible by heads={heads} and by 4. Give a common multiple of them.")

    def _sizes(self) -> tuple[int, int, int]:
        """Width, depth and heads."""
        own = (self.width, self.depth, self.heads)
        return tuple(a or b for a, b in zip(own, SIZES[self.size], strict=True))

    def _check(self, x: Array) -> None:
        base.check_images_or_series(x)
        if any(size % self.patch for size in x.shape[1:-1]):
            sizes, form = ("length", "[B, L, C]") if x.ndim == 3 else ("height and width", "[B, H, W, C]")
            raise ValueError(
                f"patch={self.patch}: not a divisor of the {sizes} of x, of shape {x.shape} ({form}). "
                "Give a common divisor."
            )
        if self.attention == "fused" and (jax.default_backend() != "gpu" or self.dtype not in ("bfloat16", "float16")):
            raise ValueError(
                f"attention='fused': it needs a GPU and half precision, and here the backend is "
                f"{jax.default_backend()!r} and dtype={self.dtype!r}. Use attention='xla'."
            )

    @nn.compact
    def __call__(self, x: Float[Array, "b *grid c"], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        """Return the outputs ``[..., outputs C]``."""
        self._check(x)
        width, depth, heads = self._sizes()
        e = TwoTimes(width, 256)(s, t)
        options = {"classes": self.classes, "guided": self.guided, "floats": self.floats, "grid": x.shape[1:-1]}
        e = nn.silu(condition(e, cond, init=nn.initializers.normal(0.02), **options))

        p, grid = self.patch, [size // self.patch for size in x.shape[1:-1]]
        inputs = by_channels(x, cond) if self.floats else x
        h = nn.Dense(width, dtype=self.dtype, name="input")(_patches(inputs, p))
        h += (positions(*grid, width) if len(grid) == 2 else positions_of_series(*grid, width)).astype(h.dtype)
        block = rematerialised(Block, self.remat, static=(3,))
        options = (heads, self.dropout, self.attention, self.dtype)
        if self.scan:
            layers = nn.scan(
                lambda layer, h, _: (layer(h, e, train), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=depth,
            )
            h, _ = layers(block(*options, name="blocks"), h, None)
        else:
            for i in range(depth):
                h = block(*options, name=f"block_{i}")(h, e, train)
        shift = nn.Dense(2 * width, dtype=self.dtype, name="film", kernel_init=nn.initializers.zeros)(e)[:, None]
        gain, bias = jnp.split(shift, 2, -1)
        h = nn.LayerNorm(use_bias=False, use_scale=False, dtype=self.dtype)(h) * (1 + gain) + bias
        shape = (*x.shape[:-1], self.outputs * x.shape[-1])
        size = p ** len(grid) * shape[-1]
        out = nn.Dense(size, kernel_init=nn.initializers.zeros, name="output")(h)
        return _whole(out, p, shape).astype(x.dtype)
