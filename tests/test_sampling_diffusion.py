"""Steps of diffusion models against posteriors, published algorithms and the moments of Gaussians."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from affine import MEAN, STD, marginal, moments, rows

from fmjax import correction, oracles, paths, sampling
from fmjax.correction import correctors
from fmjax.experiments import specs
from fmjax.keys import as_keys, fold_in, normal
from fmjax.sampling import grids
from fmjax.types import Multistep, expand

PATHS = {
    "linear": paths.linear(),
    "trigonometric": paths.trigonometric(),
    "vp": paths.vp(),
    "sub_vp": paths.sub_vp(),
    "ve": paths.ve(),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
MEANS, STDS, WEIGHTS = [[2.0, 0.5], [-1.5, 1.0], [0.3, -2.0]], [0.3, 0.4, 0.6], [0.5, 0.2, 0.3]
LEVELS = np.array([40.0, 9.0, 2.5, 0.8, 0.2, 0.05])  # that all five paths have


def mixture(path=paths.linear()):
    return oracles.mixture(jnp.array(MEANS), jnp.array(STDS), jnp.array(WEIGHTS), path=path)


def times_of(path, sigma=LEVELS):
    return np.asarray(paths.match_snr(path, paths.linear(), jnp.asarray(1 / (1 + sigma)))[0])


step_of = functools.partial(specs.build, specs.SOLVER, field="solver")


def walk(step, x, ts, keys=None):
    """A plain loop over float64 times, which ``samplers.sample`` would round."""
    remembers = isinstance(step, Multistep)
    memory, move = (step.init(x), jax.jit(step.step)) if remembers else (None, jax.jit(step))
    for i, (s, t) in enumerate(itertools.pairwise(ts)):
        key = None if keys is None else fold_in(keys, 2 * i + 1)
        if remembers:
            x, memory = move(memory, x, s, t, None, key)
        else:
            x = move(x, s, t, None, key)
    return x


@every_path
def test_ddim_is_eulers_step_in_each_of_the_three_rows(path, x64, key):
    """``z + out (eta_t - eta_s)`` for the data, the noise and their difference as what is constant over the step."""
    law, (s, t) = mixture(path), times_of(path)[[1, 3]]
    (a_s, b_s), (a, b) = path.coefficients(s), path.coefficients(t)
    x = jax.random.normal(key, (5, 2)) * a_s + b_s * law.sample(key, 5)
    noise, data = paths.endpoints(path, x, law.velocity(x, s), s)
    got = sampling.ddim(law.velocity, path=path)(x, s, t)
    np.testing.assert_allclose(got / a, x / a_s + data * (b / a - b_s / a_s), rtol=1e-10)
    np.testing.assert_allclose(got / b, x / b_s + noise * (a / b - a_s / b_s), rtol=1e-10)
    straight = x / (a_s + b_s) + (data - noise) * (b / (a + b) - b_s / (a_s + b_s))
    np.testing.assert_allclose(got / (a + b), straight, rtol=1e-10)
    euler = sampling.euler(law.velocity)(x, s, t)
    assert (np.abs(got - euler).max() < 1e-12) == (path is PATHS["linear"])


STEPS = {
    "churn": lambda v, path: sampling.edm_heun(v, path=path, steps=5, s_churn=1.5, s_max=10.0, s_noise=1.1),
    "ancestral": lambda v, path: sampling.ddim(v, path=path, eta=1.0),
    "dpmpp_2s": lambda v, path: sampling.dpmpp_2s(v, path=path, eta=0.8),
    "dpmpp_2m": sampling.dpmpp_2m,
    "dpmpp_3m": lambda v, path: sampling.dpmpp_3m(v, path=path, eta=0.8),
    "unipc": lambda v, path: sampling.unipc(v, path=path, order=3),
    "ipndm": lambda v, path: sampling.ipndm(v, path=path, even=False),
    "initial_noise": sampling.initial_noise,
    "initial_noise, Heun's": lambda v, path: sampling.initial_noise(v, path=path, heun=True),
    "euler": lambda v, path: sampling.euler(v),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_sample_is_the_same_on_every_path_at_equal_noise_levels(name, x64, key):
    """``x / beta``, from the same noise and the same draws; Euler's step on a path of its own is not."""
    keys, z = as_keys(key, 4), jax.random.normal(key, (4, 2))
    ends = {}
    for other in ("linear", "vp", "ve"):
        path = PATHS[other]
        law, ts = mixture(path), times_of(path)
        alpha, beta = path.coefficients(ts[0])
        ends[other] = walk(STEPS[name](law.velocity, path=path), alpha * z, ts, keys) / path.coefficients(ts[-1])[1]
    for other in ("vp", "ve"):
        if name == "euler":
            assert np.abs(ends[other] - ends["linear"]).max() > 0.1
        else:
            np.testing.assert_allclose(ends[other], ends["linear"], rtol=1e-7, atol=1e-8, err_msg=other)


