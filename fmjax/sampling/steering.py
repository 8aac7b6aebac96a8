"""Steering by flow maps: samples of ``p(x1 | x_t)`` without training, transitions from them, and control by a reward.

Trajectory tilting by a look-ahead reward, with exact weights, is ``tilts.reward_tilt`` with a flow map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths
from fmjax.checks import Fraction, Positive
from fmjax.keys import as_keys, normal, split
from fmjax.sampling.costs import evaluations
from fmjax.sampling.diffusion import rising
from fmjax.sampling.explicit import runge_kutta, tableau
from fmjax.sampling.tilts import Reward
from fmjax.types import Cond, Costed, FlowMapFn, VelocityFn, expand, over_batch

CALLS = {"euler": 1, "midpoint": 2}  # evaluations of an inner step


def posterior_velocity(
    velocity: VelocityFn, x: Array, t, *, path: paths.Path = paths.linear(), cond: Cond = None
) -> Costed:
    """Return the velocity of an inner flow from ``N(0, I)`` to ``p(x1 | x_t = x)``, without training.

    The state ``x`` at ``t`` and the inner state ``y`` at ``r`` are two noisy observations of one ``x1``. Together they
    are one observation of ``SNR* = SNR_t + SNR_r``, ``SNR = beta^2 / alpha^2``, so at the time ``t*`` of ``SNR*``

    ``x* = beta_* (beta_t x / alpha_t^2 + beta_r y / alpha_r^2) / SNR*``, and ``E[x1 | x, y] = D(x*, t*)``.

    The velocity of ``y`` at ``r`` follows from this data prediction; the inner path is linear, whatever ``path`` is.

    Args:
        velocity: ``v(x, t, cond)`` of a source N(0, I) that is independent of the data.
        x: states ``[B, ...]``.
        t: their times ``[B]`` or a scalar, below 1.
        path: the path of the velocity, without a latent.
        cond: the condition of the velocity.

    Returns:
        The inner velocity ``(y, r, cond)`` for ``0 <= r < 1``; its ``cond`` is not used.

    Raises:
        ValueError: a path with a latent.

    >>> from fmjax import oracles
    >>> inner = posterior_velocity(oracles.gaussian(0.0, 1.0).velocity, jnp.ones((1, 1)), 0.5)
    >>> inner(jnp.zeros((1, 1)), 0.0).tolist()  # E[x1 | x]
    [[1.0]]

    Source: GLASS flows, arXiv 2509.25170; inner and outer noise are independent here.
    """
    paths.refuse_latent("posterior_velocity", path)
    t, line = over_batch(t, x), paths.linear()

    def inner(y, r, cond_=None):
        r = over_batch(r, y)
        (a, b), (a_r, b_r) = ([expand(c, x) for c in p.coefficients(time)] for p, time in ((path, t), (line, r)))
        root = jnp.sqrt((b / a) ** 2 + (b_r / a_r) ** 2)
        some = root > 0  # both are noise: x* is any noise
        q = jnp.where(some, root, 1.0)
        merged, _ = paths.match_snr(path, line, (q / (1 + q)).reshape(t.shape))
        beta = expand(path.coefficients(merged)[1], x)
        both = beta * (b * x / a**2 + b_r * y / a_r**2) / q**2
        time, state = jnp.where(some.reshape(t.shape), merged, r), jnp.where(some, both, y).astype(x.dtype)
        data = paths.convert(path, state, velocity(state, time, cond), time, kind="velocity", to="data")
        return paths.convert(line, y, data, r, kind="data", to="velocity")

    return Costed(inner, evaluations(velocity))


def glass(
    velocity: VelocityFn,
    *,
    steps: Positive = 4,
    solver: Literal["euler", "midpoint"] = "midpoint",
    correlation: Fraction = 0.0,
    path: paths.Path = paths.linear(),
) -> Costed:
    """Return the step of a GLASS transition: draw ``x1 ~ p(x1 | x_s)`` by an inner flow, then ``x_t`` given both.

    ``x_t = beta_t x1 + alpha_t (rho z_s + sqrt(1 - rho^2) z)``, ``z_s = (x_s - beta_s x1) / alpha_s`` the noise of
    ``x_s`` and ``z`` new noise. For every ``rho`` the step keeps the marginals of the flow, however large the step is:
    only the inner solver has an error. ``rho = 0`` forgets the noise, as multistep consistency sampling does; ``rho =
    1`` keeps it. So a few large steps sample an SDE, and particles and searches can branch anywhere.

    Args:
        velocity: ``v(x, t, cond)`` of a source N(0, I) that is independent of the data.
        steps: number of uniform inner steps.
        solver: inner solver; it does not evaluate the end of the inner flow.
        correlation: ``rho``, in [0, 1].
        path: the path of the velocity, without a latent.

    Returns:
        A step ``(x, s, t, cond, key) -> x`` that needs a key.

    Raises:
        ValueError: numbers outside their ranges, another solver, a path with a latent.

    >>> step = glass(lambda x, t, cond=None: -x, steps=2)
    >>> step(jnp.ones((3, 1)), 0.0, 0.5, key=jax.random.key(0)).shape, step.nfe
    ((3, 1), 4)

    Source: arXiv 2509.25170, whose transitions are Gaussian with a correlation; independent inner noise and a data
    sample between the two times are chosen here.
    """
    checks.check_range("steps", steps, checks.Range(low=1))
    checks.check_fraction(correlation=correlation)
    paths.refuse_latent("glass", path)
    checks.check_choice("solver", solver, CALLS)

    def step(x, s, t, cond=None, key=None):
        if key is None:
            raise ValueError("key=None: this step draws noise and needs a key. Give key=jax.random.key(seed).")
        s, t = over_batch(s, x), over_batch(t, x)
        k_inner, k_noise = split(as_keys(key, len(x)), 2)
        data = _posterior(velocity, k_inner, x, s, path, cond, steps, solver)
        (a_s, b_s), (a, b) = ([expand(c, x) for c in path.coefficients(time)] for time in (s, t))
        fresh = normal(k_noise, x.shape[1:], x.dtype)
        noise = correlation * (x - b_s * data) / a_s + (1 - correlation**2) ** 0.5 * fresh
        return (b * data + a * noise).astype(x.dtype)

    return Costed(step, evaluations(velocity, calls=CALLS[solver] * steps), rising("glass"))


def controlled(
    flow_map: FlowMapFn,
    reward: Reward,
    *,
    scale: float | Callable[[Array], Array],
    through: bool = False,
    ascent: int = 1,
    rate: float = 1.0,
    path: paths.Path = paths.linear(),
) -> Costed:
    """Return a jump that a reward pushes: ``X_{s,t}(x) + beta_t w (y - D)``, with ``D = X_{s,1}(x)``.

    ``y`` comes from ``D`` by ``ascent`` steps of gradient ascent, ``y <- y + rate grad R(y)``, without a gradient
    through the network. With ``through=True`` the push is ``beta_t w grad_x R(X_{s,1}(x))``, one backward pass through
    the network. A jump that ends at 1 is free: no push and one evaluation. So the grid ``(0, t, 1)`` has one
    controlled jump and one free jump, three evaluations in all. One trajectory, no weights: the samples have a higher
    reward, and no known distribution.

    Args:
        flow_map: ``X(x, s, t, cond)``.
        reward: ``R(x, cond) -> [B]`` at ``t = 1``, differentiable.
        scale: ``w``, a number or a function of the times ``[B]`` at the end of a jump.
        through: whether the gradient goes through the flow map.
        ascent: number of ascent steps, without ``through``.
        rate: size of the ascent steps, without ``through``.
        path: the path of the flow map; ``beta_t`` is by how much a push of the data moves ``x_t``.

    Returns:
        A step ``(x, s, t, cond, key) -> x`` of 2 evaluations, 1 for a jump to the data.

    Raises:
        ValueError: numbers outside their ranges.

    >>> from fmjax import oracles
    >>> step = controlled(oracles.gaussian(0.0, 1.0).flow_map, lambda x, cond=None: x[:, 0], scale=2.0)
    >>> step(jnp.zeros((1, 1)), 0.0, 0.5).tolist(), step.nfe
    ([[1.0]], 2)

    Source: FMRG, arXiv 2604.27147 (its two variants; early stop and one free jump). The paper's weights ``w_t`` are
    not published in what was read: ``beta_t w`` is chosen here, and no rescaling to the norm of the velocity.
    """
    checks.check_range("ascent", ascent, checks.Range(low=1))
    checks.check_range("rate", rate, checks.Range())
    if not callable(scale):
        checks.check_range("scale", scale, checks.Range())

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        ones = jnp.ones_like(s)
        weight = jnp.where(t < 1, path.coefficients(t)[1] * (scale(t) if callable(scale) else scale), 0)

        def push():
            if through:
                return jax.grad(lambda x: reward(flow_map(x, s, ones, cond), cond).sum())(x)
            data = jax.lax.stop_gradient(flow_map(x, s, ones, cond))
            climb = lambda _, y: y + rate * jax.grad(lambda y: reward(y, cond).sum())(y)
            return jax.lax.fori_loop(0, ascent, climb, data) - data

        moved = flow_map(x, s, t, cond)
        pushed = jax.lax.cond(jnp.any(t < 1), push, lambda: jnp.zeros_like(x))
        return (moved + expand(weight, x) * pushed).astype(x.dtype)

    return Costed(step, evaluations(flow_map, calls=2))


def _posterior(velocity, key, x, t, path, cond, steps: int, solver: str) -> Array:
    """Draw ``x1 ~ p(x1 | x_t = x)`` by uniform steps of the inner flow."""
    step = runge_kutta(posterior_velocity(velocity, x, t, path=path, cond=cond), tableau(solver))
    times = jnp.linspace(0, 1, steps + 1, dtype=t.dtype)
    start = normal(key, x.shape[1:], x.dtype)
    move = lambda y, now: (step(y, over_batch(now[0], y), over_batch(now[1], y)).astype(y.dtype), None)
    return jax.lax.scan(move, start, (times[:-1], times[1:]))[0]
