"""Sources against their densities, and what takes a source against closed forms: batches, starts, likelihood."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from fmjax import correction, couplings, methods, oracles, paths, sampling, sources
from fmjax.checks import Refusal
from fmjax.data import batches
from fmjax.keys import as_keys
from fmjax.sampling import likelihood
from fmjax.straightening import segments
from fmjax.types import expand, over_batch

MEAN, STD, N = 1.5, 0.4, 4096
KINDS = {
    "gaussian": sources.gaussian_noise(mean=MEAN, std=STD),
    "uniform": sources.uniform_noise(low=-0.5, high=2.0),
    "mixture": sources.gaussian_mixture(means=((-2.0,), (1.0,)), std=(0.3, 0.7), weights=(1.0, 3.0)),
}
PEERS = {
    "gaussian": stats.norm(MEAN, STD).pdf,
    "uniform": stats.uniform(-0.5, 2.5).pdf,
    "mixture": lambda x: 0.25 * stats.norm(-2, 0.3).pdf(x) + 0.75 * stats.norm(1, 0.7).pdf(x),
}
GRID = np.linspace(-5, 6, 4401)
SHIFT, WIDTH = 0.7, 1.6  # of the affine map x1 = SHIFT + WIDTH x0, the optimal transport in one dimension


def keys_of(n, seed=0):
    return as_keys(jax.random.key(seed), n)


def transport(x, t, cond=None):
    """The velocity of the straight lines from x0 to SHIFT + WIDTH x0."""
    t = expand(over_batch(t, x), x)
    x0 = (x - t * SHIFT) / (1 - t + t * WIDTH)
    return SHIFT + (WIDTH - 1) * x0


@pytest.mark.parametrize("kind", KINDS)
def test_a_density_is_the_density_of_scipy_and_of_the_draws(kind):
    """Kolmogorov's distance of the draws to the integral of the density exceeds 1.63 / sqrt(n) once in a hundred."""
    source = KINDS[kind]
    density = np.exp(source.log_density(jnp.asarray(GRID, jnp.float32)[:, None]))
    np.testing.assert_allclose(density, PEERS[kind](GRID.astype(np.float32)), rtol=1e-4, atol=1e-6)
    x = np.sort(np.asarray(source.examples(keys_of(N), (1,)))[:, 0])
    cdf = np.interp(x, GRID, integrate.cumulative_trapezoid(density, GRID, initial=0))
    assert np.abs(cdf - (np.arange(N) + 0.5) / N).max() < 1.63 / np.sqrt(N)


def test_coordinates_have_their_own_parameters():
    x = np.asarray(sources.gaussian_noise(mean=(0.0, 3.0), std=(1.0, 0.1)).examples(keys_of(N), (2,)))
    np.testing.assert_allclose(x.mean(0), (0, 3), atol=4 / np.sqrt(N))
    np.testing.assert_allclose(x.std(0), (1, 0.1), rtol=4 / np.sqrt(2 * N))
    box = sources.uniform_noise(low=(0.0, -4.0), high=(1.0, -2.0))
    x = np.asarray(box.examples(keys_of(N), (2,)))
    assert (x.min(0) >= (0, -4)).all() and (x.max(0) <= (1, -2)).all()
    np.testing.assert_allclose(x.mean(0), (0.5, -3), atol=0.05)
    np.testing.assert_allclose(box.log_density(jnp.array([[0.5, -3.0], [0.5, 0.0]])), [-np.log(2), -np.inf], rtol=1e-6)


@pytest.mark.parametrize("source", [*KINDS.values(), sources.rows_of(np.arange(50, dtype=np.float32)[:, None])])
def test_an_example_depends_on_its_key_alone(source):
    keys = keys_of(12)
    np.testing.assert_array_equal(source.examples(keys, (1,))[5:8], source.examples(keys[5:8], (1,)))
    assert not np.array_equal(source.examples(keys, (1,)), source.examples(keys_of(12, seed=1), (1,)))


def test_gaussian_noise_without_options_is_the_default_to_the_bit():
    source, keys = sources.gaussian_noise(mean=0.0, std=(1.0, 1.0, 1.0)), keys_of(64)
    assert source.normal and not KINDS["gaussian"].normal
    start = lambda **options: sampling.source_sample(paths.ve(), keys, (64, 3), **options)
    np.testing.assert_array_equal(start(source=source), start())
    assert np.array_equal(source.examples(keys, (3,)), jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys))


