"""How well a linear classifier predicts an image's class from a student trained without labels.

``python -m apm.benchmarks.studies.linear_probe CKPT --root TABLE.parquet --teacher NAME --record FILE``. A seed splits
the images into a training part, of which a fifth chooses the penalty, and a test part. Labels are used here only.

Inputs of the probe, each standardised on its training part: the pixels (``pixels``), also pooled to the student's grid
(``pooled``); of the student the trigger column (``column``), the mean of its field (``field``) and the mean of its last
hidden layer over the locations (``hidden``); the mean field of an untrained student (``untrained``); the teacher's
token as an upper bound (``teacher``).
"""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apm.errors import UsageError
from apm.images.load import central_square, decode_image
from apm.images.paths import printable
from apm.pretrain.student import Student
from apm.pretrain.trainer import pooled_colours
from apm.student.model import APM
from apm.student.position import grid_locations, position_code
from apm.teachers import load_teacher
from apm.teachers.base import Teacher
from apm.test_time.inputs import student_pixels

from ..tables.stats import standard_error
from .study import ROOT, USUAL, Options, Record, Study, each, markdown, run

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for C of sklearn's logistic regression (larger: weaker penalty)."""
_ITERATIONS = 2000
NAMES = {
    "pixels": "raw pixels",
    "pooled": "pixels pooled to the student's grid",
    "column": "student: trigger column",
    "field": "student: mean of the field",
    "hidden": "student: mean of the last hidden layer",
    "untrained": "untrained student: mean of the field",
    "teacher": "teacher: token",
}


def read_table(path: Path, limit: int | None, seed: int) -> tuple[list[bytes], NDArray[np.int64]]:
    """Read encoded images and integer labels from the columns image and label of a Parquet file, in a seeded order.

    Raises:
        UsageError: there is no such file, it is no Parquet, or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(path, columns=["image", "label"], partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{printable(path)} cannot be read as Parquet with the columns image and label "
            f"({' '.join(str(error).split())})."
        ) from error
    order = np.random.default_rng(seed).permutation(len(found))[:limit]
    values = found.column("image").take(order).to_pylist()
    images = [value["bytes"] if isinstance(value, dict) else value for value in values]
    return images, found.column("label").to_numpy()[order]


@torch.no_grad()
def describe_images(
    images: list[bytes], student: Student, teacher: Teacher | None, *, side: int, batch: int = 50
) -> dict[str, NDArray[np.float32]]:
    """Compute every probe's inputs: arrays (n, K), by name."""
    untrained = Student(APM(student.config, seed=1), student.record)
    parts: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for start in range(0, len(images), batch):
        opened = [decode_image(data, "a row", as_published=True).image for data in images[start : start + batch]]
        inputs = student_pixels(opened, student.config.image_size)
        squares = np.stack([np.asarray(central_square(image, side)) for image in opened])
        parts["pixels"].append(torch.from_numpy(squares).flatten(1) / 255)
        parts["pooled"].append(pooled_colours(inputs, student.config.patch_size).flatten(1))
        columns = student.columns(inputs)
        parts["column"].append(columns)
        field, hidden = _means(student, columns)
        parts["field"].append(field)
        parts["hidden"].append(hidden)
        parts["untrained"].append(_means(untrained, untrained.columns(inputs))[0])
        if teacher is not None:
            parts["teacher"].append(
                teacher.encode_image(torch.stack([teacher.preprocess(one) for one in opened])).cpu()
            )
    return {name: torch.cat(values).float().numpy() for name, values in parts.items() if values}


