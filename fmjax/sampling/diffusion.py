"""Diffusion models as flows: their predictions as velocities, and the steps of their samplers on any path.

A path without a latent, ``x = alpha x0 + beta x1`` with ``x0 ~ N(0, I)`` independent of ``x1``, is a diffusion at the
noise level ``sigma = alpha / beta``: ``x / beta = x1 + sigma x0`` is the state of EDM (arXiv 2206.00364), whose ODE
``d(x / beta) / d sigma = E[x0 | x]`` the samplers solve. In these coordinates the path is gone: a step here gives the
same sample on every path at equal noise levels, which ``solvers.rk4`` does not.

    step                         order  is
    ===========================  =====  ==========================================================================
    ``ddim``                     1      DDIM; ``eta=1`` DDPM's ancestral sampling
    ``edm_heun``                 2      Algorithm 2 of EDM, deterministic or with churn
    ``reverse_diffusion``        (1)    the predictor of Song et al.; with a corrector their predictor-corrector
    ``dpmpp_2m``                 2      DPM-Solver++(2M), one evaluation a step
    ``ipndm``                    2, k   iPNDM: Adams-Bashforth in ``sigma``, one evaluation a step
    ``initial_noise``            (1)    what 2-rectified flow++ samples straight flows by
    ===========================  =====  ==========================================================================

Grids of noise levels are in ``schedules``. Start from ``alpha x0``, which is not ``x0`` where a grid starts later than
in pure noise.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax import paths
from fmjax.sampling.solvers import draw_noise
from fmjax.types import Cond, FlowMapFn, Multistep, Net, VelocityFn, expand, over_batch


def as_flow(net: Net, *, predicts: str, path: paths.Path | None = None, onto: paths.Path | None = None) -> Net:
    """A network that was trained to predict ``"noise"``, ``"data"``, ``"score"`` ... on ``path`` as a flow's ``Net``.

    Its diagonal is the velocity on ``onto`` (both linear by default): ``paths.convert`` and ``paths.change`` of the
    prediction, exact where both paths are finite (see there for their ends). The parameters are the network's own, so
    that a diffusion model's start a flow, or any flow map, and train on: off the diagonal the network is asked for the
    matching pair of times, ``X_{s,t}`` is one Euler step where it ignores the second. Raises ``ValueError`` for an
    unknown prediction and for a path with a latent.
    """
    path, onto = path or paths.linear(), onto or paths.linear()
    if predicts not in paths.PREDICTIONS:
        raise ValueError(f"no network predicts {predicts!r}; it is one of {', '.join(paths.PREDICTIONS)}")
    paths.refuse_latent("a diffusion model", path, onto)

    def flow(params, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        end, _ = paths.match_snr(path, onto, t)

        def velocity(y, start, cond):
            predicted = net(params, y, start, jnp.where(s == t, start, end), cond, key)
            return paths.convert(path, y, predicted, start, kind=predicts, to="velocity")

        return paths.change(velocity, path, onto)(x, s, cond)

    return flow


def denoiser(flow: VelocityFn, *, path: paths.Path | None = None):
    """EDM's ``D(x; sigma) = E[x1 | x1 + sigma x0 = x]`` of a velocity ``flow``: ``denoiser(x, sigma: [B], cond)``.

    The data prediction at the time of the noise level, ``t = 1 / (1 + sigma)`` on the linear path, and ``beta x``.
    Raises ``ValueError`` for a path with a latent.
    """
    path = path or paths.linear()
    paths.refuse_latent("a denoiser", path)

    def denoise(x, sigma, cond: Cond = None):
        t, _ = paths.match_snr(path, paths.linear(), 1 / (1 + over_batch(sigma, x)))
        x = _coefficients(path, x, t)[1] * x
        return paths.convert(path, x, flow(x, t, cond), t, kind="velocity", to="data")

    return denoise


def velocity_of(denoise, *, path: paths.Path | None = None) -> VelocityFn:
    """The velocity on ``path`` of EDM's denoiser ``D(x; sigma)``; linear: ``(D(x / t; (1 - t) / t) - x) / (1 - t)``.

    Its noise level must be finite and positive: no value at ``t = 0`` and ``t = 1`` of the linear path. (Those of
    ``nets.preconditioning`` have values there.) Raises ``ValueError`` for a path with a latent.
    """
    path = path or paths.linear()
    paths.refuse_latent("a denoiser", path)

    def velocity(x, t, cond: Cond = None):
        t = over_batch(t, x)
        alpha, beta = path.coefficients(t)
        data = denoise(x / expand(beta, x), alpha / beta, cond)
        return paths.convert(path, x, data, t, kind="data", to="velocity")

    return velocity


def ddim(velocity: VelocityFn, *, path: paths.Path | None = None, eta: float = 0.0) -> FlowMapFn:
    """``x_t = beta_t D + sqrt(alpha_t^2 - w^2) E + w z``, data ``D`` and noise ``E`` predicted at ``s``: 1 evaluation.

    ``w^2 = eta^2 (alpha_t / alpha_s)^2 (alpha_s^2 - (beta_s / beta_t)^2 alpha_t^2)`` (arXiv 2010.02502). ``eta = 0``
    draws nothing and is Euler's step of the linear path at matched noise levels, whatever the path; rising or falling
    times. ``eta = 1`` is the posterior of ``x_t`` given ``x_s`` and ``x1 = D``: ancestral sampling (2006.11239 with its
    smaller variance; the ancestral step of 2011.13456 for ``ve``). A falling step draws nothing. Needs a key where
    ``eta > 0``. Raises ``ValueError`` for ``eta`` outside [0, 1] and a path with a latent.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]: 0 is deterministic, 1 ancestral sampling")
    path = _diffusion(path)

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = _coefficients(path, x, s), _coefficients(path, x, t)
        if eta == 0:
            return beta * data + alpha * noise
        fresh = eta * jnp.sqrt(jnp.maximum(alpha**2 - (beta_s * alpha**2 / (beta * alpha_s)) ** 2, 0))
        return beta * data + jnp.sqrt(alpha**2 - fresh**2) * noise + fresh * draw_noise(key, x)

    return step