def test_rows_of_a_data_set_are_drawn_with_equal_frequencies():
    """A chi-squared statistic of 9 degrees of freedom exceeds 27.9 once in a thousand."""
    x = np.random.default_rng(0).normal(size=(10, 2, 2)).astype(np.float32)
    drawn = sources.rows_of(x).examples(keys_of(N), (2, 2))
    rows = np.argmin(np.abs(drawn[:, None] - x).sum((2, 3)), 1)
    np.testing.assert_array_equal(drawn, x[rows])
    assert ((np.bincount(rows, minlength=10) - N / 10) ** 2 / (N / 10)).sum() < 27.9
    with pytest.raises(TypeError, match=r"source: rows of a data set are drawn outside of jax\.jit"):
        jax.jit(lambda keys: sources.rows_of(x).examples(keys, (2, 2)))(keys_of(2))


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (sources.gaussian_noise, {"std": 0.0}, "std=0.0: not positive"),
        (sources.gaussian_noise, {"mean": float("nan")}, "mean=nan: not finite"),
        (sources.gaussian_noise, {"mean": (0.0, 1.0), "std": (1.0, 1.0, 1.0)}, r"std: its shape is \[3\].* \[2\]"),
        (sources.uniform_noise, {"low": 2.0}, "high=1.0: not above low=2.0"),
        (sources.gaussian_mixture, {"means": ()}, r"means=\(\): not means"),
        (sources.gaussian_mixture, {"means": ((1.0,), (2.0,)), "std": (1.0,) * 3}, "std=.*there are 2 means"),
        (sources.gaussian_mixture, {"means": ((1.0,), (2.0,)), "weights": (1.0, -1.0)}, "weights=.*not positive"),
    ],
)
def test_parameters_that_describe_no_source_are_refused(factory, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        factory(**options)


def test_a_source_of_another_shape_is_refused_before_it_draws():
    bad = sources.Source("short", lambda key, shape: jnp.zeros((len(key), 1)))
    with pytest.raises(ValueError, match=r"^source='short': drew float32 \[3, 1\]"):
        bad.examples(keys_of(3), (2,))
    with pytest.raises(ValueError, match=r"^source='gaussian_mixture': has examples \[1\], and the data have \[2\]"):
        batches(np.zeros((8, 2), np.float32), batch_size=4, seed=0, source=KINDS["mixture"])
    with pytest.raises(ValueError, match=r"^source='uniform_noise': DDIM needs the source N\(0, I\)\. Take 'heun'\."):
        KINDS["uniform"].check_normal("DDIM", "Take 'heun'")
    assert len(str(Refusal("source", "x" * 500, "y" * 500, "z"))) <= 300


# batches


@pytest.mark.parametrize("couple", [None, couplings.minibatch_ot()])
def test_batches_draw_the_source_by_step_and_row(couple):
    """A batch is a function of the seed and the step, on one process or on two; the rows have the source's moments."""
    x = np.random.default_rng(0).normal(size=(400, 1)).astype(np.float32)
    make = lambda **part: batches(x, batch_size=200, seed=3, source=KINDS["gaussian"], couple=couple, **part)
    batch = make()
    np.testing.assert_array_equal(batch(5).x0, make()(5).x0)
    assert not np.isin(batch(5).x0, batch(6).x0).any()
    parts = [make(process_index=i, process_count=2)(5) for i in range(2)]
    for name in ("x0", "x1"):
        np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(batch(5), name))
    x0 = np.concatenate([batch(step).x0 for step in range(40)])
    assert abs(x0.mean() - MEAN) < 4 * STD / np.sqrt(len(x0)) and abs(x0.std() / STD - 1) < 4 / np.sqrt(2 * len(x0))
    if couple:  # the optimal pairs of one dimension have one order
        assert (np.argsort(batch(5).x0[:, 0]) == np.argsort(batch(5).x1[:, 0])).all()
        np.testing.assert_array_equal(
            np.sort(batch(5).x0, 0), np.sort(KINDS["gaussian"].rows(3, 5, range(200), (1,)), 0)
        )


