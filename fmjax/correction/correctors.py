"""Corrections of a sample at one time, to interleave with solver steps: ``corrector(key, x, t, cond) -> (x, info)``.

``info["noised"]`` is the state after the noise and before the push (what a parallel sampler steps from);
``info["moved"]: [B]`` is the root-mean-square displacement of the push.

``marginal_matching`` pushes along a direction: a trained method's, or ``kernel_drift``, which needs no training.
``langevin``, ``mala`` and ``restart`` need none either. ``alpha``, ``beta``, ``step``, ``snr``, ``to`` and
``bandwidth`` are numbers or functions of the time ``[B]``; ``times.per_step`` makes one of an array over the grid.
What cannot work at every time has a ``check(ts)`` that raises ``ValueError``, which ``samplers.sample`` asks before it
starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import paths
from fmjax.keys import normal, split
from fmjax.sampling import grids
from fmjax.types import Corrector, DirectionFn, FlowMapFn, VelocityFn, expand, over_batch

Schedule = float | Callable[[Array], Array]


def _at(value: Schedule, t: Array, x: Array) -> Array | float:
    return expand(value(t), x).astype(x.dtype) if callable(value) else value


def _square(x: Array) -> Array:
    return jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), 1)


def _rms(x: Array) -> Array:
    return jnp.sqrt(_square(x) / x[0].size)


def _with_check(correct, *given, own: Callable | None = None):
    """``correct`` with a ``check`` that asks all of ``given`` that have one, then ``own``."""
    checks = [f.check for f in given if hasattr(f, "check")]

    def check(ts):
        for one in (*checks, own) if own else checks:
            one(ts)

    correct.check = check
    return correct


def marginal_matching(direction: DirectionFn, *, alpha: Schedule, beta: Schedule = 0.0) -> Corrector:
    """Marginal matching: ``x~ = x + beta z``, then ``x' = x~ + alpha h(x~, t)`` (OpenReview kRjLBXWn1T, Algorithm 1).

    ``direction`` is ``h`` in displacement units (for a score corrector ``h = sigma^2 S``, see ``preset``). ``beta = 0``
    draws no noise at all. Raises ``ValueError`` for a negative ``beta``.
    """
    if not callable(beta) and beta < 0:
        raise ValueError(f"beta is a standard deviation and cannot be negative, got {beta}")

    def correct(key, x, t, cond=None):
        t = over_batch(t, x)
        noised = x
        if callable(beta) or beta != 0:
            noised = x + _at(beta, t, x) * normal(key, x.shape[1:], x.dtype)
        if not callable(alpha) and alpha == 0:
            return noised, {"noised": noised, "moved": jnp.zeros(x.shape[0])}
        push = _at(alpha, t, x) * direction(noised, t, cond)
        return noised + push, {"noised": noised, "moved": _rms(push)}

    return _with_check(correct, direction, alpha, beta)


def preset(
    name: str, sigma: Schedule, *, alpha: Schedule | None = None, beta: Schedule | None = None
) -> dict[str, Schedule]:
    """``alpha`` and ``beta`` of ``marginal_matching`` by name, for a score corrector trained with noise ``sigma``.

    With ``q`` the backward marginal and ``b`` its standard deviation, were it Gaussian:

    ============  =======  =======  ==================================================================================
    name          alpha    beta     on a perfect model, ``p = q``
    ============  =======  =======  ==================================================================================
    ``paper``     given    given    (OpenReview kRjLBXWn1T: chosen by a grid search)
    ``tweedie``   1        0        contracts by ``b^2 / (b^2 + sigma^2)``: to the posterior mean, were ``x`` so noisy
    ``w2``        1/2      0        half of that, to leading order; there no step without noise brings
                                    ``q * N(0, sigma^2)`` nearer to ``q`` in W2
    ``langevin``  1/2      sigma    leaves it, to ``b (1 + (sigma / b)^4 / 8)``; a Langevin step of ``h = sigma^2 / 2``
                                    in law, to first order
    ============  =======  =======  ==================================================================================

    Raises ``ValueError`` for an unknown name (with the nearest), for ``paper`` without both numbers, for one of the
    others with any, and for a ``sigma`` that is not positive.
    """
    _positive("sigma, the corrector's noise level,", sigma)
    fixed = {"tweedie": (1.0, 0.0), "w2": (0.5, 0.0), "langevin": (0.5, sigma)}
    names = ("paper", *fixed)
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1, 0.0)[0]
        raise ValueError(f"no preset {name!r}; did you mean {near!r}? (there are {', '.join(names)})")
    if name == "paper":
        if alpha is None or beta is None:
            raise ValueError("preset 'paper' leaves alpha and beta to you: preset('paper', sigma, alpha=..., beta=...)")
        return {"alpha": alpha, "beta": beta}
    if alpha is not None or beta is not None:
        raise ValueError(f"preset {name!r} fixes alpha and beta, got {alpha=}, {beta=}; choose them with 'paper'")
    alpha, beta = fixed[name]
    return {"alpha": alpha, "beta": beta}


def langevin(
    score: DirectionFn, *, step: Schedule | None = None, snr: Schedule | None = None, steps: int = 1
) -> Corrector:
    """Unadjusted Langevin: ``x <- x + h S(x, t) + sqrt(2 h) z``, ``steps`` times, ``S`` the score of the law at ``t``.

    ``step`` is ``h``, in units of squared displacement. It is stationary at the law whose score is ``S`` up to the
    discretisation (for ``N(0, b^2)`` the stationary variance is ``b^2 / (1 - h / (2 b^2))``). Or give ``snr``, the
    ratio of the push to the noise: ``h = 2 (snr |z| / |S|)^2`` (arXiv 2011.13456, Algorithm 4), norms of each example
    alone. Raises ``ValueError`` unless one of the two is given and positive, and for ``steps < 1``.
    """
    if (step is None) == (snr is None):
        raise ValueError(f"give step, which is h itself, or snr, from which h follows, not both: got {step=}, {snr=}")
    _positive("the Langevin step" if snr is None else "the signal-to-noise ratio", step if snr is None else snr)
    _some("langevin", steps)

    def correct(key, x, t, cond=None):
        t = over_batch(t, x)

        def move(x, k):
            s, z = score(x, t, cond), normal(k, x.shape[1:], x.dtype)
            if snr is None:
                h = _at(step, t, x)
            else:
                h = 2 * _at(snr, t, x) ** 2 * expand(_square(z) / _square(s), x)
            return x + h * s + jnp.sqrt(2 * h) * z, None

        y, _ = jax.lax.scan(move, x, jnp.stack(split(key, steps)))
        return y, {"moved": _rms(y - x)}

    return _with_check(correct, score, step, snr)


def mala(
    score: DirectionFn, log_density: Callable[..., Float[Array, " b"]], *, step: Schedule, steps: int = 1
) -> Corrector:
    """Metropolis-adjusted Langevin: ``langevin``'s step ``y`` of ``x``, taken with the probability ``min(1, r)``,

    ``log r = log p(y) - log p(x) + (|z|^2 - |z'|^2) / 2``, where ``z' = (x - y - h S(y)) / sqrt(2 h)`` leads back.
    Stationary at ``p`` itself for every ``h``, and for every ``S``, which decides how many steps are taken alone.
    ``log_density(x, t, cond): [B]``, up to a constant of each ``t``, may be exact, minus an energy, or a flow's at the
    end (``likelihood.log_density``). A proposal whose ``log r`` is not a number is not taken.

    ``info["accepted"]: [B]`` is the share of the steps that were. Sources: arXiv 2605.06905 for flows. Raises
    ``ValueError`` for ``step <= 0`` or ``steps < 1``.
    """
    _positive("the Langevin step", step)
    _some("mala", steps)

    def correct(key, x, t, cond=None):
        t = over_batch(t, x)
        h = _at(step, t, x)
        state = lambda x: (x, score(x, t, cond), log_density(x, t, cond))

        def move(now, k):
            (x, s, log_p), (k_noise, k_accept) = now, split(k, 2)
            z = normal(k_noise, x.shape[1:], x.dtype)
            y, s_y, log_p_y = proposal = state(x + h * s + jnp.sqrt(2 * h) * z)
            back = (x - y - h * s_y) / jnp.sqrt(2 * h)
            log_r = log_p_y - log_p + (_square(z) - _square(back)) / 2
            taken = jnp.log(jax.vmap(jax.random.uniform)(k_accept)) < log_r
            return jax.tree.map(lambda new, old: jnp.where(expand(taken, new), new, old), proposal, now), taken

        (y, *_), taken = jax.lax.scan(move, state(x), jnp.stack(split(key, steps)))
        return y, {"moved": _rms(y - x), "accepted": taken.mean(0)}

    return _with_check(correct, score, log_density, step)


def restart(
    step: FlowMapFn, *, to: Schedule, steps: int = 1, loops: int = 1, path: paths.Path | None = None
) -> Corrector:
    """Restart: back from ``t`` to the earlier ``to`` by noise, forth again by ``steps`` steps; ``loops`` times.

    ``x <- c x + sqrt(alpha_s^2 - c^2 alpha_t^2) z``, ``c = beta_s / beta_t``, ``s = to`` (``paths.renoise``), then
    ``step`` along a uniform grid from ``s`` to ``t``: of the ODE (arXiv 2306.14878), or one jump of a flow map
    (``steps=1``). An exact step leaves the law at ``t`` as it is; for Gaussian data of variances ``C`` on the path a
    loop shrinks what is wrong with ``x`` by ``c sqrt(C_t / C_s)``. ``path`` (linear by default) is the step's own, its
    source N(0, I) and independent of the data.

    Its ``check`` refuses times not later than ``to``, so ``t = 0`` in any case; elsewhere the result is ``nan`` there.
    Raises ``ValueError`` for a path with a latent, ``to`` outside [0, 1), ``steps < 1`` and ``loops < 1``.
    """
    path = path or paths.linear()
    paths.refuse_latent("restart", path)
    _some("restart", steps)
    _some("restart", loops, "loop")
    if not callable(to) and not 0 <= to < 1:
        raise ValueError(f"restart goes back to a time in [0, 1), got to={to}")

    def check(ts):
        for t, s in zip(ts, np.broadcast_to(to(jnp.asarray(ts)) if callable(to) else to, len(ts)), strict=True):
            if not 0 <= s < t:
                raise ValueError(
                    f"restart at t={t:g} cannot go back to {s:g}: it needs an earlier time in [0, 1); restart at later "
                    "steps, or give to= an earlier time"
                )

    def correct(key, x, t, cond=None):
        t = over_batch(t, x)
        early = jnp.broadcast_to(jnp.asarray(to(t) if callable(to) else to, t.dtype), t.shape)
        early = jnp.where((0 <= early) & (early < t), early, jnp.nan)
        between = lambda share: early * (1 - share) + t * share  # both ends to the bit

        def forth(x, now):
            i, k = now
            return step(x, between(i / steps), between((i + 1) / steps), cond, k), None

        def loop(x, k):
            k_noise, k_steps = split(k, 2)
            x = paths.renoise(path, x, normal(k_noise, x.shape[1:], x.dtype), t, early)
            return jax.lax.scan(forth, x, (jnp.arange(steps, dtype=t.dtype), jnp.stack(split(k_steps, steps))))

        y, _ = jax.lax.scan(loop, x, jnp.stack(split(key, loops)))
        return y, {"moved": _rms(y - x)}

    return _with_check(correct, to, own=check)


def kernel_drift(
    p: Float[Array | np.ndarray, "m _ ..."], q: Float[Array | np.ndarray, "n _ ..."], *, ts, bandwidth: Schedule
) -> DirectionFn:
    """The drift from stored forward marginals ``p`` to backward ones ``q``, a direction that no one has to train:

    ``V(x) = sum_j w_j(x) q_j - sum_i w_i(x) p_i``, with ``w`` the softmax of ``-|x - y|^2 / (2 h^2)`` over the bank at
    the time of ``x``, ``h`` the ``bandwidth`` (drifting models, arXiv 2602.04770, with a Gaussian kernel). It is ``h^2
    (grad log q_h - grad log p_h)``, ``q_h`` and ``p_h`` the kernel density estimates (arXiv 2603.07514): a step of the
    classifier's kind, in displacement units and blind below ``h``. For Gaussians of variance ``C`` the mean moves by
    ``alpha h^2 / (C + h^2)`` of the gap, where ``alpha`` is ``marginal_matching``'s. Where ``h`` is far below the
    distance between neighbours, as it soon is for images, ``V`` is the difference of two single examples.

    The banks ``[examples, steps, ...]`` are as ``marginals.read`` has them (``m.x``; none may hold ``x`` itself),
    ``ts: [steps]`` the times of both. As parameters they are to be arguments of what is jitted around it. No network is
    evaluated; an example costs some ``4 (m + n) d`` operations. Only banks of times that occur in the batch are read.
    Raises ``ValueError`` for banks of other steps or shapes, and a bandwidth that is not positive; ``check`` refuses
    times that are not in ``ts``, where the result is ``nan``.
    """
    _positive("the bandwidth", bandwidth)
    index = grids.per_step(ts, np.arange(len(ts)))
    if not p.shape[1:] == q.shape[1:] == (len(ts), *q.shape[2:]):
        raise ValueError(
            f"kernel_drift needs banks [examples, {len(ts)} steps, ...] of one shape, got p {p.shape}, q {q.shape}"
        )

    def mean_shift(x, y, h):
        flat, y = x.reshape(len(x), -1), y.reshape(len(y), -1).astype(x.dtype)
        inner = jnp.matmul(flat, y.T, precision="highest") - _square(y) / 2  # |x|^2 is the same for all y
        return jnp.matmul(jax.nn.softmax(inner / h**2, 1), y, precision="highest").reshape(x.shape)

    def drift(x, t, cond=None):
        t = over_batch(t, x)
        n, h = index(t), jnp.reshape(jnp.asarray(_at(bandwidth, t, x), x.dtype), (-1, 1))

        def visit(v, i):
            here = n == i
            at = lambda bank: jax.lax.dynamic_index_in_dim(bank, i, 1, keepdims=False)
            new = lambda: jnp.where(expand(here, x), mean_shift(x, at(q), h) - mean_shift(x, at(p), h), v)
            return jax.lax.cond(here.any(), new, lambda: v), None

        return jax.lax.scan(visit, jnp.full_like(x, jnp.nan), jnp.arange(len(ts)))[0]

    return _with_check(drift, index, bandwidth)


def score_of(velocity: VelocityFn, *, path: paths.Path | None = None) -> DirectionFn:
    """The score of the law at ``t < 1`` from the velocity itself (``paths.score``): no second network.

    Only for a source N(0, I) that is independent of the data. Under an optimal transport coupling the score is not in
    the velocity: what comes out is the score of no law, nothing here can tell, and Langevin steps along it leave the
    marginals. (For pairs ``x1 = a x0``, with ``m = 1 - t + a t``, it is ``-x / ((1 - t) m)`` where the score is
    ``-x / m^2``: too steep wherever ``a > 0``, and infinite at the end.) There learn the score:
    ``methods.score_corrector``, ``methods.stochastic_interpolant``. Its ``check`` refuses times where ``alpha_t = 0``,
    the end. Raises ``ValueError`` for a path with a latent.
    """
    path = path or paths.linear()
    paths.refuse_latent("score_of", path)

    def check(ts):
        for t, alpha in zip(ts, np.asarray(path.coefficients(jnp.asarray(ts))[0]), strict=True):
            if not abs(alpha) > 8 * np.finfo(np.float32).eps:  # cos(pi / 2) in floating point is no zero
                raise ValueError(f"the score at t={t:g} is not in the velocity, for there is no noise; correct earlier")

    score = lambda x, t, cond=None: paths.score(path, x, velocity(x, t, cond), t)
    score.check = check
    return score


def nfe(corrector: str, *, each: int = 1, steps: int = 1, loops: int = 1) -> int:
    """Network evaluations of one correction, the ``corrector_nfe`` of ``samplers.cost``.

    =====================  ====================  ==================================================================
    corrector              evaluations           ``each`` is what one call costs of
    =====================  ====================  ==================================================================
    ``marginal_matching``  ``each``              the direction: 1 for a score, 2 for a classifier (forward and
                                                 backward), 0 for ``kernel_drift``
    ``langevin``           ``each steps``        the score: of a ``score_of`` 1
    ``mala``               ``each (steps + 1)``  the score and the log-density together
    ``restart``            ``each steps loops``  the step's own, or 1 for a flow map
    =====================  ====================  ==================================================================

    >>> nfe("restart", each=4, steps=3, loops=2)
    24

    Raises ``ValueError`` for another name, with the nearest.
    """
    counts = {
        "marginal_matching": each, "langevin": each * steps, "mala": each * (steps + 1), "restart": each * steps * loops
    }  # fmt: skip
    if corrector not in counts:
        near = difflib.get_close_matches(str(corrector), counts, 1, 0.0)[0]
        raise ValueError(f"no corrector {corrector!r}; did you mean {near!r}? (there are {', '.join(counts)})")
    return counts[corrector]


def dispersion_ratio(before: Float[Array, "b ..."], after: Float[Array, "b ..."]) -> Float[Array, ""]:
    """The summed variance of ``after`` over that of ``before``, over the batch: below 1 a correction contracts.

    On samples of the backward marginal itself, ``dispersion_ratio(q, fix(keys, q, t)[0])``, it tells whether a
    correction leaves a perfect model as it is: for ``N(0, b^2)`` it is ``(1 + (beta/b)^2) (1 - alpha sigma^2 / (b^2 +
    sigma^2))^2``, for ``tweedie`` ``(b^2 / (b^2 + sigma^2))^2``.
    """
    total = lambda x: jnp.sum(jnp.var(x.reshape(x.shape[0], -1), 0))
    return total(after) / total(before)


def _positive(what: str, value: Schedule) -> None:
    if not callable(value) and not value > 0:
        raise ValueError(f"{what} must be positive, got {value}")


def _some(what: str, count: int, of: str = "step") -> None:
    if count < 1:
        raise ValueError(f"{what} needs at least one {of}, got {of}s={count}")
