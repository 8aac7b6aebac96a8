"""Suites of ``launch.bench``: what a correction mends and what it harms, on a flow whose error is known.

The data are eight modes of standard deviation 0.2 on a circle of radius 2, the flow is the exact velocity plus an error
chosen field (``fmjax.oracles``), so that its forward marginals p_n, its backward marginals q_n, their score and
the logit between them are known without a network.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import oracles, sampling, training
from fmjax.correction import correctors, search
from fmjax.experiments import report
from fmjax.keys import as_keys, normal
from fmjax.methods.classifier_corrector import classifier_corrector
from fmjax.methods.score_corrector import score_corrector
from fmjax.metrics import two_sample
from fmjax.nets.adapters import from_linen
from fmjax.nets.plain import Plain
from fmjax.oracles import mismatch
from fmjax.sampling import grids
from fmjax.types import Batch, Corrector, DirectionFn, Method, Net

RING = oracles.ring()
SIGMA = 0.1  # of the score correctors
BLURRED = oracles.ring(std=float(np.hypot(0.2, SIGMA)))  # q_N * N(0, sigma^2 I)
ERRORS = {  # the arguments of mismatch.field: KL(p_n || q_n) from 0.08 to 0.1, but for none
    "over-dispersed": (0.1, 0.0, 0.0, (0.0, 0.0)),
    "under-dispersed": (-0.1, 0.0, 0.0, (0.0, 0.0)),
    "shifted": (0.0, 0.0, 0.0, (0.2, 0.1)),
    "mixed": (0.09, 0.075, 0.075, (0.0, 0.0)),
    "none": (0.0, 0.0, 0.0, (0.0, 0.0)),
}
STEPS = (5, 10, 20, 40, 100)
GRID = 10  # the steps whose marginals correctors are trained on, and at which alphas are tuned
SAMPLES, TUNED_ON, EXACT = 20_000, 8_000, 4_096  # for W2, for a value of W2 in the search, and for KL
DIRECTIONS = 32
TUNING, REPORTING = jax.random.split(jax.random.key(1), 2), jax.random.split(jax.random.key(2), 3)


class World(NamedTuple):
    """One error: its flow, and the direction of every learned corrector by name."""

    flow: mismatch.Mismatch
    learned: dict[str, DirectionFn]


class Learned(NamedTuple):
    """A corrector to train: its method, the grid of its alpha, and whether its network gives a logit."""

    make: Callable[[Net], Method]
    alphas: tuple[float, ...]
    logit: bool = False


SCORE, CLASSIFIER = search.value_grid(0, 1.5, 0.05), search.value_grid(0, 0.3, 0.01)
LEARNED = {
    "score": Learned(functools.partial(score_corrector, sigma=SIGMA), SCORE),
    "classifier": Learned(functools.partial(classifier_corrector, eps=0.0), CLASSIFIER, logit=True),
    "robust classifier": Learned(functools.partial(classifier_corrector, eps=0.1, steps=3), CLASSIFIER, logit=True),
}


class Row(NamedTuple):
    """A corrector of the table, ``make(world, alpha)``: after the last step or at all times of ``GRID``.

    ``alphas`` holds one alpha, or several, of which the best on the tuning keys is taken. ``exact``: draws no noise.
    """

    make: Callable[[World, jax.Array], Corrector]
    alphas: tuple[float, ...] = (0.0,)
    everywhere: bool = False
    exact: bool = True
    euler: bool = False


def matching(direction: Callable[[World], DirectionFn], beta: float = 0.0):
    """Marginal matching with a direction of the world."""
    return lambda world, alpha: correctors.marginal_matching(
        direction(world), alpha=lambda t: jnp.full_like(t, alpha), beta=beta
    )


def exact_score(world: World) -> DirectionFn:
    """``sigma^2 grad log q_N^sigma``."""
    return lambda x, t, cond=None: SIGMA**2 * BLURRED.score(x, 1.0)


def langevin(world: World, alpha) -> Corrector:
    """Return twenty steps by the score of the data, each as long as the step of the preset ``langevin``."""
    return correctors.langevin(lambda x, t, cond=None: RING.score(x, 1.0), step=SIGMA**2 / 2, steps=20)


ROWS = {
    "none": Row(matching(lambda world: lambda x, t, cond=None: 0 * x), euler=True),
    "exact score, w2": Row(matching(exact_score), (0.5,)),
    "exact score, tuned": Row(matching(exact_score), SCORE),
    "exact score, langevin": Row(matching(exact_score, SIGMA), (0.5,), exact=False),
    "exact score, 20 Langevin steps": Row(langevin, exact=False, euler=True),
    "exact classifier, tuned": Row(matching(lambda w: mismatch.gradient(w.flow.logit)), CLASSIFIER, euler=True),
    **{
        f"learned {name}, tuned": Row(matching(lambda w, name=name: w.learned[name]), recipe.alphas)
        for name, recipe in LEARNED.items()
    },
    "learned score, langevin, n=0..10": Row(
        matching(lambda w: w.learned["score"], SIGMA), (0.5,), everywhere=True, exact=False, euler=True
    ),
}
MODELS = {name: from_linen(Plain(width=96, depth=4, waves=1, logit=recipe.logit)) for name, recipe in LEARNED.items()}
METHODS = {name: recipe.make(MODELS[name].net) for name, recipe in LEARNED.items()}


def world(coefficients, params) -> World:
    """Of traced coefficients and parameters: one compilation serves all errors."""
    flow = mismatch.perturbed(RING, mismatch.field(*coefficients), steps=8)  # the logit's gradient to 0.6 %
    return World(flow, {name: METHODS[name].direction(params[name]) for name in METHODS})


def noise(key, n: int):
    """The starting points of one seed."""
    return normal(as_keys(key, n), (2,))


@functools.partial(jax.jit, static_argnames=("solver", "n", "exact"))
def uncorrected(coefficients, key, *, solver: str, n: int, exact: bool):
    """``SAMPLES`` ends of the flow, and ``EXACT`` of them with their log-density on request."""
    step = getattr(sampling, solver)(world(coefficients, dict.fromkeys(METHODS)).flow.velocity)
    run = lambda x: sampling.sample(step, x, grids.uniform_grid(n))
    x0 = noise(key, SAMPLES)
    log_p = -0.5 * (x0**2 + jnp.log(2 * jnp.pi)).sum(1)
    return run(x0), mismatch.pushed(run, x0[:EXACT], log_p[:EXACT]) if exact else None


@functools.partial(jax.jit, static_argnames=("row", "exact"))
def at_end(coefficients, params, key, alpha, x, known, *, row: str, exact: bool):
    """One correction of the ends ``x``, and the terms of the exact KL of those that are ``known``."""
    correct = ROWS[row].make(world(coefficients, params), alpha)
    keys = as_keys(jax.random.fold_in(key, 1), len(x))
    y = correct(keys, x, 1.0)[0]
    if not exact:
        return y, None
    end, log_p = mismatch.pushed(lambda x: correct(None, x, 1.0)[0], *known)
    return y, log_p - RING.log_density(end, 1.0)


@functools.partial(jax.jit, static_argnames=("row", "solver", "n"))
def all_along(coefficients, params, key, alpha, *, row: str, solver: str, n: int):
    """Corrections at the times of ``GRID`` that are times of ``n`` steps."""
    setting = world(coefficients, params)
    step, at = getattr(sampling, solver)(setting.flow.velocity), [i for i in range(n + 1) if i * GRID % n == 0]
    keys = jax.random.fold_in(key, 1)
    correct = ROWS[row].make(setting, alpha)
    return sampling.sample(step, noise(key, SAMPLES), grids.uniform_grid(n), key=keys, corrector=correct, at=at)


@functools.partial(jax.jit, static_argnames="row")
def for_all(coefficients, params, x, alphas, *, row: str):
    """The ends ``x`` corrected with every alpha, without noise; the direction is evaluated once."""
    setting = world(coefficients, params)
    return jax.vmap(lambda alpha: ROWS[row].make(setting, alpha)(None, x, 1.0)[0])(alphas)


def reference(n: int) -> np.ndarray:
    """Data with as many points in every mode: their counts make no distance."""
    means = np.asarray([[2 * np.cos(a), 2 * np.sin(a)] for a in np.arange(8) * np.pi / 4])
    return means[np.arange(n) % 8] + 0.2 * np.random.default_rng(0).standard_normal((n, 2))


def distance(x) -> float:
    """Sliced W2 to the data."""
    return two_sample.sliced_w2(x, reference(len(x)), directions=DIRECTIONS)


def best_alpha(coefficients, params, row: str, solver: str) -> float:
    """The alpha of least W2 after ``GRID`` steps, on the tuning keys."""
    alphas = ROWS[row].alphas
    if len(alphas) == 1:
        return alphas[0]

    @functools.cache
    def values(name):
        x, _ = uncorrected(coefficients, keys[name], solver=solver, n=GRID, exact=False)
        return [distance(y) for y in for_all(coefficients, params, x[:TUNED_ON], jnp.array(alphas), row=row)]

    keys = {str(jax.random.key_data(key)): key for key in TUNING}
    evaluate = lambda setting, key: values(str(jax.random.key_data(key)))[alphas.index(setting.alpha[0])]
    evaluations = search.Evaluations(evaluate, tuning=TUNING, reporting=REPORTING)
    return search.grid_search(evaluations, search.Space(GRID, (GRID,), alphas), (GRID,)).placement.alpha[0]


@jax.jit
def bank(coefficients, key):
    """``p_n`` and ``q_n`` of ``GRID`` Runge-Kutta steps, ``[GRID + 1, 65536, 2]``, the latter by reversed steps."""
    velocity, ts = world(coefficients, dict.fromkeys(METHODS)).flow.velocity, grids.uniform_grid(GRID)
    run = lambda x, ts: sampling.sample(sampling.rk4(velocity), x, ts, trajectory=True)
    k_p, k_q = jax.random.split(key)
    return run(noise(k_p, 1 << 16), ts), run(RING.sample(k_q, 1 << 16), ts[::-1])[::-1]


def trained(name: str, steps: int = 2500, batch_size: int = 512) -> dict[str, Callable]:
    """``fit(coefficients) -> averaged parameters`` of a learned corrector; compiled once."""
    method, model = METHODS[name], MODELS[name]
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    step, ts = training.make_step(method.loss, tx, mesh=mesh, ema=0.99), np.asarray(grids.uniform_grid(GRID))

    def fit(coefficients):
        p, q = (np.asarray(x) for x in bank(coefficients, jax.random.key(3)))
        rng = np.random.default_rng(0)
        state = training.init(model.init(jax.random.key(4), q[0, :1]), tx, mesh=mesh)
        for _ in range(steps):
            n = rng.integers(GRID + 1, size=batch_size)
            of_p, of_q = rng.integers(p.shape[1], size=(2, batch_size))
            state, _ = step(state, Batch(x1=q[n, of_q], x0=p[n, of_p], t=ts[n]), jax.random.key(5))
        return state.ema

    return fit


def correction_toy(repeats: int) -> list[dict]:
    """Sliced W2 to the data and exact KL against it, by error, solver, corrector and number of steps.

    Mean and standard error over three sampling seeds; alphas are tuned on two others, after ten steps, for each error
    and solver, and kept for the other numbers of steps. KL is ``E[log p(y) - log pi(y)]`` with the density of the
    sampler itself, which a corrector that draws noise does not have, nor steps of Euler's method that may fold. The
    exact classifier knows the error of the flow, not the error of the solver; the exact score knows the data. Learned
    correctors are trained once for every error, on the marginals of ten Runge-Kutta steps. The last row is the floor.
    """
    fits, rows = {name: trained(name) for name in METHODS}, []
    for error, coefficients in ERRORS.items():
        params = {name: fit(coefficients) for name, fit in fits.items()}
        for solver in ("rk4", "euler"):
            names = [name for name, row in ROWS.items() if row.euler or solver == "rk4"]
            alphas = {name: best_alpha(coefficients, params, name, solver) for name in names}
            values = {name: ({}, {}) for name in names}
            for n in STEPS:
                for key in REPORTING:
                    x, known = uncorrected(coefficients, key, solver=solver, n=n, exact=solver == "rk4")
                    for name in names:
                        options, kl = {"row": name}, None
                        if ROWS[name].everywhere:
                            y = all_along(coefficients, params, key, alphas[name], solver=solver, n=n, **options)
                        else:
                            options["exact"] = ROWS[name].exact and known is not None
                            y, kl = at_end(coefficients, params, key, alphas[name], x, known, **options)
                        values[name][0].setdefault(n, []).append(distance(y))
                        values[name][1].setdefault(n, []).append(np.nan if kl is None else float(kl.mean()))
            rows += [line(error, solver, name, alphas[name], *values[name]) for name in names]
    floor = {n: [distance(RING.sample(key, SAMPLES)) for key in REPORTING] for n in STEPS}
    return [*rows, line("-", "-", "perfect samples", 0.0, floor, {n: [np.nan] for n in STEPS})]


def line(error: str, solver: str, name: str, alpha: float, w2: dict, kl: dict) -> dict:
    """A row of the table."""
    text = lambda values: "-" if np.isnan(values).any() else report.plus_minus(*two_sample.mean_se(values))
    row = {"error": error, "solver": solver, "corrector": name, "alpha": f"{alpha:g}" if alpha else "-"}
    return row | {f"W2, N={n}": text(v) for n, v in w2.items()} | {f"KL, N={n}": text(v) for n, v in kl.items()}


SUITES = (correction_toy,)
