"""A small training run for tests of the loop: a network of two layers learns points in the plane."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import training
from fmjax.methods import flow_matching
from fmjax.nets.adapters import Model
from fmjax.training import sharding
from fmjax.types import Batch

POINTS = np.random.default_rng(0).standard_normal((512, 2)).astype(np.float32) * 0.3 + 1


def init(key, x, cond=None):
    width, d = 16, x[0].size
    hidden = jax.random.normal(key, (d + 1, width)) / d**0.5
    return {"hidden": hidden, "output": {"kernel": jnp.zeros((width, d)), "bias": jnp.zeros(d)}}


def net(params, x, s, t, cond=None, key=None):
    flat = x.reshape(len(x), -1)
    times = jnp.broadcast_to(jnp.asarray(t, flat.dtype).reshape(-1, 1), (len(flat), 1))
    h = jnp.tanh(jnp.concatenate([flat, times], 1) @ params["hidden"])
    return (h @ params["output"]["kernel"] + params["output"]["bias"]).reshape(x.shape)


def batch(n, size=32):
    rows = np.random.default_rng(n).integers(len(POINTS), size=size)
    return Batch(POINTS[rows])


def plan(**changes):
    """A flow on one device: what is tested of it does not depend on the mesh, and one device compiles faster."""
    model = Model(init, net)
    rate = optax.linear_schedule(0.0, 0.01, 4)
    ready = training.Plan(
        name="flow",
        model=model,
        method=flow_matching(net),
        optimiser=training.Optimiser(optax.adam(rate), rate),
        data=training.TrainingData(batch, 32, (2,)),
        schedule=training.Schedule(steps=12, log_every=5, save_every=4),
        ema=0.9,
        mesh=sharding.make_mesh(jax.devices()[:1]),
    )
    return ready.replace(**changes)
