# %% [markdown]
# # Marginal correction
#
# A learned flow is not exact. It carries noise to a distribution that differs from the data. The *same* flow, solved
# backwards from the data, ends in something that is not noise. **Marginal correction** uses the second fact to repair
# the first (OpenReview kRjLBXWn1T).
#
# ## Forward and backward marginals
#
# Take the time grid $t_0 < \dots < t_N$ of a solver.
#
# * **Forward marginals** $p_n$: start from noise at $t_0$ and follow the flow to $t_n$. $p_N$ is what the sampler
#   draws.
# * **Backward marginals** $q_n$: start from data at $t_N$ and follow the flow back to $t_n$. $q_N$ is the data.
#
# For a perfect flow $p_n = q_n$ at every $n$. For a flow with an error they differ at every $n$, and a state that lies
# in $q_n$ leads to the data *through the imperfect flow*. A corrector pushes states from $p_n$ towards $q_n$.
#
# The pictures below need no training. The data are eight Gaussians on a circle, and the flow is their exact velocity
# plus a known error, $e(x) = 0.2\,x$, which makes the samples too wide.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from fmjax import correction, metrics, oracles, sampling

ring = oracles.ring(modes=8, std=0.25)
flow = oracles.perturbed(ring, oracles.field(0.2), steps=8)
step = sampling.rk4(flow.velocity)
noise = jax.random.normal(jax.random.key(0), (1500, 2))
data = ring.sample(jax.random.key(1), 1500)

grid = sampling.uniform_grid(10)
forward = np.asarray(sampling.sample(step, noise, grid, trajectory=True))
backward = np.asarray(sampling.sample(step, data, grid[::-1], trajectory=True))[::-1]


def panels(columns, **sets):
    figure, axes = plt.subplots(1, len(columns), figsize=(2.9 * len(columns), 3), sharex=True, sharey=True)
    for axis, (title, clouds) in zip(np.atleast_1d(axes), columns.items()):
        for name, cloud in clouds.items():
            axis.scatter(*np.asarray(cloud).T, s=3, alpha=0.5, label=name, linewidths=0)
        axis.set(title=title, xlim=(-3.6, 3.6), ylim=(-3.6, 3.6), aspect="equal", xticks=[], yticks=[])
        axis.legend(fontsize=8, frameon=False, markerscale=3, loc="upper right")


panels({f"t = {grid[n]:g}": {"$p_n$": forward[n], "$q_n$": backward[n]} for n in (0, 5, 8, 10)})

# %% [markdown]
# At $t = 0$ the forward marginal is noise, and the backward marginal is narrower: too narrow noise is exactly what this
# flow needs to end in the data. At $t = 1$ the backward marginal is the data, and the forward marginal is too wide.
#
# ## The correction step
#
# `correction.marginal_matching(direction, alpha=..., beta=...)` is the correction of the paper at one time:
#
# $$\tilde x = x + \beta z, \quad z \sim N(0, I), \qquad x' = \tilde x + \alpha\, h(\tilde x, t).$$
#
# The *direction* $h$ is what is learned. There are two kinds.
#
# | direction | what it learns | on a perfect model |
# | --- | --- | --- |
# | classifier | the gradient of the logit of $q_n$ against $p_n$; the best logit is $\log q_n / p_n$ | does nothing |
# | score | $\sigma^2$ times the score of $q_n * N(0, \sigma^2 I)$, by denoising | contracts, unless noise is added |
#
# With the exact classifier, one correction at the end repairs most of the error. Without noise, a score step can only
# contract:

# %%
exact_classifier = oracles.gradient(flow.logit)
sigma = 0.2
noised = oracles.ring(modes=8, std=float(np.sqrt(0.25**2 + sigma**2)))  # the data plus noise of size sigma
score = lambda x, t, cond=None: sigma**2 * noised.score(x, jnp.ones_like(t))

