"""Suites of ``launch.bench``: networks. Batches are divided over JAX's devices; torch has as many threads as cores."""

import functools
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fmjax.nets.adapters import from_linen
from fmjax.nets.dit import DiT
from fmjax.nets.unet import UNet
from fmjax.training import sharding
from launch.bench.measure import interleaved


def stepper(module, shape: tuple[int, ...]) -> tuple[Callable[[], object], dict]:
    """One step, forward, backward and Adam on a squared error, each call the next; and facts of its compilation."""
    model, tx, mesh = from_linen(module), optax.adam(2e-4), sharding.make_mesh()
    x, t = jax.random.normal(jax.random.key(0), shape), jnp.linspace(0.0, 1.0, shape[0])
    params = model.init(jax.random.key(1), x)
    x, t = sharding.place_batch((x, t), mesh)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, t):
        value, grads = jax.value_and_grad(lambda p: jnp.mean((model.net(p, x, t, t) - x) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    held = jax.device_put([params, tx.init(params)], sharding.replicated(mesh))
    began = time.perf_counter()
    lowered = step.lower(*held, x, t)
    traced = time.perf_counter()
    compiled = lowered.compile()
    facts = {"trace_s": traced - began, "compile_s": time.perf_counter() - traced}
    facts |= {"temp_MB": compiled.memory_analysis().temp_size_in_bytes / 2**20}
    facts |= {"parameters": sum(a.size for a in jax.tree.leaves(params))}

    def run():
        *held[:], value = compiled(*held, x, t)
        return value

    return run, facts


def layers(repeats: int) -> list[dict]:
    """A DiT with its layers scanned and unrolled, each with and without recomputing its blocks; compiled uncached."""
    rows = []
    jax.config.update("jax_enable_compilation_cache", False)
    networks = {
        "12 layers of 192, 64 tokens": ({"width": 192, "heads": 3}, (16, 16, 16, 4)),
        "DiT-S/2, 256 tokens": ({}, (4, 32, 32, 4)),
    }
    for name, (sizes, shape) in networks.items():
        functions, facts = {}, {}
        for scan in (False, True):
            for remat in ("none", "dots", "full"):
                way = ("scanned" if scan else "unrolled", remat)
                functions[way], facts[way] = stepper(DiT(**sizes, scan=scan, remat=remat), shape)
        spent = interleaved(functions, repeats)
        for way, first in facts.items():
            row = {"network": name, "layers": way[0], "remat": way[1], "trace_s": first["trace_s"]}
            row |= {"compile_s": first["compile_s"], "temp_MB": first["temp_MB"], "ms": spent[way].ms}
            rows.append(row | spent[way].over(spent["unrolled", "none"]))
    return rows


def torch(repeats: int) -> list[dict]:
    """A training step against torchcfm's U-Net: the same sizes, float32, forward, backward and Adam, batch 64.

    ``ratio`` above 1 says that ours is slower. On a CPU, run it with as many virtual devices as cores
    (``NPROC=32 XLA_FLAGS=--xla_force_host_platform_device_count=2``): in jaxlib 0.10.2 a convolution (YNNPACK) takes
    one thread, however many there are. ``OMP_WAIT_POLICY=passive`` keeps torch's threads from spinning on a busy
    machine, where they would be charged for the time of others.
    """
    try:
        import torch as th
        from torchcfm.models.unet.unet import UNetModelWrapper
    except ImportError as error:
        raise SystemExit(f"error: this suite needs the torch extra (pip install 'fmjax[torch]'): {error}") from None
    th.set_num_threads(os.cpu_count())
    rows = []
    for shape, multipliers in {(64, 28, 28, 1): (1, 2, 2), (64, 32, 32, 3): (1, 2, 2, 2)}.items():
        batch, height, width, colours = shape
        net = UNetModelWrapper(
            dim=(colours, height, width), num_channels=32, num_res_blocks=1, channel_mult=multipliers,
            num_heads=4, attention_resolutions=str(height // 2),
        )  # fmt: skip
        x, t = th.randn(batch, colours, height, width), th.linspace(0, 1, batch)
        tx = th.optim.Adam(net.parameters(), 2e-4)

        def theirs(net=net, x=x, t=t, tx=tx):
            tx.zero_grad()
            loss = ((net(t, x) - x) ** 2).mean()
            loss.backward()
            tx.step()
            return loss.item()

        sizes = {"channels": 32, "multipliers": multipliers, "attention": (height // 2,)}
        same, facts = stepper(UNet(**sizes, film=False, per_group=1, spectrum="slow"), shape)
        film, _ = stepper(UNet(**sizes), shape)
        assert facts["parameters"] - 64 * 128 == sum(p.numel() for p in net.parameters())
        spent = interleaved({"torchcfm": theirs, "fmjax, the same": same, "fmjax, its defaults": film}, repeats)
        for name, s in spent.items():
            row = {"images": "x".join(map(str, shape)), "network": name, "ms": s.ms, "cpu_ms": s.cpu_ms}
            rows.append(row | s.over(spent["torchcfm"]))
    return rows


SUITES = (layers, torch)
