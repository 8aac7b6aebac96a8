"""The classifier corrector: a robust classifier of backward against forward marginals, its gradient the push."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from fmjax import checks
from fmjax.methods import attacks
from fmjax.methods import common as c
from fmjax.types import LogitNet, Method, expand, over_batch

DIRECTIONS = ("logit", "logprob", "normalised")


def classifier_corrector(
    net: LogitNet,
    *,
    eps: float = 0.5,
    steps: int = 7,
    step: float | None = None,
    norm: str = "l2",
    random_start: bool = False,
    direction: str = "logit",
    clip: float | None = None,
) -> Method:
    """A classifier of backward (``batch.x1``) against forward marginals (``batch.x0``), both at the time ``batch.t``.

    ``E_n [E_{q_n} max softplus(-f(x + d, t_n)) + E_{p_n} max softplus(f(x + d, t_n))] / 2`` over ``|d| <= eps``, the
    maximum as ``attacks.pgd`` finds it (``steps``, ``step``, ``norm``, ``random_start``; marginal matching,
    kRjLBXWn1T). ``net``'s diagonal is the logit ``f: [B]``, ``sigmoid f = P`` the probability of *backward*; at
    ``eps = 0``, the plain classifier, the optimum is ``f = log(q_n / p_n)``. An attack stops once it has succeeded, so
    that for ``eps > 0`` this is no exact saddle point. No dropout acts on the attack.

    =================  =========================  ====================================================================
    ``direction``      ``h``                      in ``x' = x + alpha h``
    =================  =========================  ====================================================================
    ``"logit"``        ``grad f``                 Euler's step of size ``alpha`` down ``KL(p_n | q_n)``; 0 where p = q
    ``"logprob"``      ``(1 - P) grad f``         ``grad log P``: vanishes where an example is judged backward already
    ``"normalised"``   ``grad f / |grad f|``      ``alpha`` is a length
    =================  =========================  ====================================================================

    ``clip`` bounds ``|h|``, the norm over an example: at small ``n``, where a flow stretches, gradients are heavy
    tailed. None is in displacement units; each costs 2 NFE, a forward and a backward pass. ``aux``: ``t``, and
    ``accuracy``, the share of an example's two points that are classified right under attack. Raises ``ValueError``
    for options that make no sense, a net that is no logit, and a batch without times or forward examples.
    """
    attacks.check(eps=eps, steps=steps, step=step, norm=norm)
    checks.check_choice("direction", direction, DIRECTIONS)
    if clip is not None and not 0 < clip < math.inf:
        raise ValueError(f"clip={clip} bounds the length of the direction and must be positive, or None for no bound")
    attack = functools.partial(attacks.pgd, eps=eps, steps=steps, step=step, norm=norm)

    def logit(params, x, t, cond=None, key=None):
        f = net(params, x, t, t, cond, key)
        if f.shape != x.shape[:1]:
            raise ValueError(
                f"a classifier needs a net of one number an example, {x.shape[:1]}, got {f.shape} for x {x.shape}: "
                "give nets 'mlp' or 'plain' logit=True, or take 'encoder'"
            )
        return f

    def loss(params, target, batch, key):
        if batch.x0 is None or batch.t is None:
            raise ValueError(
                "the classifier corrector trains on pairs of marginals: its batches need backward examples in "
                "Batch.x1, forward ones in Batch.x0, and their times in Batch.t"
            )
        twice = lambda tree: jax.tree.map(lambda a: jnp.concatenate([a, a]), tree)
        x, t, cond = jnp.concatenate([batch.x1, batch.x0]), twice(batch.t), twice(batch.cond)
        y = jnp.repeat(jnp.array([1.0, -1.0]), len(batch.x1))
        k = c.split(key, 4)
        margin = lambda params, x, key=None: y * logit(params, x, t, cond, key)

        fixed = functools.partial(margin, jax.lax.stop_gradient(params))  # else the loop would be differentiated
        d = attack(fixed, x, jnp.concatenate(k[:2]) if random_start else None)
        m = margin(params, x + d, jnp.concatenate(k[2:])).reshape(2, -1)
        return c.reduce(jax.nn.softplus(-m).mean(0), t=batch.t, accuracy=jnp.mean(m > 0, 0, dtype=m.dtype))

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

        return push

    return Method(loss, direction=bind)
