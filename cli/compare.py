"""`apm compare`: a new run against a recorded baseline, image by image."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug
from .render import failure, notice, say_json
from .table import print_table

if TYPE_CHECKING:
    from apm.benchmarks.tables.compare import Comparison

_IDS_SHOWN = 20


def compare(
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Run folder to check.")],
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="Recorded run of the same configuration.")],
    tolerance: Annotated[float, typer.Option(help="Percentage points by which accuracy may fall, in any cell.")] = 0.5,
    max_changed: Annotated[float, typer.Option(help="Percent of predictions that may change, in any cell.")] = 1.0,
    max_loss_change: Annotated[
        float, typer.Option(help="Allowed change of the loss, relative: 0.01 is one percent.")
    ] = 0.01,
    max_cosine_change: Annotated[float, typer.Option(help="Allowed change of the student's cosine.")] = 0.001,
    max_nll_change: Annotated[float, typer.Option(help="Allowed change of the negative log-likelihood, nats.")] = 0.01,
    max_logits_change: Annotated[
        float, typer.Option(help="Allowed change of the logits, where bench --record-logits recorded them.")
    ] = 0.01,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON line per cell and method, with all image ids.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check a run against a baseline of the same configuration, paired by image.

    Besides the answers, loss, cosine, negative log-likelihood and logits are compared: the root mean square of their
    changes over the images of each cell, for each method. The limits are meant for fp32 on any CPU; what they were
    chosen from is in benchmarks/regression.md.

    Exit code: 0 within the limits; 1 something moved further (cell, method, what and images are named on stderr); 2 the
    runs cannot be compared: their configurations differ.
    """
    from apm.benchmarks.runs.records import Records
    from apm.benchmarks.tables.compare import MEASURES, Limits, compare, unchecked

    limits = Limits(
        tolerance=tolerance,
        max_changed=max_changed,
        loss=max_loss_change,
        cosine=max_cosine_change,
        nll=max_nll_change,
        logits=max_logits_change,
    )
    results = compare(Records.open(new), Records.open(baseline), limits)
    if as_json:
        for result in results:
            say_json(json.dumps(_record(result), ensure_ascii=False))
    else:
        headings = ["cell", "method", "n", "baseline %", "new %", "changed", "lost", "gained", "p"]
        headings += ["Δ loss %" if name == "loss" else f"Δ {name}" for name in MEASURES] + [""]
        print_table(headings, [_line(result) for result in results])
    for result in results:
        for reason in result.failures:
            ids = f": {_some(result.changed)}" if result.changed else ""
            failure(f"{result.cell}, {result.method}: {reason}{ids}")
    if missing := unchecked(results):
        said = "; ".join(f"{name} of {', '.join(methods)}" for name, methods in missing.items())
        notice(f"Not checked, because not recorded in both runs: {said}.")
    if any(not result.passed for result in results):
        raise typer.Exit(1)


def _record(result: Comparison) -> dict[str, Any]:
    return {**asdict(result), "mcnemar_p": result.mcnemar_p, "passed": result.passed}


def _change(name: str, value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2g}" if name == "loss" else f"{value:.2g}"


def _line(result: Comparison) -> list[str]:
    from apm.benchmarks.tables.compare import MEASURES

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
        *(_change(name, result.moved.get(name)) for name in MEASURES),
        "ok" if result.passed else "FAILED",
    ]


def _some(ids: tuple[str, ...]) -> str:
    shown = ", ".join(ids[:_IDS_SHOWN])
    return shown if len(ids) <= _IDS_SHOWN else f"{shown}, … ({len(ids) - _IDS_SHOWN} more: --json lists all)"
