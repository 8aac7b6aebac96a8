"""Each method that carries a paper's name equals its authors' formula at its defaults: value, gradient, times."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import papers
import pytest
from papers import KEY, B, assert_equal, drawn, of_one_law
from papers import setting as setting  # a fixture

from fmjax import methods, paths
from fmjax.keys import as_keys
from fmjax.types import Batch

N = 16_384
AYF_GAP = (-1.5, 1.5)  # the paper gives the family and, as far as is known, no numbers


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
    "x-prediction": Paper(methods.denoising, papers.data_prediction, {"predict": "data"}),
    "DDPM": Paper(methods.denoising, papers.simple, {"predict": "noise", "path": paths.vp()}),
    "LSD": Paper(methods.lagrangian, papers.lagrangian),
    "LMD": Paper(methods.lagrangian, papers.lagrangian_distillation, {"diagonal": 0.0, "stop": "none"}),
    "ESD": Paper(methods.eulerian, papers.eulerian, {"stop": "jacobian"}),
    "PSD-M": Paper(methods.progressive, papers.progressive),
    "PFMM": Paper(methods.progressive, papers.progressive_matching, {"diagonal": 0.0, "compare": "maps"}),
    "progressive distillation": Paper(methods.progressive_distillation, papers.progressive_distillation),
    "FMM": Paper(methods.flow_map_matching, papers.flow_map_matching),
    "shortcut": Paper(methods.shortcut, papers.shortcut),
    "mean flow": Paper(methods.mean_flow, papers.mean_flow),
    "improved mean flow": Paper(methods.improved_mean_flow, papers.improved_mean_flow),
    "AlphaFlow": Paper(methods.alpha_flow, papers.alpha_flow),
    "SoFlow": Paper(methods.soflow, papers.soflow, value=False),
    "AYF-EMD": Paper(methods.align_your_flow, papers.align_your_flow),
    "ECT": Paper(methods.consistency, papers.consistency),
    "sCM": Paper(methods.continuous_consistency, papers.continuous_consistency),
    "CTM": Paper(methods.consistency_trajectory, papers.consistency_trajectory),
}


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


def round_pair(rng):
    """The first round, of jumps of 1/64; later rounds are runs on grids of half the steps."""
    start = rng.integers(0, 64, N) / 64
    return 1 - start, 1 - start - 1 / 64


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
    "v-prediction": (uniform, None),
    "DDPM": (uniform, None),
    "LMD": (None, uniform_pair),
    "PFMM": (None, uniform_pair),
    "CTM": (uniform, uniform_pair),
    "progressive distillation": (None, round_pair),
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
