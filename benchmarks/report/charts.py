"""The charts of a report, each with the numbers behind it as a table. What they show is decided in `sections`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ..stats import Reliability
from .sheet import Sheet, sheet
from .svg import SERIES, Drawing, Scale, decades, nice, number

WIDTH = 340
"""Natural width of every chart: that of a telephone's page. A wider page shows several side by side."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 10, 10, 38


@dataclass(frozen=True)
class Chart:
    """A drawing and the numbers behind it."""

    title: str
    svg: Markup
    sheet: Sheet


@dataclass(frozen=True)
class Point:
    """One value of a series; percent where it is an accuracy."""

    x: float
    y: float
    n: int
    error: float = 0.0
    """Standard error."""


@dataclass(frozen=True)
class Line:
    """A named series of points."""

    name: str
    series: int
    points: tuple[Point, ...]
    dashed: bool = False
    what: str = ""
    """What its y are, where a chart shows several things."""


def lines(
    ids: Iterator[int],
    title: str,
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    scale: Sequence[float],
    x_ticks: Sequence[tuple[float, str]] | None = None,
    chance: float | None = None,
    markers: bool = True,
) -> Chart:
    """Lines over a common x.

    Args:
        ids: source of ids of the page.
        title: what the chart shows.
        series: the lines.
        x_label: what x is.
        y_label: what y is.
        scale: values that the y axis must hold: shared by charts that stand beside each other.
        x_ticks: places and names of the ticks of x; round numbers without.
        chance: a y to mark as that of guessing.
        markers: whether each point has its series' shape; otherwise only the last has.
    """
    height = 220
    drawing = Drawing(WIDTH, height)
    xs = [point.x for line in series for point in line.points]
    y = nice(scale, height - _BOTTOM, _TOP, within=(0, 100))
    low, high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, max(xs) + 0.5)
    x = Scale(low, high, _LEFT + 14, WIDTH - _RIGHT - 14)
    _y_axis(drawing, y, y_label)
    for place, name in x_ticks or [(value, number(value)) for value in x.ticks()]:
        drawing.text(x(place), height - _BOTTOM + 14, name, "tick", "middle")
    drawing.text((_LEFT + WIDTH) / 2, height - 6, x_label, "axis-name", "middle")
    if chance is not None and y.low <= chance <= y.high:
        drawing.line(_LEFT, y(chance), WIDTH - _RIGHT, y(chance), "chance")
        # at the end of the line from which the values are farther
        first, last = (np.mean([abs(line.points[end].y - chance) for line in series]) for end in (0, -1))
        side = (_LEFT + 4, "start") if first > last else (WIDTH - _RIGHT, "end")
        drawing.text(side[0], y(chance) - 3, f"chance {chance:.3g} %", "tick", side[1])
    # levels are few and far between: methods stand a little beside each other there, or they would hide each other
    apart = min(3.5, 18 / len(series))
    aside = {id(line): (place - (len(series) - 1) / 2) * apart if x_ticks else 0.0 for place, line in enumerate(series)}
    for line in series:
        across = [x(p.x) + aside[id(line)] for p in line.points]
        colour = f"s{line.series % SERIES}"
        for place, point in zip(across, line.points, strict=True):
            if point.error:
                ends = [y(min(max(point.y + sign * point.error, y.low), y.high)) for sign in (-1, 1)]
                drawing.line(place, ends[0], place, ends[1], f"error {colour}")
        drawing.path(
            [(place, y(p.y)) for place, p in zip(across, line.points, strict=True)],
            f"line {colour}" + (" dashed" if line.dashed else ""),
        )
        for place, point in list(zip(across, line.points, strict=True))[0 if markers else -1 :]:
            said = f"{line.name}{', ' + line.what if line.what else ''}, {x_label} {number(point.x)}"
            spread = f" ± {point.error:.1f}" if point.error else ""
            drawing.marker(place, y(point.y), line.series, f"{said}: {point.y:.1f}{spread} % (n = {point.n})")
    names = {place: name for place, name in x_ticks or ()}
    rows = tuple(
        (
            line.name,
            line.what or y_label,
            names.get(p.x, number(p.x)),
            f"{p.y:.1f}",
            f"{p.error:.1f}" if p.error else "–",
            str(p.n),
        )
        for line in series
        for p in line.points
    )
    described = f"Lines of {y_label} over {x_label} for {_listed([line.name for line in series])}."
    svg = drawing.finish(ids, title, described)
    return Chart(title, svg, sheet(title, ("method", "what", x_label, "%", "± standard error", "n"), rows, text=(0, 1)))


@dataclass(frozen=True)
class Lane:
    """One horizontal lane of a chart: a name, and a value or five for each series in it."""

    name: str
    entries: tuple[tuple[str, int, Point], ...]
    """Name of the series, its number, the value (as x)."""


