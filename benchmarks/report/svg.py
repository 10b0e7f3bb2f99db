"""The little SVG that the charts need: elements, number lines, markers.

Colours are left to the page's style sheet (classes ``s0`` … ``s7``), so that a chart follows the page from light to
dark. Each series has a shape as well as a colour. Text is escaped by the XML writer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

SERIES = 8
"""Colours in the style sheet. The ninth series has the first colour and shape again, but hollow."""


def element(
    parent: ElementTree.Element, tag: str, text: str | None = None, **attributes: object
) -> ElementTree.Element:
    """Add an element; ``class_`` is class, underscores are hyphens, floats are written to a hundredth."""
    written = {
        name.rstrip("_").replace("_", "-"): f"{value:.2f}".rstrip("0").rstrip(".")
        if isinstance(value, float)
        else str(value)
        for name, value in attributes.items()
    }
    child = ElementTree.SubElement(parent, tag, written)
    child.text = text
    return child


class Drawing:
    """An SVG of a given size, in pixels of the page at its natural width."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.root = ElementTree.Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img"})

    def finish(self, ids: Iterator[int], title: str, description: str) -> Markup:
        """Return the drawing as markup, with a title and a description that screen readers say."""
        number = next(ids)
        self.root.set("aria-labelledby", f"chart-{number}-title chart-{number}-desc")
        for place, (tag, text) in enumerate((("title", title), ("desc", description))):
            child = ElementTree.Element(tag, {"id": f"chart-{number}-{tag}"})
            child.text = text
            self.root.insert(place, child)
        return Markup(ElementTree.tostring(self.root, encoding="unicode"))

    def text(self, x: float, y: float, text: str, class_: str = "label", anchor: str = "start") -> None:
        element(self.root, "text", text, x=float(x), y=float(y), class_=class_, text_anchor=anchor)

    def line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        element(self.root, "line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)

    def box(self, x: float, y: float, width: float, height: float, class_: str, tip: str | None = None) -> None:
        made = element(
            self.root, "rect", x=float(x), y=float(y), width=float(max(width, 0)), height=float(height), class_=class_
        )
        if tip:
            element(made, "title", tip)

    def path(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        if len(points) > 1:
            steps = "L".join(f"{x:.2f} {y:.2f}" for x, y in points)
            element(self.root, "path", d=f"M{steps}", class_=class_)

    def marker(self, x: float, y: float, series: int, tip: str | None = None, size: float = 4) -> None:
        """Draw a series' own shape; `tip` is shown when the pointer rests on it."""
        made = element(self.root, "path", d=shape(x, y, series, size), class_=mark_class(series))
        if tip:
            element(made, "title", tip)


def mark_class(series: int) -> str:
    """Classes of the mark of a series in the style sheet."""
    return f"mark s{series % SERIES}" + (" second" if series // SERIES % 2 else "")


def shape(x: float, y: float, series: int, r: float) -> str:
    """Path of the shape of a series, about (x, y), of half-width `r`."""
    corners: tuple[tuple[float, float], ...]
    kind = series % SERIES
    if kind == 0:
        return f"M{x - r:.2f} {y:.2f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z"
    a, b = r * 0.9, r * 0.36
    corners = {
        1: ((-a, -a), (a, -a), (a, a), (-a, a)),
        2: ((0, -1.15 * r), (1.1 * r, 0.85 * r), (-1.1 * r, 0.85 * r)),
        3: ((0, -1.3 * r), (1.3 * r, 0), (0, 1.3 * r), (-1.3 * r, 0)),
        4: ((0, 1.15 * r), (1.1 * r, -0.85 * r), (-1.1 * r, -0.85 * r)),
        5: ((-b, -r), (b, -r), (b, -b), (r, -b), (r, b), (b, b), (b, r), (-b, r), (-b, b), (-r, b), (-r, -b), (-b, -b)),
        6: ((-1.15 * r, 0), (0.85 * r, -1.1 * r), (0.85 * r, 1.1 * r)),
        7: ((-1.2 * r, -0.5 * r), (1.2 * r, -0.5 * r), (1.2 * r, 0.5 * r), (-1.2 * r, 0.5 * r)),
    }[kind]
    return "M" + "L".join(f"{x + dx:.2f} {y + dy:.2f}" for dx, dy in corners) + "z"


@dataclass(frozen=True)
class Scale:
    """A number line: values in [low, high] to places in [start, end]."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values within the range, near `about` of them; powers of ten on a logarithmic line."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            every = max(1, math.ceil(len(powers) / about))
            return [10.0**power for power in powers][::every]
        step = _round_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(values: Sequence[float], start: float, end: float, *, within: tuple[float, float] | None = None) -> Scale:
    """A linear scale between round numbers around `values`, clipped to `within`."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5 * (abs(low) or 1) * 0.1, high + 0.5 * (abs(high) or 1) * 0.1
    step = _round_step((high - low) / 4)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    if within:
        low, high = max(low, within[0]), min(high, within[1])
    return Scale(low, high, start, end)


def decades(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale between powers of ten around `values`, all positive."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return Scale(10.0**low, 10.0 ** max(high, low + 1), start, end, log=True)


def number(value: float) -> str:
    """A tick's number: short, and powers of ten beyond the thousandths as such."""
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.10g}"


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
