"""Charts and contact sheets as PNG in text, in the colours of a light and of a dark page.

Equal data give equal bytes. Figures are made by ``matplotlib.figure.Figure``, so that no global state changes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
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


def chart(draw: Callable, caption: str, alt: str, *, size, remark: str = "") -> PageFigure:
    """Draw a chart on a transparent figure, once per theme.

    Args:
        draw: ``draw(axes, theme)`` draws the data.
        caption: the caption.
        alt: text for readers who do not see the chart.
        size: width and height in units of 100 pixels of the page.
        remark: a sentence below the caption.

    Returns:
        The figure.
    """
    from matplotlib import style

    with style.context("default"):  # settings of the caller do not change a page
        pngs = [_png(draw, theme, size) for theme in (LIGHT, DARK)]
    return PageFigure(caption, alt, round(size[0] * 100), round(size[1] * 100), *pngs, remark)


def _png(draw: Callable, theme, size) -> str:
    """Return a chart in the colours of a theme as a PNG in base64."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.tick_params(which="both", colors=theme.muted, labelsize=9, length=3)
    axes.grid(True, color=theme.line, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=theme.line)
    draw(axes, theme)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=theme.ink, fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        style = {"frameon": False, "fontsize": 9, "labelcolor": theme.ink, "ncols": 2}
        figure.legend(handles, labels, loc="outside upper left", **style)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="none", metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


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


def escaped(text: str) -> str:
    """Escape text for matplotlib: no mathematics, and names that begin with ``_`` still enter the legend.

    Args:
        text: any text.

    Returns:
        Text that matplotlib shows as it is.
    """
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")
