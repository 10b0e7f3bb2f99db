"""`apm islands --source`: what layers of a fixed model hold at each place of images, where nothing is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apm.errors import UsageError
from apm.images.paths import printable
from apm.teachers import load_layers
from apm.teachers.layer_sources import FRAMES, SourceName, parse_source
from apm.test_time.options import IslandOptions

from .island_inputs import files_of, for_each_image, load_named
from .options import flag

if TYPE_CHECKING:
    from PIL import Image

    from apm.teachers.layers import LayerSource

SHARED = ("threshold", "parts", "seed", "grid_size")
"""Settings of a student and its islands that hold for layers as well."""
OF_STUDENT = [field.name for field in dataclasses.fields(IslandOptions) if field.name not in SHARED] + ["snapshots"]


def look_at_layers(
    text: str,
    paths: Sequence[str],
    out: Path,
    options: IslandOptions,
    *,
    given: Set[str],
    teacher: str | None,
    frames: int | None,
    controls: bool,
    device: str,
    kind: str,
) -> None:
    """Write pictures, arrays and measures of each image.

    Args:
        text: the source.
        paths: of the images, as the command line has them.
        out: the folder to write to.
        options: how to measure.
        given: parameters that the command line names.
        teacher: name of the teacher, for a source that is its layers.
        frames: of the video that a video transformer is shown.
        controls: whether they are made as well.
        device: where the model goes.
        kind: of the pictures: png or svg.

    Raises:
        UsageError: something was said that has no effect here, or there is no such model or layer.
    """
    name = parse_source(text)
    _refuse(name, given, frames)
    files, missing = files_of(paths)
    loaded = load_named(teacher, device) if name.kind == "teacher" else None

    from apm.devices import pick_device

    source = load_layers(name.text, teacher=loaded, size=options.grid_size, frames=frames, device=pick_device(device))
    untrained = source.at_random(options.seed) if controls and name.seed is None else None

    from apm.figures.base import output_stem
    from apm.figures.layers import write_layers
    from apm.test_time.island_fields import square_of
    from apm.test_time.layer_fields import observe_layers

    settings = _settings(source, options)
    measuring: dict[str, Any] = {"threshold": options.threshold, "parts": options.parts, "seed": options.seed}

    def looked_at(file: Path, image: Image.Image, other: Image.Image, other_name: str) -> list[Path]:
        found = observe_layers(image, other, source, untrained, controls=controls, **measuring)
        beside = {"other image": other_name} if controls else {}
        of_file = {"image": printable(file.name), **settings, **beside}
        return write_layers(found, square_of(image), out / output_stem(file), settings=of_file, kind=kind)

    for_each_image(files, looked_at, out=out, missing=missing)


def _refuse(name: SourceName, given: Set[str], frames: int | None) -> None:
    """Refuse what is of a student, or of another kind of source."""
    foreign = [flag(one) for one in OF_STUDENT if one in given]
    if foreign:
        raise UsageError(
            f"--source {name.text} fits no student, so {', '.join(foreign)} would have no effect: leave out either."
        )
    if "teacher" in given and name.kind != "teacher":
        raise UsageError(
            f"--source {name.text} uses no teacher, but --teacher is given: for a teacher's layers write --source "
            "teacher:LAYER."
        )
    if frames is not None and (name.kind != "mvit" or frames not in FRAMES):
        allowed = " or ".join(map(str, FRAMES))
        raise UsageError(
            f"--frames is {frames} with --source {name.text}: it applies only to mvit, and must be {allowed}."
        )


def _settings(source: LayerSource, options: IslandOptions) -> dict[str, Any]:
    """What the small print and the record say, as plain JSON values."""
    video = {} if source.frames is None else {"frames": source.frames, "time shown": source.shown}
    return {
        "source": source.identity,
        "weights": source.weights.words,
        **video,
        "pixels": source.weights.size,
        "seed": options.seed,
        "threshold": options.threshold,
        "parts": options.parts,
    }
