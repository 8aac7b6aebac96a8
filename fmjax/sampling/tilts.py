"""Tilted distributions of flows: what weighted particles (``particles.weighted``) need to sample these distributions.

A tilt is an unnormalised distribution ``p~_t`` made from marginals ``q_t`` of flows: a product of powers, or a reward.
For any drift ``b`` and any strength ``g`` the weighted SDE

``dX = (b + g^2/2 S~) dt + g dW``, ``d log W = r dt``, ``S~ = grad log p~``, ``r = d/dt log p~ + div b + b . S~``

has the weighted marginals ``p~_t`` (Feynman-Kac; arXiv 2503.02819). The velocities need a source ``N(0, I)`` that is
independent of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import checks, paths
from fmjax.checks import Refusal
from fmjax.sampling.costs import evaluations
from fmjax.sampling.likelihood import divergence as exact_divergence
from fmjax.types import Cond, FlowMapFn, VelocityFn, accept, expand, over_batch, with_null

Reward = Callable[..., Float[Array, " b"]]


class Tilt(NamedTuple):
    """A tilted distribution along a path, as the fields of its weighted SDE.

    Attributes:
        fields: ``fields(x, t, cond) -> (b, S~, r)``: the drift ``[B, ...]``, the score of the tilt ``[B, ...]`` and the
            rate of the log-weights ``[B]``.
        start: particles start from ``start * source_sample(...)``: the tilt of the source.
        nfe: network evaluations of ``fields``.
        check: as in ``types.Costed``.
    """

    fields: Callable[[Array, Array, Cond], tuple[Array, Array, Array]]
    start: float = 1.0
    nfe: int | None = None
    check: Callable[[Any], None] = accept


def power_product(
    velocities: Sequence[VelocityFn],
    powers: Sequence[float],
    *,
    divergence: bool = False,
    path: paths.Path = paths.linear(),
) -> Tilt:
    """Return the tilt ``prod_i q_i^{lambda_i}`` of several flows: annealing, products of experts, guidance.

    One flow and one power anneal; powers ``(1, 1)`` multiply two flows; ``(1 - w, w)`` is the geometric mean that
    classifier-free guidance aims at (``guided_tilt``). With the sum ``L`` of the powers, the rates are

    * without a divergence: ``b = kappa x + eta S~``, ``r = eta (|S~|^2 - sum_i lambda_i |S_i|^2)``, the form of the
      paper. Its weights grow without bound near ``t = 0`` unless ``L = 1``: start later, on a ``log_snr_grid``;
    * with one: ``b = sum_i lambda_i v_i / L``, ``r = (1/L - 1) sum_i lambda_i div v_i - c``, of smaller variance and
      finite at ``t = 0``. ``c = sum_ij lambda_i lambda_j |v_i - v_j|^2 / (2 eta L)`` is 0 for one flow.

    For ``L = 1`` both are the same, and no divergence is evaluated.

    Args:
        velocities: the velocities ``v_i(x, t, cond)``, of one path.
        powers: the powers ``lambda_i``, one for each velocity, of positive sum.
        divergence: whether to evaluate the divergences of the velocities exactly: ``d`` derivatives each.
        path: the path of the velocities, without a latent.

    Returns:
        The tilt, whose ``start`` is ``L^(-1/2)``.

    Raises:
        ValueError: numbers of powers and velocities that differ, a sum of powers that is not positive, a path with a
            latent; by ``check``, a grid from ``t = 0`` for a tilt that is not finite there.

    >>> from fmjax import oracles
    >>> tilt = power_product([oracles.gaussian(0.0, 0.5).velocity], [4.0], divergence=True)
    >>> tilt.start, round(tilt.fields(jnp.ones((1, 1)), 0.5, None)[1].item(), 3)
    (0.5, -12.8)

    Source: arXiv 2503.02819; the form with a divergence is derived in this library.
    """
    powers = tuple(float(p) for p in powers)
    if len(powers) != len(velocities) or not powers:
        raise Refusal("powers", powers, f"there are {len(velocities)} velocities", "Give one power for each velocity")
    total = math.fsum(powers)
    if not (0 < total < math.inf):
        raise Refusal("powers", powers, "their sum is not positive and finite", "Give powers of a positive sum")
    paths.refuse_latent("a product of flows", path)
    level = abs(total - 1) < 1e-12

    def fields(x, t, cond=None):
        t = over_batch(t, x)
        kappa, eta = _rates(path, x, t)
        vs, divs = [], []
        for velocity in velocities:
            if divergence and not level:
                v, div = exact_divergence(velocity, x, t, cond)
                divs.append(div)
            else:
                v = velocity(x, t, cond)
            vs.append(v)
        scores = [paths.score(path, x, v, t) for v in vs]
        mean = sum(p * v for p, v in zip(powers, vs, strict=True))
        push = sum(p * s for p, s in zip(powers, scores, strict=True))
        spread = jnp.zeros(x.shape[:1], x.dtype)
        for i, (p, v) in enumerate(zip(powers, vs, strict=True)):
            for q, w in zip(powers[:i], vs[:i], strict=True):
                spread += p * q * _square((v - w) / jnp.sqrt(eta))
        if level:
            return mean, push, -spread
        if divergence:
            growth = sum(p * div for p, div in zip(powers, divs, strict=True))
            return mean / total, push, (1 / total - 1) * growth - spread / total
        norms = sum(p * _square(jnp.sqrt(eta) * s) for p, s in zip(powers, scores, strict=True))
        return mean - (total - 1) * kappa * x, push, (total - 1) * norms - spread

    def check(ts):
        first = min(float(t) for t in ts)
        if not (level or divergence) and float(path.coefficients(jnp.float32(first))[1]) <= 0:
            wrong = "the weights of this product are infinite where all is noise"
            raise Refusal("ts", first, wrong, "Start later, such as at 0.02, or give divergence=True")

    return Tilt(fields, total**-0.5, evaluations(*velocities), check)


def guided_tilt(conditional: VelocityFn, *, null: Cond, scale: float, path: paths.Path = paths.linear()) -> Tilt:
    """Return the tilt ``q(x|null)^(1 - w) q(x|cond)^w`` at which classifier-free guidance aims.

    The drift is the guided velocity of ``guidance.classifier_free``; the weights ``r = w (w - 1) |v - v_null|^2 / eta``
    repair what guidance alone gets wrong: two Gaussians of variances ``V0, Vc`` end at ``1 / ((1 - w) / V0 + w / Vc)``.

    Args:
        conditional: ``v(x, t, cond)``.
        null: the condition that stands for no condition (see ``guidance.classifier_free``).
        scale: the guidance scale ``w``; 1 is no guidance.
        path: the path of the velocity, without a latent.

    Returns:
        The tilt, of two evaluations.

    Raises:
        ValueError: a scale that is not finite, a path with a latent.

    >>> tilt = guided_tilt(lambda x, t, cond: x + cond[:, None], null=0, scale=3.0)
    >>> [a.tolist() for a in tilt.fields(jnp.zeros((1, 1)), 0.5, jnp.array([1]))[::2]]
    [[[3.0]], [6.0]]

    Source: arXiv 2503.02819.
    """
    checks.check_range("scale", scale, checks.Range())
    base = lambda x, t, cond: conditional(x, t, with_null(cond, null))
    tilt = power_product([base, conditional], [1 - scale, scale], path=path)
    return tilt._replace(nfe=evaluations(conditional, calls=2))


def reward_tilt(
    velocity: VelocityFn,
    reward: Reward,
    *,
    strength: Callable[[Array], Array] = lambda t: t,
    flow_map: FlowMapFn | None = None,
    exact_map: bool = True,
    path: paths.Path = paths.linear(),
) -> Tilt:
    """Return the tilt ``q_t exp(lambda_t R_t)`` of a flow by a reward, perhaps a look-ahead reward.

    Without a flow map ``R_t(x) = R(x)``. With a flow map ``R_t(x) = R(X_{t,1}(x))``, the reward of the sample to which
    the flow carries ``x``. Both end in ``q_1 exp(lambda_1 R)``. The drift is ``v``, and

    ``r = lambda_t' R_t + lambda_t (d/dt + v . grad) R_t``.

    For the exact flow map of ``v`` the last term is zero, since ``R_t`` is constant along the flow, so that
    ``r = lambda_t' R_t``. For a learned map ``exact_map=False`` keeps the term: the weights are exact for any map, even
    ``paths.convert`` to data, at the cost of one more derivative.

    Args:
        velocity: ``v(x, t, cond)``.
        reward: ``R(x, cond) -> [B]`` at ``t = 1``, differentiable.
        strength: ``lambda_t``, a differentiable function of the times ``[B]``, usually 0 at ``t = 0``.
        flow_map: ``X(x, s, t, cond)``, or ``None``.
        exact_map: whether to leave out the term that is zero for the exact flow map.
        path: the path of the velocity, without a latent.

    Returns:
        The tilt.

    Raises:
        ValueError: a path with a latent.

    >>> from fmjax import oracles
    >>> oracle = oracles.gaussian(0.0, 1.0)
    >>> tilt = reward_tilt(oracle.velocity, lambda x, cond=None: x[:, 0], flow_map=oracle.flow_map)
    >>> round(tilt.fields(jnp.ones((1, 1)), 0.5, None)[2].item(), 4)
    1.4142

    Source: arXiv 2511.22688 (look-ahead by flow maps); the term of an inexact map is derived in this library.
    """
    paths.refuse_latent("a tilt by a reward", path)

    def ahead(x, t, cond):
        return reward(x if flow_map is None else flow_map(x, t, jnp.ones_like(t), cond), cond)

    def fields(x, t, cond=None):
        t = over_batch(t, x)
        v, ones = velocity(x, t, cond), jnp.ones_like(t)
        value, pull = jax.vjp(lambda x: ahead(x, t, cond), x)
        (gradient,) = pull(jnp.ones_like(value))
        scale, slope = jax.jvp(strength, (t,), (ones,))
        rate = slope * value
        if flow_map is None:
            rate += scale * jnp.sum((v * gradient).reshape(len(x), -1), 1)
        elif not exact_map:
            rate += scale * jax.jvp(lambda x, t: ahead(x, t, cond), (x, t), (v, ones))[1]
        return v, paths.score(path, x, v, t) + expand(scale, x) * gradient, rate

    forward = [] if flow_map is None else [flow_map]
    return Tilt(fields, 1.0, evaluations(velocity, *forward))


def _rates(path: paths.Path, x: Array, t: Array) -> tuple[Array, Array]:
    """Return ``kappa = beta' / beta`` and ``eta = alpha (kappa alpha - alpha')``: ``v = kappa x + eta S``."""
    alpha, beta, d_alpha, d_beta = paths.coefficients(path, x, t)
    return d_beta / beta, alpha * (d_beta * alpha - d_alpha * beta) / beta


def _square(x: Array) -> Float[Array, " b"]:
    """Return the squared norm of each example."""
    return jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), 1)
