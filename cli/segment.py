"""`apm segment`: which label is where on photographs of any shape."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apm.errors import ImageError, UsageError
from apm.images.files import make_folder, write_atomically
from apm.images.paths import printable
from apm.labels import check_labels, read_labels_file
from apm.settings import differences, refuse_other

from . import render
from .answer_file import Fingerprint, answer_settings, fingerprint
from .answering import Form, Inputs, interrupted
from .classify import SOURCE, STUDENT, Source, load_classifier
from .options import Debug, options_of, student_options
from .progress import progress

if TYPE_CHECKING:
    from apm.classifier import Classifier

SETTINGS = "segment.settings.json"
"""In the folder: what the maps there depend on."""


@student_options(
    STUDENT,
    defaults={"preset": "small", "steps": 150, "lr": 1e-3, "distil": "grid", "grid_views": 16, "precision": "fp32"},
)
@options_of(Source, "source", SOURCE)
def segment(
    paths: Annotated[
        list[str],
        typer.Argument(help="Files, folders, patterns, or - for paths on stdin, one a line.", metavar="PATH"),
    ],
    source: Source,
    *,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for maps, overlays and JSON; the same command continues it.")
    ],
    background: Annotated[
        str | None, typer.Option(help='Labels that count as none of those looked for: "wall,floor".')
    ] = None,
    min_probability: Annotated[
        float, typer.Option(help="Places whose best label is less probable are background, 0 to 1.")
    ] = 0.0,
    min_area: Annotated[
        float,
        typer.Option(help="Connected pieces with a smaller share of the image are given to what is next to them."),
    ] = 0.001,
    places: Annotated[int, typer.Option(help="Places along the shorter side at which the field is read.")] = 112,
    student: dict[str, Any],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=STUDENT)] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line an image, nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but the lines and errors.")] = False,
    max_pixels: Annotated[
        int | None, typer.Option(help="Refuse larger images (width × height). Default: 89478485.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Say which label is where on photographs of any shape, adapting fresh students to each of them.

    For each image: the label map (PNG with a palette), the photograph with the map laid over it, and a JSON file with
    every label's share and the boxes of its connected regions; on stdout a line of shares. An image that is not square
    is seen in several squares, with a student for each.

    Exit code: 0 all done, 1 some could not be (each is named on stderr), 2 wrong usage.
    """
    from apm.segmentation import check

    if student["distil"] == "cls":
        raise UsageError("apm segment needs a target that says what is where: --distil grid, or both, not cls.")
    source, names, none = _words(source, background)
    make_folder(out)
    form = Form(min_probability=min_probability, as_json=as_json, quiet=quiet, out=out)
    inputs = Inputs(paths)
    inputs.name_problems(form)
    with render.told_when_interrupted("interrupted: nothing is segmented."):
        classifier = load_classifier(
            source, names, student, form, device=device, batch_size=None, max_pixels=max_pixels
        )
    check(classifier.head.labels, none, min_probability, min_area, places)
    if not quiet or classifier.fell_back:
        for note in classifier.teacher.notes:
            render.notice(note)
    work = Segmenting(classifier, out, background=none, min_area=min_area, places=places, as_json=as_json)
    work.run(inputs, form)


def _words(source: Source, background: str | None) -> tuple[Source, tuple[str, ...] | None, tuple[str, ...]]:
    """The source without labels of its own, all labels, background included, and which of them count as none."""
    if background is None:
        return source, source.names(), ()
    none = tuple(tidy for part in background.split(",") if (tidy := " ".join(part.split())))
    if not none:
        raise UsageError(f'--background is "{background}", which holds no name.')
    if source.labels is not None:
        given = dataclasses.replace(source, labels=f"{source.labels},{background}").names()
        assert given is not None
        return source, given, given[-len(none) :]
    if source.labels_file is not None:
        source.names()
        given = check_labels([*read_labels_file(source.labels_file), *none])
        return source, given, given[-len(none) :]
    return source, source.names(), none


