"""Draw the figures of the results from the tables on their pages.

A table lies between ``<!-- SUITE -->`` and ``<!-- end -->``; ``FIGURES`` says how each one is drawn. The pictures go to
``docs/results/figures`` before Sphinx reads the sources:

    python docs/extensions/tables.py    # draw them without building the site
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
COLOURS = ("#1d4ed8", "#b45309", "#047857", "#7c3aed", "#be123c", "#0e7490", "#4d7c0f", "#a16207", "#475569", "#db2777")
MUTED = "#566074"


def setup(app):
    """Draw the figures before Sphinx reads the sources."""
    app.connect("builder-inited", lambda app: main())
    app.connect("doctree-resolved", _mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def main() -> None:
    """Draw every figure that is missing or older than its page."""
    (RESULTS / "figures").mkdir(exist_ok=True)
    for page in sorted(RESULTS.glob("*.md")):
        for suite, rows in tables(page.read_text()).items():
            path = RESULTS / "figures" / f"{suite}.png"
            newest = max(page.stat().st_mtime, Path(__file__).stat().st_mtime)
            if suite in FIGURES and not (path.exists() and path.stat().st_mtime > newest):
                _save(FIGURES[suite](rows), path)


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


def number(text: str) -> tuple[float, float]:
    """Return the mean and the error of a cell: ``3.4 ± 0.1``, ``(3 ± 6) × 10⁻⁵``, ``19.8 ± 0.4 / 0.03``, ``7``; nan."""
    text = text.replace("−", "-").split(" / ")[0]
    power = re.search(r"× 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", text)
    scale = 10.0 ** int(power[1].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))) if power else 1.0
    numbers = re.findall(r"-?\d+\.?\d*", text.split("×")[0])
    if not numbers:
        return float("nan"), 0.0
    return float(numbers[0]) * scale, (float(numbers[1]) * scale if len(numbers) > 1 else 0.0)


def curves(rows, *, y, series, x="NFE", floor="training data", hollow=None, ylabel=None):
    """Draw one metric against the evaluations, one line per series; ``hollow(row)`` rows are squares without a line."""
    figure, axes = _axes((6.4, 4))
    names = list(dict.fromkeys(series(row) for row in rows if series(row)))
    for i, name in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        for kind in (False, True):
            some = [r for r in rows if series(r) == name and bool(hollow and hollow(r)) == kind]
            points = sorted((number(r[x])[0], *number(r[y])) for r in some if number(r[y])[0] == number(r[y])[0])
            if points:
                style = {"fmt": "s", "mfc": "none"} if kind else {"fmt": "o-"}
                axes.errorbar(
                    *zip(*points, strict=True),
                    color=colour,
                    capsize=2.5,
                    ms=5,
                    lw=1.5,
                    label=name + " corrected" * kind,
                    **style,
                )
    _floor(axes, rows, y, floor)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per sample (NFE)", ylabel=ylabel or y)
    _plain_ticks(axes)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def by_column(rows, *, prefix, skip=(), label="method", xlabel="number of jumps or steps N"):
    """Draw columns ``prefix, N=1``, ``prefix, N=2``, ... against N, one line per row."""
    columns = [c for c in rows[0] if c.startswith(prefix)]
    x = [int(re.search(r"N=(\d+)", c)[1]) for c in columns]
    figure, axes = _axes((6.4, 4.6))
    rows = [r for r in rows if r[label] not in skip and number(r[columns[0]])[0] == number(r[columns[0]])[0]]
    for i, row in enumerate(rows):
        mean, se = zip(*(number(row[c]) for c in columns), strict=True)
        style = ("-", "--")[i // len(COLOURS)]
        axes.errorbar(
            x, mean, se, color=COLOURS[i % len(COLOURS)], ls=style, marker="o", ms=4, lw=1.4, label=row[label]
        )
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=prefix)
    axes.set_xticks(x, [str(n) for n in x])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=7.5, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def bars(rows, *, label, values, goal=None, xlabel):
    """Draw horizontal bars, one group per row and one colour per column of ``values``."""
    rows = [r for r in rows if any(number(r[v])[0] == number(r[v])[0] for v in values)]
    figure, axes = _axes((6.4, 0.8 + 0.3 * len(rows)))
    height = 0.8 / len(values)
    for j, value in enumerate(values):
        where = [i + (j - (len(values) - 1) / 2) * height for i in range(len(rows))]
        mean, se = zip(*(number(r[value]) for r in rows), strict=True)
        axes.barh(
            where, mean, height * 0.9, xerr=se if any(se) else None, color=COLOURS[j], label=value, error_kw={"lw": 1}
        )
    axes.set_yticks(range(len(rows)), [label(r) for r in rows])
    axes.invert_yaxis()
    if goal:
        axes.axvline(goal, color=MUTED, ls=":", label=f"goal {goal}")
    axes.set_xlabel(xlabel)
    if goal or len(values) > 1:
        axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def dots(rows, *, label, value, xlabel):
    """Draw one dot with its interval of two standard errors per row, and a line at zero."""
    rows = [r for r in rows if number(r[value])[0] == number(r[value])[0]]
    figure, axes = _axes((6.4, 0.8 + 0.24 * len(rows)))
    for i, row in enumerate(rows):
        mean, se = number(row[value])
        seen = abs(mean) > 2 * se
        colour = MUTED if not seen else COLOURS[2] if mean < 0 else COLOURS[4]
        axes.errorbar(mean, i, xerr=2 * se, fmt="o", color=colour, ms=4.5, capsize=2)
    axes.set_yticks(range(len(rows)), [label(r) for r in rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=MUTED, lw=1)
    if max(abs(number(r[value])[0]) for r in rows) > 10:
        axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel(xlabel)
    return figure


def heat(labels, columns, values, *, title, digits=3, xlabel=""):
    """Draw numbers as a heat map on a log scale, with the numbers in the cells."""
    import numpy as np
    from matplotlib.colors import LogNorm

    values = np.array(values, float)
    figure, axes = _axes((1.6 + 1.05 * len(columns) + 0.6, 1 + 0.3 * len(labels)), grid=False)
    positive = values[values > 0]
    image = axes.imshow(np.maximum(values, positive.min()), norm=LogNorm(), cmap="YlOrRd", aspect="auto")
    for i, j in np.ndindex(values.shape):
        if values[i, j] == values[i, j]:
            dark = image.norm(max(values[i, j], positive.min())) > 0.65
            axes.text(
                j,
                i,
                f"{values[i, j]:.{digits}g}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel(xlabel)
    axes.tick_params(length=0)
    return figure


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
    figure, both = _axes((9.6, 4.4), count=2)
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
        _plain_ticks(axes)
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
_noisy = lambda row: row["corrections"] != "0" or "noise" in row["sampler"]
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
    "corrected_maps": corrected_maps,
    "half_straightening_digits": allocations,
    "half_straightening_mnist": allocations,
    "straightened_baselines": baselines,
    "straightened_segments": segments,
    "straightened_spectra": spectra,
    "straightened_corrected": partial(dots, label=_place, **_CHANGE),
    "sampler": partial(bars, label=_of_network("sampler"), **_RATIO),
    "train_step": partial(bars, label=_of_network("method"), **_STEP),
    "marginal_sets": partial(bars, label=_of_network("direction"), **_RATIO),
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


def _axes(size, *, grid=True, count=1):
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained", facecolor="white", dpi=110)
    axes = figure.subplots(1, count, squeeze=False)[0]
    for one in axes:
        if grid:
            one.grid(color="#e3e7ee", lw=0.7)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, (axes if count > 1 else axes[0])


def _floor(axes, rows, y, floor):
    for row in rows:
        if floor in row.values() and y in row:
            level, se = number(row[y])
            axes.axhline(level, color=MUTED, ls=":", lw=1.3, label=f"{floor} (floor)")
            axes.axhspan(level - se, level + se, color=MUTED, alpha=0.15, lw=0)


def _plain_ticks(axes):
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())


def _save(figure, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
