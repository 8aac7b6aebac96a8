"""Self-corrected distillation against the straight Gaussian flow, its formulas, and the two networks in one step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import MEAN, STD

from fmjax import methods, training
from fmjax.experiments import build
from fmjax.keys import as_keys
from fmjax.methods.common import Teachers
from fmjax.training import loop, sharding
from fmjax.types import Batch, expand

KEY, B = jax.random.key(5), 64
logit = lambda params, x, s, t, cond=None, key=None: (params["critic"] * x).sum(-1)


def batch():
    a, b = jax.random.split(KEY)
    x0 = jax.random.normal(a, (B, 2))
    return Batch(MEAN + STD * jax.random.normal(b, (B, 2)), x0=x0)


def straight(params, x, s, t, cond=None, key=None):
    """The average velocity of the lines from x0 to MEAN + STD x0, with a bump."""
    s = expand(s, x)
    x0 = (x - s * MEAN) / (1 - s + s * STD)
    return MEAN + (STD - 1) * x0 + params["flow"] * jnp.sin(2 * x)


def test_at_the_exact_map_all_terms_but_the_critics_vanish(x64):
    method = methods.self_corrected(straight, critic=logit, adversarial=0.0)
    exact = {"flow": jnp.zeros(2), "critic": jnp.ones(2)}
    wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), batch())
    target = Teachers(exact, exact)
    (_, aux), g = jax.value_and_grad(lambda p: method.loss(p, target, wide, KEY), has_aux=True)(exact)
    for name in ("consistency", "reflow", "bidirectional"):
        assert aux[name].max() < 1e-24, name
    assert np.abs(g["flow"]).max() < 1e-12 and np.abs(g["critic"]).max() > 0.01
    assert aux["critic"].min() > 0 and aux["adversarial"].min() > 0
    away = exact | {"flow": jnp.full(2, 0.1)}
    (_, aux), g = jax.value_and_grad(lambda p: method.loss(p, target, wide, KEY), has_aux=True)(away)
    assert min(aux[name].mean() for name in ("consistency", "reflow", "bidirectional")) > 1e-4 and (g["flow"] > 0).all()


def test_the_terms_are_their_formulas(x64):
    """A linear network, with another teacher and another average, by hand."""
    linear = lambda params, x, s, t, cond=None, key=None: params["flow"] * x
    method = methods.self_corrected(
        linear, critic=logit, steps=8, few=2, adversarial=0.3, reflow=0.5, bidirectional=2.0
    )
    a, frozen, ema, d = 0.4, -0.3, 0.7, jnp.array([0.2, -0.5])
    params = {"flow": jnp.asarray(a), "critic": d}
    target = Teachers({"flow": jnp.asarray(frozen), "critic": d}, {"flow": jnp.asarray(ema), "critic": d})
    data = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), batch())
    value, aux = method.loss(params, target, data, as_keys(KEY, B))
    t, h, z = aux["t"][:, None], 1 / 8, data.x0
    assert 0 <= t.min() and t.max() <= 1 - h
    x = (1 - t) * z + t * data.x1
    mean = lambda e: jnp.mean(e**2, 1)
    later = x * (1 + h * frozen)
    np.testing.assert_allclose(aux["consistency"], mean(x * (1 + (1 - t) * a) - later * (1 + (1 - t - h) * ema)))
    one, few = z * (1 + a), z * (1 + a / 2) ** 2
    np.testing.assert_allclose(aux["bidirectional"], 2 * mean(one - few))
    soft = lambda x: np.log1p(np.exp(x))
    np.testing.assert_allclose(aux["adversarial"], soft(-(one @ d)))
    np.testing.assert_allclose(aux["critic"], soft(-(data.x1 @ d)) + soft(one @ d))
    # on the line from z to its own end x is (1 + r a) z, and F there (1 + r a)(1 + (1 - r) a) z
    ratio = aux["reflow"] / mean(z)
    assert (ratio <= (a**2 / 4) ** 2 * (1 + 1e-12)).all() and ratio.max() > 0.9 * (a**2 / 4) ** 2
    total = (
        aux["consistency"] + 0.3 * aux["adversarial"] + aux["critic"] + 0.5 * aux["reflow"] + 2 * aux["bidirectional"]
    )
    np.testing.assert_allclose(value, total.mean())


def gradients(adversarial):
    method = methods.self_corrected(straight, critic=logit, adversarial=adversarial)
    params = {"flow": jnp.full(2, 0.1), "critic": jnp.array([0.3, -0.2])}
    return jax.grad(lambda p: method.loss(p, Teachers(params, params), batch(), KEY)[0])(params)


def test_each_network_descends_its_own_terms():
    """The adversarial term does not train the critic, and the critic's term does not train the map."""
    none, some = gradients(0.0), gradients(5.0)
    np.testing.assert_allclose(none["critic"], some["critic"], rtol=1e-6)
    assert np.abs(some["flow"] - none["flow"]).max() > 0.01
    fake = jax.grad(lambda d: methods.self_corrected(straight, critic=logit).loss(
        {"flow": jnp.zeros(2), "critic": d}, Teachers(*[{"flow": jnp.zeros(2), "critic": d}] * 2), batch(), KEY)[0]
    )(jnp.zeros(2))  # fmt: skip
    x = batch()
    expected = -jnp.mean(x.x1, 0) / 2 + jnp.mean(MEAN + STD * x.x0, 0) / 2
    np.testing.assert_allclose(fake, expected, atol=1e-5)


