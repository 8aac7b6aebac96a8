"""Suites of ``launch.bench``: flow maps."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fmjax.keys import example_keys
from fmjax.methods.eulerian import eulerian
from fmjax.methods.flow_map_matching import flow_map_matching
from fmjax.methods.flow_matching import flow_matching
from fmjax.methods.lagrangian import lagrangian
from fmjax.methods.progressive import progressive
from fmjax.nets.adapters import from_linen
from fmjax.nets.dit import DiT
from fmjax.nets.unet import UNet
from fmjax.types import Batch
from launch.bench.measure import interleaved


class Case(NamedTuple):
    """A method and the FLOPs it may cost relative to flow matching, whole batch on the term and at 3/4 on the diagonal.

    ``None`` where no goal was set.
    """

    make: Callable
    whole: float | None = None
    split: float | None = None


conditional = functools.partial(eulerian, velocity="conditional", tangent="conditional")
METHODS = {
    "mean flow": Case(conditional, 1.35, 1.10),
    "ESD, all stopped": Case(eulerian, 1.35, 1.10),
    "ESD, Jacobian stopped": Case(functools.partial(eulerian, stop="jacobian"), 2.0, 1.25),
    "ESD, velocity stopped": Case(functools.partial(eulerian, stop="velocity")),
    "PSD": Case(progressive, 1.70, 1.20),
    "LSD": Case(lagrangian, 2.35, 1.35),
    "LSD, tangent stopped": Case(functools.partial(lagrangian, stop="tangent"), 1.67),
    "FMM": Case(flow_map_matching, 3.2),
}
FRACTIONS = (0.0, 0.75)


class Setting(NamedTuple):
    """A network, the one that flow matching has beside it, the shape of a batch, and the methods to measure."""

    module: object
    base: object
    shape: tuple[int, ...]
    methods: tuple[str, ...] = tuple(METHODS)


def settings() -> dict[str, Setting]:
    """A DiT of 6 layers on 64 tokens, unrolled, by default, and all recomputed against nothing; a U-Net."""
    dit = functools.partial(DiT, width=256, depth=6, heads=4)
    plain, scanned, unet = dit(scan=False, remat="none"), dit(remat="none"), UNet(channels=32, multipliers=(1, 2))
    return {
        "DiT, unrolled": Setting(plain, plain, (16, 16, 16, 4)),
        "DiT, scanned": Setting(dit(), dit(), (16, 16, 16, 4)),
        "DiT, scanned, remat full": Setting(dit(remat="full"), scanned, (16, 16, 16, 4), ("LSD",)),
        "U-Net": Setting(unet, unet, (16, 16, 16, 1)),
    }


class Compiled(NamedTuple):
    """A compiled gradient as a call without arguments, its FLOPs and its peak of temporary memory in bytes."""

    call: Callable
    flops: float
    temp: int


def gradient(module, shape: tuple[int, ...], make: Callable) -> Compiled:
    """``value_and_grad`` of a loss, its target the parameters themselves."""
    model, x = from_linen(module), jax.random.normal(jax.random.key(0), shape)
    params, keys = model.init(jax.random.key(1), x), example_keys(jax.random.key(2), jnp.arange(shape[0]))
    loss = make(model.net).loss

    def run(params, x, keys):
        return jax.value_and_grad(lambda p: loss(p, params, Batch(x), keys), has_aux=True)(params)

    compiled = jax.jit(run).lower(params, x, keys).compile()
    flops, temp = compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes
    return Compiled(lambda: compiled(params, x, keys), flops, temp)


def map_costs(repeats: int) -> list[dict]:
    """The gradient of every loss of a flow map against flow matching, same network, batch of 16, float32.

    ``FLOPs`` and ``memory`` (peak of temporaries) are XLA's, ``time`` is the ratio of the medians of processor time.
    XLA counts the body of a scan once: FLOPs are given for unrolled networks alone. ``diagonal`` is the fraction of
    the batch on the flow-matching term. ``remat full`` is measured against flow matching without it.

    The velocity of the network costs one evaluation more than the velocity of the data: "ESD, all stopped" costs at
    least 5/3: teacher 1, primal 1, tangent 1, backward 2, over the 3 of flow matching. With the Jacobian stopped it is
    8/3: teacher 1, primal 1, a tangent for the value and one for the gradient 2, backward through the primal and the
    tangent in time 4. LSD is 7/3, and more where attention, bilinear in the tangents, is a part of the whole.
    """
    rows = []
    for name, setting in settings().items():
        base = gradient(setting.base, setting.shape, flow_matching)
        built, functions = {}, {"flow matching": base.call}
        for way in setting.methods:
            for fraction in FRACTIONS:
                make = functools.partial(METHODS[way].make, diagonal=fraction)
                built[way, fraction] = gradient(setting.module, setting.shape, make)
                functions[way, fraction] = built[way, fraction].call
        spent = interleaved(functions, repeats)
        for (way, fraction), program in built.items():
            goal = METHODS[way].split if fraction else METHODS[way].whole
            row = {"network": name, "method": way, "diagonal": fraction}
            row |= {"FLOPs": "-" if "scanned" in name else program.flops / base.flops, "goal": goal or "-"}
            row |= {"memory": program.temp / base.temp}
            rows.append(row | {"time": spent[way, fraction].cpu_ms / spent["flow matching"].cpu_ms})
    return rows


SUITES = (map_costs,)
