"""Rows of a long study in a growing file, one JSON line per item; the same command resumes from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from apm.errors import UsageError
from apm.images.files import read_json_lines, write_atomically, writing
from apm.images.paths import printable
from apm.settings import differences, refuse_other

from .study import each

Item = TypeVar("Item")
Row = dict[str, Any]


def continued(
    items: Sequence[Item],
    measure: Callable[[Item], Row],
    what: str,
    *,
    path: Path | None,
    settings: Mapping[str, Any],
) -> list[Row]:
    """Measure each item as `each` does, but for those whose rows are in a file already; write each row as it comes.

    Args:
        items: in an order that depends on the settings alone; more than were measured may be asked for.
        measure: item → its row, plain JSON values.
        what: the items' name.
        path: of the file; None: rows are kept nowhere.
        settings: what the rows depend on, plain JSON values.

    Raises:
        UsageError: the file was made with other settings, or holds no rows.
    """
    if path is None:
        return each(items, measure, what)
    settings = json.loads(json.dumps(settings))
    done = _read(path, settings) if path.exists() else []
    lines = [json.dumps(one, allow_nan=False).encode() + b"\n" for one in (settings, *done)]
    write_atomically(path, b"".join(lines))  # without a line that was cut off

    def measured(item: Item) -> Row:
        row = measure(item)
        with writing(path), path.open("ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        return row

    kept = done[: len(items)]
    return [*kept, *each(items[len(kept) :], measured, what, minimum=0 if kept else 1)]


def _read(path: Path, settings: Mapping[str, Any]) -> list[Row]:
    try:
        first, *rows = read_json_lines(path)
        refuse_other(path, differences(first, settings))
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{printable(path)} holds no rows of this study ({error}): name another file.") from error
    return rows


def logged(checkpoint: Path) -> list[dict[str, Any]]:
    """Read the whole log that a training has written beside its checkpoint.

    Raises:
        UsageError: there is none, it is empty, or damaged.
    """
    file = Path(f"{checkpoint}.log.jsonl")
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        rows = []
    if not rows:
        raise UsageError(f"{printable(file)}, the log that training wrote, cannot be read.")
    return rows
