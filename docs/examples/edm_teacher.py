# %% [markdown]
# # From a diffusion model to a map of few steps
#
# Train a teacher with the loss of EDM, sample it with samplers for diffusion models, and distil it into a flow map.
# The teacher's network already has the right signature: its diagonal is the velocity, so the map starts from its
# parameters. A public EDM checkpoint takes the same way, see [the how-to](../howto/public_checkpoint.md).

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from fmjax import data, methods, metrics, nets, sampling
from fmjax.types import Batch

digits = data.digits()
train_x = jax.numpy.asarray(digits.train.x)
model = nets.from_linen(nets.MLP(width=256, depth=3))


def train(method, params, steps, rate, target=None, batch_size=128):
    """Train with a constant teacher ``target``; by default the parameters teach themselves."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, steps)))

    def step(state, i):
        params, opt, mean = state
        k_data, k_loss = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        batch = Batch(train_x[jax.random.randint(k_data, (batch_size,), 0, len(train_x))])
        grads = jax.grad(lambda p: method.loss(p, p if target is None else target, batch, k_loss)[0])(params)
        updates, opt = tx.update(grads, opt)
        params = optax.apply_updates(params, updates)
        return (params, opt, optax.incremental_update(params, mean, 0.005)), None

    some = jax.jit(lambda state, start: jax.lax.scan(step, state, start + jax.numpy.arange(250))[0])
    state = (params, tx.init(params), params)
    for start in range(0, steps, 250):
        state = some(state, start)
    return state[2]


params = model.init(jax.random.key(0), train_x[:1])
teacher = methods.edm(model.net, sigma_data=0.5)
teacher_params = train(teacher, params, 2500, 2e-3)

# %% [markdown]
# ## Sample the teacher
#
# The grid of EDM starts at noise level 80, that is $t = 1/81$ on the linear path.

# %%
velocity = teacher.velocity(teacher_params)
noise = jax.random.normal(jax.random.key(1), (400, 8, 8, 1))
reference = digits.test.x


def draw(step, ts):
    ts = np.asarray(ts)
    return jax.jit(lambda x: sampling.sample(step, (1 - ts[0]) * x, ts))(noise)


samples = {
    "Euler, 4 even steps": (draw(sampling.euler(velocity), sampling.uniform_grid(4)), 4),
    "DDIM, 10 steps": (draw(sampling.ddim(velocity), sampling.log_snr_grid(10)), 10),
    "DPM-Solver++(2M), 10 steps": (draw(sampling.dpmpp_2m(velocity), sampling.log_snr_grid(10)), 10),
    "EDM's Heun, 18 steps": (draw(sampling.edm_heun(velocity), sampling.edm_grid(18)), 35),
}

# %% [markdown]
# ## Distil
#
# Lagrangian map distillation (LMD, arXiv 2406.07507) is `lagrangian` with nothing on the diagonal, the gradient through
# the teacher's input, and a frozen teacher:

# %%
distil = methods.lagrangian(model.net, diagonal=0.0, stop="none")
map_params = train(distil, teacher_params, 1500, 1e-3, target=teacher_params)
jump = distil.flow_map(map_params)
for n in (1, 2, 4):
    samples[f"flow map, {n} step{'s' * (n > 1)}"] = (draw(jump, sampling.uniform_grid(n)), n)
for name, (x, nfe) in samples.items():
    print(f"{name:28s} NFE {nfe:3d}  sliced W2 {metrics.sliced_w2(x, reference):.4f}")
print(f"{'training data':28s}          sliced W2 {metrics.sliced_w2(digits.train.x[:400], reference):.4f}")

figure, axes = plt.subplots(len(samples), 1, figsize=(7, 0.62 * len(samples)))
for axis, (name, (x, nfe)) in zip(axes, samples.items()):
    axis.imshow(np.hstack([np.asarray(image)[..., 0] for image in x[:14]]), cmap="gray", vmin=-1, vmax=1)
    axis.set_ylabel(f"{name} ({nfe})", rotation=0, ha="right", va="center", fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)

# %% [markdown]
# With one evaluation the map is nearer to the data than four Euler steps of the teacher. It was trained for 1,500 steps
# only: ten evaluations of DPM-Solver++(2M) on the teacher are still better. Longer trainings are in [the
# results](../results/maps.md).
