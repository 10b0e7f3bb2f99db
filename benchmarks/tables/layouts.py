"""The layouts of tables: which cells of runs are the columns of one table, and which published rows belong to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..corruptions import CORRUPTIONS
from ..datasets.specs import SUITES
from ..runs.records import Records

NATURAL_SHIFTS, CROSS_DATASET = SUITES["natural-shifts"], SUITES["cross-dataset"]


@dataclass(frozen=True)
class Layout:
    """One table: its columns, and how to find them."""

    title: str
    columns: tuple[str, ...]
    column_of: Callable[[Mapping[str, Any]], str | None]
    """The column of a cell of a run, None where the cell is no part of the table."""
    published: str | None = None
    averaged: tuple[str, ...] | None = None
    has_ood: bool = False


def layouts(runs: Sequence[Records]) -> Iterator[Layout]:
    """The paper's three layouts, then one for each corrupted data set and level, then what is left."""
    cells = [cell for run in runs for cell in run.cells.values()]

    def clean(titles: Sequence[str]) -> Callable[[Mapping[str, Any]], str | None]:
        return lambda cell: cell["title"] if cell["corruption"] is None and cell["title"] in titles else None

    def corrupted(title: str, level: int) -> Callable[[Mapping[str, Any]], str | None]:
        def column(cell: Mapping[str, Any]) -> str | None:
            if cell["title"] != title or cell["level"] not in (None, level):
                return None
            return cell["corruption"] or "clean"

        return column

    first = "Table 1: natural distribution shifts"
    yield Layout(first, NATURAL_SHIFTS, clean(NATURAL_SHIFTS), "natural_shifts.csv", has_ood=True)
    for level in sorted({cell["level"] for cell in cells if cell["title"] == "imagenet-c"}):
        yield Layout(
            f"Table 2: ImageNet-C, level {level}",
            tuple(sorted(CORRUPTIONS)),  # the paper's order
            corrupted("imagenet-c", level),
            "imagenet_c_level5.csv" if level == 5 else None,
        )
    yield Layout("Table 3: cross-dataset", CROSS_DATASET, clean(CROSS_DATASET), "cross_dataset.csv")
    done = {*NATURAL_SHIFTS, *CROSS_DATASET}
    shifted = dict.fromkeys(
        (cell["title"], cell["level"]) for cell in cells if cell["corruption"] and cell["title"] != "imagenet-c"
    )
    for title, level in shifted:
        mine = [cell for cell in cells if cell["title"] == title and cell["level"] in (None, level)]
        present = {cell["corruption"] for cell in mine}
        averaged = tuple(name for name in sorted(CORRUPTIONS) if name in present)
        columns = ("clean", *averaged) if None in present else averaged
        yield Layout(f"{title}: corruptions at level {level}", columns, corrupted(title, level), averaged=averaged)
        done.add(title)
    rest = tuple(dict.fromkeys(cell["title"] for cell in cells if not cell["corruption"] and cell["title"] not in done))
    yield Layout("Other data sets", rest, clean(rest))
