"""What the battery of ``test_methods.py`` knows of each method: its closed form on Gaussian data.

A new method is covered by its file and one entry of ``CASES``.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import methods, oracles, paths, times
from fmjax.methods.align_your_flow import GAP
from fmjax.methods.shortcut import fine_time
from fmjax.types import Batch, Method, Net, Network, expand, over_batch

MEAN, STD, SIGMA = np.array([0.75, -0.5], np.float32), np.array([0.5, 1.5], np.float32), (0.4, 0.9, 0.6)


def discover() -> list[str]:
    return sorted(
        {m.name for m in pkgutil.iter_modules(methods.__path__)} - {"common", "views", "weighting", "attacks"}
    )


def factory(name: str) -> Callable[..., Method]:
    """The factory of a method file: the function of the file's own name, whose one positional argument is ``net``."""
    function = getattr(importlib.import_module(f"fmjax.methods.{name}"), name, None)
    assert inspect.isfunction(function), f"fmjax/methods/{name}.py has no factory {name}(net, *, ...)"
    positional = inspect.getfullargspec(inspect.unwrap(function)).args
    assert positional == ["net"], f"{name} takes {positional} by position; a factory takes net, the rest by keyword"
    return function


class Case(NamedTuple):
    """What the battery has to know of a method.

    ``make(net)``; ``batch(key, n)`` draws data; ``solution`` is the closed-form net, its params ignored; ``uses`` maps
    each view of ``Method`` to its closed form; ``standard(x, s)`` is N(0, I), independent of ``s``, where the net is
    evaluated at the right places (``x`` as distributed at its source time ``s``); ``teacher``: the loss depends on its
    target;
    ``inverts``: it jumps from ``t`` back to ``s`` as well; ``away``: from how far descent has to return, more
    where the targets are noisier; ``draws``: the loss draws something from its keys.
    """

    make: Callable[[Net], Method]
    batch: Callable[[Any, int], Batch]
    solution: Net
    uses: dict[str, Callable]
    standard: Callable[[Any, Any], Any]
    teacher: bool = False
    inverts: bool = False
    away: float = 0.2
    draws: bool = True


def centred(path, x, t, extra=0.0, mean=MEAN, std=STD):
    """``x - E[I_t]`` for the Gaussian data, and the variance of ``I_t`` plus ``extra``."""
    alpha, beta, *_ = paths.coefficients(path, x, t)
    return x - beta * mean, alpha**2 + (beta * std) ** 2 + extra


standardise = lambda offset, var: offset / jnp.sqrt(var)


def gaussian_along(path):
    return oracles.gaussian(jnp.asarray(MEAN), jnp.asarray(STD), path=path)


def flow_case(path, name: str, *uses: str, teacher: bool = False, inverts: bool = False, away=0.2, **options) -> Case:
    """A method whose closed form is the average velocity of Gaussian data along a path."""
    oracle = gaussian_along(path)
    return Case(
        make=lambda net: factory(name)(net, path=path, **options),
        batch=lambda key, n: Batch(oracle.sample(key, n)),
        solution=oracles.average_velocity(oracle),
        uses={use: getattr(oracle, use) for use in uses},
        standard=lambda x, s: standardise(*centred(path, x, s)),
        teacher=teacher,
        inverts=inverts,
        away=away,
    )


def map_case(name: str, **options) -> Callable[[Any], Case]:
    """A method that learns the flow map of Gaussian data, and its velocity on the diagonal."""
    return lambda path: flow_case(path, name, "velocity", "flow_map", **options)


def score_case(path) -> Case:
    """Marginals of the Gaussian's own flow at times ``t``, noised by sigma(t): N(beta m, C_t + sigma^2)."""
    sigma = lambda x, t: jnp.interp(expand(over_batch(t, x), x), np.linspace(0, 1, len(SIGMA)), np.array(SIGMA))
    noised = lambda x, t: centred(path, x, t, sigma(x, t) ** 2)

    def batch(key, n):
        k_t, k_0, k_1 = jax.random.split(key, 3)
        t = jax.random.randint(k_t, (n,), 0, 5) / 4.0
        x0, x1 = jax.random.normal(k_0, (n, 2)), MEAN + STD * jax.random.normal(k_1, (n, 2))
        return Batch(paths.with_velocity(path, x0, x1, t)[0], t=t)

    def score(x, t):
        offset, var = noised(x, t)
        return -offset / var

    return Case(
        make=lambda net: factory("score_corrector")(net, sigma=SIGMA),
        batch=batch,
        solution=lambda params, x, s, t, cond=None, key=None: -sigma(x, s) * score(x, s),
        uses={"direction": lambda x, t: sigma(x, t) ** 2 * score(x, t), "score": score},
        standard=lambda x, s: standardise(*noised(x, s)),
    )


