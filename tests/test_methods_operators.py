"""Operators from stored trajectories against the Gaussian map: regression at one time, and DSNO at all times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import gaussian_along

from fmjax import correction, methods, nets, oracles, paths
from fmjax.keys import as_keys
from fmjax.nets.temporal_net import TemporalConvolution
from fmjax.types import Batch

KEY = jax.random.key(8)
TS = (0.0, 0.25, 0.5, 0.75, 1.0)
ORACLE = gaussian_along(paths.linear())


def test_the_gaussian_map_is_the_minimiser_of_the_regression(tmp_path, x64):
    """On marginals as they are stored: the loss is the solver's error there, and any change of the map adds to it."""
    manifest = correction.build_marginals(
        lambda params: ORACLE.velocity, None, np.linspace(0, 1, 17), directory=tmp_path, direction="forward",
        flow="exact", count=64, shape=(2,), steps=(0, 4, 8, 12, 16),
    )  # fmt: skip
    assert manifest.count == 64
    exact = oracles.average_velocity(ORACLE)
    net = lambda params, x, s, t, cond=None, key=None: exact(None, x, s, t) + params[0] * x + params[1] * t[:, None]
    method = methods.trajectory_regression(net)
    batch = correction.operator_batches(correction.read_marginals(tmp_path), batch_size=256, seed=0)(3)
    assert set(batch.t.tolist()) == set(TS[1:])
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), batch)
    value, gradient = jax.value_and_grad(lambda p: method.loss(p, None, wide, KEY)[0])(jnp.zeros(2))
    assert value < 1e-9 and np.abs(gradient).max() < 1e-4
    away = jax.grad(lambda p: method.loss(p, None, wide, KEY)[0])(jnp.array([0.1, 0.1]))
    assert (away > 0.02).all()
    x = jnp.ones((3, 2))
    np.testing.assert_allclose(method.flow_map(jnp.zeros(2))(x, 0.0, 0.5), ORACLE.flow_map(x, 0.0, 0.5), rtol=1e-7)


def trajectories(n):
    x0 = jax.random.normal(KEY, (n, 2))
    return jnp.stack([ORACLE.flow_map(x0, 0.0, t) for t in TS], 1)


def test_the_operator_recovers_the_gaussian_maps_at_all_times():
    """A network that is linear in x at each time has the least squares solution C_t^(1/2) and the mean."""
    x = trajectories(256)

    def net(params, x, s, t, cond=None, key=None):
        return params["a"] * x[:, None] + params["b"]

    method = methods.neural_operator(net, ts=TS)
    value = lambda p: method.loss(p, None, Batch(x), KEY)[0]
    params = {"a": jnp.zeros((4, 2)), "b": jnp.zeros((4, 2))}
    gradient = jax.grad(value)(params)  # the loss is quadratic: conjugate gradients find its minimiser
    curvature = lambda v: jax.jvp(jax.grad(value), (params,), (v,))[1]
    params = jax.scipy.sparse.linalg.cg(curvature, jax.tree.map(jnp.negative, gradient), maxiter=40)[0]
    assert value(params) < 1e-9
    ts = np.array(TS[1:])[:, None]
    scale = np.sqrt((1 - ts) ** 2 + (ts * np.array([0.5, 1.5])) ** 2)  # C_t^(1/2)
    np.testing.assert_allclose(1 + ts * params["a"], scale, atol=2e-4)
    np.testing.assert_allclose(ts * params["b"], ts * np.array([0.75, -0.5]), atol=2e-4)
    flow_map, start = method.flow_map(params), x[:5, 0]
    np.testing.assert_allclose(flow_map(start, 0.0, 0.75), x[:5, 3], atol=1e-3)
    np.testing.assert_array_equal(flow_map(start, 0.5, 0.5), start)
    assert np.isnan(flow_map(start, 0.0, 0.6)).all() and np.isnan(flow_map(start, 0.25, 0.75)).all()


def test_the_temporal_layer_is_a_circular_convolution(x64):
    """Of the kernel whose Fourier modes are its parameters, by sums."""
    times, width, modes = 6, 3, 3
    rng = np.random.default_rng(0)
    y, r = rng.normal(size=(2, times, width)), rng.normal(size=(2, modes, width, width))
    w, b = rng.normal(size=(width, width)), rng.normal(size=width)
    layer = TemporalConvolution(modes=modes)
    params = {"params": {"modes": r, "pointwise": {"kernel": w, "bias": b}}}
    phase = lambda k, n: np.exp(2j * np.pi * k * n / times)
    weight = lambda k: 1 if k in (0, times // 2) else 2  # of a mode and its conjugate
    kernel = sum(
        weight(k) * np.real((r[0, k] + 1j * r[1, k])[None] * phase(k, np.arange(times))[:, None, None])
        for k in range(modes)
    ) / times  # fmt: skip
    expected = w.T @ y.swapaxes(1, 2) + b[:, None]
    expected = expected.swapaxes(1, 2)
    for n in range(times):
        for m in range(times):
            expected[:, n] += y[:, m] @ kernel[(n - m) % times]
    np.testing.assert_allclose(layer.apply(params, jnp.asarray(y)), y + jax.nn.gelu(expected), rtol=1e-9)


def test_a_new_operator_leaves_the_source_where_it_is():
    model = nets.from_linen(nets.TemporalNet(times=4, width=8, depth=1))
    x = trajectories(3)
    params = model.init(KEY, x[:, 0])
    method = methods.neural_operator(model.net, ts=TS, weights=(1.0, 1.0, 1.0, 5.0))
    np.testing.assert_array_equal(method.flow_map(params)(x[:, 0], 0.0, 1.0), x[:, 0])
    value, aux = method.loss(params, None, Batch(x), as_keys(KEY, 3))
    still = jnp.mean((x[:, :1] - x[:, 1:]) ** 2, (0, 2))
    np.testing.assert_allclose(value, jnp.mean(still * np.array([1, 1, 1, 5]) / 2), rtol=1e-5)
    gradient = jax.grad(lambda p: method.loss(p, None, Batch(x), KEY)[0])(params)
    assert np.abs(gradient["output"]["kernel"]).max() > 0


def test_what_does_not_fit_is_refused_by_its_name():
    net = lambda params, x, s, t, cond=None, key=None: x[:, None]
    for options in ({"ts": (0.0,)}, {"ts": (0.0, 0.5, 0.5)}, {"weights": (0.0,)}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
            methods.neural_operator(net, **options)
    with pytest.raises(ValueError, match=r"^batch.x1="):
        methods.neural_operator(net).loss(None, None, Batch(jnp.zeros((2, 3, 2))), KEY)
    with pytest.raises(ValueError, match=r"^net="):
        methods.neural_operator(net, ts=TS).loss(None, None, Batch(jnp.zeros((2, 5, 2))), KEY)
    with pytest.raises(ValueError, match=r"^batch.t=None"):
        methods.trajectory_regression(net).loss(None, None, Batch(jnp.zeros((2, 2)), x0=jnp.zeros((2, 2))), KEY)
