"""How records are shown in words: texts, and tables, in which braces name what was measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from string import Formatter
from typing import Any

from ..studies.study import markdown

Row = Mapping[str, Any]
Rows = Callable[[Row], Iterable[Row]]
SCALES = {"T": 1e12, "G": 1e9, "M": 1e6, "m": 1e-3, "u": 1e-6}


class _Words(Formatter):
    """Formats what was measured.

    ``{}`` shows a time with its spread, ``{:x}`` a ratio with its spread, ``{:s}`` a time that has none; a number's
    format shows the median. Before a number's format, ``T``, ``G``, ``M``, ``m`` and ``u`` divide by 1e12 … 1e-6. What
    is missing, or counts no operations, is shown as –.
    """

    def get_value(self, key: int | str, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return kwargs.get(str(key))

    def format_field(self, value: Any, spec: str) -> str:
        if value is None or (spec[:1] == "G" and not value):
            return "–"
        if isinstance(value, Mapping):
            if spec in ("", "x"):
                return _spread(value, ratio=bool(spec))
            value = value["median"]
        if spec == "s":
            factor, unit = _unit(value)
            return _digits(value * factor) + unit
        if spec[:1] in SCALES:
            value, spec = value / SCALES[spec[0]], spec[1:]
        return _digits(value) if spec == "3" else format(value, spec or ("," if type(value) is int else ""))


words = _Words()


def shown(*parts: str | tuple[Rows, str]) -> Callable[[Row], str]:
    """How the records of a kind are shown: the parts, each of paragraphs and tables with an empty line between them.

    A table is two lines in bars: its titles, and the cells of every row; none where there are no rows. Its rows are the
    record's, or what comes with its part. A paragraph has values of settings and summary; a line of it that names
    something which a record has not is left out.
    """
    pairs = [(lambda record: record["rows"], part) if isinstance(part, str) else part for part in parts]

    def show(record: Row) -> str:
        known = {**record["settings"], **record["summary"]}
        found = []
        for rows, part in pairs:
            for block in re.split(r"\n\s*\n", part.strip()):
                lines = [re.sub(r"\s+", " ", line.strip()) for line in block.splitlines()]
                made = _table(lines, rows(record)) if block.lstrip().startswith("|") else _paragraph(lines, known)
                found.append(made)
        return "\n".join(f"{text}\n" for text in found if text)

    return show


def _table(lines: Iterable[str], rows: Iterable[Row]) -> str:
    titles, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    made = [[words.format(cell, **row) for cell in cells] for row in rows]
    return markdown(titles, made, text=None) if made else ""


def _paragraph(lines: Iterable[str], known: Row) -> str:
    def complete(line: str) -> bool:
        names = (name for _, name, _, _ in words.parse(line) if name)
        return all(words.get_field(name, (), known)[0] is not None for name in names)

    return "\n".join(words.format(line, **known) for line in lines if complete(line))


def _spread(values: Row, *, ratio: bool) -> str:
    """Median, quartiles and number; of a time in a common unit."""
    factor, unit = (1.0, "") if ratio else _unit(values["median"])
    middle, q1, q3 = (_digits(values[name] * factor) for name in ("median", "q1", "q3"))
    return f"{middle}{unit} ({q1}–{q3}, {values['n']})"


def _unit(seconds: float) -> tuple[float, str]:
    """How a time is written: what it is multiplied by, and the unit."""
    return (1.0, " s") if seconds >= 1 else (1e3, " ms") if seconds >= 1e-3 else (1e6, " µs")


def _digits(value: float) -> str:
    """Three significant digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def provenance(record: Row) -> str:
    """Command, date, commit, machine and versions, in small print."""
    machine, load = record["environment"], record["environment"]["load_average"]
    before, after = ("–" if value is None else value[0] for value in (load["before"], load["after"]))
    return (
        f"<sub>`{record['command']}` · {record['date']} · commit {machine['git_commit'] or 'unknown'} · "
        f"{machine['device_name']}, {machine['cores']} cores, {machine['threads']} threads · "
        f"load {before} before, {after} after · torch {machine['versions']['torch']}, "
        f"Python {machine['versions']['python']} · record `{record['file']}`</sub>\n"
    )
