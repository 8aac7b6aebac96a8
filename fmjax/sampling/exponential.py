"""Exponential integrators of diffusion models: DPM-Solver++ (2S, 2M, 3M, their SDEs) and UniPC, on any path.

They solve the ODE or the SDE in ``lambda = log(beta / alpha)``, exactly but for the data prediction ``D``: with
``h = lambda_t - lambda_s`` and ``k = (1 + eta) h``

``x_t = alpha_t (e^(-eta h) E + sqrt(1 - e^(-2 eta h)) z) + beta_t int_0^1 k e^(-k (1 - u)) D(u) du + beta_t e^-k D_s``

for ``x_s = alpha_s E + beta_s D_s``. ``eta = 0`` is the ODE, ``eta = 1`` the reverse SDE of diffusion models. The
solvers differ in the polynomial in ``u`` that stands for ``D``: through data predictions at ``s`` (``u = 0``), at
earlier steps (``u < 0``), at a stage inside the step (2S) or at its end (the corrector of UniPC).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax import checks, paths
from fmjax.checks import NonNegativeFloat
from fmjax.sampling.costs import evaluations
from fmjax.sampling.diffusion import no_level, path_at, rising
from fmjax.sampling.stochastic import draw_noise
from fmjax.types import Costed, Multistep, VelocityFn, accept, expand, over_batch


def dpmpp_2s(velocity: VelocityFn, *, path: paths.Path = paths.linear(), eta: NonNegativeFloat = 0.0) -> Costed:
    """Return the step of DPM-Solver++(2S): order 2, 2 evaluations (arXiv 2211.01095, Algorithm 1, ``r = 1/2``).

    ``x_t = alpha_t E + beta_t D + beta_t (1 - e^-h) (D' - D)``, with the noise ``E`` and the data ``D`` predicted at
    ``s``, and ``D'`` predicted after a DDIM step to the middle of ``[lambda_s, lambda_t]``. A step into or out of the
    data or pure noise takes ``D' = D`` and costs 1 evaluation: ``2 N - 1`` on ``edm_grid(N)``.

    ``eta > 0`` is ``dpmpp_2s_ancestral`` of k-diffusion: with ``sigma = alpha / beta`` the step ends at the lower level
    ``sqrt(sigma_t^2 - w^2)``, and noise of scale ``w = min(1, eta sqrt(1 - sigma_t^2 / sigma_s^2)) sigma_t`` comes on
    top, as in ``ddim``. Weak order 2 on Gaussian data.

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        eta: factor on the ancestral noise; 0 draws nothing.

    Returns:
        A step ``(x, s, t, cond, key) -> x``; with ``eta > 0`` it needs a key and a rising grid.

    Raises:
        ValueError: for a negative ``eta`` and for a path with a latent.

    >>> import jax.numpy as jnp
    >>> from fmjax import sampling
    >>> step = dpmpp_2s(lambda x, t, cond=None: -x)
    >>> round(float(sampling.sample(step, jnp.ones((1, 1)), 4)[0, 0]), 3), step.nfe
    (0.337, 2)
    """
    checks.check_hints(dpmpp_2s, {"eta": eta})
    paths.refuse_latent("dpmpp_2s", path)

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = path_at(path, x, s), path_at(path, x, t)
        left, fresh = alpha, 0
        if eta:
            kept = jnp.where(alpha_s > 0, alpha * beta_s / (beta * alpha_s), 0)  # sigma_t / sigma_s
            left = alpha * jnp.sqrt(jnp.maximum(1 - eta**2 + (eta * kept) ** 2, 0))
            fresh = alpha * jnp.minimum(1, eta * jnp.sqrt(jnp.maximum(1 - kept**2, 0)))
        ahead = beta * data + left * noise
        two = (alpha_s > 0) & (beta_s > 0) & (left > 0) & (beta > 0)

        def corrected():
            # without a second evaluation its place is taken by the first: an infinite one has the gradient nan
            level, end = (jnp.where(two, a / b, 1) for a, b in ((alpha_s, beta_s), (left, beta)))
            middle = jnp.sqrt(level * end).reshape(t.shape).astype(t.dtype)
            inner = two.reshape(t.shape)
            later_t = jnp.where(inner, paths.match_snr(path, paths.linear(), 1 / (1 + middle))[0], s)
            alpha_m, beta_m = path_at(path, x, later_t)
            later_x = jnp.where(two, beta_m * data + alpha_m * noise, x)
            _, later = paths.endpoints(path, later_x, velocity(later_x, later_t, cond), later_t)
            return jnp.where(two, ahead + beta * (1 - end / level) * (later - data), ahead)

        x = jax.lax.cond(jnp.any(two), corrected, lambda: ahead)
        return x + fresh * draw_noise(key, x) if eta else x

    return Costed(step, evaluations(velocity, calls=2), rising("dpmpp_2s with eta") if eta else accept)


def dpmpp_2m(
    velocity: VelocityFn,
    *,
    path: paths.Path = paths.linear(),
    solver_type: Literal["midpoint", "heun"] = "midpoint",
    eta: NonNegativeFloat = 0.0,
) -> Multistep:
    """Return the step of DPM-Solver++(2M) and of its SDE: 1 evaluation (arXiv 2211.01095, Algorithm 2).

    ``x_t = alpha_t E + beta_t D + beta_t c (h / h') (D - D')`` with the noise ``E`` and the data ``D`` predicted at
    ``s``; ``D'`` and ``h'`` are the data prediction and the length of the step before. ``c`` is ``(1 - e^-h) / 2``
    (midpoint) or ``1 - (1 - e^-h) / h`` (heun). Order 2. The first step, a step into or out of the data, and a step
    into or out of pure noise, where ``h`` is infinite, take ``c = 0``.

    ``eta > 0`` is DPM-Solver++(2M) SDE of k-diffusion: noise ``alpha_t sqrt(1 - e^(-2 eta h)) z`` is drawn, ``E`` is
    multiplied by ``e^(-eta h)``, and ``c`` is taken at ``(1 + eta) h``. Weak order 2 on Gaussian data.

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        solver_type: ``"midpoint"`` or ``"heun"``, as in k-diffusion and diffusers.
        eta: factor on the noise of the SDE; 0 draws nothing.

    Returns:
        A step with a memory: data predictions ``[1, B, ...]`` and noise levels ``[1, B]``. With ``eta > 0`` it needs a
        key and a rising grid.

    Raises:
        ValueError: for another ``solver_type``, a negative ``eta`` and for a path with a latent.

    >>> import jax.numpy as jnp
    >>> from fmjax import sampling
    >>> step = dpmpp_2m(lambda x, t, cond=None: -x)
    >>> round(float(sampling.sample(step, jnp.ones((1, 1)), 4)[0, 0]), 3), step.nfe
    (0.334, 1)
    """
    checks.check_hints(dpmpp_2m, {"solver_type": solver_type, "eta": eta})
    moments = (lambda k: _moments(k, 0) / 2) if solver_type == "midpoint" else (lambda k: _moments(k, 1)[1:])
    return _dpmpp("dpmpp_2m", velocity, path, eta, 1, moments)


def dpmpp_3m(
    velocity: VelocityFn,
    *,
    path: paths.Path = paths.linear(),
    exact: bool = False,
    eta: NonNegativeFloat = 0.0,
) -> Multistep:
    """Return the step of DPM-Solver++(3M) and of its SDE: 1 evaluation (the authors' code, k-diffusion).

    As ``dpmpp_2m``, with the parabola through three data predictions, from the second step on with the line through two
    (``solver_type="heun"``). The published code halves the second difference of the parabola, which makes the order 2;
    ``exact=True`` integrates the parabola itself: order 3. diffusers' SDE has another sign in this term, and its ODE
    takes fewer predictions in the last steps of a short grid (``lower_order_final``).

    ``eta > 0`` is DPM-Solver++(3M) SDE of k-diffusion. Weak order 2 or better on Gaussian data.

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        exact: whether to count the second difference in full.
        eta: factor on the noise of the SDE; 0 draws nothing.

    Returns:
        A step with a memory: data predictions ``[2, B, ...]`` and noise levels ``[2, B]``. With ``eta > 0`` it needs a
        key and a rising grid.

    Raises:
        ValueError: for a negative ``eta`` and for a path with a latent.

    >>> import jax.numpy as jnp
    >>> from fmjax import sampling
    >>> sampling.sample(dpmpp_3m(lambda x, t, cond=None: -x), jnp.ones((2, 3)), 4).shape
    (2, 3)
    """
    checks.check_hints(dpmpp_3m, {"eta": eta})
    scale = np.array([[1.0], [1.0 if exact else 0.5]])
    return _dpmpp("dpmpp_3m", velocity, path, eta, 2, lambda k: scale.astype(k.dtype) * _moments(k, 2)[1:])


def unipc(
    velocity: VelocityFn,
    *,
    path: paths.Path = paths.linear(),
    order: Annotated[int, checks.Range(1, 3)] = 2,
    solver_type: Literal["bh1", "bh2"] = "bh2",
) -> Multistep:
    """Return the step of UniPC with data prediction, order ``order + 1``: 1 evaluation (arXiv 2302.04867).

    The predictor UniP-p extrapolates the data predictions of ``p`` steps, as ``dpmpp_2m``. The evaluation at the start
    of a step also serves the corrector UniC-p, which interpolates the step before anew, its end included. Where one
    other prediction is known, the weight is ``B(h) / 2`` in place of the exact one: ``B = h`` for ``"bh1"`` and
    ``1 - e^-h`` for ``"bh2"``. First steps take fewer predictions. diffusers and the authors take fewer in the last
    steps, too (``lower_order_final``), which differs from this step for order 3, in the last step but one alone on a
    grid that ends in the data. The last state is not corrected, as theirs.

    The corrector is added to the state that it finds, so that corrections between the steps are kept. Out of pure
    noise, where ``h`` is infinite, the predictor is DDIM's step and UniC's weight ``1 / 2``. Rising or falling grids.

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        order: ``p``, 1 to 3. The authors recommend 2 with guidance and 3 without.
        solver_type: ``"bh1"`` or ``"bh2"``. The authors recommend ``"bh1"`` for fewer than 10 steps without guidance.

    Returns:
        A step with a memory: data predictions ``[order, B, ...]``, noise levels ``[order, B]``, numbers of steps
        ``[B]`` and what the predictor added to ``x / beta``, ``[B, ...]``.

    Raises:
        ValueError: for another order or ``solver_type`` and for a path with a latent.

    >>> import jax.numpy as jnp
    >>> from fmjax import sampling
    >>> step = unipc(lambda x, t, cond=None: -x)
    >>> round(float(sampling.sample(step, jnp.ones((1, 1)), 4)[0, 0]), 3), step.nfe
    (0.352, 1)
    """
    checks.check_hints(unipc, {"order": order, "solver_type": solver_type})
    paths.refuse_latent("unipc", path)

    def moments(h, others, n):
        """``[n, B]``, for at most ``n`` of ``others: [B]`` other predictions; UniPC's half where there is one."""
        finite = jnp.isfinite(h)
        k = jnp.where(finite, h, 1)
        exact = _moments(k, n)
        half = jnp.where(finite, (k if solver_type == "bh1" else exact[0]) / 2, 0.5)
        return exact[1:].at[:1].set(jnp.where(jnp.minimum(others, n) == 1, half, exact[1:2]))

    def corrected(past, levels, count, data, level):
        """What UniC puts in the place of the predictor's bend in ``x / beta``, at the end of the step before."""
        h, nodes, known = _nodes(levels, level)
        ends = (count > 0) & (jnp.isfinite(h) | (h > 0))
        nodes, known = jnp.concatenate([jnp.ones_like(h)[None], nodes]), jnp.concatenate([ends[None], known])
        weights = _weights(nodes, known, moments(h, count, order))
        return _sum(weights, jnp.concatenate([data[None], past[1:]]) - past[0])

    def step(memory, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = path_at(path, x, s), path_at(path, x, t)
        level, end = ((a / b).reshape(s.shape).astype(s.dtype) for a, b in ((alpha_s, beta_s), (alpha, beta)))
        past, levels, count, bend = memory
        change = corrected(past, levels, count, data, level) - bend
        past, levels = jnp.concatenate([data[None], past[:-1]]), jnp.concatenate([level[None], levels[:-1]])
        h, nodes, known = _nodes(levels, end)
        bend = _sum(_weights(nodes, known, moments(h, count, order - 1)), past[1:] - data)
        kept = alpha * beta_s / jnp.where(alpha_s > 0, alpha_s, 1)  # a step out of the data has nothing to correct
        return alpha * noise + beta * (data + bend) + kept * change, (past, levels, jnp.minimum(count + 1, order), bend)

    def init(x):
        levels = jnp.stack([no_level(x)] * order)
        return jnp.stack([jnp.zeros_like(x)] * order), levels, jnp.zeros_like(levels[0]), jnp.zeros_like(x)

    return Multistep(init, step, evaluations(velocity))


def _dpmpp(name, velocity, path, eta, n, moments) -> Multistep:
    """The step through ``n`` earlier data predictions whose weights have the ``moments(k): [n, B]``."""
    paths.refuse_latent(name, path)

    def init(x):
        return jnp.stack([jnp.zeros_like(x)] * n), jnp.stack([no_level(x)] * n)

    def step(memory, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = path_at(path, x, s), path_at(path, x, t)
        level, end = ((a / b).reshape(s.shape).astype(s.dtype) for a, b in ((alpha_s, beta_s), (alpha, beta)))
        past, levels = jnp.concatenate([data[None], memory[0]]), jnp.concatenate([level[None], memory[1]])
        h, nodes, known = _nodes(levels, end)
        weights = _weights(nodes, known, moments((1 + eta) * jnp.where(jnp.isfinite(h), h, 1)))
        x = beta * (data + _sum(weights, past[1:] - data))
        if eta:
            wide = lambda a: expand(a, x).astype(x.dtype)
            noise = wide(jnp.exp(-eta * h)) * noise + wide(jnp.sqrt(-jnp.expm1(-2 * eta * h))) * draw_noise(key, x)
        return x + alpha * noise, (past[:-1], levels[:-1])

    return Multistep(init, step, evaluations(velocity), rising(f"{name} with eta") if eta else accept)


def _nodes(levels: Array, end: Array) -> tuple[Array, Array, Array]:
    """``h: [B]``, places ``u: [n, B]`` of the earlier ``levels[1:]`` on the step from ``levels[0]``, known: ``[n, B]``.

    A level that is no number, or infinite in ``lambda``, is not known.
    """
    lambdas = -jnp.log(levels)
    h, behind = -jnp.log(end) - lambdas[0], lambdas[1:] - lambdas[0]
    known = jnp.isfinite(h) & jnp.isfinite(behind)
    apart = -1 - jnp.arange(len(behind), dtype=h.dtype)[:, None]
    return h, jnp.where(known, behind / jnp.where(jnp.isfinite(h), h, 1), apart), known


def _moments(k: Array, n: int) -> Array:
    """``int_0^1 k e^(-k (1 - u)) u^m du`` for ``m = 0 .. n``: ``[n + 1, B]``; a series near 0, else a recursion."""
    small = jnp.abs(k) < 1
    near, far = jnp.where(small, k, 0), jnp.where(small, 1, k)
    terms = [[(-1) ** i * math.factorial(m) / math.factorial(m + i + 1) for i in range(18)] for m in range(n + 1)]
    powers = near ** jnp.arange(1, 19, dtype=k.dtype)[:, None]
    series = jnp.sum(jnp.asarray(terms, k.dtype)[..., None] * powers, 1)
    rows = [-jnp.expm1(-far)]
    for m in range(1, n + 1):
        rows.append(1 - m / far * rows[-1])
    return jnp.where(small, series, jnp.stack(rows))


def _weights(nodes: Array, known: Array, moments: Array) -> Array:
    """``w: [n, B]`` with ``sum_j w_j u_j^m = moments[m - 1]``, ``m = 1, 2, ..``, over the known ``nodes: [n, B]``.

    ``w_j`` is the moment of Lagrange's ``(u / u_j) prod_(i != j) (u - u_i) / (u_j - u_i)``, 0 for an unknown node.
    """
    n = len(nodes)
    basis = [1 / nodes]  # coefficients of u, u^2, ..
    for i in range(n):
        other = known[i] & (np.arange(n) != i)[:, None]
        gap, none = jnp.where(other, nodes - nodes[i], 1), jnp.zeros_like(nodes)
        factors = zip([*basis, none], [none, *basis], strict=True)
        basis = [jnp.where(other, (raised - nodes[i] * same) / gap, same) for same, raised in factors]
    return jnp.where(known, sum((c * m for c, m in zip(basis, moments, strict=False)), jnp.zeros_like(nodes)), 0)


def _sum(weights: Array, terms: Array) -> Array:
    """``sum_j w_j y_j`` for weights ``[n, B]`` and terms ``[n, B, ...]``."""
    return jnp.sum(weights.reshape(weights.shape + (1,) * (terms.ndim - 2)).astype(terms.dtype) * terms, 0)
