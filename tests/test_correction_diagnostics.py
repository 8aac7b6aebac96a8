"""The round trip of a flow whose solver has a known order, and its exact inverse."""

import jax.numpy as jnp
import numpy as np

from fmjax import correction, oracles
from fmjax.sampling import grids


def ring():
    """Eight modes on a circle of radius 2 with standard deviation 0.2, and an error field."""
    angle = np.arange(8) * np.pi / 4
    law = oracles.mixture(jnp.asarray(2 * np.stack([np.cos(angle), np.sin(angle)], 1)), 0.2)

    def velocity(eps):
        def v(x, t, cond=None):
            a, b = x[:, 0], x[:, 1]
            turn, bend = jnp.stack([-b, a], 1), jnp.stack([jnp.sin(2 * b), jnp.cos(2 * a)], 1)
            return law.velocity(x, t) + eps * (0.6 * x + 0.5 * turn + 0.5 * bend)

        return v

    return law, velocity


def test_round_trip(x64, key):
    """Reverse fourth-order steps come back to order 5, inverse steps exactly (where they are fine enough)."""
    law, velocity = ring()
    x = law.sample(key, 300)
    trip = lambda n, way: correction.round_trip(velocity, 0.35, x, grids.uniform_grid(n), backward_map=way)
    coarse, fine = trip(20, "reverse"), trip(40, "reverse")
    assert coarse / fine > 2**4
    assert 1e-4 < coarse < 1e-3  # 3.7e-4 is known for another sample
    assert trip(40, "inverse") < 1e-5
