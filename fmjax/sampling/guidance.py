"""Guidance: from velocities to a velocity that goes past the conditional one, and the training that allows it.

One meaning of the scale everywhere: ``v = v_base + w (v_goal - v_base)``, so that ``w = 1`` is no guidance, and returns
the very function it was given. A scale is a number or a function of the times ``[B]``, such as ``interval``.

Any other scale costs two evaluations where there was one: count NFE twice. The guided velocity is that of no model
law: classifier-free guidance does not sample the tilted law ``p(x|null)^{1-w} p(x|c)^w`` at ``t = 1`` (two Gaussians of
variances ``V0, Vc`` end at ``V0^{1-w} Vc^w``, the tilt has ``1 / ((1-w)/V0 + w/Vc)``); the two agree where the
variances do. It is not the velocity of an unguided flow map either: guide the target such a map is trained on.

Corrections of a velocity stand beside: ``added`` (a residual field) and ``density_ratio`` (a discriminator), whose
scale is the share of the correction, 0 for none.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from fmjax import paths
from fmjax.keys import split
from fmjax.types import Cond, FlowMapFn, Method, Net, VelocityFn, expand, is_null, over_batch, with_null

Scale = float | Callable[[Array], Array]


def _check_scale(scale: Scale) -> None:
    if not callable(scale) and not math.isfinite(scale):
        raise ValueError(f"a guidance scale is a finite number or a function of time, got {scale}; 1 is no guidance")


def _guide(goal: VelocityFn, base: VelocityFn, scale: Scale) -> VelocityFn:
    """``v_base + w(t) (v_goal - v_base)``; where ``w(t) = 1`` for the whole batch only ``goal`` is evaluated."""

    def towards(w, x, t, cond):
        v, v_base = goal(x, t, cond), base(x, t, cond)
        return v, v_base + w * (v - v_base)

    if not callable(scale):
        return lambda x, t, cond=None: towards(scale, x, t, cond)[1]

    def velocity(x, t, cond=None):
        w = expand(scale(over_batch(t, x)), x).astype(x.dtype)

        def guided():
            v, pushed = towards(w, x, t, cond)
            return jnp.where(w == 1, v, pushed)  # not rounded: an example outside the interval is unguided to the bit

        return jax.lax.cond(jnp.any(w != 1), guided, lambda: goal(x, t, cond))

    return velocity


def classifier_free(velocity: VelocityFn, *, null: Cond, scale: Scale | None = None, weight=None) -> VelocityFn:
    """Classifier-free guidance, ``v(x, t, null) + scale (v(x, t, cond) - v(x, t, null))``.

    ``null`` is what the network was trained on in the place of a dropped condition: a value that broadcasts against
    ``cond`` leaf by leaf (for ``nets`` with labels the label ``classes``), or ``None``. Give ``scale`` (1: none) or the
    paper's ``weight``, ``v_cond + weight (v_cond - v_null)`` (0: none), which is ``scale - 1``. ``scale = 1`` returns
    ``velocity`` itself; another number doubles the evaluations; ``scale=interval(...)`` does so inside the interval.
    Sources: arXiv 2207.12598 (in weights), 2311.13443 (for flows).

    Raises ``ValueError`` for both or neither of ``scale`` and ``weight``, for a number that is not finite, and, when
    called, for ``cond=None``. ``TypeError`` for a ``weight`` that is a function.
    """
    if (scale is None) == (weight is None):
        raise ValueError(f"give scale (1: none) or weight = scale - 1 (0: none), not both: {scale=}, {weight=}")
    if callable(weight):
        raise TypeError("weight is a number; a schedule, such as interval(...), is given as scale = 1 + weight")
    scale = 1 + weight if scale is None else scale
    _check_scale(scale)
    if not callable(scale) and scale == 1:
        return velocity

    def base(x, t, cond):
        if cond is None:
            raise ValueError("classifier-free guidance needs a condition, got cond=None; use the velocity without it")
        return velocity(x, t, with_null(cond, null))

    return _guide(velocity, base, scale)


def label_dropout(method: Method, *, rate: float, null: Cond) -> Method:
    """The method whose loss sees ``null`` in the place of a condition with probability ``rate``, for each example.

    So one network learns ``v(x, t, cond)`` and ``v(x, t, null)``, which ``classifier_free`` needs (arXiv 2207.12598;
    0.1 is usual). ``null`` is as there; of a pair ``(labels, scale)`` the scale stays. ``aux`` gets
    ``is_unconditional``. The draw comes from the example's key; ``rate = 0`` returns ``method`` itself. Raises
    ``ValueError`` unless ``0 <= rate < 1``, and for a batch without conditions.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"label_dropout={rate} is the share of dropped labels and must lie in [0, 1)")
    if rate == 0:
        return method

    def loss(params, target, batch, key):
        if batch.cond is None:
            raise ValueError("label dropout needs labels: give the batch conditions (classes=... in a config)")
        k_drop, k_loss = split(key, 2)
        dropped = jax.vmap(lambda k: jax.random.bernoulli(k, rate))(k_drop)
        drop = lambda n, c: jnp.where(expand(dropped, c), n, c)
        cond = jax.tree.map(drop, with_null(batch.cond, null), batch.cond)
        value, aux = method.loss(params, target, batch._replace(cond=cond), k_loss)
        return value, aux | {"is_unconditional": dropped}

    return method._replace(loss=loss)


