"""Conversions between predictions of a network (velocity, noise, data, score), and between paths, without training.

Conversions come from one 2x2 solve (``convert``). A velocity learned on one path is a velocity on every other path
(``change``): at times of equal ratio ``beta / alpha`` the distributions of two paths differ by a scale alone. Users
call these functions as ``fmjax.paths.NAME``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import checks
from fmjax.interpolants import Path, coefficients, refuse_latent
from fmjax.types import VelocityFn, expand, over_batch

PREDICTIONS = ("velocity", "noise", "data", "score", "v_prediction")


def convert(
    path: Path, x: Float[Array, "b ..."], prediction: Float[Array, "b ..."], t, *, kind: str, to: str
) -> Float[Array, "b ..."]:
    """Convert one kind of prediction to another.

    Every kind is a linear function of ``e = E[x0 | x]`` and ``d = E[x1 | x]``:

    =============  ================================  ==========================================================
    kind           value                             what it does not determine
    =============  ================================  ==========================================================
    velocity       ``alpha' e + beta' d``            nothing (determinant: the Wronskian)
    noise          ``e``                             all but noise and score where ``beta = 0``
    data           ``d``                             all but data where ``alpha = 0``
    score          ``-e / alpha``, source N(0, I)    as noise; itself infinite where ``alpha = 0``
    v_prediction   ``beta e - alpha d``              nothing (determinant ``-(alpha^2 + beta^2)``; points to the noise)
    =============  ================================  ==========================================================

    The row of ``kind`` and ``x = alpha e + beta d`` make a 2x2 system; its solution is inserted in the row of ``to``.
    Where the system is singular, at an end of the path, the prediction does not determine the result, which is ``nan``
    or infinite. Sources: ``v_prediction`` arXiv 2202.00512, the rest arXiv 2303.08797.

    Args:
        path: a path without a latent (see ``one_sided`` and ``latent_score``).
        x: states ``[B, ...]``.
        prediction: the prediction of the network at ``(x, t)``, ``[B, ...]``.
        t: times ``[B]`` or a scalar.
        kind: the kind of ``prediction``, one of ``PREDICTIONS``.
        to: the kind of the result, one of ``PREDICTIONS``.

    Returns:
        The prediction of kind ``to``, ``[B, ...]``.

    Raises:
        ValueError: ``kind`` or ``to`` is unknown, or the path has a latent.

    >>> from fmjax import paths
    >>> x, v = paths.with_velocity(paths.linear(), jnp.zeros((1, 2)), jnp.ones((1, 2)), 0.25)
    >>> convert(paths.linear(), x, v, 0.25, kind="velocity", to="data").tolist()
    [[1.0, 1.0]]
    """
    refuse_latent("convert", path)
    checks.check_choice("kind", kind, PREDICTIONS)
    checks.check_choice("to", to, PREDICTIONS)
    if kind == to:
        return prediction
    alpha, beta, d_alpha, d_beta = coefficients(path, x, t)
    if kind == "score":
        return convert(path, x, -alpha * prediction, t, kind="noise", to=to)
    if to == "score":
        return -convert(path, x, prediction, t, kind=kind, to="noise") / alpha
    rows = {"velocity": (d_alpha, d_beta), "noise": (1, 0), "data": (0, 1), "v_prediction": (beta, -alpha)}
    (a, b), (p, q) = rows[kind], rows[to]
    return ((alpha * q - beta * p) * prediction + (b * p - a * q) * x) / (alpha * b - beta * a)


def endpoints(
    path: Path, x: Float[Array, "b ..."], v: Float[Array, "b ..."], t
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Return the noise and data predictions ``(E[x0 | x], E[x1 | x])`` of a velocity ``v = E[dI_t | I_t = x]``.

    They solve ``[alpha, beta; alpha', beta'] [x0; x1] = [x; v]``. The determinant is the Wronskian
    ``alpha beta' - alpha' beta``: 1 for the linear path and ``pi / 2`` for the trigonometric path, at every ``t``.

    Args:
        path: a path without a latent.
        x: states ``[B, ...]``.
        v: velocities ``[B, ...]`` at ``(x, t)``.
        t: times ``[B]`` or a scalar.

    Returns:
        Noise and data predictions, each ``[B, ...]``.

    >>> from fmjax import paths
    >>> [p.item() for p in endpoints(paths.linear(), jnp.full((1, 1), 0.25), jnp.ones((1, 1)), 0.25)]
    [0.0, 1.0]
    """
    noise = convert(path, x, v, t, kind="velocity", to="noise")
    return noise, convert(path, x, v, t, kind="velocity", to="data")


