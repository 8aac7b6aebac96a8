"""Preconditioners against the properties that define them; denoisers as velocities, exact for a Gaussian."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, paths, sampling
from fmjax.experiments import build
from fmjax.nets import preconditioning as pc
from fmjax.types import Network

MEAN, STD = jnp.array([0.7, -1.2]), jnp.array([0.3, 0.9])
LOW, HIGH = 0.002, 80.0
SIGMAS = np.geomspace(LOW, HIGH, 41)


def exact(x, sigma, cond=None):
    """The denoiser of ``N(MEAN, STD^2)``."""
    square = jnp.asarray(sigma)[:, None] ** 2
    return (STD**2 * x + square * MEAN) / (STD**2 + square)


def velocity(denoise, *, sigma_min=LOW, sigma_max=HIGH):
    """That of a preconditioned network which is the denoiser itself."""
    itself = pc.Preconditioner(lambda sigma: (0 * sigma, 1 + 0 * sigma, 1 + 0 * sigma, sigma), sigma_min, sigma_max)
    net = pc.preconditioned(lambda params, x, s, t, cond=None, key=None: denoise(x, s, cond), itself)
    return lambda x, t, cond=None: net(None, x, t, t, cond)


@pytest.fixture
def points(x64):
    return jnp.asarray(2 * np.random.default_rng(0).standard_normal((41, 2)))


def test_edm_keeps_inputs_and_targets_at_variance_one(x64):
    """Of data of variance ``d^2``: ``c_in^2 (s^2 + d^2) = 1``, and what ``F`` must give has the variance one."""
    d = 0.7
    skip, out, scale, label = pc.edm(sigma_data=d).coefficients(jnp.asarray(SIGMAS))
    np.testing.assert_allclose(scale**2 * (SIGMAS**2 + d**2), 1, rtol=1e-12)
    np.testing.assert_allclose(((1 - skip) ** 2 * d**2 + skip**2 * SIGMAS**2) / out**2, 1, rtol=1e-10)
    np.testing.assert_allclose(jnp.exp(4 * label), SIGMAS, rtol=1e-12)


def test_the_label_of_vp_is_the_time_of_its_path(x64):
    how, tau = pc.vp(), jnp.linspace(1e-5, 1, 50)
    alpha, beta = paths.vp().coefficients(1 - tau)
    skip, out, scale, label = how.coefficients(alpha / beta)
    np.testing.assert_allclose(label, 999 * tau, rtol=1e-9)
    np.testing.assert_allclose(scale, beta, rtol=1e-12)
    np.testing.assert_allclose([how.sigma_min, how.sigma_max], (alpha / beta)[jnp.array([0, -1])], rtol=1e-9)
    np.testing.assert_array_equal(out, -alpha / beta)


def test_the_label_of_iddpm_is_the_nearest_step_of_the_cosine_schedule(x64):
    """Where the ratio is not clipped ``u_j^2 + 1 = a_M / a_j``, which is the product of the recursion."""
    j = np.arange(3, 1001)
    a = lambda j: np.sin(np.pi / 2 * j / (1000 * 1.008)) ** 2
    u = np.sqrt(a(1000) / a(j) - 1)
    for nudge in (1.0, 1 + 1e-4, 1 - 1e-4):
        label = pc.iddpm().coefficients(jnp.asarray(u * nudge))[3]
        np.testing.assert_array_equal(label, 999 - j)
    assert pc.iddpm().sigma_min == pytest.approx(u[-2], rel=1e-9)


@pytest.mark.parametrize(
    "new",
    [paths.linear(), paths.trigonometric(), paths.vp(), paths.sub_vp(), paths.ve(sigma_min=0.01, sigma_max=50.0)],
    ids=["linear", "trigonometric", "vp", "sub_vp", "ve"],
)
def test_a_denoiser_is_the_velocity_on_every_path(new, points):
    t = jnp.linspace(0.12, 0.98, 41)  # noise levels that EDM knows, on each of them
    v = paths.change(velocity(exact), paths.linear(), new)
    both = jax.jit(lambda x: (v(x, t), oracles.gaussian(MEAN, STD, path=new).velocity(x, t)))
    np.testing.assert_allclose(*both(points), rtol=1e-9, atol=1e-9)


def test_a_velocity_is_a_denoiser_and_back(points):
    linear = oracles.gaussian(MEAN, STD).velocity
    x = points * SIGMAS[:, None]
    np.testing.assert_allclose(sampling.denoiser(linear)(x, SIGMAS), exact(x, SIGMAS), rtol=1e-12, atol=1e-12)
    back = sampling.denoiser(velocity(exact))
    np.testing.assert_allclose(back(x, SIGMAS), exact(x, SIGMAS), rtol=1e-11, atol=1e-11)


def test_beyond_the_levels_it_is_the_change_of_path_from_edms_own(points):
    """``dx/dsigma = (x - D) / sigma`` on ``paths.ve``, carried to the linear path: at both ends, too."""
    own = paths.ve(sigma_min=LOW, sigma_max=HIGH)

    def v(x, t, cond=None):
        sigma, _, rate, _ = paths.coefficients(own, x, t)
        return rate * (x - exact(x, sigma[:, 0])) / sigma

    t = np.r_[0.0, 1e-4, 1 / (1 + HIGH), np.linspace(0.02, 0.997, 35), 1 - LOW, 1 - 1e-4, 1.0]
    want = paths.change(v, own, paths.linear())(points, t)
    np.testing.assert_allclose(velocity(exact)(points, t), want, rtol=1e-7, atol=1e-9)


def test_no_network_at_all_is_the_velocity_of_centred_gaussian_data(points):
    """EDM with ``F = 0`` denoises ``N(0, sigma_data^2)`` exactly."""
    zero = lambda params, x, s, t, cond=None, key=None: jnp.zeros_like(x)
    net = pc.preconditioned(zero, pc.edm(sigma_data=0.7))
    t = jnp.linspace(1 / 81, 0.998, 41)
    want = oracles.gaussian(jnp.zeros(2), jnp.full(2, 0.7)).velocity(points, t)
    np.testing.assert_allclose(net(None, points, t, t), want, rtol=1e-9, atol=1e-9)


def inputs(params, x, s, t, cond=None, key=None):
    """A network that returns a sum of its inputs."""
    return params * x + s[:, None] + 10 * (t - s)[:, None] + (0 if cond is None else cond[:, None])


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm"])
def test_a_preconditioned_net_is_its_denoiser_and_gets_the_jump(name, points):
    preconditioner = getattr(pc, name)()
    net, cond, t = pc.preconditioned(inputs, preconditioner), jnp.arange(41.0), jnp.linspace(0.05, 0.95, 41)
    bound = lambda x, sigma, cond: pc.preconditioned_denoiser(inputs, preconditioner)(0.3, x, sigma, cond)
    v = velocity(bound, sigma_min=preconditioner.sigma_min, sigma_max=preconditioner.sigma_max)

    @jax.jit
    def compiled(x, t):
        coefficients = preconditioner.coefficients((1 - t) / t)
        return net(0.3, x, t, t, cond), v(x, t, cond), net(0.3, x, t, t + 0.04, cond), coefficients

    own, bare, jumped, coefficients = jax.tree.map(np.asarray, compiled(points, t))
    np.testing.assert_array_equal(own, bare)
    skip, out, scale, label = (a[:, None] for a in coefficients)
    points, t, cond = np.asarray(points), np.asarray(t)[:, None], np.asarray(cond)[:, None]
    data = skip * points / t + out * (0.3 * scale * points / t + label + cond)
    np.testing.assert_allclose(bare, (data - points) / (1 - t), rtol=1e-9)
    np.testing.assert_allclose(jumped - own, np.broadcast_to(out * 0.4 / (1 - t), own.shape), rtol=1e-6)


@pytest.mark.parametrize("name", ["edm", "vp", "ve", "iddpm"])
def test_a_preconditioned_net_and_its_derivatives_are_finite_at_both_ends(name):
    net = pc.preconditioned(inputs, getattr(pc, name)())
    x, t = jnp.ones((4, 2)), jnp.array([0.0, 1e-6, 1.0, 0.5])
    f = lambda p, x, t: net(p, x, t, t)
    rates = jax.jit(lambda x, t: jax.jvp(lambda x, t: f(0.3, x, t), (x, t), (x, jnp.ones(4))))
    grads = jax.jit(jax.grad(lambda p, x, t: jnp.sum(f(p, x, t) ** 2), (0, 1, 2)))
    chex.assert_tree_all_finite((rates(x, t), grads(0.3, x, t)))


def test_a_kernel_without_a_jvp_has_its_other_self_preconditioned_too():
    fused = Network(inputs, for_jvp=lambda params, *args: inputs(params + 1, *args))
    net = pc.preconditioned(fused, pc.edm())
    x, t = jnp.ones((2, 2)), jnp.array([0.2, 0.7])
    np.testing.assert_array_equal(net.for_jvp(0.3, x, t, t), net(1.3, x, t, t))
    assert pc.preconditioned(inputs, pc.edm()).for_jvp is None


def test_a_config_selects_a_preconditioner_for_any_network(key):
    x, t, y = jnp.ones((2, 3)), jnp.array([0.2, 0.7]), jnp.zeros(2, "int32")
    spec = {"name": "mlp", "width": 8, "depth": 1}
    options = {"name": "edm", "sigma_data": 1}
    model = build.net({**spec, "preconditioning": options}, classes=2)
    params = jax.tree.map(lambda a: jnp.ones(a.shape), jax.eval_shape(model.init, key, x, y))
    want = pc.preconditioned(build.net(spec, classes=2).net, pc.edm(sigma_data=1.0))
    both = jax.jit(lambda *args: (model.net(*args), want(*args)))(params, x, t, t, y)
    np.testing.assert_array_equal(*both)
    for bad, match in (
        ("edn", "preconditioning='edn': .*did you mean 'edm'"),
        ({"name": "edm", "sigma": 1.0}, "preconditioning.sigma=1.0: .*did you mean 'sigma_m"),
        ({"name": "edm", "sigma_min": 0.0}, "preconditioning.sigma_min=0.0"),
        ("preconditioned", "preconditioning='preconditioned'"),
    ):
        with pytest.raises(ValueError, match=match):
            build.net({**spec, "preconditioning": bad})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: pc.edm(sigma_data=0.0), "sigma_data=0.0"),
        (lambda: pc.edm(sigma_min=0.0), "sigma_min=0.0"),
        (lambda: pc.edm(sigma_max=float("inf")), "sigma_max=inf"),
        (lambda: pc.ve(sigma_max=0.01), "sigma_min=0.02: not below sigma_max=0.01"),
        (lambda: pc.vp(beta_d=1e4), "beta_d=10000.0"),
        (lambda: pc.vp(epsilon=0.0), "epsilon=0.0"),
        (lambda: pc.iddpm(steps=0), "steps=0"),
    ],
)
def test_arguments_outside_their_ranges_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
