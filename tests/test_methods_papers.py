"""Each method that carries a paper's name equals its authors' formula at its defaults: value, gradient, times."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import papers
import pytest
from papers import D, Draw, col, field, mean, stopped, total

from fmjax import methods
from fmjax.keys import as_keys, normal, split
from fmjax.types import Batch, Network

B, N = 32, 16_384
AYF_GAP = (-1.5, 1.5)  # the paper gives the family and, as far as is known, no numbers
KEY = jax.random.key(5)


class Paper(NamedTuple):
    """A method with its arguments and its authors' formula; ``value``: the loss has the value of the formula, too."""

    method: Callable
    formula: Callable
    options: dict = {}
    value: bool = True

    def make(self, net, **options):
        return self.method(net, **self.options, **options)


PAPERS = {
    "flow matching": Paper(methods.flow_matching, papers.flow_matching),
    "EDM": Paper(methods.edm, papers.edm),
    "v-prediction": Paper(methods.denoising, papers.denoising),
    "LSD": Paper(methods.lagrangian, papers.lagrangian),
    "LMD": Paper(methods.lagrangian, papers.lagrangian_distillation, {"diagonal": 0.0, "stop": "none"}),
    "ESD": Paper(methods.eulerian, papers.eulerian, {"stop": "jacobian"}),
    "PSD-M": Paper(methods.progressive, papers.progressive),
    "PFMM": Paper(methods.progressive, papers.progressive_matching, {"diagonal": 0.0, "compare": "maps"}),
    "FMM": Paper(methods.flow_map_matching, papers.flow_map_matching),
    "shortcut": Paper(methods.shortcut, papers.shortcut),
    "mean flow": Paper(methods.mean_flow, papers.mean_flow),
    "improved mean flow": Paper(methods.improved_mean_flow, papers.improved_mean_flow),
    "AlphaFlow": Paper(methods.alpha_flow, papers.alpha_flow),
    "SoFlow": Paper(methods.soflow, papers.soflow, value=False),
    "AYF-EMD": Paper(methods.align_your_flow, papers.align_your_flow),
    "ECT": Paper(methods.consistency, papers.consistency),
    "sCM": Paper(methods.continuous_consistency, papers.continuous_consistency),
}


@pytest.fixture(scope="module")
def setting():
    with jax.enable_x64(True):
        x0, x1 = np.random.default_rng(0).standard_normal((2, B, D))
        batch = Batch(jnp.asarray(0.6 * x1 + 0.2), jnp.asarray(x0), progress=jnp.linspace(0, 1, B, endpoint=False))
        return batch, papers.weights(1), papers.weights(2)


def drawn(batch, aux, student, target) -> Draw:
    jumps = aux.get("is_off_diagonal", np.full(len(batch.x1), "s" in aux))
    return Draw(batch.x0, batch.x1, aux.get("s", aux["t"]), aux["t"], jumps, batch.progress, student, target)


def assert_equal(ours, theirs, rtol=1e-9):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale), ours, theirs)


@pytest.mark.parametrize("name", PAPERS)
def test_the_loss_is_the_authors_formula(name, setting, x64):
    paper, (batch, student, target) = PAPERS[name], setting
    loss = paper.make(papers.net).loss
    graded = jax.jit(jax.value_and_grad(lambda p: loss(p, target, batch, as_keys(KEY, B)), has_aux=True))
    (value, aux), gradient = graded(student)
    draw = drawn(batch, aux, student, target)
    theirs = jax.jit(jax.value_and_grad(lambda p: (lambda e: (e.mean(), e))(paper.formula(p, draw)), has_aux=True))
    (expected, each), expected_gradient = theirs(student)
    assert_equal(gradient, expected_gradient)
    if paper.value:
        np.testing.assert_allclose(aux["per_example"], each, rtol=1e-9)
        np.testing.assert_allclose(value, expected, rtol=1e-12)


# --- the times, as the authors' code draws them: functions of a numpy generator, in noise time (0 is data)

sigmoid = lambda z: 1 / (1 + np.exp(-z))
logit_normal = lambda rng, m, s, n=N: sigmoid(rng.normal(m, s, n))


def uniform(rng):
    t = rng.uniform(size=N)
    return t, t


def uniform_pair(rng):
    a, b = rng.uniform(size=(2, N))
    return np.maximum(a, b), np.minimum(a, b)


def logit_normal_pair(rng):
    a, b = (logit_normal(rng, -0.4, 1) for _ in range(2))
    return np.maximum(a, b), np.minimum(a, b)


def first_of_pair(rng):
    tau, _ = logit_normal_pair(rng)
    return tau, tau


def one(law):
    def both(rng):
        t = law(rng)
        return t, t

    return both


def to_data(law):
    return lambda rng: (law(rng), np.zeros(N))


def soflow_pair(rng):
    tau = np.maximum(logit_normal(rng, 0.2, 0.8), 1e-4)
    return tau, np.minimum(logit_normal(rng, -1.0, 0.8), tau - 1e-4)


def terminal_pair(rng):
    """A gap, then the target below ``1 - gap`` by rejection."""
    gap, r = logit_normal(rng, -0.8, 1), logit_normal(rng, -0.4, 1)
    while (far := r > 1 - gap).any():
        r[far] = logit_normal(rng, -0.4, 1, far.sum())
    return r + gap, r


