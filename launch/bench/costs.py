"""Suites of ``launch.bench``: what the library costs beside the bare network."""

import functools
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmjax import correction, sampling, training
from fmjax.correction import correctors
from fmjax.methods import views
from fmjax.methods.flow_matching import flow_matching
from fmjax.methods.lagrangian import lagrangian
from fmjax.methods.score_corrector import score_corrector
from fmjax.nets.adapters import from_linen
from fmjax.nets.mlp import MLP
from fmjax.nets.unet import UNet
from fmjax.sampling import grids
from fmjax.training import sharding
from fmjax.types import Batch, Net, Params
from launch.bench.measure import interleaved, now, since


def image_like(rng: np.random.Generator, n: int) -> np.ndarray:
    """``[n, 32, 32, 3]`` in [-1, 1]: random fields with the 1/f amplitude spectrum of natural images, mostly grey."""
    f = np.hypot(np.fft.fftfreq(32)[:, None], np.fft.rfftfreq(32)[None])
    amplitude = 1 / np.maximum(f, 1 / 32)

    def field(channels):
        white = np.fft.rfft2(rng.standard_normal((n, channels, 32, 32)))
        x = np.fft.irfft2(white * amplitude, s=(32, 32))
        return x / x.std()

    return np.tanh(0.55 * (field(1) + 0.3 * field(3))).transpose(0, 2, 3, 1).astype(np.float32)


def couplings(repeats: int) -> list[dict]:
    """Minibatch OT: time from two batches to the pairing or plan, and the transport cost attained.

    Sources are N(0, I); targets are the 8x8 digits (d = 64) or 1/f random fields (d = 3072). ``gain`` is the fraction
    of the exact gain over random pairing that is realised, ``(random - cost) / (random - exact)``.
    """
    import ot
    from sklearn.datasets import load_digits

    from fmjax import transport

    def jitted(solve):
        def run(x0, x1):
            cost = jnp.maximum((x0**2).sum(1)[:, None] + (x1**2).sum(1)[None] - 2 * x0 @ x1.T, 0)
            return solve(cost)

        return jax.jit(run)

    def hungarian(cost):
        i, j = optax.assignment.hungarian_algorithm(cost)
        return jnp.zeros_like(cost).at[i, j].set(1 / len(cost))

    def sinkhorn(scale):
        return jitted(lambda cost: transport.sinkhorn(cost, eps=0.05 * scale(cost)).matrix)

    on_device = {
        "optax hungarian, jit": jitted(hungarian),
        "sinkhorn 0.05 std, jit": sinkhorn(jnp.std),
        "sinkhorn 0.05 mean, jit": sinkhorn(jnp.mean),
    }
    rng = np.random.default_rng(0)
    digits = load_digits().images.astype(np.float32) / 8 - 1
    rows = []
    for d in (64, 3072):
        for b in (128, 256, 512):
            data = digits[rng.permutation(len(digits))[:b]] if d == 64 else image_like(rng, b)
            x0, x1 = rng.standard_normal((b, d), dtype=np.float32), data.reshape(b, d)
            y0, y1 = jnp.asarray(x0), jnp.asarray(x1)
            uniform = np.full(b, 1 / b)

            def scipy_exact(x0=x0, x1=x1, b=b):
                plan = np.zeros((b, b))
                plan[transport.assignment(transport.squared_cost(x0, x1)), np.arange(b)] = 1 / b
                return plan

            functions = {
                "scipy assignment, host": scipy_exact,
                "POT emd, host": lambda x0=x0, x1=x1, u=uniform: ot.emd(u, u, transport.squared_cost(x0, x1)),
            }
            functions |= {name: lambda f=f, y0=y0, y1=y1: f(y0, y1) for name, f in on_device.items()}
            spent = interleaved(functions, repeats)
            cost = transport.squared_cost(x0.astype(np.float64), x1.astype(np.float64))
            plans = {name: np.asarray(f(), np.float64) for name, f in functions.items()}
            paid = {name: float((plan * cost).sum() / plan.sum()) for name, plan in plans.items()}
            exact, random = paid["scipy assignment, host"], float(cost.mean())
            for name in functions:
                excess, gain = paid[name] / exact - 1, (random - paid[name]) / (random - exact)
                rows.append(
                    {"d": d, "B": b, "method": name, "ms": spent[name].ms, "excess_%": 100 * excess, "gain": gain}
                )
    return rows


class Case(NamedTuple):
    """A network to measure with: at least 5 ms a call on two cores, its parameters, and one batch on the device."""

    net: Net
    params: Params
    x: jax.Array


