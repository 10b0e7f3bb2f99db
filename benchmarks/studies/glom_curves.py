"""Compares training runs of GLOM that differ in one or two settings: held-out errors by step.

``python -m apm.benchmarks.studies.glom_curves CKPT CKPT… --record FILE`` reads the checkpoints and the logs beside
them; the runs need not be finished. All must use the same images and the same held-out part.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path

from apm.errors import UsageError
from apm.glom.training import load_glom

from .rows import logged
from .study import ROOT, Options, Record, Study, markdown, run

LOSS = "held_out_denoising"


def measure(options: Options) -> Record:
    """Read settings and logs.

    Raises:
        UsageError: fewer than two checkpoints, no log, or trainings that hold out other images.
    """
    if len(options.checkpoints) < 2:
        raise UsageError("Name the checkpoints of two trainings or more.")
    found = []
    for path in options.checkpoints:
        model, settings = load_glom(path)
        given = {**asdict(model.config), **{name: value for name, value in settings.items() if name != "step"}}
        found.append((given, [row for row in logged(path) if LOSS in row]))
    for name in ("data", "held_out", "image_size"):
        if len({str(given[name]) for given, _ in found}) > 1:
            raise UsageError(f"The trainings differ in {name}: their errors are not of the same images.")
    names = [name for name in found[0][0] if any(given[name] != found[0][0][name] for given, _ in found)]
    steps = sorted(set.intersection(*({row["step"] for row in rows} for _, rows in found)))
    return {
        "common": {name: value for name, value in found[0][0].items() if name not in (*names, "data")},
        "steps": steps,
        "trainings": [
            {
                "differs": {name: given[name] for name in names},
                LOSS: [next(row[LOSS] for row in rows if row["step"] == step) for step in steps],
            }
            for given, rows in found
        ],
    }


def table(record: Record) -> str:
    """A row a step, a column a training, named by what it differs in."""
    names = [
        ", ".join(f"{name} {'none' if value is None else value}" for name, value in one["differs"].items())
        for one in record["trainings"]
    ]
    rows = [
        (step, *(f"{one[LOSS][place]:.4f}" for one in record["trainings"]))
        for place, step in enumerate(record["steps"])
    ]
    common, machine = record["common"], record["environment"]
    side = common["image_size"] // common["patch_size"]
    differs = " and ".join(record["trainings"][0]["differs"])
    return (
        f"{markdown(('step', *names), rows, text=0)}\n\n"
        f"Training runs that differ only in {differs}. Mean squared error of the hidden locations of held-out images "
        f"({100 * common['held_out']:g} % of {common['images']:,}), after all settling steps. {common['levels']} "
        f"levels of {common['dim']} dimensions at {side} × {side} locations of {common['patch_size']} × "
        f"{common['patch_size']} pixels, {100 * common['hidden']:g} % of them hidden; {common['batch_size']} images "
        f"per step, lr {common['lr']:g} over {common['steps']:,} steps, seed {common['seed']}. {record['date']}, "
        f"{machine['processor']}. `{record['command']}`"
    )


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoints", type=Path, nargs="*", metavar="CKPT", help="checkpoints of `apm glom train`")


STUDY = Study(
    name="glom_curves",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={},
    results="glom-curves.json",
    document=ROOT / "docs" / "glom.md",
    marker="curves",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