def random_scale(method: Method, *, low: float = 1.0, high: float = 8.0, power: float = 1.0) -> Method:
    """The method whose loss sees ``(cond, w)``, with a guidance scale ``w`` of density ``~ w^-power`` for each example.

    For methods that learn a flow for every scale in ``[low, high]``, over a net that is told the scale
    (``guided=True``; arXiv 2512.02012). The draw comes from the example's key. Raises ``ValueError`` unless
    ``0 < low < high``, and for a batch without conditions.
    """
    if not (0 < low < high < math.inf and math.isfinite(power)):
        raise ValueError(f"random_scale needs 0 < low < high, got low={low}, high={high}, power={power}")

    def loss(params, target, batch, key):
        if batch.cond is None:
            raise ValueError("a guidance scale needs labels: give the batch conditions (classes=... in a config)")
        k_scale, k_loss = split(key, 2)
        u = jax.vmap(jax.random.uniform)(k_scale)
        if power == 1:
            scale = low * (high / low) ** u
        else:
            a, b = low ** (1 - power), high ** (1 - power)
            scale = (a + u * (b - a)) ** (1 / (1 - power))
        return method.loss(params, target, batch._replace(cond=(batch.cond, scale)), k_loss)

    return method._replace(loss=loss)


def guided_teacher(net: Net, *, null: Cond) -> Net:
    """The net of labels as one of pairs ``(labels, w)``: ``u(null) + w (u(labels) - u(null))``, at the same times.

    The ``teacher`` of a flow map for every scale (arXiv 2505.18825, appendix on guidance): its diagonal is the guided
    velocity, which a map over a net told the scale follows (``lagrangian``, ``eulerian``; ``progressive`` with
    ``step="euler"``). Rows whose label is ``null`` are left alone. Raises ``ValueError`` for a condition without scale.
    """

    def guided(params, x, s, t, cond=None, key=None):
        if not isinstance(cond, tuple):
            raise ValueError("a guided teacher needs conditions (labels, scale): wrap the method in random_scale")
        labels, scale = cond
        base, goal = net(params, x, s, t, with_null(labels, null), key), net(params, x, s, t, labels, key)
        return jnp.where(expand(is_null(labels, null), x), goal, base + expand(scale, x) * (goal - base))

    return guided