@every_path
def test_the_ancestral_step_is_the_posterior_of_a_gaussian(path, x64, key):
    """Of ``x_t`` given ``x_s`` and ``x1``, from their joint covariance; ``D = x1`` for data of one point."""
    s, t = times_of(path)[[1, 3]]
    (a_s, b_s), (a, b) = path.coefficients(s), path.coefficients(t)
    x, keys = 3 * jax.random.normal(key, (4, 1)), as_keys(key, 4)
    step = sampling.ddim(oracles.gaussian(MEAN, 0.0, path=path).velocity, path=path, eta=1.0)
    both = a**2 * b_s / b  # covariance of x_s and x_t given x1: x_s = (b_s / b) x_t + noise
    mean, var = b * MEAN + both / a_s**2 * (x - b_s * MEAN), a**2 - both**2 / a_s**2
    np.testing.assert_allclose(step(x, s, t, None, keys), mean + np.sqrt(var) * normal(keys, (1,), x.dtype), rtol=1e-9)


def test_on_ve_it_is_the_ancestral_step_of_song_et_al(x64, key):
    path, (s, t) = PATHS["ve"], (0.4, 0.5)
    law, x, keys = mixture(path), 3 * jax.random.normal(key, (4, 2)), as_keys(key, 4)
    high, low = (float(path.coefficients(jnp.asarray(u))[0]) for u in (s, t))
    noise = np.sqrt(low**2 * (high**2 - low**2) / high**2) * normal(keys, (2,), x.dtype)
    want = x + (high**2 - low**2) * law.score(x, s) + noise
    np.testing.assert_allclose(sampling.ddim(law.velocity, path=path, eta=1.0)(x, s, t, None, keys), want, rtol=1e-9)


def algorithm_2(denoise, x, sigma, draws, churn=0.0, low=0.0, high=np.inf, inflate=1.0):
    """EDM's, with the names of the paper: levels ``sigma_0 > ... > sigma_N = 0``."""
    n = len(sigma) - 1
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= sigma[i] <= high else 0
        hat = (1 + gamma) * sigma[i]
        x = x + np.sqrt(hat**2 - sigma[i] ** 2) * inflate * draws(i)
        d = (x - denoise(x, hat)) / hat
        after = x + (sigma[i + 1] - hat) * d
        if i < n - 1:
            other = (after - denoise(after, sigma[i + 1])) / sigma[i + 1]
            after = x + (sigma[i + 1] - hat) * (d + other) / 2
        x = after
    return x


@pytest.mark.parametrize(
    ("name", "options"), [("linear", {}), ("vp", {"s_churn": 30.0, "s_min": 0.01, "s_max": 1.0, "s_noise": 1.007})]
)
def test_edms_sampler_is_its_algorithm_2(name, options, x64, key):
    path, keys, z = PATHS[name], as_keys(key, 3), jax.random.normal(key, (3, 2))
    grid = grids.edm_grid(18, path=path)
    alpha, beta = (np.asarray(a) for a in path.coefficients(jnp.asarray(grid)))
    law = mixture(paths.Path(lambda s: (s, jnp.ones_like(s))))  # x1 + s x0: times are levels
    denoise = jax.jit(lambda x, sigma: x + sigma**2 * law.score(x, sigma))
    draws = lambda i: normal(fold_in(keys, 2 * i + 1), (2,), jnp.float64)
    numbers = dict(zip(("churn", "low", "high", "inflate"), options.values(), strict=False))
    want = algorithm_2(denoise, z * alpha[0] / beta[0], alpha / beta, draws, **numbers)
    step = sampling.edm_heun(mixture(path).velocity, path=path, steps=18, **options)
    got = jax.jit(lambda x: sampling.sample(step, x, grid, key=keys))(alpha[0] * z)
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("name", "top"), [("ve", 50.0), ("vp", np.sqrt(np.expm1(10.05)))])
def test_a_churn_beyond_the_largest_level_of_the_path_is_refused(name, top, key):
    """It would be cut there, without a word; with a smaller ``s_max`` or a later start it is whole."""
    path = {"ve": paths.ve(sigma_max=50.0), "vp": paths.vp()}[name]
    law, gamma = mixture(path), np.sqrt(2) - 1
    run = lambda high, **options: jax.eval_shape(
        lambda x: sampling.sample(
            sampling.edm_heun(law.velocity, path=path, steps=6, s_churn=100.0, **options), x,
            grids.edm_grid(6, sigma_min=0.02, sigma_max=high, path=path), key=key,
        ),
        jnp.zeros((2, 2)),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"s_max=inf: .*level {0.9 * top:g} .*s_max={top / (1 + gamma):.4g},"):
        run(0.9 * top)
    run(0.9 * top, s_max=0.99 * top / (1 + gamma))
    run(0.99 * top / (1 + gamma))


