"""Line plots as SVG text to stand within an HTML page: no fonts, scripts or resources of their own.

Colours are the page's CSS variables, so a plot follows light and dark. Lines are told apart by colour (the hues of
Okabe and Ito, safe for the colour-blind), by dashes and by a label at their end.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

# matplotlib wants fixed colours; these stand for the page's variables and are replaced in the finished text.
_INK, _SOFT, _GRID = "#a000e0", "#a000e1", "#a000e2"
_SERIES = [f"#a000f{n}" for n in range(1, 7)]
_VARIABLES = {_INK: "--ink", _SOFT: "--soft", _GRID: "--grid"} | {c: f"--s{n}" for n, c in enumerate(_SERIES, start=1)}
_DASHES: list[Any] = ["-", "-", "-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5))]
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "glasklar",
    "font.family": "DejaVu Sans",  # comes with matplotlib; the page puts its own in its place
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
}
_MOST_POINTS = 600
Scale = Literal["linear", "log", "percent"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: name at its end, x and y of equal length. `smooth`: drawn over its faint raw points. `strong`: the one
    to look at. `color`: 0 to 5, by default its place in the panel."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: bool = False
    strong: bool = False
    markers: bool = False
    color: int | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    label          quantity and unit of y
    marks          horizontal lines worth knowing, by name
    least, most    ends of a linear axis; by default from 0 to what there is
    """

    label: str
    lines: Sequence[Line]
    scale: Scale = "linear"
    marks: Sequence[tuple[str, float]] = ()
    least: float = 0.0
    most: float | None = None


def draw(name: str, title: str, x_label: str, panels: Sequence[Panel], *, x_whole: bool = False) -> str:
    """An SVG element of panels one above the other with a common x axis.

    name     distinguishes the ids of several plots in one page
    title    for screen readers
    """
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=(7.6, 0.5 + 2.4 * len(panels)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for one, panel in zip(axes, panels, strict=True):
            _panel(one, panel)
        axes[-1].set_xlabel(x_label)
        axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=x_whole, steps=[1, 2, 5, 10]))
        figure.align_ylabels(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _inline(out.getvalue(), name, title)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over `window` values around each; fewer at the ends, evenly to both sides, so that nothing lags."""
    sums = [0.0, *accumulate(values)]
    result = []
    for i in range(len(values)):
        half = min(window // 2, i, len(values) - 1 - i)
        result.append((sums[i + half + 1] - sums[i - half]) / (2 * half + 1))
    return result


def _panel(axes: Axes, panel: Panel) -> None:
    axes.set_ylabel(panel.label)
    ends = [_line(axes, line, place) for place, line in enumerate(panel.lines)]
    for name, height in panel.marks:
        axes.axhline(height, color=_SOFT, linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            name, (0, height), (3, 2), xycoords=("axes fraction", "data"), textcoords="offset points", color=_SOFT
        )
    _scale(axes, panel)
    if len(ends) > 1:
        _label_ends(axes, ends)


def _line(axes: Axes, line: Line, place: int) -> tuple[float, str, str]:
    """Draws a line; returns height, text and colour of the label at its end."""
    index = (place if line.color is None else line.color) % len(_SERIES)
    color = _INK if line.strong else _SERIES[index]
    y = smoothed(line.y, len(line.y) // 12) if line.smooth else list(line.y)
    step = max(1, len(y) // _MOST_POINTS)
    keep = [*range(0, len(y) - 1, step), len(y) - 1]  # the last point always
    x, raw, y = [line.x[i] for i in keep], [line.y[i] for i in keep], [y[i] for i in keep]
    if line.smooth:
        axes.plot(x, raw, color=color, alpha=0.25, linewidth=0.7)
    axes.plot(
        x,
        y,
        color=color,
        linewidth=2.4 if line.strong else 1.5,
        linestyle="-" if line.strong else _DASHES[index],
        marker="o" if line.markers else None,
        markersize=3.5,
    )
    return y[-1], line.name, color


def _scale(axes: Axes, panel: Panel) -> None:
    if panel.scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif panel.scale == "percent":
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    else:
        axes.set_ylim(bottom=min(panel.least, min(min(line.y) for line in panel.lines)), top=panel.most)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names at the right end of the lines, pushed apart where they would touch."""
    to_axes = axes.transData.transform
    low, high = axes.transAxes.transform([(0, 0), (0, 1)])[:, 1]
    gap = 0.085
    taken = -gap
    placed = []
    for y, text, color in sorted(ends):
        height = (to_axes((axes.get_xlim()[1], y))[1] - low) / (high - low)
        taken = max(min(height, 1.0), taken + gap)
        placed.append((taken, text, color))
    excess = max(0.0, taken - 1.02)
    for height, text, color in placed:
        axes.annotate(
            text,
            (1, height - excess),
            (6, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=color,
            annotation_clip=False,
        )


def _inline(svg: str, name: str, title: str) -> str:
    """The bare element: no prolog, metadata or style sheet, ids made unique, colours from the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.strip()
