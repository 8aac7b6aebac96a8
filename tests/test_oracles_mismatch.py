"""Flows with a known error: closed forms against solves that know nothing of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, sampling
from fmjax.data import densities
from fmjax.oracles import mismatch
from fmjax.sampling import grids, likelihood

EPS = 0.15


def mixed(eps=EPS, **options):
    """The error field of the regression values: ``eps [0.6 x + 0.5 (-x2, x1) + 0.5 (sin 2 x2, cos 2 x1)]``."""
    return mismatch.perturbed(oracles.ring(), mismatch.field(0.6 * eps, 0.5 * eps, 0.5 * eps), **options)


def flows():
    return {
        "over": mismatch.scaled(0.5, 0.3, dim=2),
        "under": mismatch.scaled(1.4, -0.3, dim=2),
        "shift": mismatch.shifted(0.5, jnp.array([0.7, -0.2])),
    }


def standard_normal(x):
    return -0.5 * (x**2 + jnp.log(2 * jnp.pi)).sum(1)


def carried(m, x, t):
    """The end of the trajectories from ``(x, t)``, by 400 Runge-Kutta steps."""
    return sampling.sample(sampling.rk4(m.velocity), x, np.linspace(t, 1, 401))


@pytest.mark.parametrize("name", flows())
def test_the_closed_forms_are_the_marginals_of_the_flow(name, x64, key):
    """``log p`` by the adaptive solve of ``likelihood``; ``log q`` from the data's density and the Jacobian forward."""
    m = flows()[name]
    std = {"over": 0.5, "under": 1.4, "shift": 0.5}[name]
    x = jax.random.normal(key, (6, 2))
    for t in (0.0, 0.3, 1.0):
        if t:
            solved = likelihood.log_density(m.velocity, x, ts=(t, 0.0), rtol=1e-9, atol=1e-9).log_p
            np.testing.assert_allclose(m.log_p(x, t), solved, atol=1e-7)
        end, gain = x, jnp.zeros(6)
        if t < 1:
            end, gain = mismatch.pushed(lambda x, t=t: carried(m, x, t), x, jnp.zeros(6))
        data = oracles.gaussian(0.0, std).log_density(end, 1.0)
        np.testing.assert_allclose(m.log_q(x, t), data - gain, atol=1e-7)
        np.testing.assert_allclose(m.logit(x, t), m.log_q(x, t) - m.log_p(x, t), atol=1e-12)


@pytest.mark.parametrize("name", flows())
def test_kl_and_w2_are_those_of_the_two_gaussians(name, x64):
    """Means and deviations read from the log-densities (a quadratic); ``W2^2 = |m - m'|^2 + d (s - s')^2``."""
    m, t, moments = flows()[name], jnp.array([0.0, 0.25, 0.7, 1.0]), []

    def moments_of(log_p, t):
        score = lambda x: jax.grad(lambda x: log_p(x[None], t)[0])(x)
        var = -1 / jax.jacfwd(score)(jnp.zeros(2))[0, 0]
        return var * score(jnp.zeros(2)), jnp.sqrt(var)

    for log_p in (m.log_p, m.log_q):
        moments.append(jax.jit(jax.vmap(functools.partial(moments_of, log_p)))(t))
    (mean_p, std_p), (mean_q, std_q) = moments
    apart = ((mean_p - mean_q) ** 2).sum(1)
    kl = 2 * jnp.log(std_q / std_p) + (2 * std_p**2 + apart) / (2 * std_q**2) - 1
    np.testing.assert_allclose(m.kl(t), kl, rtol=1e-10)
    np.testing.assert_allclose(m.w2(t), jnp.sqrt(apart + 2 * (std_p - std_q) ** 2), rtol=1e-10)


def test_the_solved_densities_are_the_closed_ones(x64, key):
    """The same two flows as an oracle and an error field."""
    x, t = jax.random.normal(key, (7, 2)), jnp.linspace(0, 1, 7)
    closed = flows()
    oracle = oracles.gaussian(jnp.zeros(2), 0.5)
    solved = {
        "over": mismatch.perturbed(oracle, mismatch.field(0.3), steps=200),
        "shift": mismatch.perturbed(oracle, mismatch.field(0.0, shift=(0.7, -0.2)), steps=200),
    }
    for name, m in solved.items():
        np.testing.assert_allclose(m.velocity(x, t), closed[name].velocity(x, t), rtol=1e-12)
        for what in ("log_p", "log_q", "logit"):
            solve = jax.jit(getattr(m, what))
            np.testing.assert_allclose(solve(x, t), getattr(closed[name], what)(x, t), atol=1e-8)


