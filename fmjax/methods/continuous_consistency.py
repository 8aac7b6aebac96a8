"""Consistency models in continuous time (sCM): the derivative of the map to the data, on the circle of TrigFlow."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths, times
from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.methods.eulerian import VELOCITIES
from fmjax.types import FlowMapMethod, Net, expand


def continuous_consistency(
    net: Net,
    *,
    path: paths.Path = paths.trigonometric(),
    time: Callable = functools.partial(times.noise_angle, sigma=0.5),
    diagonal: float = 0.0,
    teacher: Net | None = None,
    velocity: str = "conditional",
    sigma: float = 1.0,
    normalise: float = 0.1,
    warmup: float = 0.025,
    prior: bool = False,
) -> FlowMapMethod:
    """Train a consistency model in continuous time, ``|F - sg(F + g)|^2`` with a normalised ``g`` (arXiv 2410.11081).

    ``X_{s,1}(x) = cos(a) x - sin(a) sigma F`` with the angle ``a = pi / 2 (1 - s)``, and

    ``g = -cos^2(a) (sigma F - x') - r cos(a) sin(a) (x + sigma F')``, then ``g / (|g| + normalise)``;

    ``'`` is the derivative by ``a`` along the trajectory, ``x' = -(2 / pi) v``, ``r = min(1, progress / warmup)``. This
    is Algorithm 1 of the paper for data of standard deviation 1, with its angles ``a = arctan(e^z / 0.5)``,
    ``z ~ N(-1, 1.4^2)``, and its warm-up of 10,000 steps of 400,000. The paper's prior weight ``1 / (sigma tan a)`` is
    the factor ``cos(a)`` of ``g``; ``prior=True`` weights the loss with it once more, as NVIDIA's FastGen does. It
    departs from the paper: the learned weight ``e^w`` is left out (``weighting.learned`` adds it), and the normalised
    ``g``, which counts large errors less, learns a map that leans to a median where the data are few elements and far
    from Gaussian (``normalise=0`` does not).

    Where ``r = 1``, ``g = cos(a) d/da X_{s,1}(x)``: without the normalisation the gradient is the gradient of
    ``eulerian`` with ``pair=times.to_data`` and no diagonal, times ``(4 / pi^2) cos(a) / (sinc(a) sigma)``.

    The map is trained for ``t = 1`` only, and the velocity only on the fraction ``diagonal`` of the batch. Where
    ``diagonal=0``, sample in one jump, or in several jumps with noise between them.

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, of the shape of ``x``, from which ``F`` is read
            (``angular``); ``nets.trigonometric_velocity`` makes one of a network ``F``. Dropout acts on the diagonal.
        path: interpolant ``I_t``; the trigonometric path by default.
        time: distribution of ``s``, and of ``t`` on the diagonal, ``key: [B] -> [B]``.
        diagonal: fraction of the batch with the flow-matching loss ``|u(I_t, t, t) - dI_t|^2``.
        teacher: network of the own velocity, at the parameters ``target``; ``net`` by default.
        velocity: ``v``. ``"conditional"``: ``dI_s`` (sCT). ``"own"``: ``sg teacher(target, x, s, s, cond)`` (sCD).
        sigma: standard deviation of the data and of the source. Scale the data to 1, or give batches an ``x0`` of this
            deviation.
        normalise: constant beside the norm of ``g``; 0 for no normalisation.
        warmup: fraction of the training during which ``r`` grows; 0 for none.
        prior: multiply the loss by ``1 / (sigma tan a)``.

    Returns:
        A method with ``velocity`` and ``flow_map``; ``aux`` as in ``eulerian``.

    Raises:
        ValueError: an unknown velocity, a fraction outside [0, 1], ``normalise < 0`` or ``sigma <= 0``.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.continuous_consistency(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> method.flow_map(2.0)(jnp.ones((1, 2)), 0.5, 1.0)
    Array([[2., 2.]], dtype=float32)
    """
    teacher = teacher or net
    c.check_times(path, time)
    checks.check_choice("velocity", velocity, VELOCITIES)
    checks.check_fraction(diagonal=diagonal, warmup=warmup)
    if normalise < 0:
        raise ValueError(f"normalise={normalise}: negative. Give a positive number, or 0 for none.")
    if not sigma > 0:
        raise ValueError(f"sigma={sigma}: not a standard deviation. Give a positive number.")

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
        field = lambda x, s: angular(views.for_jvp(net)(params, x, s, t, batch.cond), x, t - s)
        f, df = jax.jvp(field, (x, s), tangents)
        g = -(cos**2) * (f - dx) - expand(c.warmed(batch, warmup), x) * (slow * x + df)
        error, residual = c.semigradient(f / sigma, -g, normalise)
        if not prior:
            return c.Term(s, t, error, residual)
        return c.Term(s, t, error / (sigma * jnp.tan(angle)), error if residual is None else residual)

    return views.two_time(net, c.two_terms(c.matching(net, path, time), turning, diagonal))


def angular(u: Array, x: Array, gap: Array) -> Array:
    """Return ``sigma F`` of an average velocity: ``x + gap u = cos(a) x - sin(a) sigma F`` with ``a = pi / 2 gap``.

    Args:
        u: average velocity ``[B, ...]``.
        x: ``[B, ...]``.
        gap: ``t - s``, ``[B]``.

    Returns:
        ``[B, ...]``.
    """
    a = expand(jnp.pi / 2 * gap, x)
    return -(2 / jnp.pi * u + a / 2 * jnp.sinc(a / (2 * jnp.pi)) ** 2 * x) / jnp.sinc(a / jnp.pi)