def log_odds_case(path, make) -> Case:
    """Real data against data of another Gaussian: the logit is the sum of the net's coordinates.

    Each is ``log N(x; m_t, C_t) - log N(x; m~_t, C~_t)``. The net gets the real half of its rows first.
    """
    generated = {"mean": np.array([0.25, 0.0], np.float32), "std": np.array([0.75, 1.0], np.float32)}
    real_at, generated_at = functools.partial(centred, path), functools.partial(centred, path, **generated)
    log_density = lambda offset, var: -0.5 * (offset**2 / var + jnp.log(var))
    score = lambda offset, var: -offset / var

    def batch(key, n):
        k_real, k_generated = jax.random.split(key)
        draw = lambda key, mean, std: mean + std * jax.random.normal(key, (n, 2))
        return Batch(draw(k_real, MEAN, STD), draw(k_generated, **generated))

    def standard(x, s):
        half = len(x) // 2
        return jnp.concatenate(
            [standardise(*real_at(x[:half], s[:half])), standardise(*generated_at(x[half:], s[half:]))]
        )

    def summed(net):
        return lambda params, x, s, t, cond=None, key=None: net(params, x, s, t, cond, key).sum(-1)

    return Case(
        make=lambda net: make(summed(net)),
        batch=batch,
        solution=lambda params, x, s, t, cond=None, key=None: (
            log_density(*real_at(x, s)) - log_density(*generated_at(x, s))
        ),
        uses={"direction": lambda x, t: score(*real_at(x, t)) - score(*generated_at(x, t))},
        standard=standard,
    )


def classifier_case(path) -> Case:
    """Both distributions along their own flows at times ``t``, without an attack: nothing is left to draw."""
    case = log_odds_case(path, lambda net: factory("classifier_corrector")(net, eps=0.0))

    def batch(key, n):
        k_t, k_0, k_1, k_data = jax.random.split(key, 4)
        t = jax.random.randint(k_t, (n,), 0, 5) / 4.0
        along = lambda key, x: paths.with_velocity(path, jax.random.normal(key, x.shape), x, t)[0]
        data = case.batch(k_data, n)
        return Batch(along(k_1, data.x1), along(k_0, data.x0), t=t)

    return case._replace(batch=batch, draws=False)


def residual_case(path) -> Case:
    """A half of the velocity, beside a base that is frozen at the other half."""
    case = flow_case(path, "flow_matching", "velocity")
    half = lambda *args: case.solution(*args) / 2

    def make(net):
        method = factory("residual")(net, path=path, base=half)
        both = lambda params: {"base": (), "residual": params}
        return method._replace(
            loss=lambda params, *args: method.loss(both(params), *args),
            velocity=lambda params: method.velocity(both(params)),
        )

    return case._replace(make=make, solution=half)


def contrastive_case(path, weight=0.3) -> Case:
    """Flow matching whose net is ``(v - weight beta' E[x1]) / (1 - weight)``; its views are unbiased."""
    case, oracle = flow_case(path, "flow_matching", "velocity", "score"), gaussian_along(path)
    away = lambda x, s: weight * paths.coefficients(path, x, s)[3] * MEAN

    def batch(key, n):
        own, other = jax.random.split(key)
        return Batch(oracle.sample(own, n), negative=oracle.sample(other, n))

    return case._replace(
        make=lambda net: factory("contrastive")(net, path=path, mean=MEAN, weight=weight),
        batch=batch,
        solution=lambda params, x, s, t, cond=None, key=None: (
            (case.solution(params, x, s, t) - away(x, s)) / (1 - weight)
        ),
    )