def dyadic_pair(rng):
    d = 2.0 ** -rng.integers(0, 7, N)
    start = np.floor(rng.uniform(size=N) / d) * d
    return 1 - start, 1 - start - d


def square_pair(rng):
    """Uniform on the square without its strip, by rejection."""
    pairs = rng.uniform(size=(4 * N, 2))
    tau, r = pairs[np.abs(pairs[:, 0] - pairs[:, 1]) >= 0.02][:N].T
    return tau, r


def gap_pair(rng):
    gap = logit_normal(rng, *AYF_GAP)
    r = rng.uniform(size=N) * (1 - gap)
    return r + gap, r


def diffusion_time(rng, low=0.1, high=20.0, first=1e-5):
    """Importance-sampled times of a variance-preserving diffusion, as noise times of the linear path."""
    area = lambda t: 0.5 * t**2 * (high - low) + t * low
    primitive = lambda t: np.log(-np.expm1(-area(t))) + area(t)
    log = primitive(first) + rng.uniform(size=N) * (primitive(1.0) - primitive(first))
    t = (np.sqrt(low**2 + 2 * (high - low) * np.log1p(np.exp(log))) - low) / (high - low)
    noise, signal = np.sqrt(-np.expm1(-area(t))), np.exp(-area(t) / 2)
    return noise / (noise + signal)


level = lambda rng, m, s: (lambda sigma: sigma / (1 + sigma))(np.exp(rng.normal(m, s, N)))
LAWS = {  # of the diagonal, and off it
    "flow matching": (uniform, None),
    "EDM": (one(lambda rng: level(rng, -1.2, 1.2)), None),
    "LSD": (uniform, uniform_pair),
    "ESD": (uniform, uniform_pair),
    "PSD-M": (uniform, uniform_pair),
    "FMM": (None, square_pair),
    "shortcut": (one(lambda rng: 1 - rng.integers(0, 128, N) / 128), dyadic_pair),
    "mean flow": (first_of_pair, logit_normal_pair),
    "improved mean flow": (first_of_pair, logit_normal_pair),
    "AlphaFlow": (one(lambda rng: logit_normal(rng, -0.4, 1)), logit_normal_pair),
    "SoFlow": (one(lambda rng: logit_normal(rng, -0.2, 1)), soflow_pair),
    "AYF-EMD": (None, gap_pair),
    "TVM": (None, terminal_pair),
    "ECT": (None, to_data(lambda rng: level(rng, -1.1, 2.0))),
    "sCM": (None, to_data(lambda rng: np.arctan(np.exp(rng.normal(-1.0, 1.4, N)) / 0.5) * 2 / np.pi)),
    "discriminator guidance": (one(diffusion_time), None),
}


def of_one_law(ours, theirs):
    """Two-sample Kolmogorov-Smirnov: a distance that equal laws exceed with probability 1e-6."""
    both = np.sort(np.concatenate([ours, theirs]))
    below = lambda a: np.searchsorted(np.sort(a), both, side="right") / len(a)
    return np.abs(below(ours) - below(theirs)).max() < np.sqrt(np.log(2e6) / 2 * (1 / len(ours) + 1 / len(theirs)))


@pytest.mark.parametrize("name", LAWS)
def test_the_times_are_the_authors(name):
    """By quantiles of both times and of the gap, on the diagonal and off it."""
    others = {"TVM": methods.terminal_velocity_matching, "discriminator guidance": methods.discriminator}
    method = others.get(name) or PAPERS[name].make
    logit = name == "discriminator guidance"
    net = lambda params, x, s, t, cond=None, key=None: (params * x)[:, 0] if logit else params * x
    batch = Batch(jnp.ones((N, 1)), jnp.ones((N, 1)))
    aux = jax.jit(method(net).loss)(1.0, 1.0, batch, KEY)[1]
    t, s = np.asarray(aux["t"]), np.asarray(aux.get("s", aux["t"]))
    off = np.asarray(aux.get("is_off_diagonal", np.full(N, LAWS[name][0] is None)))
    for rows, law in zip((~off, off), LAWS[name], strict=True):
        assert rows.any() == (law is not None)
        if law is None:
            continue
        tau, r = law(np.random.default_rng(1))
        for ours, theirs in ((1 - s, tau), (1 - t, r), (t - s, tau - r)):
            assert of_one_law(ours[rows].astype(np.float64).round(5), theirs.round(5))  # ties on grids


# --- methods with other networks or batches


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


def test_an_adaptive_weight_is_left_out_of_small_examples():
    """Below 64 elements; the weight that is asked for is kept."""
    x0, x1 = np.random.default_rng(0).standard_normal((2, 16, 63))
    small = lambda params, x, s, t, cond=None, key=None: params * x
    for method, weight in (
        (methods.mean_flow, "power"),
        (methods.improved_mean_flow, "power"),
        (methods.soflow, "power"),
        (methods.alpha_flow, "adaptive"),
    ):
        value = lambda n, method=method, **options: method(small, **options).loss(
            0.5, 0.5, Batch(jnp.asarray(x1[:, :n]), jnp.asarray(x0[:, :n])), KEY
        )[0]
        assert value(63) == value(63, **{weight: 0.0}) != value(63, **{weight: 1.0})
    wide = Batch(jnp.ones((16, 8, 8)), jnp.zeros((16, 8, 8)))
    default, weighted = (methods.mean_flow(small, **o).loss(0.5, 0.5, wide, KEY)[0] for o in ({}, {"power": 1.0}))
    assert default == weighted