def _means(student: Student, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Mean feature (B, D) and mean last hidden layer (B, H3) over the student's own locations."""
    config, mlp = student.config, student.model.mlp
    positions = position_code(*grid_locations(config.grid), config.position_dim)
    of_column, of_place = mlp.layer1.weight.split((config.cells, config.position_dim), dim=1)
    x = ((columns @ of_column.T)[:, None] + positions @ of_place.T + mlp.layer1.bias).relu()
    hidden = mlp.layer3(mlp.layer2(x).relu()).relu().mean(1)
    return mlp.head(hidden), hidden  # the head is linear: the mean of features is the feature of the mean


def probe(
    inputs: NDArray[np.float32], labels: NDArray[np.int64], train: int, *, seed: int
) -> dict[str, float | int | bool]:
    """Fit on the first `train` rows, of which the last fifth chooses C; test on the others.

    Returns:
        Accuracy on the test part with its binomial standard error, C, validation accuracy, width, and whether the fit
        converged.
    """
    chosen, best = PENALTIES[0], -1.0
    fit = train - train // 5
    for penalty in PENALTIES:
        accuracy, _ = _fitted(inputs[:fit], labels[:fit], inputs[fit:train], labels[fit:train], penalty, seed)
        if accuracy > best:
            chosen, best = penalty, accuracy
    accuracy, converged = _fitted(inputs[:train], labels[:train], inputs[train:], labels[train:], chosen, seed)
    return {
        "accuracy": accuracy,
        "stderr": standard_error(accuracy, len(labels) - train),
        "C": chosen,
        "validation": best,
        "width": inputs.shape[1],
        "converged": converged,
    }


def _fitted(
    inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
    test_inputs: NDArray[np.float32],
    test_labels: NDArray[np.int64],
    penalty: float,
    seed: int,
) -> tuple[float, bool]:
    """Accuracy on the test rows, and whether the optimiser converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=_ITERATIONS, random_state=seed))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(inputs, labels)
    late = any(issubclass(one.category, ConvergenceWarning) for one in caught)
    return float(model.score(test_inputs, test_labels)), not late


def table(record: Record) -> str:
    """One markdown table, from worst to best, and a line on the setup."""
    found = record["probes"]
    rows = (
        (
            NAMES.get(name, name),
            f"{row['width']:,}",
            f"{100 * row['accuracy']:.1f} ± {100 * row['stderr']:.1f} %{'' if row['converged'] else ' †'}",
        )
        for name, row in sorted(found.items(), key=lambda one: float(one[1]["accuracy"]))
    )
    return (
        f"{markdown(('input of the probe', 'dimensions', 'accuracy'), rows)}\n\n"
        f"Logistic regression on standardised inputs, C chosen from {', '.join(f'{one:g}' for one in PENALTIES)} on a "
        f"fifth of the training images; {record['train']:,} training and {record['test']:,} test images of "
        f"{record['data']}, {record['classes']} classes, seed {record['seed']}; ± binomial standard error. "
        f"†: stopped after {_ITERATIONS:,} iterations."
    )


def measure(options: Options) -> Record:
    """Fit and test a probe on each kind of inputs.

    Raises:
        UsageError: checkpoint or images are missing, or too few to fit on and to test.
    """
    if not options.checkpoint or not options.root:
        raise UsageError("A checkpoint and --root, a Parquet file of images, are needed.")
    student = Student.load(options.checkpoint)
    images, labels = read_table(options.root, options.limit, options.seed)
    if not 10 <= options.train < len(images):
        raise UsageError(f"--train must be from 10 to less than the {len(images)} images, not {options.train}.")
    teacher = load_teacher(options.teacher, device=options.device)
    inputs = describe_images(images, student, teacher, side=options.side)

    def probed(name: str) -> tuple[str, dict[str, Any]]:
        return name, probe(inputs[name], labels, options.train, seed=options.seed)

    return {
        "data": options.root.name,
        "train": options.train,
        "test": len(images) - options.train,
        "classes": len(set(labels.tolist())),
        "seed": options.seed,
        "student": student.record,
        "teacher": options.teacher,
        "probes": dict(each(list(inputs), probed, "probes", minimum=len(inputs))),
    }


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--side", type=int, default=32, help="side of the raw pixels")
    parser.add_argument("--train", type=int, default=8000, help="number of training images; the others are for testing")


STUDY = Study(
    name="linear_probe",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={**USUAL, "limit": None},
    results="linear_probe.json",
    document=ROOT / "docs" / "pretraining.md",
    marker="probe",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
