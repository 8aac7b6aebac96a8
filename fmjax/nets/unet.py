"""A U-Net of the ADM family (arXiv 2105.05233), for images and for series: residual blocks, attention, skips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.checks import Positive
from fmjax.nets import base
from fmjax.nets.embedding import Spectrum, TwoTimes, by_channels, condition
from fmjax.nets.remat import rematerialised


def groups_of(channels: int, per_group: int) -> int:
    """Return the number of groups of a group norm: the largest divisor among 32, 16, 8, 4, 2 and 1.

    Args:
        channels: number of channels.
        per_group: least number of channels in a group.

    Returns:
        The number of groups; 1 where no larger divisor leaves ``per_group`` channels in a group.
    """
    return next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels >= per_group * g or g == 1)


class GroupNorm(nn.Module):
    """Normalise groups of channels over all pixels: ``scale (x - mean) / sqrt(var + epsilon) + bias``, in float32.

    Moments are computed channel by channel and then averaged over the group, without a pass over a reshaped image.

    Attributes:
        per_group: least number of channels in a group (``groups_of``).
        dtype: type of the result.
        groups: number of groups; 0: ``groups_of(channels, per_group)``.
        epsilon: added to the variance.
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
    twos = (2,) * (x.ndim - 2)
    return nn.avg_pool(x, twos, twos)


def _double(x: Array) -> Array:
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis)
    return x


def _kernel(x: Array) -> tuple[int, ...]:
    return (3,) * (x.ndim - 2)


class Block(nn.Module):
    """Compute ``x + conv(silu(norm(conv(silu(norm(x)))) (1 + a) + b))``, ``a`` and ``b`` linear in the embedding ``e``.

    The last convolution starts at zero.

    Attributes:
        features: number of channels of the result.
        dropout: probability that a hidden unit is dropped, in training.
        dtype: type of the computation.
        film: whether ``e`` modulates the second norm; otherwise ``e`` is added before that norm.
        per_group: least number of channels in a group of a norm.
        resample: ``"down"`` or ``"up"`` halves or doubles the size of ``x`` and of the input of the first convolution.
    """

    features: int
    dropout: float = 0.0
    dtype: str = "float32"
    film: bool = True
    per_group: int = 4
    resample: str | None = None

    @nn.compact
    def __call__(self, x: Array, e: Array, train: bool = False) -> Array:
        conv = lambda **kw: nn.Conv(self.features, _kernel(x), dtype=self.dtype, **kw)
        spread = lambda a: a.reshape(a.shape[0], *(1 for _ in x.shape[1:-1]), -1)
        norm = lambda: GroupNorm(self.per_group, self.dtype)
        dense = lambda features, **kw: nn.Dense(features, dtype=self.dtype, **kw)
        resample = {"down": _half, "up": _double, None: lambda x: x}[self.resample]
        h = conv(name="first")(resample(nn.silu(norm()(x))))
        x = resample(x)
        if self.film:
            a, b = jnp.split(spread(dense(2 * self.features, name="film")(e)), 2, -1)
            h = norm()(h) * (1 + a) + b
        else:
            h = norm()(h + spread(dense(self.features, name="shift")(e)))
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = conv(name="second", kernel_init=nn.initializers.zeros)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, name="skip")(x)
        return x + h


