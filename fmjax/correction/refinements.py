"""Correctors made from velocities: a second flow at the end, variance descent, and moves that keep the flow's density.

None of them needs a trained score. Each is a corrector ``(key, x, t, cond) -> (x, info)``, as in ``correctors``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import paths
from fmjax.correction.correctors import Schedule, at_time, check_all, check_strength, mala
from fmjax.keys import as_keys, fold_in
from fmjax.sampling import divergence, draw_probes, evaluations, hutchinson, push_with_log_det
from fmjax.sampling.sample import sample
from fmjax.types import Corrector, Costed, FlowMapFn, VelocityFn, expand, over_batch


def second_flow(second: FlowMapFn, *, steps: int = 1) -> Corrector:
    """Return the correction of samples by a second flow, from samples of the first to data, in ``steps`` steps.

    The second flow has a time from 0 to 1 for itself and is trained by flow matching with samples of the first flow as
    the source (``sources.rows_of``; in a config ``source={"name": "data", "data": ...}``). With a coupling by optimal
    transport its paths are short, and one Euler step is enough for a small bias; with independent pairs one step would
    go to the mean of the data. A network whose output starts at zero, as in all of ``fmjax.nets``, starts at the
    identity.

    Args:
        second: a step of the second flow, ``(x, s, t, cond, key) -> x``, or its flow map.
        steps: number of uniform steps.

    Returns:
        A corrector of the end, ``t = 1``, at the cost of the steps.

    Raises:
        ValueError: ``steps`` below 1.

    >>> from fmjax import sampling
    >>> fix = second_flow(sampling.euler(lambda x, t, cond=None: 1.0 - x))
    >>> fix(jax.random.key(0), jnp.zeros((1, 1)), 1.0)[0].tolist(), fix.nfe
    ([[1.0]], 1)

    Source: BFR (arXiv 2601.21182).
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: no step. Give at least 1.")

    def correct(key, x, t, cond=None):
        y = sample(second, x, steps, cond=cond, key=None if key is None else as_keys(key, len(x)))
        return y, {"moved": _rms(y - x)}

    return Costed(correct, evaluations(second, calls=steps), _only_at_the_end)


def variance_descent(velocity: VelocityFn, *, strength: Schedule, probes: int | None = None) -> Corrector:
    """Return the correction ``x - strength grad_x div v(x, t)``, which descends the variance of the data given ``x``.

    On the linear path ``div v = t / (1 - t)^3 tr Cov(x1 | x) - d / (1 - t)``: samples move to where fewer data compete.
    It leaves a Gaussian alone, whose divergence is constant, and narrows the modes of a mixture; it is a bias that may
    help a flow which blurs, not a correction that keeps the marginal.

    Args:
        velocity: ``v(x, t, cond)``, twice differentiable.
        strength: a number, or a function of the times ``[B]``; in units of ``x^2``, times a time.
        probes: number of Hutchinson probes of each example; ``None`` for the exact divergence (small ``d``).

    Returns:
        A corrector that costs one evaluation of the velocity and its second derivatives; ``info`` has ``moved: [B]``.

    Raises:
        ValueError: a strength that is not finite.

    >>> fix = variance_descent(lambda x, t, cond=None: x**3, strength=0.1)
    >>> round(float(fix(jax.random.key(0), jnp.ones((1, 1)), 0.5)[0][0, 0]), 4)
    0.4

    Source: FDS (arXiv 2604.04646).
    """
    check_strength("strength", strength)

    def correct(key, x, t, cond=None):
        t = over_batch(t, x)
        e = None if probes is None else draw_probes(as_keys(key, len(x)), probes, x.shape[1:], dtype=x.dtype)

        def total(x):
            out = divergence(velocity, x, t, cond) if e is None else hutchinson(velocity, x, t, e, cond)
            return out[1].sum()

        push = -at_time(strength, t, x) * jax.grad(total)(x)
        return x + push, {"moved": _rms(push)}

    return Costed(correct, evaluations(velocity), check_all(velocity, strength))


