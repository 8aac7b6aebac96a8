"""Suites of ``launch.bench``: a learned flow and its flow map, corrected, in the layout of the paper's table."""

from typing import Any

from fmjax import correction, sampling
from fmjax.experiments import assemble
from fmjax.experiments.samplers import DRIFT, FLOW, FLOW_MAP
from fmjax.sampling import grids
from fmjax.training import loop
from launch.bench import beds
from launch.bench.beds import ALL, AT, LANGEVIN, LONG, SHORT, SIGMA, Bed, Row, bed, corrected, flops, plain, row, sets

TO = (0.25, 0.5, 0.75)  # times to which a restart goes back


def table(name: str) -> list[dict]:
    """Return the paper's table: base steps, correctors at 1, 3, 5 and 11 steps, the residual velocity, and N = 50."""
    b = bed(name)
    velocity = b.plan.method.velocity
    pairs = {
        n: sets(b, f"rk4-{n}", velocity, b.flow, grids.uniform_grid(n), count)
        for n, count in zip((SHORT, LONG), b.problem.examples, strict=True)
    }
    label = lambda corrector, steps, at="-": {"corrector": corrector, "steps": steps, "corrected at": at}
    flow = beds.networks(b)
    rows = [row(b, label("none", n), plain("rk4", n), flow, 4 * n) for n in b.problem.base]
    field, params = beds.residual(b)
    both = lambda p: field.velocity(p["residual"])  # the base is among its parameters
    method = b.plan.method._replace(velocity=both, score=None)
    added = beds.networks(b, {FLOW: method}, {FLOW: {"flow": b.flow, "residual": params}})
    rows.append(row(b, label("residual", SHORT), plain("rk4", SHORT), added, 8 * SHORT, "residual"))
    trained = {(kind, n): beds.corrector(b, kind, f"{n}", *pairs[n]) for kind in b.problem.at for n in pairs}
    rows += _trained_rows(b, trained, label)
    return beds.measured(b, rows + _training_free_rows(b, trained["score", SHORT], pairs[SHORT], label))


def _trained_rows(b: Bed, trained, label) -> list[Row]:
    """Return the rows of trained correctors, also of the short grid on the long one."""
    unit = flops(b.plan.method.velocity, b.flow, b)
    best: dict[Any, correction.Placement] = {}
    rows = []
    for steps, source in ((SHORT, SHORT), (LONG, SHORT), (LONG, LONG)):
        for kind, places in (b.problem.at if steps == SHORT else b.problem.at_long).items():
            method, params = trained[kind, source]
            models = beds.networks(b, {kind: method}, {kind: params})
            weight = flops(method.direction, params, b) / unit
            for place in places:
                at = sampling.same_times(place, grids.uniform_grid(SHORT), grids.uniform_grid(steps))
                where = "all of n = 0 .. 10" if place == ALL else ", ".join(map(str, at))
                name, sampler = f"{kind}, trained at N = {source}", corrected(plain("rk4", steps), kind, at)
                r = row(b, label(name, steps, where), sampler, models, 4 * steps + weight * len(at), kind)
                if steps == SHORT:
                    best[kind, place] = beds.chosen(b, r)
                else:  # alpha' = c alpha at the same times: only the factor c is chosen
                    moved = best[kind, place].moved(SHORT, LONG)
                    r = r._replace(candidates=tuple(moved.times(factor) for factor in b.problem.fractions))
                rows.append(r)
    return rows


def _training_free_rows(b: Bed, score, pair, label) -> list[Row]:
    """Return the rows of Langevin steps by the trained score, of the kernel drift and of restarts."""
    method, params = score
    p, q = pair
    base, at = plain("rk4", SHORT), (SHORT,)
    scored = b.plan.method._replace(
        velocity=lambda p: b.plan.method.velocity(p["flow"]), score=lambda p: method.score(p["score"])
    )
    learned = beds.networks(b, {FLOW: scored}, {FLOW: {"flow": b.flow, "score": params}})
    walk = {"step": SIGMA**2 / 2, "steps": LANGEVIN}
    drift = beds.networks(b, {}, beds.bank(p, q), ts=p.ts)
    entries = [
        (f"score, {LANGEVIN} Langevin steps", learned, corrected(base, "langevin", at, **walk), LANGEVIN, "langevin"),
        ("kernel drift", drift, corrected(base, DRIFT, at), 0, DRIFT),
    ]
    for to in TO:
        sampler = corrected(base, "restart", at, to=to, steps=4)
        entries.append((f"restart to {to:g}, 4 RK4 steps", beds.networks(b), sampler, 16, "restart"))
    return [
        row(b, label(name, SHORT, f"{SHORT}"), sampler, models, 4 * SHORT + worth, kind)
        for name, models, sampler, worth, kind in entries
    ]


def corrections_digits(repeats: int) -> list[dict]:
    """Corrections of a flow of the digits, in the layout of the paper's table."""
    return table("digits")


def corrections_mnist(repeats: int) -> list[dict]:
    """Corrections of a small flow of MNIST, in the layout of the paper's table."""
    return table("mnist")


def corrected_maps(repeats: int) -> list[dict]:
    """Corrected flow maps of the digits with 1, 2 and 4 jumps; marginals are built by the inverse of the map.

    The corrector of a row is trained on the marginals of the grid of the row; a restart needs no training. Rows with
    more jumps and equal NFE are shown for comparison.
    """
    b = bed("digits")
    plan = assemble.flow_map_plan(beds.configured(b.problem), b.data)
    params = loop.train(plan, b.folder / "flow_map", params=loop.merge_parameters(plan, b.flow)).ema
    models = beds.networks(b, {FLOW_MAP: plan.method}, {FLOW_MAP: params})
    unit = flops(b.plan.method.velocity, b.flow, b)
    label = lambda corrector, jumps, where="-": {"corrector": corrector, "jumps": jumps, "corrected at": where}
    rows = []
    for n in (1, 2, 4):
        base = plain(FLOW_MAP, n)
        rows.append(row(b, label("none", n), base, models, n))
        # the inverse of the last jump of a learned map reaches images only up to this residual (relative rms)
        options = {"solver": "flow_map", "backward_map": "inverse", "tol": 0.1}
        ts, count = grids.uniform_grid(n), b.data.train.count
        p, q = sets(b, f"map-{n}", plan.method.flow_map, params, ts, count, **options)
        for kind in AT:
            method, trained = beds.corrector(b, kind, f"map-{n}", p, q)
            weight = flops(method.direction, trained, b) / unit
            networks = beds.networks(b, {FLOW_MAP: plan.method, kind: method}, {FLOW_MAP: params, kind: trained})
            for where, at in (("end", (n,)), ("all", tuple(range(n + 1)))):
                sampler = corrected(base, kind, at)
                rows.append(row(b, label(kind, n, where), sampler, networks, n + weight * len(at), kind))
        drift = beds.networks(b, {FLOW_MAP: plan.method}, {FLOW_MAP: params, **beds.bank(p, q)}, ts=p.ts)
        rows.append(row(b, label("kernel drift", n, "end"), corrected(base, DRIFT, (n,)), drift, n, DRIFT))
        for to in TO:
            sampler = corrected(base, "restart", (n,), to=to)
            rows.append(row(b, label(f"restart to {to:g}", n, "end"), sampler, models, n + 1, "restart"))
    rows += [row(b, label("none", n), plain(FLOW_MAP, n), models, n) for n in (3, 5, 6, 8)]  # as many evaluations
    return beds.measured(b, rows)


SUITES = (corrections_digits, corrections_mnist, corrected_maps)
