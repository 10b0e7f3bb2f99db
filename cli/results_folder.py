"""A folder with files and a JSON record of each image; the same command, run again, goes on from there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from apm.errors import ImageError, UsageError
from apm.images.files import write_atomically
from apm.images.paths import printable
from apm.settings import differences, refuse_other

from . import render
from .answer_file import Fingerprint, fingerprint
from .answering import Form, Inputs, interrupted
from .progress import progress

Record = dict[str, Any]


def failed_record(path: Path, error: str) -> Record:
    """The record of an input that failed before anything was loaded."""
    return {"path": str(path), "error": error}


class ResultsFolder:
    """Goes through the inputs one by one, and keeps what comes of each in a folder.

    Beside the results lies ``COMMAND.settings.json``: what they depend on. Results of other settings are never mixed.

    Args:
        folder: is there.
        command: name of the sub-command.
        settings: what the results depend on, by the option that sets it.
        always: fields of every record, also where there is no result.

    Raises:
        UsageError: the folder holds results that were made with other settings.
    """

    def __init__(
        self, folder: Path, command: str, settings: Mapping[str, Any], always: Mapping[str, Any] | None = None
    ) -> None:
        self._folder, self._command, self._always = folder, command, dict(always or {})
        self._check_settings(json.loads(json.dumps(settings)))

    def run(
        self, inputs: Inputs, form: Form, make: Callable[[Path, Path], Record], line: Callable[[Record], str]
    ) -> None:
        """Do everything.

        Args:
            inputs: the files.
            form: how it is told.
            make: a file, and the path of its results without suffix → fields of its record. It writes ``files``, their
                names, and raises an `ImageError` where the file is no image.
            line: what is said of a record, for people.

        Raises:
            UsageError: there was no input.
            typer.Exit: with 1 where some input has no result, with 130 after Ctrl-C.
        """
        done = failed = 0
        try:
            with progress(inputs.total, wanted=not form.quiet, doing=self._command) as counted:
                for path in inputs.paths:
                    record = self._one(path, make)
                    counted(lambda record=record: _show(record, inputs, form, line))  # type: ignore[misc]
                    done += 1
                    failed += record["error"] is not None
        except KeyboardInterrupt:
            raise interrupted(done, inputs.total, form) from None
        if not done:
            raise UsageError("Stdin held no path.")
        if failed:
            raise typer.Exit(1)

    def _one(self, path: Path, make: Callable[[Path, Path], Record]) -> Record:
        """Make what is to be made of a file, its record last; or take that from before, if nothing changed."""
        from apm.figures.base import output_stem

        stem = self._folder / output_stem(path)
        found = fingerprint(path)
        if found is not None and (earlier := _earlier(stem, found)) is not None:
            return {**earlier, "path": str(path)}
        record: Record = {"path": str(path), "file": None, **self._always, "error": None}
        began = time.perf_counter()
        try:
            made = make(path, stem)
        except ImageError as error:
            text = str(error)
            return {**record, "error": text if text.startswith(printable(path)) else f"{printable(path)}: {text}"}
        record["file"] = None if found is None else {"bytes": found[0], "modified_ns": found[1]}
        record |= {**made, "seconds": time.perf_counter() - began}
        write_atomically(Path(f"{stem}.json"), json.dumps(record, indent=1, allow_nan=False).encode() + b"\n")
        return record

    def _check_settings(self, settings: Record) -> None:
        """Write down what the results of this folder depend on, or compare it with what is there."""
        file = self._folder / f"{self._command}.settings.json"
        try:
            earlier = json.loads(file.read_bytes())
        except FileNotFoundError:
            write_atomically(file, json.dumps(settings, indent=1).encode() + b"\n")
            return
        except ValueError as error:
            raise UsageError(f"{printable(file)} is damaged ({error}): remove it, or give another --out.") from error
        if not isinstance(earlier, dict):
            raise UsageError(f"{printable(file)} holds no settings: remove it, or give another --out.")
        refuse_other(file, differences(earlier, settings))


def _show(record: Record, inputs: Inputs, form: Form, line: Callable[[Record], str]) -> None:
    if form.as_json:
        render.say_json(json.dumps(record, allow_nan=False))
    elif record["error"] is None:
        render.say(line(record))
    sys.stdout.flush()
    if record["error"] is not None and Path(record["path"]) not in inputs.problems:
        render.failure(record["error"])


def _earlier(stem: Path, found: Fingerprint) -> Record | None:
    """What an earlier run wrote of the same file, if all of it is there."""
    try:
        record = json.loads(Path(f"{stem}.json").read_bytes())
        same = (record["file"]["bytes"], record["file"]["modified_ns"]) == found
        whole = all((stem.parent / name).is_file() for name in record["files"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if same and whole else None
