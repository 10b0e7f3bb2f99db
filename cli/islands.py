"""`apm islands`: the field of a student while it is fitted, and whether its regions follow the image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import ImageError, UsageError
from apm.images.paths import expand_paths, printable
from apm.test_time.options import IslandOptions

from . import render
from .options import Debug, options_of

if TYPE_CHECKING:
    from PIL import Image

    from apm.teachers.base import Teacher
    from apm.test_time.trainer import TestTimeTrainer

FRAMES = 24
"""Steps that the animation shows at most, besides those of the strip."""


@options_of(IslandOptions, "options", "The student and its islands")
def islands(
    paths: Annotated[list[str], typer.Argument(help="Files, folders or patterns.", metavar="PATH")],
    out: Annotated[Path, typer.Option(help="Folder for pictures, arrays and measures; made if need be.")],
    options: IslandOptions,
    teacher: Annotated[
        str | None, typer.Option(help="As in apm classify. Default: ViT-B-16/openai, else the embedded one.")
    ] = None,
    snapshots: Annotated[
        str | None, typer.Option(help='Steps to show: "0,5,50". Default: 0, 1, 2, 5, 10, … up to --steps.')
    ] = None,
    controls: Annotated[bool, typer.Option(help="Also fit the controls, which takes four times as long.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
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
    shown = _snapshots(snapshots, options.steps)
    if figure_format not in ("png", "svg"):
        raise UsageError(f'--format is "{figure_format}"; it must be png or svg.')
    files = list(expand_paths(paths))
    source = _teacher(teacher, device)

    from apm.figures.base import output_stem
    from apm.figures.islands import write_islands
    from apm.test_time.island_fields import observe, trainers

    student = options.student()
    model, training = student.model(source.dim), student.training(source.device)
    by_target = trainers(model, training, grid_lr=options.grid_lr, device=source.device)
    settings = _settings(options, source, by_target["cls"])
    images = _read(files)
    frames = _logarithmic(options.steps, FRAMES)
    for number, (file, image) in enumerate(images):
        other, told = _other(images, number)
        found = observe(image, other, source, by_target, options, shown=shown, kept=frames, controls=controls)
        of_file = {"image": printable(file.name), **settings, "other target": told}
        stem = out / output_stem(file)
        render.say_files(write_islands(found, stem, shown=shown, settings=of_file, kind=figure_format))
        sys.stdout.flush()
    if len(images) < len(files):
        raise typer.Exit(1)


def _teacher(name: str | None, device: str) -> Teacher:
    """Load it, and say what is to be known of it."""
    if name is not None:
        from apm.teachers import check_teacher

        check_teacher(name)
    from apm.devices import pick_device
    from apm.teachers import load_default_teacher, load_teacher

    where = pick_device(device)
    source = load_teacher(name, device=where) if name else load_default_teacher(device=where)
    for note in source.notes:
        render.notice(note)
    return source


def _settings(options: IslandOptions, source: Teacher, student: TestTimeTrainer) -> dict[str, Any]:
    """What the small print and the record say, as plain JSON values."""
    return {
        "teacher": source.identity,
        "preset": options.preset,
        "locations": student.model.grid,
        "steps": options.steps,
        "lr": options.lr,
        "grid lr": options.grid_lr,
        "grid size": options.grid_size or source.grid_size,
        "grid views": options.grid_views,
        "agree": options.agree,
        "precision": student.precision,
        "seed": options.seed,
        "threshold": options.threshold,
        "parts": options.parts,
    }


def _other(images: list[tuple[Path, Image.Image]], number: int) -> tuple[Image.Image, str]:
    """The image whose target serves as a control for one of them, and what to call it."""
    from PIL import Image

    if len(images) == 1:
        return images[0][1].transpose(Image.Transpose.ROTATE_180), "the image itself, upside down"
    file, image = images[(number + 1) % len(images)]
    return image, printable(file.name)


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
