"""The robust classifier on linear logits, its directions on known ones, and what its step does to distributions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from fmjax import oracles, training
from fmjax.correction import correctors
from fmjax.experiments import assemble, build, settings
from fmjax.keys import as_keys
from fmjax.methods import attacks
from fmjax.methods.classifier_corrector import classifier_corrector
from fmjax.nets.adapters import from_linen
from fmjax.nets.mlp import MLP
from fmjax.training import sharding
from fmjax.types import Batch

N = 64


def linear(params, x, s, t, cond=None, key=None):
    return x @ params["w"] + params["b"] * s + params["c"]


@pytest.fixture
def setting(key, x64):
    """Pairs of a linear logit's two sides, some on the wrong one, and its parameters."""
    params = {"w": jnp.array([0.8, -1.1]), "b": jnp.array(0.4), "c": jnp.array(-0.1)}
    k_q, k_p = jax.random.split(key)
    push = 1.2 * params["w"]
    x1, x0 = push + jax.random.normal(k_q, (N, 2)), -push + jax.random.normal(k_p, (N, 2))
    batch = Batch(x1, x0=x0, t=(jnp.arange(N) % 5) / 4.0)
    return params, batch, as_keys(jax.random.key(1), N)


def balanced(params, batch, eps=0.0, step=np.inf):
    """The loss of a pair by hand: margins that are positive fall by ``eps |w|``, others are left alone."""
    total = 0
    for x, y in ((batch.x1, 1), (batch.x0, -1)):
        m = y * linear(params, x, batch.t, batch.t)
        m = m - jnp.where(m > 0, jnp.minimum(eps, step) * jnp.linalg.norm(params["w"]), 0)
        total += jax.nn.softplus(-m) / 2
    return total


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_the_robust_loss_of_a_linear_logit_is_the_closed_form(eps, setting):
    """One step reaches the sphere, and an attack that succeeds has stopped there: all attacked margins fall alike."""
    params, batch, keys = setting
    loss = classifier_corrector(linear, eps=eps, steps=1).loss
    (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(params, params, batch, keys)
    expected, grad_want = jax.value_and_grad(lambda p: balanced(p, batch, eps).mean())(params)
    np.testing.assert_allclose(aux["per_example"], balanced(params, batch, eps), rtol=1e-12)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for name in params:
        np.testing.assert_allclose(grad[name], grad_want[name], rtol=1e-10, atol=1e-12)
    right = 0
    for x, y in ((batch.x1, 1), (batch.x0, -1)):
        right = right + np.asarray(y * linear(params, x, batch.t, batch.t) > eps * jnp.linalg.norm(params["w"]))
    np.testing.assert_array_equal(aux["accuracy"], right / 2)
    assert 0.5 < right.mean() / 2 < 1


def test_a_gradient_penalty_is_averaged_over_both_halves(setting):
    """By hand for a curved logit: ``(softplus + lam |grad f|^2) / 2`` of either side, and the gradient of that."""
    _, batch, keys = setting
    curved = lambda p, x, s, t, cond=None, key=None: 0.5 * p["a"] * (x**2).sum(1) + x[:, 0] * p["b"] * t
    params, lam = {"a": jnp.array(0.4), "b": jnp.array(-0.3)}, 0.7

    def by_hand(params):
        total = 0
        for x, y in ((batch.x1, 1), (batch.x0, -1)):
            slope = params["a"] * x + params["b"] * batch.t[:, None] * jnp.array([1.0, 0.0])
            total += jax.nn.softplus(-y * curved(params, x, batch.t, batch.t)) / 2 + lam * (slope**2).sum(1) / 2
        return total

    loss = classifier_corrector(curved, gradient_penalty=lam).loss
    (_, aux), grad = jax.value_and_grad(loss, has_aux=True)(params, params, batch, keys)
    np.testing.assert_allclose(aux["per_example"], by_hand(params), rtol=1e-12)
    expected = jax.grad(lambda p: by_hand(p).mean())(params)
    for name in params:
        np.testing.assert_allclose(grad[name], expected[name], rtol=1e-10)
    for options in ({"gradient_penalty": -1.0}, {"gradient_penalty": 1.0, "eps": 0.5}):
        with pytest.raises(ValueError, match="^gradient_penalty="):
            classifier_corrector(curved, **options)


def test_steps_stop_once_an_example_is_misclassified(setting):
    """Many short steps take a small margin just below zero, a large one down by ``eps |w|``."""
    params, batch, keys = setting
    eps, steps = 0.5, 50
    per = classifier_corrector(linear, eps=eps, steps=steps).loss(params, params, batch, keys)[1]["per_example"]
    norm, length = float(jnp.linalg.norm(params["w"])), 2.5 * eps / steps
    expected = 0
    for x, y in ((batch.x1, 1), (batch.x0, -1)):
        m = np.asarray(y * linear(params, x, batch.t, batch.t))
        taken = np.where(m <= 0, 0, np.minimum(np.ceil(m / (length * norm)) * length, eps))
        expected = expected + np.logaddexp(0, -(m - taken * norm)) / 2
    np.testing.assert_allclose(per, expected, rtol=1e-10)
    assert (
        per < classifier_corrector(linear, eps=eps, steps=1).loss(params, params, batch, keys)[1]["per_example"]
    ).any()


def test_the_gradient_takes_the_attack_as_given(x64, key):
    """Of a curved logit, whose attack turns with the parameters: the gradient is that at fixed perturbations."""
    logit = lambda p, x, s, t, cond=None, key=None: jnp.sin(2 * x @ p) + x[:, 0] * x[:, 1]
    k_1, k_0 = jax.random.split(key)
    x1, x0 = jax.random.normal(k_1, (N, 2), jnp.float64), jax.random.normal(k_0, (N, 2), jnp.float64)
    batch, p = Batch(x1, x0=x0, t=jnp.zeros(N)), jnp.array([0.7, -0.4])
    options = {"eps": 0.5, "steps": 2, "step": 0.15}
    loss = lambda p: classifier_corrector(logit, **options).loss(p, p, batch, as_keys(key, N))[0]

    def at(p, fixed):
        total = 0
        for x, y in ((x1, 1), (x0, -1)):
            d = attacks.pgd(lambda x, y=y: y * logit(fixed, x, 0, 0), x, **options)
            total += jax.nn.softplus(-y * logit(p, x + d, 0, 0)).mean() / 2
        return total

    actual, h = jax.grad(loss)(p), 1e-5
    difference = lambda f: np.array([(f(p + h * e) - f(p - h * e)) / (2 * h) for e in jnp.eye(2)])
    np.testing.assert_allclose(actual, difference(lambda q: at(q, p)), rtol=1e-6)
    assert np.abs(actual - difference(loss)).max() > 1e-3 * np.abs(actual).max(), (
        "the attack does not turn in this test"
    )


@pytest.mark.parametrize("norm", attacks.NORMS)
def test_a_random_start_draws_from_the_keys_and_no_start_does_not(norm, setting):
    params, batch, keys = setting
    each = lambda keys, **o: classifier_corrector(linear, steps=1, step=0.1, norm=norm, **o).loss(
        params, params, batch, keys
    )[1]["per_example"]
    others = as_keys(jax.random.key(2), N)
    assert (each(keys) == each(others)).all()
    drawn = each(keys, random_start=True)
    assert (drawn != each(others, random_start=True)).all() and (drawn == each(keys, random_start=True)).all()


def test_dropout_acts_on_the_loss_and_not_on_the_attack(setting):
    params, batch, keys = setting
    seen = []

    def net(params, x, s, t, cond=None, key=None):
        seen.append(None if key is None else jax.random.key_data(key))
        return linear(params, x, s, t)

    classifier_corrector(net).loss(params, params, batch, keys)
    attacked, history = seen
    assert attacked is None and len(np.unique(history, axis=0)) == 2 * N


def known(params, x, s, t, cond=None, key=None):
    return jnp.sin(x[:, 0]) * x[:, 1] + s


def test_directions_are_the_gradients_of_the_logit_as_named(x64, key):
    x, t = jax.random.normal(key, (6, 2), jnp.float64), jnp.linspace(0, 1, 6)
    g = np.stack([np.cos(x[:, 0]) * x[:, 1], np.sin(x[:, 0])], 1)
    length = np.linalg.norm(g, axis=1, keepdims=True)
    p = special.expit(np.asarray(known(None, x, t, t)))[:, None]
    at = lambda **options: classifier_corrector(known, **options).direction(None)(x, t)
    np.testing.assert_allclose(at(), g, rtol=1e-10)
    np.testing.assert_allclose(at(direction="logprob"), (1 - p) * g, rtol=1e-10)
    np.testing.assert_allclose(at(direction="normalised"), g / length, rtol=1e-8)
    bound = float(np.median(length))
    np.testing.assert_allclose(at(clip=bound), g * np.minimum(1, bound / length), rtol=1e-10)
    probability = lambda x: jnp.log(jax.nn.sigmoid(known(None, x, t, t))).sum()
    np.testing.assert_allclose(at(direction="logprob"), jax.grad(probability)(x), rtol=1e-10)


def laws():
    p = oracles.mixture(jnp.array([[1.0, 0.0], [-1.0, 0.5]]), jnp.array([0.7, 0.5]), jnp.array([0.4, 0.6]))
    q = oracles.mixture(jnp.array([[0.8, 0.2], [-1.2, 0.3]]), jnp.array([0.5, 0.6]), jnp.array([0.5, 0.5]))
    return p, q


def exact(p, q):
    """The method at the optimum: the logit is ``log q - log p``, its params ignored."""
    logit = lambda params, x, s, t, cond=None, key=None: q.log_density(x, s) - p.log_density(x, s)
    return classifier_corrector(logit, eps=0.0)


def test_the_step_is_the_identity_where_both_marginals_are_one(key):
    p, _ = laws()
    x, t = p.sample(key, 100), jnp.linspace(0, 1, 100)
    fix = correctors.marginal_matching(exact(p, p).direction(None), alpha=0.7)
    np.testing.assert_array_equal(jax.jit(fix)(None, x, t)[0], x)


def test_kl_falls_at_first_by_the_relative_fisher_information(x64, key):
    """``d/da KL(T_a p | q) = -E_p |grad log(p / q)|^2`` at 0, ``T_a = x + a h``: KL by the change of variables."""
    p, q = laws()
    n, t = 20_000, 0.6
    z = jax.random.normal(jax.random.key(1), (n, 2))
    x = (1 - t) * z + t * p.sample(key, n)  # of p's marginal at t
    h = jax.jit(exact(p, q).direction(None))

    def kl(a):
        def step(x):
            fix = correctors.marginal_matching(h, alpha=lambda t: a * jnp.ones_like(t))
            return fix(None, x[None], t)[0][0]

        jacobian = jnp.linalg.slogdet(jax.vmap(jax.jacfwd(step))(x))[1]
        return p.log_density(x, t) - jacobian - q.log_density(jax.vmap(step)(x), t)

    start, slope = jax.jit(lambda a: jax.jvp(kl, (a,), (1.0,)))(0.0)
    fisher = jnp.square(h(x, t)).sum(1)
    gap = np.asarray(slope + fisher)
    assert abs(gap.mean()) < 3 * gap.std() / n**0.5
    assert slope.mean() < -0.1 and start.mean() > 0


@pytest.mark.parametrize(("a", "b"), [(1.3, 0.8), (0.6, 0.9)])
def test_a_gaussian_of_any_spread_is_set_right_by_one_step(a, b, x64):
    """``alpha* = a b^2 / (a + b)``, for an over- and an under-dispersed generator (the score step mends only one)."""
    p, q = (oracles.gaussian(0.0, std) for std in (a, b))
    fix = correctors.marginal_matching(exact(p, q).direction(None), alpha=a * b**2 / (a + b))
    x = jnp.linspace(-2, 2, 5)[:, None]
    np.testing.assert_allclose(fix(None, x, 1.0)[0], x * b / a, rtol=1e-12)


def test_an_attacked_loss_does_not_depend_on_the_devices(key):
    model = from_linen(MLP(width=8, depth=0, logit=True))
    x1, x0 = jax.random.normal(key, (16, 2)), 1.5 * jax.random.normal(jax.random.key(3), (16, 2))
    params = jax.tree.map(lambda a: a + 0.3 * jnp.sin(jnp.arange(a.size)).reshape(a.shape), model.init(key, x1))
    loss = classifier_corrector(model.net, random_start=True, steps=3).loss
    history = []
    for count in (1, 2):
        mesh, tx = sharding.make_mesh(jax.devices()[:count]), optax.sgd(0.1)
        step = training.make_step(loss, tx, mesh=mesh)
        state, metrics = step(training.init(params, tx, mesh=mesh), Batch(x1, x0=x0, t=jnp.full(16, 0.5)), key)
        history.append((metrics["loss"], metrics["accuracy"], metrics["grad_norm"], *jax.tree.leaves(state.params)))
    for first, second in zip(*history, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def test_a_batch_without_pairs_and_a_net_that_is_no_logit_are_refused(setting):
    params, batch, keys = setting
    loss = functools.partial(classifier_corrector(linear).loss, params, params)
    for name in ("x0", "t"):
        with pytest.raises(ValueError, match=f"batch.{name}=None"):
            loss(batch._replace(**{name: None}), keys)
    method = classifier_corrector(lambda params, x, s, t, cond=None, key=None: x)
    for evaluate in (lambda: method.loss(params, params, batch, keys), lambda: method.direction(None)(batch.x1, 0.5)):
        with pytest.raises(ValueError, match=r"net: gives \(\d+, 2\) for x \(\d+, 2\).*logit=True"):
            evaluate()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eps": -1.0}, "eps=-1.0"),
        ({"steps": 0}, "steps=0"),
        ({"norm": "l3"}, "norm='l3'.*l2.*linf"),
        ({"direction": "logits"}, "direction='logits'.*'logit'"),
        ({"clip": 0.0}, "clip=0.0"),
    ],
)
def test_bad_options_are_refused_when_the_method_is_made(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build.method({"name": "classifier_corrector", **options}, linear)


def test_a_config_builds_it_over_a_net_of_a_logit_and_refuses_other_pairs():
    digits = pytest.importorskip("configs.digits")
    cfg = digits.get_config()
    with cfg.unlocked(), cfg.ignore_type():
        cfg.correctors.classifier.method = {
            "name": "classifier_corrector",
            "eps": 0.5,
            "direction": "logprob",
            "clip": 1.0,
        }
        cfg.correctors.classifier.net = {"name": "encoder", "channels": 8, "multipliers": (1, 2), "heads": 2}
        cfg.correctors.classifier.batch_size = 16
    x, data = np.zeros((16, 8, 8, 1), np.float32), build.data("digits")
    corrector = lambda batch: assemble.corrector_plan(settings.read(cfg), "classifier", data, batch=batch)
    pairs = lambda step: Batch(x, x0=x, t=np.zeros(16, np.float32))
    assert corrector(pairs).model.net.logit
    with pytest.raises(ValueError, match="batch.x0=None"):
        corrector(lambda step: pairs(step)._replace(x0=None))
    with cfg.unlocked(), cfg.ignore_type():
        cfg.correctors.classifier.net = {"name": "mlp", "width": 8}
    with pytest.raises(ValueError, match=r"net: gives \(4, 8, 8, 1\)"):
        corrector(pairs)  # two rows of both classes a device
    with cfg.unlocked(), cfg.ignore_type():
        cfg.net, cfg.coupling = {"name": "mlp", "logit": True}, "independent"
    for name in ("flow_matching", "lagrangian", "residual"):
        with cfg.unlocked(), cfg.ignore_type():
            cfg.method = name
        with pytest.raises(ValueError, match=f"method=.*{name}.*logit=False"):
            assemble.flow_plan(settings.read(cfg), data)
