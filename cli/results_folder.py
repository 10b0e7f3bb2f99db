"""A folder with files and a JSON record for each image; running the same command again continues it."""

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
COMMANDS = ("colourise", "segment")
"""The commands that fill folders."""


def failed_record(path: Path, error: str) -> Record:
    """The record of an input that failed before anything was loaded."""
    return {"path": str(path), "error": error}


def fill_folder(
    folder: Path,
    command: str,
    settings: Mapping[str, Any],
    inputs: Inputs,
    form: Form,
    make: Callable[[Path, Path], Record],
    line: Callable[[Record], str],
    *,
    always: Mapping[str, Any],
) -> None:
    """Go through the inputs one by one, and keep the results of each in a folder.

    ``COMMAND.settings.json`` beside them records what they depend on: those of different settings are never mixed.

    Args:
        folder: must exist.
        command: name of the sub-command.
        settings: what the results depend on, by the option that sets it.
        inputs: the files.
        form: how results are shown.
        make: a file, and the path of its results without suffix → fields of its record. It writes ``files``, their
            names, and raises an `ImageError` where the file is no image.
        line: what is printed for a record, for people.
        always: fields of every record, also where there is no result.

    Raises:
        UsageError: the folder holds results of other settings or of another command, or there was no input.
        typer.Exit: with 1 where some input has no result, with 130 after Ctrl-C.
    """
    from apm.figures.base import output_stem

    since = _check_settings(folder, command, json.loads(json.dumps(settings)))
    done = failed = 0
    try:
        with progress(inputs.total, wanted=not form.quiet, doing=command) as counted:
            for path in inputs.paths:
                record = _result(path, folder / output_stem(path), make, always, since)
                counted(lambda record=record: _show(record, inputs, form, line))  # type: ignore[misc]
                done += 1
                failed += record["error"] is not None
    except KeyboardInterrupt:
        raise interrupted(done, inputs.total, form) from None
    if not done:
        raise UsageError("Stdin held no path.")
    if failed:
        raise typer.Exit(1)


def _result(
    path: Path, stem: Path, make: Callable[[Path, Path], Record], always: Mapping[str, Any], since: int
) -> Record:
    """Make the results of a file, its record last; or take those from before, if nothing has changed."""
    found = fingerprint(path)
    if found is not None and (earlier := _earlier(stem, found, since)) is not None:
        return {**earlier, "path": str(path)}
    record: Record = {"path": str(path), "file": None, **always, "error": None}
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


def _check_settings(folder: Path, command: str, settings: Record) -> int:
    """Record what the results in this folder depend on, or compare it with the record; returns when that was made."""
    for other in COMMANDS:  # which name their records alike
        if other != command and _settings_file(folder, other).exists():
            raise UsageError(f"{printable(folder)} holds results of apm {other}: give another --out.")
    file = _settings_file(folder, command)
    try:
        earlier = json.loads(file.read_bytes())
    except FileNotFoundError:
        write_atomically(file, json.dumps(settings, indent=1).encode() + b"\n")
        earlier = settings
    except ValueError as error:
        raise UsageError(f"{printable(file)} is damaged ({error}): remove it, or give another --out.") from error
    if not isinstance(earlier, dict):
        raise UsageError(f"{printable(file)} holds no settings: remove it, or give another --out.")
    refuse_other(file, differences(earlier, settings))
    return file.stat().st_mtime_ns


def _settings_file(folder: Path, command: str) -> Path:
    return folder / f"{command}.settings.json"


def _show(record: Record, inputs: Inputs, form: Form, line: Callable[[Record], str]) -> None:
    if form.as_json:
        render.say_json(json.dumps(record, allow_nan=False))
    elif record["error"] is None:
        render.say(line(record))
    sys.stdout.flush()
    if record["error"] is not None and Path(record["path"]) not in inputs.problems:
        render.failure(record["error"])


def _earlier(stem: Path, found: Fingerprint, since: int) -> Record | None:
    """What an earlier run with these settings wrote of the same file, if all of it is there."""
    file = Path(f"{stem}.json")
    try:
        if file.stat().st_mtime_ns < since:  # its settings were removed: nobody knows them
            return None
        record = json.loads(file.read_bytes())
        same = (record["file"]["bytes"], record["file"]["modified_ns"]) == found
        whole = all((stem.parent / name).is_file() for name in record["files"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if same and whole else None
