"""One page of the whole: `python -m apm.benchmarks.studies.everything` writes docs/table-of-everything.md.

Every row of the paper's three tables and every system of its authors' talks: the command that runs it here, what of it
was measured, and what it takes to run it as published. Rows come from the published tables, commands from the recipes
of `apm reproduce` and the registry of methods, figures from the records in benchmarks/results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apm.test_time.options import StudentOptions

from ..datasets.specs import DATASETS
from ..reproduce.recipes import PAPER, WEIGHTS, PaperTable, Recipe
from ..runs.records import Records
from ..tables.build import make_tables, published_rows
from ..tables.stats import standard_error
from ..tables.table import TableRow
from .study import RESULTS, ROOT, argument_parser, fill, markdown, plus_minus, read_record, run
from .systems import NOT_HERE, NOT_MEASURED, systems

DOCUMENT = ROOT / "docs" / "table-of-everything.md"

BESIDE = {
    "MTA": "mta",
    "ZERO": "zero",
    "TDA": "tda",
    "DMN-ZS": "dmn:alpha=oracle",
    "CLIP zero-shot (open_clip)": "zero-shot",
}
"""Published rows that `apm reproduce` has no recipe for → the method, as `apm bench` takes it."""
TRAINED = {
    "coop": ("PROMPT", "`apm prompts learn coop IMAGENET --shots 16`"),
    "cocoop": ("PROMPT", "`apm prompts learn cocoop IMAGENET --shots 16`"),
    "probe": ("PROBE", "`apm mae probe IMAGENET --base MAE --out PROBE`"),
    "finetuned": ("FINETUNED", "`apm mae finetune IMAGENET --base MAE --out FINETUNED`"),
    "joint": ("JOINT", "`apm mae joint IMAGENET --base MAE --out JOINT`"),
}
"""Options of `apm reproduce` for what is learned from ImageNet's labels → file, and what makes it."""
MEASURED = {1: ("tiny-clean",), 2: ("tiny-corrupted",), 3: ("cross-dataset",)}
"""Runs in benchmarks/results that stand for a table here, with the embedded teacher."""
HEADS, HEADS_RECORD = {"vit-probe": "probe", "ttt-mae": "adapted"}, "mae-bench.json"
"""Methods that were measured with a head of their own → their entry in the record of `mae_bench`."""


def recipe_of(table: PaperTable, row: Mapping[str, str]) -> Recipe | None:
    """The recipe of a published row; None where it has none."""
    found = (one for one in table.recipes if (one.row, one.teacher) == (row["method"], row["teacher"]))
    return next(found, None)


def command_of(table: PaperTable, row: Mapping[str, str]) -> str:
    """What runs a published row here."""
    recipe = recipe_of(table, row)
    if recipe is not None:
        learned = f" --{recipe.learned.option} {TRAINED[recipe.learned.option][0]}" if recipe.learned else ""
        return f"`apm reproduce {table.number} --root DATA --method {recipe.method}{learned}`"
    method = BESIDE.get(row["method"])
    if method is None:
        return NOT_HERE
    what = {1: "natural-shifts", 2: "imagenet-c --level 5", 3: "cross-dataset"}[table.number]
    more = " --oracle" if "oracle" in method else " --prompts openai" if _ensemble(row) else ""
    return f"`apm bench {what} --root DATA --method {method} --teacher {WEIGHTS[row['teacher']]}{more}`"


def _ensemble(row: Mapping[str, str]) -> bool:
    return row["prompts"] == "80 templates" or row["prompts"].startswith("ensemble")


def needs_of(table: PaperTable, row: Mapping[str, str]) -> str:
    """Weights beside the table's data, and a learned prompt or head."""
    recipe = recipe_of(table, row)
    parts = [f"`{WEIGHTS[row['teacher']]}`"] if row["teacher"] in WEIGHTS else []
    if recipe is not None and recipe.learned:
        parts.append(TRAINED[recipe.learned.option][1])
    return ", ".join(parts)


def images_of(table: PaperTable) -> int:
    """Images that one row of a table is about."""
    if table.corrupted:
        return len(table.columns) * DATASETS["imagenet-c"].images
    return sum(DATASETS[name].images for name in table.columns)


