"""What `apm reproduce` prints: its plan, and our cells beside the published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .render import notice, say, say_json
from .table import print_table

if TYPE_CHECKING:
    from apm.benchmarks.reproduce.beside import Beside
    from apm.benchmarks.reproduce.plan import Job, Plan, PlannedCell


def missing(plan: Plan) -> list[str]:
    """What keeps cells from being run, one sentence each; corruptions missing for the same reason share one."""
    alike: dict[str, list[PlannedCell]] = {}
    for cell in plan.cells:
        if cell.dataset is None:
            general = cell.reason.replace(cell.column, "CORRUPTION") if plan.table.corrupted else cell.reason
            alike.setdefault(general, []).append(cell)
    data = [
        f"{', '.join(cell.column for cell in cells)}: no data: {reason if len(cells) > 1 else cells[0].reason}"
        for reason, cells in alike.items()
    ]
    runs = {job.reason: job for job in plan.jobs if job.reason}
    return [*data, *(f"{why} (--download fetches them.)" if job.fetchable else why for why, job in runs.items())]


def left_out(plan: Plan, methods: Sequence[str] | None = None) -> list[str]:
    """Why rows are in no run, one sentence each; only those of `methods`, if they are named."""
    rows = plan.left_out.items()
    return [f"{recipe.title}: {why}" for recipe, why in rows if methods is None or recipe.method in methods]


def in_words(hours: float) -> str:
    """A duration in hours, or in minutes if it is less than one hour."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"


def print_plan(plan: Plan, hours: Mapping[Job, float], protocol: str, *, as_json: bool) -> None:
    """Print which cells can be run, in which runs, and for how many hours (by run, where they are known)."""
    if as_json:
        say_json(json.dumps(_plan_record(plan, hours, protocol), indent=2, ensure_ascii=False))
        return
    cells = [
        [cell.column, "no", "–", "–", cell.reason.partition("\n")[0]]
        if cell.dataset is None
        else [
            cell.column,
            "yes",
            str(len(cell.dataset.samples)),
            str(len(cell.dataset.class_names)),
            f"{cell.dataset.layout} in {cell.dataset.source}",
        ]
        for cell in plan.cells
    ]
    title = f"{plan.table.title} (protocol {protocol})"
    print_table(["cell", "data", "images", "classes", "where"], cells, title=title)
    say("")
    runs = [
        [
            job.teacher,
            job.prompts or "own",
            ", ".join(dict.fromkeys(recipe.row for recipe in job.recipes)),
            "no" if job.reason else "yes",
            in_words(hours[job]) if job in hours else "–",
        ]
        for job in plan.jobs
    ]
    print_table(["teacher", "prompts", "rows", "weights", "expected"], runs)
    for text in left_out(plan):
        say(f"  {text}")
    if hours:
        total = in_words(sum(hours.values()))
        say(f"\nExpected in total: {total}, from the time of each method on one noise image on this machine.")
    for text in missing(plan):
        notice(text)


def _plan_record(plan: Plan, hours: Mapping[Job, float], protocol: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "table": plan.table.number,
        "protocol": protocol,
        "cells": [
            {
                "column": cell.column,
                "found": cell.dataset is not None,
                "images": None if cell.dataset is None else len(cell.dataset.samples),
                "classes": None if cell.dataset is None else len(cell.dataset.class_names),
                "source": None if cell.dataset is None else cell.dataset.source,
                "reason": cell.reason or None,
            }
            for cell in plan.cells
        ],
        "runs": [
            {
                "teacher": job.teacher,
                "prompts": job.prompts,
                "rows": [{"row": recipe.row, "teacher": recipe.teacher} for recipe in job.recipes],
                "folder": job.folder,
                "weights": not job.reason,
                "reason": job.reason or None,
                "hours": hours.get(job),
            }
            for job in plan.jobs
        ],
        "left_out": [
            {"row": recipe.row, "teacher": recipe.teacher, "reason": reason} for recipe, reason in plan.left_out.items()
        ],
    }


def print_beside(plan: Plan, compared: Sequence[Beside], protocol: str, *, as_json: bool) -> None:
    """Print our cells beside the published ones, and the likely causes of what differs."""
    if as_json:
        records = [_beside_record(one) for one in compared]
        document = {"schema": 1, "table": plan.table.number, "protocol": protocol, "cells": records}
        say_json(json.dumps(document, indent=2, ensure_ascii=False))
        return
    lines = [
        [
            one.recipe.title,
            one.column,
            f"{one.score.accuracy:.1f} ± {one.score.stderr:.1f}",
            str(one.score.n),
            f"{one.published:.1f}",
            f"{one.difference:+.1f}",
            one.verdict or "–",
            ", ".join(cause.name for cause in one.causes),
        ]
        for one in compared
        if one.score is not None and one.score.accuracy is not None
    ]
    headings = ["published row", "cell", "ours", "n", "published", "difference", "within 0.3", "likely causes"]
    print_table(headings, lines, title=f"{plan.table.title}: ours (protocol {protocol}) beside the published cells")
    texts: dict[tuple[str, str], list[str]] = {}
    for one in compared:
        for cause in one.causes:
            texts.setdefault((cause.name, cause.text), []).append(one.column)
    for (name, text), columns in texts.items():
        say(f"  {name} ({', '.join(dict.fromkeys(columns))}): {text}.")


def differs(one: Beside) -> str:
    """Say that a cell is not the published one, and why."""
    assert one.score is not None
    cell = f"{one.recipe.title}, {one.column}"
    what = f"{cell}: {one.score.accuracy:.1f}, published {one.published:.1f}"
    if not one.causes:
        return f"{what}. The record gives no cause."
    return f"{what}. Likely cause: {one.causes[0].name}: {one.causes[0].text}."


def _beside_record(one: Beside) -> dict[str, Any]:
    score = one.score
    return {
        "row": one.recipe.row,
        "teacher": one.recipe.teacher,
        "column": one.column,
        "published": one.published,
        "ours": None if score is None else score.accuracy,
        "stderr": None if score is None else score.stderr,
        "n": None if score is None else score.n,
        "marks": [] if score is None else list(score.marks),
        "difference": one.difference,
        "verdict": one.verdict or None,
        "causes": [{"name": cause.name, "text": cause.text} for cause in one.causes],
        "reason": one.reason or None,
    }