def networks() -> dict[str, Case]:
    """An MLP on vectors ``[128, 64]`` and a U-Net on images ``[16, 16, 16, 1]``."""
    modules = {"MLP": MLP(width=512, depth=3), "U-Net": UNet(channels=32, multipliers=(1, 2))}
    shapes = {"MLP": (128, 64), "U-Net": (16, 16, 16, 1)}
    cases = {}
    for i, (name, module) in enumerate(modules.items()):
        x, model = jax.random.normal(jax.random.key(i), shapes[name]), from_linen(module)
        cases[name] = Case(model.net, model.init(jax.random.key(2), x), x)
    return cases


CALLS = 8  # bare calls timed as one: a single one is mostly noise on a shared machine


def bare(case: Case) -> Callable[[], None]:
    """``CALLS`` calls of the jitted network alone, each waited for."""
    call = jax.jit(lambda params, x, t: case.net(params, x, t, t))
    t = jnp.full(len(case.x), 0.5)
    return lambda: [jax.block_until_ready(call(case.params, case.x, t)) for _ in range(CALLS)]


def sampler(repeats: int) -> list[dict]:
    """Sampling against ``NFE`` calls of the bare network; the corrector has another network of the same size.

    Goal: a ratio of at most 1.05. ``temp_MB`` is what the compiled sampler needs beside its arguments and results.
    """
    rows = []
    for name, case in networks().items():
        velocity, jump = views.velocity_view(case.net), views.flow_map_view(case.net)
        score = lambda q, case=case: score_corrector(case.net, sigma=0.1).direction(q)
        fix = lambda q, score=score: {
            "corrector": correctors.marginal_matching(score(q), alpha=0.5, beta=0.1),
            "at": (0, 2, 4),
            "key": jax.random.key(0),
        }
        ways = {
            "Euler, 8 steps": (8, 1, lambda p, q, v=velocity: (sampling.euler(v(p)), {})),
            "RK4, 4 steps": (4, 4, lambda p, q, v=velocity: (sampling.rk4(v(p)), {})),
            "RK4, 4 steps, 3 corrections": (4, 4, lambda p, q, v=velocity, fix=fix: (sampling.rk4(v(p)), fix(q))),
            "flow map, 4 steps": (4, 1, lambda p, q, m=jump: (m(p), {})),
        }
        other = jax.tree.map(jnp.copy, case.params)
        functions, cost, memory = {"network": bare(case)}, {}, {}
        for way, (n, stages, make) in ways.items():

            def run(p, q, x, n=n, make=make):
                step, options = make(p, q)
                return sampling.sample(step, x, grids.uniform_grid(n), **options)

            compiled = jax.jit(run).lower(case.params, other, case.x).compile()
            functions[way] = lambda f=compiled, case=case, other=other: f(case.params, other, case.x)
            cost[way] = sampling.cost(stages, n, (0, 2, 4) if "corr" in way else ()).nfe
            memory[way] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        spent = interleaved(functions, repeats)
        call = spent["network"]
        for way, nfe in cost.items():
            row = {"network": name, "call_ms": call.ms / CALLS, "sampler": way, "NFE": nfe, "ms": spent[way].ms}
            rows.append(row | spent[way].over(call, nfe / CALLS) | {"goal": 1.05, "temp_MB": memory[way]})
    return rows


def train_step(repeats: int) -> list[dict]:
    """A training step on one device against ``value_and_grad`` of the least loss, the optimiser and donation.

    The optimiser is Adam after clipping, as in the configs. The step has more to do: a key per example, the average
    of the parameters, the norm of the gradient (shared with the clipping; with plain Adam it alone costs 5 % on the
    MLP, by reading 14 MB once more). Goal: 1.05. The Lagrangian step is compared with the flow-matching one as well.
    """
    mesh, key, rows = sharding.make_mesh(jax.devices()[:1]), jax.random.key(0), []
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    for name, case in networks().items():

        def least(p, x1, key, net=case.net):
            k_t, k_x = jax.random.split(key)
            t, x0 = jax.random.uniform(k_t, (len(x1),)), jax.random.normal(k_x, x1.shape)
            e = t.reshape(-1, *[1] * (x1.ndim - 1))
            return jnp.mean((net(p, (1 - e) * x0 + e * x1, t, t) - (x1 - x0)) ** 2)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def update(p, o, i, x1, key, least=least):
            value, grads = jax.value_and_grad(least)(p, x1, jax.random.fold_in(key, i))
            updates, o = tx.update(grads, o, p)
            return optax.apply_updates(p, updates), o, i + 1, value

        held = [jax.tree.map(jnp.copy, case.params), tx.init(case.params), jnp.int32(0)]

        def plain(held=held, update=update, case=case):
            *held[:], value = update(*held, case.x, key)
            return value

        batch, functions = sharding.place_batch(Batch(x1=case.x), mesh), {"bare": plain}
        for method in (flow_matching, lagrangian):
            state = [training.init(case.params, tx, mesh=mesh)]
            step = training.make_step(method(case.net).loss, tx, mesh=mesh)

            def run(state=state, step=step, batch=batch):
                state[0], metrics = step(state[0], batch, key)
                return metrics

            functions[method.__name__] = run
        spent = interleaved(functions, repeats)
        for way in ("flow_matching", "lagrangian"):
            row = {"network": name, "method": way, "bare_ms": spent["bare"].ms, "ms": spent[way].ms}
            row |= spent[way].over(spent["bare"]) | {"goal": 1.05 if way == "flow_matching" else "-"}
            rows.append(row | {"to flow matching": spent[way].cpu_ms / spent["flow_matching"].cpu_ms})
    return rows


