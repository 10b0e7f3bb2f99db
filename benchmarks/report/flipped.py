"""The images on which a method and its teacher differ in being right, cell by cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from apm.images.paths import printable

from ..tables.table import Answers
from .drawing import mark_class, shape
from .pictures import Pictures
from .series import Part


@dataclass(frozen=True)
class Change:
    """What one method answers where its teacher's answer is right and its own is wrong, or the reverse."""

    method: str
    series: int
    answer: str
    gained: bool
    """Whether the method is right."""

    @property
    def path(self) -> str:
        """The method's mark, in a box of 16 by 16."""
        return shape(8, 8, self.series, 5)

    @property
    def classes(self) -> str:
        """Classes of the mark in the style sheet."""
        return mark_class(self.series)


@dataclass(frozen=True)
class FlippedImage:
    """An image that some method flips."""

    id: str
    label: str
    teacher: str
    changes: tuple[Change, ...]
    picture: str | None = None
    """Data URI of a small picture."""


@dataclass(frozen=True)
class FlippedCell:
    """All flips of a cell."""

    heading: str
    n: int
    """Images answered by any method."""
    flipped: int
    shown: tuple[FlippedImage, ...]
    without_picture: str = ""
    """Why there are none, for people."""


@dataclass
class _Found:
    heading: str
    example: Answers
    position: int
    id: str
    label: int
    teacher: int
    changes: list[Change] = field(default_factory=list)


def flipped_images(parts: Sequence[Part], *, limit: int, pictures: Pictures) -> list[FlippedCell]:
    """List the flipped images of each cell.

    Args:
        parts: the tables' rows.
        limit: images shown for each cell, the first in the order of the run (which is a seeded shuffle); the others
            are counted.
        pictures: finds the pictures.
    """
    cells: dict[tuple[object, ...], tuple[str, Answers, dict[str, _Found], set[str]]] = {}
    for heading, name, series, answers in _answers(parts):
        cell, run = answers.cell, answers.run.run
        key = (heading, *(cell[part] for part in ("source", "label_set", "prompt_set")), run["teacher"]["identity"])
        _, _, images, answered = cells.setdefault(key, (heading, answers, {}, set()))
        answered.update(answers.rows.id[answers.rows.error == None])  # noqa: E711 - elementwise, on objects
        rows, classes = answers.rows, run["label_sets"][cell["label_set"]]
        correct, teacher_correct = rows.prediction == rows.label, rows.teacher_prediction == rows.label
        for place in (correct != teacher_correct).nonzero()[0].tolist():
            if rows.error[place] is not None:
                continue
            identity = str(rows.id[place])
            found = images.setdefault(
                identity,
                _Found(heading, answers, place, identity, int(rows.label[place]), int(rows.teacher_prediction[place])),
            )
            change = Change(name, series, _class(classes, int(rows.prediction[place])), bool(correct[place]))
            if change not in found.changes:
                found.changes.append(change)
    result = []
    for heading, example, images, answered in cells.values():
        if not images:
            continue
        first = sorted(images.values(), key=lambda found: (found.position, found.id))[:limit]
        shown = [_shown(found, pictures) for found in first]
        missing = pictures.reason(example) if any(one.picture is None for one in shown) else ""
        result.append(FlippedCell(heading, len(answered), len(images), tuple(shown), missing))
    return result


def _answers(parts: Sequence[Part]) -> Iterator[tuple[str, str, int, Answers]]:
    seen: set[tuple[str, str, str]] = set()
    for part in parts:
        for named in part.rows:
            for _, _, answers in named.cells():
                cell = answers.cell
                heading = (
                    cell["title"]
                    if cell["corruption"] is None
                    else f"{cell['title']}, {cell['corruption']}, level {cell['level']}"
                )
                key = (heading, named.name, str(answers.run.path))
                if key not in seen:  # the clean column stands in the table of every level
                    seen.add(key)
                    yield printable(heading), named.name, named.series, answers


def _shown(found: _Found, pictures: Pictures) -> FlippedImage:
    classes = found.example.run.run["label_sets"][found.example.cell["label_set"]]
    image = FlippedImage(
        printable(found.id), _class(classes, found.label), _class(classes, found.teacher), tuple(found.changes)
    )
    return replace(image, picture=pictures.find(found.example, found.id))


def _class(names: Sequence[str], index: int) -> str:
    return printable(names[index]) if 0 <= index < len(names) else f"class {index}"
