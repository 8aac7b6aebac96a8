"""Programs for TPUs and GPUs, lowered on a machine without them: training steps, samplers, the marginal solve."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import discover
from test_methods import KEYS, LEFT_OUT, mlp_params, setting
from test_sampling_steps import VARIANTS, X, made

from fmjax import correction, methods, nets, oracles, sampling, training
from fmjax.correction import trajectories
from fmjax.experiments import spending
from fmjax.training import sharding
from fmjax.types import Batch
from launch.bench import compiled

PLATFORMS = ("tpu", "cuda")
ORACLE = oracles.gaussian(0.3, 0.5)


def exported(function, *args):
    """The text of one program for all platforms."""
    program = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*args)
    assert program.platforms == PLATFORMS
    return program.mlir_module()


@pytest.mark.parametrize("name", [name for name in discover() if name not in LEFT_OUT])
def test_the_training_step_of_every_method_lowers(name):
    method, _, batch, _ = setting(name)
    mesh, tx = sharding.make_mesh(jax.devices()[:2]), optax.adam(1e-3)
    step = training.make_step(method.loss, tx, mesh=mesh, target="frozen", fsdp=True)
    shapes = jax.eval_shape(mlp_params)
    state = training.init(shapes, tx, mesh=mesh, fsdp=True)
    for platform in PLATFORMS:
        text = step.lower(state, batch, KEYS, shapes, platform=platform).as_text()
        assert "mhlo.num_partitions = 2" in text and "all_reduce" in text


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "from_diffrax"])
def test_every_sampler_lowers(name):
    clamp = correction.langevin(correction.score_of(ORACLE.velocity), step=0.01, steps=1)
    grid = np.linspace(0, 0.9, 4)
    draw = lambda x, key: sampling.sample(made(name), x, grid, key=key, corrector=clamp, at=(2,))
    text = exported(draw, jnp.asarray(X, jnp.float32), jax.random.key(0))
    assert text.count("stablehlo.while") >= 1, "the grid is one loop, not a copy of the step for each time"


@pytest.mark.parametrize("solver", ["Tsit5", "flow_map"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_solve_of_the_marginals_lowers(solver, direction):
    bound = sampling.euler(ORACLE.velocity) if solver == "flow_map" else ORACLE.velocity
    solve = lambda x: trajectories.carry(
        bound,
        x,
        np.linspace(0, 1, 4, dtype=np.float32),
        None,
        direction=direction,
        solver=solver,
        backward_map="reverse",
    )[0]
    assert "stablehlo.while" in exported(solve, jnp.asarray(X, jnp.float32))


@pytest.mark.parametrize("fsdp", [False, True])
def test_collectives_are_counted_in_the_compiled_program(fsdp):
    """Two devices: gradients are summed whole, or parameters are gathered and gradients scattered."""
    net = lambda params, x, s, t, cond=None, key=None: x @ params["w"]
    mesh, tx, size = sharding.make_mesh(jax.devices()[:2]), optax.sgd(0.1), 256 * 256 * 4 / 2**20
    state = training.init({"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}, tx, mesh=mesh, fsdp=fsdp)
    step = training.make_step(methods.flow_matching(net).loss, tx, mesh=mesh, fsdp=fsdp)
    batch = Batch(jax.ShapeDtypeStruct((8, 256), jnp.float32))
    found = compiled.collectives(step.lower(state, batch, jax.random.key(0)).compile().as_text())
    if fsdp:
        assert found["all-gather"] == (1, size) and found["reduce-scatter"][1] == pytest.approx(size / 2, rel=1e-3)
    assert found["all-reduce"][1] == pytest.approx(0 if fsdp else size, abs=1e-3)


@pytest.mark.parametrize(
    "module",
    [
        nets.UNet(channels=64, multipliers=(1, 2), blocks=1, attention=(16,), dtype=jnp.bfloat16),
        nets.DiT(width=384, depth=2, heads=6, patch=2, dtype=jnp.bfloat16),
    ],
    ids=["unet", "dit"],
)
def test_a_network_in_bfloat16_multiplies_in_it(module):
    """Of the operations of a loss and its gradient; the rest are logits of attention and embeddings, in float32."""
    model = nets.from_linen(module)
    x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    loss = lambda params, x, key: methods.flow_matching(model.net).loss(params, params, Batch(x), key)[0]
    every = list(spending.products(jax.make_jaxpr(jax.grad(loss))(params, x, jax.random.key(0)).jaxpr))
    total = sum(n for _, n in every)
    assert sum(n for kind, n in every if kind == jnp.bfloat16) > 0.9 * total > 1e9
