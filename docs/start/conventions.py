# %% [markdown]
# # Conventions
#
# One page of rules. They hold in every module, and tests check them.
#
# ## Time runs from noise to data
#
# At $t = 0$ a state is noise, $x_0 \sim N(0, I)$. At $t = 1$ it is data, $x_1$. An *interpolant* joins the two. The
# linear one is $I_t = (1 - t)\,x_0 + t\,x_1$. Other libraries and many papers on diffusion models run time the other
# way round.
#
# The *velocity* is the mean direction of all interpolants through a point, $v(x, t) = E[\dot I_t \mid I_t = x]$. The
# ODE $\dot x = v(x, t)$ carries noise to data. The picture shows 600 states at five times, for data in eight clusters:

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from fmjax import oracles, sampling

ring = oracles.ring(modes=8)  # the exact velocity of eight Gaussians on a circle
x0 = jax.random.normal(jax.random.key(0), (600, 2))
states = sampling.sample(sampling.rk4(ring.velocity), x0, 20, trajectory=True)

figure, axes = plt.subplots(1, 5, figsize=(9, 2), sharex=True, sharey=True)
for axis, n in zip(axes, (0, 5, 10, 15, 20)):
    axis.plot(*np.asarray(states)[: n + 1, :60].transpose(2, 0, 1), color="#94a3b8", lw=0.5)
    axis.scatter(*np.asarray(states[n]).T, s=3, color="#1d4ed8")
    axis.set(title=f"t = {n / 20:g}", xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])

# %% [markdown]
# ## One network signature
#
# A network is `net(params, x, s, t, cond=None, key=None)`: the **average velocity** $u(x, s, t)$ from time $s$ to time
# $t$. Two objects follow from it:
#
# $$v(x, t) = u(x, t, t), \qquad X_{s,t}(x) = x + (t - s)\,u(x, s, t).$$
#
# The diagonal $s = t$ is the velocity. $X_{s,t}$ is the *flow map*: it jumps along the trajectory through $x$ from time
# $s$ to time $t$ at once.
#
# ## A step is a flow map
#
# `sampling.rk4(velocity)` has the signature of $X_{s,t}$: `(x, s, t, cond=None, key=None) -> x`. So has a learned map,
# a step of DDIM, and a solve by diffrax. `sampling.sample` does not distinguish them. The picture follows one state: by
# the exact trajectory (grey), by four Euler steps, by four RK4 steps, and by one exact jump of the flow map.

# %%
start = jnp.array([[-0.35, 1.0]])
exact = np.asarray(sampling.sample(sampling.rk4(ring.velocity), start, 200, trajectory=True))[:, 0]
euler = np.asarray(sampling.sample(sampling.euler(ring.velocity), start, 4, trajectory=True))[:, 0]
rk4 = np.asarray(sampling.sample(sampling.rk4(ring.velocity), start, 4, trajectory=True))[:, 0]

figure, axis = plt.subplots(figsize=(5, 3.6))
axis.plot(*exact.T, color="#94a3b8", lw=3, label="exact trajectory")
axis.plot(*euler.T, "o--", color="#b45309", ms=4, label="4 Euler steps, 4 evaluations")
axis.plot(*rk4.T, "s:", color="#1d4ed8", ms=4, label="4 RK4 steps, 16 evaluations")
axis.annotate("", exact[-1], exact[0], arrowprops={"arrowstyle": "->", "color": "#047857", "lw": 1.6})
axis.plot([], [], color="#047857", label="one jump $X_{0,1}$ of a flow map, 1 evaluation")
axis.legend(fontsize=8, frameon=False)
axis.set(aspect="equal")
print("end points (exact, Euler, RK4):", *(f"({x[-1, 0]:.2f}, {x[-1, 1]:.2f})" for x in (exact, euler, rk4)))

# %% [markdown]
# ## Shapes and numbers
#
# | object | shape and type |
# | --- | --- |
# | states `x` | `[B, ...]`, floating |
# | times `s`, `t` | `[B]` or a scalar, float32, inside [0, 1] |
# | images | `[B, H, W, C]` in [-1, 1] |
# | series | `[B, L, C]` |
# | vectors, points | `[B, d]` |
# | conditions `cond` | integer labels `[B]`, floats `[B, ...]`, or a pytree of both |
# | time grids `ts` | `[N + 1]`, strictly rising to sample, strictly falling to invert |
# | labels `classes` of a network | the label `classes` (one more than the largest) means "no label" |
#
# States, averages of parameters and time grids stay in float32, whatever type a network computes in.
#
# ## Arguments
#
# **Positional arguments are arrays and may be traced. Keyword-only arguments are static.** So
# `jax.jit(lambda x: sampling.sample(step, x, 10))` compiles, and a change of a keyword compiles again.
#
# ## Randomness belongs to the example
#
# A public function takes one key, or one key per example `[B]`. Inside the library there is one key per example, folded
# from the key of the run, the step, and the global index of the example. Sample 17 of seed 0 is therefore the same
# for every batch size and for every number of devices:

# %%
keys = jax.random.split(jax.random.key(0), 8)
noise = jax.random.normal(jax.random.key(1), (8, 2))
step = sampling.euler_maruyama(ring.velocity)  # a stochastic step
together = sampling.sample(step, noise, 16, key=keys)
alone = sampling.sample(step, noise[5:6], 16, key=keys[5:6])
print("difference of sample 5 drawn alone:", float(jnp.abs(together[5] - alone[0]).max()))

# %% [markdown]
# ## Parameters are arguments
#
# A method is a tuple of pure functions, as an optimiser of optax is. `method.loss(params, target, batch, key)` takes
# the parameters of the teacher as `target`: the parameters themselves, their average, or a frozen run.
# `method.velocity(params)` and `method.flow_map(params)` are the functions that trained parameters define.
#
# ## Errors
#
# An input that cannot work is refused before any work, on one line:
# `<field>=<value>: <what is wrong>. <what to do>.`
