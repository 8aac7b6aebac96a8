# %% [markdown]
# # Likelihood
#
# A flow has a density: $\log p(x) = \log N(x_0; 0, I) - \int_0^1 \nabla\cdot v\,dt$ along the trajectory that ends in
# $x$. First for a flow whose density is known, then for a learned one.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from fmjax import data, methods, nets, oracles, sampling
from fmjax.types import Batch

ring = oracles.ring(modes=8)
points = ring.sample(jax.random.key(0), 256)
density = jax.jit(lambda x: sampling.log_density(ring.velocity, x, rtol=1e-6, atol=1e-6))(points)
exact = ring.log_density(points, jnp.ones(len(points)))
print(f"largest error of the log-density: {float(jnp.abs(sampling.checked_density(density) - exact).max()):.1e} nats")

# %% [markdown]
# `checked_density` raises an error for a solve that failed. In many dimensions the divergence is estimated with random
# probes (`probes=1`), which is unbiased:

# %%
keys = jax.random.split(jax.random.key(1), 256)
estimate = jax.jit(lambda x, k: sampling.log_density(ring.velocity, x, None, k, probes=4).log_p)(points, keys)
print(f"mean log-density: exact {float(exact.mean()):.3f}, 4 probes {float(estimate.mean()):.3f}")

# %% [markdown]
# ## A learned flow

# %%
model = nets.from_linen(nets.MLP(width=64))
method, tx = methods.flow_matching(model.net), optax.adam(optax.cosine_decay_schedule(4e-3, 1500))


@jax.jit
def step(params, opt, key):
    k_data, k_loss = jax.random.split(key)
    batch = Batch(data.draw_eight_gaussians(k_data, 256))
    grads = jax.grad(lambda p: method.loss(p, p, batch, k_loss)[0])(params)
    updates, opt = tx.update(grads, opt)
    return optax.apply_updates(params, updates), opt


params = model.init(jax.random.key(0), points[:1])
opt = tx.init(params)
for i in range(1500):
    params, opt = step(params, opt, jax.random.fold_in(jax.random.key(2), i))

velocity = method.velocity(params)
learned = sampling.checked_density(jax.jit(lambda x: sampling.log_density(velocity, x))(points))
print(f"mean log-density of data: learned {float(learned.mean()):.3f}, exact {float(exact.mean()):.3f} (its maximum)")
print(f"KL of the data from the flow: {float((exact - learned).mean()):.3f} nats")

# %%
side = np.linspace(-3, 3, 61)
grid = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(-1, 2), jnp.float32)
log_p = jax.jit(lambda x: sampling.log_density(velocity, x, rtol=1e-3, atol=1e-3).log_p)(grid)
figure, axes = plt.subplots(1, 2, figsize=(6.4, 3), sharex=True, sharey=True)
for axis, values, title in zip(axes, (ring.log_density(grid, jnp.ones(len(grid))), log_p), ("exact", "learned flow")):
    axis.imshow(np.exp(np.asarray(values).reshape(61, 61)), origin="lower", extent=(-3, 3, -3, 3), cmap="viridis")
    axis.set(title=f"density, {title}", xticks=[], yticks=[])

# %% [markdown]
# ## Images
#
# Pixels are integers, a flow has a density of real numbers. Add noise of one grey level (`sampling.dequantise`), and
# convert to bits per dimension (`sampling.bits_per_dim`). For a run folder: `fmjax.load(W).log_prob(x)`.

# %%
level = 2 / 16  # the digits have 17 grey levels in [-1, 1]
images = sampling.dequantise(jax.random.key(3), jnp.asarray(data.digits().test.x[:8]), level=level)
gaussian = oracles.gaussian(images.mean(), images.std())
flat = images.reshape(8, -1)
bits = sampling.bits_per_dim(sampling.log_density(gaussian.velocity, flat), level=level)
print(f"digits under one Gaussian for all pixels: {float(bits.mean()):.2f} bits per dimension")
