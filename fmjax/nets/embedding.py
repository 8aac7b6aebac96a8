"""Embeddings of two times and of conditions; float32 or wider, and smooth in both times, so that a jvp stays tame."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.nets.base import Checked, Width

Spectrum = Literal["wide", "slow"]


def sinusoid(t: Float[Array, " b"], dim: int, *, max_frequency: float = 16.0) -> Float[Array, "b d"]:
    """Return ``[cos(w t), sin(w t)]`` with log-spaced frequencies ``w`` from 1 radian to ``max_frequency``.

    Times stay in [0, 1]: multiplying them by 1000, as diffusion networks do, makes the time derivative explode.

    Args:
        t: times, ``[B]``.
        dim: number of features; ``dim / 2`` frequencies.
        max_frequency: highest frequency, in radians per unit of time.

    Returns:
        Features ``[B, dim]``, float32 or wider.
    """
    return waves(t, jnp.exp(jnp.linspace(0.0, jnp.log(max_frequency), dim // 2)))


def slow_sinusoid(
    t: Float[Array, " b"], dim: int, *, max_period: float = 1e4, endpoint: bool = False
) -> Float[Array, "b d"]:
    """Return ``[cos(w t), sin(w t)]`` with ``w_i = max_period^(-i / (dim / 2))``, from 1 radian down.

    These are the inputs of torchcfm's U-Net: DDPM's sinusoids at times in [0, 1], most of them nearly straight lines.

    Args:
        t: times, ``[B]``.
        dim: number of features; ``dim / 2`` frequencies.
        max_period: inverse of the frequency at the end of the spectrum.
        endpoint: whether the last frequency is ``1 / max_period`` itself, with the divisor ``dim / 2 - 1`` (the
            networks of score SDE).

    Returns:
        Features ``[B, dim]``, float32 or wider.

    Source: arXiv 2006.11239.
    """
    return waves(t, jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2) / (dim // 2 - endpoint)))


def jump_waves(gap: Float[Array, " b"]) -> Float[Array, "b 64"]:
    """Return ``sinusoid(gap) - sinusoid(0)``, the features of a jump, which vanish for a jump of length zero.

    Args:
        gap: lengths of jumps, ``[B]``.

    Returns:
        Features ``[B, 64]``.
    """
    return sinusoid(gap, 64) - sinusoid(jnp.zeros_like(gap), 64)


def waves(t: Float[Array, " b"], w: Float[Array, " f"]) -> Float[Array, "b d"]:
    """Return ``[cos(w t), sin(w t)]``.

    Args:
        t: times, ``[B]``.
        w: frequencies in radians, ``[F]``.

    Returns:
        Features ``[B, 2 F]``, float32 or wider.
    """
    angle = t.astype(jnp.promote_types(t.dtype, jnp.float32))[:, None] * w
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], 1)


class TwoTimes(Checked):
    """Embed two times as ``mix(silu(source(phi(s)) + W (phi(t - s) - phi(0))))``, ``W`` initialised at zero.

    The second term vanishes on the diagonal for every ``W``. A flow-matching checkpoint is therefore a flow map whose
    jump is one Euler step, and training on the diagonal does not change ``W``.

    Attributes:
        features: width of the embedding.
        frequencies: number of features of ``s``.
        spectrum: features of ``s``: ``sinusoid`` (``"wide"``) or ``slow_sinusoid`` (``"slow"``). The jump always has
            64 wide features.
        kernel_init: initialiser of the dense layers.
    """

    features: Width
    frequencies: Width = 64
    spectrum: Spectrum = "wide"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self, s: Float[Array, " b"], t: Float[Array, " b"], inputs: Float[Array, "b f"] | None = None
    ) -> Float[Array, "b d"]:
        """Return the embedding ``[B, features]``; ``inputs: [B, F]`` replaces the features of ``s``."""
        if inputs is None:
            inputs = {"wide": sinusoid, "slow": slow_sinusoid}[self.spectrum](s, self.frequencies)
        e = nn.Dense(self.features, name="source", kernel_init=self.kernel_init)(inputs)
        e += nn.Dense(self.features, name="jump", use_bias=False, kernel_init=nn.initializers.zeros)(jump_waves(t - s))
        return nn.Dense(self.features, name="mix", kernel_init=self.kernel_init)(nn.silu(e))


def condition(
    e: Float[Array, "b d"],
    cond: Any,
    *,
    classes: int,
    guided: bool = False,
    floats: bool = False,
    grid: tuple[int, ...] | None = None,
    init: Any = None,
) -> Float[Array, "b d"]:
    """Add the embeddings of labels, of guidance scales or of float conditions to the embedding of times.

    Call it inside a compact module; the parameters are ``Embed_0`` (``classes + 1`` labels) and ``scale``, or for
    floats two dense layers an array, and a vector that stands for a missing one (NaN). A guided network adds
    ``W (phi(1 - 1/w) - phi(0))``, with ``W`` initialised at zero: at ``w = 1`` it is the network without guidance.

    Args:
        e: embedding of the times, ``[B, D]``.
        cond: integer labels ``[B]`` in ``0 .. classes``, where ``classes`` is the null label; for a guided network
            also a pair ``(labels, scale)`` of labels and guidance scales ``[B]`` (labels alone: scale 1). ``None`` for
            ``classes=0``. With ``floats`` a floating array ``[B, ...]``, or a pytree of them; a row with a NaN is
            missing.
        classes: number of labels; 0: the network takes no labels.
        guided: whether the network takes the guidance scale as an input.
        floats: whether the conditions are floating arrays.
        grid: the height and width of images, or the length of series: arrays on this grid are not embedded, because
            they are channels of the input (``by_channels``).
        init: initialiser of the table of labels; ``None``: Flax's own.

    Returns:
        The embedding ``[B, D]``. A label outside ``0 .. classes`` is refused if its value is known, and gives NaN
        under ``jax.jit``.

    Raises:
        ValueError: ``cond`` does not fit ``classes`` and ``guided``, or ``guided`` has no ``classes``.
    """
    if guided and not classes:
        raise ValueError("guided=True: guidance needs labels. Set classes to the number of labels.")
    if floats and classes:
        raise ValueError(f"floats=True, classes={classes}: conditions are labels or floats. Set one of them.")
    if floats:
        return _add_floats(e, cond, grid)
    if not classes:
        refuse_condition(cond, "this network has classes=0", "Set classes to the number of labels, or omit cond")
        return e
    labels, scale = cond if isinstance(cond, tuple) and len(cond) == 2 else (cond, None)
    labels = _labels(labels, len(e), classes)
    if scale is not None and not guided:
        raise ValueError(
            "guided=False: cond is a pair (labels, scale), and this network does not take a guidance scale. "
            "Set guided=True, or give labels alone."
        )
    features = e.shape[-1]
    e += nn.Embed(classes + 1, features, **({} if init is None else {"embedding_init": init}))(labels)
    if guided:
        gain = jnp.zeros(e.shape[0]) if scale is None else 1 - 1 / _scales(scale, e.shape[0])
        e += nn.Dense(features, name="scale", use_bias=False, kernel_init=nn.initializers.zeros)(jump_waves(gain))
    return e


def by_channels(x: Float[Array, "b ..."], cond: Any) -> Float[Array, "b ..."]:
    """Return the input of a network with float conditions on its grid as further channels; a missing one is zero.

    Args:
        x: images ``[B, H, W, C]`` or series ``[B, L, C]``.
        cond: floating arrays ``[B, ...]``; ``[B, H, W, K]`` and ``[B, L, K]`` lie on the grid of ``x``.

    Returns:
        The input, with the channels of all arrays on its grid.

    >>> by_channels(jnp.zeros((2, 8, 1)), {"past": jnp.zeros((2, 8, 3)), "mean": jnp.zeros(2)}).shape
    (2, 8, 4)
    """
    grid = x.shape[1:-1]
    channels = [jnp.where(_missing(c, x), 0, c) for c in jax.tree.leaves(cond) if _on_grid(c, grid)]
    return jnp.concatenate([x, *(c.astype(x.dtype) for c in channels)], -1)


def _add_floats(e: Float[Array, "b d"], cond: Any, grid: tuple[int, ...] | None) -> Float[Array, "b d"]:
    leaves, features = jax.tree.leaves(cond), e.shape[-1]
    if not leaves:
        raise ValueError(
            "cond=None: this network has floats=True. Give float conditions [B, ...], or set floats=False."
        )
    for i, c in enumerate(leaves):
        if not jnp.issubdtype(jnp.result_type(c), jnp.floating) or jnp.shape(c)[:1] != e.shape[:1]:
            remedy = f"Give floating arrays of {e.shape[0]} rows"
            raise ValueError(f"cond={_summary(c)}: a network with floats=True takes other conditions. {remedy}.")
        flat = c.reshape(e.shape[0], -1).astype(e.dtype)
        missing = _missing(flat, e)
        if grid is None or not _on_grid(c, grid):
            h = nn.Dense(features, name=f"float_{i}_in")(jnp.where(missing, 0, flat))
            e += jnp.where(missing, 0, nn.Dense(features, name=f"float_{i}_out")(nn.silu(h)))
        e += nn.Dense(features, use_bias=False, name=f"missing_{i}")(missing.astype(e.dtype))
    return e


def _on_grid(c: Array, grid: tuple[int, ...]) -> bool:
    return c.ndim == len(grid) + 2 and c.shape[1:-1] == tuple(grid)


def _missing(c: Array, like: Array) -> Array:
    """Return the mask ``[B, 1, ...]`` of the rows that have a NaN."""
    missing = jnp.isnan(c).reshape(c.shape[0], -1).any(1)
    return missing.reshape(c.shape[0], *(1 for _ in range(like.ndim - 1)))


def refuse_condition(cond: Any, problem: str, remedy: str) -> None:
    """Refuse a condition given to a network that takes none.

    Args:
        cond: the condition; ``None`` passes.
        problem: why the network takes no condition, for the message.
        remedy: what to do, for the message.

    Raises:
        ValueError: ``cond`` is not ``None``.
    """
    if cond is not None:
        raise ValueError(f"cond={_summary(cond)}: {problem} and takes no condition. {remedy}.")


def _labels(labels: Any, batch: int, classes: int) -> Array:
    """Labels ``[B]``; a label outside ``0 .. classes`` becomes ``classes + 1``, for which the table gives NaN."""
    remedy = f"Give integer labels of shape ({batch},) in 0..{classes}, where {classes} is the null label."
    if not isinstance(labels, jax.Array | np.ndarray | np.generic) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"cond={_summary(labels)}: a network with classes={classes} needs integer labels. {remedy}")
    if labels.shape != (batch,):
        raise ValueError(f"cond={_summary(labels)}: wrong shape for a batch of {batch}. {remedy}")
    if not isinstance(labels, jax.core.Tracer):
        outside = np.asarray(labels)
        outside = outside[(outside < 0) | (outside > classes)]
        if outside.size:
            raise ValueError(f"cond={outside[0]}: label outside 0..{classes} (classes={classes}). {remedy}")
    labels = jnp.asarray(labels, jnp.promote_types(jnp.asarray(labels).dtype, jnp.int32))
    return jnp.where((labels < 0) | (labels > classes), classes + 1, labels)


def _scales(scale: Any, batch: int) -> Array:
    """Guidance scales ``[B]``."""
    if jnp.shape(scale) != (batch,) or not jnp.issubdtype(jnp.result_type(scale), jnp.floating):
        raise ValueError(
            f"cond=(labels, {_summary(scale)}): the guidance scale is not one number per example. "
            f"Give a float array of shape ({batch},)."
        )
    return scale


def _summary(cond: Any) -> str:
    """A short name of a condition: the type and shape of an array, or the value."""
    if isinstance(cond, jax.Array | np.ndarray):
        return f"{cond.dtype}[{','.join(map(str, cond.shape))}]"
    if isinstance(cond, (tuple, dict)):
        return f"{type(cond).__name__} of {len(cond)} parts"
    return f"{cond!r:.60}"
