"""Writes the tables of benchmarks/README.md from the records: `python -m apm.benchmarks.studies.readme_tables`.

docs/table-of-everything.md, which shows some of the same figures, is written with them.

The text around the tables is written by hand; what stands between two markers is made here, and a test holds the one
to the other.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apm.errors import UsageError

from ..corruptions import CORRUPTIONS
from ..runs.records import Records, RunFolder
from ..runs.rows import MethodRows, joined
from ..tables import formats
from ..tables.build import make_tables
from ..tables.stats import changes_by_image, paired_test, standard_error
from ..tables.table import Table
from . import choose_target, everything, evidence
from .study import RESULTS, ROOT, argument_parser, fill, markdown, plus_minus, read_record, run

DOCUMENT = ROOT / "benchmarks" / "README.md"
TINY, CROSS, CHOICE = ("tiny-clean", "tiny-corrupted"), "cross-dataset", "choose-target.json"
EVIDENCE = ("features", "others", "tuned", "fewer", "paper", "best")
"""Places that show records of `evidence`, called ``evidence-PLACE.json``."""
PAPER_TARGET = "apm"


def groups(tiny: Table, cross: Table) -> dict[str, list[tuple[Table, str]]]:
    """The cells that are looked at together: clean, corrupted, each other data set, and these together."""
    corrupted = [(tiny, column) for column in tiny.columns if column != "clean"]
    others = {column: [(cross, column)] for column in cross.columns if cross.rows[0].cells.get(column)}
    together = [cell for cells in others.values() for cell in cells]
    return {
        "Tiny ImageNet, clean": [(tiny, "clean")],
        f"Tiny ImageNet, {len(corrupted)} corruptions": corrupted,
        **others,
        f"these {len(others)} together": together,
    }


def answers(cells: Iterable[tuple[Table, str]], method: str) -> list[MethodRows]:
    """The rows of one method in each of the cells."""
    return [next(row for row in table.rows if row.method == method).answers[column].rows for table, column in cells]


def correct(parts: Sequence[MethodRows]) -> NDArray[np.bool_]:
    """Which images are answered rightly, cell behind cell; an image without an answer is not."""
    return np.concatenate([part.rank == 1 for part in parts])


def images(cells: Iterable[tuple[Table, str]], method: str) -> list[str]:
    """What tells the images of `correct` apart; one that stands in several cells of a table has one name."""
    cells = list(cells)
    places = ["" if column == "clean" or column in CORRUPTIONS else column for _, column in cells]
    return [f"{place}/{name}" for place, part in zip(places, answers(cells, method), strict=True) for name in part.id]


def probability(before: NDArray[np.bool_], after: NDArray[np.bool_], names: Sequence[str]) -> float:
    """The exact paired p-value; the answers to one image, under several corruptions, change together."""
    return paired_test(changes_by_image(before, after, np.unique(names, return_inverse=True)[1]))


def paired(tiny: Table, cross: Table, reference: str, methods: Sequence[str]) -> str:
    """Each method against ``reference`` on the same images: a markdown table, one row a group and method."""
    rows = []
    for name, cells in groups(tiny, cross).items():
        before = correct(answers(cells, reference))
        n = len(before)
        for method in methods:
            after = correct(answers(cells, method))
            lost, won = int((before & ~after).sum()), int((~before & after).sum())
            share, base = float(after.mean()), float(before.mean())
            score = plus_minus((100 * share, 100 * standard_error(share, n)), 1)
            p = probability(before, after, images(cells, method))
            rows.append((name, method, n, score, f"{100 * base:.1f}", lost, won, f"{p:.2g}"))
    return markdown(("images", "method", "n", "top-1", reference, "lost", "won", "p"), rows, text=2)


def student(tiny: Table, cross: Table, method: str) -> str:
    """How far a student departs from its teacher, and how sure the teacher's neighbourhood was: a markdown table."""
    titles = (
        *("images", "n", "agree %", "cosine, median", "cosine, minimum", "right→wrong", "wrong→right", "p"),
        *("probability where they agree", "where they differ"),
    )
    return markdown(titles, ((name, *_student(cells, method)) for name, cells in groups(tiny, cross).items()))


def _student(cells: Sequence[tuple[Table, str]], method: str) -> Iterator[object]:
    """The cells of one group."""
    parts = answers(cells, method)
    column = partial(joined, parts)
    same = column("prediction") == column("teacher_prediction")
    teacher, own = column("teacher_prediction") == column("label"), correct(parts)
    lost, won = int((teacher & ~own).sum()), int((~teacher & own).sum())
    sure = column("probability")
    yield from (len(same), f"{100 * same.mean():.1f}")
    yield from (f"{np.median(column('cosine')):.4f}", f"{column('cosine').min():.3f}")
    p = probability(teacher, own, images(cells, method))
    yield from (lost, won, f"{p:.2g}", f"{np.median(sure[same]):.2f}")
    yield f"{np.median(sure[~same]):.2f}" if (~same).any() else ""


def commands(*runs: Records) -> str:
    """The commands that made runs, and what they ran on."""
    return evidence.made_by([evidence.described(run) for run in runs])


def parts(results: Path = RESULTS) -> Iterator[tuple[str, str]]:
    """Name and text of everything that the document takes from records."""
    small, others = [Records.open(results / name) for name in TINY], Records.open(results / CROSS)
    (tiny,), (cross,) = make_tables(small, published=False), make_tables([others], published=False)
    methods = [row.method for row in tiny.rows]
    yield "tiny", f"{commands(*small)}\n\n{formats.markdown([tiny])}".replace(f"{results}/", "results/")
    for place in EVIDENCE:
        shown = evidence.table(read_record(results / f"evidence-{place}.json"))
        yield place, shown.replace("\n### ", "\n#### ").replace(f"{results}/", "results/")
    yield "cross", f"{commands(others)}\n\n{formats.markdown([cross])}".replace(f"{results}/", "results/")
    yield "helps", paired(tiny, cross, "zero-shot", [name for name in methods if name != "zero-shot"])
    yield "targets", paired(tiny, cross, PAPER_TARGET, [name for name in methods if name.startswith("apm[")])
    yield "student", student(tiny, cross, PAPER_TARGET)
    choice = read_record(results / CHOICE)
    yield "choice", f"    {choice['command']}\n\n{choose_target.table(choice)}"


def collect(run: Path, results: Path = RESULTS) -> None:
    """Copy a finished run among the records: the same rows, sorted, in one shard for each cell instead of hundreds."""
    source, target = RunFolder(run), RunFolder(results / run.name)
    record = source.read_run()
    if record is None:
        raise UsageError(f'No run at "{run}".')
    shutil.rmtree(target.path, ignore_errors=True)
    shutil.copytree(source.path / "shards", target.path / "shards")
    for cell in record["cells"]:
        target.merge(cell)
    target.write_run(record)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argument_parser("readme_tables", __doc__)
    parser.add_argument(
        "--collect", type=Path, nargs="+", default=[], metavar="RUN", help="first add these runs to the records"
    )
    for run_folder in parser.parse_args(arguments).collect:
        collect(run_folder)
    for name, text in parts():
        fill(DOCUMENT, f"measured: {name}", text)
    everything.write()


if __name__ == "__main__":
    sys.exit(run(main))
