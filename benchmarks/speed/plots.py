"""The plots of records: curves over sizes, in one panel or several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """Curves of what was measured over sizes, which are on a logarithmic axis.

    Attributes:
        x: key of the sizes.
        lines: key of the measurements → label; rows without one are left out of its curve.
        xlabel: what the sizes are; "": as their key says.
        ylabel: what was measured.
        unit: what it is divided by.
        log: a logarithmic scale with a legend; otherwise one that begins at 0.
        rows: of a record.
    """

    x: str
    lines: Mapping[str, str]
    xlabel: str = ""
    ylabel: str = "seconds"
    unit: float = 1.0
    log: bool = False
    rows: Callable[[Row], Iterable[Row]] = lambda record: record["rows"]

    def draw(self, axes: Any, record: Row) -> None:
        """Draw medians with a band between the quartiles; single values dashed."""
        rows = list(self.rows(record))
        for y, label in self.lines.items():
            known = [row for row in rows if row.get(y) is not None]
            where, values = column(known, self.x), column(known, y)
            if isinstance(values[0], Mapping):
                median, q1, q3 = ([value[name] / self.unit for value in values] for name in ("median", "q1", "q3"))
                axes.plot(where, median, "o-", label=label)
                axes.fill_between(where, q1, q3, alpha=0.25)
            else:
                axes.plot(where, [value / self.unit for value in values], "s--", label=label)
        axes.set(xlabel=self.xlabel or self.x, ylabel=self.ylabel, yscale="log" if self.log else "linear")
        if self.log:
            axes.legend()
        else:
            axes.set_ylim(0, 1.1 * axes.yaxis.get_data_interval()[1])  # no curve lies on the frame
        at_sizes(axes, column(rows, self.x))


def side_by_side(*panels: Panel) -> Callable[[Any, Row], None]:
    """A plot of such panels: draws a record into a figure of matplotlib."""

    def draw(figure: Any, record: Row) -> None:
        for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
            panel.draw(axes, record)

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
