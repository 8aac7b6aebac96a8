"""A network that decodes several times at once, with convolutions over the time by Fourier modes (DSNO)."""

from __future__ import annotations

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.nets import base
from fmjax.nets.embedding import TwoTimes, condition


class TemporalConvolution(base.Checked):
    """Apply ``y + gelu(W y + F^-1(R F y))`` along the second axis, with ``R`` on the lowest Fourier modes.

    ``F^-1 R F`` is a circular convolution over the times whose kernel has these modes alone. ``R`` starts at zero.

    Attributes:
        modes: number of Fourier modes, at most half of the times and one more; more are cut.

    >>> import jax, jax.numpy as jnp
    >>> layer = TemporalConvolution(modes=2)
    >>> params = layer.init(jax.random.key(0), jnp.ones((1, 4, 3)))
    >>> layer.apply(params, jnp.ones((1, 4, 3))).shape
    (1, 4, 3)
    """

    modes: base.Outputs = 2

    @nn.compact
    def __call__(self, y: Float[Array, "b m c"]) -> Float[Array, "b m c"]:
        """Return ``[B, M, C]``."""
        times, width = y.shape[1:]
        modes = min(self.modes, times // 2 + 1)
        r = self.param("modes", nn.initializers.zeros, (2, modes, width, width))
        spectrum = jnp.fft.rfft(y, axis=1)[:, :modes]
        mixed = jnp.einsum("bmc,mcd->bmd", spectrum, r[0] + 1j * r[1])
        mixed = jnp.pad(mixed, ((0, 0), (0, times // 2 + 1 - modes), (0, 0)))
        return y + nn.gelu(nn.Dense(width, name="pointwise")(y) + jnp.fft.irfft(mixed, times, axis=1))


class TemporalNet(base.Checked):
    """Map sources ``[B, ...]`` to trajectories ``[B, times, ...]``: an MLP at each time, convolutions over the times.

    The output layer starts at zero.

    Attributes:
        times: number of times that are decoded.
        width: width of the blocks.
        depth: number of blocks, each an MLP at every time and a temporal convolution.
        modes: Fourier modes of the temporal convolutions (2 in DSNO).
        classes: number of labels; 0: the network takes no condition.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import nets
    >>> model = nets.from_linen(TemporalNet(times=4, width=8, depth=1))
    >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))
    >>> jax.eval_shape(model.net, params, jnp.ones((3, 2)), 0.0, 0.0).shape
    (3, 4, 2)
    """

    times: base.Outputs = 4
    width: base.Width = 128
    depth: base.Depth = 2
    modes: base.Outputs = 2
    classes: base.Classes = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ..."], s: Float[Array, " b"], t: Float[Array, " b"], cond=None, *, train: bool = False
    ) -> Array:
        """Return ``[B, times, ...]``."""
        e = nn.silu(condition(TwoTimes(self.width)(s, t), cond, classes=self.classes))
        h = nn.Dense(self.width, name="input")(x.reshape(len(x), -1))
        place = self.param("times", nn.initializers.normal(0.3), (self.times, self.width))
        h = (h + nn.Dense(self.width, name="film")(e))[:, None] + place
        for i in range(self.depth):
            r = nn.LayerNorm(use_bias=False, use_scale=False)(h)
            h += nn.Dense(self.width, name=f"down_{i}")(nn.gelu(nn.Dense(self.width, name=f"up_{i}")(r)))
            h = TemporalConvolution(self.modes, name=f"convolution_{i}")(h)
        size = math.prod(x.shape[1:])
        out = nn.Dense(size, kernel_init=nn.initializers.zeros, name="output")(nn.LayerNorm()(h))
        return out.reshape(len(x), self.times, *np.shape(x)[1:])
