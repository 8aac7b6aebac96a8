# %% [markdown]
# # Blocks, second flows and a critic
#
# Smaller relatives of flow matching: blocks that are fitted one after the other (local flow matching, JKO-iFlow), a
# second flow from samples to data, variance descent, moves that keep the distribution of a flow, and distillation with
# a critic.

# %%
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from fmjax import correction, couplings, data, methods, metrics, nets, oracles, sampling, straightening, training
from fmjax.methods.jko import SIZES
from fmjax.types import Batch


def train(method, params, batch, steps):
    """Train by Adam on batches, functions of the step."""
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(state, batch, key):
        params, opt = state
        grads = jax.grad(lambda p: method.loss(p, p, batch, key)[0])(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    state = (params, tx.init(params))
    for n in range(steps):
        state = step(state, batch(n), jax.random.key(n))
    return state[0]


# %% [markdown]
# ## Local flow matching
#
# Block $k$ learns the flow between the data and the same data after a short time of noising; the data are then pushed
# to its noise side, and the next block starts from its parameters. The last block is free: it ends in noise.

# %%
model = nets.from_linen(nets.MLP(width=64, depth=2))
flow = methods.flow_matching(model.net)
moons = np.asarray(data.draw_two_moons(jax.random.key(1), 8192))
gammas = (0.15, 0.35, 0.7, np.inf)


def fit(k, params, x):
    params = model.init(jax.random.key(k), x[:1]) if params is None else params
    return train(flow, params, straightening.ornstein_uhlenbeck(x, gammas[k], batch_size=256, seed=k), 300)


blocks = straightening.fit_blocks(fit, flow.velocity, moons, count=4, directory=tempfile.mkdtemp(), steps=4)
step = straightening.block_step([sampling.rk4(flow.velocity(params)) for params in blocks])
grid = straightening.segment_grid(straightening.block_bounds(4), (4, 4, 4, 4))
x0, reference = jax.random.normal(jax.random.key(2), (512, 2)), data.draw_two_moons(jax.random.key(3), 512)
states = np.asarray(sampling.sample(step, x0, grid, trajectory=True))
print(f"W2 to data after 4 blocks of 300 steps: {metrics.w2_exact(jnp.asarray(states[-1]), reference):.3f}")
figure, axes = plt.subplots(1, 5, figsize=(10, 2.3), sharex=True, sharey=True)
for i, axis in enumerate(axes):
    axis.scatter(*states[4 * i].T, s=2, color="#1d4ed8")
    axis.set(title="noise" if i == 0 else f"after block {5 - i}", aspect="equal", xticks=[], yticks=[])

# %% [markdown]
# JKO-iFlow minimises the divergence to N(0, I) block by block. On a Gaussian each block is known: the eight published
# sizes take the variance 3 to 1.

# %%
variance = 3.0
for size in SIZES:
    variance *= oracles.jko_scale(variance, size) ** 2
    print(f"{variance:.4f}", end=" ")

# %% [markdown]
# ## A second flow, and correctors that need no training
#
# A flow after too little training; a second flow from its samples to data, paired by optimal transport, started at the
# identity, and used as one Euler step at the end. Then the descent of the variance, and moves that keep the flow's own
# distribution: they cannot repair it, and nothing is lost.

# %%
rng = np.random.default_rng(0)
batch = lambda n: Batch(moons[rng.integers(len(moons), size=256)])
weak = train(flow, model.init(jax.random.key(0), moons[:1]), batch, 150)
velocity = flow.velocity(weak)
draw = jax.jit(lambda x: sampling.sample(sampling.rk4(velocity), x, 8))
samples = np.asarray(draw(jax.random.normal(jax.random.key(4), (8192, 2))))
couple = couplings.minibatch_ot()


def paired(n):
    rows = rng.integers(len(moons), size=(2, 256))
    x0, x1, _ = couple(rng, samples[rows[0]], moons[rows[1]], None)
    return Batch(x1, x0=x0)


second = train(flow, model.init(jax.random.key(5), moons[:1]), paired, 300)
correctors = {
    "none": None,
    "second flow, 1 evaluation": correction.second_flow(sampling.euler(flow.velocity(second))),
    "moves of the flow": correction.flow_mala(velocity, step=0.01, steps=4, solver_steps=6),
}
results = {}
for name, fix in correctors.items():
    at = {} if fix is None else {"corrector": fix, "at": (8,), "key": jax.random.key(6)}
    results[name] = jax.jit(lambda x, at=at: sampling.sample(sampling.rk4(velocity), x, 8, **at))(x0)
descent = correction.variance_descent(velocity, strength=lambda t: 0.02 * (1 - t) ** 3)
results["variance descent"] = jax.jit(
    lambda x: sampling.sample(sampling.rk4(velocity), x, 8, corrector=descent, at=(4, 5, 6, 7), key=jax.random.key(6))
)(x0)
figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), sharex=True, sharey=True)
for axis, (name, y) in zip(axes, results.items()):
    print(f"{name:26s} W2 to data {metrics.w2_exact(y, reference):.3f}")
    axis.scatter(*np.asarray(y).T, s=2, color="#1d4ed8")
    axis.set(title=name, aspect="equal", xticks=[], yticks=[])

