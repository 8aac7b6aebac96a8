"""The losses of papers in the notation of their authors, in noise times, on drawn times: for ``test_methods_papers``.

``tau = 1 - s`` and ``r = 1 - t``, from data (0) to noise (1); ``z = (1 - tau) x1 + tau x0``, ``v = x0 - x1``; the
network ``F`` of noise time is ``-u``. Every formula takes ``p``, in which it is differentiated, and the draw.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax.types import Batch

B, KEY = 32, jax.random.key(5)
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


@pytest.fixture(scope="module")
def setting():
    with jax.enable_x64(True):
        x0, x1 = np.random.default_rng(0).standard_normal((2, B, D))
        batch = Batch(jnp.asarray(0.6 * x1 + 0.2), jnp.asarray(x0), progress=jnp.linspace(0, 1, B, endpoint=False))
        return batch, weights(1), weights(2)


def drawn(batch, aux, student, target) -> Draw:
    jumps = aux.get("is_off_diagonal", np.full(len(batch.x1), "s" in aux))
    return Draw(batch.x0, batch.x1, aux.get("s", aux["t"]), aux["t"], jumps, batch.progress, student, target)


def assert_equal(ours, theirs, rtol=1e-9):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale), ours, theirs)


def of_one_law(ours, theirs):
    """Two-sample Kolmogorov-Smirnov: a distance that equal laws exceed with probability 1e-6."""
    both = np.sort(np.concatenate([ours, theirs]))
    below = lambda a: np.searchsorted(np.sort(a), both, side="right") / len(a)
    return np.abs(below(ours) - below(theirs)).max() < np.sqrt(np.log(2e6) / 2 * (1 / len(ours) + 1 / len(theirs)))


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


def progressive_distillation(p, d):
    """The baseline of shortcut models: two jumps of the teacher of the round, the mean over pixels."""
    first, second, _ = halves(p, d, d.target)
    return mean(net(p, d.z, d.s, d.t) - stopped(first + second) / 2)


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
    """Up to ``a = 0.005`` the weight is mean flow's, of the difference quotient."""
    a = 1 / (1 + np.exp(25 * (np.asarray(d.progress) - 0.5)))
    a = np.where(a > 1 - 0.005, 1, np.maximum(a, 0.005))
    after = d.tau - a * (d.tau - d.r)
    u = field(d.student, d.z - col(d.tau - after) * d.v, after, d.r)
    aim = jnp.where(col(d.jumps), col(a) * d.v + col(1 - a) * u, d.v)
    square = mean(field(p, d.z, d.tau, d.r) - stopped(aim))
    square *= rows(d, 1, jnp.where(a > 0.005, 1, a**-2.0))
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


def data_prediction(p, d):
    return mean(net(p, d.z, d.s, d.s) - d.x1)


def simple(p, d, low=0.1, high=20.0):
    """The simple loss of DDPM in continuous time, ``beta`` linear from 0.1 to 20."""
    kept = jnp.exp(-(low * d.tau + (high - low) * d.tau**2 / 2))
    noised = col(jnp.sqrt(kept)) * d.x1 + col(jnp.sqrt(1 - kept)) * d.x0
    return mean(net(p, noised, d.s, d.s) - d.x0)


def consistency_trajectory(p, d):
    """CTM's comparison in the data after a Heun step of the teacher, as a mean square over the fraction ``a``."""
    jump = lambda p, z, tau, r: z + col(r - tau) * field(p, z, tau, r)
    still, gap = d.student, d.tau - d.r
    a = jnp.clip(0.1 * 0.02**d.progress, 1e-4 / jnp.maximum(gap, 1e-4), 1)  # a step of 1e-4 at least
    after = d.tau - a * gap
    first = field(d.target, d.z, d.tau, d.tau)
    second = field(d.target, d.z + col(after - d.tau) * first, after, after)
    solved, zero = d.z + col(after - d.tau) * (first + second) / 2, jnp.zeros_like(d.r)
    aim = stopped(jump(still, jump(still, solved, after, d.r), d.r, zero))
    return rows(d, flow_matching(p, d), mean(jump(still, jump(p, d.z, d.tau, d.r), d.r, zero) - aim) / a)