correctors = {
    "no correction": None,
    "classifier, alpha 0.06": correction.marginal_matching(exact_classifier, alpha=0.06),
    "score, preset w2": correction.marginal_matching(score, **correction.preset("w2", sigma)),
    "score, preset langevin": correction.marginal_matching(score, **correction.preset("langevin", sigma)),
}
drawn = {}
for name, fix in correctors.items():
    options = {"corrector": fix, "at": (10,), "key": jax.random.key(2)} if fix else {}
    drawn[name] = jax.jit(lambda x, options=options: sampling.sample(step, x, grid, **options))(noise)
    print(f"{name:24s} W2 to the data {metrics.w2_exact(drawn[name], data):.3f}")
print(f"{'other data':24s} W2 to the data {metrics.w2_exact(ring.sample(jax.random.key(3), 1500), data):.3f}")
panels({name: {"samples": x} for name, x in drawn.items()})

# %% [markdown]
# ## Where to correct
#
# The classifier's logit $\log q_n / p_n$ is constant along trajectories, so that every f-divergence of $p_n$ and $q_n$
# is the same at all $n$. Only distances such as $W_2$ change with $n$. A correction can therefore act at any step, but
# the same alpha has another effect at another step, because the marginals have other widths there. `at=(0, 5, 10)`
# names the corrected steps, and `launch.tune` measures the effect of each single step, each with its best strength.

# %%
once = lambda n, x: sampling.sample(
    step, x, grid, corrector=correctors["classifier, alpha 0.06"], at=(n,), key=jax.random.key(2)
)
effect = [metrics.sliced_w2(jax.jit(once, static_argnums=0)(n, noise), data) for n in (0, 5, 8, 10)]
for n, distance in zip((0, 5, 8, 10), effect):
    print(f"corrected at t = {grid[n]:g}: sliced W2 {distance:.3f}")
print(f"not corrected: sliced W2 {metrics.sliced_w2(drawn['no correction'], data):.3f}")

# %% [markdown]
# ## What to use first
#
# 1. **Measure the gap before you correct it.** Compare N steps with 2N steps. If they differ, take more steps:
#    correction
#    repairs the network's error, not the solver's.
# 2. **Train the flow longer** if you can. It is the first thing to compare a corrector with, at equal cost.
# 3. **Try the affine map and the smooth push** (below): fitted, not trained, at strength 1.
# 4. **Try a kernel drift** between the stored marginals (`correction.kernel_drift`). It trains nothing and evaluates no
#    network. It moves samples towards training examples: watch the distance to the nearest training example.
# 5. **Then a score corrector** with noise, or a classifier. Compare each with the *same noise alone*: a flow that is
#    too
#    narrow gains from noise, whatever the corrector does.
# 6. **Choose strengths on validation data**, with 0 among the candidates (`launch.tune`).
#
# What was measured is in [Results](../results/correction.md). The [how-to on correctors](../howto/choose_corrector.md)
# has the decision table, and the [example](../examples/correction_harms.md) shows when correction harms.
#
# %% [markdown]
# ## Without training: the affine map and the smooth push
#
# **What to use first.** `fit_push` solves one linear system for the smoothest push from the states of a sampler to the
# data, at strength 1: nothing is trained and nothing is tuned. Details finer than $\sqrt{8\lambda}$ are left alone,
# coarser ones are repaired, and a perfect model moves by no more than the noise of the fit. The price is generated
# examples, 15,000 by default, of the *same* sampler (solver, number of steps) that is corrected.

# %%
x = sampling.sample(step, noise, grid)  # of the very sampler
push = correction.fit_push(x[:, None], data[:, None], affine=True)  # [examples, steps, ...]
fix = correction.marginal_matching(correction.sobolev_drift(push, ts=[1.0]), alpha=1.0)
fresh = jax.random.normal(jax.random.key(5), (1500, 2))
y = sampling.sample(step, fresh, grid, key=jax.random.key(2), corrector=fix, at=(10,))
plain = sampling.sample(step, fresh, grid)
print(f"affine map and push: W2 {metrics.w2_exact(y, data):.3f}, without {metrics.w2_exact(plain, data):.3f}")