def counted(velocity):
    seen = []

    def v(x, t, cond=None):
        jax.debug.callback(lambda: seen.append(1))
        return velocity(x, t)

    return v, seen


NFE = {
    "ddim": lambda n: n,
    "reverse_diffusion": lambda n: n,
    "dpmpp_2s": lambda n: 2 * n - 1,
    "dpmpp_2m": lambda n: n,
    "dpmpp_3m": lambda n: n,
    "unipc": lambda n: n,
    "ipndm": lambda n: n,
    "initial_noise": lambda n: n,
    "edm_heun": lambda n: 2 * n - 1,
}


@pytest.mark.parametrize("name", NFE)
def test_what_is_evaluated_is_what_is_stated(name, key):
    """Counted on the host; on EDM's grid, whose last step ends in the data."""
    velocity, seen = counted(mixture().velocity)
    made = getattr(sampling, name)(velocity)
    for n in (1, 18):
        seen.clear()
        run = lambda x, n=n: sampling.sample(made, x, grids.edm_grid(n), key=key)
        jax.block_until_ready(jax.jit(run)(jnp.ones((2, 2))))
        jax.effects_barrier()
        assert len(seen) == NFE[name](n)
        assert sampling.cost(made, n).nfe == len(seen) + (name in ("edm_heun", "dpmpp_2s"))


@pytest.mark.parametrize("name", ["ancestral", "half", "churn", "reverse_diffusion", "dpmpp_2s"])
def test_stochastic_steps_have_the_marginals_in_the_limit(name, x64):
    """Exact moments on Gaussian data: first order, or two of 2S and of Heun's step for a fixed amount of churn."""
    path = PATHS["vp"]
    velocity = oracles.gaussian(MEAN, STD, path=path).velocity
    made = lambda n: {
        "ancestral": sampling.ddim(velocity, path=path, eta=1.0),
        "half": sampling.ddim(velocity, path=path, eta=0.5),
        "churn": sampling.edm_heun(velocity, path=path, steps=n, s_churn=2.0),
        "reverse_diffusion": sampling.reverse_diffusion(velocity, path=path),
        "dpmpp_2s": sampling.dpmpp_2s(velocity, path=path, eta=1.0),
    }[name]
    grid = lambda n: [np.linspace(0.2, 0.9, n + 1)]
    at = lambda n: np.abs(moments(made(n), grid(n), *marginal(path, 0.2))[0, :2] - marginal(path, 0.9))
    (mean, coarse), (fine_mean, fine) = at(160), at(320)
    assert abs(np.log2(coarse / fine) - (2 if name in ("churn", "dpmpp_2s") else 1)) < 0.15 and fine < 0.02
    if name == "reverse_diffusion":
        assert abs(np.log2(mean / fine_mean) - 1) < 0.15
    else:  # the mean goes straight in x / beta
        assert max(mean, fine_mean) < 1e-12
    assert abs(rows(made(4), np.array([0.5]), np.array([0.6]))[0, 2]) > 0.03  # it does draw


