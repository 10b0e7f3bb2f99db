"""The plots of records: curves over sizes, a panel or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .tables import Row, Rows

Panel = Callable[[Any, Row], None]
"""Draws a record into axes of matplotlib."""


def curves(
    x: str,
    lines: Mapping[str, str],
    xlabel: str = "",
    ylabel: str = "seconds",
    *,
    unit: float = 1.0,
    log: bool = False,
    rows: Rows = lambda record: record["rows"],
) -> Panel:
    """Medians with a band between the quartiles, single values dashed, over sizes on a logarithmic axis.

    ``x`` and the names of ``lines`` are keys of the rows, whose values are divided by ``unit``; a row without one is
    left out of its curve. ``log``: a logarithmic scale with a legend; otherwise one that begins at 0.
    """

    def draw(axes: Any, record: Row) -> None:
        found = list(rows(record))
        for y, label in lines.items():
            known = [row for row in found if row.get(y) is not None]
            where, values = column(known, x), column(known, y)
            if isinstance(values[0], Mapping):
                median, q1, q3 = ([value[name] / unit for value in values] for name in ("median", "q1", "q3"))
                axes.plot(where, median, "o-", label=label)
                axes.fill_between(where, q1, q3, alpha=0.25)
            else:
                axes.plot(where, [value / unit for value in values], "s--", label=label)
        axes.set(xlabel=xlabel or x, ylabel=ylabel, yscale="log" if log else "linear")
        if log:
            axes.legend()
        else:
            axes.set_ylim(0, 1.1 * axes.yaxis.get_data_interval()[1])  # no curve lies on the frame
        at_sizes(axes, column(found, x))

    return draw


def at_sizes(axes: Any, values: Sequence[float]) -> None:
    """Make x logarithmic, with a tick at each of the values that was measured; where two are close, at the first."""
    apart = max(1.5, (max(values) / min(values)) ** (1 / 6))  # a label needs about a sixth of an axis
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value >= apart * ticks[-1]:
            ticks.append(value)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def column(rows: Sequence[Row], key: str) -> list[Any]:
    """A value of every row."""
    return [row[key] for row in rows]
