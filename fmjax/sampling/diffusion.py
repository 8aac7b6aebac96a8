"""Steps of diffusion samplers without memory, on any path without a latent, and a table of all of them.

Such a path, ``x = alpha x0 + beta x1``, is a diffusion at the noise level ``sigma = alpha / beta`` with the state ``x /
beta`` and the ODE ``d(x / beta) / d sigma = E[x0 | x]`` (arXiv 2206.00364). The steps solve this ODE. In these
coordinates the path is gone: a step gives the same sample on every path at equal noise levels, which ``rk4`` does not.

    step                         order  source
    ===========================  =====  ==========================================================================
    ``ddim``                     1      DDIM; ``eta=1`` is DDPM's ancestral sampling
    ``edm_heun``                 2      Algorithm 2 of EDM, deterministic or with churn
    ``reverse_diffusion``        (1)    the predictor of Song et al.; with a corrector their predictor-corrector
    ``dpmpp_2s``                 2      DPM-Solver++(2S); ``eta=1``: ancestral (``exponential``)
    ``dpmpp_2m``                 2      DPM-Solver++(2M), one evaluation a step; ``eta=1``: its SDE (``exponential``)
    ``dpmpp_3m``                 2, 3   DPM-Solver++(3M), one evaluation a step; ``eta=1``: its SDE (``exponential``)
    ``unipc``                    2 - 4  UniPC, predictor and corrector, one evaluation a step (``exponential``)
    ``ipndm``                    2, k   iPNDM: Adams-Bashforth in ``sigma``, one evaluation a step (``multistep``)
    ``initial_noise``            (1)    the sampler of 2-rectified flow++ for straight flows (``multistep``)
    ===========================  =====  ==========================================================================

Grids of noise levels are in ``grids``; ``source_sample`` draws the start ``alpha x0``.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fmjax import paths
from fmjax.sampling import grids
from fmjax.sampling.costs import evaluations
from fmjax.sampling.stochastic import draw_noise
from fmjax.types import Costed, VelocityFn, accept, expand, over_batch


def ddim(velocity: VelocityFn, *, path: paths.Path = paths.linear(), eta: float = 0.0) -> Costed:
    """Return the step of DDIM: order 1, 1 evaluation (arXiv 2010.02502).

    ``x_t = beta_t D + sqrt(alpha_t^2 - w^2) E + w z`` with data ``D`` and noise ``E`` predicted at ``s``, and
    ``w^2 = eta^2 (alpha_t / alpha_s)^2 (alpha_s^2 - (beta_s / beta_t)^2 alpha_t^2)``. ``eta = 0`` draws nothing and is
    Euler's step of the linear path at matched noise levels, whatever the path. ``eta = 1`` is the posterior of ``x_t``
    given ``x_s`` and ``x1 = D``: ancestral sampling (arXiv 2006.11239 with its smaller variance; the ancestral step of
    2011.13456 for ``ve``). A falling step draws nothing.

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        eta: fraction of the ancestral noise, in [0, 1].

    Returns:
        A step ``(x, s, t, cond, key) -> x`` that needs a key where ``eta > 0``.

    Raises:
        ValueError: for ``eta`` outside [0, 1] and for a path with a latent.

    >>> import jax.numpy as jnp
    >>> ddim(lambda x, t, cond=None: -x)(jnp.ones((1, 1)), 0.25, 0.75).round(4).tolist()
    [[0.5]]
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta}: outside [0, 1]. Use 0 for a deterministic step and 1 for ancestral sampling.")
    paths.refuse_latent("ddim", path)

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = path_at(path, x, s), path_at(path, x, t)
        if eta == 0:
            return beta * data + alpha * noise
        fresh = eta * jnp.sqrt(jnp.maximum(alpha**2 - (beta_s * alpha**2 / (beta * alpha_s)) ** 2, 0))
        return beta * data + jnp.sqrt(alpha**2 - fresh**2) * noise + fresh * draw_noise(key, x)

    return Costed(step, evaluations(velocity))


