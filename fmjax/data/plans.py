"""Trajectories of a point mass with their returns: the smallest data set for planning by a flow."""

from __future__ import annotations

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fmjax.checks import NonNegativeFloat, Range, Seed, check_hints
from fmjax.data.dataset import Count, Dataset, Examples, dataset
from fmjax.keys import from_seed

Length = Annotated[int, Range(low=2)]


def point_mass(
    *,
    train: Count = 20_000,
    validation: Count = 2_000,
    test: Count = 2_000,
    seed: Seed = 0,
    length: Length = 16,
    memory: Annotated[float, Range(0, 1, open_high=True)] = 0.6,
    spread: NonNegativeFloat = 0.5,
) -> Dataset:
    """Draw trajectories of a point mass in the plane, with float conditions: their returns.

    ``p_0 ~ N(0, spread^2 I)``, ``p_{k+1} = p_k + v_k``, ``v_{k+1} = memory v_k + sqrt(1 - memory^2) a_k`` from random
    accelerations, scaled so that a step has the standard deviation ``length^(-1/2)``. The reward of a step is the
    progress to the right, so that the return is ``x_T - x_0``. All of it is Gaussian: ``point_mass_moments``.

    Args:
        train: the number of trajectories to train on, at least 2.
        validation: the number of trajectories for validation, at least 2.
        test: the number of trajectories for testing, at least 2.
        seed: the seed of all trajectories, not negative.
        length: the number of positions ``T`` of a trajectory.
        memory: how much of its velocity the mass keeps from one step to the next.
        spread: standard deviation of the start.

    Returns:
        Series ``[n, T, 2]`` float32; the conditions are returns ``[n, 1]`` float32.

    Raises:
        ValueError: for fewer than 2 trajectories a split, and numbers outside their ranges.

    >>> data = point_mass(train=8, validation=4, test=4)
    >>> data.train.x.shape, data.train.cond.shape, data.kind
    ((8, 16, 2), (8, 1), 'series')

    Source: the task of arXiv 2205.09991 and 2311.13443 (plans conditioned on returns), reduced to a Gaussian.
    """
    options = {"length": length, "memory": memory, "spread": spread}
    check_hints(point_mass, {"train": train, "validation": validation, "test": test, "seed": seed, **options})
    root, _ = point_mass_moments(**options)

    def split(i: int, n: int) -> Examples:
        noise = jax.random.normal(jax.random.fold_in(from_seed(seed), i), (n, length, 2))
        x = np.asarray(jnp.einsum("kl,nlc->nkc", jnp.asarray(root, jnp.float32), noise))
        return Examples(x, x[:, -1, :1] - x[:, 0, :1])

    return dataset(split(0, train), split(1, validation), split(2, test), name="point_mass")


def point_mass_moments(
    *, length: int = 16, memory: float = 0.6, spread: float = 0.5
) -> tuple[Float[np.ndarray, "t t"], Float[np.ndarray, "t t"]]:
    """Return a square root and the covariance of one coordinate of ``point_mass``; the mean is zero.

    Args:
        length: the number of positions ``T``.
        memory: see ``point_mass``.
        spread: see ``point_mass``.

    Returns:
        ``A`` and ``A A^T``, each ``[T, T]``: a trajectory is ``A z``, ``z ~ N(0, I)``, for each coordinate.

    >>> root, covariance = point_mass_moments(length=2, memory=0.0, spread=2.0)
    >>> covariance.round(3).tolist()
    [[4.0, 4.0], [4.0, 4.5]]
    """
    root = np.zeros((length, length))
    root[:, 0] = spread
    velocity = np.zeros((length, length))
    velocity[0, 1] = length**-0.5
    for k in range(1, length):
        root[k] = root[k - 1] + velocity[k - 1]
        velocity[k] = memory * velocity[k - 1]
        if k + 1 < length:
            velocity[k, k + 1] += (1 - memory**2) ** 0.5 * length**-0.5
    return root, root @ root.T
