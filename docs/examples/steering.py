# %% [markdown]
# # Steering with a flow map
#
# A flow map $X_{t,1}$ looks ahead: it says now which sample a state will become. A reward of that sample steers the
# sampler, without training. Here the data are 8x8 digits, and the reward is the log-probability that a classifier gives
# to one class.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from fmjax import data, methods, nets, sampling
from fmjax.types import Batch

digits, target, key = data.digits(), 3, jax.random.key(0)
flat = lambda split: (jnp.asarray(split.x).reshape(len(split.x), 64), jnp.asarray(split.cond))
(x1, labels), (test_x, test_y) = flat(digits.train), flat(digits.test)
model = nets.from_linen(nets.MLP(width=192))
method = methods.lagrangian(model.net)


def fit(params, loss, steps, rate=2e-3, key=key):
    """Train parameters by Adam."""
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params, opt, key):
        grads = jax.grad(loss)(params, key)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    opt = tx.init(params)
    for i in range(steps):
        params, opt = step(params, opt, jax.random.fold_in(key, i))
    return params


def flow_loss(params, key):
    rows = jax.random.randint(key, (128,), 0, len(x1))
    return method.loss(params, params, Batch(x1[rows]), key)[0]


params = fit(model.init(key, x1[:1]), flow_loss, 1500)
velocity, flow_map = method.velocity(params), method.flow_map(params)


def logits(weights, x):
    return jax.nn.relu(x @ weights["a"] + weights["b"]) @ weights["c"]


def classifier(key):
    """Train a small classifier on noisy digits; another key gives another classifier."""
    k = jax.random.split(key, 2)
    weights = {
        "a": jax.random.normal(k[0], (64, 64)) / 8,
        "b": jnp.zeros(64),
        "c": jax.random.normal(k[1], (64, 10)) / 8,
    }

    def loss(weights, key):
        rows = jax.random.randint(key, (128,), 0, len(x1))
        x = x1[rows] + 0.2 * jax.random.normal(key, (128, 64))
        return optax.softmax_cross_entropy_with_integer_labels(logits(weights, x), labels[rows]).mean()

    return fit(weights, loss, 600, key=key)


guide, judge = classifier(jax.random.key(1)), classifier(jax.random.key(2))
for name, weights in (("guide", guide), ("judge", judge)):
    print(f"{name}: accuracy {(logits(weights, test_x).argmax(1) == test_y).mean():.3f} on test digits")
reward = lambda x, cond=None: jax.nn.log_softmax(logits(guide, x))[:, target]

# %% [markdown]
# Four ways to digits of the class 3:
#
# * **best of n**: draw, and keep the best of $n$ samples;
# * **control** (`controlled`): jump, push the state by the reward's ascent at the looked-ahead sample, jump on. Three
#   evaluations, or five;
# * **particles** (`reward_tilt` with a flow map, `weighted`): trajectory tilting, with weights that make the end
#   $q\,e^R$ for the exact map, that is, $q\,p(3|x)$: the class as the classifier sees it.
#
# The success rate is judged by a second classifier. The diversity is the mean distance of two successes, over the one
# of two test digits of the class.

# %%
n, k = 512, 32
noise = jax.random.normal(jax.random.key(3), (n, 64))
spread = lambda x: np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)).sum() / (len(x) * (len(x) - 1))
real = spread(np.asarray(test_x[test_y == target]))


def best_of(m):
    x0 = jax.random.normal(jax.random.key(4), (n * m, 64))
    x = sampling.sample(flow_map, x0, 2).reshape(n, m, 64)
    return jnp.take_along_axis(x, reward(x.reshape(-1, 64)).reshape(n, m).argmax(1)[:, None, None], 1)[:, 0]


def particles(steps, strength):
    tilt = sampling.reward_tilt(velocity, reward, flow_map=flow_map)
    step = sampling.weighted(tilt, particles=k, strength=strength)
    x, info = sampling.sample(step, noise, steps, key=jax.random.key(5), info=True)
    return sampling.resample(jax.random.key(6), x, info.memory.log_weights, particles=k)


control = lambda ts, scale: sampling.sample(
    sampling.controlled(flow_map, reward, scale=scale, ascent=8, rate=0.3), noise, ts
)
ways = {
    "no steering": (lambda: sampling.sample(flow_map, noise, 2), 2),
    "best of 4": (lambda: best_of(4), 8),
    "best of 16": (lambda: best_of(16), 32),
    "control, 3 evaluations": (lambda: control([0.0, 0.4, 1.0], 1.0), 3),
    "control, 5 evaluations": (lambda: control([0.0, 0.3, 0.6, 1.0], 1.0), 5),
    "particles, 16 steps": (lambda: particles(16, lambda t: 1 - t), 32),
}
drawn = {}
for name, (way, nfe) in ways.items():
    x = drawn[name] = np.asarray(jax.jit(way)())
    success = np.asarray(logits(judge, x).argmax(1)) == target
    distinct = len(np.unique(x.round(4), axis=0))
    print(
        f"{name:23s} {nfe:3d} evaluations a sample: success {success.mean():.2f}, diversity "
        f"{spread(x[success]) / real:.2f}, {distinct} different, mean reward {float(reward(jnp.asarray(x)).mean()):.2f}"
    )

# %%
figure, axes = plt.subplots(len(drawn), 1, figsize=(6, 4))
for axis, (name, x) in zip(axes, drawn.items()):
    axis.imshow(
        np.hstack([np.pad(v.reshape(8, 8), 1, constant_values=-1) for v in x[::32]]), cmap="gray", vmin=-1, vmax=1
    )
    axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)

# %% [markdown]
# Five evaluations of control succeed as often as the best of 16 samples, 32 evaluations. The samples of control have a
# high reward by construction; read its success by the judge, and look at the pictures. Weighted particles keep to the
# data, cost more, and repeat particles.
#
# Published (2604.27147, 2511.22688, 2509.25170): text-to-image at scale. Reproduced here: the formulas, to rounding, on
# Gaussians and mixtures, and this small comparison. The schedule of the push ($\beta_t w$) and the transition of
# `glass` are chosen here: what was read of the papers does not give them.
