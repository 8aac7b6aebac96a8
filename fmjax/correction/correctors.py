"""Correct a sample at one time, between two solver steps: ``corrector(key, x, t, cond) -> (x, info)``.

``marginal_matching`` pushes along a direction: of a trained method, or ``kernel_drift``, which needs no training.
``langevin``, ``mala`` and ``restart`` need no training either.

``info["moved"]: [B]`` is the root-mean-square displacement of each example. ``mala`` adds ``info["accepted"]: [B]``;
``marginal_matching`` adds ``info["noised"]: [B, ...]``, the state after the noise and before the push, from which a
parallel sampler steps. All other values of ``info`` are arrays ``[B]``.

A schedule (``alpha``, ``beta``, ``step``, ``snr``, ``to``, ``bandwidth``) is a number or a function of the times
``[B]``; ``sampling.grids.per_step`` makes one of an array over the grid.

Every corrector is a ``types.Costed``. Its ``nfe`` counts a direction, score, density or step that states no cost as one
network evaluation. Its ``check(ts)`` raises ``ValueError`` for times at which the corrector, or one of the functions it
was made from, cannot work; ``sampling.sample`` calls it before it starts.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import checks, paths
from fmjax.keys import as_keys, normal, split
from fmjax.sampling import evaluations
from fmjax.sampling.states import wide_state
from fmjax.types import Corrector, Costed, DirectionFn, FlowMapFn, accept, expand, over_batch, stated

Schedule = float | Callable[[Array], Array]


def marginal_matching(direction: DirectionFn, *, alpha: Schedule, beta: Schedule = 0.0) -> Corrector:
    """Return the correction of marginal matching: noise, then a push along a direction.

    ``x~ = x + beta z``, ``z ~ N(0, I)``, then ``x' = x~ + alpha h(x~, t)``.

    Args:
        direction: ``h(x, t, cond)``, in displacement units (for a score corrector ``h = sigma^2 S``; see ``preset``).
        alpha: size of the push: a number, or a function of the times ``[B]``.
        beta: standard deviation of the noise: a number, or a function of the times ``[B]``. At the number 0 no noise
            is drawn and the key may be ``None``.

    Returns:
        A corrector that costs what ``direction`` costs; ``info`` has ``moved: [B]`` and ``noised: [B, ...]``.

    Raises:
        ValueError: a negative ``beta``, and strengths that are not finite.

    >>> pull = lambda x, t, cond=None: -x
    >>> y, info = marginal_matching(pull, alpha=0.5)(None, jnp.ones((2, 1)), 1.0)
    >>> y.tolist(), info["moved"].tolist()
    ([[0.5], [0.5]], [0.5, 0.5])

    Source: OpenReview kRjLBXWn1T, Algorithm 1.
    """
    check_strength("alpha", alpha)
    check_strength("beta", beta)
    if not callable(beta) and beta < 0:
        raise ValueError(f"beta={beta}: a standard deviation cannot be negative. Give 0 for no noise.")

    def correct(key, x, t, cond=None):
        t = over_batch(t, x)
        noised = x
        if callable(beta) or beta != 0:
            noised = x + at_time(beta, t, x) * normal(as_keys(key, len(x)), x.shape[1:], x.dtype)
        if not callable(alpha) and alpha == 0:
            return noised, {"noised": noised, "moved": jnp.zeros(x.shape[0])}
        push = at_time(alpha, t, x) * direction(noised, t, cond)
        return noised + push, {"noised": noised, "moved": _rms(push)}

    return Costed(correct, evaluations(direction), check_all(direction, alpha, beta))


def preset(
    name: str,
    sigma: Schedule | None = None,
    *,
    alpha: Schedule | None = None,
    beta: Schedule | None = None,
    lam: float | None = None,
) -> dict[str, Schedule]:
    """Return ``alpha`` and ``beta`` of ``marginal_matching`` by name, for a score corrector of noise level ``sigma``.

    The preset ``transport`` is of a classifier with the gradient penalty ``lam``, whose push has the natural strength
    ``alpha = 8 lam`` and leaves a perfect model alone (``correction.sobolev_drift`` has ``alpha = 1``). The others,
    with ``q`` the backward marginal and ``b`` its standard deviation, if it is Gaussian:

    ============  =========  =========  ==============================================================================
    name          alpha      beta       effect on a perfect model, ``p = q``
    ============  =========  =========  ==============================================================================
    ``paper``     you give   you give   (the paper chooses both by a grid search)
    ``tweedie``   1          0          contracts by ``b^2 / (b^2 + sigma^2)``: moves to the posterior mean of ``x``
    ``w2``        1/2        0          half of that, to leading order; no step without noise brings
                                        ``q * N(0, sigma^2)`` nearer to ``q`` in W2
    ``langevin``  1/2        sigma      nearly none, ``b`` becomes ``b (1 + (sigma / b)^4 / 8)``; to first order a
                                        Langevin step of size ``h = sigma^2 / 2``
    ============  =========  =========  ==============================================================================

    Args:
        name: one of the table.
        sigma: noise level that the corrector was trained with: a number, or a function of the times ``[B]``.
        alpha: size of the push, for ``paper`` only.
        beta: standard deviation of the noise, for ``paper`` only.
        lam: gradient penalty of the classifier, for ``transport`` only.

    Returns:
        The keyword arguments ``alpha`` and ``beta``.

    Raises:
        ValueError: an unknown name; ``paper`` without both numbers, another name with one; ``sigma`` not positive;
            ``transport`` with anything but ``lam``, another name with it.

    >>> preset("langevin", 0.3), preset("transport", lam=0.25)
    ({'alpha': 0.5, 'beta': 0.3}, {'alpha': 2.0, 'beta': 0.0})

    Source: OpenReview kRjLBXWn1T.
    """
    if name == "transport":
        if (sigma, alpha, beta) != (None, None, None) or lam is None:
            raise ValueError(f"lam={lam}: preset 'transport' needs lam, the gradient penalty, alone. Give lam=...")
        check_positive("lam", lam)
        return {"alpha": 8.0 * lam, "beta": 0.0}
    if sigma is None or lam is not None:
        raise ValueError(f"sigma={sigma}, lam={lam}: preset {name!r} needs sigma, and no lam. Give sigma.")
    check_positive("sigma", sigma)
    fixed = {"tweedie": (1.0, 0.0), "w2": (0.5, 0.0), "langevin": (0.5, sigma)}
    names = ("paper", "transport", *fixed)
    checks.check_choice("preset", name, names)
    if name == "paper":
        if alpha is None or beta is None:
            raise ValueError(f"alpha={alpha}, beta={beta}: preset 'paper' has no values for them. Give both.")
        return {"alpha": alpha, "beta": beta}
    if alpha is not None or beta is not None:
        raise ValueError(f"alpha={alpha}, beta={beta}: preset {name!r} sets both. Use preset 'paper' to give them.")
    alpha, beta = fixed[name]
    return {"alpha": alpha, "beta": beta}


def langevin(
    score: DirectionFn, *, step: Schedule | None = None, snr: Schedule | None = None, steps: int = 1
) -> Corrector:
    """Return a correction by unadjusted Langevin steps.

    ``x <- x + h S(x, t) + sqrt(2 h) z``, ``steps`` times. Its stationary distribution has the score ``S`` up to the
    discretisation: for ``N(0, b^2)`` the stationary variance is ``b^2 / (1 - h / (2 b^2))``.

    Args:
        score: ``S(x, t, cond)``, the score of the marginal at ``t``.
        step: ``h``, in units of squared displacement: a number, or a function of the times ``[B]``.
        snr: in place of ``step``, the ratio of the push to the noise: ``h = 2 (snr |z| / |S|)^2``, with the norms of
            each example, where the authors' code averages norms over the batch.
        steps: number of steps.

    Returns:
        A corrector that costs ``steps`` evaluations of ``score``; ``info`` has ``moved: [B]``.

    Raises:
        ValueError: both or none of ``step`` and ``snr``, one that is not positive, or ``steps`` below 1.

    >>> fix = langevin(lambda x, t, cond=None: -x, step=0.1, steps=3)
    >>> y, info = fix(jax.random.key(0), jnp.ones((2, 1)), 1.0)
    >>> y.shape, info["moved"].shape, fix.nfe
    ((2, 1), (2,), 3)

    Source: arXiv 2011.13456, Algorithm 4 (``snr``; Algorithm 5, for ``vp``, has a smaller ``h`` by a factor that is
    near 1).
    """
    if (step is None) == (snr is None):
        raise ValueError(f"step={step}, snr={snr}: exactly one sets the size. Give step (h itself), or snr.")
    check_positive("step" if snr is None else "snr", step if snr is None else snr)
    _check_count("steps", steps)

    def correct(key, x, t, cond=None):
        (x, dtype), t = wide_state("x", x), over_batch(t, x)

        def move(x, k):
            s, z = score(x, t, cond), normal(k, x.shape[1:], x.dtype)
            if snr is None:
                h = at_time(step, t, x)
            else:
                h = 2 * at_time(snr, t, x) ** 2 * expand(_square(z) / _square(s), x)
            return (x + h * s + jnp.sqrt(2 * h) * z).astype(x.dtype), None

        y, _ = jax.lax.scan(move, x, jnp.stack(split(as_keys(key, len(x)), steps)))
        return y.astype(dtype), {"moved": _rms(y - x)}

    return Costed(correct, evaluations(score, calls=steps), check_all(score, step, snr))


def mala(
    score: DirectionFn, log_density: Callable[..., Float[Array, " b"]], *, step: Schedule, steps: int = 1
) -> Corrector:
    """Return a correction by Metropolis-adjusted Langevin steps.

    The proposal ``y`` is the step of ``langevin``; it is accepted with the probability ``min(1, r)``,

    ``log r = log p(y) - log p(x) + (|z|^2 - |z'|^2) / 2``, where ``z' = (x - y - h S(y)) / sqrt(2 h)`` leads back.

    The stationary distribution is ``p`` itself for any ``h`` and any score ``S``; both affect the acceptance rate
    only. A proposal whose ``log r`` is not a number is rejected.

    Args:
        score: ``S(x, t, cond)``, the score of the marginal at ``t``.
        log_density: ``log p(x, t, cond): [B]``, up to a constant for each ``t``: exact, minus an energy, or of a flow
            at the end (``sampling.likelihood.log_density``).
        step: ``h``, in units of squared displacement: a number, or a function of the times ``[B]``.
        steps: number of steps.

    Returns:
        A corrector that costs ``steps + 1`` evaluations of ``score`` and of ``log_density``; ``info`` has ``moved:
        [B]`` and ``accepted: [B]``, the fraction of accepted steps.

    Raises:
        ValueError: ``step`` that is not positive, or ``steps`` below 1.

    >>> fix = mala(lambda x, t, cond=None: -x, lambda x, t, cond=None: -jnp.sum(x**2, 1) / 2, step=0.01)
    >>> y, info = fix(jax.random.key(0), jnp.ones((2, 1)), 1.0)
    >>> info["accepted"].tolist(), fix.nfe
    ([1.0, 1.0], 4)

    Source: arXiv 2605.06905, for flows.
    """
    check_positive("step", step)
    _check_count("steps", steps)

    def correct(key, x, t, cond=None):
        (x, dtype), t = wide_state("x", x), over_batch(t, x)
        h = at_time(step, t, x)
        state = lambda x: (x, score(x, t, cond).astype(x.dtype), log_density(x, t, cond).astype(x.dtype))

        def move(now, k):
            (x, s, log_p), (k_noise, k_accept) = now, split(k, 2)
            z = normal(k_noise, x.shape[1:], x.dtype)
            y, s_y, log_p_y = proposal = state(x + h * s + jnp.sqrt(2 * h) * z)
            back = (x - y - h * s_y) / jnp.sqrt(2 * h)
            log_r = log_p_y - log_p + (_square(z) - _square(back)) / 2
            accepted = jnp.log(jax.vmap(jax.random.uniform)(k_accept)) < log_r
            return jax.tree.map(lambda new, old: jnp.where(expand(accepted, new), new, old), proposal, now), accepted

        (y, *_), accepted = jax.lax.scan(move, state(x), jnp.stack(split(as_keys(key, len(x)), steps)))
        return y.astype(dtype), {"moved": _rms(y - x), "accepted": accepted.mean(0)}

    nfe = evaluations(score, log_density, calls=steps + 1)
    return Costed(correct, nfe, check_all(score, log_density, step))


def restart(
    step: FlowMapFn, *, to: Schedule, steps: int = 1, loops: int = 1, path: paths.Path = paths.linear()
) -> Corrector:
    """Return a correction that goes back in time by noise and forth again by solver steps.

    ``x <- c x + sqrt(alpha_s^2 - c^2 alpha_t^2) z``, ``c = beta_s / beta_t``, ``s = to`` (``paths.renoise``), then
    ``steps`` uniform steps from ``s`` to ``t``; all of it ``loops`` times. An exact step leaves the marginal at ``t``
    unchanged. For Gaussian data with variances ``C`` on the path, a loop shrinks the error of ``x`` by
    ``c sqrt(C_t / C_s)``.

    Args:
        step: a step of the ODE, or a flow map (``steps=1``).
        to: the earlier time ``s``: a number in [0, 1), or a function of the times ``[B]``.
        steps: steps per loop.
        loops: number of loops.
        path: path of the flow, without a latent; its source N(0, I) is independent of the data.

    Returns:
        A corrector that costs ``steps * loops`` steps; ``info`` has ``moved: [B]``. Its ``check`` refuses times that
        are not later than ``to``, so always ``t = 0``; at such times the result is ``nan``.

    Raises:
        ValueError: a path with a latent, ``to`` outside [0, 1), ``steps`` or ``loops`` below 1.

    >>> fix = restart(lambda x, s, t, cond=None, key=None: x, to=0.5, steps=3, loops=2)
    >>> fix(jax.random.key(0), jnp.ones((2, 1)), 1.0)[0].shape, fix.nfe
    ((2, 1), 6)

    Source: arXiv 2306.14878.
    """
    paths.refuse_latent("restart", path)
    _check_count("steps", steps)
    _check_count("loops", loops)
    if not callable(to) and not 0 <= to < 1:
        raise ValueError(f"to={to}: restart goes back to a time before the end. Give a time in [0, 1).")

    def check(ts):
        early = np.broadcast_to(to(jnp.asarray(ts)) if callable(to) else to, len(ts))
        for t, s in zip(ts, early, strict=True):
            if not 0 <= s < t:
                raise ValueError(
                    f"to={s:g}: restart at t={t:g} needs an earlier time in [0, 1). Restart at later steps, or give an "
                    "earlier time."
                )

    def correct(key, x, t, cond=None):
        (x, dtype), t = wide_state("x", x), over_batch(t, x)
        early = jnp.broadcast_to(jnp.asarray(to(t) if callable(to) else to, t.dtype), t.shape)
        early = jnp.where((0 <= early) & (early < t), early, jnp.nan)

        def loop(x, k):
            k_noise, k_steps = split(k, 2)
            x = paths.renoise(path, x, normal(k_noise, x.shape[1:], x.dtype), t, early)
            return _uniform_steps(step, k_steps, x, early, t, cond, steps), None

        y, _ = jax.lax.scan(loop, x, jnp.stack(split(as_keys(key, len(x)), loops)))
        return y.astype(dtype), {"moved": _rms(y - x)}

    return Costed(correct, evaluations(step, calls=steps * loops), check_all(step, to, also=check))


def _uniform_steps(step, keys, x, s, t, cond, steps: int) -> Array:
    """Carry ``x`` from the times ``s`` to the times ``t`` by uniform steps."""
    between = lambda fraction: s * (1 - fraction) + t * fraction  # both ends to the bit

    def body(x, now):
        i, k = now
        return step(x, between(i / steps), between((i + 1) / steps), cond, k).astype(x.dtype), None

    return jax.lax.scan(body, x, (jnp.arange(steps, dtype=t.dtype), jnp.stack(split(keys, steps))))[0]


def at_time(value: Schedule, t: Array, x: Array) -> Array | float:
    """Return the values of a schedule, ready to multiply ``x``.

    Args:
        value: a number, or a function of the times.
        t: times ``[B]``.
        x: states ``[B, ...]``.

    Returns:
        The number, or an array that broadcasts against ``x``, of its dtype.
    """
    return expand(value(t), x).astype(x.dtype) if callable(value) else value


def check_all(*functions, also: Callable[[Array], None] = accept) -> Callable[[Array], None]:
    """Return a check of times that calls the checks of several functions.

    Args:
        functions: what a corrector was made from; numbers and plain functions accept all times.
        also: another check, called last.

    Returns:
        ``check(ts)``, which raises ``ValueError`` where one of the checks does.
    """
    each = [*(stated(function).check for function in functions if callable(function)), also]

    def check(ts):
        for refuse in each:
            refuse(ts)

    return check


def check_positive(name: str, value: Schedule) -> None:
    """Raise ``ValueError`` for a number that is not positive; a function of time is not evaluated.

    Args:
        name: name of the argument.
        value: a number, or a function of the times.
    """
    check_strength(name, value)
    if not callable(value) and not value > 0:
        raise ValueError(f"{name}={value}: not positive. Give a number above 0.")


def check_strength(name: str, value: Schedule) -> None:
    """Raise ``ValueError`` for a value that is neither a finite number nor a function of time.

    Args:
        name: name of the argument.
        value: a number, or a function of the times.
    """
    if callable(value) or isinstance(value, jax.Array):
        return
    if value not in checks.Range():
        raise ValueError(f"{name}={value!r:.80}: not a finite number. Give a number, or a function of time.")


def _check_count(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
        raise ValueError(f"{name}={count!r:.80}: not a number of times. Give a whole number of at least 1.")


def _square(x: Array) -> Array:
    return jnp.sum(jnp.square(x.reshape(x.shape[0], -1)), 1)


def _rms(x: Array) -> Array:
    return jnp.sqrt(_square(x) / x[0].size)
