"""Measure a flow and a correction: round-trip error, distance from straight lines, change of dispersion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.correction import trajectories
from fmjax.correction.marginals import Marginals
from fmjax.correction.trajectories import View
from fmjax.types import Cond, Params


def round_trip(
    view: View,
    params: Params,
    x: Float[Array, "b ..."],
    ts,
    cond: Cond = None,
    *,
    solver: str = "rk4",
    backward_map: str = "reverse",
) -> float:
    """Return the error of data that are carried down the whole grid and up again.

    Args:
        view: ``view(params)`` is a velocity, or with ``solver="flow_map"`` a flow map.
        params: parameters of the network.
        x: data ``[B, ...]``.
        ts: rising times ``[N + 1]`` in [0, 1].
        cond: conditions of the data, arrays ``[B, ...]``.
        solver: name of a solver, or ``"flow_map"``.
        backward_map: ``"reverse"`` or ``"inverse"``.

    Returns:
        ``(E |Phi(Psi(x)) - x|^2)^(1/2)``, ``|.|`` the norm over an example; zero up to rounding for ``inverse`` steps
        that converge.

    Raises:
        RuntimeError: an error that is not finite.

    >>> still = lambda params: lambda x, t, cond=None: 0 * x
    >>> round_trip(still, None, jnp.ones((2, 1)), [0.0, 1.0], solver="euler")
    0.0
    """
    ts = trajectories.check_rising(ts)
    trajectories.check_options("backward", solver, backward_map)
    options = {"solver": solver, "backward_map": backward_map}

    @jax.jit
    def run(params, x, cond):
        down, *_ = trajectories.carry(view(params), x, ts, cond, direction="backward", **options)
        up, *_ = trajectories.carry(view(params), down[0], ts, cond, direction="forward", **options)
        return jnp.sqrt(jnp.mean(jnp.sum((up[-1] - x).reshape(len(x), -1) ** 2, 1)))

    error = float(run(params, x, cond))
    if not np.isfinite(error):
        raise RuntimeError(f"the round trip of {len(ts) - 1} {solver} steps has non-finite values; use a finer grid")
    return error


def straightness_defect(m: Marginals) -> Float[np.ndarray, " steps"]:
    """Return the distance of trajectories from the straight lines between their ends.

    It is zero at both ends, and everywhere for a straight flow, and bounds the W2 distance between the marginals and
    those interpolated from the ends (``interpolate_marginals``).

    Args:
        m: a set that stores both ends of the grid.

    Returns:
        ``s_n = (E |(1 - k_n) x_0 + k_n x_N - x_n|^2)^(1/2)``, ``[steps]``, ``k_n`` the elapsed fraction of time at
        step ``n``.

    Raises:
        ValueError: a set without one of the ends.

    >>> import types
    >>> manifest = types.SimpleNamespace(ts=(0.0, 0.5, 1.0), steps=(0, 1, 2))
    >>> bent = Marginals(np.array([[[0.0], [2.0], [2.0]]]), np.array([0.0, 0.5, 1.0]), manifest)
    >>> straightness_defect(bent).tolist()
    [0.0, 1.0, 0.0]
    """
    last = len(m.manifest.ts) - 1
    if m.manifest.steps[0] != 0 or m.manifest.steps[-1] != last:
        raise ValueError(f"steps={m.manifest.steps}: an end is missing. Build the set with steps 0 and {last}.")
    return trajectories.chord_distance(m.x, m.ts)


def dispersion_ratio(before: Float[Array, "b ..."], after: Float[Array, "b ..."]) -> Float[Array, ""]:
    """Return the summed variance after a correction over the summed variance before it.

    Below 1 a correction contracts. Apply it to samples of the backward marginal: a correction should leave a perfect
    model unchanged. For ``N(0, b^2)`` the ratio is ``(1 + (beta/b)^2) (1 - alpha sigma^2 / (b^2 + sigma^2))^2``; for
    the preset ``tweedie``, ``(b^2 / (b^2 + sigma^2))^2``.

    Args:
        before: samples ``[B, ...]``.
        after: the same samples, corrected.

    Returns:
        The ratio of the variances over the batch, summed over elements: a scalar.

    >>> float(dispersion_ratio(jnp.array([[0.0], [2.0]]), jnp.array([[0.0], [1.0]])))
    0.25
    """
    total = lambda x: jnp.sum(jnp.var(x.reshape(x.shape[0], -1), 0))
    return total(after) / total(before)
