"""Plots of the tables of results: curves, bars, dots and heat maps; numbers are read from the cells."""

from __future__ import annotations

import re

COLOURS = ("#1d4ed8", "#b45309", "#047857", "#7c3aed", "#be123c", "#0e7490", "#4d7c0f", "#a16207", "#475569", "#db2777")
MUTED = "#566074"


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
    figure, axes = new_axes((6.4, 4))
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
    plain_ticks(axes)
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


def by_column(rows, *, prefix, skip=(), label="method", xlabel="number of jumps or steps N"):
    """Draw columns ``prefix, N=1``, ``prefix, N=2``, ... against N, one line per row."""
    columns = [c for c in rows[0] if c.startswith(prefix)]
    x = [int(re.search(r"N=(\d+)", c)[1]) for c in columns]
    figure, axes = new_axes((6.4, 4.6))
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
    figure, axes = new_axes((6.4, 0.8 + 0.3 * len(rows)))
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
    figure, axes = new_axes((6.4, 0.8 + 0.24 * len(rows)))
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
    figure, axes = new_axes((1.6 + 1.05 * len(columns) + 0.6, 1 + 0.3 * len(labels)), grid=False)
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


def by_cell(rows, *, row, column, value, title, keep=lambda r: True, xlabel="", digits=3):
    """Draw one column of a table as a heat map over two other columns."""
    rows = [r for r in rows if keep(r) and number(r[value])[0] == number(r[value])[0]]
    labels, columns = (list(dict.fromkeys(r[name] for r in rows)) for name in (row, column))
    cell = {(r[row], r[column]): number(r[value])[0] for r in rows}
    values = [[cell.get((a, b), float("nan")) for b in columns] for a in labels]
    return heat(
        labels, [c.replace(" of n = 0 .. 10", "") for c in columns], values, title=title, xlabel=xlabel, digits=digits
    )


def new_axes(size, *, grid=True, count=1):
    """Return a figure and its axes, or a row of axes."""
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


def plain_ticks(axes):
    """Write numbers without powers on log axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())
