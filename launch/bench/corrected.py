"""Suites of ``launch.bench``: a learned flow and its flow map, corrected, in the layout of the paper's table."""

import functools
from typing import Any

import jax.numpy as jnp

from fmjax import sampling
from fmjax.correction import correctors, search
from fmjax.experiments import assemble
from fmjax.sampling import grids
from fmjax.training import loop
from launch.bench.beds import (
    ALL,
    AT,
    LANGEVIN,
    LONG,
    SHORT,
    SIGMA,
    Sampler,
    bed,
    chosen,
    config,
    corrector,
    drifted,
    flops,
    measured,
    pushed,
    residual,
    restarted,
    sampler,
    sets,
)


def table(name: str) -> list[dict]:
    """The paper's table: base steps without correction, correctors of 1, 3, 5, 11 steps, residual field, N = 50."""
    b = bed(name)
    velocity = b.plan.method.velocity
    pairs = {
        n: sets(b, f"rk4-{n}", velocity, b.flow, grids.uniform_grid(n), count)
        for n, count in zip((SHORT, LONG), b.problem.examples, strict=True)
    }
    fixes = {(kind, n): corrector(b, kind, f"{n}", *pairs[n]) for kind in b.problem.at for n in pairs}
    field, r = residual(b)
    unit = flops(velocity, b.flow, b)
    weight = {kind: flops(method.direction, params, b) / unit for (kind, _), (method, params) in fixes.items()}
    rows = []
    plain = lambda params: sampling.rk4(velocity(params["flow"]))
    for n in b.problem.base:
        label = {"corrector": "none", "steps": n, "corrected at": "-"}
        cost = sampling.cost(n, step_nfe=4)
        rows.append(Sampler(label, sampler(b, plain, n), {"flow": b.flow}, n, cost=cost, evaluations=4 * n))
    both = lambda params: sampling.rk4(field.velocity(params["residual"]))
    label, cost = {"corrector": "residual", "steps": SHORT, "corrected at": "-"}, sampling.cost(SHORT, step_nfe=4)
    rows.append(Sampler(label, sampler(b, both, SHORT), {"residual": r}, SHORT, (), "residual", cost, 8 * SHORT))
    best: dict[Any, search.Placement] = {}
    for steps, trained in ((SHORT, SHORT), (LONG, SHORT), (LONG, LONG)):
        for kind, places in (b.problem.at if steps == SHORT else b.problem.at_long).items():
            method, params = fixes[kind, trained]
            for place in places:
                at = sampling.same_times(place, grids.uniform_grid(SHORT), grids.uniform_grid(steps))
                draw = sampler(b, plain, steps, at, pushed(method))
                where = "all of n = 0 .. 10" if place == ALL else ", ".join(map(str, at))
                label = {"corrector": f"{kind}, trained at N = {trained}", "steps": steps, "corrected at": where}
                cost = sampling.cost(steps, at, step_nfe=4, corrector_nfe=1 + ("classifier" in kind))
                worth = 4 * steps + weight[kind] * len(at)
                row = Sampler(label, draw, {"flow": b.flow, "fix": params}, steps, at, kind, cost, worth)
                if steps == SHORT:
                    best[kind, place] = chosen(b, row)
                else:  # alpha' = c alpha at the shared times, one number to choose
                    strength = best[kind, place].moved(SHORT, LONG)
                    row = row._replace(candidates=tuple(strength.times(fraction) for fraction in b.problem.shares))
                rows.append(row)
    method, params = fixes["score", SHORT]
    walk = {"step": SIGMA**2 / 2, "steps": LANGEVIN}
    langevin = lambda params, alpha, beta: correctors.langevin(method.score(params["fix"]), **walk)
    p, q = pairs[SHORT]
    bank = {"p": jnp.asarray(p.x), "q": jnp.asarray(q.x)}
    more = (  # without training, or by no more than a trained score
        (f"score, {LANGEVIN} Langevin steps", langevin, {"fix": params}, LANGEVIN, "langevin"),
        ("kernel drift", drifted(p.ts), {"bank": bank}, 0, "drift"),
        *((f"restart to {to:g}, 4 RK4 steps", restarted(plain, to, 4), {}, 16, "restart") for to in (0.25, 0.5, 0.75)),
    )
    for name, fix, arrays, nfe, kind in more:
        label, at = {"corrector": name, "steps": SHORT, "corrected at": f"{SHORT}"}, (SHORT,)
        cost = sampling.cost(SHORT, at, step_nfe=4, corrector_nfe=nfe)
        draw = sampler(b, plain, SHORT, at, fix)
        rows.append(Sampler(label, draw, {"flow": b.flow, **arrays}, SHORT, at, kind, cost, 4 * SHORT + nfe))
    return measured(b, rows)