def flow_mala(
    velocity: VelocityFn, *, step: Schedule, steps: int = 1, solver_steps: int = 8, path: paths.Path = paths.linear()
) -> Corrector:
    """Return Metropolis-adjusted Langevin moves that leave the distribution of the flow at ``t`` unchanged.

    The density is the flow's, by ``solver_steps`` RK4 steps to the source and the exact divergence, the score its
    gradient: at ``t = 1`` the moves keep the distribution of the samples themselves. What they change is which sample a
    noise leads to: moves mix, and a flow that is wrong stays wrong.

    Args:
        velocity: ``v(x, t, cond)``.
        step: size of a move, in units of squared displacement.
        steps: number of moves.
        solver_steps: RK4 steps of a density.
        path: the path of the flow, from N(0, I) at ``t = 0``.

    Returns:
        A corrector as ``mala``, for times above 0, at the cost of ``8 solver_steps (steps + 1)`` evaluations, and as
        many divergences.

    Raises:
        ValueError: as ``mala``; a path that does not start at t = 0 with N(0, I).

    >>> fix = flow_mala(lambda x, t, cond=None: 0 * x, step=0.1)
    >>> y, info = fix(jax.random.key(0), jnp.ones((2, 1)), 1.0)
    >>> y.shape, fix.nfe
    ((2, 1), 128)

    Source: arXiv 2605.06905.
    """
    alpha, beta, *_ = path.coefficients(jnp.zeros(()))
    if path.span[0] != 0 or abs(float(alpha) - 1) > 1e-6 or abs(float(beta)) > 1e-6:
        raise ValueError(f"path={path!r:.40}: does not start at N(0, I). Take a path such as 'linear'.")

    def log_density(x, t, cond=None):
        y, log_det = push_with_log_det(velocity, x, np.linspace(1, 0, solver_steps + 1), cond, until=t)
        return log_det - 0.5 * jnp.sum(y.reshape(len(x), -1) ** 2 + jnp.log(2 * jnp.pi), 1)

    score = lambda x, t, cond=None: jax.grad(lambda y: log_density(y, t, cond).sum())(x)
    nfe = evaluations(velocity, calls=4 * solver_steps)
    return mala(Costed(score, nfe, _after_the_start), Costed(log_density, nfe), step=step, steps=steps)


def corrected_step(step: FlowMapFn, corrector: Corrector, *, ts, at: tuple[int, ...], seed: int = 0) -> FlowMapFn:
    """Return a step with the corrections of a sampler built in: before the steps ``at`` of the grid ``ts``.

    So ``correction.build_marginals(view, ..., solver="flow_map")`` with ``view(params)`` this step builds the forward
    marginals of the *corrected* sampler, on which the next round of correctors trains. What is stored at a corrected
    time is the state before its correction, which is what a corrector there meets.

    Args:
        step: a step of the flow.
        corrector: the corrector of the round before.
        ts: the grid of the sampler.
        at: indices of the corrected steps; the last index, a correction of the end, is left to the sampler.
        seed: seed of the noise of the corrections. A step has no key here: each example draws from its own state.

    Returns:
        A step ``(x, s, t, cond, key) -> x``.

    Raises:
        ValueError: an index outside ``0 .. N - 1``.

    >>> from fmjax import sampling
    >>> halve = lambda key, x, t, cond=None: (x / 2, {})
    >>> step = corrected_step(sampling.euler(lambda x, t, cond=None: 0 * x), halve, ts=[0.0, 0.5, 1.0], at=(1,))
    >>> sampling.sample(step, jnp.ones((1, 1)), [0.0, 0.5, 1.0], trajectory=True)[:, 0, 0].tolist()
    [1.0, 1.0, 0.5]
    """
    grid = np.asarray(ts, np.float32)
    if not all(0 <= i < len(grid) - 1 for i in at):
        raise ValueError(f"at={at}: there are the steps 0 .. {len(grid) - 2}. Give some of these.")
    starts = jnp.asarray(grid[list(at)])

    def move(x, s, t, cond=None, key=None):
        s, t = over_batch(s, x), over_batch(t, x)
        now = jnp.any(jnp.abs(s[:, None] - starts) < 1e-6, 1)

        def correct(x):
            keys = _own_keys(x, seed) if key is None else fold_in(as_keys(key, len(x)), 1)
            return jnp.where(expand(now, x), corrector(keys, x, s, cond)[0], x).astype(x.dtype)

        return step(jax.lax.cond(now.any(), correct, lambda x: x, x), s, t, cond, key)

    return Costed(move, None if not at else evaluations(step, corrector))


def _own_keys(x, seed: int):
    """Return one key per example, a function of its state, so that a build needs no keys and stays resumable."""
    bits = jax.lax.bitcast_convert_type(x.reshape(len(x), -1).astype(jnp.float32), jnp.uint32)
    fold = lambda row: jax.lax.fori_loop(0, row.size, lambda i, k: jax.random.fold_in(k, row[i]), jax.random.key(seed))
    return jax.vmap(fold)(bits)


def _only_at_the_end(ts) -> None:
    if any(abs(t - 1) > 1e-6 for t in np.asarray(ts).tolist()):
        raise ValueError(f"ts={np.asarray(ts).tolist()}: a second flow corrects the end. Give at=(N,).")


def _after_the_start(ts) -> None:
    if any(t <= 0 for t in np.asarray(ts).tolist()):
        raise ValueError("ts=0: the density of the flow is the source's there. Correct at later steps.")


def _rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x.reshape(len(x), -1)), 1))
