"""What TTT-MAE does to the answers of the probe that it starts from, image by image and step by step.

From the records of finished runs of both on the same images, and the checkpoint that both took:

    apm bench folder --root CLASS_FOLDERS --label-set NAME --corruption all --corruption clean --limit 60 \\
        --method vit-probe:file=PROBE --method ttt-mae:file=PROBE,masks=32 --record-steps --out RUN
    apm bench folder --root CLASS_FOLDERS --label-set NAME --limit 2000 --method vit-probe:file=PROBE --out CLEAN
    python -m apm.benchmarks.studies.mae_bench RUN CLEAN --checkpoint PROBE --base MAE --record FILE

Corruptions may be spread over several runs; those that a run has not come to the end of are left out, and the page says
so. The rows are too many to keep; the record holds what the page shows, and
how autoencoder and probe were trained, from their checkpoints and logs. Labels only score; the best step, which they
choose, is told apart as ORACLE.
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from apm.errors import UsageError

from ..runs.records import Records, RunFolder
from ..runs.rows import MethodRows
from ..tables.stats import changes_by_image, paired_test, standard_error
from . import mae_trained
from .evidence import described, made_by
from .study import ROOT, Options, Record, Study, markdown, mean_and_error, plus_minus, run

PROBE, ADAPTED = "vit-probe", "ttt-mae"
CLEAN = "clean"


@dataclass(frozen=True)
class Pair:
    """Both methods on the images of one corruption, or on clean ones; arrays by image.

    Attributes:
        run: that they are of.
        image: names.
        before: whether the probe is right.
        after: whether TTT-MAE is right, before the first step and after each (n, K + 1).
        losses: of reconstruction, at the same times.
        seconds: of the methods for an image, with what they share.
    """

    run: Records
    image: NDArray[np.object_]
    before: NDArray[np.bool_]
    after: NDArray[np.bool_]
    losses: NDArray[np.float64]
    seconds: dict[str, float]


def measure(options: Options) -> Record:
    """Put together what runs and checkpoints say.

    Raises:
        UsageError: no runs, runs of another checkpoint, without answers of steps, or without anything to tell.
    """
    if not options.runs:
        raise UsageError("No runs were given: name their folders.")
    if options.checkpoint is None or options.base is None:
        raise UsageError("--checkpoint and --base, the probe and the autoencoder that it stands on, are needed.")
    runs = [Records.open(path) for path in options.runs]
    trained = mae_trained.training(options.checkpoint, options.base)
    found = dict(one for each in runs for one in pairs_of(each, trained["probe"]["weights"]))
    pairs = {name: pair for name, pair in sorted(found.items()) if pair is not None}
    clean = _clean(runs, trained["probe"]["weights"])
    if not pairs and clean is None:
        raise UsageError(f"No run has come to the end of clean images or of a corruption, by {PROBE} and {ADAPTED}.")
    record: Record = {"runs": [described(one) for one in runs], "trained": trained, "clean": clean}
    record |= {"unfinished": sorted(found.keys() - pairs.keys())}
    corrupted = [pair for name, pair in pairs.items() if name != CLEAN]
    if not corrupted:
        return record
    (settings,) = _same([dict(pair.run.methods[_named(pair.run, ADAPTED)]) for pair in pairs.values()])
    return record | {
        "settings": settings,
        "cells": {name: compared([pair]) for name, pair in pairs.items()},
        "together": compared(corrupted),
        "steps": by_step(corrupted),
        "seconds": {name: float(np.mean([pair.seconds[name] for pair in pairs.values()])) for name in (PROBE, ADAPTED)},
    }


def _named(one: Records, kind: str) -> str:
    names = [name for name in one.methods if name.partition("[")[0] == kind]
    if len(names) > 1:
        raise UsageError(f"{one.path} has {' and '.join(names)}: give runs with one of them.")
    return names[0] if names else ""


def _same(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [value for place, value in enumerate(values) if value not in values[:place]]
    if len(found) > 1:
        raise UsageError(f"The runs have {ADAPTED} with different settings: give runs with the same ones.")
    return found


def pairs_of(one: Records, weights: str) -> Iterator[tuple[str, Pair | None]]:
    """Yield each corruption of a run, or `CLEAN`, that both methods are to answer; None where it is not finished.

    Raises:
        UsageError: its answers are of other weights, or its steps are not recorded.
    """
    names = {kind: _named(one, kind) for kind in (PROBE, ADAPTED)}
    for kind in (PROBE, ADAPTED):
        if names[kind] and one.methods[names[kind]]["weights"] != weights:
            raise UsageError(f"{one.path}: {names[kind]} is of another checkpoint than the one named.")
    if not all(names.values()):
        return
    for key, cell in one.cells.items():
        found, column = dict(one.rows(key)), cell["corruption"] or CLEAN
        before, after = (found.get(names[kind]) for kind in (PROBE, ADAPTED))
        if before is None or after is None or len(before) < cell["images"] or len(after) < cell["images"]:
            yield column, None
            continue
        if after.step_predictions is None:
            raise UsageError(f"{one.path} has no answers of steps: it was made without --record-steps.")
        order, mine = np.argsort(before.id), np.argsort(after.id)
        label = after.label[mine]
        yield (
            column,
            Pair(
                one,
                before.id[order],
                before.prediction[order] == before.label[order],
                after.step_predictions[mine] == label[:, None],
                _losses(one, key, names[ADAPTED], after.id[mine]),
                {kind: _seconds(rows) for kind, rows in ((PROBE, before), (ADAPTED, after))},
            ),
        )


def _losses(one: Records, cell: str, method: str, image: NDArray[np.object_]) -> NDArray[np.float64]:
    """Reconstruction error at each step (n, K + 1); NaN where there is no answer."""
    rows = RunFolder(one.path).read(cell, ["id", "method", "extras"]).to_pylist()
    of = {row["id"]: dict(row["extras"] or ()) for row in rows if row["method"] == method}
    steps = sum(name.removeprefix("loss_").isdigit() for name in max(of.values(), key=len))
    return np.array([[of[name].get(f"loss_{step}", math.nan) for step in range(steps)] for name in image])


def _seconds(rows: MethodRows) -> float:
    return float(np.nanmean(rows.seconds + np.nan_to_num(rows.shared_seconds)))


def _clean(runs: Sequence[Records], weights: str) -> dict[str, Any] | None:
    """The probe on the most clean images of any run; None where no run has finished with them."""
    found: list[MethodRows] = []
    for one in runs:
        name = _named(one, PROBE)
        if name and one.methods[name]["weights"] == weights:
            cells = {key: cell["images"] for key, cell in one.cells.items() if not cell["corruption"]}
            rows = ((count, rows) for key, count in cells.items() for method, rows in one.rows(key) if method == name)
            found += [one for count, one in rows if len(one) == count]
    if not found:
        return None
    most = max(found, key=len)
    return {"images": len(most), "accuracy": float((most.prediction == most.label).mean())}


def compared(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Both methods on some corruptions together: shares, paired difference, flips, exact p.

    The corruptions of one photograph are no independent evidence: the interval and the p are over photographs.
    """
    before, after = np.concatenate([one.before for one in pairs]), np.concatenate([one.after[:, -1] for one in pairs])
    names, image = np.unique(np.concatenate([one.image for one in pairs]), return_inverse=True)
    change = changes_by_image(before, after, image)
    difference, *error = mean_and_error(change / np.bincount(image))
    reach = float(student_t.ppf(0.975, len(names) - 1)) * error[0] if error else math.nan
    return {
        "answers": len(before),
        "images": len(names),
        "probe": float(before.mean()),
        "adapted": float(after.mean()),
        "difference": difference,
        "low": difference - reach,
        "high": difference + reach,
        "lost": int((before & ~after).sum()),
        "won": int((~before & after).sum()),
        "p": paired_test(change),
    }


