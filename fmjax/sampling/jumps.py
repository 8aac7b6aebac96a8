"""Jump processes of discrete data: rates from probabilities of tokens, tau-leaping, a corrector, a likelihood bound.

Rates are a sum of channels: along a channel a site is drawn again from ``target`` (where it may stay what it is) at the
intensity ``weight`` times a clock, ``k' / (1 - k)`` forward or ``k' / k`` backward. Between two times of a grid the
probabilities are frozen and the clocks are integrated exactly, so that the forward clock, infinite at t = 1, needs no
special last step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fmjax.keys import as_keys, per_example, split
from fmjax.sampling.costs import evaluations
from fmjax.tokens import TokenPath, data_probabilities, source_probabilities
from fmjax.types import Cond, Corrector, Costed, expand, over_batch, stated


class Channel(NamedTuple):
    """One way in which a site jumps.

    Attributes:
        clock: ``"forward"``, of intensity ``k' / (1 - k)``, or ``"backward"``, of intensity ``k' / k``.
        weight: what multiplies the clock, ``[B, ...]`` or a shape that broadcasts against the sites.
        target: probabilities of the value after the jump, ``[B, ..., states]``.
    """

    clock: str
    weight: Array
    target: Float[Array, "b ... s"]


Rates = Callable[..., tuple[Channel, ...]]  # (x, t, cond) -> channels


def flow_rates(log_probs: Callable, path: TokenPath, *, noise: float = 0.0) -> Rates:
    """Return the rates of discrete flow matching, ``a u_forward - b u_backward`` with ``a - b = 1``.

    ``u_forward(c) = k' / (1 - k) (p(x1 = c | x) - 1[c = x])`` and ``u_backward(c) = k' / k (1[c = x] - p(x0 = c | x))``
    (arXiv 2407.15595). Every ``b`` has the marginals of the path. Here ``b = noise k (1 - k)``, which is 0 at both
    ends; the paper takes ``b`` proportional to ``t^0.25 (1 - t)^0.25``, whose ``b / k`` is infinite at 0.

    Args:
        log_probs: ``log_probs(x, t, cond)``, log-probabilities of the data at each site given the state,
            ``[B, ..., K]``: the view of ``methods.discrete_flow_matching``.
        path: the path.
        noise: size of ``b``; 0 for the fewest jumps.

    Returns:
        ``rates(x, t, cond)``, a tuple of channels.

    Raises:
        ValueError: a negative ``noise``.

    >>> from fmjax.tokens import token_path
    >>> even = lambda x, t, cond=None: jnp.log(jnp.full((*x.shape, 2), 0.5))
    >>> (channel,) = flow_rates(even, token_path(classes=2))(jnp.array([[2, 0]]), 0.5)
    >>> channel.target.tolist()
    [[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]
    """
    if noise < 0:
        raise ValueError(f"noise={noise}: a negative rate. Give 0 or more.")

    def rates(x, t, cond=None):
        t = over_batch(t, x, tokens=True)
        p1 = data_probabilities(path, log_probs(x, t, cond), x)
        b = expand(noise * path.kept(t)[0] * (1 - path.kept(t)[0]), x)
        forward = Channel("forward", 1 + b, p1)
        return (forward, Channel("backward", b, source_probabilities(path, p1, x, t))) if noise else (forward,)

    return Costed(rates, evaluations(log_probs))


def reverse_rates(log_conditionals: Callable, path: TokenPath) -> Rates:
    """Return the rates of the time reversal of the noising chain, from the distribution of a site given all others.

    A noising chain of rate ``Q(y, x)`` has the reversal ``Q(y, x) p(y) / p(x)``, and the ratio of two states that
    differ at the site ``d`` is ``p(y^d | x^-d) / p(x^d | x^-d)`` (SDDM, arXiv 2211.16750). At ``t = 0`` the rate is
    infinite: start the grid where ``k`` is small and positive. ``k_t = exp(-int_t^1 beta)`` of the paper.

    Args:
        log_conditionals: ``log_conditionals(x, t, cond)``, log-probabilities of the token of each site given all other
            sites at ``t``, ``[B, ..., K]``: the view of ``methods.categorical_ratio_matching``.
        path: a path with the uniform source.

    Returns:
        ``rates(x, t, cond)``, a tuple of one channel.

    Raises:
        ValueError: another source.

    >>> from fmjax.tokens import token_path
    >>> even = lambda x, t, cond=None: jnp.log(jnp.full((*x.shape, 2), 0.5))
    >>> (channel,) = reverse_rates(even, token_path(classes=2, source="uniform"))(jnp.array([[1, 0]]), 0.5)
    >>> channel.weight.tolist()
    [[1.0, 1.0]]
    """
    if path.source != "uniform":
        raise ValueError(f"source={path.source!r}: only uniform noise is reversed. Take source='uniform'.")

    def rates(x, t, cond=None):
        p = jnp.exp(log_conditionals(x, t, cond))
        own = jnp.take_along_axis(p, x[..., None].astype(int), -1)[..., 0]
        return (Channel("backward", 1 / (path.classes * own), p),)

    def check(ts):
        if not np.all(np.asarray(path.kept(np.asarray(ts))[0]) > 0):
            raise ValueError("ts=0: the reversed rates are infinite there. Start the grid at a small positive time.")

    return Costed(rates, evaluations(log_conditionals), check)


def generator_rows(rates: Rates, path: TokenPath, x: Int[Array, "b ..."], t, cond: Cond = None) -> Array:
    """Return the rates from a state to every value of each site, ``[B, ..., states]``; rows sum to zero.

    Args:
        rates: rates of a jump process.
        path: the path.
        x: states ``[B, ...]``.
        t: a time or times ``[B]``, inside (0, 1).
        cond: conditions.

    Returns:
        ``u(c, x)``: jumps per unit of time, with minus their sum at ``c = x``.

    >>> from fmjax.tokens import token_path
    >>> even = lambda x, t, cond=None: jnp.log(jnp.full((*x.shape, 2), 0.5))
    >>> path = token_path(classes=2)
    >>> generator_rows(flow_rates(even, path), path, jnp.array([[2]]), 0.5).tolist()
    [[[1.0, 1.0, -2.0]]]
    """
    total = 0.0
    for channel in rates(x, t, cond):
        k, dk = path.kept(over_batch(t, x, tokens=True))
        speed = expand(dk / (1 - k if channel.clock == "forward" else k), x) * channel.weight
        total += speed[..., None] * (channel.target - jax.nn.one_hot(x, path.states, dtype=channel.target.dtype))
    return total


def tau_leaping(rates: Rates, path: TokenPath) -> Costed:
    """Return a step in which every site jumps by itself, with the rates at the start of the step.

    A site is drawn again with the probability ``1 - exp(-sum of integrated intensities)``, from the mixture of the
    targets. It is exact where the probabilities do not change within the step, and of order 1 in the step otherwise.

    Args:
        rates: ``flow_rates`` or ``reverse_rates``.
        path: the path.

    Returns:
        A step ``(x, s, t, cond, key) -> x`` of integer states that needs a key; one network evaluation.

    >>> from fmjax import sampling
    >>> from fmjax.tokens import token_path
    >>> path = token_path(classes=2)
    >>> even = lambda x, t, cond=None: jnp.log(jnp.full((*x.shape, 2), 0.5))
    >>> step = tau_leaping(flow_rates(even, path), path)
    >>> x = sampling.sample(step, jnp.full((5, 3), 2), 4, key=jax.random.key(0))
    >>> int(x.max()) < 2
    True

    Source: arXiv 2211.16750, 2407.15595; clocks are integrated in place of the Euler step of the latter.
    """

    def step(x, s, t, cond=None, key=None):
        keys, (s, t) = as_keys(key, len(x)), (over_batch(s, x, tokens=True), over_batch(t, x, tokens=True))
        channels = rates(x, s, cond)
        (k_s, _), (k_t, _) = path.kept(s), path.kept(t)
        clocks = {"forward": jnp.log((1 - k_s) / (1 - k_t)), "backward": jnp.log(k_t / k_s)}
        each = [expand(clocks[channel.clock], x) * channel.weight for channel in channels]
        if len(channels) > 1:  # an infinite intensity takes all; elsewhere in proportion
            total = sum(each)
            parts = [jnp.where(jnp.isinf(total), jnp.isinf(e), e / jnp.where(total > 0, total, 1)) for e in each]
            parts = [jnp.nan_to_num(part) for part in parts]
            target = sum(part[..., None] * channel.target for part, channel in zip(parts, channels, strict=True))
        else:
            total, target = each[0], channels[0].target
        return _redraw(keys, x, -jnp.expm1(-total), target)

    def check(ts):
        if ts[0] > ts[-1]:
            raise ValueError(f"ts={ts[0]:g} .. {ts[-1]:g}: jumps lead from the source to data. Give a rising grid.")
        stated(rates).check(np.asarray(ts)[:-1])

    return Costed(step, evaluations(rates), check, tokens=True)


def jump_corrector(log_probs: Callable, path: TokenPath, *, strength: float, steps: int = 1) -> Corrector:
    """Return the corrector of discrete flow matching: forward and backward jumps that leave ``p_t`` unchanged.

    ``u_forward - u_backward`` at the intensities ``k`` and ``1 - k``: a site is drawn from
    ``k p(x1 | x) + (1 - k) p(x0 | x)`` with the probability ``1 - exp(-strength / steps)``, ``steps`` times.

    Args:
        log_probs: as in ``flow_rates``.
        path: the path.
        strength: expected number of draws of each site, positive. Sites jump together, which is an error of the order
            ``strength / steps``.
        steps: number of network evaluations.

    Returns:
        A corrector of integer states; ``info["moved"]: [B]`` is the fraction of the sites that changed.

    Raises:
        ValueError: a strength that is not positive, or fewer than one step.

    >>> from fmjax.tokens import token_path
    >>> path = token_path(classes=2)
    >>> even = lambda x, t, cond=None: jnp.log(jnp.full((*x.shape, 2), 0.5))
    >>> fix = jump_corrector(even, path, strength=1.0)
    >>> x, info = fix(jax.random.key(0), jnp.array([[2, 2]]), 0.0)
    >>> x.tolist(), info["moved"].tolist()
    ([[2, 2]], [0.0])

    Source: arXiv 2407.15595, with a schedule of intensities that is finite at both ends.
    """
    if not strength > 0 or steps < 1:
        raise ValueError(f"strength={strength}, steps={steps}: nothing would jump. Give positive numbers.")

    def correct(key, x, t, cond=None):
        t = over_batch(t, x, tokens=True)

        def move(x, keys):
            p1 = data_probabilities(path, log_probs(x, t, cond), x)
            k = expand(path.kept(t)[0], p1)
            target = k * p1 + (1 - k) * source_probabilities(path, p1, x, t)
            return _redraw(keys, x, jnp.full(x.shape, -np.expm1(-strength / steps)), target), None

        y, _ = jax.lax.scan(move, x, jnp.stack(split(as_keys(key, len(x)), steps)))
        return y, {"moved": jnp.mean((y != x).reshape(len(x), -1), 1)}

    return Costed(correct, evaluations(log_probs, calls=steps), tokens=True)


def token_bound(log_probs: Callable, path: TokenPath, key, x1: Int[Array, "b ..."], cond: Cond = None) -> Array:
    """Return an unbiased estimate of a bound on ``-log p(x1)`` in nats, from one random state of each example.

    The bound is ``int k' / (1 - k) E sum_i -log p_i(x1^i | x_t) dt`` over the masked sites, the divergence of the jump
    process that leads to ``x1`` from the model; for exact probabilities it is tight. A draw of ``t`` would have
    infinite variance: here the number ``n`` of masked sites is uniform in ``1 .. D``, ``k ~ Beta(D - n + 1, n)``, and
    the estimate is ``D / n`` times the sum, which has the same mean.

    Args:
        log_probs: as in ``flow_rates``.
        path: a path of masks.
        key: one key, or keys ``[B]``.
        x1: data, tokens ``[B, ...]``.
        cond: conditions.

    Returns:
        Nats per example, ``[B]``; divide by ``log(2)`` and the number of sites for bits per token.

    Raises:
        ValueError: another source, for which the integral diverges unless the network is exact at ``t = 1``.

    >>> from fmjax.tokens import token_path
    >>> path = token_path(classes=2)
    >>> even = lambda x, t, cond=None: jnp.log(jnp.full((*x.shape, 2), 0.5))
    >>> nats = token_bound(even, path, jax.random.key(0), jnp.zeros((2, 3), int))
    >>> (nats / jnp.log(2)).round(4).tolist()
    [3.0, 3.0]
    """
    if path.source != "mask":
        raise ValueError(f"source={path.source!r}: the bound diverges at t = 1. Take source='mask'.")
    shape, sites = x1.shape[1:], x1[0].size

    def draw(key):
        k_count, k_sites, k_time = jax.random.split(key, 3)
        n = jax.random.randint(k_count, (), 1, sites + 1)
        ranks = jax.random.permutation(k_sites, sites).reshape(shape)
        return n, ranks < n, jax.random.beta(k_time, sites - n + 1.0, n)

    n, masked, k = jax.vmap(draw)(as_keys(key, len(x1)))
    x = jnp.where(masked, jnp.asarray(path.classes, x1.dtype), x1)
    log = log_probs(x, path.time_of(k), cond)
    own = jnp.take_along_axis(log, x1[..., None].astype(int), -1)[..., 0]
    return -sites / n * jnp.where(masked, own, 0.0).reshape(len(x1), -1).sum(1)


def _redraw(keys, x: Array, probability: Array, target: Array) -> Array:
    """Draw each site again with a probability, from its target."""
    k_jump, k_value = split(keys, 2)
    jump = per_example(lambda k: jax.random.uniform(k, x.shape[1:]), k_jump) < probability
    value = jax.vmap(lambda k, p: jax.random.categorical(k, jnp.log(p)))(k_value, target)
    return jnp.where(jump, value.astype(x.dtype), x)
