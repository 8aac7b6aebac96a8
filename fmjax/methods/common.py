"""Parts of methods: noise, errors, reductions, the split of a batch between two terms, schedules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax import paths, times
from fmjax.checks import check_examples
from fmjax.keys import as_keys, normal, split
from fmjax.types import (
    Aux,
    Batch,
    Cond,
    LossFn,
    Net,
    Params,
    expand,
    with_null,
)


def keyed(loss: LossFn, *, tokens: bool = False) -> LossFn:
    """Make a loss check its batch, and accept one key or one key per example.

    Args:
        loss: loss whose ``key`` is ``[B]``, one key per example.
        tokens: whether the data are integers.

    Returns:
        The loss, for which one key stands for the keys of the examples ``0 .. B-1`` (``keys.as_keys``). It raises
        ``ValueError`` or ``TypeError`` as ``checks.check_examples`` does.
    """

    def with_keys(params, target, batch, key):
        check_examples(batch, tokens=tokens)
        return loss(params, target, batch, as_keys(key, batch.x1.shape[0]))

    return with_keys


def draw_source(key, batch: Batch) -> Float[Array, "b ..."]:
    """Return the source of a batch, drawn from N(0, I) unless a coupling has already chosen it.

    Args:
        key: one key per example, ``[B]``.
        batch: examples ``[B, ...]``.

    Returns:
        ``batch.x0``, or one draw of N(0, I) per example, ``[B, ...]``.
    """
    return draw_latent(key, batch) if batch.x0 is None else batch.x0


def draw_latent(key, batch: Batch) -> Float[Array, "b ..."]:
    """Draw ``z ~ N(0, I)`` once per example, in the shape and the dtype of the data.

    Args:
        key: one key per example, ``[B]``.
        batch: examples ``[B, ...]``.

    Returns:
        ``z``, ``[B, ...]``.
    """
    return normal(key, batch.x1.shape[1:], batch.x1.dtype)


def interpolant(path: paths.Path, key, batch: Batch, t) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Draw ``I_t`` and its time derivative ``dI_t`` from the batch, a source, and the latent of the path if any.

    Args:
        path: interpolant.
        key: one key per example, ``[B]``.
        batch: examples ``[B, ...]``.
        t: times ``[B]``.

    Returns:
        ``(I_t, dI_t)``, ``[B, ...]`` each.
    """
    if path.gamma is None:
        return paths.with_velocity(path, draw_source(key, batch), batch.x1, t)
    k_source, k_latent = split(key, 2)
    return paths.with_velocity(path, draw_source(k_source, batch), batch.x1, t, draw_latent(k_latent, batch))


def check_times(path: paths.Path, time: Callable) -> None:
    """Refuse ``times.uniform``, which reaches t = 0 and 1, on a path whose ``gamma'`` is infinite there.

    Args:
        path: interpolant.
        time: distribution of times.

    Raises:
        ValueError: the two do not fit together.
    """
    if path.gamma is None or time is not times.uniform:
        return
    ends = jnp.array([0.0, 1.0])
    if not np.isfinite(jax.jvp(path.gamma, (ends,), (jnp.ones(2),))[1]).all():
        raise ValueError(
            "time=times.uniform: reaches t = 0 and 1, where the velocity of the path's latent is infinite. "
            "Use times.interior (in a config time='interior')."
        )


def two_heads(what: str, out: Array, x: Array) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """Split the output of a network with two heads into its two fields, the halves of its channels.

    Args:
        what: name of what needs the two heads, for the message.
        out: output of the network at ``x``.
        x: ``[B, ..., C]``.

    Returns:
        Two arrays ``[B, ..., C]``.

    Raises:
        ValueError: ``out`` is not ``[B, ..., 2 C]``.
    """
    if out.shape != (*x.shape[:-1], 2 * x.shape[-1]):
        raise ValueError(
            f"{what}: needs a network of two heads, and this one turns {x.shape} into {out.shape}. Give it outputs=2."
        )
    first, second = jnp.split(out, 2, axis=-1)
    return first, second


def mse(a: Array, b: Array) -> Float[Array, " b"]:
    """Return the mean squared error of each example.

    Args:
        a: ``[B, ...]``.
        b: ``[B, ...]``.

    Returns:
        Mean of ``(a - b)^2`` over all axes but the first, ``[B]``.
    """
    return jnp.mean(jnp.square(a - b).reshape(a.shape[0], -1), 1)


