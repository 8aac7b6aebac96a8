# %% [markdown]
# # Tilted distributions: particles with weights
#
# Annealing, products of experts, guidance and rewards change the distribution of a flow: $q^3$, $q_1 q_2$,
# $q_\emptyset^{1-w} q_c^w$, $q\,e^{R}$. Pushing the drift alone samples something else. *Feynman-Kac correctors*
# (arXiv 2503.02819) let particles carry log-weights beside their states, and resample them when the effective sample
# size is low. Here all is exact: the velocities are closed forms, and so are the targets.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from fmjax import oracles, sampling
from fmjax.sampling import particle_keys, power_product, reward_tilt, weighted

line = oracles.mixture(jnp.array([[-1.5], [1.5]]), 0.66, jnp.array([0.4, 0.6]))
x = np.linspace(-8, 8, 20001)
cube = np.exp(3 * np.asarray(line.log_density(jnp.asarray(x, jnp.float32)[:, None], 1.0), np.float64))
groups, k = 96, 512
keys = particle_keys(jax.random.key(0), groups, k)  # one key a group: a group does not depend on the others
noise = jax.random.normal(jax.random.key(1), (groups * k, 1))
forms = {
    "with divergence": (power_product([line.velocity], [3.0], divergence=True), np.linspace(0, 1, 151), 1.0),
    "without": (power_product([line.velocity], [3.0]), sampling.log_snr_grid(200, sigma_min=0.01, sigma_max=30.0),
                sampling.memoryless()),
}  # fmt: skip
print(f"P(x > 0) of q^3: {cube[x > 0].sum() / cube.sum():.4f} exactly; of q: 0.6")
for name, (tilt, ts, strength) in forms.items():
    step = weighted(tilt, particles=k, strength=strength)
    run = jax.jit(lambda x0, step=step, ts=ts: sampling.sample(step, x0, ts, key=keys, info=True))
    end, info = run(tilt.start * noise)
    mass = np.asarray(jax.nn.softmax(info.memory.log_weights.reshape(groups, k), 1))
    drift = tilt._replace(fields=lambda *a, f=tilt.fields: (*f(*a)[:2], jnp.zeros(len(a[0]))))
    plain = weighted(drift, particles=k, strength=strength)
    alone = jax.jit(lambda x0, step=plain, ts=ts: sampling.sample(step, x0, ts, key=keys))(tilt.start * noise)
    p = (mass * (end.reshape(groups, k) > 0)).sum(1)
    p0 = (alone.reshape(groups, k) > 0).mean(1)
    se = lambda a: np.asarray(a).std(ddof=1) / groups**0.5
    print(
        f"{name:16s} weighted {p.mean():.4f} ± {se(p):.4f}, unweighted {p0.mean():.4f} ± {se(p0):.4f}; lowest ESS "
        f"{info.memory.lowest_ess.mean():.0f} of {k}, {info.memory.resamplings.mean():.1f} resamplings a group"
    )

# %% [markdown]
# Why the form with a divergence is better: its weights are bounded near the noise. The other form needs no derivative
# of the network, needs strong noise, and pays with many resamplings. Both are exact for every strength of noise; what
# the drift alone samples depends on the strength, and is near the target here by chance where the noise is strong.
#
# A reward of eight Gaussians, $R = 1.5\,x_1$: the drift alone moves particles, the weights move mass between modes.

# %%
ring = oracles.ring(modes=8, std=0.25)
tilt = reward_tilt(ring.velocity, lambda x, cond=None: 1.5 * x[:, 0])
k, angle = 2000, np.arange(8) * np.pi / 4
means = 2 * np.stack([np.cos(angle), np.sin(angle)], -1)
exact = np.exp(1.5 * means[:, 0]) / np.exp(1.5 * means[:, 0]).sum()  # the variance adds the same to each mode
x0 = jax.random.normal(jax.random.key(2), (k, 2))
step = weighted(tilt, particles=k, threshold=0.0)  # no resampling, to see the weights
end, info = jax.jit(lambda x: sampling.sample(step, x, 200, key=jax.random.key(3), info=True))(x0)
w = np.asarray(jax.nn.softmax(info.memory.log_weights))
mode = np.argmin(((np.asarray(end)[:, None] - means) ** 2).sum(-1), 1)
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
axes[0].scatter(*np.asarray(end).T, s=w * 4e3, alpha=0.5, color="#1d4ed8", linewidth=0)
axes[0].set(title=f"particles, size: weight (ESS {info.memory.ess[0]:.0f} of {k})", aspect="equal")
masses = {"exact": exact, "weighted": np.bincount(mode, w, 8), "unweighted": np.bincount(mode, minlength=8) / k}
for i, (name, values) in enumerate(masses.items()):
    axes[1].bar(np.arange(8) + i / 4 - 0.25, values, 0.25, label=name, color=("#475569", "#1d4ed8", "#f59e0b")[i])
    print(f"{name:11s} mass of the modes " + " ".join(f"{v:.3f}" for v in values))
axes[1].set(title="mass of the modes", xlabel="mode, counted from the right")
axes[1].legend()

# %% [markdown]
# | function | tilt | weights |
# | --- | --- | --- |
# | `power_product([v], [λ])` | annealing $q^\lambda$ | with or without a divergence |
# | `power_product([v1, v2], [1, 1])` | a product of experts | the same |
# | `guided_tilt(v, null=..., scale=w)` | what classifier-free guidance aims at | no divergence needed |
# | `reward_tilt(v, R)`, `reward_tilt(v, R, flow_map=X)` | $q\,e^R$, by the reward or by look-ahead | |
#
# Published: qualitative gains for molecules and images. Reproduced here: closed forms in one and two dimensions. The
# paper does not give its image weights in a table; when to resample (an effective sample size below half), and no
# clamping of increments, are chosen here. In many dimensions few particles survive: look at `lowest_ess`.
