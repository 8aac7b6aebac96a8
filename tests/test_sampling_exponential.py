"""DPM-Solver++ and UniPC against their authors' algorithms, their integrals, and the moments of Gaussians."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from affine import MEAN, STD, marginal

from fmjax import oracles, paths, sampling
from fmjax.experiments import specs
from fmjax.experiments.samplers import plain_samplers
from fmjax.keys import as_keys, fold_in, normal
from fmjax.sampling import exponential, grids

GAUSSIAN = ([[0.3, -0.2]] * 2, [0.5] * 2, [0.5, 0.5])
MIXTURE = ([[2.0, 0.5], [-1.5, 1.0]], [0.3, 0.6], [0.7, 0.3])


def exact_model(means, stds, weights):
    """``D(x; sigma)`` of a mixture in numpy: each component's posterior mean, by its responsibility."""
    means, stds, weights = map(np.array, (means, stds, weights))

    def model(x, sigma):
        var = sigma**2 + stds**2
        square = ((x[:, None] - means) ** 2).sum(-1)
        logits = np.log(weights) - square / (2 * var) - x.shape[1] / 2 * np.log(var)
        near = np.exp(logits - logits.max(1, keepdims=True))
        posterior = (means * sigma**2 + stds[:, None] ** 2 * x[:, None]) / var[:, None]
        return ((near / near.sum(1, keepdims=True))[:, :, None] * posterior).sum(1)

    return model


# The samplers in the notation of their authors: k-diffusion's for DPM-Solver++ (x = x1 + sigma z, t = -log sigma),
# the authors' and diffusers' for UniPC (x = alpha_t x1 + sigma_t z, lambda = log alpha_t - log sigma_t).


def dpmpp_2s_ancestral(model, x, sigmas, noise, eta):
    xs = [x]
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        up = min(sigmas[i + 1], eta * (sigmas[i + 1] ** 2 * (sigmas[i] ** 2 - sigmas[i + 1] ** 2)) ** 0.5 / sigmas[i])
        down = (sigmas[i + 1] ** 2 - up**2) ** 0.5
        if down == 0:
            x = x + (x - denoised) / sigmas[i] * (down - sigmas[i])
        else:
            t, t_next, r = -np.log(sigmas[i]), -np.log(down), 1 / 2
            h = t_next - t
            s = t + r * h
            x_2 = np.exp(t - s) * x - np.expm1(-h * r) * denoised
            x = np.exp(t - t_next) * x - np.expm1(-h) * model(x_2, np.exp(-s))
        x = x + noise(i) * up
        xs.append(x)
    return xs


def dpmpp_2m_sde(model, x, sigmas, noise, eta, solver_type):
    xs, old, h_last = [x], None, None
    for i in range(len(sigmas) - 1):
        denoised, h = model(x, sigmas[i]), None
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            h = np.log(sigmas[i] / sigmas[i + 1])
            grown = 1 - np.exp(-(1 + eta) * h)
            x = sigmas[i + 1] / sigmas[i] * np.exp(-eta * h) * x + grown * denoised
            if old is not None:
                slope = (denoised - old) / (h_last / h)
                x = x + (grown / 2 if solver_type == "midpoint" else 1 - grown / ((1 + eta) * h)) * slope
            x = x + noise(i) * sigmas[i + 1] * np.sqrt(1 - np.exp(-2 * eta * h))
        old, h_last = denoised, h
        xs.append(x)
    return xs


def dpmpp_3m_sde(model, x, sigmas, noise, eta, factor=1):
    """``factor`` is 2 where the second difference counts in full."""
    xs, (denoised_1, denoised_2), (h_1, h_2) = [x], (None, None), (None, None)
    for i in range(len(sigmas) - 1):
        denoised, h = model(x, sigmas[i]), None
        if sigmas[i + 1] == 0:
            x = denoised
        else:
            h = np.log(sigmas[i] / sigmas[i + 1])
            h_eta = h * (eta + 1)
            x = np.exp(-h_eta) * x - np.expm1(-h_eta) * denoised
            phi_2 = np.expm1(-h_eta) / h_eta + 1
            phi_3 = phi_2 / h_eta - 0.5
            if h_2 is not None:
                r0, r1 = h_1 / h, h_2 / h
                d1_0, d1_1 = (denoised - denoised_1) / r0, (denoised_1 - denoised_2) / r1
                d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
                d2 = (d1_0 - d1_1) / (r0 + r1)
                x = x + phi_2 * d1 - factor * phi_3 * d2
            elif h_1 is not None:
                x = x + phi_2 * (denoised - denoised_1) / (h_1 / h)
            x = x + noise(i) * sigmas[i + 1] * np.sqrt(1 - np.exp(-2 * h * eta))
        (denoised_1, denoised_2), (h_1, h_2) = (denoised, denoised_1), (h, h_1)
        xs.append(x)
    return xs


