"""Embedding of two times, at least float32 whatever the compute type, smooth in both so that jvp in time stays tame."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

SPECTRA = ("wide", "slow")


def sinusoid(t: Float[Array, " b"], dim: int, *, max_frequency: float = 16.0) -> Float[Array, "b d"]:
    """``[cos(w t), sin(w t)]`` with ``dim / 2`` frequencies ``w``, log-spaced from ``1`` to ``max_frequency`` radians.

    Times stay in [0, 1]: multiplying them by 1000, as diffusion networks do, makes the time derivative explode.
    """
    return waves(t, jnp.exp(jnp.linspace(0.0, jnp.log(max_frequency), dim // 2)))


def slow_sinusoid(
    t: Float[Array, " b"], dim: int, *, max_period: float = 1e4, endpoint: bool = False
) -> Float[Array, "b d"]:
    """``[cos(w t), sin(w t)]`` with ``w_i = max_period^(-i / (dim / 2))``: from 1 radian down (arXiv 2006.11239).

    What torchcfm's U-Net sees: the sinusoids of DDPM at times in [0, 1], most of them nearly straight lines. With
    ``endpoint`` the last frequency is ``1 / max_period`` itself, the divisor ``dim / 2 - 1`` (score SDE's networks).
    """
    return waves(t, jnp.exp(-jnp.log(max_period) * jnp.arange(dim // 2) / (dim // 2 - endpoint)))


def jump_waves(gap: Float[Array, " b"]) -> Float[Array, "b 64"]:
    """``sinusoid(gap) - sinusoid(0)``, 64 numbers: what a network sees of a jump, nothing of one of no length."""
    return sinusoid(gap, 64) - sinusoid(jnp.zeros_like(gap), 64)


def waves(t: Float[Array, " b"], w: Float[Array, " f"]) -> Float[Array, "b d"]:
    """``[cos(w t), sin(w t)]``, at least float32."""
    angle = t.astype(jnp.promote_types(t.dtype, jnp.float32))[:, None] * w
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], 1)


class TwoTimes(nn.Module):
    """``e(s) + W (phi(t - s) - phi(0))``: a plain embedding of ``s`` plus a zero-initialised one of the jump.

    It vanishes on the diagonal whatever ``W`` is, so a flow-matching checkpoint is a flow map whose jump is one Euler
    step, and training on the diagonal leaves ``W`` alone. ``e`` sees ``frequencies`` numbers of ``sinusoid``
    (``spectrum="wide"``) or ``slow_sinusoid`` (``"slow"``), or ``seen`` where it is given; the jump is always seen
    widely, 64 numbers of it.
    """

    features: int
    frequencies: int = 64
    spectrum: str = "wide"
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(
        self, s: Float[Array, " b"], t: Float[Array, " b"], seen: Float[Array, "b f"] | None = None
    ) -> Float[Array, "b d"]:
        if self.spectrum not in SPECTRA:
            raise ValueError(f"spectrum of the times must be one of {', '.join(SPECTRA)}, got {self.spectrum!r}")
        if seen is None:
            seen = {"wide": sinusoid, "slow": slow_sinusoid}[self.spectrum](s, self.frequencies)
        e = nn.Dense(self.features, name="source", kernel_init=self.kernel_init)(seen)
        e += nn.Dense(self.features, name="jump", use_bias=False, kernel_init=nn.initializers.zeros)(jump_waves(t - s))
        return nn.Dense(self.features, name="mix", kernel_init=self.kernel_init)(nn.silu(e))


def condition(e: Float[Array, "b d"], cond, *, classes: int, guided: bool = False, init=None) -> Float[Array, "b d"]:
    """The embedding ``e`` plus those of labels ``[B]``, and of guidance scales ``[B]`` where the net is ``guided``.

    Called inside a compact module, whose parameters it makes: ``Embed_0`` of ``classes + 1`` labels (the last is the
    null label), ``scale``. A guided net takes a pair ``(labels, w)`` and adds ``W (phi(1 - 1/w) - phi(0))``, ``W``
    zero at first: at ``w = 1``, which labels alone stand for, it is the net without. ``classes = 0``: no condition.
    Raises ``ValueError`` for a guided net without labels, and for a scale that the net is not told.
    """
    if guided and not classes:
        raise ValueError("a guided net needs labels to be guided by: set classes (in a config the field of that name)")
    if not classes:
        return e
    labels, scale = cond if isinstance(cond, tuple) else (cond, None)
    if scale is not None and not guided:
        raise ValueError("this net is not told the guidance scale of its condition (labels, scale): set guided=True")
    features = e.shape[-1]
    e += nn.Embed(classes + 1, features, **({} if init is None else {"embedding_init": init}))(labels)
    if guided:
        gain = jnp.zeros(e.shape[0]) if scale is None else 1 - 1 / scale
        e += nn.Dense(features, name="scale", use_bias=False, kernel_init=nn.initializers.zeros)(jump_waves(gain))
    return e
