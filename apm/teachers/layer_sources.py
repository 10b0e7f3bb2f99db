"""The names ``mvit:3,4``, ``vit:NAME:LAYER@FILE``, ``teacher:LAYER@random``; see `apm.teachers.layers`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from apm.errors import UsageError, unknown

KINDS = {"mvit": "mvit:LAYER", "vit": "vit:NAME:LAYER", "teacher": "teacher:LAYER"}
VIDEO = "mvit_v2_s"
FRAMES = (8, 16)
"""How often an image may be repeated into a video: as in the talk, and as the published weights saw videos."""


@dataclass(frozen=True, kw_only=True)
class SourceName:
    """A source, taken apart."""

    text: str
    """The name as it was given."""
    kind: str
    """One of `KINDS`."""
    model: str
    """The model's name, for ``vit``."""
    layers: tuple[str, ...]
    weights: str | None
    """A file, or None: the published ones."""
    seed: int | None
    """Seed of random weights; None: they are not random."""


def parse_source(text: str) -> SourceName:
    """Take a source's name apart; nothing is imported or looked up.

    Raises:
        UsageError: it is none.
    """
    what, at, weights = text.partition("@")
    kind, _, rest = what.partition(":")
    if kind not in KINDS:
        raise unknown("source", kind, KINDS)
    model, _, listed = rest.rpartition(":") if kind == "vit" else ("", "", rest)
    layers = tuple(dict.fromkeys(listed.split(",")))
    if "" in layers or (kind == "vit" and not model) or (at and not weights):
        raise UsageError(
            f'The source "{text}" is incomplete: write {KINDS[kind]}, several layers as 3,4, optionally followed by'
            " @FILE, @random or @random:SEED."
        )
    random = re.fullmatch(r"random(?::(\d{1,9}))?", weights)
    return SourceName(
        text=text,
        kind=kind,
        model=model,
        layers=layers,
        weights=weights if at and not random else None,
        seed=int(random[1] or 0) if random else None,
    )
