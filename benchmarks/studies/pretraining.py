"""What self-supervised training achieves on held-out images, against baselines that need no training.

``python -m apm.benchmarks.studies.pretraining CKPT --data FOLDER --teacher-grid NAME --cache DIR --out RECORD``
measures and writes a JSON record; ``--figure FILE`` draws the curves of a record, ``--table`` prints it as markdown,
``--pictures FILE --images IMAGE…`` draws input, teacher, student and error side by side (Modi & Rawat 2024, figure 5).

Baselines, all on the student's own locations and without the teacher at test time: the training images' mean feature,
over all locations and for each location; the grid of the nearest training image by pooled pixels and by the student's
own trigger column; a linear map (ridge regression) from the pooled pixels, and from the trigger column.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
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
from apm.pretrain.loop import read_log
from apm.pretrain.student import Student
from apm.pretrain.trainer import pooled_colours
from apm.student.field import resample
from apm.student.position import grid_locations
from apm.teachers import load_grid_teacher
from apm.teachers.base import GridTeacher

from ..runs.environment import describe, write_record

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


def measure(student: Student, cache: GridCache, config: PretrainConfig) -> dict[str, Any]:
    """Compare the student and the baselines on the held-out images.

    Returns:
        For each predictor: mean squared error over locations and features (mean over images, standard error), by how
        much it is above the student's (paired by image), the share of the variance about the mean feature that it
        explains, and the mean cosine to the teacher's features.
    """
    train, held_out = config.split(len(cache.names))
    grid = student.config.grid

    def targets(numbers: NDArray[np.int64]) -> Tensor:
        return resample(cache.targets(numbers), grid)

    def described(numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Trigger columns (B, N), pooled pixels (B, 3 N), pooled colours (B, N, 3)."""
        images = cache.inputs(numbers)
        pooled = pooled_colours(images, student.config.patch_size)
        return student.columns(images), pooled.flatten(1), pooled

    train_columns, train_pixels, train_colours = (
        torch.cat(parts) for parts in zip(*(described(part) for part in _parts(train)), strict=True)
    )
    per_location = sum(targets(part).sum(0) for part in _parts(train)) / len(train)  # (N, D)
    assert isinstance(per_location, Tensor)
    mean = per_location.mean(0)  # (D,)
    linear = {
        "linear_pixels": _linear(train_pixels, cache, train),
        "linear_column": _linear(train_columns, cache, train),
    }
    rows: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    cosines: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    colours: dict[str, list[Tensor]] = {"mean": [], "nearest_column": [], "student": []}
    places = grid_locations(grid)
    for part in _parts(held_out):
        wanted = targets(part)
        columns, pixels, seen = described(part)
        features, guessed = student.field(columns, *places)
        nearest = {
            "nearest_pixels": torch.cdist(pixels, train_pixels).argmin(1).numpy(),
            "nearest_column": torch.cdist(columns, train_columns).argmin(1).numpy(),
        }
        found = {
            "student": features,
            "mean": mean.expand_as(wanted),
            "mean_per_location": per_location.expand_as(wanted),
            **{name: targets(train[numbers]) for name, numbers in nearest.items()},
            "linear_pixels": resample(linear["linear_pixels"](pixels), grid),
            "linear_column": resample(linear["linear_column"](columns), grid),
        }
        for name, guess in found.items():
            rows[name].append((guess - wanted).square().mean((1, 2)))
            cosines[name].append(torch.cosine_similarity(guess, wanted, dim=-1).mean(1))
        for name, colour in (
            ("student", guessed),
            ("mean", train_colours.mean((0, 1)).expand_as(seen)),
            ("nearest_column", train_colours[nearest["nearest_column"]]),
        ):
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


def _parts(numbers: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    return [numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH)]


def record_of(checkpoint: Path, student: Student, cache: GridCache, config: PretrainConfig) -> dict[str, Any]:
    """Measure, and put beside it how the student was trained: settings, curves, machine."""
    train, held_out = config.split(len(cache.names))
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "checkpoint": student.record,
        "parameters": sum(p.numel() for p in student.model.parameters()),
        "train_images": len(train),
        "held_out_images": len(held_out),
        "teacher_grid": list(cache.grids.shape[1:]),
        **measure(student, cache, config),
        "curves": read_log(checkpoint.with_name(checkpoint.name + ".log.jsonl")),
        "environment": describe(),
    }


