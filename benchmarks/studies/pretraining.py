"""What self-supervised training achieves on held-out images, against baselines that need no training.

``python -m apm.benchmarks.studies.pretraining CKPT --root FOLDER --teacher NAME --cache DIR --record FILE`` measures;
``--figure FILE`` draws the curves of a record; ``--pictures FILE --images IMAGE…`` draws input, teacher, student and
error side by side (Modi & Rawat 2024, figure 5).

Baselines, all on the student's own locations and without the teacher at test time: the training images' mean feature,
over all locations and for each location; the grid of the nearest training image by pooled pixels and by the student's
own trigger column; a linear map (ridge regression) from the pooled pixels, and from the trigger column.
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apm.errors import UsageError
from apm.figures import base as figures
from apm.images.load import central_square, load_image
from apm.pretrain.cache import GridCache, build_cache
from apm.pretrain.config import PretrainConfig
from apm.pretrain.images import open_images
from apm.pretrain.loop import parts, read_log
from apm.pretrain.student import Student
from apm.pretrain.trainer import pooled_colours
from apm.student.field import resample
from apm.student.position import grid_locations
from apm.teachers import load_grid_teacher
from apm.teachers.base import GridTeacher

from .study import RESULTS, ROOT, Options, Record, Study, markdown, plus_minus, read_record, run

_BATCH = 64
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for the ridge penalty, as a share of the inputs' mean second moment."""

NAMES = {
    "mean": "mean feature of the training images",
    "mean_per_location": "mean feature of each location",
    "nearest_pixels": "grid of the nearest training image, by pooled pixels",
    "nearest_column": "grid of the nearest training image, by the student's trigger column",
    "linear_pixels": "linear map from pooled pixels (ridge)",
    "linear_column": "linear map from the student's trigger column (ridge)",
    "student": "student",
}


def compare(student: Student, cache: GridCache, config: PretrainConfig) -> dict[str, Any]:
    """Compare the student and the baselines on the held-out images.

    Returns:
        For each predictor: mean squared error over locations and features (mean over images, standard error), by how
        much it is above the student's (paired by image), the share of the variance about the mean feature that it
        explains, and the mean cosine to the teacher's features.
    """
    train, held_out = config.split(len(cache.names))
    predict = _predictors(student, cache, train)
    rows: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    cosines: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    colours: dict[str, list[Tensor]] = {"mean": [], "nearest_column": [], "student": []}
    for part in parts(held_out, _BATCH):
        wanted, found, seen, guessed = predict(part)
        for name, guess in found.items():
            rows[name].append((guess - wanted).square().mean((1, 2)))
            cosines[name].append(torch.cosine_similarity(guess, wanted, dim=-1).mean(1))
        for name, colour in guessed.items():
            colours[name].append((colour - seen).square().mean((1, 2)))
    base, own = torch.cat(rows["mean"]).mean().item(), torch.cat(rows["student"])
    return {
        "grid": {
            name: {
                **_summary(torch.cat(rows[name])),
                "above_student": _summary(torch.cat(rows[name]) - own),
                "explained": 1 - torch.cat(rows[name]).mean().item() / base,
                "cosine": torch.cat(cosines[name]).mean().item(),
            }
            for name in NAMES
        },
        "colours": {name: _summary(torch.cat(values)) for name, values in colours.items()},
    }


