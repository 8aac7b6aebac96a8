"""Discrete data against enumeration: rates, steps, corrector, losses and the bound on two sites of three tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from fmjax import methods, nets, oracles, sampling, tokens
from fmjax.experiments import assemble, build, settings
from fmjax.keys import as_keys
from fmjax.types import Batch

K, D = 3, 2
DATA = np.random.default_rng(0).dirichlet(np.ones(K**D)).reshape((K,) * D)
KEY = jax.random.key(4)
sources = pytest.mark.parametrize("source", tokens.SOURCES)


def setting(source, power=2.0):
    path = tokens.token_path(classes=K, source=source, power=power)
    return path, oracles.token_table(jnp.asarray(DATA), path)


@sources
@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("t", [0.2, 0.83])
def test_the_rates_carry_the_marginals_to_machine_precision(source, noise, t, x64):
    """``dp/dt = p Q`` on all states: nine of the uniform path, sixteen with the mask."""
    path, table = setting(source)
    rates = sampling.flow_rates(table.log_probs, path, noise=noise)
    residual = oracles.kolmogorov_residual(table, rates, path, t)
    assert residual.shape == (path.states,) * D and np.abs(residual).max() < 1e-13
    assert np.abs(jax.jacfwd(table.marginal)(t)).max() > 0.01


@pytest.mark.parametrize("t", [0.2, 0.83])
def test_the_reversed_chain_carries_the_marginals_too(t, x64):
    """And its rates are those of Bayes' rule, ``Q(y, x) p(y) / p(x)``."""
    path, table = setting("uniform")
    rates = sampling.reverse_rates(table.log_conditionals, path)
    assert np.abs(oracles.kolmogorov_residual(table, rates, path, t)).max() < 1e-13
    rows, p = sampling.generator_rows(rates, path, jnp.asarray(table.states), t), table.marginal(t)
    k, dk = path.kept(t)
    x, y = (0, 2), (1, 2)  # the states 2 and 5 of the list
    np.testing.assert_allclose(rows[2, 0, 1], dk / k / K * p[y] / p[x], rtol=1e-12)


@sources
def test_the_corrector_leaves_the_marginal_alone_to_first_order(source, x64):
    """One draw of each site with the probability e changes p_t by O(e^2): sites move together."""
    path, table = setting(source)
    t = 0.6
    k, p = path.kept(t)[0], table.marginal(t)
    x = jnp.asarray(table.states)
    p1 = tokens.data_probabilities(path, table.log_probs(x, t), x)
    target = k * p1 + (1 - k) * tokens.source_probabilities(path, p1, x, jnp.full(len(x), t))
    rows = (target - jax.nn.one_hot(x, path.states)).reshape(*p.shape, D, path.states)
    assert np.abs(oracles.token_flux(p, rows)).max() < 1e-14
    assert np.abs(rows).max() > 0.1


def frequencies(x, states):
    flat = np.ravel_multi_index(np.asarray(x).T, (states,) * D)
    return np.bincount(flat, minlength=states**D).reshape((states,) * D) / len(x)


def draw(step, path, n, ts, **options):
    x0 = tokens.source_tokens(path, as_keys(jax.random.key(9), n), (D,))
    return jax.jit(lambda x: sampling.sample(step, x, ts, key=KEY, **options))(x0)


@pytest.mark.parametrize(
    ("source", "noise", "at"),
    [
        pytest.param("mask", 0.0, (), marks=pytest.mark.slow),
        ("mask", 2.0, (20, 40)),
        pytest.param("uniform", 0.0, (40,), marks=pytest.mark.slow),
        ("uniform", 2.0, ()),
    ],
)
def test_samples_have_the_frequencies_of_the_data(source, noise, at):
    """The same sampler as for floats, with corrections by ``at``; no mask is left at the end."""
    path, table = setting(source)
    n = 10_000
    step = sampling.tau_leaping(sampling.flow_rates(table.log_probs, path, noise=noise), path)
    fix = sampling.jump_corrector(table.log_probs, path, strength=0.5, steps=4) if at else None
    x = draw(step, path, n, 40, corrector=fix, at=at or None)
    assert x.dtype == jnp.int32 and x.max() < K
    assert np.abs(frequencies(x, K) - DATA).max() < 0.02  # four standard errors; the bias of 40 steps is below 0.01


def test_the_error_of_tau_leaping_falls_with_the_step():
    """One step draws both sites at once from their marginals, which forgets how they depend: many steps do not."""
    path, table = setting("mask")
    step = sampling.tau_leaping(sampling.flow_rates(table.log_probs, path), path)
    product = DATA.sum(1)[:, None] * DATA.sum(0)
    error = lambda n: np.abs(frequencies(draw(step, path, 10_000, n), K) - DATA).sum()
    assert abs(error(1) - np.abs(product - DATA).sum()) < 0.05
    assert error(16) < 0.35 * error(1)