def score(path: Path, x: Float[Array, "b ..."], v: Float[Array, "b ..."], t) -> Float[Array, "b ..."]:
    """Return the score ``grad log p_t(x) = -E[x0 | x] / alpha_t`` of a velocity.

    Only for a source ``N(0, I)`` independent of the data: with pairs of an optimal transport plan the result is not the
    score. Infinite at ``t = 1``, where ``alpha_t = 0``: there the velocity does not determine the score.

    Args:
        path: a path without a latent.
        x: states ``[B, ...]``.
        v: velocities ``[B, ...]`` at ``(x, t)``.
        t: times ``[B]`` or a scalar.

    Returns:
        Scores ``[B, ...]``.

    >>> from fmjax import paths
    >>> score(paths.linear(), jnp.full((1, 1), 0.5), jnp.full((1, 1), -1.0), 0.5).item()
    -2.0
    """
    return convert(path, x, v, t, kind="velocity", to="score")


def change(velocity: VelocityFn, old: Path, new: Path) -> VelocityFn:
    """Return the velocity on another path that transports the same data, without training.

    With ``(s, c) = match_snr(old, new, t)``, ``x_new(t) = c x_old(s)`` in distribution and along trajectories, hence

    ``v_new(x, t) = c'/c x + c s' v_old(x / c, s)``,

    computed as ``alpha' e + beta' d`` from the noise and data predictions of ``old`` at ``(x / c, s)``: the same
    number, and finite wherever both velocities are finite. ``x0`` may have any distribution, the same on both paths.
    From ``vp`` or to ``vp`` end at ``t = 1 - 1e-3``: its velocity is infinite at ``t = 1``, and the time on ``vp`` of a
    linear ``1 - 1e-5`` is already 1 in float32.

    Where ``old`` does not reach the ratio ``beta / alpha`` of ``new`` at ``t``, the velocity is an extrapolation:
    ``old`` is evaluated at its nearest end; before its start the data prediction is held, beyond its end the noise
    prediction. So a network trained on ``ve`` is off by ``O(1 / sigma_max)`` at ``t = 0`` of the linear path. To stay
    within the times of the training, start at ``t, c = match_snr(new, old, 0.0)`` (note the order) from ``x0`` times
    ``alpha`` of ``new`` at ``t``. Sources: arXiv 2206.00364 (eq. 4), arXiv 2412.06264 (change of scheduler).

    Args:
        velocity: velocity ``v(x, t, cond)`` on ``old``.
        old: the path of the training, without a latent (see ``one_sided``).
        new: the path on which to sample, without a latent.

    Returns:
        The velocity ``v(x, t, cond)`` on ``new``.

    Raises:
        ValueError: one of the paths has a latent.

    >>> from fmjax import paths
    >>> v = change(lambda x, t, cond=None: -x, paths.linear(), paths.linear())
    >>> v(jnp.ones((1, 2)), 0.25).tolist()
    [[-1.0, -1.0]]
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


@functools.partial(jax.jit, static_argnums=(0, 1))  # one compilation per pair of paths, also outside of jit
def match_snr(old: Path, new: Path, t: Float[Array, " *t"]) -> tuple[Float[Array, " *t"], Float[Array, " *t"]]:
    """Return the time ``s`` on ``old`` that has the signal-to-noise ratio of ``new`` at ``t``, and the scale between.

    ``alpha_new(t) = c alpha_old(s)`` and ``beta_new(t) = c beta_old(s)``. Where ``old`` has no such ratio, ``s`` is its
    nearest end, and ``c`` matches the larger coefficient of ``new``. ``s`` comes from a bisection; derivatives in ``t``
    are exact, ``s' = W_new(t) / (W_old(s) c^2)`` with the Wronskian ``W = alpha beta' - alpha' beta`` (and 0 where
    ``s`` is held at an end); the bisection is not differentiated. ``nan`` where a Wronskian is infinite: ``t = 1`` of
    ``vp``.

    Args:
        old: a path without a latent.
        new: a path without a latent.
        t: times on ``new``, of any shape.

    Returns:
        Times ``s`` on ``old`` and scales ``c``, each of the shape of ``t``.

    Raises:
        ValueError: one of the paths has a latent.

    >>> from fmjax import paths
    >>> [round(float(a), 4) for a in match_snr(paths.trigonometric(), paths.linear(), jnp.float32(0.5))]
    [0.5, 0.7071]
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
