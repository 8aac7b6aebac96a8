"""Flows with a known error, and the exact gap between their forward and backward marginals.

``v = v* + e`` with the exact velocity ``v*`` of a distribution (``fmjax.oracles``, linear path) and an error field
``e``. Noise carried forward along ``v`` has the distribution ``p_t``, data carried backward ``q_t``: ``p_0 = N(0, I)``,
``q_1`` is the distribution of the data, and ``p_t = q_t`` for ``e = 0``. The best classifier between the two has the
logit ``log q_t / p_t``. The logit is constant along trajectories, so that every f-divergence of ``p_t`` and ``q_t`` is
the same at all times (marginal matching, OpenReview kRjLBXWn1T). All fields take ``x: [B, d]`` and times ``[B]`` or a
scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import sampling
from fmjax.oracles import closed_forms
from fmjax.types import DirectionFn, VelocityFn, expand, over_batch

LogDensity = Callable[[Array, Array], Array]


class Mismatch(NamedTuple):
    """A flow with an error, and the exact log-densities of its forward and backward marginals.

    Attributes:
        velocity: the velocity ``v* + e``, ``(x, t, cond=None)``.
        log_p: log-density of the forward marginal, ``(x, t) -> [B]``.
        log_q: log-density of the backward marginal, ``(x, t) -> [B]``.
        logit: ``log_q - log_p``, the logit of the best classifier, ``(x, t) -> [B]``.
        kl: ``kl(t) = KL(p_t || q_t)``; ``None`` where no closed form exists.
        w2: ``w2(t)``, the Wasserstein distance of ``p_t`` and ``q_t``; ``None`` where no closed form exists.
    """

    velocity: VelocityFn
    log_p: LogDensity
    log_q: LogDensity
    logit: LogDensity
    kl: Callable[[Array], Array] | None = None
    w2: Callable[[Array], Array] | None = None


def scaled(std: float, eps: float, *, dim: int) -> Mismatch:
    """Return the flow of data ``N(0, std^2 I)`` with the error ``eps x``, which over-disperses for ``eps > 0``.

    With ``V_t = (1-t)^2 + t^2 std^2`` the standard deviations are ``sqrt(V_t) e^{eps t}`` of ``p_t`` and
    ``sqrt(V_t) e^{-eps (1-t)}`` of ``q_t``; ``KL(p_t||q_t) = d ((e^{2 eps} - 1) / 2 - eps)`` and
    ``W2 = sqrt(d V_t) e^{eps t} |1 - e^{-eps}|``.

    Args:
        std: standard deviation of the data.
        eps: size of the error; negative values under-disperse.
        dim: number of coordinates ``d``.

    Returns:
        The flow, with ``kl`` and ``w2``.

    >>> round(float(scaled(0.5, 0.1, dim=2).kl(0.0)), 4)
    0.0214
    """
    root = lambda t: jnp.sqrt(_variance(std, t))
    kl = lambda t: jnp.broadcast_to(dim * (jnp.expm1(2 * eps) / 2 - eps), jnp.shape(t))
    w2 = lambda t: jnp.sqrt(dim) * root(t) * jnp.exp(eps * t) * jnp.abs(jnp.expm1(-eps))
    p = lambda t: (0.0, root(t) * jnp.exp(eps * t))
    q = lambda t: (0.0, root(t) * jnp.exp(-eps * (1 - t)))
    return _normal(std, lambda x, t, cond=None: eps * x, p, q)._replace(kl=kl, w2=w2)


def shifted(std: float, shift: Float[Array, " d"]) -> Mismatch:
    """Return the flow of data ``N(0, std^2 I)`` with the constant error ``shift``, which changes no dispersion.

    With ``V_t`` as in ``scaled`` and ``K_{s,t} = int_s^t V_r^{-1/2} dr`` the means are ``shift sqrt(V_t) K_{0,t}`` of
    ``p_t`` and ``-shift sqrt(V_t) K_{t,1}`` of ``q_t``, both of variance ``V_t``; ``KL = |shift|^2 K_{0,1}^2 / 2`` at
    all times and ``W2 = |shift| sqrt(V_t) K_{0,1}``. ``K = asinh((a t - 1) / std) / sqrt(a)``, ``a = 1 + std^2``.

    Args:
        std: standard deviation of the data.
        shift: the error ``[d]``.

    Returns:
        The flow, with ``kl`` and ``w2``.

    >>> shifted(1.0, jnp.array([0.1, 0.0])).velocity(jnp.zeros((1, 2)), 0.5).round(3).tolist()[0][1]
    0.0
    """
    shift, a = jnp.asarray(shift), 1 + std**2
    root = lambda t: jnp.sqrt(_variance(std, t))
    since = lambda s, t: (jnp.arcsinh((a * t - 1) / std) - jnp.arcsinh((a * s - 1) / std)) / jnp.sqrt(a)
    wide = lambda scale: jnp.asarray(scale) * shift
    kl = lambda t: jnp.broadcast_to(0.5 * (shift**2).sum() * since(0.0, 1.0) ** 2, jnp.shape(t))
    w2 = lambda t: jnp.sqrt((shift**2).sum()) * root(t) * since(0.0, 1.0)
    p = lambda t: (wide(root(t) * since(0.0, t)), root(t))
    q = lambda t: (wide(-root(t) * since(t, 1.0)), root(t))
    return _normal(std, lambda x, t, cond=None: jnp.broadcast_to(shift, x.shape), p, q)._replace(kl=kl, w2=w2)


def field(radial, rotation=0.0, wave=0.0, shift=(0.0, 0.0)) -> VelocityFn:
    """Return an error field of the plane: ``e = radial x + rotation (-x2, x1) + wave (sin 2 x2, cos 2 x1) + shift``.

    The divergence is ``2 radial``. The coefficients are arrays, so that one compilation serves all values.

    Args:
        radial: coefficient of ``x``, a scalar.
        rotation: coefficient of the rotated ``x``, a scalar.
        wave: coefficient of the waves, a scalar.
        shift: constant, ``[2]``.

    Returns:
        The field ``(x, t, cond=None)``.

    >>> field(0.5)(jnp.ones((1, 2)), 0.0).tolist()
    [[0.5, 0.5]]
    """

    def error(x, t, cond=None):
        turned = jnp.stack([-x[:, 1], x[:, 0]], 1)
        waves = jnp.stack([jnp.sin(2 * x[:, 1]), jnp.cos(2 * x[:, 0])], 1)
        return radial * x + rotation * turned + wave * waves + jnp.asarray(shift, x.dtype)

    return error


def perturbed(oracle: closed_forms.Oracle, error: VelocityFn, *, steps: int = 16) -> Mismatch:
    """Return the flow ``v* + e`` of any oracle and any error, with log-densities integrated along trajectories.

    Along ``x' = v* + e`` the exact density ``p*_t`` of score ``S*`` changes by ``d log p* = (-div v* + e . S*) dt``,
    and the density of the flow by ``-div (v* + e) dt``. With ``g = div e + e . S*`` therefore

    ``log q_t = log p*_t + int_t^1 g dr``, ``log p_t = log p*_t - int_0^t g dr``, ``log q_t / p_t = int_0^1 g dr``,

    where the integral is exactly 0 for ``e = 0``. Differentiable in ``x`` in both modes (see ``gradient``).

    Args:
        oracle: the data distribution, on the linear path.
        error: the error field ``(x, t)``.
        steps: Runge-Kutta steps (order 4) from ``t`` to either end.

    Returns:
        The flow, without ``kl`` and ``w2``.

    >>> flow = perturbed(closed_forms.gaussian(jnp.zeros(2), 0.5), field(0.1), steps=4)
    >>> round(float(flow.logit(jnp.zeros((1, 2)), 0.0)[0]), 3)
    0.2
    """

    def along(z, t, cond=None):
        x = z[:, :-1]
        e, jacobian = _jacobian(lambda x: error(x, t), x)
        g = jnp.trace(jacobian, axis1=1, axis2=2) + (e * oracle.score(x, t)).sum(1)
        return jnp.concatenate([oracle.velocity(x, t) + e, g[:, None]], 1)

    step = sampling.rk4(along)

    def integral(x, t, end):
        """Return ``int_t^end g dr``, ``[B]``."""
        t = over_batch(t, x)
        at = lambda k: t + (end - t) * k / steps
        advance = lambda z, k: (step(z, at(k), at(k + 1)), None)
        start = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], 1)
        solve = lambda start: jax.lax.scan(advance, start, jnp.arange(steps))[0][:, -1]
        return jax.lax.cond(jnp.all(t == end), lambda start: start[:, -1], solve, start)

    return Mismatch(
        velocity=lambda x, t, cond=None: oracle.velocity(x, t, cond) + error(x, t, cond),
        log_p=lambda x, t: oracle.log_density(x, t) + integral(x, t, 0.0),
        log_q=lambda x, t: oracle.log_density(x, t) + integral(x, t, 1.0),
        logit=lambda x, t: integral(x, t, 1.0) - integral(x, t, 0.0),
    )


def gradient(log_density: LogDensity) -> DirectionFn:
    """Return ``grad_x f(x, t)``: the score of a log-density, or the direction of the exact classifier of a logit.

    Args:
        log_density: ``f(x, t) -> [B]``, example by example.

    Returns:
        The direction ``(x, t, cond=None)``, of the shape of ``x``.

    >>> gradient(lambda x, t: (x**2).sum(1))(jnp.ones((1, 2)), 0.0).tolist()
    [[2.0, 2.0]]
    """
    return lambda x, t, cond=None: jax.grad(lambda x: log_density(x, t).sum())(x)


def pushed(
    transport: Callable[[Array], Array], x: Float[Array, "b d"], log_p: Float[Array, " b"]
) -> tuple[Float[Array, "b d"], Float[Array, " b"]]:
    """Push samples and their log-density through a map: ``y = T(x)``, ``log p(y) = log p(x) - log |det dT/dx|``.

    For deterministic injective maps (for other maps the result is a lower bound of ``log p(y)``) in few dimensions
    (``d`` derivatives). From ``x ~ N(0, I)`` through a whole sampler, steps and corrections, the result gives
    ``KL(p || pi) = E[log p(y) - log pi(y)]`` of the sampler without estimating any density.

    Args:
        transport: the map ``T``, ``[B, d]`` to ``[B, d]``, example by example.
        x: samples ``[B, d]``.
        log_p: their log-density ``[B]``.

    Returns:
        ``(y, log p(y))``, ``[B, d]`` and ``[B]``.

    >>> y, log_p = pushed(lambda x: 2 * x, jnp.ones((1, 1)), jnp.zeros(1))
    >>> y.item(), round(log_p.item(), 4)
    (2.0, -0.6931)
    """
    y, jacobian = _jacobian(transport, x)
    return y, log_p - jnp.linalg.slogdet(jacobian)[1]


def _jacobian(f, x: Array) -> tuple[Array, Array]:
    """Return ``f(x): [B, d]`` and ``df_i/dx_j: [B, d, d]`` of a function that acts example by example."""
    axes = jnp.broadcast_to(jnp.eye(x.shape[1], dtype=x.dtype)[:, None], (x.shape[1], *x.shape))
    return jax.vmap(lambda axis: jax.jvp(f, (x,), (axis,)), out_axes=(None, -1))(axes)


def _variance(std, t):
    return (1 - t) ** 2 + t**2 * std**2


def _normal(std, error, p, q) -> Mismatch:
    """Return the flow of ``N(0, std^2 I)`` with an error; ``p, q``: times ``[B, 1]`` to means and deviations."""
    oracle = closed_forms.gaussian(0.0, std)

    def log_density(moments):
        def log_p(x, t):
            mean, deviation = moments(expand(over_batch(t, x), x))
            terms = -0.5 * ((x - mean) / deviation) ** 2 - jnp.log(deviation) - 0.5 * jnp.log(2 * jnp.pi)
            return terms.sum(1)

        return log_p

    log_p, log_q = log_density(p), log_density(q)
    return Mismatch(
        velocity=lambda x, t, cond=None: oracle.velocity(x, t) + error(x, t),
        log_p=log_p,
        log_q=log_q,
        logit=lambda x, t: log_q(x, t) - log_p(x, t),
    )