def test_the_exact_velocity_between_gaussians_is_stationary_on_the_batches():
    """The gradient of ``|v + a + b (x - m) - dI|^2`` vanishes at 0; with the velocity of N(0, I) it does not."""
    data = (2.0 + 0.5 * np.random.default_rng(1).normal(size=(40_000, 1))).astype(np.float32)
    joint = lambda mean, std: oracles.coupled(jnp.array([mean]), jnp.array([2.0]), jnp.diag(jnp.array([std**2, 0.25])))
    batch = jax.tree.map(jnp.asarray, batches(data, batch_size=40_000, seed=0, source=KINDS["gaussian"])(0))

    def gradient(oracle):
        net = lambda p, x, s, t, cond=None, key=None: oracle.velocity(x, t) + p[0] + p[1] * (x - 1.75)
        loss = methods.flow_matching(net).loss
        return jax.jit(jax.grad(lambda p: loss(p, p, batch, jax.random.key(0))[0]))(jnp.zeros(2))

    # the residual has a variance of at most 0.41 (0.25 + 0.16), and |x - m_t| about 0.5
    assert np.abs(gradient(joint(MEAN, STD))).max() < 4 * 2 * np.sqrt(0.41) / np.sqrt(40_000)
    assert np.abs(gradient(joint(0.0, 1.0))).max() > 0.5


# starts, maps and densities


