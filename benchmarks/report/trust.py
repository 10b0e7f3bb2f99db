"""What can be trusted, at the head of a report: the tables of `benchmarks.tables.trust`, and gain against cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apm.images.paths import printable

from ..tables.formats import NOTHING
from ..tables.table import Table
from ..tables.trust import TrustRow, TrustTable, make_trust
from ..tables.trust_formats import HEADINGS, LEGEND, lines
from .charts import Chart
from .drawing import COLOUR, mark, short
from .sections import Group
from .series import Part
from .sheet import Sheet, sheet


@dataclass(frozen=True)
class TrustBlock:
    """One table, and what belongs to it."""

    title: str
    sheet: Sheet
    notes: tuple[str, ...]
    open: bool
    """Whether it is unfolded when the page is opened: of the single cells beside all of them together, none is."""


@dataclass(frozen=True)
class TrustSection:
    """All of the section."""

    blocks: tuple[TrustBlock, ...]
    charts: tuple[Group, ...]
    refused: tuple[str, ...]
    """Why some tables cannot be made."""
    legend: tuple[str, ...] = LEGEND


def trust(ids: Iterator[int], tables: Sequence[Table], parts: Sequence[Part]) -> TrustSection:
    """Make the section from the tables of the page; `parts` have the colours of the methods."""
    refused: list[str] = []
    found = make_trust(tables, on_refused=refused.append)
    series = {named.name: named.series for part in parts for named in part.rows}
    pooled = {cell for one in found if one.pooled for cell in one.cells}
    blocks = []
    shown = []
    for one in found:
        part_of_pool = not one.pooled and one.cells[0] in pooled
        said = sheet(one.title, HEADINGS, lines(one), text=("method", "episodic", "needs order", "needs gradients"))
        blocks.append(TrustBlock(printable(one.title), said, tuple(map(printable, one.notes)), not part_of_pool))
        if not part_of_pool and any(row.ms_given_features for row in one.rows):
            shown.append(gain_against_cost(ids, one, series))
    charts = (Group("", tuple(shown)),) if shown else ()
    return TrustSection(tuple(blocks), charts, tuple(map(printable, dict.fromkeys(refused))))


def gain_against_cost(ids: Iterator[int], table: TrustTable, series: Mapping[str, int]) -> Chart:
    """What each method gains over zero-shot, over the milliseconds that an image takes, on a logarithmic scale.

    The cost is that of all that a method uses; where it is not known of every one (features came from a store), for all
    of them that of their own work.

    Args:
        ids: source of numbers of the page's charts.
        table: its rows; those whose cost is not known are left out.
        series: number of the colour of each method, by its printable name.
    """
    whole = all(row.ms for row in table.rows)
    what = "ms an image" if whole else "ms an image given features"
    known = [(row, row.ms if whole else row.ms_given_features) for row in table.rows]
    rows = [(row, cost) for row, cost in known if cost]
    front = _front(rows)
    costs, gains = [cost for _, cost in rows], [row.gain for row, _ in rows]

    def draw(axes: Any, width: int) -> None:
        axes.set(xscale="log", xlabel=f"{what}, logarithmic", ylabel="gain over zero-shot, points")
        low, high = min(costs) / 1.6, max(costs) * 1.6
        axes.set_xlim(low, high)
        decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        steps = (1, 2, 5) if high / low < 100 else (1,)
        ticks = [decade * step for decade in decades for step in steps if low <= decade * step <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        bottom, top = min(0.0, *gains), max(0.0, *gains)
        room = 0.12 * (top - bottom) or 1.0
        axes.set_ylim(bottom - room, top + room)
        axes.axhline(0, color=COLOUR["soft"], linewidth=1, linestyle=(0, (3, 3)), zorder=2)
        axes.step([cost for _, cost in front], [row.gain for row, _ in front], where="post", color=COLOUR["soft"], lw=1)
        for row, cost in front:
            left = cost < math.sqrt(low * high)
            at = {"xytext": (8 if left else -8, 5), "textcoords": "offset points", "ha": "left" if left else "right"}
            axes.annotate(short(row.method, width / 3), (cost, row.gain), **at)
        for row, cost in rows:
            mark(axes, cost, row.gain, series[printable(row.method)], printable(_said(row, cost, what)))

    numbers = [
        (row.method, f"{ms:.3g}", f"{row.gain:+.1f}", NOTHING if row.p is None else f"{row.p:.3g}", row.rank)
        for row, ms in rows
    ]
    title = printable(f"{table.title}: gain against cost")
    described = f"Gain over zero-shot in points over {what}. The dashed line is zero-shot. "
    described += "The stepped line joins the methods that gain more than every cheaper one; these are named."
    headings = ("method", "ms", "gain", "p", "rank")
    return Chart(title, sheet(title, headings, numbers, text=("method",)), described, draw, 330, next(ids))


def _front(rows: Sequence[tuple[TrustRow, float]]) -> list[tuple[TrustRow, float]]:
    """The methods that gain more than every cheaper one, the cheapest first."""
    front: list[tuple[TrustRow, float]] = []
    for row, cost in sorted(rows, key=lambda one: (one[1], -one[0].gain)):
        if not front or row.gain > front[-1][0].gain:
            front.append((row, cost))
    return front


def _said(row: TrustRow, cost: float, what: str) -> str:
    shown = "" if row.p is None else f", p = {row.p:.3g}"
    return f"{row.method}: {row.gain:+.1f} points{shown}, {cost:.3g} {what}"
