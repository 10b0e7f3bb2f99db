"""`apm compare`: a new run against a recorded baseline, image by image."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug
from .render import failure
from .table import as_text

if TYPE_CHECKING:
    from apm.benchmarks.compare import Comparison

_IDS_SHOWN = 20


def compare(
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Run folder to check.")],
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="Recorded run of the same configuration.")],
    tolerance: Annotated[float, typer.Option(help="Percentage points by which accuracy may fall, in any cell.")] = 0.5,
    max_changed: Annotated[float, typer.Option(help="Percent of predictions that may change, in any cell.")] = 1.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON line for each cell and method, with all ids.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check a run against a baseline of the same configuration, paired by image.

    Exit code: 0 within the limits; 1 accuracy fell by more than the tolerance, or more predictions changed than allowed
    (cells and images are named on stderr); 2 the runs cannot be compared: their configurations differ.
    """
    from apm.benchmarks.compare import Limits, compare
    from apm.benchmarks.records import Records

    results = compare(Records.open(new), Records.open(baseline), Limits(tolerance=tolerance, max_changed=max_changed))
    if as_json:
        for result in results:
            typer.echo(json.dumps(_record(result), ensure_ascii=False))
    else:
        headings = ["cell", "method", "n", "baseline %", "new %", "changed", "right→wrong", "wrong→right", "p", ""]
        typer.echo(as_text(headings, [_line(result) for result in results]))
    for result in results:
        for reason in result.failures:
            failure(f"{result.cell}, {result.method}: {reason}: {_some(result.changed)}")
    if any(not result.passed for result in results):
        raise typer.Exit(1)


def _record(result: Comparison) -> dict[str, Any]:
    return {**asdict(result), "mcnemar_p": result.mcnemar_p, "passed": result.passed}


def _line(result: Comparison) -> list[str]:
    return [
        result.cell,
        result.method,
        str(result.n),
        f"{result.baseline_accuracy:.2f}",
        f"{result.accuracy:.2f}",
        str(len(result.changed)),
        str(len(result.right_to_wrong)),
        str(len(result.wrong_to_right)),
        f"{result.mcnemar_p:.3f}",
        "ok" if result.passed else "FAILED",
    ]


def _some(ids: tuple[str, ...]) -> str:
    shown = ", ".join(ids[:_IDS_SHOWN])
    return shown if len(ids) <= _IDS_SHOWN else f"{shown}, … ({len(ids) - _IDS_SHOWN} more: --json lists all)"