def _predictors(
    student: Student, cache: GridCache, train: NDArray[np.int64]
) -> Callable[[NDArray[np.int64]], tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]]:
    """Fit every baseline on the images `train`.

    Returns:
        Numbers of images → the teacher's features (B, N, D) and what each predictor says they are; the colours
        (B, N, 3), and what each says they are.
    """
    grid = student.config.grid

    def targets(numbers: NDArray[np.int64]) -> Tensor:
        return resample(cache.targets(numbers), grid)

    def described(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Trigger columns (B, N), pooled pixels (B, 3 N), pooled colours (B, N, 3)."""
        images = cache.inputs(numbers)
        pooled = pooled_colours(images, student.config.patch_size)
        return student.columns(images), pooled.flatten(1), pooled

    train_columns, train_pixels, train_colours = (
        torch.cat(found) for found in zip(*(described(part) for part in parts(train, _BATCH)), strict=True)
    )
    per_location = sum(targets(part).sum(0) for part in parts(train, _BATCH)) / len(train)  # (N, D)
    assert isinstance(per_location, Tensor)
    from_pixels, from_column = _linear(train_pixels, cache, train), _linear(train_columns, cache, train)

    def predict(part: NDArray[np.int64]) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        wanted = targets(part)
        columns, pixels, seen = described(part)
        features, guessed = student.field(columns, *grid_locations(grid))
        by_pixels = torch.cdist(pixels, train_pixels).argmin(1).numpy()
        by_column = torch.cdist(columns, train_columns).argmin(1).numpy()
        found = {
            "student": features,
            "mean": per_location.mean(0).expand_as(wanted),
            "mean_per_location": per_location.expand_as(wanted),
            "nearest_pixels": targets(train[by_pixels]),
            "nearest_column": targets(train[by_column]),
            "linear_pixels": resample(from_pixels(pixels), grid),
            "linear_column": resample(from_column(columns), grid),
        }
        mean = train_colours.mean((0, 1)).expand_as(seen)
        return wanted, found, seen, {"student": guessed, "mean": mean, "nearest_column": train_colours[by_column]}

    return predict


def _linear(inputs: Tensor, cache: GridCache, train: NDArray[np.int64]) -> Callable[[Tensor], Tensor]:
    """Fit a ridge regression from inputs (n, K) to the teacher's own grids (n, h', w', D).

    The penalty is chosen on a tenth of these images, then the map is fitted on all. Resampling is linear too, so that
    it may as well come afterwards: the fit is the same, and cheaper.
    """
    kept = np.random.default_rng(0).permutation(len(train))
    tuned, fitted = kept[: len(train) // 10 + 1], kept[len(train) // 10 + 1 :]
    shape = cache.grids.shape[1:]

    def products(rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Means of inputs and targets, and the centred second moments."""
        x = inputs[rows]
        centre, total = x.mean(0), torch.zeros(math.prod(shape))
        cross = torch.zeros(x.shape[1], math.prod(shape))
        for start in range(0, len(rows), _BATCH):
            y = cache.targets(train[rows[start : start + _BATCH]]).flatten(1)
            cross += (x[start : start + _BATCH] - centre).T @ y
            total += y.sum(0)
        spread = (x - centre).double()
        return centre, total / len(rows), spread.T @ spread, cross

    def solved(moments: tuple[Tensor, Tensor, Tensor, Tensor], penalty: float) -> Callable[[Tensor], Tensor]:
        centre, offset, square, cross = moments
        size = penalty * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
        weights = torch.linalg.solve(square + size, cross.double()).float()
        return lambda given: ((given - centre) @ weights + offset).view(-1, *shape)

    moments = products(fitted)
    wanted = cache.targets(train[tuned])
    errors = {p: (solved(moments, p)(inputs[tuned]) - wanted).square().mean().item() for p in PENALTIES}
    return solved(products(kept), min(errors, key=lambda penalty: errors[penalty]))


def _summary(errors: Tensor) -> dict[str, float]:
    return {"mse": errors.mean().item(), "stderr": errors.std().item() / math.sqrt(len(errors))}


def table(record: Record) -> str:
    """Markdown tables of the held-out errors, from worst to best, and a line on the setup."""

    def cells(name: str, row: dict[str, Any]) -> list[str]:
        bold, above = "**" if name == "student" else "", row["above_student"]
        return [
            f"{bold}{NAMES[name]}{bold}",
            plus_minus((row["mse"], row["stderr"]), 4),
            "–" if bold else plus_minus((above["mse"], above["stderr"]), 4),
            f"{100 * row['explained']:.1f} %",
            f"{row['cosine']:.3f}",
        ]

    titles = (
        *("predictor of the teacher's grid", "mean squared error", "minus the student, paired", "explained"),
        "cosine",
    )
    ordered = sorted(record["grid"].items(), key=lambda one: -float(one[1]["mse"]))
    colours = record["colours"]
    settings, last = record["checkpoint"]["settings"], record["curves"][-1]
    return (
        f"{markdown(titles, (cells(*one) for one in ordered))}\n\n"
        f"Colours, mean squared error in [0, 1]²: student {colours['student']['mse']:.4f}, nearest training image by "
        f"the trigger column {colours['nearest_column']['mse']:.4f}, mean colour {colours['mean']['mse']:.4f}.\n\n"
        f"{record['held_out_images']} held-out and {record['train_images']} training images; ± standard error over "
        f"images. Teacher `{settings['teacher']}`, grid {'×'.join(map(str, record['teacher_grid'][:2]))} from "
        f"{settings['grid_size']} pixels; {record['checkpoint']['step']} steps of {settings['batch_size']} images at "
        f"{settings['locations'] or 'all'} locations, seed {settings['seed']}, {last['seconds'] / 60:.0f} minutes on "
        f"{record['environment']['threads']} thread of {record['environment']['processor']}, shared with other work."
    )


def draw_curves(record: Record, path: Path) -> None:
    """Draw trained and held-out errors against steps, with the baselines as lines."""
    curves, settings = record["curves"], record["checkpoint"]["settings"]
    figure = figures.new_figure(8.4, 3.1)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in curves]
    for axis, kind, title in ((left, "grid", "teacher's grid"), (right, "rgb", "colours")):
        trained = [(row["step"], row[kind]) for row in curves if kind in row]
        axis.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.5, label="training batches")
        axis.plot(steps, [row[f"held_out_{kind}"] for row in curves], color="tab:red", marker=".", label="held out")
        axis.set(xlabel="step", ylabel="mean squared error", title=title)
    for name, style in (("mean_per_location", ":"), ("linear_column", "-."), ("linear_pixels", "--")):
        left.axhline(record["grid"][name]["mse"], color="0.4", linestyle=style, linewidth=1, label=NAMES[name])
    left.legend(fontsize=5.5, loc="upper right")
    low, high = left.get_ylim()
    left.set_ylim(low, high + 0.5 * (high - low))  # room for the legend
    right.legend(fontsize=6)
    right.set_ylim(bottom=0)
    figures.save(
        figure,
        path,
        settings=f"{record['train_images']} training images, {record['held_out_images']} held out; teacher "
        f"{settings['teacher']}; batches of {settings['batch_size']} at {settings['locations'] or 'all'} locations, "
        f"AdamW {settings['lr']:g} with warm-up and cosine, seed {settings['seed']}",
    )


