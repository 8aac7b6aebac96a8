"""Discrete Eulerian flow maps: what they are at both ends of the fraction ``a``, and in between."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEAN, STD, assert_same_method
from test_methods import mlp, mlp_params

from fmjax import paths, times
from fmjax.keys import example_keys
from fmjax.methods import weighting
from fmjax.methods.alpha_flow import alpha_flow
from fmjax.methods.eulerian import eulerian
from fmjax.methods.progressive import progressive
from fmjax.methods.soflow import soflow
from fmjax.types import Batch

pytestmark = pytest.mark.usefixtures("x64")
PLAIN = {"time": times.uniform, "pair": times.ordered_pair, "diagonal": 0.75}  # as of the other flow maps
constant = lambda a: functools.partial(times.constant_fraction, value=a)


def unlogged(method):
    """The method without the residual it logs, the quotient ``d / a``, which others do not have."""

    def loss(*args):
        value, aux = method.loss(*args)
        return value, {name: a for name, a in aux.items() if name != "residual"}

    return method._replace(loss=loss)


@pytest.fixture
def draw():
    """A batch with its source and progress, keys, and parameters of a student and of a target."""
    x0, x1 = np.random.default_rng(3).standard_normal((2, 16, 2))
    params, target = (jax.tree.map(lambda a: a.astype(jnp.float64), mlp_params(seed)) for seed in (0, 1))
    batch = Batch(jnp.asarray(MEAN + STD * x1), x0=jnp.asarray(x0), progress=jnp.linspace(0, 1, 16, endpoint=False))
    return batch, example_keys(jax.random.key(2), jnp.arange(16)), params, target


def test_a_step_of_the_whole_jump_is_flow_matching_on_trajectories(draw):
    """``a = 1``: ``|u(I_s, s, t) - dI_s|^2``, which is mean flow without its derivative."""
    whole = alpha_flow(mlp, fraction=constant(1.0), path=paths.trigonometric(), **PLAIN)
    assert_same_method(
        unlogged(whole), eulerian(mlp, velocity="conditional", limit=0.0, path=paths.trigonometric()), *draw
    )


def test_with_half_the_jump_by_the_teachers_map_it_is_progressive(draw):
    """``a = 1/2``: ``u(x, s, t) = (u(x, s, m) + u(X_{s,m}(x), m, t)) / 2`` (arXiv 2510.20771, of shortcut models)."""
    half = alpha_flow(
        mlp, fraction=constant(0.5), power=0.0, velocity="own", solver="jump", bootstrap="target", **PLAIN
    )
    assert_same_method(unlogged(half), progressive(mlp), *draw)


@pytest.mark.parametrize("velocity", ["conditional", "own"])
def test_its_gradient_is_eulerian_to_first_order_in_the_fraction(velocity, draw):
    """With ``dI_s`` the gradient of mean flow. Halving ``a`` halves the difference; so does the residual's."""
    batch, keys, params, target = draw

    def gradient_and_residual(method):
        (_, aux), g = jax.jit(jax.value_and_grad(method.loss, has_aux=True))(params, target, batch, keys)
        return np.concatenate([np.ravel(a) for a in jax.tree.leaves(g)]), np.asarray(
            aux.get("residual", aux["per_example"])
        )

    limit = gradient_and_residual(eulerian(mlp, velocity=velocity, tangent=velocity, stop="all", diagonal=0.0))
    options = {"velocity": velocity} | PLAIN | {"diagonal": 0.0}
    errors = [
        [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(gradient_and_residual(m), limit, strict=True)]
        for m in (alpha_flow(mlp, fraction=constant(a), **options) for a in (4e-3, 2e-3))
    ]
    assert 0 < max(errors[1]) < 0.1
    np.testing.assert_allclose(np.log2(np.divide(*errors)), 1, atol=0.03)


def test_with_the_published_weight_it_ends_as_mean_flow(draw):
    """At ``a = 0.005`` to first order in ``a``, where the authors' code takes the derivative; before, as published."""
    batch, keys, params, target = draw
    options, size = PLAIN | {"diagonal": 0.0}, batch.x1[0].size
    gradient = lambda method: jax.grad(lambda p: method.loss(p, target, batch, keys)[0])(params)
    whole = eulerian(mlp, velocity="conditional", tangent="conditional", diagonal=0.0)
    expected = gradient(weighting.adaptive(whole, power=1.0, floor=size * 1e-3))
    last, early = (gradient(alpha_flow(mlp, adaptive=1.0, fraction=constant(a), **options)) for a in (5e-3, 5.1e-3))
    norm = optax.tree.norm
    off = lambda actual: norm(jax.tree.map(jnp.subtract, actual, expected)) / norm(expected)
    assert off(last) < 0.02 and norm(early) < norm(expected) / 10
    without = gradient(alpha_flow(mlp, adaptive=1.0, limit=0.0, fraction=constant(5e-3), **options))
    assert abs(norm(without) / norm(early) - 1) < 0.1


def test_soflows_loss_is_a_difference_quotient_of_two_jumps(draw):
    """Times ``a / 2``, and without the weight of larger examples; ``least`` keeps the two times apart."""
    batch, keys, params, _ = draw
    method = soflow(mlp, diagonal=0.0)
    aux = method.loss(params, None, batch, keys)[1]
    s, t = aux["s"], aux["t"]
    a = jnp.clip(0.1 * 0.02**batch.progress, 1e-4 / (t - s), 1)
    m = s + (t - s) * a
    assert (m - s > 0.99e-4).all()
    wide, jump = lambda a: a[:, None], method.flow_map(params)
    x, v = wide(1 - s) * batch.x0 + wide(s) * batch.x1, batch.x1 - batch.x0
    apart = (jump(x, s, t) - jump(x + wide(m - s) * v, m, t)) / wide(m - s)
    np.testing.assert_allclose(aux["residual"], (apart**2).mean(1), rtol=1e-7)
    np.testing.assert_allclose(aux["per_example"], a / 2 * aux["residual"], rtol=1e-12)


def test_the_chord_ends_on_the_interpolant(draw):
    assert_same_method(alpha_flow(mlp, velocity="chord"), alpha_flow(mlp, velocity="conditional"), *draw)
    batch, keys, params, target = draw
    a, path = 0.3, paths.trigonometric()
    method = alpha_flow(
        mlp, velocity="chord", fraction=constant(a), path=path, diagonal=0.0, bootstrap="target", power=0.0
    )
    aux = method.loss(params, target, batch, keys)[1]
    s, t = aux["s"], aux["t"]
    m = s + a * (t - s)
    x, y = (paths.with_velocity(path, batch.x0, batch.x1, at)[0] for at in (s, m))
    apart = (method.flow_map(params)(x, s, t) - method.flow_map(target)(y, m, t)) / (t - s)[:, None]
    np.testing.assert_allclose(aux["per_example"], (apart**2).mean(1), rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"velocity": "condtional"}, "velocity='condtional'.*'conditional'"),
        ({"solver": "huen", "velocity": "own"}, "solver='huen'.*'heun'"),
        ({"solver": "heun"}, "solver='heun'.* velocity='conditional'.*velocity='own'"),
        ({"bootstrap": "ema"}, "bootstrap='ema'.*params.*target"),
        ({"power": -1.0}, "power=-1.0"),
        ({"diagonal": 1.5}, "diagonal=1.5"),
    ],
)
def test_what_it_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        alpha_flow(mlp, **options)
