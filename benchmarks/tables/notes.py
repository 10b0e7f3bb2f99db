"""What is said below a table: its legend, what holds for its numbers, and what must not be overlooked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from ..corruptions import MARK
from ..protocols import PROTOCOLS
from ..runs.records import Records
from .layouts import Layout
from .table import MARKS, Answers, TableRow


def notes(
    layout: Layout, rows: Sequence[TableRow], entries: Sequence[Mapping[str, Answers]], *, oracle: bool
) -> Iterator[str]:
    """Notes of one table.

    Args:
        layout: its columns.
        rows: our own rows of it.
        entries: by column, the answers of each method.
        oracle: whether ORACLE rows were asked for.
    """
    used = {mark for row in rows for score in row.cells.values() for mark in score.marks}
    yield from (f"{sign} {text}" for mark, (sign, text) in MARKS.items() if mark in used)
    yield from _cell_notes(layout, entries)
    yield from _other_images(layout, entries)
    if any(row.total is not None and len(row.cells) > 1 for row in rows):
        yield "p for all cells together treats their images as independent, which corruptions of one image are not."
    runs = [one.run for row in entries for one in row.values()]
    yield f"images/s: as if each method ran alone, with teacher and views, without decoding; {_machines(runs)}."
    yield from conditions(runs, stream=any(row.settings.get("stream") for row in rows))
    if any(row.kind == "oracle" for row in rows):
        yield "ORACLE: chosen with the test labels, an upper bound."
    elif oracle:
        yield "No ORACLE row: no run of this table recorded per-step predictions (--record-steps)."


def conditions(runs: Iterable[Records], *, stream: bool) -> Iterator[str]:
    """By which protocol the runs were made, with which descriptors, whether from a store, and in which orders."""
    runs = list(runs)
    configs = [run.run["config"] for run in runs]
    for name in sorted({str(config["protocol"]) for config in configs}):
        yield f"Protocol {name}: {PROTOCOLS[name]}."
    yield from _descriptors(runs)
    if stored := [str(run.path) for run in runs if any("features" in one for one in run.run["sessions"])]:
        said = ", ".join(dict.fromkeys(stored))
        yield f"Features were read from a store in {said}, so their times exclude the teacher and the views."
    if stream:
        orders = sorted({str(config["order"]) for config in configs})
        yield f"Stream methods saw the images in the order of seed {', '.join(orders)}."


def _descriptors(runs: Iterable[Records]) -> Iterator[str]:
    """Which methods had LLM descriptors of the classes, on which data sets, from which file."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        files: dict[str, tuple[dict[str, None], dict[str, None]]] = {}
        for cell in run.cells.values():
            for method, used in cell.get("published", {}).items():
                if "descriptors" in used:
                    file = f"{used['descriptors']} (SHA-256 {used['descriptors_sha256'][:12]}…)"
                    methods, titles = files.setdefault(file, ({}, {}))
                    methods[method], titles[cell["title"]] = None, None
        for file, (methods, titles) in files.items():
            what = f"LLM descriptors of classes from {file}: {', '.join(methods)} on {', '.join(titles)}"
            found.setdefault(what, {})[str(run.path)] = None
    yield from (f"{what}, in {', '.join(paths)}." for what, paths in found.items())


def warnings(layout: Layout, rows: Sequence[TableRow], entries: Sequence[Mapping[str, Answers]]) -> Iterator[str]:
    """Warnings of one table; arguments as of `notes`."""
    yield from _data_warnings(layout, entries)
    yield from _chance_warnings(layout, rows, entries)


def _machines(runs: Iterable[Records]) -> str:
    """What the runs were computed on."""
    sessions = [session for run in runs for session in run.run["sessions"]]
    return "; ".join(
        dict.fromkeys(
            f"{session['device_name']}, {session['threads']} threads, processes: {session['processes']}"
            for session in sessions
        )
    )


def _cell_notes(layout: Layout, rows: Iterable[Mapping[str, Answers]]) -> list[str]:
    """What the data sets' records say, each note once with the columns that it is about.

    That corruptions were generated is left to the mark.
    """
    columns: dict[str, list[str]] = {}
    for column in layout.columns:
        for entries in rows:
            for note in entries[column].cell["notes"] if column in entries else ():
                if MARK not in note and column not in columns.setdefault(note, []):
                    columns[note].append(column)
    return [f"{', '.join(about)}: {note}" for note, about in columns.items()]


def _other_images(layout: Layout, rows: Iterable[Mapping[str, Answers]]) -> Iterator[str]:
    """A note for each column whose rows are of different images: the difference of two of them may come from that."""
    for column in layout.columns:
        if len({entries[column].cell["fingerprint"] for entries in rows if column in entries}) > 1:
            yield f"{column}: the rows are not all of the same images; compare them with care."


def _data_warnings(layout: Layout, rows: Iterable[Mapping[str, Answers]]) -> Iterator[str]:
    """What the data sets' records warn of: pictures that are not what the column says."""
    for column in layout.columns:
        told = (entries[column].cell.get("warnings", ()) for entries in rows if column in entries)
        yield from dict.fromkeys(f"{column}: {warning}" for warnings in told for warning in warnings)


def _chance_warnings(layout: Layout, rows: Sequence[TableRow], entries: Iterable[Mapping[str, Answers]]) -> list[str]:
    """One warning for each column in which a method is no better than guessing."""
    headers = {column: one.cell for row in entries for column, one in row.items()}
    warnings = []
    for column in layout.columns:
        scores = [
            f"{row.method} {row.cells[column].accuracy:.1f} % of {row.cells[column].n}"
            for row in rows
            if row.kind == "ours" and column in row.cells and "near chance" in row.cells[column].marks
        ]
        if scores:
            classes = headers[column]["classes"]
            warnings.append(
                f"{column}: {', '.join(scores)}: within two standard errors of chance ({100 / classes:.1f} % for "
                f"{classes} classes). Likely causes: the wrong parent folder; classes sorted in another order than the "
                "class names; the label set of another data set; openai weights without their QuickGELU config; too "
                "few images to tell."
            )
    return warnings
