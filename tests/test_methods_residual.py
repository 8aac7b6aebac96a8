"""The residual velocity: it starts at the flow, leaves it alone, and learns what it lacks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laboratory import laboratory as laboratory  # a fixture
from laboratory import read

from fmjax import oracles, paths
from fmjax.experiments import build, networks, train
from fmjax.keys import as_keys
from fmjax.methods.flow_matching import flow_matching
from fmjax.methods.residual import residual
from fmjax.nets.adapters import from_linen
from fmjax.nets.mlp import MLP
from fmjax.nets.plain import Plain
from fmjax.sampling import guidance
from fmjax.types import Batch, expand


def moved(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.3 * rng.standard_normal(a.shape, np.float32), params)


def test_the_sum_starts_as_the_base_to_the_bit_whatever_the_base(key):
    """The base is of another architecture; the loss of the first step is flow matching's of the base alone."""
    base, net, x = from_linen(Plain(width=16, depth=2)), from_linen(MLP(width=8, depth=0)), jnp.ones((8, 2))
    theta, first = moved(base.init(key, x)), net.init(key, x)
    method, frozen = residual(net.net, base=base.net), flow_matching(base.net)
    velocity, both = frozen.velocity(theta), {"base": theta, "residual": first}
    total = method.velocity(both)
    x, t = jax.random.normal(key, (8, 2)), jnp.linspace(0, 1, 8)
    assert velocity(x, t).any()
    np.testing.assert_array_equal(total(x, t), velocity(x, t))
    keys = as_keys(key, 8)
    _, ours = method.loss(both, None, Batch(x), keys)
    _, theirs = frozen.loss(theta, theta, Batch(x), keys)
    np.testing.assert_array_equal(ours["per_example"], theirs["per_example"])


def test_no_gradient_reaches_the_base_and_one_reaches_the_residual(key):
    net = from_linen(Plain(width=16, depth=2))
    x = jax.random.normal(key, (8, 2))
    theta, first = moved(net.init(key, x)), net.init(key, x)
    both = lambda params, theta: {"base": theta, "residual": params}
    loss = lambda params, theta: residual(net.net).loss(both(params, theta), None, Batch(x), as_keys(key, 8))[0]
    to_params, to_theta = jax.grad(loss, (0, 1))(first, theta)
    assert not any(a.any() for a in jax.tree.leaves(to_theta))
    assert to_params["output"]["kernel"].any()
    assert loss(first, theta) != loss(first, moved(theta, 1))


@pytest.mark.parametrize("path", [paths.linear(), paths.trigonometric()])
@pytest.mark.parametrize("t", [0.2, 0.7])
def test_the_minimiser_is_what_the_base_lacks(path, t, key):
    """Base ``v* + 0.3 x - 0.2``, model ``r = a x + b``: least squares gives ``a = -0.3, b = 0.2``, to their errors."""
    n, oracle = 40_000, oracles.gaussian(0.5, 0.6, path=path)
    base = lambda theta, x, s, t, cond=None, key=None: oracle.velocity(x, s) + theta[0] * x + theta[1]
    net = lambda r, x, s, t, cond=None, key=None: r[0] * x + r[1]
    method = residual(net, base=base, path=path, time=lambda key: jnp.full(key.shape, t))
    batch, keys = Batch(oracle.sample(jax.random.key(1), n)[:, None]), as_keys(key, n)
    theta = jnp.array([0.3, -0.2])
    loss = lambda r: method.loss({"base": theta, "residual": r}, None, batch, keys)[0]
    gradient = jax.jit(jax.grad(loss))
    start = gradient(jnp.zeros(2))
    hessian = jnp.stack([gradient(e) - start for e in jnp.eye(2)])  # the loss is a parabola in r
    solved = -jnp.linalg.solve(hessian, start)
    left = loss(-theta)  # at the minimiser: the variance of dI_t given I_t
    se = np.sqrt(left / n * np.diag(np.linalg.inv(np.asarray(hessian, np.float64) / 2)))
    assert (np.abs(solved + theta) < 4.5 * se).all() and (se < 0.02).all()
    x = jnp.linspace(-1, 1, 5)[:, None]
    total = method.velocity({"base": theta, "residual": -theta})
    np.testing.assert_allclose(total(x, jnp.full(5, t)), oracle.velocity(x, t), atol=1e-6)


def test_the_sum_passes_the_condition_to_both():
    tell = lambda c: lambda x, t, cond=None: x + c * expand(cond, x) + expand(t, x)
    x, t, cond = jnp.zeros((3, 2)), jnp.array([0.0, 0.5, 1.0]), jnp.array([1.0, 2.0, 3.0])
    expected = 5 * cond[:, None] + 2 * t[:, None] + jnp.zeros((3, 2))
    np.testing.assert_allclose(guidance.added(tell(2), tell(3))(x, t, cond), expected)


def test_one_network_alone_is_refused_and_the_base_has_a_derivative_in_space():
    """A likelihood differentiates the sum by ``x``: nothing of it is stopped."""
    method = residual(lambda params, x, s, t, cond=None, key=None: params * x)
    for params in (2.0, {"residual": 2.0}, {"base": 2.0}, None):
        with pytest.raises(ValueError, match="params: lack 'base' or 'residual'"):
            method.velocity(params)
        with pytest.raises(ValueError, match="params: lack"):
            method.loss(params, None, Batch(jnp.ones((4, 2))), jax.random.key(0))
    v = method.velocity({"base": 2.0, "residual": 0.5})
    x = jnp.ones((1, 2))
    np.testing.assert_allclose(jax.jvp(lambda x: v(x, 0.5), (x,), (x,))[1], 2.5 * x)


def test_a_run_trains_it_on_a_base_that_stays_and_samples_the_sum(laboratory, tmp_path):
    """Weight decay leaves the base as it is; the networks of the folder give ``v + r``, and not ``r`` alone."""
    whole = {"samplers": {}, "net": {"name": "mlp", "width": 8, "depth": 1}}
    train.main(read(**whole), tmp_path / "flow")
    more = {"method": "residual", "target": "frozen", "teacher": str(tmp_path / "flow"), "weight_decay": 0.1}
    with pytest.raises(ValueError, match="method='residual'"):
        train.main(read(**whole, method="residual"), tmp_path / "none")
    train.main(read(**whole, **more), tmp_path / "both")
    flow, _, _ = networks.load_models(read(**whole), tmp_path / "flow")
    sum_, _, _ = networks.load_models(read(**whole, **more), tmp_path / "both")
    base, both = flow.params["flow"], sum_.params["flow"]
    chex.assert_trees_all_equal(both["base"], base)
    x = jnp.ones((2, 2))
    r = flow.methods["flow"].velocity(both["residual"])(x, 0.5)
    total = sum_.methods["flow"].velocity(both)(x, 0.5)
    np.testing.assert_allclose(total, flow.methods["flow"].velocity(base)(x, 0.5) + r, rtol=1e-5, atol=1e-6)
    assert np.abs(r).max() > 1e-4


def test_a_stage_refuses_a_method_of_other_batches(laboratory):
    """Guidance by a discriminator takes pairs at the end, which no corrector of a pipeline gets."""
    net = {"name": "plain", "width": 8, "depth": 1, "waves": 0, "times": 0, "logit": True}
    settings = read(correctors={"disc": {"method": "discriminator", "net": net}})
    with pytest.raises(ValueError, match="correctors.disc.method='discriminator'.*batches of ends.*marginals"):
        networks.plans(settings, build.data(settings.common.data))
