"""Sentences about classes, written by a language model, and text features made of them and of prompts.

As in CuPL (Pratt et al., ICCV 2023) a JSON file holds several for each class, ``{"banded": ["A banded cloth …", …],
…}``; they are encoded as they are.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError, did_you_mean, few
from apm.labels import check_templates
from apm.teachers.base import Teacher

from .zeroshot import ZeroShotHead, kept_features

Combination = Literal["together", "apart"]
"""How sentences join prompts. Together: the mean of all texts of a class. Apart: that of both means."""
_SHAPE = '{"class name": ["a sentence", "another"], …}'


@dataclass(frozen=True, eq=False)
class Descriptors:
    """The sentences in a file."""

    name: str
    """The file's name."""
    digest: str
    """SHA-256 of its bytes, as hex."""
    sentences: Mapping[str, tuple[str, ...]]
    """By class name, as `_folded` writes it."""

    def of(self, labels: Sequence[str]) -> list[tuple[str, ...]]:
        """The sentences of each label. Underscores, blanks and capital letters make no difference.

        Raises:
            UsageError: some have none; they are named.
        """
        missing = [label for label in labels if _folded(label) not in self.sentences]
        if missing:
            named = few([f'"{label}"' for label in missing], 10)
            raise UsageError(
                f"{self.name} describes {len(self.sentences)} classes, but not {len(missing)} of the {len(labels)} "
                f"asked for: {named}.{did_you_mean(_folded(missing[0]), self.sentences)} Rename them in the file, or "
                "add them."
            )
        return [self.sentences[_folded(label)] for label in labels]


def read_descriptors(path: str | Path) -> Descriptors:
    """Read a file of descriptors.

    Raises:
        UsageError: it cannot be read, is not JSON, or does not hold a list of sentences for each class name.
    """
    path = Path(path).expanduser()
    try:
        content = path.read_bytes()
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=lambda pairs: pairs)
    except (OSError, RecursionError) as error:
        raise UsageError(
            f'The descriptors "{path}" cannot be read: {getattr(error, "strerror", None) or error}.'
        ) from None
    except ValueError as error:
        raise UsageError(f'The descriptors "{path}" are not JSON ({error}). The form is {_SHAPE}.') from None
    try:
        return Descriptors(path.name, hashlib.sha256(content).hexdigest(), _checked(found))
    except ValueError as error:
        raise UsageError(f'The descriptors "{path}": {error}. The form is {_SHAPE}.') from None


def described_head(
    teacher: Teacher,
    labels: Sequence[str],
    templates: Sequence[str],
    descriptors: Descriptors,
    combination: Combination,
    *,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> ZeroShotHead:
    """Make a zero-shot head of prompts and descriptors; its features are kept on disk, as `ZeroShotHead.build` does.

    Args:
        teacher: whose text tower and logit scale are used.
        labels: C class names.
        templates: prompts with ``{}`` for the class name.
        descriptors: with sentences for all of them.
        combination: how both are joined.
        batch_size: texts that are encoded at a time.
        progress: called with the number of labels done and their total.

    Raises:
        UsageError: a label has no descriptors, or a template no ``{}``.
    """
    prompts, sentences = check_templates(templates), descriptors.of(labels)

    def compute() -> Tensor:
        written = [[prompt.replace("{}", label) for prompt in prompts] for label in labels]
        texts = [[*own, *others] for own, others in zip(written, sentences, strict=True)]
        half = 0.5 / len(prompts)
        if combination == "together":
            weights = [[1 / len(one)] * len(one) for one in texts]
        else:
            weights = [[half] * len(prompts) + [0.5 / len(others)] * len(others) for others in sentences]
        return _weighted(teacher, texts, weights, batch_size, progress)

    content = [teacher.identity, teacher.dim, prompts, list(labels), combination, sentences]
    features = kept_features(content, (len(labels), teacher.dim), compute)
    return ZeroShotHead(tuple(labels), features.to(teacher.device), teacher.logit_scale, prompts)


def _weighted(
    teacher: Teacher,
    texts: Sequence[Sequence[str]],
    weights: Sequence[Sequence[float]],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """The weighted sum of each class's texts, of unit length each and again at the end: (C, D) float32 on the CPU."""
    flat = [
        (owner, text, weight)
        for owner, (own, shares) in enumerate(zip(texts, weights, strict=True))
        for text, weight in zip(own, shares, strict=True)
    ]
    total = torch.zeros(len(texts), teacher.dim)
    for start in range(0, len(flat), batch_size):
        owners, written, shares = zip(*flat[start : start + batch_size], strict=True)
        if progress:
            progress(owners[0], len(texts))
        rows = normalize(teacher.encode_text(list(written)).float(), dim=-1).cpu()
        total.index_add_(0, torch.tensor(owners), rows * torch.tensor(shares).unsqueeze(1))
    if progress:
        progress(len(texts), len(texts))
    return normalize(total, dim=-1)


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").casefold().split())


def _checked(found: Any) -> dict[str, tuple[str, ...]]:
    """By class name its sentences; a ValueError says what is wrong. Objects are lists of pairs here."""
    if not isinstance(found, list) or not all(isinstance(pair, tuple) for pair in found):
        raise ValueError("the file holds no object of class names")
    if not found:
        raise ValueError("the file names no class")
    checked: dict[str, tuple[str, ...]] = {}
    for name, sentences in found:
        shown = json.dumps(name, ensure_ascii=False)
        if _folded(name) in checked:
            raise ValueError(f"the class {shown} is there twice")
        if not isinstance(sentences, list) or any(isinstance(one, tuple) for one in sentences):
            raise ValueError(f"the class {shown} has no list of sentences")
        if not sentences:
            raise ValueError(f"the class {shown} has an empty list")
        for one in sentences:
            if not isinstance(one, str) or not one.strip():
                raise ValueError(f"the class {shown} has {json.dumps(one)} among its sentences, which is no sentence")
        if any(unicodedata.category(character) == "Cs" for one in (name, *sentences) for character in one):
            raise ValueError(f"the class {json.dumps(name)} has characters that are no text")
        checked[_folded(name)] = tuple(sentences)
    return checked