def unipc_bh(model, x, sigmas, order, variant, lower_order_final=False, push=0.0):
    """A ``push`` moves each state before the model is evaluated."""
    n, alpha = len(sigmas) - 1, 1 / np.sqrt(1 + sigmas**2)
    sigma = alpha * sigmas
    lam = np.log(alpha[:-1]) - np.log(sigma[:-1])

    def update(x, i, p, m, m_t=None):
        """UniP-p from level i to i + 1, or UniC-p where ``m_t`` is the prediction at its end."""
        h = lam[i + 1] - lam[i]
        hh = -h
        rks = np.array([(lam[i - k] - lam[i]) / h for k in range(1, p)] + [1.0])
        d1s = [(m[i - k] - m[i]) / rks[k - 1] for k in range(1, p)]
        b_h = hh if variant == "bh1" else np.expm1(hh)
        h_phi_1 = np.expm1(hh)
        h_phi_k, factorial, r, b = h_phi_1 / hh - 1, 1, [], []
        for k in range(1, p + 1):
            r.append(rks ** (k - 1))
            b.append(h_phi_k * factorial / b_h)
            factorial *= k + 1
            h_phi_k = h_phi_k / hh - 1 / factorial
        r, b = np.array(r), np.array(b)
        if m_t is None:
            rhos = [0.5] if p == 2 else np.linalg.solve(r[:-1, :-1], b[:-1])
        else:
            rhos, d1s = ([0.5] if p == 1 else np.linalg.solve(r, b)), [*d1s, m_t - m[i]]
        change = sum((rho * d for rho, d in zip(rhos, d1s, strict=True)), 0 * x)
        return sigma[i + 1] / sigma[i] * x - alpha[i + 1] * h_phi_1 * m[i] - alpha[i + 1] * b_h * change

    x = alpha[0] * x
    xs, m, last, p = [x / alpha[0]], [], None, None
    for i in range(n):
        m_t = model(x / alpha[i] + push, sigmas[i])
        last = (x if i == 0 else update(last, i - 1, p, m, m_t)) + push * alpha[i]
        m.append(m_t)
        p = min(order, i + 1, n - i if lower_order_final else order)
        x = m_t if sigmas[i + 1] == 0 else update(last, i, p, m)
        xs.append(x / alpha[i + 1])
    return xs


ODE, SDE = {"eta": 0.0}, {"eta": 1.0}
PEERS = {
    "2S": ("dpmpp_2s", {}, dpmpp_2s_ancestral, ODE),
    "2S ancestral": ("dpmpp_2s", SDE, dpmpp_2s_ancestral, SDE),
    "2S ancestral, much": ("dpmpp_2s", {"eta": 1.2}, dpmpp_2s_ancestral, {"eta": 1.2}),
    "2M, heun": ("dpmpp_2m", {"solver_type": "heun"}, dpmpp_2m_sde, ODE | {"solver_type": "heun"}),
    "2M SDE": ("dpmpp_2m", SDE, dpmpp_2m_sde, SDE | {"solver_type": "midpoint"}),
    "2M SDE, heun": ("dpmpp_2m", SDE | {"solver_type": "heun"}, dpmpp_2m_sde, SDE | {"solver_type": "heun"}),
    "3M": ("dpmpp_3m", {}, dpmpp_3m_sde, ODE),
    "3M, exact": ("dpmpp_3m", {"exact": True}, dpmpp_3m_sde, ODE | {"factor": 2}),
    "3M SDE": ("dpmpp_3m", {"eta": 0.7}, dpmpp_3m_sde, {"eta": 0.7}),
    **{
        f"UniPC-{p} {b}": ("unipc", {"order": p, "solver_type": b}, unipc_bh, {"order": p, "variant": b})
        for p, b in ((1, "bh2"), (2, "bh1"), (2, "bh2"), (3, "bh2"))
    },
}


