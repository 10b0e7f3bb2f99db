"""`apm islands`: the field of a student while it is fitted, and whether its regions follow the image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.images.paths import printable
from apm.test_time.options import IslandOptions

from .island_inputs import files_of, for_each_image, load_named
from .options import Debug, Device, options_of

if TYPE_CHECKING:
    from PIL import Image

    from apm.teachers.base import Teacher
    from apm.test_time.trainer import TestTimeTrainer

FRAMES = 24
"""The animation shows at most so many steps, besides those of the strip."""
FIXED = "Layers of a fixed model"


@options_of(IslandOptions, "options", "The student and its islands")
def islands(
    paths: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, or - to read paths from stdin, one per line.", metavar="PATH"),
    ],
    out: Annotated[Path, typer.Option(help="Folder for pictures, arrays and measures; made if need be.")],
    options: IslandOptions,
    teacher: Annotated[
        str | None, typer.Option(help="As in apm classify. Default: ViT-B-16/openai, else the embedded one.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="Show layers of a fixed model instead of a student: mvit:3,4 (MViTv2-S of torchvision, the image as a "
            "still video), vit:NAME:LAYER (a model of timm or torchvision), teacher:LAYER. Append @FILE for weights "
            "from a file, @random or @random:SEED for random ones; the default is the published ones.",
            metavar="SOURCE",
            rich_help_panel=FIXED,
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Images in the video of mvit: 8 or 16. Default: 16.", rich_help_panel=FIXED),
    ] = None,
    snapshots: Annotated[
        str | None, typer.Option(help='Steps to show: "0,5,50". Default: 0, 1, 2, 5, 10, … up to --steps.')
    ] = None,
    controls: Annotated[
        bool, typer.Option(help="Also run the controls; with students this takes four times as long.")
    ] = True,
    device: Device = "auto",
    figure_format: Annotated[str, typer.Option("--format", help="File format of the figures: png or svg.")] = "png",
    debug: Debug = False,
    *,
    context: typer.Context,
) -> None:
    """Show how the field forms while a student is fitted to a teacher's token and to its grid, in float32.

    For each image: a strip of fields over the steps, curves of the islands' measures beside controls in which regions
    cannot follow the image, the parts found, an animation, the arrays (.npz) and the measures (.json). The control
    "other target" takes its target from the next image given; with only one image, from that image turned upside down.

    With --source nothing is fitted: for each image the layers' features as colours (principal components, t-SNE), the
    parts found, arrays and measures, beside the same network with random weights, the image with shuffled patches,
    another image, plain colours, and coordinates.

    Exit code: 0 all done, 1 some images could not be read, 2 wrong usage.
    """
    if figure_format not in ("png", "svg"):
        raise UsageError(f'--format is "{figure_format}"; it must be png or svg.')
    if source is not None:
        from .layer_islands import look_at_layers

        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = {name for name, of in sources.items() if of is not None and of.name == "COMMANDLINE"}
        how: dict[str, Any] = {"teacher": teacher, "frames": frames, "controls": controls, "device": device}
        look_at_layers(source, paths, out, options, given=given, kind=figure_format, **how)
        return
    if frames is not None:
        raise UsageError("--frames applies only to --source mvit:LAYER, and no --source is given.")
    shown = _snapshots(snapshots, options.steps)
    files, missing = files_of(paths)
    _watch(files, missing, load_named(teacher, device), options, shown, out, figure_format, controls=controls)


def _watch(
    files: list[Path],
    missing: int,
    fitted_to: Teacher,
    options: IslandOptions,
    shown: list[int],
    out: Path,
    figure_format: str,
    *,
    controls: bool,
) -> None:
    """Fit a student to each image, and write what was seen of its field."""
    from apm.figures.base import output_stem
    from apm.figures.islands import write_islands
    from apm.test_time.island_fields import observe, trainers

    student = options.student()
    model, training = student.model(fitted_to.dim), student.training(fitted_to.device)
    by_target = trainers(model, training, grid_lr=options.grid_lr, device=fitted_to.device)
    settings = _settings(options, fitted_to, by_target["cls"])
    kept = _logarithmic(options.steps, FRAMES)

    def watched(file: Path, image: Image.Image, other: Image.Image, told: str) -> list[Path]:
        found = observe(image, other, fitted_to, by_target, options, shown=shown, kept=kept, controls=controls)
        of_file = {"image": printable(file.name), **settings, "other target": told}
        return write_islands(found, out / output_stem(file), shown=shown, settings=of_file, kind=figure_format)

    for_each_image(files, watched, out=out, missing=missing)


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
        "guide": options.guide,
        "agree": options.agree,
        "precision": student.precision,
        "seed": options.seed,
        "threshold": options.threshold,
        "parts": options.parts,
    }


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
