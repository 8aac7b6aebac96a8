"""Weighted particles: Feynman-Kac correctors with resampling, for tilted distributions (``tilts``).

Particles interact through resampling, so they come in groups of consecutive examples, and a group has one key
(``particle_keys``): the samples of a group do not depend on the other groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from fmjax import checks
from fmjax.checks import Refusal
from fmjax.keys import as_keys, fold_in
from fmjax.sampling.diffusion import rising
from fmjax.sampling.stochastic import draw_noise
from fmjax.sampling.tilts import Tilt
from fmjax.types import Multistep, expand, over_batch


class Weights(NamedTuple):
    """The weights of particles in ``G`` groups: the memory of ``weighted``, in ``SampleInfo.memory``.

    Attributes:
        log_weights: log-weight of each particle since the last resampling of its group, ``[B]``.
        log_mean: log of the mean weight that resamplings have set back to 1, ``[G]``; see ``log_constant``.
        ess: effective sample size after the last step, before its resampling, ``[G]``.
        lowest_ess: the lowest effective sample size of all steps, ``[G]``.
        resamplings: number of resamplings, ``[G]``.
    """

    log_weights: Array
    log_mean: Array
    ess: Array
    lowest_ess: Array
    resamplings: Array

    def log_constant(self) -> Float[Array, " g"]:
        """Return the log of the estimated ratio of normalising constants, end over start, of each group: ``[G]``."""
        each = self.log_weights.reshape(self.log_mean.shape[0], -1)
        return self.log_mean + jax.nn.logsumexp(each, 1) - jnp.log(each.shape[1])


def weighted(
    tilt: Tilt,
    *,
    particles: int,
    strength: float | Callable[[Array], Array] = 1.0,
    threshold: float = 0.5,
) -> Multistep:
    """Return the step of weighted particles that sample a tilted distribution.

    ``x + h (b + g^2/2 S~) + g sqrt(h) z`` and ``log W + h r``, Euler-Maruyama of the weighted SDE of the tilt; then
    systematic resampling of the groups whose effective sample size is below ``threshold * particles``. The states at
    the end have weights: read ``info.memory`` of ``sample(..., info=True)`` and weight every mean, or ``resample``
    once. With weights of large variance (many dimensions, strong tilts) few particles survive: look at
    ``lowest_ess``. Resampling has no derivative.

    Args:
        tilt: the distribution, of ``power_product``, ``guided_tilt`` or ``reward_tilt``.
        particles: size of a group, 1 or more; the batch is a multiple of it.
        strength: ``g``, a finite number or a function of the times ``[B]``; every ``g`` gives the same weighted
            marginals. Without noise resampling only repeats particles: ``memoryless()``, infinite at ``t = 0``, keeps
            them apart where a tilt without a divergence starts.
        threshold: fraction of the effective sample size below which a group is resampled; 0: never, 1: as soon as
            weights differ.

    Returns:
        A step with the memory ``Weights``, for rising grids; it needs a key.

    Raises:
        ValueError: numbers outside their ranges; a batch that is no multiple of ``particles``; a falling grid.

    >>> from fmjax import oracles, sampling
    >>> tilt = sampling.power_product([oracles.gaussian(0.0, 1.0).velocity], [3.0], divergence=True)
    >>> x0 = tilt.start * jax.random.normal(jax.random.key(0), (512, 1))
    >>> step = weighted(tilt, particles=256)
    >>> x, info = sampling.sample(step, x0, 20, key=jax.random.key(1), info=True)
    >>> x.shape, info.memory.ess.shape
    ((512, 1), (2,))

    Source: arXiv 2503.02819. The source resamples at every step in its image code; when to resample, and that the last
    step may be one, is chosen here.
    """
    checks.check_range("particles", particles, checks.Range(low=1))
    checks.check_fraction(threshold=threshold)
    if not callable(strength):
        checks.check_range("strength", strength, checks.Range(low=0))

    def check(ts):
        tilt.check(ts)
        rising("weighted")(ts)

    def init(x):
        if len(x) % particles:
            wrong = f"the batch of {len(x)} is not a multiple of it"
            raise Refusal("particles", particles, wrong, "Give whole groups of particles")
        groups = len(x) // particles
        full = jnp.full((groups,), float(particles), x.dtype)
        zeros = jnp.zeros((groups,), x.dtype)
        return Weights(jnp.zeros((len(x),), x.dtype), zeros, full, full, jnp.zeros((groups,), jnp.int32))

    def step(memory, x, s, t, cond=None, key=None):
        s, h = over_batch(s, x), over_batch(t, x) - over_batch(s, x)
        g = jnp.broadcast_to(strength(s) if callable(strength) else strength, s.shape)
        b, push, rate = tilt.fields(x, s, cond)
        wide = lambda a: expand(a, x).astype(x.dtype)
        y = x + wide(h) * (b + wide(g**2 / 2) * push) + wide(g * jnp.sqrt(h)) * draw_noise(key, x)
        log_w = memory.log_weights + h * rate
        each = log_w.reshape(-1, particles)
        ess = effective_sample_size(each)
        low = ess < threshold * particles
        index = systematic(fold_in(as_keys(key, len(x))[::particles], 1), each)
        index = jnp.where(low[:, None], index, jnp.arange(particles))
        mean = jax.nn.logsumexp(each, 1) - jnp.log(particles)
        return _take(y, index), Weights(
            jnp.where(low[:, None], 0, each).ravel(),
            memory.log_mean + jnp.where(low, mean, 0),
            ess,
            jnp.minimum(memory.lowest_ess, ess),
            memory.resamplings + low,
        )

    return Multistep(init, step, tilt.nfe, check)


def effective_sample_size(log_weights: Float[Array, "*g k"]) -> Float[Array, "*g"]:
    """Return ``(sum w)^2 / sum w^2``, between 1 and the number of particles.

    Args:
        log_weights: log-weights of the particles of each group, ``[..., K]``, up to a constant.

    Returns:
        The effective sample size of each group.

    >>> effective_sample_size(jnp.log(jnp.array([0.5, 0.5, 1e-30]))).round(4).item()
    2.0
    """
    w = jax.nn.softmax(log_weights, -1)
    return 1 / jnp.sum(jnp.square(w), -1)


def systematic(key: Key[Array, " g"], log_weights: Float[Array, "g k"]) -> Int[Array, "g k"]:
    """Draw the indices of systematic resampling: particle ``i`` of weight ``w_i`` occurs ``K w_i`` times, rounded.

    One uniform number ``U`` a group; the points ``(U + k) / K`` fall into the cumulated weights. Each index occurs
    ``floor(K w_i)`` or ``ceil(K w_i)`` times, ``K w_i`` in the mean.

    Args:
        key: one key for each group, ``[G]``.
        log_weights: log-weights, ``[G, K]``, up to a constant.

    Returns:
        Indices ``[G, K]``, rising.

    >>> systematic(jax.random.split(jax.random.key(0), 1), jnp.log(jnp.array([[0.5, 0.25, 0.25, 1e-9]]))).tolist()
    [[0, 0, 1, 2]]
    """
    k = log_weights.shape[-1]

    def draw(key, log_w):
        total = jnp.cumsum(jax.nn.softmax(log_w))
        points = (jax.random.uniform(key, (), log_w.dtype) + jnp.arange(k)) / k
        return jnp.minimum(jnp.searchsorted(total, points * total[-1], side="right"), k - 1)

    return jax.vmap(draw)(key, log_weights)


def resample(key, x: Float[Array, "b ..."], log_weights: Float[Array, " b"], *, particles: int) -> Array:
    """Draw states without weights from weighted states, group by group, by systematic resampling.

    Args:
        key: one key, or one for each group, ``[G]``.
        x: states ``[B, ...]``.
        log_weights: their log-weights ``[B]``, such as ``info.memory.log_weights``.
        particles: size of a group.

    Returns:
        States ``[B, ...]``; some are repeated.

    >>> resample(jax.random.key(0), jnp.arange(2.0), jnp.array([0.0, -50.0]), particles=2).tolist()
    [0.0, 0.0]
    """
    each = log_weights.reshape(-1, particles)
    return _take(x, systematic(as_keys(key, len(each)), each))


def particle_keys(key, groups: int, particles: int) -> Key[Array, " b"]:
    """Return the keys of groups of particles, all of them from one key a group.

    Args:
        key: one key, or one for each group, ``[G]``.
        groups: number of groups ``G``.
        particles: size of a group.

    Returns:
        Keys ``[G * particles]`` for ``sample(weighted(...), key=...)``. A group has the same keys, whatever the other
        groups are.

    >>> particle_keys(jax.random.key(0), 2, 3).shape
    (6,)
    """
    return jax.vmap(lambda k: jax.random.split(k, particles))(as_keys(key, groups)).reshape(-1)


def _take(x: Array, index: Int[Array, "g k"]) -> Array:
    """Select particles within their groups."""
    groups, k = index.shape
    return x[(index + k * jnp.arange(groups)[:, None]).reshape(-1)]