def edm_heun(
    velocity: VelocityFn,
    *,
    path: paths.Path | None = None,
    steps: int | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> FlowMapFn:
    """Heun's step in ``sigma``, after churn: Algorithm 2 of EDM (arXiv 2206.00364), 2 evaluations.

    With ``y = x / beta``, ``d = E[x0 | y; sigma]``: where ``s_min <= sigma <= s_max`` the level is first raised to
    ``sigma^ = (1 + gamma) sigma``, ``y <- y + sqrt(sigma^^2 - sigma^2) s_noise z``, ``gamma = min(s_churn / steps,
    sqrt 2 - 1)``, ``steps`` those of the whole grid; then ``y' = y + (sigma' - sigma^) (d + d') / 2``, ``d'`` at the
    Euler step's end. A step that ends in the data (``sigma' = 0``) or starts in pure noise is Euler's, and costs 1
    evaluation: ``2 N - 1`` on ``schedules.edm_grid(N)``. Churn is for rising times and needs a key. Raises
    ``ValueError`` for a churn without ``steps``, negative numbers and a path with a latent.
    """
    if s_churn and (steps is None or steps < 1):
        raise ValueError(f"s_churn={s_churn} is shared by the steps of the grid: give steps=N, got {steps}")
    if not (0 <= s_churn < math.inf and 0 <= s_min <= s_max and s_noise > 0):
        raise ValueError(
            f"churn needs s_churn >= 0, 0 <= s_min <= s_max and s_noise > 0, got {s_churn=}, {s_min=}, {s_max=}, "
            f"{s_noise=}"
        )
    path, gamma = _diffusion(path), min(s_churn / steps, math.sqrt(2) - 1) if s_churn else 0.0

    def churned(x, s, key):
        alpha, beta = path.coefficients(s)
        sigma = alpha / beta
        raised, _ = paths.match_snr(path, paths.linear(), 1 / (1 + (1 + gamma) * sigma))
        raised = jnp.where((s_min <= sigma) & (sigma <= s_max) & jnp.isfinite(sigma), raised, s)
        noisier = paths.renoise(path, x, s_noise * draw_noise(key, x), s, raised)
        return jnp.where(expand(raised == s, x), x, noisier), raised

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        if gamma:
            x, s = churned(x, s, key)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        ahead = _along(path, x, noise, data, noise, s, t)
        (_, beta_s), (alpha, beta) = _coefficients(path, x, s), _coefficients(path, x, t)
        two = (beta_s > 0) & (alpha > 0) & (beta > 0)

        def corrected():
            later, _ = paths.endpoints(path, ahead, velocity(ahead, t, cond), t)
            return jnp.where(two, _along(path, x, noise, data, (noise + later) / 2, s, t), ahead)

        return jax.lax.cond(jnp.any(two), corrected, lambda: ahead)

    return step


def reverse_diffusion(velocity: VelocityFn, *, path: paths.Path | None = None, end: float = 1.0) -> FlowMapFn:
    """``x + (1 - k) x + G^2 S + G z``: the reverse of the noising step ``x_s = k x_t + G z``, to first order in it.

    ``k = beta_s / beta_t``, ``G^2 = alpha_s^2 - k^2 alpha_t^2``, ``S`` the score (arXiv 2011.13456, appendix E): 1
    evaluation. A step that ends at ``end`` is its mean, without noise: say where the grid stops. For paths that keep
    some data all along (``vp``, ``sub_vp``, ``ve``), as ``1 - k`` must be small. Their predictor-corrector corrects
    before every step and not at the end, ``samplers.sample(step, x0, ts, key=..., corrector=correctors.langevin(...),
    at=range(N))``: ``N (n + 1)`` evaluations with ``n`` Langevin steps. Needs a key. Raises ``ValueError`` for a path
    with a latent.
    """
    path = _diffusion(path)

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        score = paths.score(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = _coefficients(path, x, s), _coefficients(path, x, t)
        kept = beta_s / beta
        square = jnp.maximum(alpha_s**2 - (kept * alpha) ** 2, 0)
        mean = x + (1 - kept) * x + square * score
        return mean + jnp.where(expand(t >= np.float32(end), x), 0, jnp.sqrt(square)) * draw_noise(key, x)

    return step


def dpmpp_2m(velocity: VelocityFn, *, path: paths.Path | None = None) -> Multistep:
    """DPM-Solver++(2M): ``x_t = (alpha_t / alpha_s) x + beta_t (1 - e^-h) D^``, ``h`` the step of ``-log sigma``.

    ``D^ = D + (h / 2 h') (D - D')``, ``D'`` and ``h'`` the data prediction and the length of the step before (arXiv
    2211.01095, Algorithm 2): order 2, 1 evaluation. The first step, one into the data and one out of pure noise, where
    ``h`` is infinite, take ``D^ = D``. For rising times. Raises ``ValueError`` for a path with a latent.
    """
    path = _diffusion(path)

    def init(x):
        return jnp.zeros_like(x), _no_level(x)

    def step(memory, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        before, level_before = memory
        _, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = _coefficients(path, x, s), _coefficients(path, x, t)
        level = alpha_s / beta_s
        ahead, behind = jnp.log(level) - jnp.log(alpha / beta), jnp.log(expand(level_before, x)) - jnp.log(level)
        bent = jnp.where(jnp.isfinite(ahead) & jnp.isfinite(behind), ahead / (2 * behind), 0)
        kept = alpha / alpha_s
        x = kept * x + (beta - beta_s * kept) * (data + bent * (data - before))
        # inside shard_map the memory must vary over devices as x does, and times need not
        return x, (data, jnp.zeros_like(level_before) + level.reshape(level_before.shape))

    return Multistep(init, step)


def ipndm(velocity: VelocityFn, *, path: paths.Path | None = None, order: int = 4, even: bool = True) -> Multistep:
    """Adams-Bashforth in ``sigma``: ``x_t / beta_t = x_s / beta_s + (sigma_t - sigma_s) sum_j w_j E_j``, 1 evaluation.

    ``E_j`` are the last ``order`` noise predictions ``E[x0 | x]``, fewer in the first steps. iPNDM (arXiv 2202.09778,
    2204.13902) takes the weights of equal steps, (55, -59, 37, -9) / 24 for four, on every grid: of order 2 at most
    where steps are not equal, and the better with few of them. ``even=False`` integrates the polynomial through the
    ``E_j`` over the step itself: of order ``order`` on smooth grids, but for the first step, which is Euler's and
    counts little where a grid starts in noise. A step out of pure noise is Euler's too. For rising times. Raises
    ``ValueError`` for an order that is none of 1 .. 4 and a path with a latent.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"ipndm has orders 1 to 4, got order={order}")
    path = _diffusion(path)

    def init(x):
        past = [None] * (order - 1)
        stack = lambda one: jnp.stack([one for _ in past]) if past else jnp.zeros((0, *one.shape), one.dtype)
        return stack(jnp.zeros_like(x)), stack(_no_level(x))

    def step(memory, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = path.coefficients(s), path.coefficients(t)
        slopes, levels = (
            jnp.concatenate([noise[None], memory[0]]),
            jnp.concatenate([(alpha_s / beta_s)[None], memory[1]]),
        )
        weights = _adams(levels, alpha / beta, even).astype(x.dtype)
        slope = jnp.sum(weights.reshape(weights.shape + (1,) * (x.ndim - 1)) * slopes, 0)
        return _along(path, x, noise, data, slope, s, t), (slopes[:-1], levels[:-1])

    return Multistep(init, step)


def initial_noise(velocity: VelocityFn, *, path: paths.Path | None = None, heun: bool = False) -> Multistep:
    """``x_t = beta_t D + alpha_t x0``, ``D`` the data predicted at ``s``, ``x0`` the noise of the start: 1 evaluation.

    On the linear path ``D = x_s + (1 - s) v(x_s, s)`` and ``x_t = t D + (1 - t) x0``, the new sampler of 2-rectified
    flow++ (arXiv 2405.20320). ``x0`` is what the first step predicts: the start itself out of pure noise. Exact for
    straight flows, whatever the grid; of others it is no solver (more steps do not lead to the ODE's end), but for the
    first step, which is ``ddim``'s. ``heun`` averages the velocity of the linear path with that at the step's end and
    costs 2 evaluations, 1 into the data. Corrections between the steps do not change ``x0``. For rising times. Raises
    ``ValueError`` for a path with a latent.
    """
    path = _diffusion(path)

    def step(memory, x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        (alpha_s, beta_s), (alpha, beta) = _coefficients(path, x, s), _coefficients(path, x, t)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        first = jnp.where(jnp.isfinite(memory), memory, noise)

        def averaged():
            ahead = beta * data + alpha * first
            later = paths.endpoints(path, ahead, velocity(ahead, t, cond), t)
            slope = (data - noise + later[1] - later[0]) / 2
            return jnp.where(alpha > 0, (x + alpha_s * slope) / (alpha_s + beta_s), data)

        if heun:
            data = jax.lax.cond(jnp.any(alpha > 0), averaged, lambda: data)
        return beta * data + alpha * first, first

    return Multistep(lambda x: jnp.full_like(x, jnp.inf), step)


def _adams(levels: Array, end: Array, even: bool) -> Array:
    """``w_j = int_0^1 prod_{i != j} (u - u_i) / (u_j - u_i) du: [k, B]``, ``u`` the level: 0 at ``s``, 1 at the end.

    Over the levels ``[k, B]`` that are finite, the newest first; by Gauss's rule of two points, exact for ``k <= 4``.
    """
    k = levels.shape[0]
    here = jnp.isfinite(levels).at[0].set(True)
    equal = -jnp.arange(k, dtype=levels.dtype)[:, None] * jnp.ones_like(end)
    u = (levels - levels[0]) / (end - levels[0])
    u = equal if even else jnp.where(jnp.isfinite(u), u, equal)
    gauss = jnp.asarray([0.5 - math.sqrt(3) / 6, 0.5 + math.sqrt(3) / 6], levels.dtype)[:, None, None, None]
    same = jnp.eye(k, dtype=bool)[:, :, None]  # [j, i, B]
    factors = jnp.where(here & ~same, (gauss - u) / jnp.where(same, 1, u[:, None] - u), 1)
    return jnp.where(here, factors.prod(2).mean(0), 0)


def _diffusion(path: paths.Path | None) -> paths.Path:
    path = path or paths.linear()
    paths.refuse_latent("a step of a diffusion model", path)
    return path


def _coefficients(path: paths.Path, x: Array, t: Array) -> tuple[Array, Array]:
    """``alpha, beta`` at ``t: [B]``, to multiply ``x``; without derivatives, which may be infinite at an end."""
    alpha, beta = path.coefficients(expand(t, x))
    none = jnp.abs(alpha) < 8 * jnp.finfo(alpha.dtype).eps  # cos(pi / 2) in floating point is no zero
    return jnp.where(none, 0, alpha).astype(x.dtype), beta.astype(x.dtype)


def _along(path: paths.Path, x: Array, noise: Array, data: Array, slope: Array, s: Array, t: Array) -> Array:
    """``beta_t (x / beta_s + (sigma_t - sigma_s) slope)`` for ``x = alpha_s noise + beta_s data``, finite at both ends.

    Out of pure noise, ``beta_s = 0``, the slope is ``noise`` itself.
    """
    (alpha_s, beta_s), (alpha, beta) = _coefficients(path, x, s), _coefficients(path, x, t)
    pure = beta_s == 0
    bend = beta * alpha_s / jnp.where(pure, 1, beta_s) * (noise - slope)
    return beta * data + alpha * jnp.where(pure, noise, slope) + jnp.where(pure, 0, bend)


def _no_level(x: Array) -> Array:
    """Infinite noise levels ``[B]``: what stands for a step that was not taken."""
    times = over_batch(0.0, x)
    return jnp.full_like(x.reshape(x.shape[0], -1)[:, 0], jnp.inf, times.dtype)