def draw_pictures(
    student: Student, teacher: GridTeacher, images: list[Path], grid_size: int, path: Path
) -> list[float]:
    """Draw photograph, teacher's grid, student's field, error and the student's colours; returns each image's error."""
    grid = student.config.grid
    loaded: list[Image.Image] = [load_image(image).image for image in images]
    wanted = [resample(teacher.encode_grid(image, size=grid_size).cpu(), grid) for image in loaded]
    found = [student.field(student.column(image), *grid_locations(grid)) for image in loaded]
    errors = [(guess[0] - grid_of).square().mean(-1) for (guess, _), grid_of in zip(found, wanted, strict=True)]
    highest = max(float(error.max()) for error in errors)
    basis = [one.numpy() for one in wanted]
    guesses = [guess[0].numpy() for guess, _ in found]
    maps = {
        "teacher": figures.component_colours(basis),
        "student": figures.component_colours(guesses, basis=basis),
        "student, its own scale": figures.component_colours(guesses),
    }
    titles = ("photograph", "student's colours", *maps, "squared error")
    figure = figures.new_figure(8.8, 1.5 * len(images) + 0.3)
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for row, image in enumerate(loaded):
        shown = (
            central_square(image, 224),
            found[row][1][0].clamp(0, 1).reshape(grid, grid, 3).numpy(),
            *(coloured[row].reshape(grid, grid, 3) for coloured in maps.values()),
            errors[row].reshape(grid, grid).numpy(),
        )
        for axis, picture, title in zip(axes[row], shown, titles, strict=True):
            options = {"cmap": "magma", "vmin": 0, "vmax": highest} if title == titles[-1] else {}
            drawn = axis.imshow(picture, interpolation="nearest", **options)
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(title, fontsize=8)
        axes[row, -1].set_xlabel(f"mean {errors[row].mean():.2f}", fontsize=7)
    bar = figure.colorbar(drawn, ax=axes.ravel().tolist(), location="right", shrink=0.4, pad=0.01)
    bar.ax.tick_params(labelsize=6)
    figures.save(
        figure,
        path,
        settings=f"{student.describe()}; none of these photographs is in the training set. Features by three "
        "components: of the teacher's grids for teacher and student, of the student's for its own scale; error: mean "
        "over features, one scale for all",
    )
    return [error.mean().item() for error in errors]


