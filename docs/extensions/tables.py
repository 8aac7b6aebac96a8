"""Draw the figures of the results from the tables on their pages.

A table lies between ``<!-- SUITE -->`` and ``<!-- end -->``; ``FIGURES`` says how each one is drawn. The pictures go to
``docs/results/figures`` before Sphinx reads the sources:

    python docs/extensions/tables.py    # draw them without building the site
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from plots import COLOURS, bars, by_cell, by_column, curves, dots, heat, new_axes, number, plain_ticks

RESULTS = Path(__file__).parents[1] / "results"


def setup(app):
    """Draw the figures before Sphinx reads the sources."""
    app.connect("builder-inited", lambda app: main())
    app.connect("doctree-resolved", _mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def main() -> None:
    """Draw every figure that is missing or older than its page."""
    (RESULTS / "figures").mkdir(exist_ok=True)
    for page in sorted(RESULTS.glob("*.md")):
        rows = tables(page.read_text())
        for name in figures_of(rows):
            path = RESULTS / "figures" / f"{name}.png"
            newest = max(page.stat().st_mtime, Path(__file__).stat().st_mtime)
            if not (path.exists() and path.stat().st_mtime > newest):
                _save(FIGURES[name](rows[SECOND.get(name, name)]), path)


def figures_of(suites) -> set[str]:
    """Return the names of the figures that draw the tables of some suites."""
    return {name for name in FIGURES if SECOND.get(name, name) in suites}


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Return the rows of every table between marks, by suite."""
    result = {}
    for suite, body in re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL):
        lines = [
            [cell.strip() for cell in line.strip("|\n ").split("|")]
            for line in body.split("\n")
            if line.startswith("|")
        ]
        result[suite] = [dict(zip(lines[0], line, strict=False)) for line in lines[2:]]
    return result


def known_errors(rows):
    """Draw the KL with 10 RK4 steps by corrector and by error of the flow."""
    rows = [r for r in rows if r["solver"] == "rk4"]
    errors = list(dict.fromkeys(r["error"] for r in rows))
    names = [
        n
        for n in dict.fromkeys(r["corrector"] for r in rows)
        if any(number(r["KL, N=10"])[0] > 0 for r in rows if r["corrector"] == n)
    ]
    cell = {(r["corrector"], r["error"]): number(r["KL, N=10"])[0] for r in rows}
    values = [[max(cell.get((n, e), float("nan")), 1e-4) for e in errors] for n in names]
    return heat(
        names,
        [f"{e} error" if e == "none" else e for e in errors],
        values,
        title="KL, 10 RK4 steps (values below 0.0001 as 0.0001)",
        digits=2,
    )


def allocations(rows):
    """Draw FD-small by model and by the numbers of steps in the two halves."""
    columns = [c for c in rows[0] if c.startswith("(")]
    rows = [r for r in rows if number(r[columns[0]])[0] == number(r[columns[0]])[0]]
    labels = [r["straightened"] + (f", {r['parameters']}" if r["parameters"] != "-" else "") for r in rows]
    values = [[number(r[c])[0] for c in columns] for r in rows]
    return heat(labels, columns, values, title="FD-small", xlabel="Euler steps (noise half, data half)")


def spectra(rows):
    """Draw the fraction of the power at low frequencies by model and allocation."""
    columns = [c for c in rows[0] if c.startswith("(")]
    rows = [r for r in rows if number(r[columns[1]])[0] == number(r[columns[1]])[0]]
    values = [[number(r[c])[0] for c in columns] for r in rows]
    labels = [f"{r['data']}: {r['straightened']}" for r in rows]
    return heat(
        labels,
        columns,
        values,
        title="fraction of the error's power below 1/5 cycle per pixel",
        xlabel="Euler steps (noise half, data half)",
    )


def baselines(rows):
    """Draw FD-small against the evaluations for both data sets, side by side."""
    figure, both = new_axes((9.6, 4.4), count=2)
    kinds = {
        "straight halves, gated": lambda s: s.startswith("both halves"),
        "straight noise half": lambda s: s.startswith("noise half"),
        "straight data half": lambda s: s.startswith("data half"),
        "full reflow": lambda s: s.startswith("full reflow"),
        "teacher, Euler": lambda s: s.startswith("teacher, Euler,"),
        "teacher, Heun (EDM)": lambda s: "EDM's Heun" in s,
        "teacher, DPM-Solver++(2M)": lambda s: "DPM" in s,
        "teacher, grid of GITS": lambda s: "GITS" in s,
        "teacher, many steps": lambda s: s.startswith("teacher, heun"),
    }  # fmt: skip
    for axes, data in zip(both, ("digits", "mnist"), strict=True):
        for i, (name, matches) in enumerate(kinds.items()):
            points = sorted(
                (number(r["NFE"])[0], number(r["FD-small"])[0])
                for r in rows
                if r["data"] == data and matches(r["sampler"])
            )
            axes.plot(
                *zip(*points, strict=True), "o-" if len(points) > 1 else "*", color=COLOURS[i], ms=5, lw=1.4, label=name
            )
        axes.set(xscale="log", yscale="log", xlabel="NFE", ylabel="FD-small", title=data)
        plain_ticks(axes)
    both[1].legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def map_costs(rows):
    """Draw the FLOPs of the U-Net's losses, for both fractions on the diagonal."""
    rows = [r for r in rows if r["network"] == "U-Net"]
    merged = {}
    for r in rows:
        merged.setdefault(r["method"], {"method": r["method"]})[f"diagonal {r['diagonal']}"] = r["FLOPs"]
    values = ("diagonal 0", "diagonal 0.75")
    return bars(
        list(merged.values()),
        label=lambda r: r["method"],
        values=values,
        xlabel="FLOPs of a training step / flow matching (U-Net)",
    )


