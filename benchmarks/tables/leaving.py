"""Results for export: all rows with the names of their labels, and entries for a model card on the hub."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import yaml

from apm.errors import UsageError

from ..datasets.specs import DATASETS, SUITES
from ..runs.records import Records, RunFolder
from .table import Answers, Table, TableRow

_NAMED = ("label", "prediction", "teacher_prediction")
"""Columns of class numbers, each of which gets a column of names beside it."""


def rows_table(runs: Sequence[Records]) -> pa.Table:
    """All rows of some runs: those of the records, and beside them run, cell, teacher, prompts, seed and class names.

    Returns:
        A row for each image and method, in the order of runs, cells, methods and images. A name is null where there is
        no answer.
    """
    return pa.concat_tables([_cell_rows(run, key, cell) for run in runs for key, cell in run.cells.items()])


def _cell_rows(run: Records, key: str, cell: Mapping[str, Any]) -> pa.Table:
    rows = RunFolder(run.path).read(key)
    place = {method: number for number, method in enumerate(run.methods)}
    rows = rows.append_column("order", pa.array([place.get(name, -1) for name in rows["method"].to_pylist()]))
    rows = rows.filter(pa.compute.greater_equal(rows["order"], 0))
    rows = rows.sort_by([("order", "ascending"), ("position", "ascending")]).drop_columns(["order"])
    about = {
        "run": str(run.path),
        "cell": key,
        "dataset": cell["title"],
        "corruption": cell["corruption"],
        "level": cell["level"],
        "teacher": run.run["teacher"]["identity"],
        "prompts": cell["prompts"],
        "seed": run.run["config"]["seed"],
    }
    kinds = {"level": pa.int32(), "seed": pa.uint64()}
    columns: dict[str, Any] = {
        name: pa.array([value] * rows.num_rows, kinds.get(name, pa.string())) for name, value in about.items()
    }
    names = np.array(run.run["label_sets"][cell["label_set"]], dtype=object)
    for name in rows.column_names:
        columns[name] = rows[name]
        if name in _NAMED:
            known = [None if number is None else names[number] for number in rows[name].to_pylist()]
            columns[f"{name}_name"] = pa.array(known, pa.string())
    return pa.table(columns)


def rows_csv(rows: pa.Table) -> bytes:
    """Rows as CSV, without what is a list: the predictions of steps, logits, and a method's other figures."""
    nested = (pa.types.is_list, pa.types.is_map)
    plain = [field.name for field in rows.schema if not any(kind(field.type) for kind in nested)]
    written = io.BytesIO()
    pyarrow.csv.write_csv(rows.select(plain), written)
    return written.getvalue()


def rows_parquet(rows: pa.Table) -> bytes:
    """Rows as a Parquet file."""
    written = io.BytesIO()
    pq.write_table(rows, written, compression="zstd")
    return written.getvalue()


def eval_results(tables: Sequence[Table], *, task: str = "default") -> tuple[dict[str, str], list[str]]:
    """Make the files of ``.eval_results`` for the model card of a teacher, one for each method.

    Only what compares goes out: whole data sets, complete runs, an answer to every image, images that a repository of
    the hub holds as they are. See huggingface.co/docs/hub/eval-results for what the hub makes of them.

    Args:
        tables: as `make_tables` makes them.
        task: id of the task, as the data set's own eval.yaml calls it.

    Returns:
        YAML by the name of its file, and a sentence for each score that was left out.

    Raises:
        UsageError: the tables are of several teachers, who have several model cards.
    """
    rows = [row for table in tables for row in table.rows if row.kind == "ours"]
    if len(teachers := {row.teacher for row in rows}) > 1:
        raise UsageError(f"A model card describes one model, but these runs used {', '.join(sorted(teachers))}.")
    entries: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, list[str]] = {}
    for row in rows:
        for column, answers in row.answers.items():
            repository, reason = _repository(answers.cell, row, column)
            if repository is None:
                left_out.setdefault(f"{column}: {reason}", []).append(row.method)
                continue
            entries.setdefault(_file_name(row.method), []).append(_entry(repository, task, row, column, answers))
    files = {name: yaml.safe_dump(found, sort_keys=False, allow_unicode=True) for name, found in entries.items()}
    return files, [f"{reason} ({', '.join(methods)})" for reason, methods in left_out.items()]


def _repository(cell: Mapping[str, Any], row: TableRow, column: str) -> tuple[str | None, str]:
    """The hub's data set that a score belongs to; None where there is none, and why."""
    spec, marks = DATASETS[cell["dataset"]], row.cells[column].marks
    reasons = {
        "subset": "a subset",
        "incomplete": "the run is not finished",
        "failed": "some images have no answer",
        "generated": "generated corruptions",
    }
    if found := [reason for mark, reason in reasons.items() if mark in marks]:
        return None, ", ".join(found)
    if cell["source"].startswith("hf:"):
        return cell["source"].removeprefix("hf:").partition(":")[0], ""
    if cell["corruption"] or spec.name not in SUITES["natural-shifts"] or cell["title"] != spec.name:
        return None, "no data set of the hub holds these images as they are"
    if cell["total"] != spec.images:
        return None, f"{cell['total']:,} images, where {spec.name} has {spec.images:,}"
    return spec.hub[0].partition(":")[0], ""


def _entry(repository: str, task: str, row: TableRow, column: str, answers: Answers) -> dict[str, Any]:
    score, run = row.cells[column], answers.run.run
    assert score.accuracy is not None
    said = [f"method {row.method}", f"prompts {row.prompts}", f"top-1 of {score.n} images, percent"]
    return {
        "dataset": {"id": repository, "task_id": task},
        "value": round(score.accuracy, 2),
        "date": run["sessions"][-1]["started"] if run["sessions"] else None,
        "notes": "; ".join([*said, f"teacher {run['teacher']['identity']}", f"seed {run['config']['seed']}"]),
    }


def _file_name(method: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", method).strip("_.") + ".yaml"
