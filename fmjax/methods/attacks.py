"""Adversarial examples: the point near an example where a classifier has the least margin."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fmjax import checks
from fmjax.keys import as_keys, normal
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
    """Find the perturbation ``d``, ``|d| <= eps``, by projected gradient descent on ``margin(x + d)``.

    ``d <- P(d - step g / (|g| + 1e-10))`` with the gradient ``g`` of ``margin`` and the projection ``P`` on the ball,
    norms over an example; ``"linf"`` uses ``sign(g)`` and clamps (arXiv 1706.06083). A normalised descent on the margin
    is the same ascent on ``softplus(-margin)``, and does not vanish where the classifier is certain. The attack of an
    example stops once the example is misclassified (``margin <= 0``), which may be at the start. Nothing is clipped to
    a range of pixels.

    Args:
        margin: ``x -> [B]``, a function of each row alone, positive where an example is classified correctly:
            ``y f(x)`` for a logit ``f`` and labels ``y = +-1``.
        x: examples ``[B, ...]``.
        key: ``None`` starts at ``d = 0``; one key, or ``[B]`` keys, start at ``eps`` times a uniform direction
            (``"linf"``: uniformly in the cube).
        eps: radius, in the units of ``x``; 0 gives zeros.
        steps: number of gradients.
        step: length of a step; ``2.5 eps / steps`` by default.
        norm: ``"l2"`` or ``"linf"``.

    Returns:
        ``d``, ``[B, ...]``, without a gradient.

    Raises:
        ValueError: as ``check_attack``.

    >>> import jax.numpy as jnp
    >>> pgd(lambda x: x.sum(-1), jnp.ones((1, 2)), eps=0.5, norm="linf")
    Array([[-0.5, -0.5]], dtype=float32)
    """
    check_attack(eps=eps, steps=steps, step=step, norm=norm)
    if eps == 0:
        return jnp.zeros_like(x)
    step = 2.5 * eps / steps if step is None else step

    def descend(_, d):
        m, back = jax.vjp(lambda d: margin(x + d), d)
        (g,) = back(jnp.ones_like(m))
        ahead = d - step * (jnp.sign(g) if norm == "linf" else g / (length(g) + 1e-10))
        return jnp.where(expand(m > 0, d), _project(ahead, eps, norm), d)

    start = jnp.zeros_like(x) if key is None else _start(as_keys(key, x.shape[0]), x, eps, norm)
    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, descend, start))


def check_attack(*, eps: float, steps: int, step: float | None, norm: str) -> None:
    """Refuse the options of an attack that cannot work.

    Args:
        eps: radius.
        steps: number of gradients.
        step: length of a step, or ``None``.
        norm: name of the norm.

    Raises:
        ValueError: an option out of range.
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps={eps}: not the radius of an attack. Give a finite number, or 0 for no attack.")
    if steps < 1:
        raise ValueError(f"steps={steps}: an attack needs at least one step. For no attack give eps=0.")
    if step is not None and not 0 < step < math.inf:
        raise ValueError(f"step={step}: not the length of a step. Give a positive number, or None for 2.5 eps / steps.")
    checks.check_choice("norm", norm, NORMS)


def length(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Return the Euclidean norm of each example.

    Args:
        x: ``[B, ...]``.

    Returns:
        ``[B, 1, ...]``, shaped to multiply ``x``.
    """
    return expand(jnp.sqrt(jnp.sum(jnp.square(x).reshape(x.shape[0], -1), 1)), x)


def _project(d: Array, eps: float, norm: str) -> Array:
    if norm == "linf":
        return jnp.clip(d, -eps, eps)
    return d * (eps / jnp.maximum(length(d), eps))


def _start(key, x: Array, eps: float, norm: str) -> Array:
    if norm == "linf":
        return jax.vmap(lambda k: jax.random.uniform(k, x.shape[1:], x.dtype, -eps, eps))(key)
    z = normal(key, x.shape[1:], x.dtype)
    return eps * z / length(z)