class Segmenting:
    """Segments the inputs one by one into a folder.

    Raises:
        UsageError: the folder holds maps that were made with other settings.
    """

    def __init__(
        self,
        classifier: Classifier,
        folder: Path,
        *,
        background: tuple[str, ...],
        min_area: float,
        places: int,
        as_json: bool,
    ) -> None:
        self._classifier, self._folder, self._as_json = classifier, folder, as_json
        self._chosen: dict[str, Any] = {"background": background, "min_area": min_area, "places": places}
        settings = answer_settings(classifier, steps_detail=False)
        for unused in ("top-k", "steps-detail", "target", "views"):
            settings.pop(unused)
        chosen = {name.replace("_", "-"): value for name, value in self._chosen.items()}
        self._settings: dict[str, Any] = json.loads(json.dumps({**settings, **chosen}))
        self._check_settings()

    def run(self, inputs: Inputs, form: Form) -> None:
        """Segment everything.

        Raises:
            UsageError: there was no input.
            typer.Exit: with 1 where some input could not be segmented, with 130 after Ctrl-C.
        """
        done = failed = 0
        try:
            with progress(inputs.total, wanted=not form.quiet, doing="segment") as counted:
                for path in inputs.paths:
                    record = self._one(path)
                    counted(lambda record=record: self._show(record, inputs))  # type: ignore[misc]
                    done += 1
                    failed += record["error"] is not None
        except KeyboardInterrupt:
            raise interrupted(done, inputs.total, form) from None
        if not done:
            raise UsageError("No path came in on stdin.")
        if failed:
            raise typer.Exit(1)

    def _one(self, path: Path) -> dict[str, Any]:
        """Segment a file and write what came of it, its record last; or take that from before, if nothing changed."""
        from apm.figures.base import output_stem
        from apm.figures.segments import segmentation_record, write_segmentation
        from apm.images.load import load_image

        stem = self._folder / output_stem(path)
        found = fingerprint(path)
        if found is not None and (earlier := _earlier(stem, found)) is not None:
            return {**earlier, "path": str(path)}
        record: dict[str, Any] = {
            "path": str(path),
            "file": None,
            "teacher": self._classifier.teacher.identity,
            "error": None,
        }
        began = time.perf_counter()
        try:
            loaded = load_image(path, max_pixels=self._classifier.max_pixels)
            segmented = self._classifier.segment(loaded.image, **self._chosen)
        except ImageError as error:
            text = str(error)
            return {**record, "error": text if text.startswith(printable(path)) else f"{printable(path)}: {text}"}
        files = write_segmentation(loaded.image, segmented, stem)
        record |= {
            "file": None if found is None else {"bytes": found[0], "modified_ns": found[1]},
            **segmentation_record(segmented),
            "notes": list(loaded.notes),
            "files": {name: file.name for name, file in files.items()},
            "seconds": time.perf_counter() - began,
        }
        write_atomically(Path(f"{stem}.json"), json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
        return record

    def _show(self, record: dict[str, Any], inputs: Inputs) -> None:
        if self._as_json:
            render.say_json(json.dumps(record, allow_nan=False))
        elif record["error"] is None:
            shares = [f"{part['label']} {part['share']:.1%}" for part in record["parts"]]
            if record["background"]:
                shares.append(f"(background) {record['background']:.1%}")
            render.say(f"{printable(record['path'])}\t{', '.join(printable(share) for share in shares)}")
        sys.stdout.flush()
        if record["error"] is not None and Path(record["path"]) not in inputs.problems:
            render.failure(record["error"])

    def _check_settings(self) -> None:
        """Write down what the maps of this folder depend on, or compare it with what is there."""
        file = self._folder / SETTINGS
        try:
            earlier = json.loads(file.read_bytes())
        except FileNotFoundError:
            write_atomically(file, json.dumps(self._settings, indent=1).encode() + b"\n")
            return
        except ValueError as error:
            raise UsageError(f"{printable(file)} is damaged ({error}): remove it, or give another --out.") from error
        if not isinstance(earlier, dict):
            raise UsageError(f"{printable(file)} holds no settings: remove it, or give another --out.")
        refuse_other(file, differences(earlier, self._settings))


def _earlier(stem: Path, found: Fingerprint) -> dict[str, Any] | None:
    """What an earlier run wrote of the same file, if all of it is there."""
    try:
        record = json.loads(Path(f"{stem}.json").read_bytes())
        same = (record["file"]["bytes"], record["file"]["modified_ns"]) == found
        whole = all((stem.parent / name).is_file() for name in record["files"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if same and whole else None