def test_a_start_is_scaled_by_the_path_and_widened_by_its_latent():
    """``alpha x0 + gamma z``: 50 x0 on ``ve``; at t = 1/2 of a Brownian bridge x0 / 2 + z / 2."""
    start = functools.partial(sampling.source_sample, source=KINDS["gaussian"])
    np.testing.assert_allclose(
        start(paths.ve(sigma_max=50.0), keys_of(8), (8, 1)),
        50 * KINDS["gaussian"].examples(keys_of(8), (1,)),
        rtol=1e-6,
    )
    x = np.asarray(start(paths.two_sided(), keys_of(N), (N, 1), start=0.5))
    std = np.sqrt(STD**2 / 4 + 1 / 4)
    assert abs(x.mean() - MEAN / 2) < 4 * std / np.sqrt(N) and abs(x.std() / std - 1) < 4 / np.sqrt(2 * N)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_and_the_density_are_those_of_straight_transport(kind, x64):
    """``p_1(x) = p_0((x - c) / w) / w``, also where it is zero; samples end at ``c + w x0``."""
    source = KINDS[kind]
    x0 = jnp.asarray(source.examples(keys_of(16), (1,)), jnp.float64)
    x1 = jax.jit(lambda x: sampling.sample(sampling.rk4(transport), x, np.linspace(0, 1, 9)))(x0)
    np.testing.assert_allclose(x1, SHIFT + WIDTH * x0, atol=1e-8)
    x = jnp.concatenate([x1, jnp.array([[SHIFT + WIDTH * 3.0]])])
    with np.errstate(divide="ignore"):
        truth = np.log(PEERS[kind]((np.asarray(x)[:, 0] - SHIFT) / WIDTH)) - np.log(WIDTH)
    solve = functools.partial(likelihood.log_density, transport, source=source, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(likelihood.checked_density(jax.jit(solve)(x)), truth, atol=1e-6)
    jump = lambda x, s, t, cond=None: (x - SHIFT) / WIDTH if s > t else SHIFT + WIDTH * x
    found = likelihood.flow_map_log_density(jump, x, source=source)
    np.testing.assert_allclose(likelihood.checked_density(found), truth, atol=1e-6)
    assert np.isinf(truth[-1]) == (kind == "uniform")


def test_the_density_between_gaussians_is_the_closed_form(x64, key):
    """Source N(m, diag s^2) in two dimensions, data with a full covariance, on a curved path."""
    mean0, std0 = (1.0, -2.0), (0.5, 2.0)
    a, d = jnp.diag(jnp.square(jnp.array(std0))), jnp.array([[0.6, 0.2], [0.2, 0.3]])
    joint = jnp.block([[a, jnp.zeros((2, 2))], [jnp.zeros((2, 2)), d]])
    oracle = oracles.coupled(jnp.array(mean0), jnp.array([0.5, 3.0]), joint, path=paths.trigonometric())
    _, x = oracle.sample(key, 6)
    source = sources.gaussian_noise(mean=mean0, std=std0)
    solve = lambda x, **options: likelihood.log_density(oracle.velocity, x, rtol=1e-9, atol=1e-9, **options)
    found = jax.jit(lambda x: solve(x, source=source))(x)
    np.testing.assert_allclose(likelihood.checked_density(found), oracle.log_density(x, 1.0), atol=1e-6)
    assert np.abs(solve(x).log_p - oracle.log_density(x, 1.0)).min() > 0.1  # N(0, I) is another source


def test_the_path_scales_the_density_of_the_source():
    still = lambda x, t, cond=None: 0 * x
    x = jnp.array([[40.0], [90.0]])
    found = likelihood.log_density(still, x, path=paths.ve(sigma_max=50.0), source=KINDS["gaussian"])
    np.testing.assert_allclose(found.log_p, stats.norm(50 * MEAN, 50 * STD).logpdf(np.asarray(x)[:, 0]), rtol=1e-5)


def test_a_likelihood_needs_a_density():
    rows = sources.rows_of(np.zeros((4, 1), np.float32), name="moons")
    for call in (
        lambda: likelihood.log_density(transport, jnp.zeros((2, 1)), source=rows),
        lambda: likelihood.flow_map_log_density(lambda x, s, t, cond=None: x, jnp.ones((2, 1)), source=rows),
    ):
        with pytest.raises(ValueError, match="^source='moons': has no density"):
            call()


# marginals and segments


def test_marginals_start_from_examples_of_the_source_and_end_there(tmp_path):
    """Forward ``x0 + t (c + (w - 1) x0)`` at every stored time; backward from its end the same states."""
    ts = np.linspace(0, 1, 5, dtype=np.float32)
    x0 = np.asarray(KINDS["uniform"].examples(keys_of(20), (1,)))
    build = functools.partial(correction.build_marginals, lambda params: transport, {}, ts, flow="exact")
    exact = x0[:, None] + ts[:, None] * (SHIFT + (WIDTH - 1) * x0[:, None])
    build(directory=tmp_path / "forward", direction="forward", data=x0)
    forward = correction.read_marginals(tmp_path / "forward")
    np.testing.assert_allclose(forward.x, exact, atol=1e-5)
    np.testing.assert_array_equal(forward.x[:, 0], x0)
    build(directory=tmp_path / "backward", direction="backward", data=exact[:, -1])
    np.testing.assert_allclose(correction.read_marginals(tmp_path / "backward").x, exact, atol=1e-5)
    with pytest.raises(ValueError, match="data"):  # another source is another set
        build(directory=tmp_path / "forward", direction="forward", data=x0 + 1)
    with pytest.raises(ValueError, match="^direction='forward'"):
        build(directory=tmp_path / "both", direction="forward", data=x0, count=20)
    with pytest.raises(ValueError, match="built from other data"):
        first = build(directory=tmp_path / "first", direction="forward", data=x0, steps=(0,))
        correction.interpolate_marginals(correction.read_marginals(tmp_path / "first"), data=x0)
        assert first.data == forward.manifest.data


def test_kept_segments_see_the_source():
    """``alpha x0 + beta x`` at the time of the batch, for one data point: what is left is the source."""
    ts = np.array([0.0, 0.5, 1.0], np.float32)
    line = correction.Marginals(np.arange(3.0).reshape(1, 3, 1), ts, None)
    make = functools.partial(
        segments.segment_batches, line, (0.0, 0.5, 1.0), batch_size=N, seed=2, keep=(0,),
        real=np.full((3, 1), 5.0, np.float32), kept_fraction=1.0,
    )  # fmt: skip
    of = lambda batch: (batch.x1[:, 0] - batch.t * 5.0) / (1 - batch.t)
    for source, mean, std in ((None, 0.0, 1.0), (KINDS["gaussian"], MEAN, STD)):
        x0 = of(make(source=source)(1))
        assert abs(x0.mean() - mean) < 4 * std / np.sqrt(N) and abs(x0.std() / std - 1) < 4 / np.sqrt(2 * N)
    rows = np.sort(KINDS["gaussian"].rows(2, 1, range(N), (1,))[:, 0])
    np.testing.assert_allclose(np.sort(of(make(source=KINDS["gaussian"])(1))), rows, atol=1e-4)


def test_a_batch_without_a_source_leaves_it_to_the_loss():
    assert batches(np.zeros((8, 2), np.float32), batch_size=4, seed=0)(0).x0 is None
