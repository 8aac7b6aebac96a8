"""The README's examples run as they stand; the first samples the distribution it was trained on."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import correction, couplings, data, oracles, paths, sampling, sources

README = Path(__file__).parents[1] / "README.md"
GUIDE = README.parent / "docs" / "guide.md"
if not (README.exists() and GUIDE.exists()):
    pytest.skip("needs the repository's README and docs", allow_module_level=True)
blocks = lambda page: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
(LEARNED,), (STARTED, CORRECTED, DIFFUSION) = blocks(README), blocks(GUIDE)


def run(code, **names):
    exec(compile(code, str(README), "exec"), names)
    return names


def test_the_example_learns_the_eight_gaussians():
    """Nearly all samples lie within three standard deviations of a mode, and every mode has its eighth."""
    x = np.asarray(run(LEARNED)["x"])
    angle = np.arange(8) * np.pi / 4
    modes = 2.0 * np.stack([np.cos(angle), np.sin(angle)], 1)
    distance = np.linalg.norm(x[:, None] - modes, axis=-1)
    assert x.shape == (4096, 2)
    assert (distance.min(1) < 3 * 0.2).mean() > 0.9  # exact: 1 - exp(-9/2) = 0.989
    fractions = np.bincount(distance.argmin(1), minlength=8) / len(x)
    assert np.abs(fractions - 1 / 8).max() < 0.03


def test_the_example_of_a_source_starts_in_its_box():
    """A shift of the unit square by 3: the density is 1 there, and the pairs of the batch are near each other."""
    x = np.random.default_rng(0).uniform(3, 4, (512, 2)).astype(np.float32)
    names = run(
        STARTED, step=0, jnp=jnp, data=data, couplings=couplings, sources=sources, sampling=sampling,
        path=paths.linear(), x=x, keys=jax.random.split(jax.random.key(0), 64),
        velocity=lambda x, t, cond=None: jnp.full_like(x, 3.0),
    )  # fmt: skip
    batch = names["batch"]
    assert all(x0.min() >= 0 and x0.max() <= 1 for x0 in (batch.x0, np.asarray(names["x0"])))
    assert np.square(batch.x1 - batch.x0 - 3).sum(1).mean() < np.square(batch.x1[::-1] - batch.x0 - 3).sum(1).mean() / 4
    np.testing.assert_allclose(names["log_p"], 0, atol=1e-5)


@pytest.fixture
def ring():
    return oracles.gaussian(jnp.zeros(2), jnp.array([0.5, 1.5]))


def test_the_example_of_corrections_corrects(ring, tmp_path):
    """An exact flow, the score of its noised marginals: fifty corrected steps keep the distribution, nearly."""
    ten, sigma = sampling.uniform_grid(10), 0.2
    sets = {
        "forward": {"count": 512, "shape": (2,)},
        "backward": {"data": np.asarray(ring.sample(jax.random.key(0), 512))},
    }
    for direction, start in sets.items():
        correction.build_marginals(
            lambda p: ring.velocity, {}, ten, directory=tmp_path / direction, direction=direction, flow="exact", **start
        )
    forward, backward = (correction.read_marginals(tmp_path / direction) for direction in sets)
    noised = lambda x, t, cond=None: (
        -(sigma**2) * x / (((1 - t) ** 2)[:, None] + t[:, None] ** 2 * jnp.array([0.25, 2.25]) + sigma**2)
    )
    names = run(
        CORRECTED, correction=correction, sampling=sampling, direction=noised,
        sigma=sigma, flow_map=ring.flow_map, forward=forward, backward=backward, step=sampling.rk4(ring.velocity),
        x0=jax.random.normal(jax.random.key(1), (4096, 2)), key=jax.random.key(2), alphas=np.full(11, 0.1),
    )  # fmt: skip
    assert np.abs(np.asarray(names["x"]).std(0) / [0.5, 1.5] - 1).max() < 0.1
    assert {"fix", "drift"} <= names.keys()


def test_the_example_of_diffusion_samples_and_searches_a_grid(ring):
    x0 = jax.random.normal(jax.random.key(1), (4096, 2))
    names = run(DIFFUSION, sampling=sampling, velocity=ring.velocity, x0=x0)
    assert np.abs(np.asarray(names["x"]).std(0) / [0.5, 1.5] - 1).max() < 4 / np.sqrt(2 * 4096) + 0.01
    best = names["best"]
    assert len(best) == 7 and best[0] == names["fine"][0] and best[-1] == names["fine"][-1]