def at_scale(fn: VelocityFn | FlowMapFn, scale: float):
    """A velocity or flow map of conditions ``(labels, w)`` as one of labels, with ``w = scale`` throughout.

    Raises ``ValueError`` for a scale that is not finite and positive and, when called, for ``cond=None``.
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"the scale of a guided map must be positive and finite, got {scale}; 1 is no guidance")
    signature = inspect.signature(fn)

    def at(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        x, cond = given.arguments["x"], given.arguments.get("cond")
        if cond is None:
            raise ValueError("a guided map needs labels, got cond=None")
        given.arguments["cond"] = (cond, jnp.full(x.shape[0], scale, jnp.float32))
        return fn(*given.args, **given.kwargs)

    return at


def autoguidance(strong: VelocityFn, weak: VelocityFn, *, scale: Scale) -> VelocityFn:
    """Autoguidance: ``v_weak + scale (v_strong - v_weak)``, both with the same condition, or none (arXiv 2406.02507).

    ``weak`` is a smaller or less trained model of the same law. ``scale = 1`` returns ``strong`` itself; another scale
    costs an evaluation of each. Raises ``ValueError`` for a scale that is not finite.
    """
    _check_scale(scale)
    return strong if not callable(scale) and scale == 1 else _guide(strong, weak, scale)


def added(velocity: VelocityFn, residual: VelocityFn) -> VelocityFn:
    """The sum ``v + r`` of a frozen velocity and a residual one (``methods.residual``); costs an evaluation of each."""
    return lambda x, t, cond=None: velocity(x, t, cond) + residual(x, t, cond)


def density_ratio(
    velocity: VelocityFn, gradient: VelocityFn, *, scale: Scale = 1.0, path: paths.Path | None = None
) -> VelocityFn:
    """Discriminator guidance: ``v + scale c(t) g``, ``g = grad log(D / (1 - D))`` (arXiv 2211.17091).

    ``D`` tells data from samples of ``velocity``, both noised by ``path`` at ``t`` (``methods.discriminator``, whose
    direction is ``g``). A velocity is affine in the score of its law, with the slope ``c = alpha W / beta``, ``W =
    alpha beta' - alpha' beta`` (linear: ``(1 - t) / t``), for a source N(0, I) independent of the data; a latent of
    ``path`` counts to it. With the exact ``g = S_data - S_model`` the sum is the velocity of the data. ``scale`` is a
    number or a function of the times ``[B]``, 1 the whole correction and 0 none, which returns ``velocity`` itself.

    Where ``beta = 0`` both laws are the source, and nothing is added. Just after, ``c`` is large, and so is what it
    makes of a learned ``g``'s error: a ``scale`` that begins at 0 may be needed. Each evaluation costs three, a forward
    and a backward pass of ``D`` more. Raises ``ValueError`` for a scale that is not finite.
    """
    if not callable(scale) and not math.isfinite(scale):
        raise ValueError(f"the scale of a correction is a finite number or a function of time, got {scale}; 0 is none")
    if not callable(scale) and scale == 0:
        return velocity
    path = paths.one_sided(path or paths.linear())

    def guided(x, t, cond=None):
        t = over_batch(t, x)
        w = expand(scale(t), x).astype(x.dtype) if callable(scale) else scale
        late = jnp.where(path.coefficients(t)[1] > 0, t, 1.0)  # alpha = 0 at t = 1, and with it c
        push = paths.convert(path, jnp.zeros_like(x), gradient(x, t, cond), late, kind="score", to="velocity")
        return velocity(x, t, cond) + w * push

    return guided


def interval(
    scale: float, *, low: float = -math.inf, high: float = math.inf, path: paths.Path | None = None
) -> Callable[[Array], Array]:
    """A scale that guides only where ``low <= log SNR(t) <= high``, and is 1 elsewhere (arXiv 2404.07724).

    ``log SNR = 2 log(beta_t / alpha_t)`` of ``path`` (linear by default; it must be the velocity's own) runs from
    ``-inf`` at the noise to ``+inf`` at the data. Given so, and not in times, an interval survives a change of path; a
    noise level ``sigma = alpha / beta`` is ``-2 log(sigma)``. A solver evaluates both velocities only when a time of
    the batch lies inside; outside the result is that of no guidance to the bit. Put the ends of the interval on the
    solver's grid: a step across an end sees a jump and loses its order there.

    >>> import jax.numpy as jnp
    >>> interval(3.0, low=0.0)(jnp.array([0.0, 0.4, 0.6, 1.0])).tolist()
    [1.0, 1.0, 3.0, 3.0]

    Raises ``ValueError`` for an empty interval, a scale that is not finite, or a path with a latent.
    """
    _check_scale(scale)
    if not low < high:
        raise ValueError(f"an interval of log SNR needs low < high, got low={low}, high={high}")
    path = path or paths.linear()
    paths.refuse_latent("an interval of log SNR", path)

    def at(t):
        alpha, beta = path.coefficients(t)
        # squares: cos(pi / 2) is a little below zero in float32, and its logarithm no number
        log_snr = jnp.log(jnp.square(beta)) - jnp.log(jnp.square(alpha))
        return jnp.where((low <= log_snr) & (log_snr <= high), scale, jnp.ones_like(t))

    return at


def autoguided_teacher(net: Net, weak: Net | None = None, *, scale: Scale) -> Net:
    """The velocity ``autoguidance`` gives as a ``Net``, for the ``teacher`` of a method (arXiv 2506.14603).

    Its parameters, the method's ``target``, are ``{"strong": ..., "weak": ...}``: of ``net``, and of ``weak`` (by
    default ``net`` too). It is a velocity, asked on the diagonal. Raises ``ValueError`` for a scale that is not finite.
    """
    _check_scale(scale)
    at = lambda f, params: lambda x, t, cond=None: f(params, x, over_batch(t, x), over_batch(t, x), cond)

    def teacher(target, x, s, t, cond=None, key=None):
        return autoguidance(at(net, target["strong"]), at(weak or net, target["weak"]), scale=scale)(x, s, cond)

    return teacher