def pseudo_huber(q: Float[Array, " b"], scale: float) -> Float[Array, " b"]:
    """Return ``sqrt(q + scale^2) - scale``: about ``q / (2 scale)`` for small ``q``, ``sqrt(q)`` for large ``q``.

    Args:
        q: mean squares, ``[B]``.
        scale: root mean square at which the two regimes meet; 0 for ``sqrt(q)``, whose gradient at ``q = 0`` is 0 here.

    Returns:
        ``[B]``.
    """
    square = q + scale**2
    return q / (jnp.sqrt(jnp.where(square > 0, square, 1)) + scale)


def reduce(per_example: Float[Array, " b"], **info: Array) -> tuple[Array, Aux]:
    """Return the batch mean as the loss, beside the values per example.

    Args:
        per_example: the loss of each example, ``[B]``.
        **info: more arrays ``[B]`` for ``aux``.

    Returns:
        ``(scalar, aux)``; ``aux`` has ``per_example`` and ``info``.
    """
    return jnp.mean(per_example), {"per_example": per_example, **info}


def rows(tree: Any, index: np.ndarray) -> Any:
    """Take some rows of every array of a tree.

    Args:
        tree: a batch, an array of keys, or any tree of arrays ``[B, ...]``.
        index: the rows.

    Returns:
        The tree of arrays ``[len(index), ...]``.
    """
    return jax.tree.map(lambda a: a[index], tree)


def split_rows(n: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Split the rows ``0 .. n-1`` into two static, evenly interleaved groups.

    Because the sizes are static, each group pays for its own term only. Because the groups interleave, a shard of a
    batch splits as the whole batch does, so the loss is the same on every mesh. Which rows form a group does not
    matter: keys and data are exchangeable.

    Args:
        n: number of rows.
        fraction: fraction of the rows in the first group.

    Returns:
        The row numbers of the first and of the second group, in order.

    Raises:
        ValueError: ``fraction`` lies outside [0, 1], or ``fraction * n`` is not whole.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction}: not a fraction of the batch. Give a number in [0, 1].")
    size = fraction * n
    if abs(size - round(size)) > 1e-6:
        unit = next(k for k in range(1, 10_001) if abs(fraction * k - round(fraction * k)) < 1e-6)
        raise ValueError(f"batch={n} per device: cannot be split at {fraction}. Use a multiple of {unit}.")
    first = np.diff(np.floor(np.arange(n + 1) * fraction + 1e-6)) > 0
    return np.flatnonzero(first), np.flatnonzero(~first)


class Teachers(NamedTuple):
    """A target of both a frozen teacher and the averaged parameters (``training.make_step(target="both")``)."""

    frozen: Params
    ema: Params


class Term(NamedTuple):
    """The values of one term of a loss on its rows.

    Attributes:
        s: start times, ``[B]``.
        t: end times, ``[B]``.
        per_example: the loss of each example, ``[B]``.
        residual: mean squared error of each example, ``[B]``, where ``per_example`` is something else.
    """

    s: Array
    t: Array
    per_example: Array
    residual: Array | None = None


def matching(net: Net, path: paths.Path, time: Callable, guide: Callable | None = None) -> Callable[..., Term]:
    """Return the flow-matching term ``|u(I_t, t, t) - dI_t|^2`` that trains the diagonal of a network.

    Args:
        net: average velocity ``u``; dropout acts in this term.
        path: interpolant.
        time: distribution of ``t``.
        guide: what replaces ``dI_t`` (see ``guided``).

    Returns:
        The term ``(params, target, batch, key) -> Term``, ``key: [B]``.
    """

    def term(params, target, batch, key):
        k_t, k_x, k_net = split(key, 3)
        t = time(k_t)
        x, u = interpolant(path, k_x, batch, t)
        u = guided(guide, target, batch, x, t, u)
        return Term(t, t, mse(net(params, x, t, t, batch.cond, k_net), u))

    return term


def guided(guide: Callable | None, target: Params, batch: Batch, x: Array, t: Array, v: Array) -> Array:
    """Return the velocity to regress on: ``dI_t``, or what a guide puts in its place.

    Args:
        guide: ``guide(target, batch, x, t, v)``, or ``None`` for ``v`` itself.
        target: parameters of the teacher.
        batch: examples ``[B, ...]``.
        x: ``I_t``, ``[B, ...]``.
        t: times ``[B]``.
        v: ``dI_t``, ``[B, ...]``.

    Returns:
        A velocity ``[B, ...]``, without a gradient if it comes from the guide.
    """
    return v if guide is None else jax.lax.stop_gradient(guide(target, batch, x, t, v))


