"""Class names × prompts → text features → logits, as in CLIP (Radford et al. 2021, section 3.1.4).

The features are computed once per teacher, names and templates, and kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from apm.errors import UsageError
from apm.images.files import WriteError, is_private, write_atomically
from apm.labels import check_templates
from apm.teachers.base import Teacher

_FORMAT = 1
_log = logging.getLogger("apm")
_told: set[Path] = set()


@dataclass(frozen=True, eq=False)
class ZeroShotHead:
    """A linear classifier made of text features."""

    labels: tuple[str, ...]
    """The C class names, by class number. A built-in set may hold a name twice."""
    features: Tensor
    """(C, D) float32, each row of length 1."""
    logit_scale: float
    """Multiplies the cosine."""
    templates: tuple[str, ...] = ()
    """The prompts that the features were averaged over."""

    @classmethod
    def build(
        cls,
        teacher: Teacher,
        labels: Sequence[str],
        templates: Sequence[str],
        *,
        cache_dir: str | Path | None = None,
        cache: bool = True,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> ZeroShotHead:
        """Encode every label in every template, normalise, average over templates, and normalise again.

        Beside the result (C·D numbers), memory depends on `batch_size` only, not on the number of labels.

        Args:
            teacher: whose text tower and logit scale are used.
            labels: C ≥ 2 class names.
            templates: prompts with ``{}`` for the class name.
            cache_dir: the folder that holds the cache; `default_cache_dir` when None. It need not exist, nor be
                writable: without it the features are computed each time, and a note is logged.
            cache: False neither reads nor writes the cache.
            batch_size: the number of texts held at a time.
            progress: called with the number of labels done and their total, first with 0 before the first is encoded;
                not at all where the features come from the cache.

        Raises:
            UsageError: fewer than two labels, an empty one, or a template without ``{}``.
        """
        names, prompts = tuple(labels), check_templates(templates)
        if len(names) < 2:
            raise UsageError(
                f"A zero-shot head needs at least two labels, not {len(names)}: the probability of a single one is "
                "always 1."
            )
        if not all(name.strip() for name in names):
            raise UsageError("One of the labels is empty.")

        def compute() -> Tensor:
            return encode_labels(teacher, names, prompts, batch_size=batch_size, progress=progress)

        if cache:
            content = [teacher.identity, teacher.dim, prompts, names]
            features = kept_features(content, (len(names), teacher.dim), compute, cache_dir=cache_dir)
        else:
            features = compute()
        return cls(names, features.to(teacher.device), teacher.logit_scale, prompts)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logit_scale × cosine of each token (B, D), of any length, with each label: (B, C) float32."""
        tokens = functional.normalize(tokens.to(self.features.device, torch.float32), dim=-1)
        return self.logit_scale * (tokens @ self.features.T)

    def probabilities(self, tokens: Tensor) -> Tensor:
        """Return the softmax over the labels (B, C) for tokens (B, D)."""
        return self.logits(tokens).softmax(dim=-1)


def default_cache_dir() -> Path:
    """Return the folder named by the environment variable APM_CACHE, or the user's cache folder."""
    if folder := os.environ.get("APM_CACHE"):
        return Path(folder).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("apm"))


def kept_features(
    content: Sequence[object],
    shape: tuple[int, int],
    compute: Callable[[], Tensor],
    *,
    cache_dir: str | Path | None = None,
) -> Tensor:
    """Text features from the cache, or computed now and kept there.

    Args:
        content: all that they depend on, as JSON values: the file's name is a hash of it.
        shape: (C, D) of the features.
        compute: gives them, float32 on the CPU.
        cache_dir: as for `ZeroShotHead.build`.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, *content]).encode()).hexdigest()
    folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    path = folder / "text-features" / f"{digest}.safetensors"
    features = _read(path, shape)
    if features is None:
        features = compute()
        _write(path, features)
    return features


def encode_labels(
    teacher: Teacher,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Encode every label in every template and average, as `ZeroShotHead.build` does, with no cache.

    Returns:
        (C, D) float32 of unit length, on the CPU.
    """
    features = torch.empty(len(labels), teacher.dim)
    if progress:
        progress(0, len(labels))
    for start, stop in _spans(len(labels), max(1, batch_size // len(templates))):
        names = labels[start:stop]
        total = torch.zeros(len(names), teacher.dim, device=teacher.device)
        for first, last in _spans(len(templates), max(1, batch_size // len(names))):
            texts = [template.replace("{}", name) for name in names for template in templates[first:last]]
            rows = functional.normalize(teacher.encode_text(texts).float(), dim=-1)  # (names · templates, D)
            total += rows.unflatten(0, (len(names), last - first)).sum(dim=1)
        features[start:stop] = functional.normalize(total, dim=-1).cpu()
        if progress:
            progress(stop, len(labels))
    return features


def _spans(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)


def _checksum(path: Path, features: Tensor) -> str:
    """Hash the entry's name and numbers, so that a renamed entry is not trusted either."""
    return hashlib.sha256(path.name.encode() + features.contiguous().numpy().tobytes()).hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return the features kept at `path`, or None when there are none, or they are not what this user wrote."""
    try:
        with path.open("rb") as file:
            if not is_private(file):
                _tell_once(path.parent, "are of another user, or may be changed by one: computing them again")
                return None
            content = file.read()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        checksum = header["__metadata__"]["sha256"]
        features = load(content)["features"]
    except (FileNotFoundError, PermissionError, NotADirectoryError):  # told when it is to be written
        return None
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        _log.warning("The cached text features %s cannot be read (%s): computing them again.", path, error)
        return None
    if features.shape != shape or features.dtype != torch.float32 or checksum != _checksum(path, features):
        _log.warning("The cached text features %s are damaged: computing them again.", path)
        return None
    return features


def _write(path: Path, features: Tensor) -> None:
    """Put the features at `path` in one step: another process sees the whole entry or none."""
    try:
        content = save({"features": features}, metadata={"sha256": _checksum(path, features)})
        write_atomically(path, content, private=True)
    except WriteError as error:
        _tell_once(path.parent, f"are not kept for the next time: {error.reason}")


def _tell_once(folder: Path, what: str) -> None:
    """Log a warning about a cache folder, the first time only."""
    if folder not in _told:
        _told.add(folder)
        _log.warning("The text features in %s %s.", folder, what)