def test_the_reversed_chain_samples_the_data():
    path, table = setting("uniform")
    step = sampling.tau_leaping(sampling.reverse_rates(table.log_conditionals, path), path)
    n = 4000
    x = draw(step, path, n, np.linspace(0.05, 0.999, 80))
    assert np.abs(frequencies(x, K) - DATA).max() < 5 * 0.5 / n**0.5
    with pytest.raises(ValueError, match="^ts=0"):
        draw(step, path, 4, 8)


@pytest.mark.slow
@sources
def test_the_corrector_mends_states_of_another_distribution(source):
    path, table = setting(source)
    n, t = 5000, 0.5
    x = tokens.corrupt(path, as_keys(KEY, n), jnp.zeros((n, D), int), t)  # of data that are always (0, 0)
    exact = np.asarray(table.marginal(t))
    error = lambda x: np.abs(frequencies(x, path.states) - exact).sum()
    fix = sampling.jump_corrector(table.log_probs, path, strength=6.0, steps=40)
    y, info = jax.jit(fix)(KEY, x, t)
    assert error(x) > 0.3 and error(y) < 0.1 and 0.1 < info["moved"].mean() <= 1


@sources
def test_the_probabilities_of_the_source_are_those_of_bayes(source, x64):
    """By drawing: the source of corrupted states, given what is seen."""
    path, table = setting(source)
    n, t = 200_000, 0.7
    keys = as_keys(KEY, n)
    x1 = table.sample(jax.random.key(1), n)
    x0 = tokens.source_tokens(path, as_keys(jax.random.key(2), n), (D,))
    x = jnp.where(jax.vmap(lambda k: jax.random.uniform(k, (D,)))(keys) < path.kept(t)[0], x1, x0)
    seen = jnp.asarray([[1, 2]])
    chosen = np.asarray((x == seen).all(1))
    p1 = tokens.data_probabilities(path, table.log_probs(seen, t), seen)
    p0 = tokens.source_probabilities(path, p1, seen, jnp.full(1, t))
    for p, draws in ((p1, x1), (p0, x0)):
        shown = np.bincount(np.asarray(draws)[chosen, 0], minlength=path.states) / chosen.sum()
        np.testing.assert_allclose(p[0, 0], shown, atol=4 * 0.5 / chosen.sum() ** 0.5)


@pytest.mark.parametrize(
    "name", ["discrete_flow_matching, mask", "discrete_flow_matching", "categorical_ratio_matching"]
)
def test_the_closed_form_is_the_minimiser_of_the_loss(name, x64):
    """The gradient at the exact logits is zero within chance, and points back from logits that are wrong."""
    source = "mask" if "mask" in name else "uniform"
    path, table = setting(source)
    exact = table.log_conditionals if "ratio" in name else table.log_probs
    rng = np.random.default_rng(1)
    bumps = jnp.asarray(rng.normal(size=(4, path.states, path.states, D, K)))

    def net(params, x, s, t, cond=None, key=None):
        shift = jnp.einsum("k,kabdc->abdc", params, bumps)[x[:, 0], x[:, 1]]
        if "ratio" in name:  # of the other site alone
            other = jnp.stack([bumps[:, :, 0, 0][:, x[:, 1]], bumps[:, 0, :, 1][:, x[:, 0]]], 2)
            shift = jnp.einsum("k,kbdc->bdc", params, other)
        return exact(x, t) + shift

    loss = getattr(methods, name.split(",")[0])(net, path=path).loss
    n = 30_000

    @jax.jit
    def gradients(params):
        batch, keys = Batch(table.sample(jax.random.key(1), n)), as_keys(KEY, n)
        each = lambda p: loss(p, None, batch, keys)[1]["per_example"]
        g = jax.jacfwd(each)(params)
        return g.mean(0), g.std(0) / n**0.5

    mean, error = gradients(jnp.zeros(4))
    assert (np.abs(mean) < 4.5 * error).all(), mean / error
    for i in range(4):
        mean, error = gradients(0.5 * jnp.eye(4)[i])
        assert mean[i] > 10 * error[i]