def by_step(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Means over corruptions before the first step and after each, and what labels would choose (ORACLE)."""
    accuracy = np.mean([one.after.mean(0) for one in pairs], axis=0)  # (K + 1,)
    best = 1 + int(accuracy[1:].argmax()) if len(accuracy) > 1 else 0
    return {
        "accuracy": accuracy.tolist(),
        "loss": np.mean([np.nanmean(one.losses, axis=0) for one in pairs], axis=0).tolist(),
        "oracle": {
            "step": best,
            "accuracy": float(accuracy[best]),
            "each corruption": float(np.mean([one.after[:, 1:].mean(0).max() for one in pairs])),
            "each image": float(np.mean([one.after[:, 1:].any(1).mean() for one in pairs])),
        },
    }


def table(record: Record) -> str:
    """How it was trained, each corruption, all together, each step, what it costs, and the runs."""
    parts = [mae_trained.text(record["trained"], _of_clean(record["clean"]))]
    if "cells" in record:
        parts += [_cells(record), _together(record), _steps(record), _cost(record)]
    if left := [name.replace("_", " ") for name in record["unfinished"]]:
        parts.append(f"Unfinished and left out: {', '.join(left)}.")
    return "\n\n".join([*parts, f"The runs:\n\n{made_by(record['runs'])}"])


def _of_clean(clean: Mapping[str, Any] | None) -> str:
    if clean is None:
        return ""
    error = standard_error(clean["accuracy"], clean["images"])
    share = plus_minus((100 * clean["accuracy"], 100 * error), 1)
    return f" On {clean['images']:,} clean images outside the training set: {share} %."


def _cells(record: Record) -> str:
    rows = [
        (
            name.replace("_", " "),
            one["answers"],
            f"{100 * one['probe']:.1f}",
            f"{100 * one['adapted']:.1f}",
            f"{100 * one['difference']:+.1f}",
            f"{one['lost']} / {one['won']}",
        )
        for name, one in _ordered(record)
    ]
    titles = ("images", "n", "ViT probe, %", "TTT-MAE, %", "difference", "right→wrong / wrong→right")
    return markdown(titles, rows)


def _ordered(record: Record) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Clean first, the corruptions by name, then these together."""
    cells = record["cells"]
    if CLEAN in cells:
        yield CLEAN, cells[CLEAN]
    yield from ((name, one) for name, one in cells.items() if name != CLEAN)
    yield f"{len([name for name in cells if name != CLEAN])} corruptions", record["together"]


def _together(record: Record) -> str:
    one = record["together"]
    return (
        f"Together: {100 * one['difference']:+.2f} points for TTT-MAE, 95 % interval {100 * one['low']:+.2f} to "
        f"{100 * one['high']:+.2f}; {one['lost']} answers lost and {one['won']} won, p = {one['p']:.2g} (exact "
        f"McNemar test in which all corruptions of a photograph flip together: {one['answers']:,} answers to "
        f"{one['images']:,} photographs; the interval is over photographs too)."
    )


def _steps(record: Record) -> str:
    found = record["steps"]
    rows = [
        (step, f"{100 * accuracy:.2f}", f"{loss:.4f}")
        for step, (accuracy, loss) in enumerate(zip(found["accuracy"], found["loss"], strict=True))
    ]
    oracle = found["oracle"]
    return (
        f"{markdown(('steps', 'accuracy, %', 'reconstruction error'), rows, text=0)}\n\n"
        "Means over the corruptions; each step's error is for its own masks. ORACLE, steps chosen with the labels: the "
        f"best step for all ({oracle['step']}) {100 * oracle['accuracy']:.2f} %, for each corruption "
        f"{100 * oracle['each corruption']:.2f} %, for each image {100 * oracle['each image']:.2f} %."
    )


def _cost(record: Record) -> str:
    own, settings = record["seconds"], record["settings"]
    return (
        f"An image takes {own[PROBE] * 1000:.1f} ms with the probe and {own[ADAPTED]:.2f} s with TTT-MAE "
        f"({settings['steps']} steps of {settings['masks']} masks, lr {settings['lr']:g}, momentum "
        f"{settings['momentum']:g}), answers and errors of all steps included; the machine did other work at the same "
        "time."
    )


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PROBE", help="checkpoint of apm mae probe, with its log beside it"
    )
    parser.add_argument(
        "--base", type=Path, metavar="MAE", help="the checkpoint of apm mae train that it started from, with its log"
    )


STUDY = Study(
    name="mae_bench",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={},
    results="mae-bench.json",
    document=ROOT / "docs" / "mae.md",
    marker="bench",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
