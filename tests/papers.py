"""The losses of papers in the notation of their authors, in noise times, on drawn times: for ``test_methods_papers``.

``tau = 1 - s`` and ``r = 1 - t``, from data (0) to noise (1); ``z = (1 - tau) x1 + tau x0``, ``v = x0 - x1``; the
network ``F`` of noise time is ``-u``. Every formula takes ``p``, in which it is differentiated, and the draw.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

D = 64  # elements of an example: as many as the published weights need
stopped = jax.lax.stop_gradient
col = lambda t: t[:, None]
total = lambda a: jnp.sum(a**2, 1)
mean = lambda a: jnp.mean(a**2, 1)


def net(params, x, s, t, cond=None, key=None):
    wide = jnp.concatenate([x, jnp.broadcast_to(s, x.shape[:1])[:, None], jnp.broadcast_to(t, x.shape[:1])[:, None]], 1)
    return jnp.tanh(wide @ params["in"] + params["bias"]) @ params["out"]


def weights(seed: int, outputs: int = D):
    rng = np.random.default_rng(seed)
    shapes = {"in": (D + 2, 24), "bias": (24,), "out": (24, outputs)}
    scale = {"in": D**-0.5, "bias": 1.0, "out": 0.3}
    return {name: jnp.asarray(scale[name] * rng.standard_normal(shape)) for name, shape in shapes.items()}


class Draw(NamedTuple):
    """What a loss was evaluated on: the batch, its times, which rows jump, the parameters of student and target."""

    x0: Any
    x1: Any
    s: Any
    t: Any
    jumps: Any
    progress: Any
    student: Any
    target: Any

    @property
    def tau(self):
        return 1 - self.s

    @property
    def r(self):
        return 1 - self.t

    @property
    def z(self):
        return (1 - col(self.tau)) * self.x1 + col(self.tau) * self.x0

    @property
    def v(self):
        return self.x0 - self.x1

    def at(self, sigma):
        """``x1 + sigma x0``, and the map to the data ``D(x; sigma)`` there, as a function of the parameters."""
        t = 1 / (1 + sigma)
        x = col(t) * (self.x1 + col(sigma) * self.x0)
        return lambda p: x + col(1 - t) * net(p, x, t, jnp.ones_like(t))


def field(p, z, tau, r):
    return -net(p, z, 1 - tau, 1 - r)


def along(p, z, v, tau, r):
    """``F`` and its derivative along the trajectory, with ``r`` held."""
    return jax.jvp(lambda z, tau: field(p, z, tau, r), (z, tau), (v, jnp.ones_like(tau)))


def rows(d: Draw, on, off):
    return jnp.where(d.jumps, off, on)


def flow_matching(p, d):
    return mean(field(p, d.z, d.tau, d.tau) - d.v)


def lagrangian(p, d):
    """LSD, Algorithm 1 and its code, over ``D``: the time derivative of the jump against the stopped velocity there."""
    jump = lambda t: d.z + col(t - d.s) * net(p, d.z, d.s, t)
    x, dx = jax.jvp(jump, (d.t,), (jnp.ones_like(d.t),))
    off = total(dx - stopped(net(d.target, stopped(x), d.t, d.t)))
    return rows(d, total(net(p, d.z, d.t, d.t) + d.v), off) / D


def lagrangian_distillation(p, d):
    """LMD: nothing is stopped."""
    x, dx = jax.jvp(lambda t: d.z + col(t - d.s) * net(p, d.z, d.s, t), (d.t,), (jnp.ones_like(d.t),))
    return total(dx - net(d.target, x, d.t, d.t)) / D


def eulerian(p, d):
    """ESD with the stop of its code, "full"."""
    velocity = stopped(net(d.target, d.z, d.s, d.s))
    jump = lambda p, x, s: x + col(d.t - s) * net(p, x, s, d.t)
    _, in_time = jax.jvp(lambda s: jump(p, d.z, s), (d.s,), (jnp.ones_like(d.s),))
    _, in_space = jax.jvp(lambda x: jump(d.student, x, d.s), (d.z,), (velocity,))
    return rows(d, total(net(p, d.z, d.t, d.t) + d.v), total(in_time + stopped(in_space))) / D


def halves(p, d, q):
    m = (d.s + d.t) / 2
    u = net(q, d.z, d.s, m)
    x = d.z + col(m - d.s) * u
    return u, net(q, x, m, d.t), x + col(d.t - m) * net(q, x, m, d.t)


def progressive(p, d):
    """PSD-M."""
    first, second, _ = halves(p, d, d.target)
    off = total(net(p, d.z, d.s, d.t) - stopped(first + second) / 2)
    return rows(d, total(net(p, d.z, d.t, d.t) + d.v), off) / D


def progressive_matching(p, d):
    """PFMM: maps are compared."""
    return total(d.z + col(d.t - d.s) * net(p, d.z, d.s, d.t) - stopped(halves(p, d, d.target)[2])) / D


def shortcut(p, d):
    """Flow matching of the jump 1/128, two jumps of the target for longer ones; the mean over pixels."""
    first, second, _ = halves(p, d, d.target)
    short = net(p, d.z, d.s, d.s + 1 / 128)
    return rows(d, mean(short - (d.x1 - d.x0)), mean(net(p, d.z, d.s, d.t) - stopped(first + second) / 2))


def mean_flow(p, d):
    u, du = along(p, d.z, d.v, d.tau, d.r)
    square = total(u - stopped(d.v - col(d.tau - d.r) * du))
    return square / stopped(square + 0.01)


def improved_mean_flow(p, d):
    """The tangent is the network's own velocity, which a training evaluates at the target: the network itself."""
    own = field(d.target, d.z, d.tau, d.tau)
    u, du = along(p, d.z, own, d.tau, d.r)
    square = total(u + col(d.tau - d.r) * stopped(du) - d.v)
    return square / stopped(square + 0.01)


