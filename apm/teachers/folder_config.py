"""The configuration of a teacher in a folder, checked before anything is built from it: anybody may have written it.

What is refused is what cannot be a model's: numbers that are not finite or far beyond any model's, wrong types, names
twice. Whether the weights fit is found out when they are loaded.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apm.errors import TeacherError, UsageError
from apm.labels import check_labels, check_templates

MAX_IMAGE_SIZE = 2048
"""Pixels a side; the largest of open_clip's models take 512."""
_MAX_NUMBER = 10_000_000
_MAX_LAYERS = 200
_MAX_DEPTH = 8
_MAX_TEXT = 10_000_000  # bytes of a file, unpacked
_INTERPOLATIONS = ("bicubic", "bilinear", "random")
_RESIZE_MODES = ("shortest", "longest", "squash")


def read_config(path: Path, name: str) -> Mapping[str, Any]:
    """Return the ``model_cfg`` of a folder's ``open_clip_config.json``.

    Args:
        path: the file.
        name: the teacher's, for messages.

    Raises:
        TeacherError: it cannot be read, or cannot be a model's.
    """
    try:
        content = json.loads(read_text(path))
        _check(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise TeacherError(
            f'The teacher "{name}" cannot be loaded: {path} is not a configuration of open_clip ({reason}).'
        ) from error
    model: Mapping[str, Any] = content["model_cfg"]
    return model


def read_names(path: Path, kind: str) -> tuple[str, ...] | None:
    """Return the class names ("labels") or prompts ("templates") of a folder, one a line; None: there is no such file.

    Raises:
        TeacherError: the file cannot be read, or its lines cannot be what they are to be.
    """
    if not path.is_file():
        return None
    try:
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise TeacherError(f"The teacher's file {path} cannot be read as UTF-8 text: {error}.") from error
    if not lines:
        return None
    try:
        return check_labels(lines) if kind == "labels" else check_templates(lines)
    except UsageError as error:
        raise TeacherError(f"The teacher's file {path} cannot be used. {error}") from error


def check_vocabulary(path: Path, size: int) -> None:
    """Check that a packed list of merges gives as many tokens as the text tower knows.

    Args:
        path: gzipped text: a line that is skipped, then two words a line.
        size: tokens that the text tower knows.

    Raises:
        TeacherError: it cannot be read, holds a merge twice, or gives another number of tokens.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(_MAX_TEXT + 1)
        if len(content) > _MAX_TEXT:
            raise ValueError(f"more than {_MAX_TEXT} bytes")
        merges = [tuple(line.split()) for line in content.decode("utf-8").split("\n")[1:]]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise TeacherError(f"The teacher's vocabulary {path} cannot be read: {error}.") from error
    merges = [merge for merge in merges if merge]
    if len(set(merges)) < len(merges) or any(len(merge) != 2 for merge in merges):
        raise TeacherError(f"The teacher's vocabulary {path} is damaged: its lines must be two words each, none twice.")
    tokens = 2 * 256 + len(merges) + 2  # bytes, bytes that end a word, merges, start and end
    if tokens != size:
        raise TeacherError(
            f"The teacher's vocabulary {path} does not belong to it: it has {tokens} tokens, its text tower {size}."
        )


def read_text(path: Path) -> str:
    """Read a small file as UTF-8.

    Raises:
        OSError, ValueError: it cannot be read, is too large, or is no text.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_TEXT + 1)
    if len(content) > _MAX_TEXT:
        raise ValueError(f"it has more than {_MAX_TEXT} bytes")
    return content.decode("utf-8")


def _check(content: Any) -> None:
    """Refuse, with a ValueError, what cannot be a configuration."""
    model = _group(content, "model_cfg")
    vision, text = _group(model, "vision_cfg"), _group(model, "text_cfg")
    for where, value, depth in _leaves(content, "", 0):
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:  # so that NaN is refused too
            raise ValueError(f"{where} is {_shown(value)}")
    _whole(model, "embed_dim", high=65536)
    _image_size(vision)
    for group in (vision, text):
        for name in ("width", "heads", "head_width", "patch_size", "vocab_size", "context_length"):
            if name in group:
                _whole(group, name, high=_MAX_NUMBER)
        _layers(group)
    _check_preprocessing(content.get("preprocess_cfg", {}))


def _group(content: Any, name: str) -> dict[str, Any]:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"it has no {name}, or one that is no group of settings")
    return found


def _leaves(value: Any, where: str, depth: int) -> Iterator[tuple[str, Any, int]]:
    """All plain values with where they stand and how deep; one too deep group stands for what is in it."""
    if depth > _MAX_DEPTH or not isinstance(value, (dict, list)):
        yield where, value, depth
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in items:
        yield from _leaves(part, f"{where}.{name}" if where else str(name), depth + 1)


def _whole(group: Mapping[str, Any], name: str, *, high: int) -> None:
    value = group.get(name)
    if not _is_whole(value, high):
        raise ValueError(f"{name} is {_shown(value)}; it must be a whole number from 1 to {high}")


def _is_whole(value: Any, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= high


def _image_size(vision: Mapping[str, Any]) -> None:
    size = vision.get("image_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not all(_is_whole(side, MAX_IMAGE_SIZE) for side in sides):
        raise ValueError(f"image_size is {_shown(size)}; it must be from 1 to {MAX_IMAGE_SIZE} pixels a side")


def _layers(group: Mapping[str, Any]) -> None:
    layers = group.get("layers", 1)
    counts = layers if isinstance(layers, list) and len(layers) == 4 else [layers]  # four in CLIP's ResNets
    if not all(_is_whole(count, _MAX_LAYERS) for count in counts):
        raise ValueError(f"layers is {_shown(layers)}; it must be a whole number from 1 to {_MAX_LAYERS}, or four")


def _check_preprocessing(settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ValueError("its preprocess_cfg is no group of settings")
    for name, minimum in (("mean", -math.inf), ("std", 0.0)):
        value = settings.get(name, 1.0)
        channels: Sequence[Any] = value if isinstance(value, list) and len(value) == 3 else [value]
        if not all(isinstance(one, (int, float)) and not isinstance(one, bool) and one > minimum for one in channels):
            wanted = "numbers above 0" if name == "std" else "numbers"
            raise ValueError(f"{name} is {_shown(value)}; it must be three {wanted}, one for each channel")
    for name, known in (("interpolation", _INTERPOLATIONS), ("resize_mode", _RESIZE_MODES), ("mode", ("RGB",))):
        if settings.get(name, known[0]) not in known:
            raise ValueError(f"{name} is {_shown(settings[name])}; known: {', '.join(known)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