def edm_case(path) -> Case:
    """A velocity of the linear path; the views are those on ``path``."""
    case, linear = flow_case(path, "flow_matching", "velocity", "score"), gaussian_along(paths.linear())
    return case._replace(
        make=lambda net: factory("edm")(net, path=path, sigma_data=0.8),
        solution=lambda params, x, s, t, cond=None, key=None: linear.velocity(x, s),
        standard=lambda x, s: standardise(*centred(paths.linear(), x, s)),
    )


def denoising_case(path) -> Case:
    """The v-prediction of Gaussian data along a path."""
    case, oracle = flow_case(path, "denoising", "velocity", "score"), gaussian_along(path)
    turned = lambda x, s: paths.convert(path, x, oracle.velocity(x, s), s, kind="velocity", to="v_prediction")
    return case._replace(solution=lambda params, x, s, t, cond=None, key=None: turned(x, s))


def interpolant_case(path) -> Case:
    """With a latent beside the N(0, I) source the second head, ``E[z|x] = -gamma S``, is a function of the first."""
    latent = path._replace(gamma=paths.two_sided().gamma)
    merged = paths.one_sided(latent)
    case = flow_case(merged, "flow_matching", "velocity", "score")

    def two_heads(net):
        def both(params, x, s, t, cond=None, key=None):
            v = net(params, x, s, t, cond, key)
            return jnp.concatenate([v, -paths.latent(latent, x, s)[0] * paths.score(merged, x, v, s)], -1)

        return both

    return case._replace(make=lambda net: factory("stochastic_interpolant")(two_heads(net), path=latent))


def straight_case(path) -> Case:
    """Lines from x0 to ``MEAN + STD x0``, the Gaussian flow's own pairs: they do not cross, so one x0 leads to x."""

    def batch(key, n):
        x0 = jax.random.normal(key, (n, 2))
        return Batch(MEAN + STD * x0, x0=x0, t=jnp.zeros(n))

    def start(x, s):
        alpha, beta, *_ = paths.coefficients(path, x, s)
        return (x - beta * MEAN) / (alpha + beta * STD)

    def velocity(x, s):
        x0 = start(x, s)
        return paths.with_velocity(path, x0, MEAN + STD * x0, s)[1]

    return Case(
        make=lambda net: factory("straighten")(net, path=path),
        batch=batch,
        solution=lambda params, x, s, t, cond=None, key=None: velocity(x, s),
        uses={"velocity": velocity},
        standard=start,
    )


def coupled_case(path, rho=0.6) -> Case:
    """Noise and data of correlation ``rho``, coordinate by coordinate, by an encoder that is not learned."""

    def with_encoder(net):
        def flow(*args):
            return net(*args)

        log_variance = jnp.full(2, jnp.log(1 - rho**2))
        spread = lambda x: jnp.broadcast_to(log_variance.astype(x.dtype), x.shape)
        encoder = lambda params, x, *rest: jnp.concatenate([rho * (x - MEAN) / STD, spread(x)], 1)
        return Network(flow, encoder=encoder)

    def about(x, t):
        """``x - E I_t``, the variance of ``I_t``, half its derivative, and the derivative of ``E I_t``."""
        alpha, beta, d_alpha, d_beta = paths.coefficients(path, x, t)
        offset, var = centred(path, x, t, 2 * alpha * beta * rho * STD)
        half = d_alpha * alpha + d_beta * beta * STD**2 + (d_alpha * beta + alpha * d_beta) * rho * STD
        return offset, var, half, d_beta * MEAN

    def velocity(x, t):
        offset, var, half, moved = about(x, over_batch(t, x))
        return moved + half / var * offset

    return flow_case(path, "flow_matching")._replace(
        make=lambda net: factory("learned_coupling")(with_encoder(net), path=path),
        solution=lambda params, x, s, t, cond=None, key=None: velocity(x, s),
        uses={"velocity": velocity},
        standard=lambda x, s: standardise(*about(x, s)[:2]),
    )


class Alias(NamedTuple):
    """A method that is another one with arguments: ``factory(name)(net)`` is ``factory(of)(net, **options)``."""

    of: str
    options: dict[str, Any]


def alias(of: str, **options) -> Alias:
    return Alias(of, options)


class Own(NamedTuple):
    """A method that the battery leaves out, as its solution is no closed form at finite steps; what tests it."""

    tests: str


own = Own


