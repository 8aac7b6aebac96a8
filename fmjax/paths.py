"""Interpolants ``I_t = alpha_t x0 + beta_t x1`` and everything one solve gives from them: data, noise and score.

Derivatives of the coefficients come from ``jax.jvp``; conversions come from one 2x2 solve (``convert``). A velocity
learned on one path is one on every other (``change``): laws of equal ratio ``beta / alpha`` differ by a scale alone.
A path may carry a latent, ``+ gamma_t z``: Schroedinger bridges and two-sided stochastic interpolants.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.types import VelocityFn, expand, over_batch

PREDICTIONS = ("velocity", "noise", "data", "score", "v_prediction")
LATENTS: dict[str, Callable[[Array], Array]] = {
    "brownian": lambda t: jnp.sqrt(t * (1 - t)),
    "quadratic": lambda t: t * (1 - t),
    "sine_squared": lambda t: jnp.sin(jnp.pi * t) ** 2,
}


class Path(NamedTuple):
    """An interpolant: ``coefficients(t) -> (alpha_t, beta_t)`` with ``beta / alpha`` increasing on ``[0, 1]``.

    ``(1, 0)`` at ``t = 0`` and ``(0, 1)`` at ``t = 1``, unless the schedule says otherwise. With ``gamma(t) ->
    gamma_t``, zero at both ends, the interpolant has a latent, ``I_t = alpha x0 + beta x1 + gamma z``, where
    ``z ~ N(0, I)`` is independent of the pair ``(x0, x1)``, whatever its law.
    """

    coefficients: Callable[[Array], tuple[Array, Array]]
    gamma: Callable[[Array], Array] | None = None


def linear() -> Path:
    """The linear path ``I_t = (1 - t) x0 + t x1`` (flow matching, arXiv 2210.02747; rectified flow, 2209.03003)."""
    return Path(lambda t: (1 - t, t))


def trigonometric() -> Path:
    """The variance-preserving path ``I_t = cos(pi t / 2) x0 + sin(pi t / 2) x1`` (arXiv 2303.08797)."""
    return Path(lambda t: (jnp.cos(jnp.pi / 2 * t), jnp.sin(jnp.pi / 2 * t)))


def vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """The variance-preserving SDE (arXiv 2011.13456, appendix C), its clock ``tau = 1 - t`` turned: t = 1 is data.

    ``beta_t = exp(-tau^2 (beta_max - beta_min) / 4 - tau beta_min / 2)``, ``alpha_t = sqrt(1 - beta_t^2)``.
    It does not start in pure noise: ``beta_0 = exp(-(beta_min + beta_max) / 4)``, 0.0066 for the defaults. At
    ``t = 1`` the coefficients are (0, 1) but ``alpha'``, and with it the velocity, is infinite (as ``(1 - t)^-1/2``):
    end at ``t = 1 - 1e-3`` to ``1 - 1e-5``, as the source does. Raises ``ValueError`` unless
    ``0 < beta_min <= beta_max``.
    """
    log_beta = _vp_log_beta(beta_min, beta_max)
    return Path(lambda t: (jnp.sqrt(-jnp.expm1(2 * log_beta(t))), jnp.exp(log_beta(t))))


def sub_vp(*, beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """The sub-VP SDE (arXiv 2011.13456, appendix C): ``beta_t`` of ``vp`` and ``alpha_t = 1 - beta_t^2``.

    As ``vp`` it starts at ``beta_0 = exp(-(beta_min + beta_max) / 4)``; at ``t = 1`` everything is finite. Raises
    ``ValueError`` unless ``0 < beta_min <= beta_max``.
    """
    log_beta = _vp_log_beta(beta_min, beta_max)
    return Path(lambda t: (-jnp.expm1(2 * log_beta(t)), jnp.exp(log_beta(t))))


def _vp_log_beta(beta_min: float, beta_max: float) -> Callable[[Array], Array]:
    if not 0 < beta_min <= beta_max < math.inf:
        raise ValueError(f"vp schedules need 0 < beta_min <= beta_max, got beta_min={beta_min}, beta_max={beta_max}")
    return lambda t: -((1 - t) ** 2) * (beta_max - beta_min) / 4 - (1 - t) * beta_min / 2


def ve(*, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
    """The variance-exploding SDE (arXiv 2011.13456, appendix C) in the library's time.

    ``beta_t = 1``, ``alpha_t = sigma_min (sigma_max / sigma_min)^(1 - t)``: noise is added and the data never shrink.
    Neither end is reached: ``I_0 = x1 + sigma_max x0``, so a sampler starts from ``sigma_max x0`` (``alpha_0 x0``) and
    not from ``x0``, and ends in data with noise ``sigma_min``. Raises ``ValueError`` unless
    ``0 < sigma_min < sigma_max``.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"ve needs 0 < sigma_min < sigma_max, got sigma_min={sigma_min}, sigma_max={sigma_max}")
    return Path(lambda t: (sigma_min * (sigma_max / sigma_min) ** (1 - t), jnp.ones_like(t)))


