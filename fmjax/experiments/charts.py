"""Charts and contact sheets as PNG in text, in the colours of a light and of a dark page.

Equal data give equal bytes. Figures are made by ``matplotlib.figure.Figure``, so that no global state changes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.storage.images import image_grid, png_bytes


class PageFigure(NamedTuple):
    """A figure of the page.

    Attributes:
        caption: the caption.
        alt: text for readers who do not see the figure.
        width: width in pixels of the page.
        height: height in pixels of the page.
        light: base64 PNG for a light page.
        dark: base64 PNG for a dark page; ``None`` where ``light`` suits both.
        remark: a sentence below the caption.
    """

    caption: str
    alt: str
    width: int
    height: int
    light: str
    dark: str | None = None
    remark: str = ""


class Theme(NamedTuple):
    """Colours of a page, light or dark; the style sheet and the charts use the same colours.

    Attributes:
        ink: text.
        muted: secondary text.
        line: rules and grid lines.
        page: background of the page.
        card: background of a box.
        colours: colours of the families.
    """

    ink: str
    muted: str
    line: str
    page: str
    card: str
    colours: tuple[str, ...]


LIGHT = Theme(
    *("#1b2330", "#566074", "#d9dee7", "#f5f7fa", "#ffffff"),
    ("#b45309", "#1d4ed8", "#047857", "#7c3aed", "#be123c", "#0e7490"),
)
DARK = Theme(
    *("#e6eaf1", "#a3adbd", "#333d4d", "#10151d", "#19202b"),
    ("#fbbf24", "#7aa8ff", "#34d399", "#c4a1ff", "#fb7185", "#22d3ee"),
)


def chart(draw: Callable, caption: str, alt: str, *, size, remark: str = "", panels=(1, 1)) -> PageFigure:
    """Draw a chart on a transparent figure, once per theme.

    Args:
        draw: ``draw(axes, theme)`` draws the data; it may return a function that is called with the axes once their
            place in the figure is known. With several panels ``axes`` is an array ``[rows, columns]``.
        caption: the caption.
        alt: text for readers who do not see the chart.
        size: width and height in units of 100 pixels of the page.
        remark: a sentence below the caption.
        panels: rows and columns of panels.

    Returns:
        The figure.
    """
    from matplotlib import style

    with style.context("default"):  # settings of the caller do not change a page
        pngs = [_png(draw, theme, size, panels) for theme in (LIGHT, DARK)]
    return PageFigure(caption, alt, round(size[0] * 100), round(size[1] * 100), *pngs, remark)


def _png(draw: Callable, theme, size, panels) -> str:
    """Return a chart in the colours of a theme as a PNG in base64."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained", facecolor="none")
    every = figure.subplots(*panels, squeeze=False, subplot_kw={"facecolor": "none"})
    single = every.size == 1
    for axes in every.flat:
        axes.tick_params(which="both", colors=theme.muted, labelsize=9 if single else 7, length=3 if single else 2)
        axes.grid(True, color=theme.line, linewidth=0.7)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("left", "bottom"), color=theme.line)
    finish = draw(every[0, 0] if single else every, theme)
    for axes in every.flat:
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set(color=theme.ink, fontsize=10 if single else 8)
    handles, labels = every[0, 0].get_legend_handles_labels()
    if handles:
        style = {"frameon": False, "fontsize": 9, "labelcolor": theme.ink, "ncols": 2}
        figure.legend(handles, labels, loc="outside upper left", **style)
    if finish is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        finish(every[0, 0])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="none", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


def place_labels(axes, points, labels, colours, *, size: float = 7.0) -> None:
    """Write a label beside each point so that no label covers another label or a point.

    Places to the right, left, above and below are tried, nearer places first; a thin line leads from a label that is
    not next to its point.

    Args:
        axes: the axes of matplotlib, with final limits and place in the figure.
        points: coordinates in units of the data ``[n, 2]``.
        labels: the texts.
        colours: the colours of the texts.
        size: font size.
    """
    pixel = axes.figure.dpi / 72  # pixels per point of the font
    at = axes.transData.transform(np.asarray(points, np.float64).reshape(-1, 2))
    frame = axes.get_window_extent()
    taken = [(x - 3 * pixel, y - 3 * pixel, x + 3 * pixel, y + 3 * pixel) for x, y in at]
    meets = lambda a, b: a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    angles = np.deg2rad([60, -60, 120, -120, 0, 180, 90, -90, 35, -35, 145, -145])
    for i in np.argsort(at[:, 1]):
        width, height = 0.52 * size * len(labels[i]) * pixel, 1.25 * size * pixel
        best = None
        for radius in np.arange(5, 90, 6) * pixel:
            for angle in angles:
                centre = at[i] + radius * np.array([np.cos(angle), np.sin(angle)])
                centre = centre + np.array([np.cos(angle) * width / 2, np.sin(angle) * height / 2])
                box = (*(centre - (width / 2, height / 2)), *(centre + (width / 2, height / 2)))
                inside = box[0] > frame.x0 and box[2] < frame.x1 and box[1] > frame.y0 and box[3] < frame.y1
                if inside and not any(meets(box, other) for other in taken):
                    best = (centre, box, radius)
                    break
            if best:
                break
        if best is None:  # no free place: above the point, over others
            best = (at[i] + (0, height), (*at[i], *at[i]), 0)
        centre, box, radius = best
        taken.append(box)
        line = {"arrowstyle": "-", "color": colours[i], "linewidth": 0.5, "alpha": 0.6, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            labels[i], axes.transData.inverted().transform(at[i]), axes.transData.inverted().transform(centre),
            color=colours[i], fontsize=size, ha="center", va="center",
            arrowprops=line if radius > 6 * pixel else None,
        )  # fmt: skip


def value_scale(axes, values, *, log: bool = False) -> None:
    """Set a log axis where values span a decade; keep a linear axis where a value is not positive.

    Args:
        axes: the axes of matplotlib.
        values: the values on the vertical axis; non-finite values are ignored.
        log: set a log axis for any positive values.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if not len(values) or values.min() <= 0 or not (log or values.max() > 10 * values.min()):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1e3 * values.min() else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def contact_sheet(images: np.ndarray, columns: int | None, caption: str, alt: str, remark: str = "") -> PageFigure:
    """Draw images in a grid.

    Args:
        images: ``[n, H, W, C]`` in [-1, 1].
        columns: number of columns; ``None`` for a grid that is nearly square.
        caption: the caption.
        alt: text for readers who do not see the images.
        remark: a sentence below the caption.

    Returns:
        The figure.
    """
    sheet = image_grid(images, columns=columns)
    return PageFigure(
        caption, alt, sheet.shape[1], sheet.shape[0], base64.b64encode(png_bytes(sheet)).decode(), None, remark
    )


def strip(frames: Sequence[np.ndarray], caption: str) -> PageFigure:
    """Return pictures side by side, of which the page shows one at a time.

    Args:
        frames: pictures of one size, uint8 ``[H, W, 3]``.
        caption: the caption.

    Returns:
        The figure; width and height are of one picture.
    """
    height, width = frames[0].shape[:2]
    data = base64.b64encode(png_bytes(np.concatenate(frames, 1))).decode()
    return PageFigure(caption, f"{len(frames)} times side by side: {caption}.", width, height, data)


def escaped(text: str) -> str:
    """Escape text for matplotlib: no mathematics, and names that begin with ``_`` still enter the legend.

    Args:
        text: any text.

    Returns:
        Text that matplotlib shows as it is.
    """
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")
