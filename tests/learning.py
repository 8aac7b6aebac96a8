"""Small trainings for the tests of learning: a network, its training in one program, errors against an exact field."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import oracles, paths
from fmjax.types import Batch, expand, over_batch

LINEAR, CIRCLE, LATENT = paths.linear(), paths.trigonometric(), paths.two_sided()
MEANS = np.array([[2.0, 0.0], [-1.0, 1.5], [-1.0, -1.5], [0.5, 0.8]]) / 1.5
STD, WEIGHTS = 0.35, np.array([0.5, 0.25, 0.15, 0.1])
STEPS, SIZE, RATE = 3000, 128, 4e-3


# four modes of unequal weight in the plane, far from symmetric: a loss whose minimiser is no mean is seen
ORACLES = {
    path: oracles.mixture(jnp.asarray(MEANS), STD, jnp.asarray(WEIGHTS), path=path) for path in (LINEAR, CIRCLE, LATENT)
}


def net(params, x, s, t, cond=None, key=None):
    s, t = expand(over_batch(s, x), x), expand(over_batch(t, x), x)
    h = jnp.concatenate([x, s, t, t - s, jnp.cos(jnp.pi * s), jnp.cos(jnp.pi * t), s * t], -1)
    *hidden, (w, b) = params
    for inner, bias in hidden:
        h = jax.nn.silu(h @ inner + bias)
    return h @ w + b


def logit(params, x, s, t, cond=None, key=None):
    return net(params, x, s, t)[:, 0]


def initial(outputs=2, *, dim=2, width=64):
    """Parameters of ``net``; the last layer starts at zero, so that an error before the training is one."""
    sizes, keys = (dim + 6, width, width, outputs), jax.random.split(jax.random.key(0), 4)
    scale = (2.0, 2.0, 0.0)
    return [
        (jax.random.normal(k, (a, b)) * (c / a) ** 0.5, jnp.zeros(b))
        for k, a, b, c in zip(keys, sizes, sizes[1:], scale, strict=False)
    ]


def data(path=LINEAR):
    return lambda key, n: Batch(ORACLES[path].sample(key, n))


def fit(loss, draw, start, *, target="self", steps=STEPS, size=SIZE, rate=RATE):
    """The averaged parameters after ``steps`` steps of Adam with a cosine rate, one compiled program.

    ``draw(key, n)`` gives batches; the teacher is the network itself, its average (``"ema"``), or other parameters.
    """
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(state, i):
        params, moments, average = state
        key = jax.random.fold_in(jax.random.key(1), i)
        batch = draw(key, size)._replace(progress=jnp.full(size, i / steps))
        teacher = {"self": params, "ema": average}[target] if isinstance(target, str) else target
        gradient = jax.grad(lambda p: loss(p, teacher, batch, jax.random.fold_in(key, 1))[0])(params)
        updates, moments = tx.update(gradient, moments)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.998, (1 + i) / (10 + i))
        return (params, moments, jax.tree.map(lambda a, p: p + decay * (a - p), average, params)), None

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p), p), jnp.arange(steps))[0][2])(start)


def ratio(error, exact):
    """The relative error, of root mean squares."""
    return float(jnp.sqrt(jnp.mean(error**2) / jnp.mean(exact**2)))


def points(path=LINEAR, low=0.0, high=0.98, n=4000):
    """States of the mixture's path at evenly spaced times, and these."""
    first, second, third = jax.random.split(jax.random.key(99), 3)
    x0, x1, z = jax.random.normal(second, (n, 2)), ORACLES[path].sample(first, n), jax.random.normal(third, (n, 2))
    t = jnp.linspace(low, high, n)
    return paths.with_velocity(path, x0, x1, t, *(() if path.gamma is None else (z,)))[0], t


def exact(path, x, s, t, steps=64):
    """``X_{s,t}(x)`` by Runge-Kutta steps along the exact velocity."""
    v, h = ORACLES[path].velocity, (t - s) / steps

    def step(x, i):
        r, dt = s + i * h, expand(h, x)
        a = v(x, r)
        b = v(x + dt / 2 * a, r + h / 2)
        c = v(x + dt / 2 * b, r + h / 2)
        return x + dt / 6 * (a + 2 * b + 2 * c + v(x + dt * c, r + h)), None

    return jax.lax.scan(step, x, jnp.arange(steps))[0]
