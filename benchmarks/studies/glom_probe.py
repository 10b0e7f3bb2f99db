"""How well a linear classifier predicts an image's class from each level of a GLOM trained without labels.

``python -m apm.benchmarks.studies.glom_probe CKPT --root TABLE.parquet --record FILE``, or `apm glom probe`. The
inputs: the mean of a level's embeddings over all locations, after the columns have settled; the same for an untrained
network; the pixels. Split, penalties and fit are those of `linear_probe`. Labels are used here only.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apm.errors import UsageError
from apm.glom.model import GLOM
from apm.images.load import central_square, decode_image
from apm.test_time.inputs import student_pixels

from ..runs.environment import describe
from . import linear_probe
from .glom_images import arguments, read_trained, said
from .linear_probe import probe, read_table
from .study import ROOT, Options, Record, Study, run

SIDE = 32
"""Side in pixels at which the pixels themselves are probed."""


@torch.no_grad()
def describe_levels(
    images: Sequence[bytes], model: GLOM, *, steps: int, batch: int = 50
) -> dict[str, NDArray[np.float32]]:
    """Compute every probe's inputs (n, K), by name: ``pixels``, ``level 0``, …, ``untrained level 0``, …"""
    place = next(model.parameters()).device
    untrained = GLOM(model.config, seed=1).to(place)
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, len(images), batch):
        opened = [decode_image(data, "a row", as_published=True).image for data in images[start : start + batch]]
        inputs = student_pixels(opened, model.config.image_size).to(place)
        small = np.stack([np.asarray(central_square(image, SIDE)) for image in opened])
        parts.setdefault("pixels", []).append(torch.from_numpy(small).flatten(1) / 255)
        for kind, network in (("", model), ("untrained ", untrained)):
            means = network(inputs, steps=steps).mean(1).cpu()  # (B, L, D)
            for level, values in enumerate(means.unbind(1)):
                parts.setdefault(f"{kind}level {level}", []).append(values)
    return {name: torch.cat(values).float().numpy() for name, values in parts.items()}


def probe_levels(
    model: GLOM,
    data: Path,
    *,
    steps: int,
    train: int,
    limit: int | None = None,
    seed: int = 0,
    on_probe: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Probe every level of a GLOM.

    Args:
        model: a trained network.
        data: a Parquet file with the columns image and label.
        steps: in which the columns settle.
        train: images to fit on; the others test.
        limit: use this many images only, drawn by `seed`.
        seed: of the order of images, and of the fits.
        on_probe: called with how many probes are done and how many there are.

    Returns:
        The record that `linear_probe.table` prints.

    Raises:
        UsageError: fewer than 10 images to fit on, or none to test.
    """
    images, labels = read_table(data, limit, seed)
    if not 10 <= train < len(images):
        raise UsageError(f"--train must be from 10 to less than the {len(images)} images, not {train}.")
    inputs = describe_levels(images, model, steps=steps)
    probes = {}
    for done, (name, rows) in enumerate(inputs.items()):
        on_probe(done, len(inputs))
        probes[name] = probe(rows, labels, train, seed=seed)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "data": data.name,
        "train": train,
        "test": len(images) - train,
        "classes": len(set(labels.tolist())),
        "seed": seed,
        "steps": steps,
        "probes": probes,
        "environment": describe(),
    }


def measure(options: Options) -> Record:
    """Probe the checkpoint that the arguments name."""
    if options.root is None:
        raise UsageError("--root, a Parquet file with the columns image and label, is needed.")
    trained = read_trained(options)

    def told(done: int, total: int) -> None:
        print(f"{done} of {total} probes", file=sys.stderr, flush=True)

    found = probe_levels(
        trained.model,
        options.root,
        steps=trained.settling,
        train=options.train,
        limit=options.limit,
        seed=options.seed,
        on_probe=told,
    )
    return {"glom": trained.record, **found}


def table(record: Record) -> str:
    """The probes from worst to best, and what they were fitted on."""
    return f"{linear_probe.table(record)} {record['steps']} settling steps. {said(record)}"


def _arguments(parser: ArgumentParser) -> None:
    arguments(parser)
    parser.add_argument("--train", type=int, default=8000, help="number of training images; the others are for testing")


STUDY = Study(
    name="glom_probe",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={"root": None, "limit": None, "seed": 0},
    results="glom-probe.json",
    document=ROOT / "docs" / "glom.md",
    marker="probe",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
