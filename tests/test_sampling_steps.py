"""One battery for every step, which it finds by itself: cost, gradients, precision, direction, shapes."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling
from fmjax.keys import as_keys
from fmjax.types import Costed, Multistep, stated


def positional(function):
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


FUNCTIONS = {n: f for n in sampling.__all__ if inspect.isfunction(f := getattr(sampling, n))}
FOUND = {name: (make, {}) for name, make in FUNCTIONS.items() if positional(make) == ["velocity"]}
ORACLE = oracles.gaussian(0.3, 0.5)
score = lambda x, t, cond=None: ORACLE.score(x, t)
VARIANTS = FOUND | {
    "euler_maruyama, memoryless": (sampling.euler_maruyama, {"strength": "memoryless"}),
    "euler_maruyama, score network": (sampling.euler_maruyama, {"score": lambda x, t, cond=None: -x}),
    "stochastic_heun, memoryless": (sampling.stochastic_heun, {"strength": "memoryless"}),
    "stochastic_heun, score network": (sampling.stochastic_heun, {"score": lambda x, t, cond=None: -x}),
    "ddim, ancestral": (sampling.ddim, {"eta": 1.0}),
    "edm_heun, churn": (sampling.edm_heun, {"s_churn": 1.0, "steps": 4}),
    "ipndm, uneven": (sampling.ipndm, {"even": False}),
    "initial_noise, Heun's": (sampling.initial_noise, {"heun": True}),
    "dpmpp_2s, ancestral": (sampling.dpmpp_2s, {"eta": 1.0}),
    "dpmpp_3m, SDE": (sampling.dpmpp_3m, {"eta": 1.0}),
    "reflected": (sampling.reflected, {"solver": "heun", "low": -9.0, "high": 9.0}),  # no face within reach
    "unipc, 3": (sampling.unipc, {"order": 3, "solver_type": "bh1"}),
}
RISING_ONLY = {"glass", "reverse_diffusion", "edm_heun, churn", "dpmpp_2s, ancestral", "dpmpp_3m, SDE"}
X = np.array([[1.0], [-0.4], [0.2]])
SHORT = jnp.asarray(X, jnp.bfloat16)
GRIDS = {"rising": np.linspace(0, 1, 5), "falling": np.linspace(1, 0, 5)}
every_step = pytest.mark.parametrize("name", VARIANTS)


def made(name, velocity=ORACLE.velocity):
    make, options = VARIANTS[name]
    return make(velocity, **options)


def test_a_function_of_a_velocity_alone_is_a_step():
    """So a config resolves a step by its name among the exported functions."""
    assert set(FOUND) == {
        "ddim", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m", "edm_heun", "euler", "euler_maruyama", "from_diffrax", "glass",
        "heun", "initial_noise", "ipndm", "midpoint", "reflected", "reverse_diffusion", "rk38", "rk4",
        "stochastic_heun", "unipc",
    }  # fmt: skip
    for name in VARIANTS:
        assert isinstance(made(name), (Costed, Multistep)), name


@every_step
@pytest.mark.parametrize("guided", [False, True])
def test_a_step_evaluates_its_networks_as_often_as_it_states(name, guided, key):
    """Counted on the host, over one step inside the path; a guided velocity counts twice."""
    calls = []

    def counted(function):
        def velocity(x, t, cond=None):
            jax.debug.callback(lambda: calls.append(1))
            return function(x, t) if cond is None else function(x, t) + cond[:, None]

        return velocity

    make, options = VARIANTS[name]
    options = {k: counted(v) if k == "score" else v for k, v in options.items()}
    velocity = counted(ORACLE.velocity)
    step = make(sampling.classifier_free(velocity, null=0, scale=2.0) if guided else velocity, **options)
    if name == "from_diffrax":
        assert step.nfe is None
        with pytest.raises(ValueError, match="step="):
            sampling.cost(step, 4)
        return
    x, cond, keys = jnp.asarray(X, jnp.float32), jnp.ones(3) if guided else None, as_keys(key, 3)
    if isinstance(step, Multistep):
        run = lambda x: step.step(step.init(x), x, 0.3, 0.5, cond, keys)[0]
    else:
        run = lambda x: step(x, 0.3, 0.5, cond, keys)
    jax.block_until_ready(jax.jit(run)(x))
    jax.effects_barrier()
    assert len(calls) == stated(step).nfe == sampling.cost(step, 1).nfe


@every_step
@pytest.mark.parametrize("direction", GRIDS)
def test_the_gradient_of_a_sample_is_its_derivative(name, direction, x64, key):
    """Reverse mode against forward mode; neither end of the path makes it nan."""
    if direction == "falling" and name in RISING_ONLY:
        with pytest.raises(ValueError, match="ts=1 .. 0: "):
            sampling.sample(made(name), jnp.asarray(X), GRIDS[direction], key=key)
        return
    total = lambda x: sampling.sample(made(name), x, GRIDS[direction], key=key).sum()
    x, tangent, h = jnp.asarray(X), jnp.ones_like(X), 1e-4
    if name == "from_diffrax":  # its adjoint has no forward mode
        value, gradient = jax.jit(jax.value_and_grad(total))(x)
        np.testing.assert_allclose(gradient.sum(), (jax.jit(total)(x + h * tangent) - value) / h, rtol=1e-3)
        return
    both = lambda x: (jax.grad(total)(x).sum(), jax.jvp(total, (x,), (tangent,))[1])
    reverse, forward = jax.jit(both)(x)
    chex.assert_tree_all_finite((reverse, forward))
    np.testing.assert_allclose(reverse, forward, rtol=1e-9, atol=1e-12)


@functools.cache
def plain(name):
    """The sample of the float32 state on the static grid."""
    return jax.jit(lambda x: sampling.sample(made(name), x, 4, key=jax.random.key(0)))(SHORT.astype(jnp.float32))


@every_step
def test_a_short_state_is_carried_in_float32_and_cast_back(name, key):
    """Whatever the velocity computes in; else many small steps are lost to rounding."""
    x = SHORT
    short = jax.jit(lambda x: sampling.sample(made(name), x, 4, key=key))(x)
    assert short.dtype == jnp.bfloat16
    chex.assert_tree_all_finite(plain(name))
    np.testing.assert_array_equal(short, plain(name).astype(jnp.bfloat16))
    half = made(name, lambda x, t, cond=None: ORACLE.velocity(x, t).astype(jnp.float16))
    for kind in (jnp.float16, jnp.float32):
        shape = jax.eval_shape(lambda x: sampling.sample(half, x, 4, key=key), x.astype(kind))
        assert shape.dtype == kind


@every_step
def test_a_step_alone_refuses_states_it_would_round_and_keeps_short_ones(name, key):
    """A step is public: what ``sample`` checks holds for one call, too."""
    step = sampling.with_memory(made(name))
    right = jnp.asarray(X, jnp.float32)
    for x in (jnp.full((3, 1), 3), jnp.full((3, 1), 3, jnp.uint8), jnp.ones((3, 1), bool)):
        with pytest.raises(TypeError, match="^x="):
            step.step(step.init(right), x, 0.25, 0.5, None, key)
    for t in (jnp.full(1, 0.5), jnp.full((3, 1), 0.5), jnp.full(2, 0.5)):
        with pytest.raises(ValueError, match=r"^t.shape="):
            step.step(step.init(right), right, 0.25, t, None, key)
    one = lambda x: step.step(step.init(x), x, 0.25, 0.5, None, key)[0]
    assert jax.eval_shape(one, SHORT).shape == SHORT.shape


@every_step
def test_a_traced_grid_gives_the_sample_of_the_static_grid(name, key):
    x, run = SHORT.astype(jnp.float32), lambda x, ts: sampling.sample(made(name), x, ts, key=key)
    np.testing.assert_allclose(jax.jit(run)(x, jnp.asarray(GRIDS["rising"])), plain(name), rtol=1e-5, atol=1e-6)


@every_step
def test_an_empty_batch_and_a_batch_of_scalars_have_samples(name, key):
    for shape in ((0, 2), (3,)):
        assert jax.eval_shape(lambda x: sampling.sample(made(name), x, 4, key=key), jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("name", [n for n in FOUND if n not in RISING_ONLY and not n.startswith(("euler_m", "stoch"))])
@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()], ids=["linear", "trigonometric"])
def test_a_falling_grid_leads_from_the_data_to_the_noise(name, path, key):
    """Of a deterministic step, to the first order of a hundred steps; ``initial_noise`` for its first step alone."""
    oracle = oracles.gaussian(0.3, 0.5, path=path)
    make, options = VARIANTS[name]
    options = options | ({"path": path} if "path" in inspect.signature(make).parameters else {})
    x = jax.random.normal(key, (16, 1)) * 0.5 + 0.3
    ts = np.array([1.0, 0.99]) if name == "initial_noise" else np.linspace(1, 0, 101)
    noise = jax.jit(lambda x: sampling.sample(make(oracle.velocity, **options), x, ts))(x)
    np.testing.assert_allclose(noise, oracle.flow_map(x, 1.0, ts[-1]), atol=0.06)
