"""Samplers and grids against diffusers (huggingface/diffusers) on a Gaussian mixture with the exact data prediction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import oracles, sampling
from fmjax.keys import as_keys, fold_in, normal
from fmjax.sampling import grids

torch = pytest.importorskip("torch", reason="pip install -e '.[diffusers]' brings torch and diffusers to compare with")
diffusers = pytest.importorskip(
    "diffusers", reason="pip install -e '.[diffusers]' brings torch and diffusers to compare with"
)

pytestmark = pytest.mark.usefixtures("x64")

LAW = oracles.mixture(jnp.array([[2.0, 0.5], [-1.5, 1.0]]), jnp.array([0.3, 0.6]), jnp.array([0.7, 0.3]))
GRID = grids.edm_grid(9)
SIGMAS = (1 - GRID) / GRID
KEYS = as_keys(jax.random.key(0), 3)
Z = np.random.default_rng(0).standard_normal((3, 2))


def ours(step, grid=GRID):
    """``x / beta`` after every step, on the linear path."""
    run = jax.jit(lambda x: sampling.sample(step, x, grid, key=KEYS, trajectory=True))
    return run((1 - grid[0]) * Z) / grid[:, None, None]


def theirs(scheduler, sigmas=SIGMAS, noisy=False):
    """``x / alpha_t`` after every step of a scheduler, at our noise levels."""
    data = jax.jit(sampling.denoiser(LAW.velocity))
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas, scheduler.timesteps = torch.from_numpy(sigmas), torch.arange(len(sigmas) - 1)
    scheduler.set_begin_index(0)
    alpha = 1 / np.sqrt(1 + sigmas**2)
    x, xs = torch.from_numpy(sigmas[0] * alpha[0] * Z), [sigmas[0] * Z]
    for i, t in enumerate(scheduler.timesteps):
        predicted = torch.from_numpy(np.array(data(x.numpy() / alpha[i], sigmas[i])))
        draw = {"variance_noise": torch.from_numpy(np.array(normal(fold_in(KEYS, 2 * i + 1), (2,), jnp.float64)))}
        x = scheduler.step(predicted, t, x, **(draw if noisy else {})).prev_sample
        xs.append(x.numpy() / alpha[i + 1])
    return np.stack(xs)


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_theirs(order, variant):
    """With their defaults for order 2; for order 3 up to their last step but one (``lower_order_final``).

    Their last state of bh1 is nan, where an infinite ``B`` multiplies no prediction.
    """
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, prediction_type="sample", use_karras_sigmas=True
    )
    same = 8 if order == 3 else 9 if variant == "bh1" else 10
    got = ours(sampling.unipc(LAW.velocity, order=order, solver_type=variant))
    np.testing.assert_allclose(got[:same], theirs(scheduler)[:same], rtol=1e-8)


DPM = {
    "2M": (sampling.dpmpp_2m, {}, {"solver_type": "midpoint"}),
    "2M, heun": (sampling.dpmpp_2m, {"solver_type": "heun"}, {"solver_type": "heun"}),
    "2M SDE": (sampling.dpmpp_2m, {"eta": 1.0}, {"solver_type": "midpoint"}),
    "2M SDE, heun": (sampling.dpmpp_2m, {"eta": 1.0, "solver_type": "heun"}, {"solver_type": "heun"}),
    "3M": (sampling.dpmpp_3m, {}, {"solver_type": "heun", "solver_order": 3, "lower_order_final": False}),
}


@pytest.mark.parametrize("name", DPM)
def test_dpm_solver_is_theirs(name):
    """They compute in float32."""
    make, options, config = DPM[name]
    kind = "sde-dpmsolver++" if "eta" in options else "dpmsolver++"
    config = {"algorithm_type": kind, "prediction_type": "sample", "use_karras_sigmas": True} | config
    scheduler = diffusers.DPMSolverMultistepScheduler(**config)
    got = ours(make(LAW.velocity, **options))
    np.testing.assert_allclose(got, theirs(scheduler, noisy="eta" in options), rtol=1e-5, atol=1e-5)


def test_their_sde_of_order_3_has_another_sign():
    """Of 1/2 in the term of the second difference, so that it does not vanish with the step; ours is k-diffusion's."""
    config = {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "solver_order": 3, "lower_order_final": False}
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="sample", use_karras_sigmas=True, **config)
    got, other = ours(sampling.dpmpp_3m(LAW.velocity, eta=1.0)), theirs(scheduler, noisy=True)
    np.testing.assert_allclose(got[:3], other[:3], rtol=1e-5, atol=1e-5)
    assert np.abs(got - other)[3:].max() > 1e-3


def test_the_two_stages_of_2s_are_theirs():
    """Their stages are steps of the grid: every second level, in the middle of its neighbours in ``log sigma``."""
    sigmas = np.geomspace(40.0, 0.02, 9)
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        solver_order=2, prediction_type="sample", lower_order_final=False, final_sigmas_type="sigma_min"
    )
    got = ours(sampling.dpmpp_2s(LAW.velocity), 1 / (1 + sigmas[::2]))
    np.testing.assert_allclose(got, theirs(scheduler, sigmas)[::2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [4, 28])
def test_shifted_grids_are_theirs(n):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(n)
    last = 0.003 / 1.002
    np.testing.assert_allclose(1 - sampling.shifted_grid(n, last=last), scheduler.sigmas, atol=1e-6)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / n, n), mu=mu)
    np.testing.assert_allclose(1 - sampling.resolution_grid(n, tokens=1024), scheduler.sigmas, atol=1e-6)