def marginal_sets(repeats: int) -> list[dict]:
    """Building marginals, to the files written and synced, against ``NFE`` calls of the bare network a batch.

    The clock starts after the first batch, which waits for the compiler (``first_s``). Goal: 1.05.
    """
    n, batches, rows = 4, 5, []
    for name, case in networks().items():
        velocity, size, first = views.velocity_view(case.net), len(case.x), {}

        def build(direction, case=case, velocity=velocity, size=size, first=first):
            marks, start = [], now()
            count, shape = batches * size, case.x.shape[1:]
            starts = {"forward": {"count": count, "shape": shape}, "backward": {"data": np.zeros((count, *shape), "f")}}
            with tempfile.TemporaryDirectory() as folder:
                correction.build_marginals(
                    velocity, case.params, grids.uniform_grid(n), directory=folder, direction=direction, flow="bench",
                    batch=size, shard_size=count, progress=lambda *_: marks.append(now()), **starts[direction],
                )  # fmt: skip
                spent = since(marks[1])
            first[direction] = (marks[1].ms - start.ms) / 1e3
            return spent

        measured = {"network": bare(case)}
        measured |= {d: functools.partial(build, d) for d in ("forward", "backward")}
        spent = interleaved(measured, repeats)
        call = spent["network"]
        for direction in ("forward", "backward"):
            nfe = 4 * n * (batches - 1)
            row = {"network": name, "call_ms": call.ms / CALLS, "direction": direction, "calls": nfe}
            row |= {"ms": spent[direction].ms} | spent[direction].over(call, nfe / CALLS)
            rows.append(row | {"goal": 1.05, "first_s": first[direction]})
    return rows


class Noise:
    """``[n, 32, 32, 3]`` normal numbers that are drawn when they are read: data larger than the memory."""

    dtype, ndim = np.dtype(np.float32), 4

    def __init__(self, n: int):
        self.shape = (n, 32, 32, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        rows = range(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        return np.stack([np.random.default_rng(int(i)).standard_normal(self.shape[1:], np.float32) for i in rows])


def use_set(what: str, count: int, folder: str) -> float:
    """Build a set of five times by Euler steps in ``folder``, or read batches; return this process's peak in MB."""
    if what == "read":
        batch = correction.marginal_batches(correction.read_marginals(folder, stream=True), batch_size=128, seed=0)
        for step in range(count // 64):  # about twice as many examples as there are
            batch(step)
    else:
        start = {"count": count, "shape": (32, 32, 3)} if what == "forward" else {"data": Noise(count)}
        velocity = lambda params: lambda x, t, cond=None: params * x
        options = {"direction": what, "solver": "euler", "batch": 128, "shard_size": 512, "flow": "bench"}
        correction.build_marginals(
            velocity, jnp.float32(0.1), grids.uniform_grid(4), directory=folder, **options, **start
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def marginal_memory(repeats: int) -> list[dict]:
    """The peak of memory of a separate process that builds a set, or reads shuffled batches from it (``stream``).

    Flat in the number of examples: goal, the larger set's peak at most 1.05 of the smaller one's. Measured once,
    whatever ``repeats``.
    """
    rows = []
    for what in ("forward", "backward", "read"):
        peaks = []
        for count in (1000, 8000):
            with tempfile.TemporaryDirectory() as folder:
                for part in ("backward", "read") if what == "read" else (what,):
                    code = f"from launch.bench import costs as b; print(b.use_set({part!r}, {count}, {folder!r}))"
                    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                size = sum(p.stat().st_size for p in Path(folder).iterdir()) / 2**20
            peaks.append(float(done.stdout.split()[-1]))
            row = {
                "what": what,
                "examples": count,
                "disk_MB": size,
                "peak_MB": peaks[-1],
                "ratio": peaks[-1] / peaks[0],
            }
            rows.append(row | {"goal": 1.05})
    return rows


SUITES = (couplings, sampler, train_step, marginal_sets, marginal_memory)
