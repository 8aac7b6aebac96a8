# %% [markdown]
# # Correction, and when it harms
#
# A correction repairs one kind of error and can make another kind worse. Here every error is known: the flow is the
# exact velocity of eight Gaussians plus an error, and the correctors are exact, too. What remains is the effect of the
# correction itself.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from fmjax import correction, metrics, oracles, sampling

ring, sigma = oracles.ring(modes=8, std=0.25), 0.2
errors = {
    "none": oracles.field(0.0),
    "too wide": oracles.field(0.2),
    "too narrow": oracles.field(-0.2),
    "shifted": oracles.field(0.0, shift=(0.3, 0.0)),
}
noised = oracles.ring(modes=8, std=float(np.hypot(0.25, sigma)))
score = lambda x, t, cond=None: sigma**2 * noised.score(x, jnp.ones_like(t))
noise = jax.random.normal(jax.random.key(0), (1500, 2))
data = ring.sample(jax.random.key(1), 1500)
key = jax.random.key(2)


def correctors(flow):
    """Return the correctors of a flow; each acts once, at the end."""
    still = lambda x, t, cond=None: jnp.zeros_like(x)
    return {
        "no correction": None,
        "noise alone": correction.marginal_matching(still, alpha=0.0, beta=0.1),
        "score, no noise": correction.marginal_matching(score, **correction.preset("w2", sigma)),
        "score, langevin": correction.marginal_matching(score, **correction.preset("langevin", sigma)),
        "classifier": correction.marginal_matching(oracles.gradient(flow.logit), alpha=0.05),
        "restart to 0.6": correction.restart(sampling.rk4(flow.velocity), to=0.6, steps=4),
    }


table, drawn = {}, {}
for error, field in errors.items():
    flow = oracles.perturbed(ring, field, steps=8)
    for name, fix in correctors(flow).items():
        options = {"corrector": fix, "at": (10,), "key": key} if fix else {}
        step = sampling.rk4(flow.velocity)
        x = jax.jit(lambda x, step=step, options=options: sampling.sample(step, x, 10, **options))(noise)
        table[name, error], drawn[name, error] = metrics.w2_exact(x, data), np.asarray(x)

names = list(dict.fromkeys(name for name, _ in table))
print(f"{'W2 to the data':18s}" + "".join(f"{error:>12s}" for error in errors))
for name in names:
    print(f"{name:18s}" + "".join(f"{table[name, error]:12.3f}" for error in errors))
print(f"floor (other data): {metrics.w2_exact(ring.sample(jax.random.key(3), 1500), data):.3f}")

# %% [markdown]
# Blue: lower W2 than without correction. Red: higher.

# %%
change = np.array([[table[name, e] - table["no correction", e] for e in errors] for name in names[1:]])
figure, axis = plt.subplots(figsize=(5.4, 2.8))
image = axis.imshow(change, cmap="RdBu_r", vmin=-0.25, vmax=0.25, aspect="auto")
for i, j in np.ndindex(change.shape):
    axis.text(j, i, f"{change[i, j]:+.3f}", ha="center", va="center", fontsize=8)
axis.set_xticks(range(len(errors)), errors)
axis.set_yticks(range(len(names) - 1), names[1:])
figure.colorbar(image, label="change of W2")

# %% [markdown]
# What the table shows:
#
# * **A flow without an error** is left alone by the classifier, and damaged by a score step without noise, which
#   contracts.
# * **A flow that is too narrow** gains from noise alone. A corrector must beat that row before its direction deserves
#   credit.
# * **A shift** moves mass from some modes to others. Local corrections cannot move it back.
#
# So compare every correction with the noise alone, choose its strength on validation data with 0 among the candidates,
# and keep the uncorrected sampler in the table. `launch.pipeline` does all three.
