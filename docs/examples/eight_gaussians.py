# %% [markdown]
# # Eight Gaussians: a flow in twelve lines
#
# Train a velocity by flow matching on points in the plane, and sample it with several solvers.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from fmjax import data, methods, metrics, nets, sampling
from fmjax.types import Batch

model = nets.from_linen(nets.MLP(width=64))
method = methods.flow_matching(model.net)  # a tuple of pure functions
tx = optax.adam(optax.cosine_decay_schedule(4e-3, 1500))


@jax.jit
def step(params, opt, key):
    k_data, k_loss = jax.random.split(key)
    batch = Batch(data.draw_eight_gaussians(k_data, 256))
    grads, aux = jax.grad(method.loss, has_aux=True)(params, params, batch, k_loss)
    updates, opt = tx.update(grads, opt)
    return optax.apply_updates(params, updates), opt, aux["per_example"].mean()


key = jax.random.key(0)
params = model.init(key, data.draw_eight_gaussians(key, 1))
opt, losses = tx.init(params), []
for i in range(1500):
    params, opt, loss = step(params, opt, jax.random.fold_in(key, i))
    losses.append(float(loss))
print(f"loss: {np.mean(losses[:50]):.3f} at the start, {np.mean(losses[-200:]):.3f} at the end")

# %% [markdown]
# The loss does not go to zero: its minimum is the mean variance of $\dot I_t$ given $I_t$. Judge a flow by its samples.

# %%
velocity = method.velocity(params)
x0 = jax.random.normal(key, (2048, 2))
reference = data.draw_eight_gaussians(jax.random.key(7), 2048)
samplers = {
    "Euler, 4 steps": (sampling.euler(velocity), 4),
    "Heun, 4 steps": (sampling.heun(velocity), 4),
    "RK4, 4 steps": (sampling.rk4(velocity), 4),
    "RK4, 16 steps": (sampling.rk4(velocity), 16),
}
figure, axes = plt.subplots(1, 5, figsize=(11, 2.4), sharex=True, sharey=True)
axes[0].scatter(*np.asarray(reference).T, s=2, color="#475569")
axes[0].set(title="data", aspect="equal", xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))
for axis, (name, (solver, n)) in zip(axes[1:], samplers.items()):
    x = jax.jit(lambda x, solver=solver, n=n: sampling.sample(solver, x, n))(x0)
    nfe = sampling.cost(solver, sampling.uniform_grid(n)).nfe
    axis.scatter(*np.asarray(x).T, s=2, color="#1d4ed8")
    axis.set(title=f"{name}\n{nfe} evaluations", aspect="equal")
    print(f"{name:16s} NFE {nfe:3d}  W2 {metrics.w2_exact(x, reference):.3f}")
floor = metrics.w2_exact(data.draw_eight_gaussians(jax.random.key(8), 2048), reference)
print(f"{'data':16s}          W2 {floor:.3f}  (the floor, which has an error of about 0.02)")
