"""Steps of the SDEs that have the marginals of the flow's ODE (arXiv 2303.08797, 2011.13456)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax import paths
from fmjax.keys import as_keys, normal
from fmjax.sampling.costs import evaluations
from fmjax.sampling.explicit import euler, heun
from fmjax.sampling.states import wide_state
from fmjax.types import Costed, VelocityFn, expand, over_batch

Strength = float | str | Callable[[Array], Array]


def euler_maruyama(
    velocity: VelocityFn,
    *,
    strength: Strength = 1.0,
    path: paths.Path = paths.linear(),
    score: VelocityFn | None = None,
) -> Costed:
    """Return the Euler-Maruyama step of the SDE with the ODE's marginals: weak order 1, 1 evaluation.

    ``x + h v + |h| g^2/2 S + g sqrt|h| z``, ``z ~ N(0, I)``: a step of ``dX = (v + g^2/2 S) dt + g dW``, whose
    marginals are the ODE's for every ``g_t >= 0``, from ``s`` to ``t = s + h``. A falling step follows the SDE that
    runs backward, ``v - g^2/2 S``. A step that starts where ``g`` is infinite (memoryless: ``t = 0``), or where
    ``alpha = 0`` and the velocity does not determine the score (``t = 1``, going backward), is a step of the ODE,
    without noise and score.

    Args:
        velocity: ``v(x, t, cond)``.
        strength: ``g``, a number (0 gives ``euler``), a function of times ``[B]``, or ``"memoryless"``, which stands
            for ``memoryless(path)`` and makes ``x1`` independent of ``x0``.
        path: the path of the velocity, for the score.
        score: ``S(x, t, cond)``, counted as extra evaluations. By default ``paths.score`` of the velocity, which needs
            a source ``N(0, I)`` that is independent of the data. With a coupling, or a latent, train a score network.

    Returns:
        A step ``(x, s, t, cond, key) -> x`` that needs a key.

    Raises:
        ValueError: for a negative or unknown strength, for a path with a latent and no score, and without a key.

    >>> import jax, jax.numpy as jnp
    >>> step = euler_maruyama(lambda x, t, cond=None: -x, strength=0.5)
    >>> step(jnp.ones((2, 3)), 0.5, 0.75, key=jax.random.key(0)).shape, step.nfe
    ((2, 3), 1)
    """
    if not callable(strength) and strength == 0:
        return euler(velocity)
    fields, gain = _sde(velocity, strength, path, score)

    def step(x, s, t, cond=None, key=None):
        s, h = over_batch(s, x), over_batch(t, x) - over_batch(s, x)
        g, regular = gain(s)
        v, push = fields(x, s, g, regular, cond)
        wide = lambda a: expand(a, x).astype(x.dtype)
        return x + wide(h) * v + wide(jnp.abs(h)) * push + wide(g * jnp.sqrt(jnp.abs(h))) * draw_noise(key, x)

    return Costed(step, evaluations(velocity, *(() if score is None else (score,))))


def stochastic_heun(
    velocity: VelocityFn,
    *,
    strength: Strength = 1.0,
    path: paths.Path = paths.linear(),
    score: VelocityFn | None = None,
) -> Costed:
    """Return Heun's step of the SDE with the ODE's marginals: weak order 2, 2 evaluations.

    With ``b = h v + |h| g^2/2 S`` and ``n = g((s+t)/2) sqrt|h| z``: ``y = x + b(x, s) + n``, then
    ``x + (b(x, s) + b(y, t)) / 2 + n``. Where a step ends at a time without score (see ``euler_maruyama``), the score
    at its start serves for both ends; one such step keeps the order of the whole.

    Args:
        velocity: ``v(x, t, cond)``.
        strength: as for ``euler_maruyama``; 0 gives ``heun``.
        path: the path of the velocity, for the score.
        score: as for ``euler_maruyama``.

    Returns:
        A step ``(x, s, t, cond, key) -> x`` that needs a key.

    Raises:
        ValueError: for a negative or unknown strength, for a path with a latent and no score, and without a key.

    >>> import jax, jax.numpy as jnp
    >>> step = stochastic_heun(lambda x, t, cond=None: -x, strength="memoryless")
    >>> step(jnp.ones((2, 3)), 0.5, 0.75, key=jax.random.key(0)).shape, step.nfe
    ((2, 3), 2)
    """
    if not callable(strength) and strength == 0:
        return heun(velocity)
    fields, gain = _sde(velocity, strength, path, score)

    def step(x, s, t, cond=None, key=None):
        (x, dtype), s, t = wide_state("x", x), over_batch(s, x), over_batch(t, x)
        wide = lambda a: expand(a, x).astype(x.dtype)
        h, (g_s, noisy), (g_t, regular) = wide(t - s), gain(s), gain(t)
        middle = jnp.where(noisy, gain((s + t) / 2)[0], 0)
        noise = wide(middle * jnp.sqrt(jnp.abs(t - s))) * draw_noise(key, x)

        def stage(carry, now):
            y, before, moved = carry
            time, g, scored = now
            v, push = fields(y, time, g, scored, cond)
            push = jnp.where(expand(scored, x), push, before)
            move = h * v + jnp.abs(h) * push
            return jax.tree.map(lambda a: a.astype(x.dtype), (x + move + noise, push, moved + move / 2)), None

        rows = (jnp.stack([s, t]), jnp.stack([g_s, g_t]), jnp.stack([noisy, noisy & regular]))
        (_, _, moved), _ = jax.lax.scan(stage, (x, jnp.zeros_like(x), jnp.zeros_like(x)), rows)
        return (x + moved + noise).astype(dtype)

    return Costed(step, evaluations(velocity, *(() if score is None else (score,)), calls=2))


def memoryless(path: paths.Path = paths.linear()) -> Callable[[Array], Array]:
    """Return the strength of diffusion with which ``x1`` does not depend on ``x0``, DDPM's (arXiv 2409.08861).

    ``g^2 = 2 eta``, ``eta = alpha (alpha beta' - alpha' beta) / beta``; on the linear path ``g^2 = 2 (1 - t) / t``. It
    is infinite where ``beta = 0``.

    Args:
        path: a path without a latent.

    Returns:
        ``g``, a function of times ``[B]``.

    Raises:
        ValueError: for a path with a latent.

    >>> import jax.numpy as jnp
    >>> (memoryless()(jnp.array([0.5, 1.0])) ** 2).round(4).tolist()
    [2.0, 0.0]
    """
    paths.refuse_latent("the memoryless strength", path)

    def strength(t):
        (alpha, beta), (d_alpha, d_beta) = jax.jvp(path.coefficients, (t,), (jnp.ones_like(t),))
        return jnp.sqrt(2 * alpha * (alpha * d_beta - d_alpha * beta) / beta)

    return strength


def draw_noise(key, x: Array) -> Array:
    """Draw the standard normal noise of one step.

    Args:
        key: one key, or keys ``[B]``.
        x: the state ``[B, ...]``.

    Returns:
        ``N(0, I)`` of the shape and precision of ``x``.

    Raises:
        ValueError: without a key.

    >>> import jax, jax.numpy as jnp
    >>> draw_noise(jax.random.key(0), jnp.zeros((2, 3))).shape
    (2, 3)
    """
    if key is None:
        raise ValueError(
            "key=None: this step draws noise and needs a key. Write sample(..., key=jax.random.key(seed))."
        )
    return normal(as_keys(key, x.shape[0]), x.shape[1:], x.dtype)


def _sde(velocity, strength, path, score):
    """``fields(x, t, g, regular, cond) -> (v, g^2/2 S)`` and ``gain(t) -> (g, whether g and S have values at t)``."""
    if strength == "memoryless":
        strength = memoryless(path)
    elif isinstance(strength, str):
        raise ValueError(f"strength={strength!r}: unknown. Give a number, a function of time, or 'memoryless'.")
    elif not callable(strength) and not 0 <= strength < np.inf:
        raise ValueError(f"strength={strength}: not finite and at least 0. Give the diffusion g of the SDE.")
    if score is None:
        paths.refuse_latent("the score of an SDE step, where score=... is not given,", path)

    # A where whose other branch is infinite has the gradient nan: times without a value are replaced before evaluation
    inside = lambda regular, t: jnp.where(regular, t, jnp.asarray(0.5, t.dtype))

    def gain(t):
        strength_at = lambda t: jnp.broadcast_to(
            jnp.asarray(strength(t) if callable(strength) else strength, t.dtype), t.shape
        )
        regular = jnp.isfinite(strength_at(t))
        if score is None:
            # cos(pi / 2) in floating point is not 0
            regular &= path.coefficients(t)[0] > 8 * jnp.finfo(t.dtype).eps
        return jnp.where(regular, strength_at(inside(regular, t)), 0), regular

    def fields(x, t, g, regular, cond):
        v, late = velocity(x, t, cond), inside(regular, t)
        s = paths.score(path, x, v, late) if score is None else score(x, late, cond)
        g = expand(g, x).astype(x.dtype)
        return v, jnp.where(g == 0, 0, jnp.square(g) / 2 * s)

    return fields, gain
