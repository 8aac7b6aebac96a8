"""Networks, couplings, steps and the optimiser of a config, against what they are made of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fmjax import couplings
from fmjax.experiments import build, specs


@pytest.mark.parametrize("name", sorted(specs.offers(specs.NET)))
def test_what_wraps_a_network_is_no_option_of_the_network(name):
    module = specs.offers(specs.NET)[name]
    assert not {"preconditioning", "noise_encoder"} & {field.name for field in dataclasses.fields(module)}


def test_the_encoder_of_a_song_unet_is_its_option(key):
    model = build.net({"name": "song_unet", "channels": 8, "multipliers": [1, 2], "encoder": "residual", "blocks": 1})
    assert getattr(model.net, "encoder", None) is None
    assert any("residual" in name for name in jax.eval_shape(model.init, key, jnp.ones((2, 8, 8, 1))))


def test_labels_for_a_network_without_labels_are_refused():
    with pytest.raises(ValueError, match="^net='plain'.*10 classes"):
        build.net("plain", classes=10)


def test_a_network_of_logits_needs_a_method_that_classifies():
    model = build.net({"name": "mlp", "logit": True, "width": 4, "depth": 1})
    with pytest.raises(ValueError, match="^method='flow_matching'"):
        build.method("flow_matching", model.net)
    build.method("classifier_corrector", model.net)


def test_couplings_and_steps_take_their_options(key):
    x0, x1 = np.random.default_rng(0).normal(size=(2, 16, 2)).astype(np.float32)
    couple = build.coupling({"name": "minibatch_ot", "replacement": False})
    expected = couplings.minibatch_ot()(np.random.default_rng(0), x0, x1, None)
    result = couple(np.random.default_rng(0), x0, x1, None)
    np.testing.assert_array_equal(result[0], expected[0])
    assert build.coupling("independent") is None
    with pytest.raises(ValueError, match="^coupling.replacement='no'"):
        build.coupling({"name": "minibatch_ot", "replacement": "no"})
    with pytest.raises(ValueError, match="^coupling='minibatch'.*did you mean 'minibatch_ot'.*semidiscrete"):
        build.coupling("minibatch")
    step = build.step({"name": "from_diffrax", "solver": "Dopri5", "rtol": 1e-6, "atol": 1e-6})
    x = jax.random.normal(key, (3, 2))
    y = jax.jit(step(lambda x, t, cond=None: -x))(x, 0.0, 1.0)
    np.testing.assert_allclose(y, x * np.exp(-1), rtol=2e-5)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"learning_rate": float("inf")}, "learning_rate=inf"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 10**11}, "steps=100000000000"),
        ({"warmup": -1}, "warmup=-1"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"beta2": 1.0}, "beta2=1.0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
    ],
)
def test_an_optimiser_refuses_nonsense_by_name(changed, field):
    with pytest.raises(ValueError, match=field):
        build.optimiser(**{"learning_rate": 1e-3, "steps": 10, **changed})


def run(tx, params, gradients):
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(params, gradients, rates, *, b2=0.999, clip=np.inf, decay=0.0, b1=0.9, eps=1e-8):
    """AdamW written out in float64 (arXiv 1711.05101, Algorithm 2), the gradient clipped by its global norm."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(a) for k, a in p.items()} for _ in range(2))
    for n, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g = {k: np.asarray(a, np.float64) for k, a in g.items()}
        norm = np.sqrt(sum((a**2).sum() for a in g.values()))
        for k in sorted(p):
            a = g[k] * min(1.0, clip / norm)
            m[k] = b1 * m[k] + (1 - b1) * a
            v[k] = b2 * v[k] + (1 - b2) * a**2
            push = m[k] / (1 - b1**n) / (np.sqrt(v[k] / (1 - b2**n)) + eps)
            p[k] = p[k] - rate * (push + (decay * p[k] if p[k].ndim > 1 else 0))
    return p


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("clip", "decay"), [(None, 0.0), (0.5, 0.1)])
def test_the_optimiser_is_adamw_written_out(schedule, clip, decay):
    rng = np.random.default_rng(0)
    draw = lambda: {"w": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=2).astype(np.float32)}
    params, gradients = draw(), [draw() for _ in range(8)]
    peak, warmup, steps = 0.1, 3, 8
    ramp = [peak * min(1, (n + 1) / warmup) for n in range(steps)]
    decays = [1 if n < warmup else (1 + np.cos(np.pi * (n - warmup) / (steps - warmup))) / 2 for n in range(steps)]
    rates = [r * d for r, d in zip(ramp, decays, strict=True)] if schedule == "cosine" else ramp
    tx = build.optimiser(
        learning_rate=peak, steps=steps, warmup=warmup, schedule=schedule, clip=clip, beta2=0.99, weight_decay=decay
    )
    expected = by_hand(params, gradients, rates, b2=0.99, clip=clip or np.inf, decay=decay)
    result = run(tx, params, gradients)
    for k in expected:
        np.testing.assert_allclose(result[k], expected[k], atol=5e-6)


def test_the_schedule_holds_at_its_ends():
    rate = lambda n, **kw: float(build.learning_rate_at(n, **({"peak": 2.0, "steps": 10, "warmup": 0} | kw)))
    assert rate(0, schedule="constant") == rate(99, schedule="constant") == 2.0
    assert rate(0, schedule="cosine") == 2.0 and rate(10, schedule="cosine") == rate(50, schedule="cosine") == 0.0
    assert rate(9, warmup=10, schedule="cosine") == 2.0
    assert rate(4, warmup=100, schedule="cosine") == pytest.approx(0.1)  # a smoke run ends in its warm-up
