"""The file run.json of a run folder, read with nothing taken on trust; and two of them compared.

What belongs in the file is said once, in schemas/run.schema.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

from apm.errors import UsageError
from apm.images.paths import printable

SCHEMA_VERSION = 1
_REMEDY = "Restore the file, or start over with apm bench … --fresh."
_SHOWN = 60
"""Characters of a value that a message holds."""


def read_run(path: Path) -> dict[str, Any] | None:
    """Read and check a run.json; None where there is none.

    Raises:
        UsageError: the file cannot be read, is damaged or of another schema version; one line that names the place.
    """
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        run = json.loads(content.decode("utf-8"), parse_constant=_refuse)
        version = run["schema"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} is not a run record. {_REMEDY}") from None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{path} has schema {shortened(version)}; this version reads schema {SCHEMA_VERSION}.")
    if found := next(_faults(run), None):
        raise UsageError(f"{path} is damaged: {found}. {_REMEDY}")
    for name, default in (("protocol", "common"), ("order", run["stream_order"]["seed"])):
        run["config"].setdefault(name, default)  # of a run made before there was a choice
    return run


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


@cache
def _validator() -> Any:
    """The schema's validator, for which 3.0 is no integer."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    def whole(checker: Any, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    text = (resources.files("apm.benchmarks") / "schemas" / "run.schema.json").read_text(encoding="utf-8")
    strict = extend(Draft202012Validator, type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", whole))
    return strict(json.loads(text))


def _faults(run: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a record, each in a few words: first its shape, then what must agree with what."""
    for error in _validator().iter_errors(run):
        place = ".".join(map(str, error.absolute_path)) or "the record"
        yield f"{place}: {shortened(error.message, quoted=False)}"
    cells, planned = run["cells"], run["config"]["cells"]
    if cells.keys() != planned.keys():
        yield f"config.cells names {', '.join(planned) or 'nothing'}, and cells {', '.join(cells) or 'nothing'}"
    for key, cell in cells.items():
        for kind in ("label_set", "prompt_set"):
            if cell[kind] not in run[f"{kind}s"]:
                yield f"cells.{key}.{kind} is {shortened(cell[kind])}, which {kind}s does not hold"
            elif cell[kind] != planned[key][kind]:
                yield f"cells.{key}.{kind} is not that of config"
        if cell["classes"] != len(run["label_sets"][cell["label_set"]]):
            yield f"cells.{key}.classes is {cell['classes']}, which is not the number of its label set"
        if (cell["corruption"] is None) != (cell["level"] is None):
            yield f"cells.{key} has corruption {shortened(cell['corruption'])} at level {cell['level']}"
        if cell["images"] > cell["total"]:
            yield f"cells.{key}.images is {cell['images']} of {cell['total']}"


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Compare two configurations field by field.

    Returns:
        (dotted field, old value, new value) for each that differs; a field that one lacks is None there.
    """
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found


def describe_differences(found: Iterable[tuple[str, Any, Any]]) -> str:
    """Put differing fields into words: ``limit: 100 before, 200 now; …``, long values shortened."""
    return "; ".join(f"{field}: {shortened(before)} before, {shortened(after)} now" for field, before, after in found)


def changed_configuration(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Say in what the configurations of two runs differ; empty where they are the same.

    Args:
        old, new: what run.json says: ``config``, ``label_sets`` and ``prompt_sets``. Prompts and class names are shown,
            not their digests.
    """
    before, after = old["config"], new["config"]
    own = [found for found in differences(before, after) if not found[0].startswith("cells.")]
    prose = [
        found for found in own if found[0].endswith(".published")
    ]  # sums up the settings: shown only where these are the same
    parts = [describe_differences([found for found in own if found not in prose] or prose)]
    for config, other, when in ((before, after, "before"), (after, before, "now")):
        if only := [cell for cell in config["cells"] if cell not in other["cells"]]:
            parts.append(f"cells only {when}: {', '.join(only)}")
    changed: dict[str, list[str]] = {}
    for cell in (cell for cell in before["cells"] if cell in after["cells"]):
        for field, was, now in differences(before["cells"][cell], after["cells"][cell]):
            changed.setdefault(_change_in_words(field, was, now, old, new), []).append(cell)
    parts += [f"{words} (cells: {', '.join(cells)})" for words, cells in changed.items()]
    return "; ".join(filter(None, parts))


def _change_in_words(field: str, was: Any, now: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    if field in ("prompt_set", "label_set"):
        what = "prompts" if field == "prompt_set" else "class names"
        return _changed_set(what, old[f"{field}s"].get(was, [was]), new[f"{field}s"].get(now, [now]))
    if field == "descriptors":
        before, after = (f"SHA-256 {digest[:12]}…" if digest else "none" for digest in (was, now))
        return f"the LLM descriptors of the classes: {before} before, {after} now"
    if field == "fingerprint":
        return f"the images, their order or their labels (fingerprint): {shortened(was[:12])} before, {now[:12]} now"
    return describe_differences([(field, was, now)])


def _changed_set(what: str, was: list[str], now: list[str]) -> str:
    """Show what only one of two lists holds; where both hold the same, the first place at which they differ."""
    gone, added = [text for text in was if text not in now], [text for text in now if text not in was]
    if not gone and not added:
        place = next((i for i, (a, b) in enumerate(zip(was, now, strict=False)) if a != b), min(len(was), len(now)))
        return f"{what} in another order, from place {place} on: {_some(was[place:])} before, {_some(now[place:])} now"
    return f"{what}: {_some(gone)} before, {_some(added)} now"


def _some(texts: list[str]) -> str:
    shown = ", ".join(shortened(text, at_most=200) for text in texts[:3]) or "nothing"
    return shown if len(texts) <= 3 else f"{shown} and {len(texts) - 3} more"


def shortened(value: Any, *, quoted: bool = True, at_most: int = _SHOWN) -> str:
    """A value as one short printable line, for messages."""
    text = printable(json.dumps(value, ensure_ascii=False) if quoted else str(value))
    return text if len(text) <= at_most else text[: at_most - 3] + "…"