def test_a_step_takes_a_frozen_teacher_and_the_average():
    """By ``jax.grad`` with both given by hand, two steps; another target is refused."""
    method, tx, mesh = methods.self_corrected(straight, critic=logit), optax.sgd(0.1), sharding.make_mesh()
    start = {"flow": jnp.full(2, 0.1), "critic": jnp.array([0.3, -0.2])}
    teacher = {"flow": jnp.full(2, -0.2), "critic": jnp.zeros(2)}
    step = training.make_step(method.loss, tx, mesh=mesh, target="both", ema=0.5)
    state = training.init(start, tx, mesh=mesh)
    params, ema = start, start
    for n in range(2):
        keys = as_keys(jax.random.fold_in(KEY, n), B)
        g, _ = jax.grad(method.loss, has_aux=True)(params, Teachers(teacher, ema), batch(), keys)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, g)
        rate = 1 - min(0.5, (1 + n) / (10 + n))
        ema = jax.tree.map(lambda a, p, rate=rate: a + rate * (p - a), ema, params)
        state, metrics = step(state, batch(), KEY, teacher)
    for name in params:
        np.testing.assert_allclose(state.params[name], params[name], rtol=2e-5)
        np.testing.assert_allclose(state.ema[name], ema[name], rtol=2e-5)
    assert {"consistency", "adversarial", "critic", "reflow", "bidirectional"} <= set(metrics)
    with pytest.raises(ValueError, match="^target='both'"):
        step(state, batch(), KEY)
    with pytest.raises(ValueError, match="^target:"):
        method.loss(start, start, batch(), KEY)


def test_a_config_names_the_critic_in_the_network(tmp_path):
    spec = {"name": "mlp", "width": 8, "depth": 1}
    model = build.net({**spec, "critic": spec})
    method = build.method("self_corrected", model.net)
    data = loop.TrainingData(lambda n: batch(), batch_size=B, shape=(2,))
    plan = loop.Plan(
        name="flow_map", model=model, method=method, optimiser=loop.Optimiser(optax.adam(1e-2)), data=data,
        schedule=loop.Schedule(steps=2), target="both",
    )  # fmt: skip
    loop.check_plan(plan)
    teacher = loop.initial_parameters(plan)
    state = loop.train(plan, tmp_path, teacher=teacher)
    assert np.abs(state.params["critic"]["output"]["kernel"]).max() > 0 and int(state.step) == 2
    with pytest.raises(ValueError, match="^critic=None"):
        build.method("self_corrected", build.net(spec).net)
    for options in ({"steps": 1}, {"reflow": -1.0}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}="):
            methods.self_corrected(straight, critic=logit, **options)
