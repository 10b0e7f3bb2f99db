"""`apm segment`: which label is where on photographs of any shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import UsageError
from apm.images.files import make_folder
from apm.images.paths import printable
from apm.labels import check_labels, read_labels_file, split_labels
from apm.segment_values import PLACES, check

from . import render
from .answer_file import answer_settings
from .answering import Form, Inputs
from .classify import SOURCE, STUDENT, Source, load_classifier
from .options import Debug, JsonLines, LinesOnly, MaxPixels, options_of, student_options
from .results_folder import failed_record, fill_folder

if TYPE_CHECKING:
    from apm.classifier import Classifier


@student_options(
    STUDENT,
    defaults={"preset": "small", "steps": 150, "lr": 1e-3, "distil": "grid", "grid_views": 16, "precision": "fp32"},
)
@options_of(Source, "source", SOURCE)
def segment(
    paths: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, or - to read paths from stdin, one per line.", metavar="PATH"),
    ],
    source: Source,
    *,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for maps, overlays and JSON; the same command continues it.")
    ],
    background: Annotated[str | None, typer.Option(help='Labels that count as background: "wall,floor".')] = None,
    min_probability: Annotated[
        float, typer.Option(help="Locations whose best label is less probable than this become background, 0 to 1.")
    ] = 0.0,
    min_area: Annotated[
        float,
        typer.Option(help="Connected regions with a smaller share of the image are merged into their neighbours."),
    ] = 0.001,
    places: Annotated[int, typer.Option(help="Locations along the shorter side at which the field is read.")] = PLACES,
    student: dict[str, Any],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=STUDENT)] = "auto",
    as_json: JsonLines = False,
    quiet: LinesOnly = False,
    max_pixels: MaxPixels = None,
    debug: Debug = False,
) -> None:
    """Segment photographs of any shape by your labels, adapting new students to each.

    Writes for each image the label map (PNG with a palette), the photograph with the map overlaid, and a JSON file with
    every label's share and the bounding boxes of its connected regions; prints a line of shares. An image that is not
    square is covered by several squares, with a student for each.

    Exit code: 0 all done, 1 some could not be (each is named on stderr), 2 wrong usage.
    """
    if student["distil"] == "cls":
        raise UsageError("apm segment needs a target with information about locations: --distil grid or both, not cls.")
    names, none = _words(source, background)
    check(names, none, min_probability, min_area, places)
    make_folder(out)
    form = Form(min_probability=min_probability, as_json=as_json, quiet=quiet, out=out)
    inputs = Inputs(paths)
    inputs.name_problems(form, doing="segment", failed=failed_record)
    with render.told_when_interrupted("interrupted before anything was segmented."):
        classifier = load_classifier(
            source, names, student, form, device=device, batch_size=None, max_pixels=max_pixels
        )
    check(classifier.head.labels, none, min_probability, min_area, places)
    if not quiet or classifier.fell_back:
        for note in classifier.teacher.notes:
            render.notice(note)
    chosen: dict[str, Any] = {"background": none, "min_area": min_area, "places": places}
    fill_folder(
        out,
        "segment",
        _settings(classifier, chosen),
        inputs,
        form,
        lambda path, stem: _segmented(classifier, path, stem, chosen),
        _line,
        always={"teacher": classifier.teacher.identity},
    )


def _settings(classifier: Classifier, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What the maps of a folder depend on."""
    settings = answer_settings(classifier, steps_detail=False)
    for unused in ("top-k", "steps-detail", "target", "views"):
        settings.pop(unused)
    return {**settings, **{name.replace("_", "-"): value for name, value in chosen.items()}}


def _words(source: Source, background: str | None) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """All labels, background included (None where they are not given), and which of them are background."""
    if background is None:
        return source.names(), ()
    none = split_labels(background)
    if not none:
        raise UsageError(f'--background is "{background}", which contains no name.')
    if source.labels is not None:
        given = dataclasses.replace(source, labels=f"{source.labels},{background}").names()
        assert given is not None
        return given, given[-len(none) :]
    if source.labels_file is not None:
        source.names()
        given = check_labels([*read_labels_file(source.labels_file), *none])
        return given, given[-len(none) :]
    return source.names(), none


def _segmented(classifier: Classifier, path: Path, stem: Path, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Segment a file, write map and overlay, and return the fields of its record."""
    from apm.figures.segments import segmentation_record, write_segmentation
    from apm.images.load import load_image

    loaded = load_image(path, max_pixels=classifier.max_pixels)
    found = classifier.segment(loaded.image, **chosen)
    files = write_segmentation(loaded.image, found, stem)
    return {
        **segmentation_record(found),
        "notes": list(loaded.notes),
        "files": {name: file.name for name, file in files.items()},
    }


def _line(record: dict[str, Any]) -> str:
    shares = [f"{part['label']} {part['share']:.1%}" for part in record["parts"]]
    if record["background"]:
        shares.append(f"(background) {record['background']:.1%}")
    return f"{printable(record['path'])}\t{', '.join(printable(share) for share in shares)}"
