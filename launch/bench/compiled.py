"""Suite of ``launch.bench``: what the TPU's own compiler says of training steps, without a TPU.

Needs libtpu (the extra ``tpu``); a program is compiled for the devices of a slice that is not there. The rows are kept
in ``workdir/bench/tpu`` and not compiled twice.
"""

import json
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

from configs import cifar10, imagenet64
from fmjax import methods, nets, training
from fmjax.experiments import build
from fmjax.experiments.spending import products
from fmjax.training import sharding
from fmjax.types import Batch
from launch.bench.measure import FOLDER

MB = 2**20
SLICES = {"v5e:2x4": 16 * 1024, "v5p:2x2x1": 95 * 1024}  # memory of a chip in MiB
ROWS = 32  # examples a chip
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "f64": 8, "s64": 8, "u64": 8}


def collectives(program: str) -> dict[str, tuple[int, float]]:
    """Of each kind of collective in a compiled program: how many stand in it, and the MiB that they return."""
    counts = {}
    for kind in KINDS:
        total, lines = 0, re.findall(rf"= (.*?) {kind}(?:-start)?\(", program)
        for shapes in lines:
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
                total += BYTES.get(dtype, 4) * int(np.prod([int(n) for n in sizes.split(",") if n] or [1]))
        if lines:
            counts[kind] = len(lines), total / MB
    return counts


def networks() -> dict[str, tuple[nets.Model, tuple[int, ...], int]]:
    """Networks in bfloat16, the shape of an example, and the number of classes."""
    unet = lambda module: dict(module.get_config().net.to_dict(), dtype="bfloat16")
    return {
        "DiT-B/2": (build.net({"name": "dit", "size": "B", "dtype": "bfloat16"}), (32, 32, 4), 0),
        "U-Net, CIFAR-10": (build.net(unet(cifar10)), (32, 32, 3), 0),
        "U-Net, ImageNet-64": (build.net(unet(imagenet64), classes=1000), (64, 64, 3), 1000),
    }


def _row(name: str, method: str, fsdp: bool, place: str) -> dict:
    model, shape, classes = networks()[name]
    devices = topologies.get_topology_desc(place, platform="tpu").devices
    mesh, tx = sharding.make_mesh(devices), optax.adam(1e-4)
    count = ROWS * len(devices)
    cond = jax.ShapeDtypeStruct((count,), jnp.int32) if classes else None
    batch, key = Batch(jax.ShapeDtypeStruct((count, *shape), jnp.float32), cond=cond), jax.random.key(0)
    params = jax.eval_shape(model.init, key, batch.x1, cond)
    loss = getattr(methods, method)(model.net).loss
    alone = lambda params, batch: loss(params, params, batch, key)[0]
    every = list(products(jax.make_jaxpr(jax.grad(alone))(params, batch).jaxpr))
    flops = sum(n for _, n in every)
    begin = time.perf_counter()
    step = training.make_step(loss, tx, mesh=mesh, fsdp=fsdp)
    program = step.lower(training.init(params, tx, mesh=mesh, fsdp=fsdp), batch, key, platform="tpu").compile()
    memory, hbm = program.memory_analysis(), SLICES[place]
    used = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / MB
    text = "; ".join(f"{n} {kind}, {size:.0f} MiB" for kind, (n, size) in collectives(program.as_text()).items())
    return {
        "network": name, "method": method, "slice": place, "parameters": "split" if fsdp else "whole",
        "examples": count, "arguments_MiB": memory.argument_size_in_bytes / MB,
        "temporaries_MiB": memory.temp_size_in_bytes / MB, "of_HBM": f"{used / hbm:.1%}",
        "TFLOP_a_chip": float(flops / len(devices) / 1e12),
        "in_bfloat16": f"{sum(n for kind, n in every if kind == jnp.bfloat16) / flops:.1%}",
        "collectives": text, "compile_s": time.perf_counter() - begin,
    }  # fmt: skip


def tpu(repeats: int) -> list[dict]:
    """Memory, operations and collectives of training steps on TPU slices, by the compiler; nothing is run.

    Matrix products and convolutions are counted from the traced loss and gradient, layers under a scan as often as they
    run; recomputation (``remat``) counts. Collectives are counted in the compiled program, in a loop once.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    rows, folder = [], FOLDER / "tpu"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("DiT-B/2", "U-Net, CIFAR-10", "U-Net, ImageNet-64"):
        for method, places in (("flow_matching", SLICES), ("lagrangian", ("v5e:2x4",))):
            for place in places:
                for fsdp in (False, True):
                    key = re.sub(r"\W+", "-", f"{name} {method} {place} {fsdp} {jax.__version__}")
                    if not (folder / f"{key}.json").exists():
                        (folder / f"{key}.json").write_text(json.dumps(_row(name, method, fsdp, place)))
                    rows.append(json.loads((folder / f"{key}.json").read_text()))
                    print({k: rows[-1][k] for k in ("network", "method", "slice", "parameters", "of_HBM", "compile_s")})
    return rows


SUITES = (tpu,)
