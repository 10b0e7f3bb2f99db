"""Tables of records, in markdown, and how they show times and ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..studies.study import markdown

Row = Mapping[str, Any]
Spread = Mapping[str, float]
Columns = Mapping[str, str | Callable[[Row], str]]
"""Title → a key of the rows, or what a row says there."""


def table(columns: Columns, rows: Iterable[Row]) -> str:
    """A table in markdown: times with their spread, whole numbers with commas, – for what is not there."""

    def cell(row: Row, of: str | Callable[[Row], str]) -> str:
        value = row.get(of) if isinstance(of, str) else of(row)
        if isinstance(value, Mapping):
            return time_text(value)
        return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    return markdown(columns, ([cell(row, of) for of in columns.values()] for row in rows), text=None) + "\n"


def shown(columns: Columns, note: str) -> Callable[[Row], str]:
    """How the records of a kind are shown: a table of the rows, and a line with ``{settings}`` of the record in it."""
    return lambda record: f"{table(columns, record['rows'])}\n{note.format(**record['settings'])}\n"


def time_text(values: Spread) -> str:
    """Median and quartiles in a common unit, three digits."""
    factor, unit = (1.0, "s") if values["median"] >= 1 else (1e3, "ms") if values["median"] >= 1e-3 else (1e6, "µs")
    median, q1, q3 = (digits(values[name] * factor) for name in ("median", "q1", "q3"))
    return f"{median} {unit} ({q1}–{q3}, {values['n']})"


def ratio_text(values: Spread) -> str:
    """Median, quartiles and number."""
    return f"{digits(values['median'])} ({digits(values['q1'])}–{digits(values['q3'])}, {values['n']})"


def digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def provenance(record: Row) -> str:
    """Command, date, commit, machine and versions, in small print."""
    machine, load = record["environment"], record["environment"]["load_average"]
    versions = machine["versions"]
    before, after = ("–" if value is None else value[0] for value in (load["before"], load["after"]))
    return (
        f"<sub>`{record['command']}` · {record['date']} · commit {machine['git_commit'] or 'unknown'} · "
        f"{machine['device_name']}, {machine['cores']} cores, {machine['threads']} threads · "
        f"load {before} before, {after} after · torch {versions['torch']}, Python {versions['python']} · "
        f"record `{record['file']}`</sub>\n"
    )