# %% [markdown]
# In a config it is a correction by `"affine_push"` (or `"push"`, `"affine"` alone), for solvers and flow maps, at the
# end or at any step: `c.corrections = {"end": {"solver": "flow_map", "steps": 4, "at": (4,), "by": "affine_push"}}`.
# The pipeline generates the samples, fits, keeps the push in the run folder, and names on the page the correction that
# is nearest to validation examples. Options: `lam` (by default the variance of the data per dimension), `examples`,
# `per_class`, `target` (before the end: the `"backward"` marginals of this solver, or the `"interpolant"`). Judge
# moments (Frechet distances) and other distances together: the affine map alone fits moments.
# `classifier_corrector(gradient_penalty=lam)` is the same push by a network, of strength
# `correction.preset("transport", lam=lam)`; train it at a learning rate of 5e-4.

# %% [markdown]
# ## From a command
#
# ```bash
# python -m launch.marginals --workdir=W                          # both sets of the flow in W
# python -m launch.train --workdir=W --stage=correctors.score     # a corrector on them
# python -m launch.tune --workdir=W --by=score --solver=rk4 --solver_steps=8
# ```
#
# `launch.marginals` states size, evaluations and seconds first, refuses a disk that is too small, continues after a
# kill, and ends with the round-trip error and the straightness defect. On several processes each builds its shards.
# `--direction=backward --out=DIR` stores only one set. `--config.solver=flow_map --config.backward_map=inverse
# --tol=0.05` builds the marginals of a learned map.
#
# `launch.tune` chooses steps and strengths on some seeds (grid and greedy search, influence of single steps,
# sensitivity) and reports on others. It writes a page with the influence of every step, and the lines for the config's
# `corrections`.
#
# ## In Python
#
# `correction.build_marginals` writes both sets to disk, `read_marginals` reads them, and methods train on them
# (`methods.score_corrector`, `methods.classifier_corrector`, `methods.residual`, `methods.discriminator`). Without
# training there are `langevin`, `mala` (exact for any step and score), `restart` (back by noise, forth by ODE steps or
# by one jump of a map) and `kernel_drift`. A corrector states its evaluations, `fix.nfe`, and times at which it cannot
# work are refused.

# %%
import tempfile

folder = tempfile.mkdtemp()
common = {"flow": "example", "solver": "rk4"}
build = lambda name, **start: correction.build_marginals(
    lambda params: flow.velocity, {}, grid, directory=f"{folder}/{name}", direction=name, **common, **start
)
build("forward", count=1024, shape=(2,))
build("backward", data=np.asarray(data[:1024]))
p, q = (correction.read_marginals(f"{folder}/{name}") for name in ("forward", "backward"))
drift = correction.kernel_drift(p.x, q.x, ts=q.ts, bandwidth=0.3)
fix = correction.marginal_matching(drift, alpha=0.5)
x = sampling.sample(step, noise, grid, corrector=fix, at=(10,), key=jax.random.key(2))
print(f"kernel drift: {fix.nfe} evaluations, W2 {metrics.w2_exact(x, data):.3f}")

# %% [markdown]
# A schedule can have one value per step, and steps can be named on another grid than the one that is sampled:

# %%
ten, fifty = sampling.uniform_grid(10), sampling.uniform_grid(50)
fix = correction.marginal_matching(exact_classifier, alpha=sampling.per_step(ten, np.linspace(0, 0.05, 11)))
x = sampling.sample(
    step, noise, fifty, corrector=fix, at=sampling.same_times((5, 10), ten, fifty), key=jax.random.key(2)
)
print(f"per-step strengths, 50 steps: W2 {metrics.w2_exact(x, data):.3f}")
