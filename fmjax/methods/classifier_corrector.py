"""The classifier corrector: a robust classifier of backward against forward marginals; its gradient is the push."""

from __future__ import annotations

import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from fmjax import checks
from fmjax.methods import attacks
from fmjax.methods import common as c
from fmjax.types import CorrectorMethod, Costed, LogitNet, expand, over_batch

DIRECTIONS = ("logit", "logprob", "normalised")


def classifier_corrector(
    net: LogitNet,
    *,
    eps: float | None = None,
    gradient_penalty: float = 0.0,
    steps: Annotated[int, checks.Range(1, 1000)] = 7,
    step: float | None = None,
    norm: str = "l2",
    random_start: bool = False,
    direction: str = "logit",
    clip: float | None = None,
) -> CorrectorMethod:
    """Train a robust classifier of backward marginals ``q_n`` against forward marginals ``p_n``.

    ``E_n [E_{q_n} max softplus(-f(x + d, t_n)) + E_{p_n} max softplus(f(x + d, t_n))] / 2``, the maxima over
    ``|d| <= eps`` by ``attacks.pgd`` (marginal matching, OpenReview kRjLBXWn1T). ``f`` is the logit of the probability
    ``P = sigmoid f`` of *backward*; for ``eps = 0``, the plain classifier, the optimum is ``f = log(q_n / p_n)``. For
    ``eps > 0`` the loss is not an exact saddle point, because an attack stops once it has succeeded. The paper's attack
    is not published: radius, number and length of the steps, and the stop are choices of this package.

    =================  =========================  ====================================================================
    ``direction``      ``h``                      in ``x' = x + alpha h``
    =================  =========================  ====================================================================
    ``"logit"``        ``grad f``                 an Euler step of size ``alpha`` down ``KL(p_n | q_n)``; 0 where p = q
    ``"logprob"``      ``(1 - P) grad f``         ``grad log P``: vanishes where an example is classified as backward
    ``"normalised"``   ``grad f / |grad f|``      ``alpha`` is a length
    =================  =========================  ====================================================================

    No direction is in displacement units, except under a gradient penalty ``lam``, which adds
    ``lam E_n [E_{q_n} |grad f|^2 + E_{p_n} |grad f|^2] / 2``: for small ``f`` then ``8 lam grad f`` is the smoothest
    push from ``p_n`` to ``q_n``, which leaves alone what is finer than ``sqrt(8 lam)``. Its strength is not chosen:
    ``correctors.preset("transport", lam=lam)``, ``alpha = 8 lam``. ``lam`` is about the variance of the data per
    dimension; train with a small learning rate (5e-4), the signal is 1e-3 nats. ``correction.fit_push`` is the same
    push in closed form.

    Args:
        net: logit ``f(params, x, s, t, cond, key)``, ``[B]``, evaluated where ``s = t``. Dropout does not act on the
            attack.
        eps: radius of the attack, in the units of ``x``; 0 for none. By default 0.5, and 0 with a gradient penalty.
        gradient_penalty: ``lam``, in squared units of ``x``; 0 for none. It excludes an attack.
        steps: gradient steps of the attack.
        step: length of an attack step; ``2.5 eps / steps`` by default.
        norm: norm of the attack, ``"l2"`` or ``"linf"``.
        random_start: start the attack at random instead of at ``d = 0``.
        direction: ``"logit"``, ``"logprob"`` or ``"normalised"`` (see the table).
        clip: bound of ``|h|``, the norm over an example. At small ``n``, where a flow stretches, gradients have heavy
            tails.

    Returns:
        A method with ``direction``, of 2 NFE: a forward and a backward pass. Batches have backward examples in ``x1``,
        forward examples in ``x0``, and the time of both in ``t``. ``aux`` has ``t`` and ``accuracy``, the fraction of
        the two points of an example that are classified correctly under attack.

    Raises:
        ValueError: an option out of range, or (in the loss) a network that is no logit, or a batch without times or
            forward examples.

    >>> import jax.numpy as jnp
    >>> from fmjax import methods
    >>> method = methods.classifier_corrector(lambda params, x, s, t, cond=None, key=None: params * x.sum(-1))
    >>> method.direction(2.0)(jnp.ones((1, 2)), 0.5)
    Array([[2., 2.]], dtype=float32)
    """
    eps = (0.0 if gradient_penalty else 0.5) if eps is None else eps
    attacks.check_attack(eps=eps, steps=steps, step=step, norm=norm)
    if not 0 <= gradient_penalty < math.inf:
        raise ValueError(f"gradient_penalty={gradient_penalty}: not a squared length. Give a positive number, or 0.")
    if gradient_penalty and eps:
        raise ValueError(f"gradient_penalty={gradient_penalty}: excludes an attack, eps={eps}. Set one of them to 0.")
    checks.check_choice("direction", direction, DIRECTIONS)
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip={clip}: not a bound of a length. Give a positive number, or None for no bound.")
    attack = functools.partial(attacks.pgd, eps=eps, steps=steps, step=step, norm=norm)

    def logit(params, x, t, cond=None, key=None):
        f = net(params, x, t, t, cond, key)
        if f.shape != x.shape[:1]:
            raise ValueError(
                f"net: gives {f.shape} for x {x.shape}, and a classifier needs one number per example, {x.shape[:1]}. "
                "Set logit=True in nets 'mlp' and 'plain', or use net 'encoder'."
            )
        return f

    @c.keyed
    def loss(params, target, batch, key):
        for name, example in (("x0", "the forward examples"), ("t", "their times")):
            if getattr(batch, name) is None:
                raise ValueError(f"batch.{name}=None: not pairs of marginals. Put {example} in {name}, backward in x1.")
        twice = lambda tree: jax.tree.map(lambda a: jnp.concatenate([a, a]), tree)
        x, t, cond = jnp.concatenate([batch.x1, batch.x0]), twice(batch.t), twice(batch.cond)
        y = jnp.repeat(jnp.array([1.0, -1.0]), len(batch.x1))
        k = c.split(key, 4)
        margin = lambda params, x, key=None: y * logit(params, x, t, cond, key)

        # else the loop would be differentiated
        fixed = functools.partial(margin, jax.lax.stop_gradient(params))
        d = attack(fixed, x, jnp.concatenate(k[:2]) if random_start else None)
        if gradient_penalty:
            m, back = jax.vjp(lambda x: margin(params, x, jnp.concatenate(k[2:])), x)
            slopes = jnp.square(back(jnp.ones_like(m))[0].reshape(len(x), -1)).sum(1).reshape(2, -1)
            m = m.reshape(2, -1)
            per_example = (jax.nn.softplus(-m) + gradient_penalty * slopes).mean(0)
        else:
            m = margin(params, x + d, jnp.concatenate(k[2:])).reshape(2, -1)
            per_example = jax.nn.softplus(-m).mean(0)
        return c.reduce(per_example, t=batch.t, accuracy=jnp.mean(m > 0, 0, dtype=m.dtype))

    def bind(params):
        def push(x, t, cond=None):
            t = over_batch(t, x)
            f, back = jax.vjp(lambda x: logit(params, x, t, cond), x)
            (h,) = back(jnp.ones_like(f))
            if direction == "logprob":
                h = expand(jax.nn.sigmoid(-f), x) * h
            elif direction == "normalised":
                h = h / (attacks.length(h) + 1e-10)
            return h if clip is None else h * (clip / jnp.maximum(attacks.length(h), clip))

        return Costed(push, nfe=2)

    return CorrectorMethod(loss, direction=bind, batches="marginals")
