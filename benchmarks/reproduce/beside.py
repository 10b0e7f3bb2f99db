"""Ours beside the published numbers, cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..methods.base import Method
from ..runs.records import Records, RunFolder
from ..tables.build import published_rows
from ..tables.scores import score_cell
from ..tables.table import Score
from .causes import Case, Cause, causes
from .plan import Job, Plan
from .recipes import PaperTable, Recipe

TOLERANCE = 0.3
"""Points within which a zero-shot number counts as reproduced."""

Verdict = Literal["agrees", "differs", ""]


@dataclass(frozen=True, kw_only=True)
class Beside:
    """One published cell and ours."""

    recipe: Recipe
    column: str
    published: float
    """Percent."""
    score: Score | None = None
    """None where there is none of ours."""
    reason: str = ""
    """Why there is none."""
    verdict: Verdict = ""
    """Of zero-shot rows; others depend on settings that the paper does not state."""
    causes: tuple[Cause, ...] = ()
    """Of a zero-shot number that differs."""

    @property
    def difference(self) -> float | None:
        """Ours less the published one, in points."""
        return None if self.score is None or self.score.accuracy is None else self.score.accuracy - self.published


def beside(plan: Plan, out: Path, methods: Mapping[Job, Mapping[Recipe, Method]]) -> Iterator[Beside]:
    """Yield every published cell of the rows of a plan.

    Args:
        plan: what was run.
        out: folder that holds the run folders of the jobs.
        methods: of the jobs that were run, the method of each row.
    """
    published = published_of(plan.table)
    for recipe, reason in plan.left_out.items():
        yield from (_absent(recipe, published[recipe], column, reason) for column in plan.table.columns)
    for job in plan.jobs:
        run = Records.open(out / job.folder) if RunFolder(out / job.folder).read_run() is not None else None
        for recipe in job.recipes:
            method = methods.get(job, {}).get(recipe)
            for cell in plan.cells:
                if run is None or method is None or cell.dataset is None:
                    reason = cell.reason or job.reason or "not run"
                    yield _absent(recipe, published[recipe], cell.column, reason)
                else:
                    yield _compared(recipe, published[recipe], cell.column, run, cell.dataset.cell, method.name)


def published_of(table: PaperTable) -> dict[Recipe, dict[str, str]]:
    """The published row of each recipe of a table."""
    rows = published_rows(table.published)
    return {
        recipe: next(row for row in rows if (row["method"], row["teacher"]) == (recipe.row, recipe.teacher))
        for recipe in table.recipes
    }


def _absent(recipe: Recipe, published: Mapping[str, str], column: str, reason: str) -> Beside:
    return Beside(recipe=recipe, column=column, published=float(published[column]), reason=reason)


def _compared(recipe: Recipe, published: Mapping[str, str], column: str, run: Records, key: str, method: str) -> Beside:
    rows = dict(run.rows(key)).get(method) if key in run.cells else None
    if rows is None:
        return _absent(recipe, published, column, "not run yet")
    cell = run.cells[key]
    score = score_cell(rows, cell, method)
    found = Beside(recipe=recipe, column=column, published=float(published[column]), score=score)
    if recipe.method != "zero-shot" or found.difference is None:
        return found
    if abs(found.difference) <= TOLERANCE + 1e-9:
        return replace(found, verdict="agrees")
    told = causes(Case(recipe=recipe, published=published, run=run, cell=cell, score=score))
    return replace(found, verdict="differs", causes=tuple(told))
