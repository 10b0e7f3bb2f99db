"""The charts of a report, each with the numbers behind it as a table. What they show is decided in `sections`.

Every chart is plain matplotlib on one pair of axes; `drawing` makes it part of the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from apm.figures.base import new_figure
from apm.images.paths import printable

from ..tables.stats import ReliabilityBin
from .drawing import COLOUR, STYLE, colour, mark, short, to_markup
from .sheet import Sheet, sheet

NARROW, WIDE = 380, 960
"""Natural widths in pixels: of a telephone's page or half of a wide one, and of a wide page."""
Draw = Callable[[Any, int], None]
"""Draws on axes, given the width in pixels."""


@dataclass(frozen=True)
class Chart:
    """What to draw, and the numbers behind it."""

    title: str
    sheet: Sheet
    description: str
    draw: Draw
    height: int
    number: int
    """Its own in the page."""
    small: bool = False
    """Whether it is one of several alike, which stand beside each other; else it is as wide as the page."""

    def svg(self, width: int = NARROW) -> Markup:
        """Draw it for a page of this width in pixels."""
        import matplotlib

        with matplotlib.rc_context(STYLE):
            figure = new_figure(width / 72, self.height / 72)
            figure.patch.set_visible(False)
            axes = figure.subplots()
            self.draw(axes, width)
            return to_markup(figure, f"chart-{self.number}-{width}", self.title, self.description)


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
        ids: source of numbers of the page's charts.
        title: what the chart shows.
        series: the lines.
        x_label: what x is.
        y_label: what y is.
        scale: values that the y axis must hold: shared by charts that stand beside each other.
        x_ticks: places and names of the ticks of x; round numbers without.
        chance: a y to mark as that of guessing, if it lies on the scale.
        markers: whether each point has its series' shape; otherwise only the last has.
    """
    names = dict(x_ticks or ())

    def draw(axes: Any, width: int) -> None:
        axes.set(xlabel=x_label, ylabel=y_label)
        _hold(axes.set_ylim, scale)
        if x_ticks:
            axes.set_xticks(list(names), list(names.values()))
        for place, line in enumerate(series):
            # levels are few: methods stand a little beside each other there, or they would hide each other
            aside = (place - (len(series) - 1) / 2) * min(0.05, 0.3 / len(series)) if x_ticks else 0.0
            said = [f"{x_label} {names.get(p.x, _number(p.x))}" for p in line.points]
            _line(axes, line, aside, said, markers=markers)
        axes.margins(x=0.06)
        low, high = axes.get_ylim()
        if chance is not None and low <= chance <= high:
            axes.axhline(chance, color=COLOUR["soft"], linewidth=1, linestyle=(0, (3, 3)), zorder=2)
            # in the margin, where nothing else is drawn
            told = _chance(chance).replace(" ", "\n", 1)
            axes.text(1.01, chance, told, transform=axes.get_yaxis_transform(), va="center", fontsize=10)

    rows = tuple(
        (
            line.name,
            line.what or y_label,
            names.get(p.x, _number(p.x)),
            f"{p.y:.1f}",
            f"{p.error:.1f}" if p.error else "–",
            str(p.n),
        )
        for line in series
        for p in line.points
    )
    described = f"Lines of {y_label} over {x_label} for {_listed([line.name for line in series])}."
    numbers = sheet(title, ("method", "what", x_label, "%", "± standard error", "n"), rows, text=(0, 1))
    return Chart(title, numbers, described, draw, 260, next(ids), small=True)


@dataclass(frozen=True)
class Lane:
    """One horizontal lane of a chart: a name, and a value or five for each series in it."""

    name: str
    entries: tuple[tuple[str, int, Point], ...]
    """Name of the series, its number, the value (as x)."""


def dots(ids: Iterator[int], title: str, lanes: Sequence[Lane], *, x_label: str, chance: float | None = None) -> Chart:
    """Values with their standard errors, a lane for each column of a table, series under each other within it."""
    places = _Lanes([(lane.name, len(lane.entries)) for lane in lanes])

    def draw(axes: Any, width: int) -> None:
        every = [p for lane in lanes for _, _, p in lane.entries]
        reach = [edge for p in every for edge in (p.x - p.error, p.x + p.error)]
        _hold(axes.set_xlim, reach if chance is None else [*reach, chance])
        places.lay(axes, width, x_label)
        for lane, rows in zip(lanes, places.rows, strict=True):
            if chance is not None:  # beside the values alone: names are not crossed
                edges = [rows[0] - 0.5, rows[-1] + 0.5]
                axes.plot([chance] * 2, edges, color=COLOUR["soft"], linewidth=1, linestyle=(0, (3, 3)), zorder=2)
            for y, (name, series, p) in zip(rows, lane.entries, strict=True):
                _error(axes, [p.x - p.error, p.x + p.error], [y, y], series)
                said = f"{lane.name}, {name}: {p.x:.1f} ± {p.error:.1f} % (n = {p.n})"
                mark(axes, p.x, y, series, printable(said))
        if chance is not None:
            above = axes.get_xaxis_transform()
            axes.text(chance, 1.0, _chance(chance), transform=above, ha="center", va="bottom", fontsize=10)

    rows = tuple(
        (lane.name, name, f"{p.x:.1f}", f"{p.error:.1f}", str(p.n)) for lane in lanes for name, _, p in lane.entries
    )
    tail = "" if chance is None else f" A dashed line marks chance, {chance:.3g} %."
    described = f"{x_label} of each method in {len(lanes)} lanes, with standard errors.{tail}"
    numbers = sheet(title, ("column", "method", "%", "± standard error", "n"), rows, text=(0, 1))
    return Chart(title, numbers, described, draw, places.height, next(ids))


def bars(ids: Iterator[int], title: str, values: Sequence[tuple[str, int, float, int]], *, x_label: str) -> Chart:
    """Horizontal bars from zero: (name, series, value, n)."""
    places = _Lanes([(name, 1) for name, *_ in values])

    def draw(axes: Any, width: int) -> None:
        _hold(axes.set_xlim, [0.0, *(1.12 * value for _, _, value, _ in values)], within=(0, np.inf))
        places.lay(axes, width, x_label)
        for (y,), (name, series, value, n) in zip(places.rows, values, strict=True):
            _bar(axes, y, 0, value, series, f"{name}: {value:.3g} {x_label} (n = {n})")
            axes.annotate(f"{value:.3g}", (value, y), (5, 0), textcoords="offset points", va="center")

    rows = tuple((name, f"{value:.3g}", str(n)) for name, _, value, n in values)
    described = f"Bars of {x_label} for {_listed([name for name, *_ in values])}."
    numbers = sheet(title, ("method", x_label, "n"), rows, text=(0,))
    return Chart(title, numbers, described, draw, places.height, next(ids))


def diverging(ids: Iterator[int], title: str, values: Sequence[tuple[str, int, int, int, int]]) -> Chart:
    """Flips right→wrong to the left, wrong→right to the right of a line: (name, series, lost, gained, n)."""
    places = _Lanes([(name, 1) for name, *_ in values])

    def draw(axes: Any, width: int) -> None:
        most = max((max(lost, gained) for _, _, lost, gained, _ in values), default=0) or 1
        axes.set_xlim(-1.15 * most, 1.15 * most)
        places.lay(axes, width, "")
        axes.set_xticks([])
        axes.axvline(0, color=COLOUR["soft"], linewidth=1)
        for x, align, text in ((-0.02, "right", "← right→wrong"), (0.02, "left", "wrong→right →")):
            axes.text(0.5 + x, 1.0, text, transform=axes.transAxes, ha=align, va="bottom", color=COLOUR["soft"])
        for (y,), (name, series, lost, gained, n) in zip(places.rows, values, strict=True):
            _bar(axes, y, 0, -lost, series, f"{name}: {lost} of {n} right→wrong", hollow=True)
            _bar(axes, y, 0, gained, series, f"{name}: {gained} of {n} wrong→right")
            for count, sign in ((lost, -1), (gained, 1)):
                align = "right" if sign < 0 else "left"
                offset = {"xytext": (5 * sign, 0), "textcoords": "offset points"}
                axes.annotate(str(count), (sign * count, y), ha=align, va="center", **offset)

    rows = tuple((name, str(lost), str(gained), str(n)) for name, _, lost, gained, n in values)
    described = "Bars to the left: images that the teacher has right and the method wrong; to the right: the reverse."
    numbers = sheet(title, ("method", "right→wrong", "wrong→right", "n"), rows, text=(0,))
    return Chart(title, numbers, described, draw, places.height, next(ids))


def reliability_diagram(
    ids: Iterator[int], title: str, name: str, series: int, bins: Sequence[ReliabilityBin]
) -> Chart:
    """Accuracy against confidence in bins of as many answers each, with intervals and the diagonal."""

    def draw(axes: Any, width: int) -> None:
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="accuracy")
        axes.plot([0, 1], [0, 1], color=COLOUR["soft"], linewidth=1, linestyle=(0, (3, 3)), zorder=2)
        for one in bins:
            _error(axes, [one.confidence] * 2, [one.low, one.high], series)
            _error(axes, [one.minimum, one.maximum], [one.accuracy] * 2, series, width=1, opacity=0.45)
            said = (
                f"{name}: {one.count} answers of confidence {one.minimum:.2f} to {one.maximum:.2f}, mean "
                f"{one.confidence:.2f}: accuracy {one.accuracy:.2f}, 95 % interval {one.low:.2f} to {one.high:.2f}"
            )
            mark(axes, one.confidence, one.accuracy, series, printable(said))

    rows = tuple(
        (
            f"{one.minimum:.3f}–{one.maximum:.3f}",
            f"{one.confidence:.3f}",
            f"{one.accuracy:.3f}",
            f"{one.low:.3f}–{one.high:.3f}",
            str(one.count),
        )
        for one in bins
    )
    described = (
        "Accuracy over mean confidence, in bins of as many answers each; upright bars are 95 % intervals, level ones "
        "the bin's range of confidence. The dashed diagonal is perfect calibration; below it the method is too sure."
    )
    headings = ("confidence", "mean confidence", "accuracy", "95 % interval", "n")
    return Chart(title, sheet(title, headings, rows, text=()), described, draw, 330, next(ids), small=True)


def boxes(
    ids: Iterator[int],
    title: str,
    lanes: Sequence[tuple[str, Sequence[tuple[str, int, np.ndarray]]]],
    *,
    x_label: str,
    log: bool,
) -> Chart:
    """Five-number summaries: whiskers from least to greatest, a box between the quartiles, the median in it."""
    places = _Lanes([(name, len(entries)) for name, entries in lanes])
    summaries = [
        [(name, series, [float(q) for q in np.quantile(v, (0, 0.25, 0.5, 0.75, 1))], len(v)) for name, series, v in of]
        for _, of in lanes
    ]

    def draw(axes: Any, width: int) -> None:
        every = [edge for of in summaries for _, _, five, _ in of for edge in (five[0], five[4])]
        if log:
            axes.set_xscale("log")
            axes.set_xlim(min(every) / 1.5, max(every) * 1.5)
        else:
            _hold(axes.set_xlim, every, within=(-np.inf, np.inf))
        places.lay(axes, width, x_label)
        for (lane, _), rows, of in zip(lanes, places.rows, summaries, strict=True):
            for y, (name, series, five, n) in zip(rows, of, strict=True):
                told = ", ".join(f"{value:.4g}" for value in five)
                _error(axes, [five[0], five[4]], [y, y], series)
                _bar(axes, y, five[1], five[3] - five[1], series, f"{lane}, {name}: {told} (n = {n})", opacity=0.4)
                mark(axes, five[2], y, series, printable(f"{lane}, {name}: median {five[2]:.4g} (n = {n})"), size=6)

    rows = tuple(
        (lane, name, *(f"{value:.4g}" for value in five), str(n))
        for (lane, _), of in zip(lanes, summaries, strict=True)
        for name, _, five, n in of
    )
    described = f"{x_label}: from the least to the greatest value, the middle half as a box, the median as a mark."
    headings = ("column", "method", "minimum", "quartile", "median", "quartile", "maximum", "n")
    return Chart(title, sheet(title, headings, rows, text=(0, 1)), described, draw, places.height, next(ids))


class _Lanes:
    """Places of rows below one another, in lanes that have a line of their own for their name: y downward."""

    ROW, HEAD = 17, 1.5
    """Height of a row in pixels, and of a lane's name in rows."""

    def __init__(self, lanes: Sequence[tuple[str, int]]) -> None:
        self.names, self.rows, top = [], [], 0.0
        for name, count in lanes:
            self.names.append((name, top))
            self.rows.append([top + self.HEAD + row for row in range(count)])
            top += self.HEAD + count
        self.bottom = top
        self.height = round(self.ROW * top) + 60

    def lay(self, axes: Any, width: int, x_label: str) -> None:
        """Give the axes their height, names and rules."""
        axes.set(ylim=(self.bottom, 0), yticks=[], xlabel=x_label)
        axes.xaxis.set_major_formatter(lambda value, _: _number(value))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        for name, top in self.names:
            if top:
                axes.axhline(top, color=COLOUR["rule"], linewidth=1, zorder=0)
            halo = {"facecolor": COLOUR["paper"], "edgecolor": "none", "pad": 1}  # rules of the scale stop at names
            at = axes.get_yaxis_transform()
            axes.text(0, top + 0.6, short(name, width), transform=at, va="center", bbox=halo, zorder=3)