@pytest.mark.parametrize("name", PEERS)
def test_each_is_its_authors_algorithm_state_by_state(name, x64, key):
    """On Gaussian data and on a mixture, down to the data; a config names the step and its options."""
    ours, options, theirs, numbers = PEERS[name]
    grid, keys = grids.edm_grid(9), as_keys(key, 4)
    draws = lambda i: np.asarray(normal(fold_in(keys, 2 * i + 1), (2,), jnp.float64))
    numbers = numbers if ours == "unipc" else {"noise": draws} | numbers
    z, sigmas = np.asarray(jax.random.normal(key, (4, 2))), (1 - grid) / grid

    @jax.jit
    def run(x, *data):
        step = specs.build(specs.SOLVER, {"name": ours, **options}, oracles.mixture(*data).velocity, field="solver")
        return sampling.sample(step, x, grid, key=keys, trajectory=True)

    for data in (GAUSSIAN, MIXTURE):
        want = theirs(exact_model(*data), sigmas[0] * z, sigmas, **numbers)
        got = run((1 - grid[0]) * z, *map(jnp.array, data)) / grid[:, None, None]
        np.testing.assert_allclose(got, np.stack(want), rtol=1e-7, atol=1e-9)


def test_with_lower_order_final_unipc_differs_in_one_step_of_order_3():
    """As its docstring says: on a grid that ends in the data the default of diffusers is this step for order 2."""
    grid = grids.edm_grid(9)
    sigmas, z = (1 - grid) / grid, np.ones((1, 2))
    for order, same in ((2, 10), (3, 8)):
        plain, lower = (
            np.stack(unipc_bh(exact_model(*MIXTURE), sigmas[0] * z, sigmas, order, "bh2", final))
            for final in (False, True)
        )
        np.testing.assert_array_equal(plain[:same], lower[:same])
        assert same == 10 or (np.abs(plain - lower)[same:] > 1e-6).any()


def test_unipc_keeps_corrections_between_its_steps(x64, key):
    """Its corrector starts from the step before; the state that was pushed since must not be lost."""
    grid, x = grids.edm_grid(9), np.asarray(jax.random.normal(key, (4, 2)))
    sigmas = (1 - grid) / grid
    step = sampling.unipc(oracles.mixture(*map(jnp.array, MIXTURE)).velocity, order=3)
    corrector = lambda key, x, t, cond=None: (x + 0.1 * t[:, None], {})
    options = {"key": key, "corrector": corrector, "at": range(9)}
    got = jax.jit(lambda x: sampling.sample(step, x, grid, **options))((1 - grid[0]) * x)
    want = unipc_bh(exact_model(*MIXTURE), sigmas[0] * x, sigmas, 3, "bh2", push=0.1)
    np.testing.assert_allclose(got, want[-1], rtol=1e-7)


def test_unipc_out_of_pure_noise_is_its_limit(x64, key):
    """Euler's step, corrected by half the change of the data prediction; the gap falls as ``1 / lambda``."""
    law, x = oracles.mixture(*map(jnp.array, MIXTURE)), jax.random.normal(key, (4, 2))
    data = lambda x, t: x + (1 - t) * law.velocity(x, t)
    ts = np.array([0.0, 0.1, 0.3, 0.6])
    xs = jax.jit(lambda x: sampling.sample(sampling.unipc(law.velocity, order=1), x, ts[:3], trajectory=True))(x)
    first = 0.9 * x + 0.1 * data(x, 0.0)
    later = data(first, 0.1)
    corrected = 0.9 * x + 0.1 * (data(x, 0.0) + later) / 2
    np.testing.assert_allclose(xs[1], first, rtol=1e-9)
    np.testing.assert_allclose(xs[2], 0.7 * (corrected - 0.1 * later) / 0.9 + 0.3 * later, rtol=1e-9)
    run = jax.jit(lambda x, ts: sampling.sample(sampling.unipc(law.velocity, order=3), x, ts))
    near, nearer = (np.abs(run(x, ts) - run(x, np.array([t, *ts[1:]]))).max() for t in (1e-100, 1e-200))
    assert near < 3e-3 and near / nearer == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("n", [1, 3])