def corrections_digits(repeats: int) -> list[dict]:
    """Corrections of a flow of the digits, in the layout of the paper's table."""
    return table("digits")


def corrections_mnist(repeats: int) -> list[dict]:
    """Corrections of a small flow of MNIST, in the layout of the paper's table."""
    return table("mnist")


def corrected_maps(repeats: int) -> list[dict]:
    """Flow maps of the digits with 1, 2 and 4 jumps, corrected: their own marginals, by their own inverse.

    The correction of a row is trained on the marginals of the grid of the row; a restart needs none. Rows with more
    jumps and equal NFE are there to compare.
    """
    b = bed("digits")
    cfg = config(b.problem)
    plan = assemble.assemble(cfg, "flow_map", data=b.data)
    params = loop.train(plan, b.folder / "flow_map", params=loop.merge_parameters(plan, b.flow)).ema
    view = plan.method.flow_map
    unit = flops(b.plan.method.velocity, b.flow, b)
    jump = lambda params: view(params["map"])
    rows = []
    for n in (1, 2, 4):
        label = lambda corrector, where: {"corrector": corrector, "jumps": n, "corrected at": where}  # noqa: B023
        cost = functools.partial(sampling.cost, n)
        rows.append(Sampler(label("none", "-"), sampler(b, jump, n), {"map": params}, n, cost=cost(), evaluations=n))
        # the last jumps of a learned map reach the images to no less than this, relative rms
        options = {"solver": "flow_map", "backward_map": "inverse", "tol": 0.1}
        p, q = sets(b, f"map-{n}", view, params, grids.uniform_grid(n), b.data.train.count, **options)
        bank = {"p": jnp.asarray(p.x), "q": jnp.asarray(q.x)}
        for kind in AT:
            method, trained = corrector(b, kind, f"map-{n}", p, q)
            worth = flops(method.direction, trained, b) / unit
            for at in ((n,), tuple(range(n + 1))):
                where = "end" if len(at) == 1 else "all"
                row = Sampler(
                    label(kind, where),
                    sampler(b, jump, n, at, pushed(method)),
                    {"map": params, "fix": trained},
                    n,
                    at,
                    kind,
                )
                each = cost(at, 1 + ("classifier" in kind))
                rows.append(row._replace(cost=each, evaluations=n + worth * len(at)))
        arrays = {"map": params, "bank": bank}
        row = Sampler(label("kernel drift", "end"), sampler(b, jump, n, (n,), drifted(p.ts)), arrays, n, (n,), "drift")
        rows.append(row._replace(cost=cost((n,), corrector_nfe=0), evaluations=n))
        for to in (0.25, 0.5, 0.75):
            draw = sampler(b, jump, n, (n,), restarted(jump, to))
            row = Sampler(label(f"restart to {to:g}", "end"), draw, {"map": params}, n, (n,), "restart")
            rows.append(row._replace(cost=cost((n,)), evaluations=n + 1))
    for n in (3, 5, 6, 8):  # as many evaluations as corrections take above
        name = {"corrector": "none", "jumps": n, "corrected at": "-"}
        rows.append(Sampler(name, sampler(b, jump, n), {"map": params}, n, cost=sampling.cost(1, n), evaluations=n))
    return measured(b, rows)


SUITES = (corrections_digits, corrections_mnist, corrected_maps)