def command(module: str, arguments: list[str]) -> str:
    """What was called, the folders of files left out: they are another on each machine."""
    return f"python -m apm.benchmarks.studies.{module} " + " ".join(Path(argument).name for argument in arguments)


def table(record: dict[str, Any]) -> str:
    """Markdown tables of the held-out errors, from worst to best, and a line that says of what."""
    lines = [
        "| predictor of the teacher's grid | mean squared error | above the student, paired | explained | cosine |",
        "|---|---:|---:|---:|---:|",
    ]
    found = record["grid"]
    for name in sorted(found, key=lambda one: -found[one]["mse"]):
        row, bold = found[name], "**" if name == "student" else ""
        above = row["above_student"]
        paired = "–" if bold else f"{above['mse']:.4f} ± {above['stderr']:.4f}"
        lines.append(
            f"| {bold}{NAMES[name]}{bold} | {row['mse']:.4f} ± {row['stderr']:.4f} | {paired} | "
            f"{100 * row['explained']:.1f} % | {row['cosine']:.3f} |"
        )
    colours = record["colours"]
    settings, last = record["checkpoint"]["settings"], record["curves"][-1]
    lines += [
        "",
        f"Colours, mean squared error in [0, 1]²: student {colours['student']['mse']:.4f}, nearest training image by "
        f"the trigger column {colours['nearest_column']['mse']:.4f}, mean colour {colours['mean']['mse']:.4f}.",
        "",
        f"{record['held_out_images']} held-out images, {record['train_images']} trained on; ± standard error over "
        f"images. Teacher `{settings['teacher']}`, grid {'×'.join(map(str, record['teacher_grid'][:2]))} of "
        f"{settings['grid_size']} pixels; {record['checkpoint']['step']} steps of {settings['batch_size']} images at "
        f"{settings['locations'] or 'all'} locations, seed {settings['seed']}, {last['seconds'] / 60:.0f} minutes on "
        f"{record['environment']['threads']} thread of {record['environment']['processor']}, shared with other work.",
    ]
    return "\n".join(lines)


def draw_curves(record: dict[str, Any], path: Path) -> None:
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
        settings=f"{record['train_images']} images to train on, {record['held_out_images']} held out; teacher "
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
        settings=f"{student.describe()}; none of these photographs was trained on. Features by three components: of "
        "the teacher's grids for teacher and student, of the student's for its own scale; error: mean over features, "
        "one scale for all",
    )
    return [error.mean().item() for error in errors]


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.studies.pretraining", description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--data", type=Path, help="what the student was trained on")
    parser.add_argument("--teacher-grid", default="embedded")
    parser.add_argument("--cache", type=Path, help="where the training's cache lies; default: beside the checkpoint")
    parser.add_argument("--out", type=Path, help="write the record there")
    parser.add_argument("--record", type=Path, help="a record measured before, for --figure and --table")
    parser.add_argument("--figure", type=Path, help="draw the curves of the record there")
    parser.add_argument("--table", action="store_true", help="print the record as markdown")
    parser.add_argument("--pictures", type=Path, help="draw --images there")
    parser.add_argument("--images", type=Path, nargs="+", default=[])
    options = parser.parse_args(arguments)
    record: dict[str, Any] = json.loads(options.record.read_text(encoding="utf-8")) if options.record else {}
    if options.checkpoint:
        student = Student.load(options.checkpoint)
        settings = student.record["settings"]
        teacher = load_grid_teacher(options.teacher_grid)
        if teacher.identity != settings["teacher"]:
            raise UsageError(f"The student was trained with {settings['teacher']}, not with {teacher.identity}.")
        if options.data:
            config = PretrainConfig(**{name: settings[name] for name in PretrainConfig.__dataclass_fields__})
            cache = build_cache(
                open_images(options.data),
                teacher,
                options.cache or options.checkpoint.with_name(options.checkpoint.name + ".cache"),
                size=student.config.image_size,
                grid_size=settings["grid_size"],
            )
            record = record_of(options.checkpoint, student, cache, config)
            record = {"command": command("pretraining", sys.argv[1:]), **record}
        if options.pictures:
            found = draw_pictures(student, teacher, options.images, settings["grid_size"], options.pictures)
            for image, error in zip(options.images, found, strict=True):
                print(f"{image.name}: {error:.4f}", file=sys.stderr)
    if options.out:
        write_record(record, options.out)
    if options.figure:
        draw_curves(record, options.figure)
    if options.table:
        print(table(record))


if __name__ == "__main__":
    main()
