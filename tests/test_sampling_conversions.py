"""Diffusion models seen as flows and back: every prediction, every pair of paths, parameters that train on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling
from fmjax.keys import as_keys
from fmjax.methods import flow_matching, lagrangian
from fmjax.types import Batch, Net, expand, over_batch

PATHS = {
    "linear": paths.linear(),
    "trigonometric": paths.trigonometric(),
    "vp": paths.vp(),
    "sub_vp": paths.sub_vp(),
    "ve": paths.ve(),
}
LEVELS = np.array([45.0, 7.0, 1.3, 0.4, 0.02])  # which all of them have


def mixture(path):
    means = jnp.array([[2.0, 0.5], [-1.5, 1.0], [0.3, -2.0]])
    return oracles.mixture(means, jnp.array([0.3, 0.4, 0.6]), jnp.array([0.5, 0.2, 0.3]), path=path)


def at_levels(path, key):
    t = paths.match_snr(path, paths.linear(), jnp.asarray(1 / (1 + LEVELS)))[0]
    alpha, beta = (expand(a, jnp.ones((len(LEVELS), 2))) for a in path.coefficients(t))
    return beta * mixture(path).sample(key, len(LEVELS)) + alpha * jax.random.normal(key, (len(LEVELS), 2)), t


def predictor(path, predicts):
    """A network whose parameters are a factor on the exact prediction."""
    velocity = mixture(path).velocity

    def net(params, x, s, t, cond=None, key=None):
        return params * paths.convert(path, x, velocity(x, s), s, kind="velocity", to=predicts)

    return net


@pytest.mark.parametrize(
    ("old", "new", "predicts"),
    [
        ("vp", "linear", "noise"), ("linear", "ve", "v_prediction"), ("ve", "trigonometric", "data"),
        ("trigonometric", "sub_vp", "score"), ("sub_vp", "vp", "velocity"),
    ],
)  # fmt: skip
def test_a_trained_prediction_is_the_velocity_on_another_path_and_back(old, new, predicts, x64, key):
    """All pairs of paths are in ``test_paths``; here each prediction, and there and back it is what it was."""
    old, new = PATHS[old], PATHS[new]
    net = predictor(old, predicts)
    flow = sampling.as_flow(net, predicts=predicts, path=old, onto=new)
    back = sampling.as_flow(flow, predicts="velocity", path=new, onto=old)
    assert isinstance(flow, Net)
    for made, path in ((flow, new), (back, old)):
        x, t = at_levels(path, key)
        want = mixture(path).velocity(x, t)
        scale = 1 + jnp.abs(want)
        np.testing.assert_allclose(jax.jit(made)(1.0, x, t, t) / scale, want / scale, atol=1e-9)


def test_what_starts_from_a_diffusion_model_is_it_and_trains_on(x64, key):
    """The loss of the flow is that of its velocity, its gradient reaches the parameters, its first jump is Euler's."""
    path, n = paths.vp(), 64
    law = lambda path: oracles.gaussian(jnp.array([0.3, -0.2]), jnp.array([0.5, 0.8]), path=path)
    noise = lambda params, x, s, t, cond=None, key=None: (
        params * paths.endpoints(path, x, law(path).velocity(x, s), s)[0]
    )
    flow, straight = sampling.as_flow(noise, predicts="noise", path=path), law(paths.linear())
    method, keys, batch = flow_matching(flow), as_keys(key, n), Batch(straight.sample(key, n))
    exact = flow_matching(lambda params, x, s, t, cond=None, key=None: straight.velocity(x, s))
    loss = jax.jit(jax.value_and_grad(lambda p: method.loss(p, p, batch, keys)[0]))
    value, gradient = loss(1.0)
    want = jax.jit(lambda: exact.loss(None, None, batch, keys)[0])()
    np.testing.assert_allclose(value, want, rtol=1e-3)  # times before the start of vp are held
    assert abs(gradient) > 0 and loss(1.0 - 0.01 * gradient)[0] != value
    x, s, t = jax.random.normal(key, (3, 2)), jnp.array([0.1, 0.4, 0.6]), jnp.array([0.3, 0.5, 0.9])
    jump = jax.jit(lagrangian(flow).flow_map(1.0))(x, s, t)
    np.testing.assert_allclose(jump, x + expand(t - s, x) * straight.velocity(x, s), rtol=1e-9)


def test_off_the_diagonal_the_network_gets_the_matching_pair_of_times(x64, key):
    path, seen = paths.trigonometric(), []

    def net(params, x, s, t, cond=None, key=None):
        seen.append((s, t, cond, key))
        return x

    x, s, t = jax.random.normal(key, (2, 2)), jnp.array([0.2, 0.5]), jnp.array([0.7, 0.5])
    sampling.as_flow(net, predicts="velocity", path=path)(None, x, s, t, "labels", "key")
    match = lambda t: np.asarray(paths.match_snr(path, paths.linear(), t)[0])
    ((start, end, *rest),) = seen
    np.testing.assert_allclose((start, end), (match(s), match(t)), rtol=1e-12)
    assert rest == ["labels", "key"] and end[1] == start[1]


@pytest.mark.parametrize("name", ["linear", "vp", "ve"])
def test_a_velocity_is_edms_denoiser_and_back(name, x64, key):
    """Tweedie's formula, ``D = y + sigma^2 grad log p``, at the level itself; conditions pass."""
    path, sigma = PATHS[name], jnp.asarray(LEVELS)
    tell = lambda x, t, cond=None: mixture(path).velocity(x, t) + (0 if cond is None else expand(cond, x))
    law = mixture(paths.Path(lambda s: (s, jnp.ones_like(s))))  # times are levels
    y = jax.random.normal(key, (len(LEVELS), 2)) * expand(sigma, jnp.ones((1, 2)))
    denoise = jax.jit(sampling.denoiser(tell, path=path))
    np.testing.assert_allclose(denoise(y, sigma), y + expand(sigma, y) ** 2 * law.score(y, sigma), rtol=1e-6, atol=1e-7)
    x, t = at_levels(path, key)
    back = jax.jit(sampling.velocity_of(denoise, path=path))
    cond = jnp.arange(1.0, 6.0)
    for c in (None, cond):
        np.testing.assert_allclose(back(x, t, c), tell(x, t, c), rtol=1e-7, atol=1e-7)
    if name == "linear":
        at = expand(t, x)
        np.testing.assert_allclose(back(x, t), (denoise(x / at, (1 - t) / t) - x) / (1 - at), rtol=1e-7)
    scalar = denoise(y[:1], 3.0)
    np.testing.assert_allclose(scalar, denoise(y[:1], over_batch(3.0, y[:1])), rtol=1e-12)


def test_what_no_network_predicts_is_refused():
    with pytest.raises(ValueError, match="predicts='epsilon': .*velocity, noise, data"):
        sampling.as_flow(lambda *a: a[1], predicts="epsilon")
    with pytest.raises(ValueError, match="a diffusion model.* latent"):
        sampling.as_flow(lambda *a: a[1], predicts="noise", onto=paths.two_sided())
