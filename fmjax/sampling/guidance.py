"""Guidance: velocities that go past the conditional velocity, and corrected velocities.

One meaning of the scale everywhere: ``v = v_base + w (v_goal - v_base)``, so that ``w = 1`` is no guidance and returns
the same function. A scale is a number or a function of the times ``[B]``, for example ``interval``.

A guided velocity states its evaluations (``types.Costed``), and every step counts them. It is not the velocity of any
model distribution: classifier-free guidance does not sample the tilted distribution ``p(x|null)^{1-w} p(x|c)^w`` at
``t = 1`` (two Gaussians of variances ``V0, Vc`` end at ``V0^{1-w} Vc^w``, the tilt has ``1 / ((1-w)/V0 + w/Vc)``); the
two agree where the variances do. It is not the velocity of an unguided flow map either: guide the teacher on which the
flow map is trained (``guided_training``).

``added`` (a residual velocity) and ``density_ratio`` (a discriminator) correct a velocity; scale 0 is no correction.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import checks, paths
from fmjax.sampling.costs import evaluations
from fmjax.types import Cond, Costed, FlowMapFn, VelocityFn, expand, over_batch, stated, with_null

Scale = float | Callable[[Array], Array]


def classifier_free(
    conditional: VelocityFn, *, null: Cond, scale: Scale | None = None, weight: Any = None
) -> VelocityFn:
    """Return the velocity of classifier-free guidance, ``v(x, t, null) + scale (v(x, t, cond) - v(x, t, null))``.

    Give ``scale`` (1: no guidance) or the paper's ``weight``, ``v_cond + weight (v_cond - v_null)``, which is
    ``scale - 1``. Sources: arXiv 2207.12598 (in weights), 2311.13443 (for flows).

    Args:
        conditional: ``v(x, t, cond)`` of a network that was trained with ``label_dropout``.
        null: the condition that stands for a dropped one in training: a value that broadcasts against ``cond`` leaf by
            leaf (for the networks of ``nets`` the label ``classes``), or ``None``.
        scale: a number, or a function of times ``[B]``; with ``interval`` the second evaluation happens only inside.
        weight: a number, ``scale - 1``.

    Returns:
        A velocity of twice the evaluations; ``conditional`` itself for ``scale=1``.

    Raises:
        ValueError: for both or neither of ``scale`` and ``weight``, a number that is not finite, and, when evaluated,
            for ``cond=None``.
        TypeError: for a ``weight`` that is a function.

    >>> import jax.numpy as jnp
    >>> velocity = lambda x, t, cond: x + cond[:, None]
    >>> guided = classifier_free(velocity, null=2, scale=3.0)
    >>> guided(jnp.zeros((2, 1)), 0.5, jnp.array([0, 1])).tolist(), guided.nfe
    ([[-4.0], [-1.0]], 2)
    """
    if (scale is None) == (weight is None):
        raise ValueError(f"scale={scale}, weight={weight}: give one of them. Note that weight = scale - 1.")
    if callable(weight):
        raise TypeError("weight=function: only scale may be a function of time. Write scale=interval(...).")
    scale = 1 + weight if scale is None else scale
    check_scale(scale)
    if not callable(scale) and scale == 1:
        return conditional

    def base(x, t, cond):
        if cond is None:
            raise ValueError("cond=None: classifier-free guidance needs a condition. Pass labels, or use scale=1.")
        return conditional(x, t, with_null(cond, null))

    return _guide(conditional, base, scale, evaluations(conditional, calls=2))


def autoguidance(strong: VelocityFn, weak: VelocityFn, *, scale: Scale) -> VelocityFn:
    """Return the velocity of autoguidance, ``v_weak + scale (v_strong - v_weak)`` (arXiv 2406.02507).

    Args:
        strong: the velocity to sample from.
        weak: the velocity of a smaller or less trained model of the same data; it gets the same condition.
        scale: a number, or a function of times ``[B]``; 1 is no guidance.

    Returns:
        A velocity that evaluates both; ``strong`` itself for ``scale=1``.

    Raises:
        ValueError: for a scale that is not finite.

    >>> import jax.numpy as jnp
    >>> guided = autoguidance(lambda x, t, cond=None: -x, lambda x, t, cond=None: 0 * x, scale=2.0)
    >>> guided(jnp.ones((1, 1)), 0.5).tolist(), guided.nfe
    ([[-2.0]], 2)
    """
    check_scale(scale)
    return strong if not callable(scale) and scale == 1 else _guide(strong, weak, scale, evaluations(strong, weak))


def interval(
    scale: float, *, low: float = -math.inf, high: float = math.inf, path: paths.Path = paths.linear()
) -> Callable[[Array], Array]:
    """Return a scale that guides only where ``low <= log SNR(t) <= high``, and is 1 elsewhere (arXiv 2404.07724).

    ``log SNR = 2 log(beta_t / alpha_t)`` runs from ``-inf`` at the noise to ``+inf`` at the data; a noise level
    ``sigma = alpha / beta`` is ``-2 log(sigma)``. So an interval does not change with the path. A solver evaluates both
    velocities only when a time of the batch lies inside; outside, the result is the unguided one to the bit. Put the
    ends of the interval on the solver's grid: a step across an end sees a jump and loses its order there.

    Args:
        scale: the scale inside.
        low: smallest log SNR with guidance.
        high: largest log SNR with guidance.
        path: the path of the velocity.

    Returns:
        A function of times ``[B]``.

    Raises:
        ValueError: for an empty interval, a scale that is not finite, or a path with a latent.

    >>> import jax.numpy as jnp
    >>> interval(3.0, low=0.0)(jnp.array([0.0, 0.4, 0.6, 1.0])).tolist()
    [1.0, 1.0, 3.0, 3.0]
    """
    check_scale(scale)
    if not low < high:
        raise ValueError(f"low={low}, high={high}: an empty interval of log SNR. Give low < high.")
    paths.refuse_latent("an interval of log SNR", path)

    def at(t):
        alpha, beta = path.coefficients(t)
        # squares: cos(pi / 2) is slightly negative in float32, and its logarithm would be nan
        log_snr = jnp.log(jnp.square(beta)) - jnp.log(jnp.square(alpha))
        return jnp.where((low <= log_snr) & (log_snr <= high), scale, jnp.ones_like(t))

    return at


def at_scale(fn: VelocityFn | FlowMapFn, scale: float) -> Costed:
    """Return a velocity or flow map of conditions ``(labels, w)`` as one of labels, with ``w = scale`` throughout.

    Args:
        fn: a velocity ``(x, t, cond)`` or a flow map ``(x, s, t, cond, key)`` whose network takes the guidance scale.
        scale: the guidance scale, positive.

    Returns:
        A function with the signature and the cost of ``fn``.

    Raises:
        ValueError: for a scale that is not finite and positive and, when evaluated, for ``cond=None``.

    >>> import jax.numpy as jnp
    >>> velocity = lambda x, t, cond: x * cond[1][:, None]
    >>> at_scale(velocity, 3.0)(jnp.ones((1, 1)), 0.5, jnp.array([0])).tolist()
    [[3.0]]
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: not positive and finite. Use 1 for no guidance.")
    inner = stated(fn)
    signature = inspect.signature(inner.apply)

    def scaled(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        x, cond = call.arguments["x"], call.arguments.get("cond")
        if cond is None:
            raise ValueError("cond=None: a network that takes the guidance scale needs labels. Pass cond.")
        call.arguments["cond"] = (cond, jnp.full(x.shape[0], scale, jnp.float32))
        return fn(*call.args, **call.kwargs)

    return Costed(scaled, evaluations(fn), inner.check)


def added(velocity: VelocityFn, residual: VelocityFn) -> Costed:
    """Return the sum ``v + r`` of a frozen velocity and a residual one (``methods.residual``).

    Args:
        velocity: ``v(x, t, cond)``.
        residual: ``r(x, t, cond)``.

    Returns:
        A velocity that evaluates both.

    >>> import jax.numpy as jnp
    >>> both = added(lambda x, t, cond=None: x, lambda x, t, cond=None: 2 * x)
    >>> both(jnp.ones((1, 1)), 0.5).tolist(), both.nfe
    ([[3.0]], 2)
    """
    return Costed(lambda x, t, cond=None: velocity(x, t, cond) + residual(x, t, cond), evaluations(velocity, residual))


def density_ratio(
    velocity: VelocityFn, gradient: VelocityFn, *, scale: Scale = 1.0, path: paths.Path = paths.linear()
) -> VelocityFn:
    """Return the velocity of discriminator guidance, ``v + scale c(t) g`` (arXiv 2211.17091).

    ``g = grad log(D / (1 - D))`` of a discriminator ``D`` of data and samples of ``velocity``, both noised by ``path``
    (``methods.discriminator``). A velocity is affine in the score of its distribution, with the slope
    ``c = alpha W / beta``, ``W = alpha beta' - alpha' beta`` (linear: ``(1 - t) / t``), for a source ``N(0, I)`` that
    is independent of the data; a latent of ``path`` is part of it. With the exact ``g = S_data - S_model`` the sum is
    the velocity of the data. Where ``beta = 0`` both distributions are the source, and nothing is added. Just after,
    ``c`` is large and amplifies the error of a learned ``g``: a ``scale`` that begins at 0 may be needed.

    Args:
        velocity: ``v(x, t, cond)``.
        gradient: ``g(x, t, cond)``, a forward and a backward pass of ``D`` unless it states another cost.
        scale: a number, or a function of times ``[B]``; 1 is the whole correction.
        path: the path of the velocity.

    Returns:
        A velocity that evaluates both; ``velocity`` itself for ``scale=0``.

    Raises:
        ValueError: for a scale that is not finite.

    >>> import jax.numpy as jnp
    >>> guided = density_ratio(lambda x, t, cond=None: x, lambda x, t, cond=None: x)
    >>> guided(jnp.ones((1, 1)), 0.5).tolist(), guided.nfe
    ([[2.0]], 3)
    """
    known = callable(scale) or isinstance(scale, jax.Array)
    if not known and scale not in checks.Range():
        raise ValueError(f"scale={scale}: not a finite number or a function of time. Use 0 for no correction.")
    if not callable(scale) and scale == 0:
        return velocity
    path = paths.one_sided(path)

    def guided(x, t, cond=None):
        t = over_batch(t, x)
        w = expand(scale(t), x).astype(x.dtype) if callable(scale) else scale
        late = jnp.where(path.coefficients(t)[1] > 0, t, 1.0)  # alpha = 0 at t = 1, and with it c
        push = paths.convert(path, jnp.zeros_like(x), gradient(x, t, cond), late, kind="score", to="velocity")
        return velocity(x, t, cond) + w * push

    counts = evaluations(velocity), evaluations(gradient, default=2)
    return Costed(guided, None if None in counts else sum(counts))


def check_scale(scale: Scale) -> None:
    """Raise ``ValueError`` for a guidance scale that is not finite.

    Args:
        scale: a number, or a function of time.
    """
    known = callable(scale) or isinstance(scale, jax.Array)
    if not known and scale not in checks.Range():
        raise ValueError(f"scale={scale}: not a finite number or a function of time. Use 1 for no guidance.")


def _guide(goal: VelocityFn, base: VelocityFn, scale: Scale, nfe: int | None) -> Costed:
    """``v_base + w(t) (v_goal - v_base)``; where ``w(t) = 1`` for the whole batch only ``goal`` is evaluated."""

    def towards(w, x, t, cond):
        v, v_base = goal(x, t, cond), base(x, t, cond)
        return v, v_base + w * (v - v_base)

    if not callable(scale):
        return Costed(lambda x, t, cond=None: towards(scale, x, t, cond)[1], nfe)

    def velocity(x, t, cond=None):
        w = expand(scale(over_batch(t, x)), x).astype(x.dtype)

        def guided():
            v, pushed = towards(w, x, t, cond)
            return jnp.where(w == 1, v, pushed)  # not rounded: an example outside the interval is unguided to the bit

        return jax.lax.cond(jnp.any(w != 1), guided, lambda: goal(x, t, cond))

    return Costed(velocity, nfe)