def edm_heun(
    velocity: VelocityFn,
    *,
    path: paths.Path = paths.linear(),
    steps: int | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Costed:
    """Return Heun's step in ``sigma`` after churn, Algorithm 2 of EDM: order 2, 2 evaluations (arXiv 2206.00364).

    With ``y = x / beta``, ``d = E[x0 | y; sigma]``: where ``s_min <= sigma <= s_max`` the level is first raised to
    ``sigma^ = (1 + gamma) sigma``, ``y <- y + sqrt(sigma^^2 - sigma^2) s_noise z``, ``gamma = min(s_churn / steps,
    sqrt 2 - 1)``; then ``y' = y + (sigma' - sigma^) (d + d') / 2``, ``d'`` at the end of the Euler step. A step that
    ends in the data (``sigma' = 0``), or starts in pure noise, is Euler's and costs 1 evaluation: ``2 N - 1`` on
    ``edm_grid(N)``.

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        steps: number of steps of the whole grid, over which the churn is spread.
        s_churn: total amount of churn; 0 draws nothing.
        s_min: smallest noise level with churn.
        s_max: largest noise level with churn.
        s_noise: factor on the churn's noise.

    Returns:
        A step ``(x, s, t, cond, key) -> x``; with churn it needs a key and a rising grid.

    Raises:
        ValueError: for a churn without ``steps``, for negative numbers and for a path with a latent. Its ``check``
            refuses a churn that would raise a level of the grid above the largest level of the path.

    >>> import jax.numpy as jnp
    >>> step = edm_heun(lambda x, t, cond=None: -x)
    >>> step(jnp.ones((1, 1)), 0.25, 0.75).round(4).tolist(), step.nfe
    ([[0.875]], 2)
    """
    if s_churn and (steps is None or steps < 1):
        raise ValueError(f"steps={steps}: s_churn={s_churn} is spread over the steps of the grid. Give steps=N.")
    if not (0 <= s_churn < math.inf and 0 <= s_min <= s_max and s_noise > 0):
        raise ValueError(
            f"s_churn={s_churn}, s_min={s_min}, s_max={s_max}, s_noise={s_noise}: out of range. Use s_churn >= 0, "
            "0 <= s_min <= s_max and s_noise > 0."
        )
    paths.refuse_latent("edm_heun", path)
    gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_churn else 0.0

    def churned(x, s, key):
        alpha, beta = path.coefficients(s)
        sigma = alpha / beta
        raised, _ = paths.match_snr(path, paths.linear(), 1 / (1 + (1 + gamma) * sigma))
        raised = jnp.where((s_min <= sigma) & (sigma <= s_max) & jnp.isfinite(sigma), raised, s)
        noisier = paths.renoise(path, x, s_noise * draw_noise(key, x), jnp.where(raised == s, 0.5, s), raised)
        return jnp.where(expand(raised == s, x), x, noisier), raised

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        if gamma:
            x, s = churned(x, s, key)
        noise, data = paths.endpoints(path, x, velocity(x, s, cond), s)
        ahead = along_sigma(path, x, noise, data, noise, s, t)
        (_, beta_s), (alpha, beta) = path_at(path, x, s), path_at(path, x, t)
        two = (beta_s > 0) & (alpha > 0) & (beta > 0)

        def corrected():
            # where there is no second evaluation its place is taken by the first: an infinite one has the gradient nan
            later_t = jnp.where(two.reshape(t.shape), t, s)
            later_x = jnp.where(two, ahead, x)
            later, _ = paths.endpoints(path, later_x, velocity(later_x, later_t, cond), later_t)
            return jnp.where(two, along_sigma(path, x, noise, data, (noise + later) / 2, s, t), ahead)

        return jax.lax.cond(jnp.any(two), corrected, lambda: ahead)

    def check(ts):
        rising("edm_heun with s_churn")(ts)
        levels, top = (_levels(path, np.asarray(t, np.float64)) for t in (ts[:-1], path.span[:1]))
        over = (s_min <= levels) & (levels <= s_max) & np.isfinite(levels) & ((1 + gamma) * levels > top * (1 + 1e-6))
        if over.any():
            raise ValueError(
                f"s_max={s_max:g}: churn raises the noise level {levels[over][0]:g} by {gamma:.0%}, and the largest of "
                f"the path is {top[0]:g}. Give s_max={top[0] / (1 + gamma):.4g}, or a grid that starts later."
            )

    return Costed(step, evaluations(velocity, calls=2), check if gamma else accept)


def reverse_diffusion(velocity: VelocityFn, *, path: paths.Path = paths.linear(), end: float = 1.0) -> Costed:
    """Return the reverse diffusion predictor: 1 evaluation (arXiv 2011.13456, appendix E).

    ``x + (1 - k) x + G^2 S + G z``, the reverse of the noising step ``x_s = k x_t + G z`` to first order in it:
    ``k = beta_s / beta_t``, ``G^2 = alpha_s^2 - k^2 alpha_t^2``, ``S`` the score. For paths that keep some data all
    along (``vp``, ``sub_vp``, ``ve``), since ``1 - k`` must be small. The predictor-corrector of the authors' code
    corrects before every step and not at the end,
    ``sample(step, x0, ts, corrector=correction.langevin(...), at=range(N))``: ``N (n + 1)`` evaluations with ``n``
    Langevin steps. (The algorithms of the paper correct after every step: ``at=range(1, N + 1)``.)

    Args:
        velocity: ``v(x, t, cond)``.
        path: the path of the velocity.
        end: last time of the grid; the step that ends there returns its mean, without noise.

    Returns:
        A step ``(x, s, t, cond, key) -> x`` that needs a key and a rising grid.

    Raises:
        ValueError: for a path with a latent.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import paths
    >>> step = reverse_diffusion(lambda x, t, cond=None: -x, path=paths.vp())
    >>> step(jnp.ones((2, 3)), 0.5, 0.51, key=jax.random.key(0)).shape
    (2, 3)
    """
    paths.refuse_latent("reverse_diffusion", path)

    def step(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        score = paths.score(path, x, velocity(x, s, cond), s)
        (alpha_s, beta_s), (alpha, beta) = path_at(path, x, s), path_at(path, x, t)
        kept = beta_s / beta
        square = jnp.maximum(alpha_s**2 - (kept * alpha) ** 2, 0)
        mean = x + (1 - kept) * x + square * score
        return mean + jnp.where(expand(t > end - grids.SAME, x), 0, jnp.sqrt(square)) * draw_noise(key, x)

    return Costed(step, evaluations(velocity), rising("reverse_diffusion"))


def _levels(path: paths.Path, ts: np.ndarray) -> np.ndarray:
    """Noise levels ``alpha / beta`` in float64."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        alpha, beta = (np.asarray(a) for a in path.coefficients(jnp.asarray(ts)))
    with np.errstate(divide="ignore"):
        return alpha / beta


def path_at(path: paths.Path, x: Array, t: Array) -> tuple[Array, Array]:
    """Return the coefficients of a path without their derivatives, which may be infinite at an end.

    Args:
        path: a path without a latent.
        x: states ``[B, ...]``.
        t: times ``[B]``.

    Returns:
        ``alpha, beta``, shaped to multiply ``x``; ``alpha`` is exactly 0 where it is 0 up to rounding.
    """
    alpha, beta = path.coefficients(expand(t, x))
    none = jnp.abs(alpha) < 8 * jnp.finfo(alpha.dtype).eps  # cos(pi / 2) in floating point is not 0
    return jnp.where(none, 0, alpha).astype(x.dtype), beta.astype(x.dtype)


def no_level(x: Array, value: float = math.inf) -> Array:
    """Return noise levels that stand for the steps before the first step.

    Args:
        x: states ``[B, ...]``.
        value: the level, which no step has: infinite, or negative where a step may start in pure noise.

    Returns:
        Levels ``[B]`` in the precision of times.
    """
    times = over_batch(0.0, x)
    # of x: inside shard_map the levels must vary over devices as x does
    return jnp.full_like(x.reshape(x.shape[0], math.prod(x.shape[1:]))[:, 0], value, times.dtype)


def along_sigma(path: paths.Path, x: Array, noise: Array, data: Array, slope: Array, s: Array, t: Array) -> Array:
    """Return the step ``beta_t (x / beta_s + (sigma_t - sigma_s) slope)``, finite at both ends of the path.

    For ``x = alpha_s noise + beta_s data``. Out of pure noise, ``beta_s = 0``, the slope is ``noise`` itself.

    Args:
        path: a path without a latent.
        x: states ``[B, ...]`` at ``s``.
        noise: the noise prediction at ``s``.
        data: the data prediction at ``s``.
        slope: ``d(x / beta) / d sigma``.
        s: times ``[B]``.
        t: times ``[B]``.

    Returns:
        States ``[B, ...]`` at ``t``.
    """
    (alpha_s, beta_s), (alpha, beta) = path_at(path, x, s), path_at(path, x, t)
    pure = beta_s == 0
    bend = beta * alpha_s / jnp.where(pure, 1, beta_s) * (noise - slope)
    return beta * data + alpha * jnp.where(pure, noise, slope) + jnp.where(pure, 0, bend)


def rising(what: str):
    """Return the check of a step that takes rising grids only.

    Args:
        what: name of the step.

    Returns:
        A function of a grid that raises ``ValueError`` where it falls.
    """

    def check(ts):
        if len(ts) > 1 and ts[1] < ts[0]:
            raise ValueError(
                f"ts={ts[0]:g} .. {ts[-1]:g}: falling, but {what} goes from noise to data. Use a rising grid."
            )

    return check
