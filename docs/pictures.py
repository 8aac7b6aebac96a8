"""Draw the picture of the front page: ``python docs/pictures.py`` writes ``docs/static/flow.png``.

Above: the exact flow of eight Gaussians at five times. Below: a flow with a known error before and after one
correction, and a flow map that was trained here, with one, two and four jumps.
"""

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from PIL import Image

from fmjax import correction, methods, nets, oracles, sampling
from fmjax.types import Batch

STEPS = 3000


def train_map(ring: oracles.Oracle):
    """Train a Lagrangian flow map on the ring; return the bound map."""
    model = nets.from_linen(nets.MLP(width=96))
    method = methods.lagrangian(model.net)
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, STEPS))

    def step(state, i):
        params, opt = state
        k_data, k_loss = jax.random.split(jax.random.fold_in(jax.random.key(1), i))
        batch = Batch(ring.sample(k_data, 256))
        grads = jax.grad(lambda p: method.loss(p, p, batch, k_loss)[0])(params)
        updates, opt = tx.update(grads, opt)
        return (optax.apply_updates(params, updates), opt), None

    params = model.init(jax.random.key(0), jnp.zeros((1, 2)))
    (params, _), _ = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(STEPS)))((params, tx.init(params)))
    return method.flow_map(params)


def main() -> None:
    """Draw and write the picture."""
    ring, x0 = oracles.ring(), jax.random.normal(jax.random.key(0), (1200, 2))
    states = np.asarray(sampling.sample(sampling.rk4(ring.velocity), x0, 20, trajectory=True))
    wide = oracles.perturbed(ring, oracles.field(0.2), steps=8)
    fix = correction.marginal_matching(oracles.gradient(wide.logit), alpha=0.04)
    step, jump = sampling.rk4(wide.velocity), train_map(ring)
    corrected = jax.jit(lambda x: sampling.sample(step, x, 10, corrector=fix, at=(10,), key=jax.random.key(2)))(x0)
    below = {
        "a flow with an error": sampling.sample(step, x0, 10),
        "the same, corrected once": corrected,
        **{f"flow map, {n} jump{'s' * (n > 1)}": sampling.sample(jump, x0, n) for n in (1, 2, 4)},
    }
    figure = Figure((9.5, 4.3), layout="constrained", dpi=100, facecolor="white")
    axes = figure.subplots(2, 5)
    for axis, n in zip(axes[0], (0, 5, 10, 15, 20), strict=True):
        axis.plot(*states[: n + 1, :70].transpose(2, 0, 1), color="#94a3b8", lw=0.5)
        axis.scatter(*states[n].T, s=2, color="#1d4ed8", linewidths=0)
        axis.set_title(f"t = {n / 20:g}", fontsize=9)
    for axis, (name, x) in zip(axes[1], below.items(), strict=True):
        axis.scatter(*np.asarray(x).T, s=2, color="#047857" if "map" in name else "#b45309", linewidths=0)
        axis.set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set(xlim=(-3.1, 3.1), ylim=(-3.1, 3.1), aspect="equal", xticks=[], yticks=[])
        axis.spines[:].set_color("#d9dee7")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    path = Path(__file__).parent / "static" / "flow.png"
    Image.open(buffer).convert("RGB").quantize(64, dither=0).save(path, optimize=True)
    print(path, f"{path.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
