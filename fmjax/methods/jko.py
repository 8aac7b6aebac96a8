"""JKO-iFlow: one block of a flow from data to N(0, I), a step of the gradient flow of the divergence."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from fmjax.methods import common as c
from fmjax.methods import views
from fmjax.sampling.likelihood import draw_probes
from fmjax.sampling.log_det import push_with_log_det
from fmjax.types import FlowMethod, Net

SIZES = (0.25, 0.35, 0.49, 0.69, 0.96, 1.34, 1.88, 2.64)  # of the eight blocks in the authors' code


def jko(net: Net, *, size: float = 0.25, steps: int = 3, probes: int | None = 1) -> FlowMethod:
    """Train a block that moves its data towards N(0, I), ``E [|y|^2 / 2 - log det + |y - x|^2 / (2 size)]``.

    One step of JKO (arXiv 2212.14424) of the size ``h``: ``y`` is ``x`` after the block, at ``t = 0``, from ``t = 1``
    by ``steps`` RK4 steps. As in all of ``fmjax`` the velocity leads from noise to data, so that the block is solved
    backward. It departs from the authors' code: Hutchinson's estimate by derivatives in place of finite differences,
    and the loss is divided by the number of elements. No teacher and no noise are needed; the solve is in the loss.
    The next block trains on ``y`` (``straightening.fit_blocks``).

    Args:
        net: average velocity ``u(params, x, s, t, cond, key)``, whose diagonal is the velocity of the block.
        size: ``h``, positive; ``SIZES`` holds the eight published sizes.
        steps: number of RK4 steps.
        probes: number of Hutchinson probes; ``None`` for the exact divergence.

    Returns:
        A method with ``velocity``. ``aux`` has ``moved``, the mean square of ``y - x``.

    Raises:
        ValueError: ``size`` or a number that is not positive.

    >>> import jax, jax.numpy as jnp
    >>> from fmjax import methods
    >>> from fmjax.types import Batch
    >>> method = methods.jko(lambda params, x, s, t, cond=None, key=None: params * x)
    >>> float(method.loss(0.0, None, Batch(jnp.ones((4, 3))), jax.random.key(0))[0])
    0.5
    """
    if not size > 0 or steps < 1 or (probes is not None and probes < 1):
        raise ValueError(f"size={size}, steps={steps}, probes={probes}: not positive. Give positive numbers.")
    velocity = views.velocity_view(net)

    @c.keyed
    def loss(params, target, batch, key):
        x = batch.x1
        e = None if probes is None else draw_probes(key, probes, x.shape[1:], dtype=x.dtype)
        y, log_det = push_with_log_det(velocity(params), x, np.linspace(1, 0, steps + 1), batch.cond, probes=e)
        moved = c.mse(y, x)
        return c.reduce(c.mse(y, jnp.zeros_like(y)) / 2 - log_det / x[0].size + moved / (2 * size), moved=moved)

    return FlowMethod(loss, velocity=velocity)