def test_an_ancestral_chain_has_the_bias_that_its_formula_says(x64):
    """Data ``N(0, 1)`` on a variance preserving path: each step shrinks the variance by its own squared gain."""
    path = PATHS["trigonometric"]
    ts = np.linspace(0.1, 0.9, 7)
    alpha, beta = (np.asarray(a) for a in path.coefficients(jnp.asarray(ts)))
    var = 1.0
    for i in range(6):
        (a_s, b_s), (a, b) = (alpha[i], beta[i]), (alpha[i + 1], beta[i + 1])
        w = a**2 - (a**2 * b_s / (a_s * b)) ** 2
        var = (b * b_s + np.sqrt(a**2 - w) * a_s) ** 2 * var + w  # D = b_s x and E = a_s x
    step = sampling.ddim(oracles.gaussian(0.0, 1.0, path=path).velocity, path=path, eta=1.0)
    got = moments(step, [ts], 0.0, 1.0)[0, 1]
    assert got == pytest.approx(var, rel=1e-12) and var < 0.99
    n, x0 = 20_000, jax.random.normal(jax.random.key(1), (20_000, 1))
    drawn = np.asarray(jax.jit(lambda x: sampling.sample(step, x, ts, key=jax.random.key(2)))(x0))
    assert abs(drawn.var() / var - 1) < 4 * np.sqrt(2 / n)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_reverse_diffusion_predictor_is_the_published_one(name, x64, key):
    path, (s, t) = PATHS[name], (0.4, 0.41)
    law, x, keys = mixture(path), jax.random.normal(key, (4, 2)), as_keys(key, 4)
    (a_s, b_s), (a, b) = (map(float, path.coefficients(jnp.asarray(u))) for u in (s, t))
    if name == "ve":
        drift, square = 0, a_s**2 - a**2
    else:
        rate = 1 - (b_s / b) ** 2  # DDPM's: x_s = sqrt(1 - rate) x_t + sqrt(rate) z
        drift, square = np.sqrt(1 - rate) * x - x, rate
    mean = x - drift + square * law.score(x, s)
    got = sampling.reverse_diffusion(law.velocity, path=path)(x, s, t, None, keys)
    np.testing.assert_allclose(got, mean + np.sqrt(square) * normal(keys, (2,), x.dtype), rtol=1e-9)
    last = sampling.reverse_diffusion(law.velocity, path=path, end=t)(x, s, jnp.float32(t), None, keys)
    np.testing.assert_allclose(last, mean, rtol=1e-4)  # float32's end is 1e-8 further


def test_predictor_corrector_has_the_moments_of_its_recursion_and_its_cost(x64):
    """Corrector first, then predictor; the mean of the last one. Affine on Gaussian data, so in closed form."""
    path, n, steps, examples = PATHS["vp"], 20, 2, 20_000
    ts = np.linspace(0.0, 0.999, n + 1, dtype=np.float32).astype(float)
    law = oracles.gaussian(MEAN, STD, path=path)
    size = lambda t: 0.05 * (1.1 - t)
    velocity, seen = counted(law.velocity)
    predict = sampling.reverse_diffusion(velocity, path=path, end=ts[-1])
    fix = correctors.langevin(correction.score_of(velocity, path=path), step=size, steps=steps)
    x0 = jax.random.normal(jax.random.key(0), (examples, 1))
    run = lambda x: sampling.sample(predict, x, ts, key=jax.random.key(1), corrector=fix, at=range(n))
    got = np.asarray(jax.block_until_ready(jax.jit(run)(x0)))
    jax.effects_barrier()
    cost = sampling.cost(1, n, range(n), steps)
    assert len(seen) == cost.nfe == n * (steps + 1)
    mean, var = 0.0, 1.0
    plain = sampling.reverse_diffusion(law.velocity, path=path, end=ts[-1])
    for s, (a, b, c) in zip(ts, rows(plain, ts[:-1], ts[1:]), strict=False):
        (m, v), h = marginal(path, s), size(s)
        for _ in range(steps):
            mean, var = mean - h * (mean - m) / v, (1 - h / v) ** 2 * var + 2 * h
        mean, var = a * mean + b, a**2 * var + c**2
    assert c == 0
    assert abs(got.mean() - mean) < 4 * np.sqrt(var / examples) and abs(got.var() / var - 1) < 4 * np.sqrt(2 / examples)