def corrected_maps(rows):
    """Draw FD-small against the evaluations, one line per corrector."""
    best = [r for r in rows if r["corrected at"] in ("-", "end")]
    return curves(best, y="FD-small", series=lambda r: "" if r["corrector"] == "training data" else r["corrector"])


def segments(rows):
    """Draw the straightness of both halves by model, on the digits."""
    rows = [r for r in rows if r["data"] == "digits"]
    values = [[number(r[c])[0] for c in ("straightness, noise half", "data half")] for r in rows]
    return heat(
        [r["straightened"] for r in rows], ["noise half", "data half"], values, title="straightness defect, digits"
    )


def _family(row) -> str:
    return "" if row["sampler"] == "training data" else re.split(r",| \d", row["sampler"])[0]


def _method(row) -> str:
    return "" if row["method"] == "-" else row["method"]


def _corrector(row) -> str:
    name, at = row["corrector"].replace(", trained at N = 10", ""), row["corrected at"].replace("of n = 0 .. 10", "")
    return f"{name}, at {at.strip()} ({row['NFE']} NFE)"


def _place(row) -> str:
    return f"{row['sampler']}: {row['corrector']} at t = {row['at t']} ({row['NFE']} NFE)"


def _changes(rows):
    return dots([r for r in rows if r["steps"] == "10"], label=_corrector, **_CHANGE)


def _of_network(key: str):
    return lambda row: f"{row['network']}: {row[key]}"


_CHANGE = {"value": "FD-small, change", "xlabel": "change of FD-small, ± 2 standard errors"}
_RATIO = {"values": ("cpu_ratio",), "goal": 1.05, "xlabel": "processor time / bare calls of the network"}
_STEP = _RATIO | {"xlabel": "processor time / bare training step of flow matching"}
_JUMP = {"values": ("gaussian, 0 to 1", "mixture, 0 to 1"), "xlabel": "relative error of the jump from 0 to 1"}
_SKIP = ("ESD", "perfect samples", "LSD as published")
_WHERE = {"row": "corrector", "column": "corrected at", "xlabel": "corrected at step"}
_ten = lambda row: row["steps"] == "10" and row["corrected at"] != "-"
_noisy = lambda row: row["corrections"] != "0" or "noise" in row["sampler"]
SECOND = {"corrections_digits_steps": "corrections_digits"}  # figure: the suite whose table it draws, too
FIGURES = {
    "digits": partial(curves, y="FD-small", series=_family, hollow=_noisy),
    "fashion_mnist": partial(curves, y="FD-small", series=_method),
    "digits_maps": partial(curves, y="FD-small", series=_method),
    "mnist_maps": partial(curves, y="FD-small", series=_method),
    "checkerboard_maps": partial(by_column, prefix="KL", skip=_SKIP),
    "oracle_maps": partial(bars, label=lambda row: row["method"], **_JUMP),
    "map_costs": map_costs,
    "correction_toy": known_errors,
    "corrections_digits": _changes,
    "corrections_mnist": _changes,
    "corrections_digits_steps": partial(by_cell, value="FD-small", title="FD-small, 10 RK4 steps", keep=_ten, **_WHERE),
    "corrected_maps": corrected_maps,
    "pushed_digits": partial(by_cell, row="correction", column="sampler", value="FD-small", title="FD-small"),
    "pushed_fashion": partial(bars, label=lambda row: row["sampler"], values=("FD-small",), xlabel="FD-small"),
    "pushed_toy": partial(
        by_cell, row="corrector", column="error", value="W2, N=10", title="sliced W2, 10 RK4 steps",
        keep=lambda row: row["solver"] in ("rk4", "-"),
    ),
    "pushed_lam": partial(by_cell, row="error", column="lam", value="KL", title="KL", xlabel="lam", digits=2),
    "push_theory": partial(
        bars, label=lambda row: f"{row['error']}, lam {row['lam']}", values=("left over", "predicted"),
        xlabel="what is left, in units of the gap before",
    ),
    "half_straightening_digits": allocations,
    "half_straightening_mnist": allocations,
    "straightened_baselines": baselines,
    "straightened_segments": segments,
    "straightened_spectra": spectra,
    "straightened_corrected": partial(dots, label=_place, **_CHANGE),
    "sampler": partial(bars, label=_of_network("sampler"), **_RATIO),
    "train_step": partial(bars, label=_of_network("method"), **_STEP),
    "marginal_sets": partial(bars, label=_of_network("direction"), **_RATIO),
    "marginal_memory": partial(
        bars, label=lambda row: f"{row['what']}, {row['examples']} examples", values=("ratio",), goal=1.05,
        xlabel="peak memory / of 1000 examples",
    ),
    "imports": partial(
        bars, label=lambda row: row["modules"], values=("ratio",), goal=1.3, xlabel="time / jax and others"
    ),
    "start": partial(bars, label=lambda row: f"{row['cache']} cache", values=("s",), xlabel="seconds to first step"),
    "torch": partial(
        bars, label=lambda row: f"{row['images']}: {row['network']}", values=("ratio",),
        xlabel="time of a training step / torchcfm",
    ),
}  # fmt: skip


def _mark(app, doctree, page: str) -> None:
    """Give the tables of the results the class ``numbers``: their cells stay on one line."""
    from docutils import nodes

    for table in doctree.findall(nodes.table) if page.startswith("results/") and page != "results/index" else ():
        table["classes"].append("numbers")


def _save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