class Attention(nn.Module):
    """Add self-attention over the pixels to ``x``, by XLA's implementation, which has a jvp.

    Attributes:
        heads: number of heads.
        dtype: type of the computation.
        per_group: least number of channels in a group of the norm.
        groups: number of groups of the norm; 0: see ``GroupNorm``.
        epsilon: added to the variance in the norm.
        qkv_init: initialiser of the projection to queries, keys and values.
    """

    heads: int
    dtype: str = "float32"
    per_group: int = 4
    groups: int = 0
    epsilon: float = 1e-5
    qkv_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        b, c = x.shape[0], x.shape[-1]
        y = GroupNorm(self.per_group, self.dtype, self.groups, self.epsilon)(x)
        qkv = nn.Dense(3 * c, dtype=self.dtype, name="qkv", kernel_init=self.qkv_init)(y)
        q, k, v = jnp.moveaxis(qkv.reshape(b, -1, 3, self.heads, c // self.heads), 2, 0)
        out = jax.nn.dot_product_attention(q, k, v, implementation="xla").reshape(x.shape)
        return x + nn.Dense(c, dtype=self.dtype, name="out", kernel_init=nn.initializers.zeros)(out)


def check_size(x: Array, multipliers: Sequence[int]) -> None:
    """Refuse inputs that are no images or series, or that cannot be halved once between two levels.

    Args:
        x: images ``[B, H, W, C]`` or series ``[B, L, C]``.
        multipliers: one entry per level.

    Raises:
        ValueError: ``x`` has another rank, or one of its sizes is not divisible by ``2^(levels - 1)``.
    """
    base.check_images_or_series(x)
    factor = 2 ** (len(multipliers) - 1)
    if any(size % factor for size in x.shape[1:-1]):
        sizes, form = ("a length", "[B, L, C]") if x.ndim == 3 else ("a height and a width", "[B, H, W, C]")
        raise ValueError(
            f"multipliers={tuple(multipliers)}: {len(multipliers)} levels need {sizes} divisible by "
            f"{factor}, and x has shape {x.shape} ({form}). Use fewer levels, or pad the examples."
        )


class Levels(base.Checked):
    """Share the fields and the first half of ``UNet`` with ``Encoder``; see ``UNet`` for the fields."""

    channels: base.Width = 64
    multipliers: Sequence[base.Width] = (1, 2)
    blocks: base.Depth = 1
    attention: Sequence[Positive] = ()
    heads: base.Width = 4
    head_channels: base.Depth = 0
    middle: bool = True
    film: bool = True
    per_group: Positive = 4
    spectrum: Spectrum = "wide"
    resample: Literal["conv", "block"] = "conv"
    classes: base.Classes = 0
    guided: bool = False
    floats: bool = False
    dropout: base.Dropout = 0.0
    remat: base.Remat = "none"
    dtype: base.Dtype = "float32"

    def __post_init__(self):
        super().__post_init__()
        if not self.multipliers:
            raise ValueError("multipliers=(): a U-Net has one level or more. Give one multiplier per level.")

    def _heads(self, channels: int) -> int:
        name, n = ("head_channels", self.head_channels) if self.head_channels else ("heads", self.heads)
        if channels % n:
            raise ValueError(
                f"{name}={n}: not a divisor of the {channels} channels of an attention layer. Give a divisor of them."
            )
        return channels // n if self.head_channels else n

    def _embedding(self, x: Array, s: Array, t: Array, cond) -> Array:
        e = TwoTimes(4 * self.channels, 64 if self.spectrum == "wide" else self.channels, self.spectrum)(s, t)
        options = {"classes": self.classes, "guided": self.guided, "floats": self.floats, "grid": x.shape[1:-1]}
        return nn.silu(condition(e, cond, **options))

    def _block(self, h: Array, e: Array, train: bool, features: int, name: str, resample: str | None = None) -> Array:
        block = rematerialised(Block, self.remat, static=(3,))
        common = {"dtype": self.dtype, "per_group": self.per_group, "film": self.film}
        return block(features, self.dropout, resample=resample, name=name, **common)(h, e, train)

    def _attend(self, h: Array, name: str, always: bool = False) -> Array:
        if not always and h.shape[1] not in self.attention:
            return h
        attention = rematerialised(Attention, self.remat)
        common = {"dtype": self.dtype, "per_group": self.per_group}
        return attention(self._heads(h.shape[-1]), name=f"{name}_attention", **common)(h)

    def _conv(self, h: Array, name: str, **options) -> Array:
        return nn.Conv(h.shape[-1], _kernel(h), padding=1, dtype=self.dtype, name=name, **options)(h)

    def _descend(self, x: Array, e: Array, cond, train: bool) -> tuple[Array, list[Array]]:
        """Return the result of the middle, and the intermediate results for the skip connections."""
        check_size(x, self.multipliers)
        x = by_channels(x, cond) if self.floats else x
        h = nn.Conv(self.channels * self.multipliers[0], _kernel(x), dtype=self.dtype, name="input")(x)
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
            h = self._attend(h, "middle", always=True)
            h = self._block(h, e, train, h.shape[-1], "middle_1")
        return h, skips


class UNet(Levels):
    """Map images ``[B, H, W, C]`` or series ``[B, L, C]`` to ``[..., outputs C]`` by a U-Net of the ADM family.

    The last convolution starts at zero. Float conditions on the grid of ``x`` (an image, the past of a series) are
    further channels of its input, and others are embedded with the times.

    Attributes:
        channels: number of channels at multiplier 1.
        multipliers: one per level, in units of ``channels``; each level has half the height and width of the last.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: heights (lengths, for series) at which every block is followed by attention.
        heads: number of attention heads.
        head_channels: channels per head; if positive, it replaces ``heads``.
        middle: whether the middle has attention between two blocks, or one block alone.
        film: see ``Block``.
        per_group: see ``Block``.
        spectrum: see ``embedding.TwoTimes``.
        resample: how levels are joined: by a convolution (``"conv"``) or a residual block (``"block"``).
        classes: see ``MLP``.
        guided: see ``MLP``.
        floats: see ``MLP``.
        dropout: see ``MLP``.
        remat: see ``remat.rematerialised``.
        dtype: see ``MLP``.
        outputs: see ``MLP``.

    torchcfm's U-Net (``convert.torchcfm`` reads its weights) is ``film=False, per_group=1, spectrum="slow"``. Its
    CIFAR-10 network, 35,746,307 parameters beside the second time's, adds ``channels=128, multipliers=(1, 2, 2, 2),
    blocks=2, attention=(16,), head_channels=64, dropout=0.1``.

    EDM's ADM (``DhariwalUNet``; ``convert.edm`` reads its weights) is ``resample="block", head_channels=64,
    spectrum="slow"``. Its ImageNet-64 network, 295,899,267 parameters beside the second time's and the null label's,
    adds ``channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8), classes=1000, dropout=0.1``.

    On a CPU a training step costs, per image 28x28x1 and core (x86_64, AVX-512, jax 0.10.2, float32), 23 ms with
    ``channels=32``, 18 ms without the attention of the ``middle``, and 9 ms with ``channels=16, multipliers=(1, 2, 4)``
    of as many parameters (0.67M). There each of XLA's convolutions uses one thread: give JAX one virtual device per
    core, ``NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=2``. The blocks of a U-Net have different numbers
    of channels, so that they cannot be scanned.

    Source: arXiv 2105.05233.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> x = jnp.zeros((2, 4, 4, 1))
    >>> model = nets.from_linen(UNet(channels=8, multipliers=(1,), middle=False))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), x)
    >>> jax.eval_shape(model.net, params, x, 0.0, 1.0).shape
    (2, 4, 4, 1)
    """

    outputs: base.Outputs = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b *grid c"], s: Array, t: Array, cond=None, *, train: bool = False) -> Array:
        """Return the outputs ``[..., outputs C]``."""
        e = self._embedding(x, s, t, cond)
        h, skips = self._descend(x, e, cond, train)
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
        out = nn.Conv(self.outputs * x.shape[-1], _kernel(x), kernel_init=nn.initializers.zeros, name="output")(h)
        return out.astype(x.dtype)