def test_the_solved_densities_of_a_mixture_are_those_of_the_divergence(x64, key):
    """``log p_t(x) = log N(x_0) - int div v``, solved adaptively; ``log q_t(x) = log pi(F(x)) + log |det dF/dx|``."""
    m, oracle = mixed(steps=200), oracles.ring()
    x = oracle.sample(key, 5)
    for t in (0.4, 1.0):
        solved = likelihood.log_density(m.velocity, x, ts=(t, 0.0), rtol=1e-9, atol=1e-9).log_p
        np.testing.assert_allclose(m.log_p(x, t), solved, atol=1e-6)
    end, gain = mismatch.pushed(lambda x: carried(m, x, 0.4), x, jnp.zeros(5))
    np.testing.assert_allclose(m.log_q(x, 0.4), oracle.log_density(end, 1.0) - gain, atol=1e-6)
    np.testing.assert_array_equal(m.log_q(x, 1.0), oracle.log_density(x, 1.0))


def test_the_default_steps_solve_within_a_thousandth_and_with_order_four(x64, key):
    x = oracles.ring().sample(key, 64)

    @functools.partial(jax.jit, static_argnums=1)
    def fields(x, steps):
        m = mixed(**({"steps": steps} if steps else {}))
        return m.logit(x, 1.0), mismatch.gradient(m.logit)(x, 1.0)

    exact = fields(x, 128)
    relative = lambda a, b: jnp.sqrt(((a - b) ** 2).mean() / (b**2).mean())
    default, half = ([relative(a, b) for a, b in zip(fields(x, k), exact, strict=True)] for k in (None, 8))
    assert max(default) < 1e-3
    assert half[0] / default[0] > 2**3.5


def test_without_an_error_there_is_no_gap_to_the_bit(key):
    m = mixed(0.0)
    x = jnp.tile(oracles.ring().sample(key, 9), (3, 1))
    t = jnp.repeat(jnp.array([0.0, 0.5, 1.0]), 9)
    fields = jax.jit(lambda x, t: (m.logit(x, t), mismatch.gradient(m.logit)(x, t), m.log_p(x, t), m.log_q(x, t)))
    logit, push, log_p, log_q = fields(x, t)
    assert not logit.any() and not push.any()
    np.testing.assert_array_equal(log_p, log_q)


def test_the_field_is_what_it_says_and_its_divergence_twice_the_radial_part(x64, key):
    x = jax.random.normal(key, (5, 2))
    error = mismatch.field(0.6 * EPS, 0.5 * EPS, 0.5 * EPS, (0.1, -0.2))
    a, b = np.asarray(x).T
    e = EPS * np.stack([0.6 * a - 0.5 * b + 0.5 * np.sin(2 * b), 0.6 * b + 0.5 * a + 0.5 * np.cos(2 * a)], 1)
    np.testing.assert_allclose(error(x, 0.5), e + np.array([0.1, -0.2]), rtol=1e-12)
    np.testing.assert_allclose(likelihood.divergence(error, x, 0.5)[1], 1.2 * EPS, rtol=1e-12)


def test_a_pushed_density_is_that_of_the_flow_map_and_composes(x64, key):
    """Through the exact map of a Gaussian it is the density at the end; two halves give the same."""
    oracle = oracles.gaussian(jnp.array([1.0, -2.0]), jnp.array([0.5, 2.0]))
    x = jax.random.normal(key, (6, 2))
    y, log_p = mismatch.pushed(lambda x: oracle.flow_map(x, 0.0, 1.0), x, standard_normal(x))
    np.testing.assert_allclose(log_p, oracle.log_density(y, 1.0), atol=1e-12)
    half = mismatch.pushed(lambda x: oracle.flow_map(x, 0.0, 0.4), x, standard_normal(x))
    y_, log_p_ = mismatch.pushed(lambda x: oracle.flow_map(x, 0.4, 1.0), *half)
    np.testing.assert_allclose(y_, y, atol=1e-12)
    np.testing.assert_allclose(log_p_, log_p, atol=1e-12)


def test_the_kl_of_a_sampler_needs_no_density_estimate(key):
    """Forty Runge-Kutta steps of the over-dispersed flow: the closed form ``d ((e^{2 eps} - 1) / 2 - eps)``."""
    m, x = flows()["over"], jax.random.normal(key, (20_000, 2))
    run = lambda x: sampling.sample(sampling.rk4(m.velocity), x, grids.uniform_grid(40))
    y, log_p = jax.jit(lambda x: mismatch.pushed(run, x, standard_normal(x)))(x)
    terms = np.asarray(log_p - oracles.gaussian(0.0, 0.5).log_density(y, 1.0), np.float64)
    assert abs(terms.mean() - m.kl(1.0)) < 4.5 * terms.std() / len(terms) ** 0.5


def test_the_ring_is_the_distribution_of_the_eight_gaussians(key):
    """The score of a distribution has mean zero over it, and Stein's identity ``E[S x^T] = -I``."""
    x = densities.draw_eight_gaussians(key, 100_000)
    score = np.asarray(oracles.ring().score(x, 1.0), np.float64)
    for product, want in ((score, 0.0), (score[:, :, None] * np.asarray(x)[:, None], -np.eye(2))):
        assert (np.abs(product.mean(0) - want) < 4.5 * product.std(0) / len(x) ** 0.5).all()
