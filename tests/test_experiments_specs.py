"""Names, options and flags: good ones become the objects, bad ones one sentence; the optimiser against its formula."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import discover

from fmjax import couplings, paths, times
from fmjax.experiments import specs
from fmjax.sampling import solvers
from fmjax.types import Method

ml_collections = pytest.importorskip("ml_collections")


ALL_PATHS = "linear, schroedinger_bridge, sub_vp, target_conditional, trigonometric, two_sided, ve, vp"


def net(params, x, s, t, cond=None, key=None):
    return params * x


def test_names_resolve_by_module_path():
    from fmjax.methods.lagrangian import lagrangian
    from fmjax.nets.mlp import MLP
    from fmjax.nets.unet import UNet

    assert specs.resolve("methods", "lagrangian") is lagrangian
    assert specs.resolve("nets", "mlp") is MLP and specs.resolve("nets", "unet") is UNet
    assert specs.resolve("paths", "trigonometric") is paths.trigonometric
    assert specs.step("rk38") is solvers.rk38


METHODS = ", ".join(discover()[:3])
STEPS = "ddim, dpmpp_2m, edm_heun, euler, euler_maruyama, from_diffrax, heun, initial_noise, ipndm"


@pytest.mark.parametrize(
    ("door", "spec", "near", "all_"),
    [
        (
            lambda s: specs.method(s, net),
            "langrangian",
            "lagrangian",
            METHODS,
        ),
        (lambda s: specs.method(s, net), "common", None, METHODS),
        (specs.net, "unett", "unet", "dit, encoder, mlp, plain, song_unet, unet"),
        (specs.net, "adapters", None, "dit, encoder, mlp, plain, song_unet, unet"),
        (specs.path, "trig", "trigonometric", ALL_PATHS),
        (specs.path, "endpoints", None, ALL_PATHS),
        (specs.coupling, "minibatch", "minibatch_ot", "independent, minibatch_ot, semidiscrete"),
        (specs.coupling, "squared_cost", None, "independent, minibatch_ot, semidiscrete"),
        (specs.step, "rk5", "rk4", STEPS),
        (specs.step, "inverse", None, STEPS),
        (specs.step, "denoiser", None, STEPS),
    ],
)
def test_unknown_names_and_helpers_are_refused_with_what_there_is(door, spec, near, all_):
    with pytest.raises(ValueError, match=f"has no '{spec}'") as caught:
        door(spec)
    assert f"there are {all_}" in str(caught.value)
    assert ("did you mean" in str(caught.value)) == (near is not None)
    assert near is None or f"did you mean '{near}'?" in str(caught.value)


@pytest.mark.parametrize("spec", [{"width": 3}, {"name": 3}, 3, None])
def test_a_spec_without_a_name(spec):
    with pytest.raises(ValueError, match="a name or a mapping with a 'name', got"):
        specs.from_spec("nets", spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 3}, r"nets.mlp has no option 'widht'; did you mean 'width'\? \(it takes width, depth, classes"),
        ({"parent": None}, "has no option 'parent'"),
        ({"width": "3"}, "width of nets.mlp must be int, got '3'"),
        ({"width": True}, "width of nets.mlp must be int, got True"),
        ({"width": 3.0}, "width of nets.mlp must be int, got 3.0"),
        ({"dropout": "a"}, "dropout of nets.mlp must be float, got 'a'"),
        ({"dtype": 16}, "dtype of nets.mlp must be str, got 16"),
    ],
)
def test_options_of_a_network_are_checked_by_name_and_type(options, message):
    with pytest.raises(ValueError, match=message):
        specs.net({"name": "mlp", **options})


@pytest.mark.parametrize("name", ["dit", "encoder", "mlp", "plain", "song_unet", "unet"])
def test_what_a_network_is_dressed_in_is_no_option_of_its_own(name):
    module = specs.resolve("nets", name)
    assert not {"preconditioning", "noise_encoder"} & {field.name for field in dataclasses.fields(module)}


def test_the_encoder_of_a_song_unet_is_its_own(key):
    model = specs.net({"name": "song_unet", "channels": 8, "multipliers": [1, 2], "encoder": "residual", "blocks": 1})
    assert not hasattr(model.net, "encoder")
    assert any("residual" in name for name in jax.eval_shape(model.init, key, jnp.ones((2, 8, 8, 1))))


def test_entries_of_a_sequence_are_checked():
    with pytest.raises(ValueError, match="an entry of multipliers of nets.unet must be int, got 1.5"):
        specs.net({"name": "unet", "multipliers": [1, 1.5]})
    with pytest.raises(ValueError, match="multipliers of nets.unet must be .*Sequence.*, got 2"):
        specs.net({"name": "unet", "multipliers": 2})


def test_a_network_from_a_config_is_the_network_with_those_options(key):
    config = ml_collections.ConfigDict({"name": "unet", "channels": 8, "multipliers": [1, 2], "heads": 2, "dropout": 0})
    model = specs.net(config.lock())
    x = jnp.ones((2, 8, 8, 1))
    params = jax.eval_shape(model.init, key, x)
    assert params["input"]["kernel"].shape == (3, 3, 1, 8) and params["down_1"]["kernel"].shape[-1] == 8
    assert params["output"]["kernel"].shape == (3, 3, 8, 1) and "down_2" not in params


def test_a_path_reaches_the_methods_that_take_one(key):
    from fmjax import types
    from fmjax.keys import as_keys

    path = specs.path("trigonometric")
    x1 = jax.random.normal(key, (4, 3))
    batch = types.Batch(x1, x0=jnp.zeros_like(x1))
    keys = as_keys(key, 4)
    built = specs.method("flow_matching", net, path=path)
    assert isinstance(built, Method)
    _, aux = built.loss(jnp.float32(0.0), None, batch, keys)
    _, u = paths.with_velocity(path, batch.x0, x1, aux["t"])
    np.testing.assert_allclose(aux["per_example"], jnp.mean(u**2, 1), rtol=1e-6)
    score = specs.method({"name": "score_corrector", "sigma": 1}, net, path=path)
    np.testing.assert_allclose(score.direction(2.0)(x1, 0.5), -2.0 * x1, rtol=1e-6)
    with pytest.raises(ValueError, match="is given 'path' from a field of its own"):
        specs.method({"name": "flow_matching", "path": "linear"}, net, path=path)
    with pytest.raises(ValueError, match="path of methods.flow_matching must be Path, got 'linear'"):
        specs.method({"name": "flow_matching", "path": "linear"}, net)


def test_missing_options_and_a_factorys_own_refusal():
    with pytest.raises(ValueError, match="methods.score_corrector needs 'sigma'"):
        specs.method("score_corrector", net)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        specs.method({"name": "score_corrector", "sigma": 0}, net)


def test_a_law_of_times_is_named_with_its_own_options(key):
    from fmjax import types
    from fmjax.keys import as_keys

    pair = specs.check_options(specs.resolve("methods", "mean_flow"), {"pair": "two_times"})["pair"]
    assert pair is times.two_times  # where the default is a functools.partial
    spec = {"name": "flow_matching", "time": {"name": "logit_normal", "mean": 3}}
    keys = as_keys(key, 512)
    law = specs.check_options(specs.resolve("methods", "flow_matching"), {"time": spec["time"]})["time"]
    np.testing.assert_array_equal(law(keys), times.logit_normal(keys, mean=3.0))
    _, aux = specs.method(spec, net).loss(jnp.float32(0.0), None, types.Batch(jnp.ones((512, 2))), keys)
    # the median of sigmoid(3 + z) is sigmoid(3); the median's standard error is 1.25 / sqrt(512) in logits
    median = float(jnp.median(jax.scipy.special.logit(aux["t"])))
    assert abs(median - 3.0) < 4 * 1.25 / np.sqrt(512)
    for time, message in [
        (
            "ordered_pair",
            r"no 'ordered_pair' \(there are earlier, interior, logit_normal, noise_angle, noise_level, u_shaped",
        ),
        ("logit", "did you mean 'logit_normal'"),
        ({"name": "logit_normal", "men": 1.0}, "times.logit_normal has no option 'men'; did you mean 'mean'"),
    ]:
        with pytest.raises(ValueError, match=message):
            specs.method({"name": "flow_matching", "time": time}, net)


def test_a_law_that_follows_the_progress_is_named_as_others_are_and_gets_it(key):
    from fmjax import types
    from fmjax.keys import as_keys

    grid = {"name": "grid_pair", "steps": 8, "rounds": 4}
    share = {"name": "sigmoid_fraction", "rate": 10}
    batch = types.Batch(jnp.ones((4, 2)), progress=jnp.array([0.0, 0.3, 0.6, 0.9]))
    for spec in ({"name": "progressive", "pair": grid}, {"name": "alpha_flow", "pair": grid, "fraction": share}):
        method = specs.method({**spec, "diagonal": 0.0}, net)
        _, aux = method.loss(jnp.float32(1.0), jnp.float32(1.0), batch, as_keys(key, 4))
        np.testing.assert_allclose(aux["t"] - aux["s"], [1 / 8, 1 / 4, 1 / 2, 1], rtol=1e-6)
    with pytest.raises(ValueError, match="fmjax.times has no 'ordered_pair' .*constant_fraction, ect_fraction"):
        specs.method({"name": "alpha_flow", "fraction": "ordered_pair"}, net)


def test_couplings_and_steps_take_their_options(key):
    x0, x1 = np.random.default_rng(0).normal(size=(2, 16, 2)).astype(np.float32)
    couple = specs.coupling({"name": "minibatch_ot", "replacement": False})
    want = couplings.minibatch_ot()(np.random.default_rng(0), x0, x1, None)
    got = couple(np.random.default_rng(0), x0, x1, None)
    np.testing.assert_array_equal(got[0], want[0])
    with pytest.raises(ValueError, match="replacement of couplings.minibatch_ot must be bool, got 'no'"):
        specs.coupling({"name": "minibatch_ot", "replacement": "no"})
    step = specs.step({"name": "from_diffrax", "solver": "Dopri5", "rtol": 1e-6, "atol": 1e-6})
    x = jax.random.normal(key, (3, 2))
    y = step(lambda x, t, cond=None: -x)(x, 0.0, 1.0)
    np.testing.assert_allclose(y, x * np.exp(-1), rtol=2e-5)


def test_every_default_is_an_option_the_checks_let_through():
    doors = [("methods", ("net",)), ("nets", None), ("paths", ()), ("couplings", ())]
    doors += [("solvers", ("velocity",)), ("diffusion", ("velocity",))]
    seen = 0
    for package, takes in doors:
        for function in specs._offered(package, None, takes, None).values():
            defaults = {k: v for k, v in specs._options(function).items() if v is not inspect.Parameter.empty}
            assert specs.check_options(function, defaults | _required(function)) == defaults | _required(function)
            seen += len(defaults)
    assert seen > 20


def _required(function):
    return {k: 1.0 for k, v in specs._options(function).items() if v is inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": -1e-3}, "learning_rate=-0.001 must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be positive"),
        ({"learning_rate": float("inf")}, "must be finite"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"warmup": -1}, "warmup=-1 cannot be negative"),
        ({"schedule": "cosin"}, "schedule='cosin' must be one of constant, cosine; did you mean 'cosine'"),
        ({"clip": 0.0}, "clip=0.0 must be positive, or None"),
        ({"beta2": 1.0}, "beta2=1.0 must lie strictly between 0 and 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 cannot be negative"),
    ],
)
def test_an_optimiser_refuses_nonsense_by_name(changed, message):
    with pytest.raises(ValueError, match=message):
        specs.optimiser(**{"learning_rate": 1e-3, "steps": 10, **changed})


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
    tx = specs.optimiser(
        learning_rate=peak, steps=steps, warmup=warmup, schedule=schedule, clip=clip, beta2=0.99, weight_decay=decay
    )
    want = by_hand(params, gradients, rates, b2=0.99, clip=clip or np.inf, decay=decay)
    got = run(tx, params, gradients)
    for k in want:
        np.testing.assert_allclose(got[k], want[k], atol=5e-6)


def test_the_schedule_holds_at_its_ends():
    rate = lambda n, **kw: float(specs.learning_rate_at(n, **({"peak": 2.0, "steps": 10, "warmup": 0} | kw)))
    assert rate(0, schedule="constant") == rate(99, schedule="constant") == 2.0
    assert rate(0, schedule="cosine") == 2.0 and rate(10, schedule="cosine") == rate(50, schedule="cosine") == 0.0
    assert rate(9, warmup=10, schedule="cosine") == 2.0
    assert rate(4, warmup=100, schedule="cosine") == pytest.approx(0.1)  # a smoke run ends in its warm-up