def unconditional(cond: Cond, null: Cond) -> Cond:
    """Return the condition that stands for no condition.

    Args:
        cond: labels, or a pair ``(labels, scale)`` of labels and guidance scales ``[B]``.
        null: the null label.

    Returns:
        ``null`` in place of the labels, and one in place of the scales.
    """
    cond = with_null(cond, null)
    return (cond[0], jnp.ones_like(cond[1])) if isinstance(cond, tuple) and not isinstance(null, tuple) else cond


def two_terms(on: Callable[..., Term], off: Callable[..., Term], fraction: float) -> LossFn:
    """Return the loss that applies one term to a fraction of the batch and another term to the rest.

    Args:
        on: the term on the diagonal.
        off: the term off the diagonal.
        fraction: fraction of the batch in ``on``; ``fraction`` times the batch per device must be whole.

    Returns:
        A loss. Its ``aux`` has ``s``, ``t``, ``residual`` where a term has one, and, where both terms have rows, the
        masks ``is_on_diagonal`` and ``is_off_diagonal``.
    """

    @keyed
    def loss(params, target, batch, key):
        n = batch.x1.shape[0]
        groups = split_rows(n, fraction)
        terms = [
            (index, term(params, target, rows(batch, index), key[index]))
            for term, index in zip((on, off), groups, strict=True)
            if len(index)
        ]
        info = {name: _join(n, terms, lambda a, name=name: getattr(a, name)) for name in ("s", "t")}
        if any(term.residual is not None for _, term in terms):
            info["residual"] = _join(n, terms, lambda a: a.per_example if a.residual is None else a.residual)
        if len(terms) == 2:
            on_diagonal = np.isin(np.arange(n), groups[0])
            info |= {"is_on_diagonal": jnp.asarray(on_diagonal), "is_off_diagonal": jnp.asarray(~on_diagonal)}
        return reduce(_join(n, terms, lambda a: a.per_example), **info)

    return loss


def _join(n: int, terms: list[tuple[np.ndarray, Term]], value: Callable[[Term], Array]) -> Array:
    """Put the values of the terms back to their rows, ``[n]``."""
    if len(terms) == 1:
        return value(terms[0][1])
    joined = jnp.zeros(n, value(terms[0][1]).dtype)
    for index, term in terms:
        joined = joined.at[index].set(value(term))
    return joined


def draw_pair(pair: Callable, key, batch: Batch, anneal: float = 0.0) -> tuple[Array, Array]:
    """Draw the times ``(s, t)`` of a jump, with ``|t - s| <= progress / anneal`` early in the training.

    Args:
        pair: distribution of ``(s, t)``; takes ``key``, or ``(key, progress)``.
        key: one key per example, ``[B]``.
        batch: examples, whose ``progress`` counts.
        anneal: fraction of the training during which the bound holds; 0 for no bound.

    Returns:
        ``(s, t)``, ``[B]`` each.
    """
    s, t = pair(key, progress(batch)) if "progress" in inspect.signature(pair).parameters else pair(key)
    if not anneal:
        return s, t
    gap = progress(batch) / anneal
    return s, s + jnp.clip(t - s, -gap, gap)


def progress(batch: Batch) -> Float[Array, " b"]:
    """Return the fraction of the training that is done; 1 where the batch does not say.

    Args:
        batch: examples ``[B, ...]``.

    Returns:
        ``[B]``.
    """
    return jnp.ones(batch.x1.shape[0]) if batch.progress is None else batch.progress


def warmed(batch: Batch, warmup: float, limit: float = 1.0) -> Float[Array, " b"]:
    """Return ``min(limit, progress / warmup)``; ``limit`` without a warm-up.

    Args:
        batch: examples, whose ``progress`` counts.
        warmup: fraction of the training that the warm-up takes; 0 for none.
        limit: value after the warm-up.

    Returns:
        ``[B]``.
    """
    done = progress(batch)
    return jnp.minimum(limit, done / warmup) if warmup else limit * jnp.ones_like(done)


def semigradient(u: Array, g: Array, normalise: float = 0.0) -> tuple[Array, Array | None]:
    """Return ``|u - sg(u - g)|^2`` per example, whose gradient is ``2 g`` times the gradient of ``u``.

    Args:
        u: output of the network, ``[B, ...]``.
        g: residual, ``[B, ...]``.
        normalise: ``c > 0`` replaces ``g`` by ``g / (|g| + c)``, norms over an example (arXiv 2410.11081, 2506.14603).

    Returns:
        The loss ``[B]``, and the mean square of ``g`` where it differs from the loss, ``[B]``.
    """
    residual, g = mse(g, jnp.zeros_like(g)), jax.lax.stop_gradient(g)
    if normalise:
        g = g / (expand(jnp.sqrt(residual * g[0].size), g) + normalise)
    return mse(u, jax.lax.stop_gradient(u - g)), residual if normalise else None