@pytest.mark.parametrize("name", ["ancestral", "churn", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m"])
def test_every_stochastic_step_ends_in_the_mixture(name, key):
    """Mode weights and second moments within standard errors of samples of the data."""
    n, law = 10_000, mixture()
    grid = grids.edm_grid(120)
    step = {
        "ancestral": sampling.ddim(law.velocity, eta=1.0),
        "churn": sampling.edm_heun(law.velocity, steps=120, s_churn=40.0, s_min=0.01, s_max=10.0),
        **{n: getattr(sampling, n)(law.velocity, eta=1.0) for n in ("dpmpp_2s", "dpmpp_2m", "dpmpp_3m")},
    }[name]
    x0 = (1 - grid[0]) * jax.random.normal(key, (n, 2))
    got = np.asarray(jax.jit(lambda x: sampling.sample(step, x, grid, key=jax.random.key(1)))(x0), np.float64)

    def told(x):
        near = np.argmin(((x[:, None] - np.array(MEANS)) ** 2).sum(-1), 1)
        columns = np.concatenate([near[:, None] == np.arange(3), x, x**2, x[:, :1] * x[:, 1:]], 1)
        return columns.mean(0), columns.std(0) / len(x) ** 0.5

    (a, sa), (b, sb) = told(got), told(np.asarray(law.sample(jax.random.key(2), n), np.float64))
    assert np.abs((a - b) / np.hypot(sa, sb)).max() < 4


def test_draws_belong_to_their_example_and_falling_steps_go_back(x64, key):
    law, keys, x = oracles.gaussian(MEAN, STD), as_keys(key, 6), jax.random.normal(key, (6, 2))
    for made in (sampling.ddim(law.velocity, eta=0.7), sampling.reverse_diffusion(law.velocity)):
        step = jax.jit(made)
        whole = step(x, 0.3, 0.5, None, keys)
        np.testing.assert_allclose(step(x[2:4], 0.3, 0.5, None, keys[2:4]), whole[2:4], rtol=1e-12)
        with pytest.raises(ValueError, match="key=None: "):
            made(x, 0.3, 0.5)
    exact = law.flow_map(x, 1.0, 0.0)
    for make, order in ((sampling.ddim, 1), (sampling.edm_heun, 2)):
        step = make(law.velocity)
        coarse, fine = (np.abs(walk(step, x, np.linspace(1, 0, n + 1)) - exact).max() for n in (80, 160))
        assert abs(np.log2(coarse / fine) - order) < 0.2


def test_a_condition_reaches_the_velocity_of_every_step(x64, key):
    cond = jnp.array([1.0, -3.0])
    tell = lambda x, t, cond: expand(cond, x) + 0 * x  # on the linear path data less noise
    x, grid = jnp.zeros((2, 1)), grids.edm_grid(5)
    for make in ("ddim", "edm_heun", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm"):
        made = getattr(sampling, make)(tell)
        end = jax.jit(lambda x, made=made: sampling.sample(made, x, grid, cond=cond))(x)
        assert np.sign(end[:, 0]).tolist() == [1, -1] and end[1, 0] / end[0, 0] == pytest.approx(-3)


def test_steps_are_named_in_a_config_and_take_the_path_of_the_run(x64, key):
    path = PATHS["vp"]
    law, x, keys = oracles.gaussian(MEAN, STD, path=path), jax.random.normal(key, (3, 2)), as_keys(key, 3)
    step = step_of({"name": "ddim", "eta": 1.0}, law.velocity, path=path)
    want = sampling.ddim(law.velocity, path=path, eta=1.0)(x, 0.3, 0.5, None, keys)
    np.testing.assert_array_equal(step(x, 0.3, 0.5, None, keys), want)
    assert isinstance(step_of("ipndm", law.velocity, path=path), Multistep)
    with pytest.raises(ValueError, match="'ddmi'.*did you mean 'ddim'.*dpmpp_3m, edm_heun, euler"):
        step_of("ddmi", law.velocity)
    with pytest.raises(ValueError, match="ddim.* latent"):
        step_of("ddim", law.velocity, path=paths.two_sided(), score=law.score)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (sampling.ddim, {"eta": 1.5}, "eta=1.5: "),
        (sampling.edm_heun, {"s_churn": 40.0}, "steps=None: s_churn=40.0"),
        (sampling.edm_heun, {"s_churn": -1.0, "steps": 4}, "s_churn=-1.0, "),
        (sampling.edm_heun, {"s_min": 2.0, "s_max": 1.0}, "s_min=2.0, s_max=1.0"),
        (sampling.ipndm, {"order": 5}, "order=5: "),
        (sampling.reverse_diffusion, {"path": paths.two_sided()}, "latent"),
        (sampling.denoiser, {"path": paths.two_sided()}, "latent"),
        (sampling.velocity_of, {"path": paths.two_sided()}, "latent"),
    ],
)
def test_what_cannot_be_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(lambda x, t, cond=None: x, **options)


def test_a_uniform_grid_from_noise_to_data_is_finite_at_its_ends(key):
    """Where a noise level is infinite or zero, on a path whose ends are both exact and on one with a rounded end."""
    x = jax.random.normal(key, (64, 1))
    for path in (PATHS["linear"], PATHS["trigonometric"]):
        law = oracles.gaussian(MEAN, STD, path=path)
        exact = law.flow_map(x, 0.0, 1.0)
        for name in ("ddim", "edm_heun", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm"):
            step = getattr(sampling, name)(law.velocity, path=path)
            end = jax.jit(lambda x, step=step: sampling.sample(step, x, grids.uniform_grid(100)))(x)
            assert np.abs(end - exact).max() < 0.03, (name, path)