def test_the_bound_of_exact_probabilities_is_the_entropy(x64):
    """With masks the chain rule holds in every order; wrong probabilities are above by their divergence."""
    path, table = setting("mask")
    n = 5000
    x1 = table.sample(jax.random.key(1), n)
    nats = np.asarray(sampling.token_bound(table.log_probs, path, KEY, x1))
    entropy = -np.sum(DATA * np.log(DATA))
    assert abs(nats.mean() - entropy) < 4.5 * nats.std() / n**0.5 < 0.1
    even = lambda x, t, cond=None: jnp.full((*x.shape, K), -jnp.log(K))
    np.testing.assert_allclose(sampling.token_bound(even, path, KEY, x1), D * np.log(K), rtol=1e-12)
    with pytest.raises(ValueError, match="^source='uniform'"):
        sampling.token_bound(even, setting("uniform")[0], KEY, x1)


@pytest.mark.slow
def test_the_weighted_loss_is_the_bound(x64):
    """Of exact probabilities: its mean over times is the entropy, by a fine rule over the time."""
    path, table = setting("mask")
    net = lambda params, x, s, t, cond=None, key=None: table.log_probs(x, t)
    n = 30_000
    inside = lambda key: jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float64, 0.0, 0.98))(key)
    loss = methods.discrete_flow_matching(net, path=path, weight="bound", time=inside).loss
    value, aux = loss(None, None, Batch(table.sample(jax.random.key(1), n)), as_keys(KEY, n))
    # D times the part of the integral below t = 0.98: k = t^2 there, by the chain rule exactly
    k = 0.98**2
    marginal = sum(-np.sum(p * np.log(p)) for p in (DATA.sum(0), DATA.sum(1)))
    entropy = -np.sum(DATA * np.log(DATA))
    # both masked: weight (1 - k), one masked: weight k, of marginal and of conditional entropies
    expected = marginal * (k - k**2 / 2) + (2 * entropy - marginal) * k**2 / 2
    error = aux["per_example"].std() / n**0.5
    assert abs(0.98 * D * value - expected) < 4.5 * D * error < 0.1


@pytest.mark.parametrize("hollow", [False, True])
def test_a_hollow_network_does_not_see_the_site_that_it_predicts(hollow):
    model = nets.from_linen(nets.TokenNet(tokens=K, width=16, depth=2, heads=2, hollow=hollow))
    x = jax.random.randint(KEY, (3, 5), 0, K)
    params = model.init(KEY, x)
    params["output"]["kernel"] = jax.random.normal(KEY, (16, K))  # it starts at zero
    logits = lambda x: np.asarray(model.net(params, x, 0.5, 0.5))
    changed = np.abs(logits(x.at[:, 2].set((x[:, 2] + 1) % K)) - logits(x)).max((0, 2))
    assert (changed[[0, 1, 3, 4]] > 1e-6).all()
    assert (changed[2] == 0) == hollow


def test_integers_where_floats_belong_and_the_reverse_are_refused():
    path, table = setting("mask")
    step = sampling.tau_leaping(sampling.flow_rates(table.log_probs, path), path)
    with pytest.raises(TypeError, match="^x0=float32"):
        sampling.sample(step, jnp.zeros((2, D)), 4, key=KEY)
    with pytest.raises(TypeError, match="^x0=int32"):
        sampling.sample(sampling.euler(lambda x, t, cond=None: x), jnp.zeros((2, D), jnp.int32), 4)
    with pytest.raises(ValueError, match="^ts=1 .. 0"):
        sampling.sample(step, jnp.zeros((2, D), jnp.int32), [1.0, 0.0], key=KEY)
    with pytest.raises(ValueError, match="^weight='bound'"):
        methods.discrete_flow_matching(lambda *a: 0, path=setting("uniform")[0], weight="bound")
    with pytest.raises(ValueError, match="^source='mask'"):
        methods.categorical_ratio_matching(lambda *a: 0, path=path)
    with pytest.raises(ValueError, match="^net="):
        methods.discrete_flow_matching(lambda p, x, s, t, cond=None, key=None: jnp.zeros((4, 3)), path=path).loss(
            None, None, Batch(jnp.zeros((4, D), jnp.int32)), KEY
        )


@pytest.mark.parametrize(
    ("net", "method", "field"),
    [
        ("token_net", "flow_matching", "net="),
        ("temporal_net", "flow_matching", "net="),
        ("mlp", "discrete_flow_matching", "method="),
    ],
)
def test_a_config_refuses_tokens_before_any_work(net, method, field):
    """Configs know floating data alone."""
    c = base.get_config()
    c.data, c.net, c.method = {"name": "two_moons"}, {"name": net, "width": 8}, method
    read = settings.read(base.finish(c))
    with pytest.raises(ValueError, match=f"^{field}") as error:
        assemble.flow_plan(read, build.data(read.common.data))
    assert len(str(error.value)) <= 300