def measure(options: Options) -> Record:
    """Compare a checkpoint with the baselines, and put beside it how it was trained: settings and curves.

    Raises:
        UsageError: checkpoint or images are missing, or the teacher is another than that of the training.
    """
    if not options.checkpoint or not options.root:
        raise UsageError("A checkpoint and --root, the images that it was trained on, are needed.")
    student, teacher = _loaded(options)
    settings = student.record["settings"]
    known = settings.keys() & PretrainConfig.__dataclass_fields__.keys()  # an older checkpoint says less
    config = PretrainConfig(**{name: settings[name] for name in known})
    cache = build_cache(
        open_images(options.root),
        teacher,
        options.cache or options.checkpoint.with_name(options.checkpoint.name + ".cache"),
        size=student.config.image_size,
        grid_size=settings["grid_size"],
    )
    train, held_out = config.split(len(cache.names))
    return {
        "checkpoint": student.record,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "train_images": len(train),
        "held_out_images": len(held_out),
        "teacher_grid": list(cache.grids.shape[1:]),
        **compare(student, cache, config),
        "curves": read_log(options.checkpoint.with_name(options.checkpoint.name + ".log.jsonl")),
    }


def _loaded(options: Options) -> tuple[Student, GridTeacher]:
    student, teacher = Student.load(options.checkpoint), load_grid_teacher(options.teacher)
    expected = student.record["settings"]["teacher"]
    if teacher.identity != expected:
        raise UsageError(f"The student was trained with {expected}, not with {teacher.identity}.")
    return student, teacher


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--cache", type=Path, help="the training's cache (default: beside the checkpoint)")
    parser.add_argument(
        "--figure", type=Path, help="draw the curves of the first record of --table into this file instead"
    )
    parser.add_argument("--pictures", type=Path, help="draw --images into this file instead of measuring")
    parser.add_argument("--images", type=Path, nargs="+", default=[])


STUDY = Study(
    name="pretraining",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={"root": None, "teacher": "embedded"},
    results="pretraining.json",
    document=ROOT / "docs" / "pretraining.md",
    marker="pretraining",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or draw."""
    options = STUDY.read(arguments)
    if options.figure:
        draw_curves(read_record(options.table[0] if options.table else RESULTS / STUDY.results), options.figure)
    elif options.pictures:
        if not options.checkpoint or not options.images:
            raise UsageError("--pictures needs a checkpoint and --images.")
        student, teacher = _loaded(options)
        size = student.record["settings"]["grid_size"]
        found = draw_pictures(student, teacher, options.images, size, options.pictures)
        for image, error in zip(options.images, found, strict=True):
            print(f"{image.name}: {error:.4f}", file=sys.stderr)
    else:
        STUDY.run(options)


if __name__ == "__main__":
    sys.exit(run(main))