def _published(row: Mapping[str, str], columns: Sequence[str]) -> str:
    cells = [float(row[name]) for name in columns if row.get(name)]
    mean = f"{sum(cells) / len(cells):.1f}"
    printed = row.get("printed_average") or mean
    return mean if abs(float(printed) - float(mean)) < 0.1 else f"{mean} (printed: {printed})"


def measured_rows(table: PaperTable) -> dict[str, TableRow]:
    """Our rows that stand for a table, by method."""
    runs = [Records.open(RESULTS / name) for name in MEASURED[table.number]]
    return {row.method: row for one in make_tables(runs, published=False) for row in one.rows}


def _measured(found: Mapping[str, TableRow], table: PaperTable, row: Mapping[str, str]) -> str:
    recipe = recipe_of(table, row)
    method = recipe.method if recipe else BESIDE.get(row["method"], "")
    if method in HEADS and (heads := _heads()) is not None:
        share = heads[HEADS[method]]
        return f"{plus_minus((100 * share, 100 * standard_error(share, heads['answers'])), 1)} †"
    if method not in found or _ensemble(row) or row["teacher"] not in (table.recipes[0].teacher, "none"):
        return NOT_MEASURED
    total = found[method].total
    if total is None or total.accuracy is None:
        return NOT_MEASURED
    return f"{total.accuracy:.1f} ± {total.stderr:.1f}" if total.stderr is not None else f"{total.accuracy:.1f}"


def _heads() -> dict[str, Any] | None:
    """What a head of our own was measured at, on all corruptions together."""
    path = RESULTS / HEADS_RECORD
    return read_record(path)["together"] if path.is_file() else None


def paper_table(table: PaperTable) -> str:
    """Every row of one of the paper's tables, and what all of them need."""
    found = measured_rows(table)
    rows = [
        (
            f"{row['method']} · {row['teacher']}" if row["teacher"] != "none" else row["method"],
            _published(row, table.columns),
            command_of(table, row),
            _measured(found, table, row),
            needs_of(table, row),
        )
        for row in published_rows(table.published)
    ]
    titles = ("row", "published mean", "command", "measured here", "needs, besides the data")
    return "\n\n".join([_data(table), markdown(titles, rows, text=None), _stands_for(table, found), hours(table)])


def _data(table: PaperTable) -> str:
    names = ("imagenet-c",) if table.corrupted else table.columns
    origins = "; ".join(f"{DATASETS[name].title} ({DATASETS[name].origin})" for name in names)
    return f"Data, {images_of(table):,} images per row: {origins}."


def _stands_for(table: PaperTable, found: Mapping[str, TableRow]) -> str:
    (first, *_) = found.values()
    images = sum(score.n + score.failed for score in first.cells.values())
    return (
        f"Measured here: top-1 in percent over {images:,} images of `benchmarks/results/{MEASURED[table.number][0]}` "
        f"with the {first.teacher} teacher, which stands in for the paper's and is far smaller. Images and teacher "
        f"differ from the published ones, so compare these numbers only with one another.{_of_heads(table)}"
    )


def _of_heads(table: PaperTable) -> str:
    heads = _heads()
    if heads is None or not any(recipe.method in HEADS for recipe in table.recipes):
        return ""
    return (
        f" †: over {heads['answers']:,} images of `benchmarks/results/{HEADS_RECORD}`, with a small network "
        "trained on labels of these classes ([masked autoencoders](mae.md))."
    )


def hours(table: PaperTable) -> str:
    """How long a row of APM takes, from the recorded time of a step."""
    record = read_record(RESULTS / "steps-paper.json")
    machine, second, steps = record["environment"], record["seconds_per_step"], StudentOptions.steps
    total = images_of(table) * steps * second / 3600
    return (
        f"Hours: a row of APM takes {total:,.0f} h on {machine['threads']} threads of {machine['processor']} for the "
        f"students alone ({steps} steps of {1000 * second:.0f} ms per image). For the other rows and the teacher, "
        f"`apm reproduce {table.number} --plan` estimates them on your machine. Nothing was measured on a GPU."
    )


def parts() -> Iterator[tuple[str, str]]:
    """Name and text of each part of the page."""
    for table in PAPER.values():
        yield f"table {table.number}", paper_table(table)
    yield "systems", systems()


def write(document: Path = DOCUMENT) -> None:
    """Fill the page."""
    for name, text in parts():
        fill(document, name, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    argument_parser("everything", __doc__).parse_args(arguments)
    write()


if __name__ == "__main__":
    sys.exit(run(main))
