"""A U-Net of the ADM family (arXiv 2105.05233): residual blocks, attention at chosen resolutions, skip connections."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.nets.embedding import TwoTimes, condition
from fmjax.nets.remat import rematerialised

RESAMPLE = ("conv", "block")


def groups_of(channels: int, per_group: int) -> int:
    """The groups of a group norm: the largest of 32, 16 .. 1 that divides, of ``per_group`` channels or more each."""
    return next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels >= per_group * g or g == 1)


class GroupNorm(nn.Module):
    """``scale (x - mean) / sqrt(var + epsilon) + bias``, moments of a group of channels over all pixels, in float32.

    There are 32 groups, or fewer where a group would have less than ``per_group`` channels or they do not divide; or
    as many as ``groups`` says. Moments are taken channel by channel and then averaged over the group: no pass over a
    reshaped image.
    """

    per_group: int = 4
    dtype: str = "float32"
    groups: int = 0
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, c = x.shape[0], x.shape[-1]
        groups = self.groups or groups_of(c, self.per_group)
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        over_group = lambda m: jnp.repeat(m.reshape(b, groups, -1).mean(-1), c // groups, 1)
        pixels = tuple(range(1, x.ndim - 1))
        mean, square = over_group(y.mean(pixels)), over_group((y * y).mean(pixels))
        gain = scale * jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + self.epsilon)
        spread = lambda a: a.reshape(b, *(1 for _ in pixels), c)
        return (y * spread(gain) + spread(bias - mean * gain)).astype(self.dtype)


def _half(x: Array) -> Array:
    return nn.avg_pool(x, (2, 2), (2, 2))


def _double(x: Array) -> Array:
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


class Block(nn.Module):
    """Residual block ``x + conv(silu(norm(conv(silu(norm(x)))) (1 + a) + b))``, ``a, b`` linear in the embedding ``e``.

    Without ``film`` the embedding is added before the second norm instead. The last convolution starts at zero.
    ``resample``, ``"down"`` or ``"up"``, halves or doubles both ``x`` and what enters the first convolution.
    """

    features: int
    dropout: float = 0.0
    dtype: str = "float32"
    film: bool = True
    per_group: int = 4
    resample: str | None = None

    @nn.compact
    def __call__(self, x: Array, e: Array, train: bool = False) -> Array:
        conv = lambda **kw: nn.Conv(self.features, (3, 3), dtype=self.dtype, **kw)
        norm = lambda: GroupNorm(self.per_group, self.dtype)
        dense = lambda features, **kw: nn.Dense(features, dtype=self.dtype, **kw)
        resample = {"down": _half, "up": _double, None: lambda x: x}[self.resample]
        h = conv(name="first")(resample(nn.silu(norm()(x))))
        x = resample(x)
        if self.film:
            a, b = jnp.split(dense(2 * self.features, name="film")(e)[:, None, None], 2, -1)
            h = norm()(h) * (1 + a) + b
        else:
            h = norm()(h + dense(self.features, name="shift")(e)[:, None, None])
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = conv(name="second", kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, name="skip")(x)
        return x + h


class Attention(nn.Module):
    """``x`` and self-attention over its pixels; XLA's implementation, which has a jvp; norms as in ``GroupNorm``."""

    heads: int
    dtype: str = "float32"
    per_group: int = 4
    groups: int = 0
    epsilon: float = 1e-5
    qkv_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape
        y = GroupNorm(self.per_group, self.dtype, self.groups, self.epsilon)(x)
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv", kernel_init=self.qkv_init)(y)
        q, k, v = jnp.moveaxis(qkv.reshape(b, h * w, 3, self.heads, c // self.heads), 2, 0)
        out = jax.nn.dot_product_attention(q, k, v, implementation="xla").reshape(b, h, w, c)
        return x + nn.Dense(c, dtype=self.dtype, name="out", kernel_init=nn.initializers.zeros)(out)


def check_size(what: str, x: Array, levels: int) -> None:
    """``ValueError`` for images that cannot be halved ``levels - 1`` times."""
    factor = 2 ** (levels - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(f"a {what} of {levels} levels needs images divisible by {factor}, got {x.shape[1:3]}")


class Levels(nn.Module):
    """The way down of a U-Net and its middle: what ``UNet`` and ``Encoder`` share; the options are told there."""

    channels: int = 64
    multipliers: Sequence[int] = (1, 2)
    blocks: int = 1
    attention: Sequence[int] = ()
    heads: int = 4
    head_channels: int = 0
    middle: bool = True
    film: bool = True
    per_group: int = 4
    spectrum: str = "wide"
    resample: str = "conv"
    classes: int = 0
    guided: bool = False
    dropout: float = 0.0
    remat: str = "none"
    dtype: str = "float32"

    def _check(self, x: Array) -> None:
        check_size("U-Net", x, len(self.multipliers))
        if self.resample not in RESAMPLE:
            raise ValueError(f"resample of a U-Net is one of {', '.join(RESAMPLE)}, got {self.resample!r}")

    def _heads(self, channels: int) -> int:
        name, n = ("head_channels", self.head_channels) if self.head_channels else ("heads", self.heads)
        if channels % n:
            raise ValueError(f"{name}={n} does not divide the {channels} channels that attention has in this U-Net")
        return channels // n if self.head_channels else n

    def _embedding(self, s: Array, t: Array, cond) -> Array:
        e = TwoTimes(4 * self.channels, 64 if self.spectrum == "wide" else self.channels, self.spectrum)(s, t)
        return nn.silu(condition(e, cond, classes=self.classes, guided=self.guided))

    def _block(self, h: Array, e: Array, train: bool, features: int, name: str, resample: str | None = None) -> Array:
        block = rematerialised(Block, self.remat, static=(3,))
        common = {"dtype": self.dtype, "per_group": self.per_group, "film": self.film}
        return block(features, self.dropout, resample=resample, name=name, **common)(h, e, train)

    def _attend(self, h: Array, name: str, here: bool | None = None) -> Array:
        if not (h.shape[1] in self.attention if here is None else here):
            return h
        attention = rematerialised(Attention, self.remat)
        common = {"dtype": self.dtype, "per_group": self.per_group}
        return attention(self._heads(h.shape[-1]), name=f"{name}_attention", **common)(h)

    def _conv(self, h: Array, name: str, **options) -> Array:
        return nn.Conv(h.shape[-1], (3, 3), padding=1, dtype=self.dtype, name=name, **options)(h)

    def _descend(self, x: Array, e: Array, train: bool) -> tuple[Array, list[Array]]:
        """What comes out of the middle, and the way's intermediate results."""
        self._check(x)
        h = nn.Conv(self.channels * self.multipliers[0], (3, 3), dtype=self.dtype, name="input")(x)
        skips = [h]
        for level, m in enumerate(self.multipliers):
            if level and self.resample == "conv":
                h = self._conv(h, f"down_{level}", strides=2)
            elif level:
                h = self._block(h, e, train, h.shape[-1], f"down_{level}", "down")
            if level:
                skips.append(h)
            for i in range(self.blocks):
                h = self._block(h, e, train, m * self.channels, f"in_{level}_{i}")
                h = self._attend(h, f"in_{level}_{i}")
                skips.append(h)
        h = self._block(h, e, train, h.shape[-1], "middle_0")
        if self.middle:
            h = self._attend(h, "middle", True)
            h = self._block(h, e, train, h.shape[-1], "middle_1")
        return h, skips


class UNet(Levels):
    """``x: [B, H, W, C] -> [B, H, W, outputs C]``; a level per entry of ``multipliers``, each half as wide as the last.

    ``attention`` lists the resolutions (heights) that get attention, of ``heads`` heads, or of as many as make each
    ``head_channels`` wide; it also stands in the middle where ``middle``. ``film`` and ``per_group`` as in ``Block``,
    ``spectrum`` as in ``TwoTimes``, ``remat`` as in ``rematerialised``. Levels are joined by a convolution
    (``resample="conv"``) or a residual block (``"block"``). ``classes``, ``guided``, ``outputs``, ``dropout``,
    ``dtype`` as in ``MLP``. The last convolution starts at zero.

    torchcfm's U-Net, weights and all (``fmjax.convert.torchcfm``), is ``film=False, per_group=1, spectrum="slow"``;
    its CIFAR-10 network, 35,746,307 parameters beside those of the second time, adds ``channels=128,
    multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), head_channels=64, dropout=0.1``.

    ADM as EDM has it (``DhariwalUNet``; ``fmjax.convert.edm``) is ``resample="block", head_channels=64,
    spectrum="slow"``; that of ImageNet-64, 295,899,267 parameters beside the second time's and a null label's, adds
    ``channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), classes=1000, dropout=0.1``.

    On a CPU a training step costs, per image 28x28x1 and core (x86_64, AVX-512, jax 0.10.2, float32), 23 ms with
    ``channels=32``, 18 ms without the attention of the ``middle``, and 9 ms with ``channels=16, multipliers=(1, 2, 4)``
    of as many parameters (0.67M). XLA's convolutions there take one thread each: give JAX a virtual device per core,
    ``NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=2``. Its repeated blocks differ in their channels, so
    that there is no scan to make of them.
    """

    outputs: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        e = self._embedding(s, t, cond)
        h, skips = self._descend(x, e, train)
        for level, m in reversed(list(enumerate(self.multipliers))):
            for i in range(self.blocks + 1):
                h = jnp.concatenate([h, skips.pop()], -1)
                h = self._block(h, e, train, m * self.channels, f"out_{level}_{i}")
                h = self._attend(h, f"out_{level}_{i}")
            if level and self.resample == "conv":
                h = self._conv(_double(h), f"up_{level}")
            elif level:
                h = self._block(h, e, train, h.shape[-1], f"up_{level}", "up")
        h = nn.silu(GroupNorm(self.per_group, self.dtype)(h))
        out = nn.Conv(self.outputs * x.shape[-1], (3, 3), kernel_init=nn.initializers.zeros, name="output")(h)
        return out.astype(x.dtype)