# One entry a method: a function of the path that gives its ``Case``, or an ``alias``, which the battery leaves out.
CASES = {
    "align_your_flow": alias("eulerian", diagonal=0.0, pair=GAP, normalise=0.1, warmup=0.1, limit=0.99, stop="all"),
    # the only step without an error: the others are the Eulerian map's to first order (its own tests)
    "alpha_flow": map_case(
        "alpha_flow",
        fraction=functools.partial(times.constant_fraction, value=0.3),
        velocity="own",
        solver="jump",
        teacher=True,
    ),
    "categorical_ratio_matching": own("test_tokens, against enumeration"),
    "classifier_corrector": classifier_case,
    "consistency": own("its formula in test_methods_papers, and its own tests"),
    "consistency_trajectory": map_case(
        "consistency_trajectory", fraction=times.constant_fraction, solver="jump", teacher=True
    ),
    "continuous_consistency": map_case("continuous_consistency", velocity="own", diagonal=0.5, teacher=True, away=0.5),
    "contrastive": contrastive_case,
    "denoising": denoising_case,
    "discrete_flow_matching": own("test_tokens, against enumeration"),
    "discriminator": lambda path: log_odds_case(path, lambda net: factory("discriminator")(net, path=path)),
    "edm": edm_case,
    "eulerian": map_case("eulerian", teacher=True),
    "flow_map_matching": map_case("flow_map_matching", inverts=True),
    "flow_matching": lambda path: flow_case(path, "flow_matching", "velocity", "score"),
    "improved_mean_flow": map_case("improved_mean_flow", teacher=True, away=2.0),
    "jko": own("test_straightening_blocks, against the closed form of a Gaussian block"),
    "lagrangian": map_case("lagrangian", teacher=True),
    "learned_coupling": coupled_case,
    "mean_flow": map_case("mean_flow", away=2.0),
    "neural_operator": own("test_methods_operators, against the Gaussian map"),
    "progressive": map_case("progressive", teacher=True),
    "progressive_distillation": alias("progressive", diagonal=0.0, pair=functools.partial(times.grid_pair, rounds=1)),
    "residual": residual_case,
    "score_corrector": score_case,
    "self_corrected": own("test_methods_self_corrected, against the map of a straight flow"),
    "shortcut": alias("progressive", time=fine_time, diagonal=7 / 8, pair=times.dyadic, finest=1 / 128),
    "soflow": own("its formula in test_methods_papers: its times of fixed steps have no closed form"),
    "stochastic_interpolant": interpolant_case,
    "straighten": straight_case,
    "terminal_velocity_matching": map_case("terminal_velocity_matching", teacher=True),
    "trajectory_regression": own("test_methods_operators, against the Gaussian map"),
}

# Their own tests hold their losses and gradients to formulas and to tested methods: the battery is run with -m slow.
SLOW = {
    "consistency_trajectory",
    "continuous_consistency",
    "discriminator",
    "improved_mean_flow",
    "mean_flow",
    "residual",
}


def case_of(name: str, path=None) -> Case:
    if name not in CASES:
        pytest.fail(f"the battery does not know {name}: add CASES[{name!r}] to tests/cases.py, a Case of its path")
    entry = CASES[name]
    if isinstance(entry, Alias):
        pytest.fail(f"{name} is {entry.of} with arguments: the battery holds for that one")
    if isinstance(entry, Own):
        pytest.fail(f"{name} is tested by {entry.tests}")
    return entry(path or paths.linear())


def assert_same_method(method: Method, other: Method, batch: Batch, keys, params, target) -> None:
    """Equal losses, ``aux`` and gradients on one draw, and equal views; in float64, where equal means to rounding."""
    x, t = batch.x1, jnp.linspace(0.1, 0.9, len(batch.x1))

    def evaluate(m):
        views = {
            view: make(params)(x, *((t / 2, t) if view == "flow_map" else (t,)))
            for view, make in m._asdict().items()
            if view != "loss" and callable(make)
        }
        return jax.value_and_grad(m.loss, has_aux=True)(params, target, batch, keys), views

    ours, theirs = jax.jit(lambda: (evaluate(method), evaluate(other)))()
    assert any(np.any(g) for g in jax.tree.leaves(ours[0][1]))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-12, atol=1e-14)