def dots(ids: Iterator[int], title: str, lanes: Sequence[Lane], *, x_label: str, chance: float | None = None) -> Chart:
    """Values with their standard errors, a lane for each column of a table, series under each other within it."""
    gap, head = 11, 20
    heights = [head + gap * len(lane.entries) + 4 for lane in lanes]
    height = sum(heights) + _BOTTOM
    drawing = Drawing(WIDTH, height)
    every = [p for lane in lanes for _, _, p in lane.entries]
    reach = [edge for p in every for edge in (p.x - p.error, p.x + p.error)]
    x = nice(reach if chance is None else [*reach, chance], 10, WIDTH - 12, within=(0, 100))
    _x_axis(drawing, x, x_label, height)
    if chance is not None:
        drawing.line(x(chance), 0, x(chance), height - _BOTTOM, "chance")
    top = 0.0
    for lane, tall in zip(lanes, heights, strict=True):
        drawing.line(10, top + tall, WIDTH - 12, top + tall, "grid")
        drawing.text(10, top + 14, _cut(lane.name), "lane")
        for place, (name, series, p) in enumerate(lane.entries):
            y = top + head + gap * (place + 0.5)
            ends = [x(min(max(p.x + sign * p.error, x.low), x.high)) for sign in (-1, 1)]
            drawing.line(ends[0], y, ends[1], y, f"error s{series % SERIES}")
            drawing.marker(x(p.x), y, series, f"{lane.name}, {name}: {p.x:.1f} ± {p.error:.1f} % (n = {p.n})")
        top += tall
    rows = tuple(
        (lane.name, name, f"{p.x:.1f}", f"{p.error:.1f}", str(p.n)) for lane in lanes for name, _, p in lane.entries
    )
    tail = "" if chance is None else f" A dashed line marks chance, {chance:.3g} %."
    svg = drawing.finish(ids, title, f"{x_label} of each method in {len(lanes)} lanes, with standard errors.{tail}")
    return Chart(title, svg, sheet(title, ("column", "method", "%", "± standard error", "n"), rows, text=(0, 1)))


def bars(ids: Iterator[int], title: str, values: Sequence[tuple[str, int, float, int]], *, x_label: str) -> Chart:
    """Horizontal bars from zero: (name, series, value, n)."""
    row = 32
    height = row * len(values) + _BOTTOM
    drawing = Drawing(WIDTH, height)
    x = nice([0.0, *(value for _, _, value, _ in values)], 10, WIDTH - 52)
    _x_axis(drawing, x, x_label, height)
    for place, (name, series, value, n) in enumerate(values):
        top = row * place
        drawing.text(10, top + 12, _cut(name), "lane")
        drawing.box(
            10, top + 16, x(value) - 10, 11, f"bar s{series % SERIES}", f"{name}: {value:.3g} {x_label} (n = {n})"
        )
        drawing.text(x(value) + 5, top + 25.5, f"{value:.3g}", "label")
    rows = tuple((name, f"{value:.3g}", str(n)) for name, _, value, n in values)
    svg = drawing.finish(ids, title, f"Bars of {x_label} for {_listed([name for name, *_ in values])}.")
    return Chart(title, svg, sheet(title, ("method", x_label, "n"), rows, text=(0,)))


def diverging(ids: Iterator[int], title: str, values: Sequence[tuple[str, int, int, int, int]]) -> Chart:
    """Flips right→wrong to the left, wrong→right to the right of a line: (name, series, lost, gained, n)."""
    row, middle = 38, WIDTH / 2
    height = row * len(values) + 24
    drawing = Drawing(WIDTH, height)
    most = max((max(lost, gained) for _, _, lost, gained, _ in values), default=0) or 1
    scale = (WIDTH / 2 - 44) / most
    drawing.line(middle, 18, middle, height - 4, "axis")
    drawing.text(middle - 6, 12, "← right→wrong", "tick", "end")
    drawing.text(middle + 6, 12, "wrong→right →", "tick")
    for place, (name, series, lost, gained, n) in enumerate(values):
        top = 20 + row * place
        colour = f"s{series % SERIES}"
        drawing.text(10, top + 11, _cut(name), "lane")
        drawing.box(
            middle - lost * scale,
            top + 19,
            lost * scale,
            11,
            f"bar hollow {colour}",
            f"{name}: {lost} of {n} right→wrong",
        )
        drawing.box(middle, top + 19, gained * scale, 11, f"bar {colour}", f"{name}: {gained} of {n} wrong→right")
        drawing.text(middle - lost * scale - 5, top + 28.5, str(lost), "label", "end")
        drawing.text(middle + gained * scale + 5, top + 28.5, str(gained), "label")
    rows = tuple((name, str(lost), str(gained), str(n)) for name, _, lost, gained, n in values)
    svg = drawing.finish(
        ids,
        title,
        "Bars to the left: images that the teacher has right and the method wrong; to the right: the reverse.",
    )
    return Chart(title, svg, sheet(title, ("method", "right→wrong", "wrong→right", "n"), rows, text=(0,)))


