"""Adversarial examples: the point near an example that a classifier is least right about."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax.keys import normal
from fmjax.types import expand

NORMS = ("l2", "linf")


def pgd(
    margin: Callable[[Array], Float[Array, " b"]],
    x: Float[Array, "b ..."],
    key=None,
    *,
    eps: float,
    steps: int = 7,
    step: float | None = None,
    norm: str = "l2",
) -> Float[Array, "b ..."]:
    """The perturbation ``d``, ``|d| <= eps``, found by projected gradient descent on ``margin(x + d)``.

    ``d <- P(d - step g / (|g| + 1e-10))``, ``g`` the gradient of ``margin``, ``P`` the projection on the ball, norms
    over an example; ``"linf"`` has ``sign(g)`` and clamps (arXiv 1706.06083). ``margin(x): [B]``, a function of each
    row alone, is positive where an example is classified right: ``y f(x)`` of a logit ``f`` and labels ``y = +-1``. A
    normalised descent on it is that ascent on ``softplus(-margin)``, and does not vanish where the classifier is sure.

    An example's attack stops once it is misclassified (``margin <= 0``), be it from the start. Nothing is clipped to a
    range of pixels. It starts at ``d = 0``, or with ``key: [B]`` at ``eps`` times a uniform direction (``"linf"``:
    uniform in the cube). ``step`` is ``2.5 eps / steps`` by default. ``steps`` gradients; none, and zeros, for
    ``eps = 0``. No gradient passes through ``d``. Raises ``ValueError`` as ``check`` does.
    """
    check(eps=eps, steps=steps, step=step, norm=norm)
    if eps == 0:
        return jnp.zeros_like(x)
    step = 2.5 * eps / steps if step is None else step

    def descend(_, d):
        m, back = jax.vjp(lambda d: margin(x + d), d)
        (g,) = back(jnp.ones_like(m))
        ahead = d - step * (jnp.sign(g) if norm == "linf" else g / (length(g) + 1e-10))
        return jnp.where(expand(m > 0, d), _project(ahead, eps, norm), d)

    start = jnp.zeros_like(x) if key is None else _start(key, x, eps, norm)
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, descend, start))


def check(*, eps: float, steps: int, step: float | None, norm: str) -> None:
    """``ValueError`` for an attack that makes no sense, by name."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps} is the radius of the attack: finite, and 0 for none")
    if steps < 1:
        raise ValueError(f"an attack needs at least one step, got steps={steps}; eps=0 is no attack")
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"step={step} must be positive, or None for 2.5 eps / steps")
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} of an attack is one of {', '.join(NORMS)}")


def length(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """The Euclidean norm of each example, shaped to multiply ``x``."""
    return expand(jnp.sqrt(jnp.sum(jnp.square(x).reshape(x.shape[0], -1), 1)), x)


def _project(d: Array, eps: float, norm: str) -> Array:
    if norm == "linf":
        return jnp.clip(d, -eps, eps)
    return d * (eps / jnp.maximum(length(d), eps))


def _start(key, x: Array, eps: float, norm: str) -> Array:
    if norm == "linf":
        one = lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -eps, eps)
        return jax.vmap(one)(key)
    z = normal(key, x.shape[1:], x.dtype)
    return eps * z / length(z)