def target_conditional(*, sigma_min: float = 1e-4) -> Path:
    """The path of conditional flow matching (arXiv 2210.02747, eq. 20): ``beta_t = t``, ``alpha_t = 1 - (1 - s) t``.

    Source at ``t = 0``, data with noise ``s = sigma_min`` at ``t = 1``; ``sigma_min = 0`` is the linear path. Raises
    ``ValueError`` unless ``0 <= sigma_min < 1``.
    """
    if not 0 <= sigma_min < 1:
        raise ValueError(f"target_conditional needs 0 <= sigma_min < 1, got sigma_min={sigma_min}")
    return Path(lambda t: (1 - (1 - sigma_min) * t, t))


def schroedinger_bridge(*, sigma: float = 1.0) -> Path:
    """Brownian bridges of diffusion ``sigma`` between the pair: linear, ``gamma_t = sigma sqrt(t (1 - t))``.

    SB-CFM (arXiv 2302.00482, eq. 20) and [SF]2M (2307.03672): with pairs of the entropic plan of regularisation
    ``2 sigma^2`` the law of ``I_t`` is that of the Schroedinger bridge. It is ``two_sided(scale=sigma)``: what is said
    there of the ends holds here. Raises ``ValueError`` for ``sigma <= 0``.
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"schroedinger_bridge needs sigma > 0, got sigma={sigma}; without a latent it is 'linear'")
    return two_sided(scale=sigma)


def two_sided(*, latent: str = "brownian", scale: float = 1.0, schedule: str = "linear") -> Path:
    """A two-sided stochastic interpolant ``alpha_t x0 + beta_t x1 + gamma_t z`` (arXiv 2303.08797).

    ``schedule`` gives ``alpha, beta`` (``"linear"`` or ``"trigonometric"``), ``latent`` gives ``gamma`` up to its
    ``scale``: ``"brownian"`` ``sqrt(t (1 - t))``, ``"quadratic"`` ``t (1 - t)``, ``"sine_squared"`` ``sin^2(pi t)``.

    ``gamma'`` of the Brownian one is infinite at both ends, and so is ``dI_t`` there (``x`` is exact): the variance
    of the target grows as ``scale^2 / 4t``. The velocity itself stays finite, ``E[gamma' z | x] = -gamma gamma' S``.
    So training times keep away from the ends (``times.interior``). Raises ``ValueError`` for ``scale <= 0`` and names
    that do not exist.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"two_sided needs scale > 0, got scale={scale}; without a latent it is {schedule!r}")
    schedules = {"linear": linear, "trigonometric": trigonometric}
    for what, value, known in (("latent", latent, LATENTS), ("schedule", schedule, schedules)):
        if value not in known:
            near = difflib.get_close_matches(str(value), known, 1, 0.0)[0]
            raise ValueError(f"no {what} {value!r}; did you mean {near!r}? (there are {', '.join(known)})")
    return schedules[schedule]()._replace(gamma=lambda t: scale * LATENTS[latent](t))


def coefficients(path: Path, x: Array, t) -> tuple[Array, Array, Array, Array]:
    """``(alpha, beta, d alpha/dt, d beta/dt)`` at ``t: [B]``, each shaped to multiply ``x: [B, ...]``."""
    t = expand(over_batch(t, x), x)
    (alpha, beta), (d_alpha, d_beta) = jax.jvp(path.coefficients, (t,), (jnp.ones_like(t),))
    return alpha, beta, d_alpha, d_beta


def latent(path: Path, x: Array, t) -> tuple[Array, Array]:
    """``(gamma, d gamma/dt)`` at ``t: [B]``, each shaped to multiply ``x: [B, ...]``. ``ValueError`` without a latent.

    ``d gamma/dt`` is infinite at the ends of a Brownian latent.
    """
    if path.gamma is None:
        raise ValueError("this path has no latent: gamma is None; paths.two_sided and paths.schroedinger_bridge do")
    t = expand(over_batch(t, x), x)
    return jax.jvp(path.gamma, (t,), (jnp.ones_like(t),))


