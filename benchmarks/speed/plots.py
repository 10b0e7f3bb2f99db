"""What the plots of records are drawn with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Draw = Callable[[Any, Row], None]
"""Draws a record into a figure of matplotlib."""


def curves(x: str, lines: Mapping[str, str], **how: Any) -> Draw:
    """A plot of one pair of axes: see `draw_curves`."""
    return lambda figure, record: draw_curves(figure.subplots(), record["rows"], x, lines, **how)


def draw_curves(
    axes: Any,
    rows: Sequence[Row],
    x: str,
    lines: Mapping[str, str],
    *,
    xlabel: str,
    ylabel: str = "seconds",
    log: bool = False,
) -> None:
    """Draw what was measured over sizes: medians with a band between the quartiles, or single values, dashed.

    Args:
        axes: to draw into.
        rows: of a record.
        x: key of the sizes.
        lines: key of the measurements → label.
        xlabel: what the sizes are.
        ylabel: what was measured.
        log: a logarithmic scale with a legend; otherwise one that begins at 0.
    """
    for y, label in lines.items():
        if isinstance(rows[0][y], Mapping):
            band(axes, rows, x, y, label)
        else:
            axes.plot(column(rows, x), column(rows, y), "s--", label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if log else "linear")
    at_sizes(axes, column(rows, x))
    if log:
        axes.legend()
    else:
        from_zero(axes.yaxis)


def band(axes: Any, rows: Sequence[Row], x: str, y: str, label: str) -> None:
    """Medians of ``y`` over ``x``, with a band between the quartiles."""
    where = column(rows, x)
    axes.plot(where, [row[y]["median"] for row in rows], "o-", label=label)
    axes.fill_between(where, [row[y]["q1"] for row in rows], [row[y]["q3"] for row in rows], alpha=0.25)


def at_sizes(axes: Any, values: Sequence[float]) -> None:
    """Make x logarithmic, with a tick at each of the values that was measured; where two are close, at the first."""
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value >= 1.5 * ticks[-1]:
            ticks.append(value)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def from_zero(*which: Any) -> None:
    """Let axes begin at 0 and end above the largest value, so that no curve lies on the frame."""
    for axis in which:
        _, high = axis.get_data_interval()
        axis.axes.set(**{f"{axis.axis_name}lim": (0, 1.1 * high)})


def column(rows: Sequence[Row], key: str) -> list[float]:
    """A value of every row."""
    return [row[key] for row in rows]