def alpha_flow(p, d):
    a = 1 / (1 + np.exp(25 * (np.asarray(d.progress) - 0.5)))
    a = np.where(a > 1 - 0.005, 1, np.maximum(a, 0.005))
    after = d.tau - a * (d.tau - d.r)
    u = field(d.student, d.z - col(d.tau - after) * d.v, after, d.r)
    aim = jnp.where(col(d.jumps), col(a) * d.v + col(1 - a) * u, d.v)
    square = mean(field(p, d.z, d.tau, d.r) - stopped(aim))
    return rows(d, 1, a) * square / stopped(square + 1e-3)


def soflow(p, d):
    """The product form of the code: its gradient counts, its value is another."""
    delta = field(p, d.z, d.tau, d.tau) - d.v
    on = mean(delta) / stopped(mean(delta) + 0.01)
    after = d.tau - 0.1 * 0.02 ** np.asarray(d.progress) * (d.tau - d.r)
    f = d.z + col(d.r - d.tau) * field(d.student, d.z, d.tau, d.r)
    moved = d.z + col(after - d.tau) * d.v
    f_later = moved + col(d.r - after) * field(d.student, moved, after, d.r)
    quotient = (f - f_later) / col(jnp.where(d.jumps, d.tau - after, 1))
    weight = 1 / (mean(quotient) + 0.01)
    off = -jnp.mean(field(p, d.z, d.tau, d.r) * stopped(quotient * col(weight)), 1)
    return rows(d, on, off)


def align_your_flow(p, d):
    """AYF-EMD: the tangent of the map along the teacher, normalised, ``r = min(0.99, progress / 0.1)``."""
    v = field(d.target, d.z, d.tau, d.tau)
    u, du = along(d.student, d.z, v, d.tau, d.r)
    warm = col(jnp.minimum(0.99, d.progress / 0.1))
    g = u - v + warm * col(d.tau - d.r) * du
    g = g / (jnp.linalg.norm(g, axis=1, keepdims=True) + 0.1)
    return total(field(p, d.z, d.tau, d.r) - stopped(u - g)) / D


def flow_map_matching(p, d):
    x, dx = (1 - col(d.t)) * d.x0 + col(d.t) * d.x1, d.x1 - d.x0
    y = x + col(d.s - d.t) * net(p, x, d.t, d.s)
    jump = lambda y, t: y + col(t - d.s) * net(p, y, d.s, t)
    _, rate = jax.jvp(lambda t: jump(y, t), (d.t,), (jnp.ones_like(d.t),))
    return (total(rate - dx) + total(jump(y, d.t) - x)) / D


def consistency(p, d):
    """ECT with c = 0 over the gap of the noise levels; the norm over the square root of ``D``."""
    sigma, stage = d.tau / (1 - d.tau), np.floor(8 * np.asarray(d.progress))
    after = sigma * jnp.maximum(0, 1 - 2.0 ** -(stage + 1) * (1 + 8 * jax.nn.sigmoid(-sigma)))
    end = jnp.where(col(after == 0), d.x1, d.at(after)(d.student))
    return jnp.sqrt(total(d.at(sigma)(p) - stopped(end))) / (sigma - after) / D**0.5


def continuous_consistency(p, d, warmup=0.025):
    """sCM, Algorithm 1, of angles, for sigma_d = 1: the network is ``F`` of ``cos x - sin F``."""
    angle = np.pi / 2 * d.tau
    x, dx = (
        jnp.cos(col(angle)) * d.x1 + jnp.sin(col(angle)) * d.x0,
        jnp.cos(col(angle)) * d.x0 - jnp.sin(col(angle)) * d.x1,
    )

    def f(p, x, a):
        s = 1 - 2 / np.pi * a
        u = net(p, x, s, jnp.ones_like(s))
        return (jnp.cos(col(a)) * x - (x + col(1 - s) * u)) / jnp.sin(col(a))

    value, rate = jax.jvp(lambda x, a: f(d.student, x, a), (x, angle), (dx, jnp.ones_like(angle)))
    cos, sin, r = jnp.cos(col(angle)), jnp.sin(col(angle)), col(jnp.minimum(1, d.progress / warmup))
    g = -(cos**2) * (value - dx) - r * cos * sin * (x + rate)
    g = g / (jnp.linalg.norm(g, axis=1, keepdims=True) + 0.1)
    return total(f(p, x, angle) - stopped(value + g)) / D


def edm(p, d):
    """``lambda(sigma) |D - x1|^2``, ``lambda = (sigma^2 + 0.25) / (sigma / 2)^2``, over ``D``."""
    sigma = d.tau / (1 - d.tau)
    x = d.x1 + col(sigma) * d.x0
    t = 1 / (1 + sigma)
    denoised = col(t) * x + col(1 - t) * net(p, col(t) * x, t, t)
    return (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * total(denoised - d.x1) / D


def denoising(p, d):
    """The "v" of progressive distillation, ``beta x0 - alpha x1``."""
    return mean(net(p, d.z, d.s, d.s) - (col(1 - d.tau) * d.x0 - col(d.tau) * d.x1))
