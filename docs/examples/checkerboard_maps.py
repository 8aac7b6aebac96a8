# %% [markdown]
# # Flow maps on the checkerboard
#
# Train a flow and a flow map of the same network for the same number of steps, and compare them with few evaluations.
# The map is Lagrangian self-distillation (`methods.lagrangian`, arXiv 2505.18825): three quarters of the batch learn
# the velocity on the diagonal $s = t$, one quarter learns $\partial_t X_{s,t}(x) = v(X_{s,t}(x), t)$.

# %%
import functools

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from fmjax import data, methods, metrics, nets, sampling
from fmjax.types import Batch

model = nets.from_linen(nets.Plain(width=128, depth=4, waves=4, times=2))
STEPS = 4000
tx = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))


def train(method, seed=0):
    """Train in one compiled scan per 500 steps; return the average of the parameters over the last half."""

    def step(state, i):
        params, opt, mean = state
        k_data, k_loss = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        batch = Batch(data.draw_checkerboard(k_data, 512))
        grads = jax.grad(lambda p: method.loss(p, p, batch, k_loss)[0])(params)
        updates, opt = tx.update(grads, opt)
        params = optax.apply_updates(params, updates)
        return (params, opt, optax.incremental_update(params, mean, 0.002)), None

    some = jax.jit(lambda state, start: jax.lax.scan(step, state, start + jax.numpy.arange(500))[0])
    params = model.init(jax.random.key(seed), data.draw_checkerboard(jax.random.key(1), 1))
    state = (params, tx.init(params), params)
    for start in range(0, STEPS, 500):
        state = some(state, start)
    return state[2]


flow, lagrangian = methods.flow_matching(model.net), methods.lagrangian(model.net)
flow_params, map_params = train(flow), train(lagrangian)

# %% [markdown]
# The KL divergence of the checkerboard is computed on a histogram; `checkerboard_floor` is its value for perfect
# samples.

# %%
x0 = jax.random.normal(jax.random.key(2), (100_000, 2))
samplers = {
    "flow, Euler": functools.partial(sampling.euler(flow.velocity(flow_params))),
    "flow map": lagrangian.flow_map(map_params),
}
counts, drawn = (1, 2, 4, 8), {}
for name, step in samplers.items():
    for n in counts:
        drawn[name, n] = jax.jit(lambda x, step=step, n=n: sampling.sample(step, x, n))(x0)
    kl = [metrics.checkerboard_kl(drawn[name, n]) for n in counts]
    print(f"{name:12s} KL with N = {counts}:", [round(v, 2) for v in kl])
print(f"floor of perfect samples: {metrics.checkerboard_floor(100_000):.3f}")

figure, axes = plt.subplots(2, 4, figsize=(8, 4.2), sharex=True, sharey=True)
for row, name in zip(axes, samplers):
    for axis, n in zip(row, counts):
        axis.hist2d(*np.asarray(drawn[name, n]).T, bins=96, range=((-1.1, 1.1), (-1.1, 1.1)), cmap="Blues", vmax=40)
        axis.set(title=f"{name}, N = {n}", aspect="equal", xticks=[], yticks=[])

# %% [markdown]
# With one evaluation the map already shows the board, and the flow shows its mean direction only. The
# [results](../results/maps.md) compare all methods at equal training cost, with errors over three trainings.
#
# From a command, a flow map is a stage of a run: `python -m launch.train --workdir=W --stage=flow_map`.