def _hold(
    limit: Callable[[float, float], object], values: Sequence[float], *, within: tuple[float, float] = (0, 100)
) -> None:
    """Set limits a little wider than the values, but not past `within`; never a range of nothing."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    # at an end of the scale the marks still need room to be whole
    edge = 0.02 * (high - low + 2 * room)
    limit(max(low - room, within[0] - edge), min(high + room, within[1] + edge))


def _line(axes: Any, line: Line, aside: float, said: Sequence[str], *, markers: bool) -> None:
    """A line with its points and their errors; `said` is each point's place in words."""
    x, dashes = [p.x + aside for p in line.points], "--" if line.dashed else "-"
    axes.plot(x, [p.y for p in line.points], dashes, color=colour(line.series), linewidth=1.8, zorder=3)
    for at, p in zip(x, line.points, strict=True):
        if p.error:
            _error(axes, [at, at], [p.y - p.error, p.y + p.error], line.series)
    name = f"{line.name}, {line.what}" if line.what else line.name
    for at, p, place in list(zip(x, line.points, said, strict=True))[0 if markers else -1 :]:
        spread = f" ± {p.error:.1f}" if p.error else ""
        mark(axes, at, p.y, line.series, printable(f"{name}, {place}: {p.y:.1f}{spread} % (n = {p.n})"))


def _error(
    axes: Any, x: Sequence[float], y: Sequence[float], series: int, *, width: float = 1.4, opacity: float = 0.75
) -> None:
    axes.plot(x, y, color=colour(series), linewidth=width, alpha=opacity, solid_capstyle="butt", zorder=3)


def _bar(
    axes: Any,
    y: float,
    start: float,
    width: float,
    series: int,
    said: str,
    *,
    hollow: bool = False,
    opacity: float = 0.85,
) -> None:
    look: dict[str, Any] = {"color": colour(series), "alpha": opacity}
    if hollow:
        look = {"facecolor": COLOUR["paper"], "edgecolor": colour(series), "linewidth": 1.5}
    (bar,) = axes.barh([y], [width], 0.62, start, zorder=3, **look)
    bar.set_gid(f"say:{printable(said)}")


def _chance(value: float) -> str:
    return f"chance {value:.3g} %"


def _number(value: float) -> str:
    """A tick's number: short, and powers of ten beyond the thousandths as such."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))