def test_moments_are_integrals_and_weights_integrate_polynomials(n, x64):
    """By quadrature, for steps that rise and fall, small and large; an unknown node has no weight."""
    ks = np.array([-12.0, -1.01, -0.99, -1e-3, 1e-7, 0.3, 0.99, 1.01, 5.0, 40.0])
    moments = exponential._moments(jnp.asarray(ks), n)
    for m in range(n + 1):
        kernel = lambda u, k, m=m: k * np.exp(-k * (1 - u)) * u**m
        want = [scipy.integrate.quad(kernel, 0, 1, args=(k,), epsabs=0, epsrel=1e-12, limit=200)[0] for k in ks]
        np.testing.assert_allclose(moments[m], want, rtol=1e-11)
    nodes = np.array([1.0, -0.7, -1.9])[:n, None] * np.ones_like(ks)
    known = np.ones_like(nodes, bool)
    known[1:, ::2] = False
    weights = np.asarray(exponential._weights(jnp.asarray(nodes), jnp.asarray(known), moments[1:]))
    assert (weights[~known] == 0).all()
    for m in range(1, n + 1):
        exact = known.sum(0) >= m
        np.testing.assert_allclose((weights * nodes**m).sum(0)[exact], np.asarray(moments[m])[exact], rtol=1e-10)


def test_moments_keep_their_digits_in_float32():
    """Where the published differences, such as ``(e^-h - 1 + h) / h^2 - 1 / 2``, lose all of them."""
    for k in (1e-3, 0.1, 0.9, 1.1, 10.0):
        got = exponential._moments(jnp.float32([k]), 3)[:, 0]
        with jax.enable_x64(True):
            want = exponential._moments(jnp.float64([np.float32(k)]), 3)[:, 0]
        np.testing.assert_allclose(got, want, rtol=3e-6)


def gains(step, path, along, size):
    """``[N, size, size + 2]`` a grid: on Gaussian data ``(x, D_1, ..)`` after a step is affine in it and in z."""
    keys = as_keys(jax.random.key(3), 2)
    z = np.asarray(normal(keys, (1,), jnp.float64))[:, 0]
    states = np.concatenate([np.zeros((2, size)), np.eye(size)])  # two draws at 0, then each coordinate
    draws = keys[jnp.array([0, 1] + [0] * size)]
    levels = lambda ts: np.divide(*(np.asarray(a) for a in path.coefficients(jnp.asarray(ts))))
    before = [[np.append(np.full(j, np.inf), levels(ts)[: -1 - j]) for j in range(1, size)] for ts in along]
    rows = (
        np.concatenate(r) for r in ([np.transpose(p) for p in before], [g[:-1] for g in along], [g[1:] for g in along])
    )

    def moved(past, s, t):
        memory = jnp.asarray(states[:, 1:].T[..., None]), jnp.repeat(past[:, None], size + 2, 1)
        x, (data, _) = step.step(memory, jnp.asarray(states[:, :1]), s, t, None, draws)
        return jnp.concatenate([x[None], data])[..., 0]

    after = np.asarray(jax.jit(jax.vmap(moved))(*rows))
    noise = (after[..., 0] - after[..., 1]) / (z[0] - z[1])
    shift = after[..., 0] - noise * z[0]
    all_rows = np.concatenate([after[..., 2:] - after[..., :1], shift[..., None], noise[..., None]], -1)
    return np.split(all_rows, np.cumsum([len(ts) - 1 for ts in along])[:-1])


def chain(rows, mean, var):
    """Mean and variance of ``x`` after the last step, exactly: no draws."""
    size = len(rows[0])
    mean, cov = np.array([mean] + [0.0] * (size - 1)), np.diag([var] + [0.0] * (size - 1))
    for row in rows:
        a, b, c = row[:, :size], row[:, size], row[:, size + 1]
        mean, cov = a @ mean + b, a @ cov @ a.T + np.outer(c, c)
    return np.array([mean[0], cov[0, 0]])


