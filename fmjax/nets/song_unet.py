"""The U-Nets of score SDE, DDPM++ and NCSN++ (arXiv 2011.13456), as EDM trains them (arXiv 2206.00364)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.nets.embedding import TwoTimes, condition, slow_sinusoid, waves
from fmjax.nets.remat import rematerialised
from fmjax.nets.unet import Attention, GroupNorm, check_size

EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "residual")
HALF = math.sqrt(0.5)  # what the sum of two branches is multiplied by
XAVIER = nn.initializers.xavier_uniform()
QKV = nn.initializers.variance_scaling(0.2, "fan_avg", "uniform")


def halve(x: Float[Array, "b h w c"], taps: Sequence[int], padding: int | None = None) -> Float[Array, "b h2 w2 c"]:
    """Each axis of the image filtered with ``taps``, normalised to sum 1, and every second pixel of it kept.

    ``y_i = sum_k taps_k x_(2i + k - padding)``, ``x = 0`` outside; ``padding`` is ``(len(taps) - 1) // 2`` by default.
    """
    padding = (len(taps) - 1) // 2 if padding is None else padding
    for axis in (1, 2):
        y = _pad(x, axis, padding)
        last = y.shape[axis] - len(taps) + 1
        x = sum(k / sum(taps) * jax.lax.slice_in_dim(y, i, i + last, 2, axis) for i, k in enumerate(taps))
    return x


def double(x: Float[Array, "b h w c"], taps: Sequence[int]) -> Float[Array, "b h2 w2 c"]:
    """Each axis twice as long: the transpose of ``halve`` times four, ``y_o = 2 sum_i taps_(o + padding - 2i) x_i``."""
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
        raise ValueError(f"a SongUNet norms its {x.shape[-1]} channels in {groups} groups, which do not divide them")
    return groups


class Block(nn.Module):
    """``(skip(x) + conv(silu(norm(conv(silu(norm(x))) + W e)))) / sqrt 2``, then attention of one head likewise.

    ``resample``, ``"down"`` or ``"up"``, filters both ``x`` and what enters the first convolution with ``taps``; the
    skip is a convolution of one pixel there, and where the number of channels changes.
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
        how = {"groups": _groups(x), "epsilon": 1e-6, "qkv_init": QKV}
        return Attention(1, self.dtype, name="attention", **how)(x) * HALF


class SongUNet(nn.Module):
    """``x: [B, H, W, C] -> [B, H, W, outputs C]``; a level per entry of ``multipliers``, each half as wide as the last.

    DDPM++ has the default options, NCSN++ ``embedding="fourier", noise=2, encoder="residual", taps=(1, 3, 3, 1)``. Both
    are known with ``multipliers=(2, 2, 2), blocks=4, attention=(16,), dropout=0.13, augment=9`` for CIFAR-10, of
    55,733,891 and 56,397,827 parameters beside those of the jump, and with ``multipliers=(1, 2, 2, 2)`` for 64 x 64.

    ``attention`` lists the resolutions (heights) that get it, on the way down in every block and on the way up in the
    last; the middle has it unless ``middle=False``. The embedding of ``s``, ``noise`` times ``channels`` wide, is one
    of sinusoids (``"positional"``: slow ones, ``"fourier"``: random ones of standard deviation 16, parameters ``freqs``
    that are not trained); labels and the ``augment`` numbers of an augmentation (zeros where none are given, as in
    sampling) are added to it before ``TwoTimes``, whose diagonal makes the published network of noise label ``s``
    (``nets.preconditioning`` makes a denoiser of it). With the ``"residual"`` encoder the image itself, filtered and
    halved, is added at each level.

    ``classes``, ``guided``, ``outputs``, ``dropout``, ``dtype`` as in ``MLP``, ``remat`` as in ``rematerialised``. The
    last layer of a block, of an attention and of the network starts at zero (published: at 1e-5 of Xavier's). Weights:
    ``fmjax.convert.edm``.
    """

    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    blocks: int = 4
    attention: Sequence[int] = (16,)
    middle: bool = True
    embedding: str = "positional"
    noise: int = 1
    encoder: str = "standard"
    taps: Sequence[int] = (1, 1)
    classes: int = 0
    guided: bool = False
    augment: int = 0
    outputs: int = 1
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    def _check(self, x: Array) -> None:
        check_size("SongUNet", x, len(self.multipliers))
        for name, known in (("embedding", EMBEDDINGS), ("encoder", ENCODERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} of a SongUNet is one of {', '.join(known)}, got {getattr(self, name)!r}")
        if len(self.taps) % 2 or not sum(self.taps):
            raise ValueError(f"taps of a SongUNet are an even number of weights, not of sum 0, got {self.taps}")

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
        self._check(x)
        e = self._embed(s, t, cond, augment)
        res_block = rematerialised(Block, self.remat, static=(3,))
        conv = lambda features, name, init=XAVIER, **kw: nn.Conv(
            features, (3, 3), kernel_init=init, name=name, **{"dtype": self.dtype, **kw}
        )

        def block(h, features, name, resample=None, attention=False):
            how = (features, self.dropout, self.dtype, tuple(self.taps), resample, attention)
            return res_block(*how, name=name)(h, e, train)

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
