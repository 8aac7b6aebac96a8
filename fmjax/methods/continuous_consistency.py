"""Consistency models in continuous time (sCM): the derivative of the map to the data, on the circle of TrigFlow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods.eulerian import VELOCITIES
from fmjax.types import Method, Net, expand


def continuous_consistency(
    net: Net,
    *,
    path: paths.Path | None = None,
    time=times.noise_angle,
    diagonal: float = 0.0,
    teacher: Net | None = None,
    velocity: str = "conditional",
    sigma: float = 1.0,
    normalise: float = 0.1,
    warmup: float = 0.0,
) -> Method:
    """``|F - sg(F + g)|^2``, ``X_{s,1}(x) = cos(a) x - sin(a) sigma F``, ``a = pi / 2 (1 - s)`` (arXiv 2410.11081).

    ``g = -cos^2(a) (sigma F - x') - r cos(a) sin(a) (x + sigma F')``, and then ``g / (|g| + normalise)``; ``'`` is the
    derivative by ``a`` along the trajectory, ``x' = -(2 / pi) v``, ``r = min(1, progress / warmup)``. With ``r = 1`` it
    is ``g = cos(a) d/da X_{s,1}(x)``: without the normalisation the gradient is that of ``eulerian`` with
    ``pair=times.to_data`` and no diagonal, times ``(4 / pi^2) cos(a) / (sinc(a) sigma)``.

    ``F`` is taken out of the average velocity that ``net`` is (``angular``); ``nets.adapters.trigonometric``
    makes one of a network ``F``. ``v`` is ``dI_s`` (``"conditional"``, sCT) or the teacher's velocity, ``sg
    teacher(target, x, s, s, cond)`` (``"own"``, sCD). ``path`` is the trigonometric one by default; ``sigma`` is
    the standard deviation of data and source alike: scale the data to one, or give batches an ``x0`` of theirs. The
    paper's learned weight is left out. ``X_{s,t}`` is trained for ``t = 1`` only, the velocity on the share
    ``diagonal`` of the batch (``|u(I_t, t, t) - dI_t|^2``, ``t ~ time``): without one, sample in a jump, or in several
    with noise between them. Dropout acts on the diagonal only. ``aux`` as that of
    ``eulerian``. Raises ``ValueError`` for an unknown velocity, shares that are none, ``normalise < 0`` and
    ``sigma <= 0``.
    """
    path, teacher = path or paths.trigonometric(), teacher or net
    c.check_times(path, time)
    checks.check_choice("velocity", velocity, VELOCITIES)
    checks.check_fraction(diagonal=diagonal, warmup=warmup)
    if normalise < 0 or not sigma > 0:
        raise ValueError(f"normalise={normalise} cannot be negative, and sigma={sigma} must be positive")

    def turning(params, target, batch, key):
        k_t, k_x = c.split(key, 2)
        s = time(k_t)
        t = jnp.ones_like(s)
        x, v = c.interpolant(path, k_x, batch, s)
        if velocity == "own":
            v = jax.lax.stop_gradient(teacher(target, x, s, s, batch.cond))
        angle = jnp.pi / 2 * (t - s)
        cos, slow = expand(jnp.cos(angle), x), expand(jnp.cos(angle) * jnp.sin(angle), x)
        dx, ds = -2 / jnp.pi * v, -2 / jnp.pi * jnp.ones_like(s)  # by the angle
        # the factor is on the tangents, as the derivative alone may overflow in half precision
        tangents = slow * dx, slow.reshape(s.shape) * ds
        f, df = jax.jvp(lambda x, s: angular(c.with_jvp(net)(params, x, s, t, batch.cond), x, t - s), (x, s), tangents)
        g = -(cos**2) * (f - dx) - expand(c.warmed(batch, warmup), x) * (slow * x + df)
        return c.Term(s, t, *c.semigradient(f / sigma, -g, normalise))

    return c.two_time(net, c.two_terms(c.matching(net, path, time), turning, diagonal))


def angular(u: Array, x: Array, gap: Array) -> Array:
    """``sigma F`` of an average velocity: ``x + gap u = cos(a) x - sin(a) sigma F``, ``a = pi / 2 gap``."""
    a = expand(jnp.pi / 2 * gap, x)
    return -(2 / jnp.pi * u + a / 2 * jnp.sinc(a / (2 * jnp.pi)) ** 2 * x) / jnp.sinc(a / jnp.pi)