STOCHASTIC = {
    "2M SDE": (sampling.dpmpp_2m, {}, 2),
    "2M SDE, heun": (sampling.dpmpp_2m, {"solver_type": "heun"}, 2),
    "3M SDE": (sampling.dpmpp_3m, {}, 3),
    "3M SDE, exact": (sampling.dpmpp_3m, {"exact": True}, 3),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_each_sde_has_the_marginal_in_the_limit(name, x64):
    make, options, size = STOCHASTIC[name]
    path = paths.vp()
    step = make(oracles.gaussian(MEAN, STD, path=path).velocity, path=path, eta=1.0, **options)
    along = [np.linspace(0.2, 0.9, n + 1) for n in (80, 160)]
    ends = [chain(rows, *marginal(path, 0.2)) for rows in gains(step, path, along, size)]
    (mean, coarse), (fine_mean, fine) = np.abs(np.array(ends) - marginal(path, 0.9))
    assert max(mean, fine_mean) < 1e-14  # it goes straight in x / beta
    assert np.log2(coarse / fine) > 1.9 and fine < 2e-4, (coarse, fine)


@pytest.mark.parametrize("name", ["2M SDE", "3M SDE"])
def test_samples_of_an_sde_have_the_moments_of_its_chain(name, key):
    """From the noise of EDM's grid to the data: of the exact chain, and of the data up to its small bias."""
    make, options, size = STOCHASTIC[name]
    step, ts, count = make(oracles.gaussian(MEAN, STD).velocity, eta=1.0, **options), grids.edm_grid(100), 20_000
    with jax.enable_x64(True):
        (rows,) = gains(step, paths.linear(), [ts], size)
    mean, var = chain(rows, 0.0, (1 - ts[0]) ** 2)
    x0 = sampling.source_sample(paths.linear(), jax.random.key(1), (count, 1), start=ts[0])
    got = np.asarray(jax.jit(lambda x: sampling.sample(step, x, ts, key=key))(x0), np.float64)
    assert abs(got.mean() - mean) < 4 * np.sqrt(var / count) and abs(got.var() / var - 1) < 4 * np.sqrt(2 / count)
    assert abs(mean - MEAN) < 0.01 and abs(var / STD**2 - 1) < 0.02, (mean, var)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpmpp_2s", {"eta": -0.1}, "eta=-0.1: "),
        ("dpmpp_2m", {"solver_type": "huen"}, "solver_type='huen': not a choice.*did you mean 'heun'"),
        ("dpmpp_2m", {"eta": math.inf}, "eta=inf: "),
        ("dpmpp_3m", {"eta": -1.0}, "eta=-1.0: "),
        ("unipc", {"order": 4}, "order=4: .*1, 3"),
        ("unipc", {"solver_type": "midpoint"}, "solver_type='midpoint': .*'bh1', 'bh2'"),
        *((n, {"path": paths.two_sided()}, f"{n}.* latent") for n in ("dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "unipc")),
    ],
)
def test_what_cannot_be_is_refused(name, options, message):
    """In Python when the step is made; in a config before any work, with the field."""
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(getattr(sampling, name))(lambda x, t, cond=None: x, **options)  # without the tests' beartype
    if "path" not in options:
        with pytest.raises(ValueError, match=f"samplers.x.solver.{message}"):
            plain_samplers({"x": {"solver": {"name": name, **options}, "steps": 4}})


@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_2m", "dpmpp_3m"])
def test_noise_needs_a_rising_grid_and_a_key(name):
    step = getattr(sampling, name)(lambda x, t, cond=None: -x, eta=1.0)
    with pytest.raises(ValueError, match=f"ts=1 .. 0: falling, but {name} with eta goes from noise to data"):
        sampling.sample(step, jnp.ones((1, 1)), [1.0, 0.5, 0.0], key=jax.random.key(0))
    with pytest.raises(ValueError, match="key=None: "):
        sampling.sample(step, jnp.ones((1, 1)), 4)