def latent_variance(path: Path, x: Array, t) -> tuple[Array, Array]:
    """``(gamma^2, d gamma^2/dt)``, shaped as ``latent``'s; finite at the ends too, and 0 without a latent."""
    t = expand(over_batch(t, x), x)
    if path.gamma is None:
        return jnp.zeros_like(t), jnp.zeros_like(t)
    return jax.jvp(_square(path.gamma), (t,), (jnp.ones_like(t),))


def _square(gamma: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """``gamma^2``, whose derivative ``2 gamma gamma'`` is ``0 inf`` at an end: there it is the one next to the end."""

    @jax.custom_jvp
    def square(t):
        return jnp.square(gamma(t))

    @square.defjvp
    def _rate(primals, tangents):
        (t,), (dt,) = primals, tangents
        eps = jnp.finfo(t.dtype).eps
        inside = t + jax.lax.stop_gradient(jnp.clip(t, eps, 1 - eps) - t)
        return square(t), jax.jvp(lambda t: jnp.square(gamma(t)), (inside,), (dt,))[1]

    return square


def with_velocity(
    path: Path, x0: Float[Array, "b ..."], x1: Float[Array, "b ..."], t, z: Float[Array, "b ..."] | None = None
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """The interpolant and its time derivative: ``I_t = alpha x0 + beta x1``, ``dI_t = alpha' x0 + beta' x1``.

    On a path with a latent ``gamma z`` and ``gamma' z`` are added. Raises ``ValueError`` for a latent without its
    ``z ~ N(0, I)``, and the reverse.
    """
    if (path.gamma is None) != (z is None):
        raise ValueError(
            "this path has a latent, gamma(t) z: give z ~ N(0, I) too"
            if z is None
            else "z was given, but this path has no latent, gamma(t) z: leave z out"
        )
    alpha, beta, d_alpha, d_beta = coefficients(path, x1, t)
    x, u = alpha * x0 + beta * x1, d_alpha * x0 + d_beta * x1
    if z is None:
        return x, u
    gamma, d_gamma = latent(path, x1, t)
    return x + gamma * z, u + d_gamma * z


def latent_score(path: Path, z: Float[Array, "b ..."], t) -> Float[Array, "b ..."]:
    """The score ``grad log p_t(x) = -E[z | I_t = x] / gamma_t`` from the latent's denoiser (arXiv 2303.08797).

    True for any law of the pair; infinite at both ends, where ``gamma = 0``. ``ValueError`` without a latent.
    """
    return -z / latent(path, z, t)[0]


def one_sided(path: Path) -> Path:
    """The path without a latent, ``alpha -> sqrt(alpha^2 + gamma^2)``, of the same laws and the same velocity.

    Only for a source ``x0 ~ N(0, I)`` independent of the data, where ``alpha x0 + gamma z`` is one Gaussian: then all
    of ``convert`` and ``change`` applies to a velocity learned with the latent. A path without one is returned as is.
    """
    if path.gamma is None:
        return path
    square = _square(path.gamma)

    def merged(t):
        alpha, beta = path.coefficients(t)
        return jnp.sqrt(jnp.square(alpha) + square(t)), beta

    return Path(merged)


def refuse_latent(what: str, *given: Path) -> None:
    """``ValueError`` where a path has a latent: for what is defined by ``alpha`` and ``beta`` alone."""
    if any(path.gamma is not None for path in given):
        raise ValueError(
            f"{what} needs a path without a latent, since x and velocity leave E[x0|x], E[x1|x] and E[z|x] open: learn "
            "the denoiser E[z|x] (methods.stochastic_interpolant, paths.latent_score) or, where the source is N(0, I) "
            "and independent of the data, use paths.one_sided(path), which has the same velocity"
        )


def renoise(path: Path, x: Float[Array, "b ..."], z: Float[Array, "b ..."], t, earlier) -> Float[Array, "b ..."]:
    """Back from ``t`` to ``earlier = s <= t`` by the path's own kernel: of the law at ``s`` for ``x`` of that at ``t``.

    ``x_s = c x + sqrt(alpha_s^2 - c^2 alpha_t^2) z``, ``c = beta_s / beta_t``, for a source N(0, I) independent of the
    data and ``z ~ N(0, I)`` of its own. ``nan`` where ``beta_t = 0``, which kept nothing of the data (``t = 0``).
    """
    alpha, beta, *_ = coefficients(path, x, t)
    alpha_s, beta_s, *_ = coefficients(path, x, earlier)
    kept = beta_s / beta
    return kept * x + jnp.sqrt(jnp.maximum(alpha_s**2 - (kept * alpha) ** 2, 0)) * z


def endpoints(
    path: Path, x: Float[Array, "b ..."], v: Float[Array, "b ..."], t
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Noise and data predictions ``(E[x0 | x], E[x1 | x])`` of a velocity ``v = E[dI_t | I_t = x]``.

    The solution of ``[alpha, beta; alpha', beta'] [x0; x1] = [x; v]`` by Cramer's rule; its determinant, the Wronskian
    ``alpha beta' - alpha' beta``, is 1 for the linear path and ``pi/2`` for the trigonometric one, at every ``t``.
    """
    noise = convert(path, x, v, t, given="velocity", to="noise")
    return noise, convert(path, x, v, t, given="velocity", to="data")


def score(path: Path, x: Float[Array, "b ..."], v: Float[Array, "b ..."], t) -> Float[Array, "b ..."]:
    """The score ``grad log p_t(x) = -E[x0 | x] / alpha_t`` of a velocity with source ``N(0, I)``.

    The source must be independent of the data: with pairs from an optimal transport plan it is another field. Infinite
    at ``t = 1``, where ``alpha_t = 0``: the score of the data law is not in the velocity.
    """
    return convert(path, x, v, t, given="velocity", to="score")


def convert(
    path: Path, x: Float[Array, "b ..."], prediction: Float[Array, "b ..."], t, *, given: str, to: str
) -> Float[Array, "b ..."]:
    """One prediction of a network made into another: both are rows over ``e = E[x0 | x]`` and ``d = E[x1 | x]``.

    =============  ================================  ==========================================================
    name           value                             what it leaves open
    =============  ================================  ==========================================================
    velocity       ``alpha' e + beta' d``            nothing (determinant: the Wronskian)
    noise          ``e``                             all but noise and score where ``beta = 0``
    data           ``d``                             all but data where ``alpha = 0``
    score          ``-e / alpha``, source N(0, I)    as noise; itself infinite where ``alpha = 0``
    v_prediction   ``beta e - alpha d``              nothing (determinant ``-(alpha^2 + beta^2)``; points to the noise)
    =============  ================================  ==========================================================

    With ``x = alpha e + beta d`` the given row makes a 2x2 system; the wanted row is written over its two rows. Where
    it is singular, at an end of the path, the answer is not in the prediction and comes out as ``nan`` or infinite.
    Sources: ``v_prediction`` arXiv 2202.00512, the rest arXiv 2303.08797. Raises ``ValueError`` for an unknown name
    and for a path with a latent (see ``one_sided`` and ``latent_score``).
    """
    refuse_latent("convert", path)
    for name in (given, to):
        if name not in PREDICTIONS:
            raise ValueError(f"there is no prediction {name!r}; there are {', '.join(PREDICTIONS)}")
    if given == to:
        return prediction
    alpha, beta, d_alpha, d_beta = coefficients(path, x, t)
    if given == "score":
        return convert(path, x, -alpha * prediction, t, given="noise", to=to)
    if to == "score":
        return -convert(path, x, prediction, t, given=given, to="noise") / alpha
    rows = {"velocity": (d_alpha, d_beta), "noise": (1, 0), "data": (0, 1), "v_prediction": (beta, -alpha)}
    (a, b), (p, q) = rows[given], rows[to]
    return ((alpha * q - beta * p) * prediction + (b * p - a * q) * x) / (alpha * b - beta * a)


def change(velocity: VelocityFn, old: Path, new: Path) -> VelocityFn:
    """The velocity on path ``new`` that transports the same data as ``velocity`` does on ``old``: no training.

    With ``(s, c) = match_snr(old, new, t)``, ``x_new(t) = c x_old(s)`` in law and along trajectories, hence

    ``v_new(x, t) = c'/c x + c s' v_old(x / c, s)``,

    computed as ``alpha' e + beta' d`` from the noise and data predictions of ``old`` at ``(x / c, s)``: the same
    number, and finite wherever both velocities are. ``x0`` may have any law, the same on both paths. ``vp`` is infinite
    at ``t = 1``: from it or to it end at ``t = 1 - 1e-3``, since the time on ``vp`` of a linear ``1 - 1e-5`` is 1 in
    float32 already and the velocity there ``nan``.

    Where ``old`` never had the signal-to-noise ratio of ``new`` at ``t`` the velocity is an extrapolation: ``old`` is
    asked at its end; before its start the data prediction is held, beyond its end the noise prediction. So a network
    trained on ``ve`` is off by ``O(1 / sigma_max)`` at ``t = 0`` of the linear path; to stay within what it saw, start
    at ``t, c = match_snr(new, old, 0.0)`` (note the order) from ``x0`` times ``alpha`` of ``new`` there.
    Sources: arXiv 2206.00364 (eq. 4), arXiv 2412.06264 (change of scheduler). Raises ``ValueError`` for a path with a
    latent, whose laws are no scaled ones of another path (see ``one_sided``).
    """
    refuse_latent("change", old, new)

    def changed(x, t, cond=None):
        t = over_batch(t, x)
        s, scale = match_snr(old, new, t)
        y = x / expand(scale, x)
        noise, data = endpoints(old, y, velocity(y, s, cond), s)
        alpha, beta, d_alpha, d_beta = coefficients(new, x, t)
        # x = alpha e + beta d, so one prediction is enough; divide by the larger coefficient
        early = alpha >= beta
        rest = (x - jnp.where(early, beta * data, alpha * noise)) / jnp.where(early, alpha, beta)
        return d_alpha * jnp.where(early, rest, noise) + d_beta * jnp.where(early, data, rest)

    return changed


@functools.partial(jax.jit, static_argnums=(0, 1))  # one compilation a pair of paths, also outside of jit
def match_snr(old: Path, new: Path, t: Float[Array, " *t"]) -> tuple[Float[Array, " *t"], Float[Array, " *t"]]:
    """Time ``s`` on ``old`` and scale ``c`` with ``alpha_new(t) = c alpha_old(s)``, ``beta_new(t) = c beta_old(s)``.

    ``s`` is the root of the increasing ``alpha_new(t) beta_old(s) - beta_new(t) alpha_old(s)``, by bisection to the
    last bit; where ``old`` does not reach the ratio it is the nearer end, and ``c`` matches the larger coefficient.
    Differentiable to any order, in ``t`` only: the derivative is implicit, ``s' = W_new(t) / (W_old(s) c^2)`` with the
    Wronskian ``W = alpha beta' - alpha' beta`` (and 0 where ``s`` is held at an end), never that of the iterations.
    ``nan`` where a Wronskian is infinite: ``t = 1`` of ``vp``. Raises ``ValueError`` for a path with a latent.
    """
    refuse_latent("match_snr", old, new)
    t = jnp.asarray(t, jnp.asarray(1.0 * t).dtype)  # a scalar or an integer, too, becomes a float of no weak type
    s = _matching_time(old, new, t)
    (a, b), (alpha, beta) = old.coefficients(s), new.coefficients(t)
    early = alpha >= beta
    return s, jnp.where(early, alpha, beta) / jnp.where(early, a, b)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _matching_time(old: Path, new: Path, t: Array) -> Array:
    alpha, beta = new.coefficients(t)

    def excess(s):  # finite at both ends, where the ratio itself is 0 or infinite
        a, b = old.coefficients(s)
        return alpha * b - beta * a

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        before = excess(middle) < 0
        return jnp.where(before, middle, low), jnp.where(before, high, middle)

    # 64 halvings reach the last bit of a float64 down to t = 2^-11; below it the error stays under 2^-64
    low, high = jax.lax.fori_loop(0, 64, halve, (jnp.zeros_like(t), jnp.ones_like(t)))
    return jnp.where(jnp.abs(excess(low)) <= jnp.abs(excess(high)), low, high)


@_matching_time.defjvp
def _matching_time_jvp(old: Path, new: Path, primals, tangents):
    (t,), (dt,) = primals, tangents
    s, scale = match_snr(old, new, t)
    (alpha, beta), (d_alpha, d_beta) = jax.jvp(new.coefficients, (t,), (jnp.ones_like(t),))
    (a, b), (da, db) = jax.jvp(old.coefficients, (s,), (jnp.ones_like(s),))
    rate = (alpha * d_beta - d_alpha * beta) / ((a * db - da * b) * scale**2)
    # at an end of ``old``: is it the root there (to rounding), or the end nearest to a ratio out of reach?
    root = jnp.abs(alpha * b - beta * a) <= 8 * jnp.finfo(s.dtype).eps * (alpha + beta) * (a + b)
    return s, jnp.where(root | ((s > 0) & (s < 1)), rate, 0) * dt
