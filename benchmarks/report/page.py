"""The page: sections put together, filled into the template, and written.

The template library escapes everything; on top of that the page's content security policy lets no script run but its
own, and nothing be loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import count
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import apm
from apm.errors import UsageError
from apm.images.files import write_atomically
from apm.images.paths import printable

from ..runs.records import Records
from ..tables.build import make_tables
from ..tables.formats import DETAIL_HEADINGS, details, grid
from ..tables.stats import BINS, PER_BIN
from ..tables.table import Table
from . import sections
from .charts import NARROW, WIDE
from .drawing import mark_class, shape
from .flipped import flipped_images
from .pictures import Pictures
from .series import Part, name_rows
from .settings import describe_run
from .sheet import Sheet, sheet
from .trust import trust

MARKER = '<meta name="generator" content="apm report">'
"""Stands near the start of every page: only a file that holds it is replaced."""


_TEXT = ("method", "teacher", "prompts", "source")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report shows beside the runs' own numbers."""

    published: bool = True
    oracle: bool = False
    flips: int = 12
    """Flipped images shown for each cell."""
    pictures: bool = True
    """Whether they are shown as pictures where these can be found."""


@dataclass(frozen=True)
class Block:
    """A table of `benchmarks.tables` with what belongs to it."""

    title: str
    scores: Sheet
    details: Sheet | None
    notes: tuple[str, ...]


def write_report(paths: Sequence[Path], out: Path, options: Options) -> tuple[Path, list[Table]]:
    """Write ``out/index.html`` from run folders; the same records give the same bytes.

    Args:
        paths: run folders.
        out: folder, made where it does not exist. An earlier report in it is replaced, other files are left alone.
        options: what to show.

    Returns:
        The page's path, and the tables in it.

    Raises:
        UsageError: no run, a damaged one, one given twice, no rows yet, or an index.html that is no report.
        ApmError: the page cannot be written.
    """
    page = out / "index.html"
    _check_target(out, page)
    places = [path.resolve() for path in paths]
    twice = [str(path) for number, path in enumerate(paths) if places[number] in places[:number]]
    if twice:
        raise UsageError(f"The run {', '.join(twice)} was given more than once.")
    runs = [Records.open(path) for path in paths]
    tables = make_tables(runs, published=options.published, oracle=options.oracle)
    if not tables:
        raise UsageError(f"No rows yet in {', '.join(map(str, paths))}.")
    html = render(runs, tables, options)
    write_atomically(page, html.encode("utf-8", "backslashreplace"))
    return page, tables


def render(runs: Sequence[Records], tables: Sequence[Table], options: Options) -> str:
    """Return the page as text."""
    parts = name_rows(tables)
    ids = count(1)
    environment = Environment(
        loader=PackageLoader(__package__ or "", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    folder = resources.files(__package__) / "templates"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        marker=Markup(MARKER),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=apm.__version__,
        blocks=[_block(table) for table in tables],
        warnings=list(dict.fromkeys(printable(warning) for table in tables for warning in table.warnings)),
        legend=_legend(parts),
        runs=[describe_run(run) for run in runs],
        images=sum(counts["images"] for run in runs for counts in run.run["counts"].values()),
        cells=sum(len(run.cells) for run in runs),
        trust=trust(ids, tables, parts),
        accuracy=sections.accuracy(ids, parts),
        flips=sections.flips(ids, parts),
        flipped=flipped_images(parts, limit=options.flips, pictures=Pictures(wanted=options.pictures)),
        steps=sections.steps(ids, parts),
        last_step=sections.last_step(ids, parts),
        absent=sections.absent(parts),
        calibration=sections.calibration(ids, parts),
        speed=sections.speed(ids, parts),
        bins=BINS,
        per_bin=PER_BIN,
        narrow=NARROW,
        wide=WIDE,
        options=options,
    )


def _block(table: Table) -> Block:
    headings, rows, notes = grid(table)
    detailed = details(table)
    return Block(
        title=printable(table.title),
        scores=sheet(
            "Accuracy ± standard error, percent",
            headings,
            rows,
            text=_TEXT,
            kinds=[r.kind for r in table.rows],
        ),
        details=sheet("All cells together, against the teacher", DETAIL_HEADINGS, detailed, text=_TEXT)
        if detailed
        else None,
        notes=tuple(map(printable, notes)),
    )


def _legend(parts: Sequence[Part]) -> list[tuple[str, str, str]]:
    """Name, classes and shape of each series, in their order."""
    names = {named.series: named.name for part in parts for named in part.rows}
    return [(name, mark_class(series), shape(8, 8, series, 5)) for series, name in sorted(names.items())]


def _check_target(out: Path, page: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: give a folder with --out.")
    if page.is_symlink() or (page.exists() and not page.is_file()):
        raise UsageError(f"{page} is not a regular file: give another folder with --out.")
    try:
        ours = not page.exists() or MARKER in page.read_bytes()[:2000].decode("utf-8", "replace")
    except OSError as error:
        raise UsageError(f"Cannot read {page}: {error.strerror}. Give another folder with --out.") from None
    if not ours:
        raise UsageError(f"{page} was not written by apm report: give another folder with --out.")


def _hash(text: str) -> str:
    """What the content security policy knows an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
