"""`apm islands`: the field of a student while it is fitted, and whether its regions follow the image."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import ImageError, UsageError
from apm.images.files import write_atomically
from apm.images.paths import expand_paths, printable

from . import render
from .options import Debug

if TYPE_CHECKING:
    from PIL import Image

FRAMES = 24
"""Steps that the animation shows at most, besides those of the strip."""


def islands(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or patterns.", metavar="PATH")],
    out: Annotated[Path, typer.Option(help="Folder for pictures, arrays and measures; made if need be.")],
    teacher: Annotated[
        str | None, typer.Option(help="As in apm classify. Default: ViT-B-16/openai, else the embedded one.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimisation steps.")] = 150,
    snapshots: Annotated[
        str | None, typer.Option(help='Steps to show: "0,5,50". Default: 0, 1, 2, 5, 10, … up to --steps.')
    ] = None,
    preset: Annotated[str, typer.Option(help="Size of the student: small (16 × 16) or paper (32 × 32).")] = "small",
    lr: Annotated[float, typer.Option(help="Learning rate for the token.")] = 1e-4,
    grid_lr: Annotated[float, typer.Option(help="Learning rate for the grid, which is harder to fit.")] = 1e-3,
    grid_size: Annotated[
        int | None, typer.Option(help="Side, in pixels, at which the teacher's grid is made. Default: the teacher's.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Cosine from which on neighbours form one region.")] = 0.9,
    parts: Annotated[int, typer.Option(help="Number of clusters and of superpixels.")] = 12,
    controls: Annotated[bool, typer.Option(help="Also fit the controls, which takes four times as long.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of first weights, random targets, order of patches, t-SNE.")] = 0,
    figure_format: Annotated[str, typer.Option("--format", help="File format of the figures: png or svg.")] = "png",
    debug: Debug = False,
) -> None:
    """Watch the field form while a student is fitted to the token and to the grid of a teacher, in float32.

    For each image: a strip of fields over the steps, curves of the islands' measures beside controls in which regions
    cannot follow the image, the parts found, an animation, the arrays (.npz) and the measures (.json). The control
    "other target" takes its target from the next of the images given; with one image only, from that image turned
    upside down.

    Exit code: 0 all done, 1 some images could not be read, 2 wrong usage.
    """
    shown = _snapshots(snapshots, steps)
    if parts < 2 or parts > 20:
        raise UsageError(f"--parts is {parts}; it must be from 2 to 20.")
    if not -1 <= threshold <= 1:
        raise UsageError(f"--threshold is {threshold}; it is a cosine, from -1 to 1.")
    if figure_format not in ("png", "svg"):
        raise UsageError(f'--format is "{figure_format}"; it must be png or svg.')
    if teacher is not None:
        from apm.teachers import check_teacher

        check_teacher(teacher)
    files = list(expand_paths(paths))

    from apm.benchmarks.studies import island_fields
    from apm.classifier import pick_device
    from apm.student.config import APMConfig
    from apm.teachers import load_default_teacher, load_teacher
    from apm.test_time.options import AdaptConfig

    adapt = AdaptConfig(steps=steps, lr=lr, seed=seed)
    APMConfig.preset(preset, dim=512)  # a wrong name is told before the teacher is loaded
    where = pick_device(device)
    source = load_teacher(teacher, device=where) if teacher else load_default_teacher(device=where)
    for note in source.notes:
        render.notice(note)
    config = APMConfig.preset(preset, dim=source.dim)
    by_target = island_fields.trainers(config, adapt, grid_lr=grid_lr, device=where)
    settings = {
        "teacher": source.identity,
        "preset": preset,
        "locations": config.grid,
        "steps": steps,
        "lr": lr,
        "grid lr": grid_lr,
        "grid size": grid_size or source.grid_size,
        "precision": by_target["cls"].precision,
        "seed": seed,
        "threshold": threshold,
        "parts": parts,
    }
    images = _read(files)
    for number, (file, image) in enumerate(images):
        following = images[(number + 1) % len(images)] if len(images) > 1 else None
        _one(file, image, following, out, by_target, source, settings, shown, controls, figure_format)
    if len(images) < len(files):
        raise typer.Exit(1)


def _one(
    file: Path,
    image: Image.Image,
    following: tuple[Path, Image.Image] | None,
    out: Path,
    by_target: dict[str, Any],
    teacher: Any,
    settings: dict[str, Any],
    shown: list[int],
    controls: bool,
    figure_format: str,
) -> None:
    from PIL import Image

    from apm.benchmarks.studies import island_fields, island_figures
    from apm.figures import base as figures
    from apm.images.load import central_square
    from apm.student import islands as measuring

    config = by_target["cls"].model
    square = central_square(image, config.image_size)
    if following is None:
        other, told = image.transpose(Image.Transpose.ROTATE_180), "the image itself, upside down"
    else:
        other, told = following[1], printable(following[0].name)
    settings = {"image": printable(file.name), **settings, "other target": told}
    seed, parts, threshold = settings["seed"], settings["parts"], settings["threshold"]
    subject = island_fields.prepare(
        image, other, teacher, config, parts=parts, seed=seed, grid_size=settings["grid size"]
    )
    kept = sorted({*shown, *_logarithmic(settings["steps"], FRAMES)})
    runs = {
        target: island_fields.watch_all(trainer, subject, kept, controls=controls)
        for target, trainer in by_target.items()
    }
    measured = {
        target: {
            condition: {
                step: island_fields.measures(run.fields[step], subject, threshold=threshold, parts=parts, seed=seed)
                for step in run.fields
                if step in shown
            }
            for condition, run in of.items()
        }
        for target, of in runs.items()
    }
    found = {
        target: {condition: measuring.clusters(run.last, parts, seed=seed) for condition, run in of.items()}
        for target, of in runs.items()
    }
    stem = figures.output_stem(file)
    words = " · ".join(f"{name} {value}" for name, value in settings.items())
    of_image = {target: of["image"] for target, of in runs.items()}
    made = [
        island_figures.strip(
            out / f"{stem}-strip.{figure_format}", square, of_image, shown=shown, seed=seed, settings=words
        ),
        island_figures.curves(out / f"{stem}-curves.{figure_format}", measured, settings=words),
        island_figures.parts(out / f"{stem}-parts.{figure_format}", square, subject.superpixels, found, settings=words),
        island_figures.animate(out / f"{stem}-field.gif", square, of_image),
        figures.save_arrays(
            out / f"{stem}.npz",
            settings=json.dumps(settings),
            superpixels=subject.superpixels,
            **{f"fields/{target}": [run.fields[step] for step in kept] for target, run in of_image.items()},
            **{f"losses/{target}": [run.losses[step] for step in kept] for target, run in of_image.items()},
            **{f"last/{t}/{c}": run.last for t, of in runs.items() for c, run in of.items()},
            **{f"clusters/{t}/{c}": labels for t, of in found.items() for c, labels in of.items()},
            steps=kept,
        ),
    ]
    record = {"settings": settings, "losses": {t: run.losses for t, run in of_image.items()}, "measures": measured}
    text = (json.dumps(record, indent=1) + "\n").encode()
    made.append(write_atomically(out / f"{stem}.json", text))
    for path in made:
        render.say(str(path))
    sys.stdout.flush()


def _read(files: list[Path]) -> list[tuple[Path, Image.Image]]:
    """Read the images; what cannot be read is told, and left out."""
    from apm.images.load import load_image

    images = []
    for file in files:
        try:
            images.append((file, load_image(file).image))
        except ImageError as error:
            render.failure(str(error))
    return images


def _snapshots(text: str | None, steps: int) -> list[int]:
    if steps < 1:
        raise UsageError(f"--steps is {steps}; it must be 1 or more.")
    if text is None:
        return sorted({0, steps, *(d * 10**e for d in (1, 2, 5) for e in range(6) if d * 10**e < steps)})
    try:
        asked = sorted({int(one) for one in text.split(",")})
    except ValueError:
        raise UsageError(f'--snapshots is "{text}"; it must be numbers of steps, such as 0,5,50.') from None
    if asked[0] < 0 or asked[-1] > steps:
        raise UsageError(f'--snapshots is "{text}"; each must be from 0 to --steps, which is {steps}.')
    return sorted({*asked, steps})


def _logarithmic(steps: int, count: int) -> list[int]:
    """Up to `count` steps from 0 to `steps`, ever further apart."""
    ratio = (steps + 1) ** (1 / (count - 1))
    return sorted({round(ratio**number) - 1 for number in range(count)})
