"""`apm islands --source`: what layers of a fixed model hold at each place of images, where nothing is fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence, Set
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Looking:
    """What the command was told, whatever it looks at."""

    paths: Sequence[str]
    out: Path
    options: IslandOptions
    controls: bool
    device: str
    kind: str
    """Of the pictures: png or svg."""
    given: Set[str]
    """Parameters that the command line names."""


def look_at_layers(text: str, told: Looking, *, named: str | None, frames: int | None) -> None:
    """Write pictures, arrays and measures of each image.

    Args:
        text: the source.
        told: what else was said.
        named: the teacher's name, for a source that is its layers.
        frames: of the video that a video transformer is shown.

    Raises:
        UsageError: something was said that has no effect here, or there is no such model or layer.
    """
    name = parse_source(text)
    _refuse(name, told.given, frames)
    files, missing = files_of(told.paths)
    source, untrained = _load(name, told, named, frames)

    from apm.figures.base import output_stem
    from apm.figures.layers import write_layers
    from apm.test_time.island_fields import square_of
    from apm.test_time.layer_fields import observe_layers

    options = told.options
    settings = _settings(source, told)
    measuring: dict[str, Any] = {"threshold": options.threshold, "parts": options.parts, "seed": options.seed}

    def looked_at(file: Path, image: Image.Image, other: Image.Image, other_name: str) -> list[Path]:
        found = observe_layers(image, other, source, untrained, controls=told.controls, **measuring)
        beside = {"other image": other_name} if told.controls else {}
        of_file = {"image": printable(file.name), **settings, **beside}
        return write_layers(found, square_of(image), told.out / output_stem(file), settings=of_file, kind=told.kind)

    for_each_image(files, looked_at, out=told.out, missing=missing)


def _refuse(name: SourceName, given: Set[str], frames: int | None) -> None:
    """Refuse what is of a student, or of another kind of source."""
    foreign = [flag(one) for one in OF_STUDENT if one in given]
    if foreign:
        raise UsageError(
            f"--source {name.text} fits no student, so {', '.join(foreign)} would have no effect: leave out one of "
            "them."
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


def _load(
    name: SourceName, told: Looking, named: str | None, frames: int | None
) -> tuple[LayerSource, LayerSource | None]:
    """The source, and the same with weights at random where it has others and controls are wanted."""
    teacher = load_named(named, told.device) if name.kind == "teacher" else None

    from apm.devices import pick_device

    device = pick_device(told.device)
    source = load_layers(name.text, teacher=teacher, size=told.options.grid_size, frames=frames, device=device)
    wanted = told.controls and name.seed is None
    return source, source.at_random(told.options.seed) if wanted else None


def _settings(source: LayerSource, told: Looking) -> dict[str, Any]:
    """What the small print and the record say, as plain JSON values."""
    video = {} if source.frames is None else {"frames": source.frames, "time shown": source.shown}
    return {
        "source": source.identity,
        "weights": source.weights.words,
        **video,
        "pixels": source.weights.size,
        "seed": told.options.seed,
        "threshold": told.options.threshold,
        "parts": told.options.parts,
    }
