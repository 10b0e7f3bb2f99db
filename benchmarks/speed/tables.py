"""How records are shown in words: tables and sentences, each a format string over what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from ..studies.study import markdown

Row = Mapping[str, Any]
SCALES = {"G": 1e9, "M": 1e6, "m": 1e-3, "u": 1e-6}


class _Words(Formatter):
    """Formats what was measured.

    Of a time with its spread ``{}`` is all of it, of a ratio ``{:x}``; with a number's format, its median. Before that,
    ``G``, ``M``, ``m`` and ``u`` divide by 1e9, 1e6, 1e-3 and 1e-6. What is not there, or counts no operation, is –.
    """

    def get_value(self, key: int | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return kwargs.get(str(key))

    def format_field(self, value: Any, spec: str) -> str:
        if value is None or (spec[:1] == "G" and not value):
            return "–"
        if isinstance(value, Mapping):
            if spec in ("", "x"):
                return (ratio_text if spec else time_text)(value)
            value = value["median"]
        if spec[:1] in SCALES:
            value, spec = value / SCALES[spec[0]], spec[1:]
        return digits(value) if spec == "3" else format(value, spec or ("," if type(value) is int else ""))


words = _Words()


@dataclass(frozen=True)
class Table:
    """A table of a record.

    Attributes:
        columns: title → format string over a row.
        rows: of a record.
    """

    columns: Mapping[str, str]
    rows: Callable[[Row], Iterable[Row]] = lambda record: record["rows"]


def table(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """A table in markdown: title → format string over a row. Nothing where there are no rows."""
    cells = [[words.format(cell, **row) for cell in columns.values()] for row in rows]
    return markdown(columns, cells, text=None) + "\n" if cells else ""


def shown(*parts: Table | str) -> Callable[[Row], str]:
    """How the records of a kind are shown: tables, and paragraphs with values of their settings and summary in braces.

    A line of a paragraph that names something which a record has not is left out.
    """

    def show(record: Row) -> str:
        known = {**record["settings"], **record["summary"]}
        found = [
            table(part.columns, part.rows(record)) if isinstance(part, Table) else _paragraph(part, known)
            for part in parts
        ]
        return "\n".join(filter(None, found))

    return show


def _paragraph(text: str, known: Mapping[str, Any]) -> str:
    def complete(line: str) -> bool:
        names = (name for _, name, _, _ in words.parse(line) if name)
        return all(words.get_field(name, (), known)[0] is not None for name in names)

    lines = "\n".join(filter(complete, text.strip().splitlines()))
    return words.format(lines, **known) + "\n" if lines else ""


def time_text(values: Row) -> str:
    """Median and quartiles in a common unit, three digits."""
    factor, unit = (1.0, "s") if values["median"] >= 1 else (1e3, "ms") if values["median"] >= 1e-3 else (1e6, "µs")
    median, q1, q3 = (digits(values[name] * factor) for name in ("median", "q1", "q3"))
    return f"{median} {unit} ({q1}–{q3}, {values['n']})"


def ratio_text(values: Row) -> str:
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
