"""The U-Nets of score SDE, DDPM++ and NCSN++ (arXiv 2011.13456), as EDM trains them (arXiv 2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.checks import Positive, Range
from fmjax.nets import base
from fmjax.nets.embedding import TwoTimes, condition, slow_sinusoid, waves
from fmjax.nets.remat import rematerialised
from fmjax.nets.unet import Attention, GroupNorm, check_size

HALF = math.sqrt(0.5)  # factor of the sum of two branches
XAVIER = nn.initializers.xavier_uniform()
QKV = nn.initializers.variance_scaling(0.2, "fan_avg", "uniform")


def halve(x: Float[Array, "b h w c"], taps: Sequence[int], padding: int | None = None) -> Float[Array, "b h2 w2 c"]:
    """Filter each axis of images and keep every second pixel: ``y_i = sum_k taps_k x_(2i + k - padding)``.

    Args:
        x: images ``[B, H, W, C]``, zero outside.
        taps: weights of the filter, normalised to sum 1.
        padding: number of zeros before the first pixel; ``None``: ``(len(taps) - 1) // 2``.

    Returns:
        Images ``[B, H / 2, W / 2, C]``, for the default padding.
    """
    padding = (len(taps) - 1) // 2 if padding is None else padding
    for axis in (1, 2):
        y = _pad(x, axis, padding)
        last = y.shape[axis] - len(taps) + 1
        x = sum(k / sum(taps) * jax.lax.slice_in_dim(y, i, i + last, 2, axis) for i, k in enumerate(taps))
    return x


def double(x: Float[Array, "b h w c"], taps: Sequence[int]) -> Float[Array, "b h2 w2 c"]:
    """Double each axis of images: ``y_o = 2 sum_i taps_(o + padding - 2i) x_i``, the transpose of ``halve`` times four.

    Args:
        x: images ``[B, H, W, C]``, zero outside.
        taps: weights of the filter, normalised to sum 1.

    Returns:
        Images ``[B, 2 H, 2 W, C]``.
    """
    padding, reach = (len(taps) - 1) // 2, len(taps) // 2
    for axis in (1, 2):
        n, y, phases = x.shape[axis], _pad(x, axis, reach), []
        for odd in (0, 1):  # the even pixels of the result, and the odd ones: each sees every second tap
            at = [(k, (odd + padding - i) // 2) for i, k in enumerate(taps) if (odd + padding - i) % 2 == 0]
            see = lambda shift, y=y, n=n, axis=axis: jax.lax.slice_in_dim(y, reach + shift, reach + shift + n, 1, axis)
            phases.append(sum(2 * k / sum(taps) * see(shift) for k, shift in at))
        shape = [2 * n if i == axis else d for i, d in enumerate(x.shape)]
        x = jnp.stack(phases, axis + 1).reshape(shape)
    return x


def _pad(x: Array, axis: int, by: int) -> Array:
    return jnp.pad(x, [(by, by) if i == axis else (0, 0) for i in range(x.ndim)])


def _norm(x: Array, dtype: str) -> Array:
    return GroupNorm(dtype=dtype, groups=_groups(x), epsilon=1e-6)(x)


def _groups(x: Array) -> int:
    groups = max(min(32, x.shape[-1] // 4), 1)
    if x.shape[-1] % groups:
        raise ValueError(
            f"channels: a SongUNet normalises {x.shape[-1]} channels in {groups} groups, which do not divide them. "
            "Give a number of channels divisible by 128, or by 4 and below 128."
        )
    return groups


class Block(nn.Module):
    """Compute ``(skip(x) + conv(silu(norm(conv(silu(norm(x))) + W e)))) / sqrt 2``, then attention of one head.

    The skip is a convolution of one pixel where the size or the number of channels changes, and otherwise the identity.

    Attributes:
        features: number of channels of the result.
        dropout: probability that a hidden unit is dropped, in training.
        dtype: type of the computation.
        taps: weights of the filter of ``resample``.
        resample: ``"down"`` or ``"up"`` filters ``x`` and the input of the first convolution, and halves or doubles
            their size.
        attention: whether attention follows.
    """

    features: int
    dropout: float = 0.0
    dtype: str = "float32"
    taps: Sequence[int] = (1, 1)
    resample: str | None = None
    attention: bool = False

    @nn.compact
    def __call__(self, x: Array, e: Array, train: bool = False) -> Array:
        conv = lambda name, init: nn.Conv(self.features, (3, 3), dtype=self.dtype, kernel_init=init, name=name)
        dense = lambda name: nn.Dense(self.features, dtype=self.dtype, kernel_init=XAVIER, name=name)
        resample = {"down": halve, "up": double, None: lambda x, taps: x}[self.resample]
        h = conv("first", XAVIER)(resample(nn.silu(_norm(x, self.dtype)), self.taps))
        h = nn.silu(_norm(h + dense("shift")(e)[:, None, None], self.dtype))
        h = conv("second", nn.initializers.zeros)(nn.Dropout(self.dropout, deterministic=not train)(h))
        if self.resample or x.shape[-1] != self.features:
            x = dense("skip")(resample(x, self.taps))
        x = (x + h) * HALF
        if not self.attention:
            return x
        attention = Attention(1, self.dtype, groups=_groups(x), epsilon=1e-6, qkv_init=QKV, name="attention")
        return attention(x) * HALF


class SongUNet(base.Checked):
    """Map images ``[B, H, W, C]`` to ``[B, H, W, outputs C]`` by a U-Net of score SDE, in EDM's version.

    DDPM++ has the default fields. NCSN++ has ``embedding="fourier", noise=2, encoder="residual", taps=(1, 3, 3, 1)``.
    For CIFAR-10 both have ``multipliers=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13, augment=9``: 55,733,891
    and 56,397,827 parameters beside the jump's. For 64 x 64 pixels they have ``multipliers=(1, 2, 2, 2)``.

    The embedding of ``s``, of the labels and of the augmentation passes through ``embedding.TwoTimes``. On its
    diagonal it is the published network of noise label ``s``, which ``nets.preconditioning`` makes a denoiser. The
    last layer of a block, of an attention and of the network starts at zero (published: at 1e-5 of Xavier's scale).
    ``convert.edm`` reads the published weights.

    Attributes:
        channels: number of channels at multiplier 1.
        multipliers: one per level, in units of ``channels``; each level has half the height and width of the last.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: heights, in pixels, with attention: after every block on the way down, after the last on the way up.
        middle: whether the middle has attention.
        embedding: sinusoids of ``s``: slow ones (``"positional"``), or random ones of standard deviation 16, in the
            parameter ``freqs``, which is not trained (``"fourier"``).
        noise: width of this embedding, in units of ``channels``.
        encoder: ``"residual"`` adds the filtered and halved image at each level; ``"standard"`` does not.
        taps: weights of the resampling filter, an even number of them.
        classes: see ``MLP``.
        guided: see ``MLP``.
        augment: number of inputs that describe an augmentation of the image; zeros when sampling.
        outputs: see ``MLP``.
        dropout: see ``MLP``.
        remat: see ``remat.rematerialised``.
        dtype: see ``MLP``.

    Sources: arXiv 2011.13456, 2206.00364.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> x = jnp.zeros((2, 4, 4, 1))
    >>> model = nets.from_linen(SongUNet(channels=8, multipliers=(1,), blocks=0, middle=False))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> jax.eval_shape(model.net, params, x, 0.0, 1.0).shape
    (2, 4, 4, 1)
    """

    channels: base.Width = 128
    multipliers: Sequence[base.Width] = (1, 2, 2, 2)
    blocks: base.Depth = 4
    attention: Sequence[Positive] = (16,)
    middle: bool = True
    embedding: Literal["positional", "fourier"] = "positional"
    noise: Annotated[int, Range(1, 64)] = 1
    encoder: Literal["standard", "residual"] = "standard"
    taps: Sequence[int] = (1, 1)
    classes: base.Classes = 0
    guided: bool = False
    augment: base.Depth = 0
    outputs: base.Outputs = 1
    dropout: base.Dropout = 0.0
    remat: base.Remat = "none"
    dtype: base.Dtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        if not self.multipliers:
            raise ValueError("multipliers=(): a U-Net has one level or more. Give one multiplier per level.")
        if len(self.taps) % 2 or not sum(self.taps):
            raise ValueError(f"taps={self.taps}: not an even number of weights with a sum other than 0. Give (1, 1).")

    def _embed(self, s: Array, t: Array, cond, augment) -> Array:
        dim = self.noise * self.channels
        if self.embedding == "positional":
            e = slow_sinusoid(s, dim, endpoint=True)
        else:
            freqs = self.param("freqs", nn.initializers.normal(16.0), (dim // 2,))
            e = waves(s, 2 * jnp.pi * jax.lax.stop_gradient(freqs))
        e = jnp.roll(e, dim // 2, 1)  # sines first
        table = nn.initializers.normal(math.sqrt(2 * self.classes / (self.classes + dim)))
        e = condition(e, cond, classes=self.classes, guided=self.guided, init=table)
        if self.augment:
            augment = jnp.zeros((len(s), self.augment), e.dtype) if augment is None else augment
            e += nn.Dense(dim, use_bias=False, kernel_init=XAVIER, name="augment_labels")(augment)
        return nn.silu(TwoTimes(4 * self.channels, kernel_init=XAVIER)(s, t, e))

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], s: Array, t: Array, cond=None, augment=None, *, train: bool = False
    ) -> Array:
        """Return the outputs ``[B, H, W, outputs C]``; ``augment: [B, augment]`` describes an augmentation."""
        check_size(x, self.multipliers)
        e = self._embed(s, t, cond, augment)
        res_block = rematerialised(Block, self.remat, static=(3,))
        conv = lambda features, name, init=XAVIER, **kw: nn.Conv(
            features, (3, 3), kernel_init=init, name=name, **{"dtype": self.dtype, **kw}
        )

        def block(h, features, name, resample=None, attention=False):
            options = (features, self.dropout, self.dtype, tuple(self.taps), resample, attention)
            return res_block(*options, name=name)(h, e, train)

        h, pyramid = conv(self.channels, "input")(x), x
        skips = [h]
        for level, m in enumerate(self.multipliers):
            if level:
                h = block(h, h.shape[-1], f"down_{level}", "down")
                if self.encoder == "residual":  # a convolution that sees beyond the border, then the filter
                    padding = 1 + (len(self.taps) - 1) // 2
                    wide = conv(h.shape[-1], f"residual_{level}", padding=padding)(pyramid)
                    h = pyramid = (h + halve(wide, self.taps, 0)) * HALF
                skips.append(h)
            for i in range(self.blocks):
                h = block(h, m * self.channels, f"in_{level}_{i}", attention=h.shape[1] in self.attention)
                skips.append(h)
        h = block(h, h.shape[-1], "middle_0", attention=self.middle)
        h = block(h, h.shape[-1], "middle_1")
        for level, m in reversed(list(enumerate(self.multipliers))):
            for i in range(self.blocks + 1):
                attention = i == self.blocks and h.shape[1] in self.attention
                both = jnp.concatenate([h, skips.pop()], -1)
                h = block(both, m * self.channels, f"out_{level}_{i}", attention=attention)
            if level:
                h = block(h, h.shape[-1], f"up_{level}", "up")
        h = nn.silu(_norm(h, self.dtype))
        return conv(self.outputs * x.shape[-1], "output", nn.initializers.zeros, dtype=None)(h).astype(x.dtype)
