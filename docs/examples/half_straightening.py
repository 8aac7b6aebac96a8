# %% [markdown]
# # Half-straightening
#
# Reflow trains a new flow on the chords of a teacher's trajectories, so that the new trajectories are straight.
# Half-straightening does this for one part of the time axis and keeps the teacher elsewhere. Here the teacher is the
# exact flow of eight Gaussians, and the time axis is cut at $t = 0.5$.

# %%
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from fmjax import correction, methods, metrics, nets, oracles, sampling, straightening

ring, bounds = oracles.ring(modes=8), (0.0, 0.5, 1.0)
teacher = ring.velocity

# 1. Trajectories of the teacher: the forward marginals on a grid that contains the bound.
folder = tempfile.mkdtemp()
grid = sampling.uniform_grid(20)
correction.build_marginals(
    lambda params: teacher, {}, grid, directory=folder, direction="forward", flow="teacher", count=8192, shape=(2,)
)
trajectories = correction.read_marginals(folder)

# %% [markdown]
# One student per half, each trained on the chords of its half (sharing `gated` in the configs):

# %%
model = nets.from_linen(nets.MLP(width=64))
tx = optax.adam(optax.cosine_decay_schedule(4e-3, 1000))


def straighten(part):
    """Train a student on the chords between two bounds."""
    method = methods.straighten(model.net, bounds=part)
    batches = straightening.segment_batches(trajectories, part, batch_size=256, seed=0)

    @jax.jit
    def step(params, opt, batch, key):
        grads, _ = jax.grad(method.loss, has_aux=True)(params, params, batch, key)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    params = model.init(jax.random.key(0), np.zeros((1, 2), np.float32))
    opt = tx.init(params)
    for i in range(1000):
        params, opt = step(params, opt, batches(i), jax.random.fold_in(jax.random.key(1), i))
    return method.velocity(params)


early, late = straighten((0.0, 0.5)), straighten((0.5, 1.0))
flows = {
    "teacher": [teacher, teacher],
    "noise half straight": [early, teacher],
    "data half straight": [teacher, late],
    "both halves straight": [early, late],
}

# %% [markdown]
# Sample each model with few Euler steps in each half. `(1, 4)` is one step in the noise half and four in the data half.

# %%
noise = jax.random.normal(jax.random.key(2), (1500, 2))
data = ring.sample(jax.random.key(3), 1500)
allocations = ((1, 1), (1, 4), (4, 1), (4, 4))
print(f"{'W2 to the data':22s}" + "".join(f"{str(a):>10s}" for a in allocations))
figure, axes = plt.subplots(1, 4, figsize=(10, 2.7), sharex=True, sharey=True)
for axis, (name, parts) in zip(axes, flows.items()):
    step = straightening.segmented_step(parts, bounds)
    distances = []
    for steps in allocations:
        ts = straightening.segment_grid(bounds, steps)
        x = jax.jit(lambda x, step=step, ts=ts: sampling.sample(step, x, ts))(noise)
        distances.append(metrics.w2_exact(x, data))
    print(f"{name:22s}" + "".join(f"{d:10.3f}" for d in distances))
    fine = straightening.segment_grid(bounds, (16, 16))
    path = np.asarray(sampling.sample(step, noise[:80], fine, trajectory=True))
    axis.plot(*path.transpose(2, 0, 1), color="#94a3b8", lw=0.6)
    axis.scatter(*path[16].T, s=4, color="#b45309")
    axis.scatter(*path[-1].T, s=5, color="#1d4ed8")
    axis.set(title=name, aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), xticks=[], yticks=[])

# %% [markdown]
# Orange points are the states at the bound $t = 0.5$. A straight half needs one Euler step; a curved half needs many.
# As a run with a report, for images: `python -m launch.reflow --config=configs/half_straightening_digits.py
# --workdir=H`. The [results](../results/straightening.md) compare halves, ways to share parameters, and other samplers
# of the teacher.
