"""Methods of other networks or batches equal their authors' formulas at their defaults: value, gradient and times."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import papers
import pytest
from papers import KEY, B, D, assert_equal, col, drawn, field, mean, of_one_law, stopped, total
from papers import setting as setting  # a fixture

from fmjax import methods
from fmjax.keys import as_keys, normal, split
from fmjax.types import Batch, Network


def test_terminal_velocity_matching_is_the_authors_formula(setting, x64):
    """One noise for both terms, the second at a time of its own; the teacher is another network."""
    batch, p, q = setting
    end = jnp.linspace(0.1, 0.9, B)
    loss = methods.terminal_velocity_matching(papers.net, time=lambda key: end).loss

    def both(p):
        value, aux = loss(p, q, batch, as_keys(KEY, B))
        return value, aux

    (_, aux), gradient = jax.jit(jax.value_and_grad(both, has_aux=True))(p)
    tau, r = 1 - aux["s"], 1 - aux["t"]
    mix = lambda tau: (1 - col(tau)) * batch.x1 + col(tau) * batch.x0

    def published(p):
        jump = lambda r: mix(tau) + col(r - tau) * field(p, mix(tau), tau, r)
        f, df = jax.jvp(jump, (r,), (jnp.ones_like(r),))
        terminal = mean(df - stopped(field(q, f, r, r)))
        each = terminal + mean(field(p, mix(1 - end), 1 - end, 1 - end) - (batch.x0 - batch.x1))
        return each.mean(), each

    (_, each), expected = jax.jit(jax.value_and_grad(published, has_aux=True))(p)
    np.testing.assert_allclose(aux["per_example"], each, rtol=1e-9)
    assert_equal(gradient, expected)


def test_contrastive_flow_matching_is_the_authors_formula(setting, x64):
    """``|v - u|^2 - 0.05 |v - u~|^2`` with the target ``u~`` of another example, of independent noise."""
    batch, p, _ = setting
    batch = batch._replace(negative=batch.x1[::-1])
    loss = methods.contrastive(papers.net, mean=0.0).loss
    (_, aux), gradient = jax.value_and_grad(lambda p: loss(p, p, batch, as_keys(KEY, B)), has_aux=True)(p)
    draw = drawn(batch, aux, p, p)
    u = -field(p, draw.z, draw.tau, draw.tau)
    other = batch.negative - normal(
        split(as_keys(KEY, B), 4)[2], (D,), jnp.float64
    )  # the third of the keys of the loss
    np.testing.assert_allclose(aux["per_example"], mean(u + draw.v) - 0.05 * mean(u - other), rtol=1e-9)
    published = lambda p: jnp.mean(
        mean(field(p, draw.z, draw.tau, draw.tau) - draw.v) - 0.05 * mean(-field(p, draw.z, draw.tau, draw.tau) - other)
    )
    assert_equal(gradient, jax.grad(published)(p))


def test_the_learned_coupling_is_the_authors_formula(setting, x64):
    """``|u - (x1 - x0)|^2 + 20 KL / d``, ``x0 = mu + e^(l / 2) z``, with the gradient through ``x0``."""
    batch, p, _ = setting
    encoder = lambda params, x, *rest: jnp.concatenate([params["shift"] * x, params["log"] + 0 * x], 1)
    net = Network(lambda params, *args: papers.net(params["flow"], *args), encoder=encoder)
    params = {"flow": p, "shift": jnp.asarray(0.3), "log": jnp.asarray(-0.2)}
    loss = methods.learned_coupling(net).loss
    plain = batch._replace(x0=None)
    (_, aux), gradient = jax.value_and_grad(lambda q: loss(q, q, plain, as_keys(KEY, B)), has_aux=True)(params)
    z, t = normal(split(as_keys(KEY, B), 3)[1], (D,), jnp.float64), col(aux["t"])

    def published(q):
        mu, log = q["shift"] * batch.x1, q["log"] + 0 * batch.x1
        x0 = mu + jnp.exp(log / 2) * z
        kl = 0.5 * jnp.sum(-1 - log + mu**2 + jnp.exp(log), 1) / D
        flow = papers.net(q["flow"], (1 - t) * x0 + t * batch.x1, aux["t"], aux["t"])
        each = mean(flow - (batch.x1 - x0)) + 20 * kl
        return each.mean(), each

    (_, each), expected = jax.value_and_grad(published, has_aux=True)(params)
    np.testing.assert_allclose(aux["per_example"], each, rtol=1e-9)
    assert_equal(gradient, expected)


def test_the_stochastic_interpolants_gradient_is_the_authors(setting, x64):
    """Of ``|v|^2 / 2 - dI.v`` and ``|n|^2 / 2 - z.n`` on ``(1 - t) x0 + t x1 + sqrt(t (1 - t)) z``, times ``2 / d``."""
    batch, _, _ = setting
    p = papers.weights(3, 2 * D)
    loss = methods.stochastic_interpolant(papers.net).loss
    (_, aux), gradient = jax.value_and_grad(lambda p: loss(p, p, batch, as_keys(KEY, B)), has_aux=True)(p)
    z, t = normal(split(as_keys(KEY, B), 5)[2], (D,), jnp.float64), col(aux["t"])
    gamma = jnp.sqrt(t * (1 - t))
    x = (1 - t) * batch.x0 + t * batch.x1 + gamma * z
    rate = batch.x1 - batch.x0 + (1 - 2 * t) / (2 * gamma) * z

    def published(p):
        v, n = jnp.split(papers.net(p, x, aux["t"], aux["t"]), 2, 1)
        return jnp.mean(jnp.sum(v**2 / 2 - rate * v, 1) + jnp.sum(n**2 / 2 - z * n, 1)) * 2 / D

    assert_equal(gradient, jax.grad(published)(p), rtol=1e-8)


def test_reflow_and_its_pseudo_huber_loss_are_the_authors_formula(setting, x64):
    """``|v - (x1 - x0)|^2`` in the mean, and ``(sqrt(|.|^2 + c^2) - c) / d``, ``c = 0.00054 d``."""
    batch, p, _ = setting
    pairs = batch._replace(t=jnp.zeros(B))
    for distance in ("squared", "pseudo_huber"):
        loss = methods.straighten(papers.net, distance=distance).loss
        graded = jax.value_and_grad(lambda p, loss=loss: loss(p, p, pairs, as_keys(KEY, B)), has_aux=True)
        (_, aux), gradient = graded(p)
        draw = drawn(batch, aux, p, p)

        def published(p, distance=distance, draw=draw):
            error, c = total(field(p, draw.z, draw.tau, draw.tau) - draw.v), 0.00054 * D
            each = error / D if distance == "squared" else (jnp.sqrt(error + c**2) - c) / D
            return each.mean(), each

        (_, each), expected = jax.value_and_grad(published, has_aux=True)(p)
        np.testing.assert_allclose(aux["per_example"], each, rtol=1e-8)
        assert_equal(gradient, expected, rtol=1e-8)


def test_the_discriminators_loss_is_the_authors_cross_entropy(setting, x64):
    """Of sigmoid outputs against labels 1 (real) and 0, both noised, in the mean over both halves."""
    batch, _, _ = setting
    p = papers.weights(4, 1)
    net = lambda params, x, s, t, cond=None, key=None: papers.net(params, x, s, t)[:, 0]
    (_, aux), gradient = jax.value_and_grad(
        lambda p: methods.discriminator(net).loss(p, p, batch, as_keys(KEY, B)), has_aux=True
    )(p)
    _, real, generated, _ = split(as_keys(KEY, B), 4)
    t = col(aux["t"])
    noised = [(1 - t) * normal(k, (D,), jnp.float64) + t * x for k, x in ((real, batch.x1), (generated, batch.x0))]

    def published(p):
        output = jnp.concatenate([jax.nn.sigmoid(net(p, x, aux["t"], aux["t"])) for x in noised])
        label = jnp.repeat(jnp.array([1.0, 0.0]), B)
        return -jnp.mean(label * jnp.log(output) + (1 - label) * jnp.log(1 - output))

    value = lambda p: methods.discriminator(net).loss(p, p, batch, as_keys(KEY, B))[0]
    np.testing.assert_allclose(value(p), published(p), rtol=1e-9)
    assert_equal(gradient, jax.grad(published)(p))


def test_the_residual_is_flow_matching_of_the_sum(setting, x64):
    batch, p, q = setting
    loss = methods.residual(papers.net).loss
    both = {"base": q, "residual": p}
    (_, aux), gradient = jax.value_and_grad(lambda b: loss(b, None, batch, as_keys(KEY, B)), has_aux=True)(both)
    draw = drawn(batch, aux, p, q)
    published = lambda p: jnp.mean(
        mean(field(q, draw.z, draw.tau, draw.tau) + field(p, draw.z, draw.tau, draw.tau) - draw.v)
    )
    assert_equal(gradient["residual"], jax.grad(published)(p))
    assert not any(np.any(g) for g in jax.tree.leaves(gradient["base"]))


def test_the_score_correctors_loss_is_denoising_of_the_marginals(setting, x64):
    """``|eps(x + sigma z, t_n) - z|^2`` in the mean over elements, as marginal matching describes it."""
    batch, p, _ = setting
    batch = batch._replace(t=jnp.linspace(0, 1, B))
    loss = methods.score_corrector(papers.net, sigma=0.4).loss
    (_, aux), gradient = jax.value_and_grad(lambda p: loss(p, p, batch, as_keys(KEY, B)), has_aux=True)(p)
    z = normal(split(as_keys(KEY, B), 2)[0], (D,), jnp.float64)
    published = lambda p: mean(papers.net(p, batch.x1 + 0.4 * z, batch.t, batch.t) - z)
    np.testing.assert_allclose(aux["per_example"], published(p), rtol=1e-9)
    assert_equal(gradient, jax.grad(lambda p: published(p).mean())(p))


def test_the_classifier_correctors_loss_is_the_robust_cross_entropy(setting, x64):
    """Seven steps of ``2.5 eps / 7`` down the normalised gradient of the margin, in a ball, until one succeeds."""
    batch, _, _ = setting
    p, times = papers.weights(4, 1), jnp.linspace(0, 1, B)
    net = lambda params, x, s, t, cond=None, key=None: 3 * papers.net(params, x, s, t)[:, 0]
    loss = lambda p: methods.classifier_corrector(net).loss(p, p, batch._replace(t=times), as_keys(KEY, B))
    (_, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(p)

    def attacked(x, y):
        margin = jax.jit(jax.value_and_grad(lambda x: jnp.sum(y * net(p, x, times, times))))
        d = jnp.zeros_like(x)
        for _ in range(7):
            slope = margin(x + d)[1]
            ahead = d - 2.5 * 0.5 / 7 * slope / jnp.linalg.norm(slope, axis=1, keepdims=True)
            ahead *= jnp.minimum(1, 0.5 / jnp.linalg.norm(ahead, axis=1, keepdims=True))
            d = jnp.where(col(y * net(p, x + d, times, times) > 0), ahead, d)
        return x + d

    backward, forward = attacked(batch.x1, 1.0), attacked(batch.x0, -1.0)

    def published(p):
        q, r = (jax.nn.sigmoid(net(p, x, times, times)) for x in (backward, forward))
        each = -(jnp.log(q) + jnp.log(1 - r)) / 2
        return each.mean(), each

    (_, each), expected = jax.value_and_grad(published, has_aux=True)(p)
    np.testing.assert_allclose(aux["per_example"], each, rtol=1e-8)
    assert_equal(gradient, expected, rtol=1e-7)
    moved = jnp.linalg.norm(backward - batch.x1, axis=1)
    assert 0 < (moved == 0).mean() < 1 and np.isclose(moved.max(), 0.5)  # some are wrong at once, some resist


# --- the times: uniform, in [1e-3, 1 - 1e-3] where a velocity is infinite at the ends

N = 16_384
plain = lambda params, x, *rest: params * x
doubled = lambda params, x, *rest: jnp.concatenate([x, x], -1)
UNIFORM = {
    "contrastive flow matching": methods.contrastive(plain, mean=0.0),
    "learned coupling": methods.learned_coupling(Network(plain, encoder=doubled)),
    "stochastic interpolant": methods.stochastic_interpolant(doubled),
    "reflow": methods.straighten(plain),
    "residual": methods.residual(lambda params, x, *rest: x),
}


@pytest.mark.parametrize("name", UNIFORM)
def test_the_times_are_uniform(name):
    x = jnp.ones((N, 1))
    batch = Batch(x, None if name == "learned coupling" else x, t=jnp.zeros(N), negative=x)
    params = {"base": 1.0, "residual": 1.0} if name == "residual" else 1.0
    t = np.asarray(jax.jit(UNIFORM[name].loss)(params, params, batch, KEY)[1]["t"], np.float64)
    assert of_one_law(t, np.random.default_rng(1).uniform(size=N))


def test_the_times_of_tvms_second_term_are_the_authors():
    """Noise times ``sigmoid(z - 0.4)``, beside the pairs of the first term (``test_methods_papers``)."""
    time = inspect.signature(methods.terminal_velocity_matching).parameters["time"].default
    theirs = 1 / (1 + np.exp(-np.random.default_rng(1).normal(-0.4, 1, N)))
    assert of_one_law(1 - np.asarray(time(as_keys(KEY, N)), np.float64), theirs)