# %% [markdown]
# A corrected sampler has marginals, too: `correction.corrected_step` is a step with the corrections built in, and
# `build_marginals(..., solver="flow_map")` of it gives the data of the next round of correctors.
#
# ## Distillation with a critic
#
# Self-corrected distillation takes a frozen teacher and the average at once, `target="both"`; the critic is the second
# network of the model and is trained in the same step. In a config: `flow_map.method = "self_corrected"`,
# `flow_map.target = "both"`, `flow_map.net = {"name": "mlp", "critic": {"name": "mlp"}}`.

# %%
teacher = train(flow, model.init(jax.random.key(0), moons[:1]), batch, 800)
joint = nets.with_encoder(model, nets.from_linen(nets.MLP(width=64, depth=2, logit=True)), name="critic")
for weight in (0.0, 0.1):
    method = methods.self_corrected(joint.net, adversarial=weight, reflow=0.1)
    tx = optax.adam(1e-3)
    state = training.init({**joint.init(jax.random.key(7), moons[:1]), **teacher}, tx)
    update = training.make_step(method.loss, tx, target="both", ema=0.99)
    frozen = {**teacher, "critic": state.params["critic"]}
    frozen = jax.tree.map(jnp.array, frozen)
    for n in range(300):
        state, _ = update(state, batch(n), jax.random.key(8), frozen)
    y = [sampling.sample(method.flow_map(state.ema), x0, n) for n in (1, 2)]
    w2 = [f"{metrics.w2_exact(each, reference):.3f}" for each in y]
    print(f"adversarial weight {weight}: W2 with 1 and 2 evaluations {', '.join(w2)}")
for n in (1, 2, 16):
    y = sampling.sample(sampling.euler(flow.velocity(teacher)), x0, n)
    print(f"teacher, Euler, {n:2d} evaluations: {metrics.w2_exact(y, reference):.3f}")

# %% [markdown]
# **What is published, and what this is.** Local flow matching (arXiv 2410.02548) reports tables, images and robot
# policies; JKO-iFlow (2212.14424) tables and images; BFR (2601.21182) MNIST FID from 3.95 to 1.46 with one more
# evaluation; FDS (2604.04646) a training-free corrector; conservative flows (2605.06905) moves on pretrained flows;
# self-corrected distillation (2412.16906) CelebA-HQ and COCO. Here: closed forms on Gaussians and mixtures
# (`tests/test_straightening_blocks.py`, `test_correction_refinements.py`, `test_methods_self_corrected.py`) and the
# plane. Chosen where the sources were silent or only summaries were at hand: BFR's pairs by minibatch optimal
# transport, without which one Euler step goes to the mean of the data; the strengths of FDS; the weights of the five
# terms of self-corrected distillation and its few-step sampler. Its reflow term vanishes at the exact map of a straight
# flow only.
