"""Embedding of two times, at least float32 whatever the compute type, smooth in both so that jvp in time stays tame."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


def sinusoid(t: Float[Array, " b"], dim: int, *, max_frequency: float = 16.0) -> Float[Array, "b d"]:
    """``[cos(w t), sin(w t)]`` with ``dim / 2`` frequencies ``w``, log-spaced from ``1`` to ``max_frequency`` radians.

    Times stay in [0, 1]: multiplying them by 1000, as diffusion networks do, makes the time derivative explode.
    """
    w = jnp.exp(jnp.linspace(0.0, jnp.log(max_frequency), dim // 2))
    angle = t.astype(jnp.promote_types(t.dtype, jnp.float32))[:, None] * w
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], 1)


class TwoTimes(nn.Module):
    """``e(s) + W (phi(t - s) - phi(0))``: a plain embedding of ``s`` plus a zero-initialised one of the jump.

    It vanishes on the diagonal whatever ``W`` is, so a flow-matching checkpoint is a flow map whose jump is one Euler
    step, and training on the diagonal leaves ``W`` alone.
    """

    features: int
    frequencies: int = 64

    @nn.compact
    def __call__(self, s: Float[Array, " b"], t: Float[Array, " b"]) -> Float[Array, "b d"]:
        jump = sinusoid(t - s, self.frequencies) - sinusoid(jnp.zeros_like(t), self.frequencies)
        e = nn.Dense(self.features, name="source")(sinusoid(s, self.frequencies))
        e += nn.Dense(self.features, name="jump", use_bias=False, kernel_init=nn.initializers.zeros)(jump)
        return nn.Dense(self.features, name="mix")(nn.silu(e))