def reliability_diagram(ids: Iterator[int], title: str, name: str, series: int, bins: Reliability) -> Chart:
    """Accuracy against confidence, a bar for each bin that holds images, with the diagonal of perfect calibration."""
    height, low_edge = 310, 48
    drawing = Drawing(WIDTH, height)
    x, y = Scale(0, 1, _LEFT, WIDTH - _RIGHT), Scale(0, 1, height - low_edge, _TOP)
    _y_axis(drawing, y, "accuracy")
    for value in x.ticks():
        drawing.text(x(value), height - low_edge + 27, number(value), "tick", "middle")
    drawing.text((_LEFT + WIDTH) / 2, height - 6, "confidence, and images in each bin", "axis-name", "middle")
    drawing.path([(x(0), y(0)), (x(1), y(1))], "chance")
    bins_wide, total, rows = len(bins.count), int(bins.count.sum()), []
    for place, count in enumerate(bins.count.tolist()):
        if not count:
            continue
        low, high = place / bins_wide, (place + 1) / bins_wide
        right, sure = float(bins.right[place]) / count, float(bins.sure[place]) / count
        tip = f"{name}: {count} of {total} images with mean confidence {sure:.2f}, accuracy {right:.2f}"
        drawing.box(x(low) + 1, y(right), x(high) - x(low) - 2, y(0) - y(right), f"bar soft s{series % SERIES}", tip)
        drawing.marker(x(sure), y(right), series, tip)
        short = str(count) if count < 1000 else f"{count / 1000:.0f}k"
        drawing.text(x((low + high) / 2), height - low_edge + 12, short, "count", "middle")
        rows.append((f"{low:.2f}–{high:.2f}", f"{sure:.3f}", f"{right:.3f}", str(count)))
    described = "Accuracy over confidence in equal bins; the dashed diagonal is perfect calibration."
    described += " Bars below it mean too sure."
    svg = drawing.finish(ids, title, described)
    return Chart(title, svg, sheet(title, ("confidence", "mean confidence", "accuracy", "n"), rows, text=()))


def boxes(
    ids: Iterator[int],
    title: str,
    lanes: Sequence[tuple[str, Sequence[tuple[str, int, np.ndarray]]]],
    *,
    x_label: str,
    log: bool,
) -> Chart:
    """Five-number summaries: whiskers from least to greatest, a box between the quartiles, the median in it."""
    gap, head = 14, 20
    heights = [head + gap * len(entries) + 4 for _, entries in lanes]
    height = sum(heights) + _BOTTOM
    drawing = Drawing(WIDTH, height)
    every = [float(edge) for _, entries in lanes for _, _, v in entries for edge in (v.min(), v.max())]
    x = decades(every, 10, WIDTH - 14) if log else nice(every, 10, WIDTH - 14)
    _x_axis(drawing, x, x_label, height)
    top, rows = 0.0, []
    for (lane, entries), tall in zip(lanes, heights, strict=True):
        drawing.line(10, top + tall, WIDTH - 14, top + tall, "grid")
        drawing.text(10, top + 14, _cut(lane), "lane")
        for place, (name, series, values) in enumerate(entries):
            colour = f"s{series % SERIES}"
            five = [float(q) for q in np.quantile(values, (0, 0.25, 0.5, 0.75, 1))]
            y = top + head + gap * (place + 0.5)
            told = ", ".join(f"{value:.4g}" for value in five)
            drawing.line(x(five[0]), y, x(five[4]), y, f"error {colour}")
            drawing.box(
                x(five[1]),
                y - 4,
                x(five[3]) - x(five[1]),
                8,
                f"bar soft {colour}",
                f"{lane}, {name}: {told} (n = {len(values)})",
            )
            drawing.marker(x(five[2]), y, series, f"{lane}, {name}: median {five[2]:.4g} (n = {len(values)})", size=3)
            rows.append((lane, name, *(f"{value:.4g}" for value in five), str(len(values))))
        top += tall
    described = f"{x_label}: from the least to the greatest value, the middle half as a box, the median as a mark."
    svg = drawing.finish(ids, title, described)
    headings = ("column", "method", "least", "quartile", "median", "quartile", "greatest", "n")
    return Chart(title, svg, sheet(title, headings, rows, text=(0, 1)))


def _y_axis(drawing: Drawing, y: Scale, name: str) -> None:
    for value in y.ticks():
        drawing.line(_LEFT, y(value), WIDTH - _RIGHT, y(value), "grid")
        drawing.text(_LEFT - 6, y(value) + 4, number(value), "tick", "end")
    middle = (y.start + y.end) / 2
    drawing.text(11, middle, name, "axis-name", "middle")
    drawing.root[-1].set("transform", f"rotate(-90 11 {middle:.1f})")


def _x_axis(drawing: Drawing, x: Scale, name: str, height: float) -> None:
    for value in x.ticks():
        drawing.line(x(value), 0, x(value), height - _BOTTOM, "grid")
        drawing.text(x(value), height - _BOTTOM + 14, number(value), "tick", "middle")
    drawing.text(WIDTH / 2, height - 6, name, "axis-name", "middle")


def _cut(text: str, length: int = 46) -> str:
    """A name as long as a lane is wide; the whole of it is in the table behind the chart."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
