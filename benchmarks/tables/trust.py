"""What can be trusted of a comparison: every method on the same images, with intervals, tests, calibration and cost.

The rule of the ranks. Every two methods are compared by a paired test on the same images (`stats.paired_test`, exact;
McNemar's where each image is there once), all pairs corrected together by Holm's method. One is *shown to be better*
where it is right more often and the corrected p is below 0.05. A method's rank is 1 where none is shown to be better
than it, else 1 + the largest rank of those that are. It follows, whatever the data:

* of two methods on one rank, neither is shown to be better than the other;
* a method that is shown to be better than another has the smaller rank;
* for a method of rank r > 1 there is one of rank r - 1 that is shown to be better than it.

The relation has no cycles, since the better of a pair has more right answers. A rank does not say that each method of
rank 1 is shown to be better than each of rank 2: a noisy method may rank above a more accurate one, if only the latter
is shown to be beaten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apm.errors import UsageError

from ..runs.rows import joined
from .notes import conditions
from .stats import auroc, changes_by_image, expected_calibration_error, holm, interval, paired_test
from .table import MARKS, Answers, Table, TableRow, row_names

SIGNIFICANT = 0.05
"""Of p-values that were corrected for the number of tests."""
TOGETHER = "all cells"


@dataclass(frozen=True, kw_only=True)
class TrustRow:
    """One method on the images of one cell, or of several together. None: not known, or not defined here."""

    rank: int
    method: str
    accuracy: float
    """Percent; an image that this method alone has no answer for counts as wrong."""
    low: float
    high: float
    """The ends of its 95 % interval, percent."""
    gain: float
    """Points over zero-shot: the teacher's own answers with the run's prompts, on the same images."""
    p: float | None
    """Of the gain, corrected for the number of methods by Holm's method; None for zero-shot itself."""
    right_to_wrong: int
    wrong_to_right: int
    ece: float | None
    nll: float | None
    auroc: float | None
    ms_given_features: float | None
    """Milliseconds an image, without what methods share: the teacher's tokens, grids and views."""
    ms: float | None
    """Milliseconds an image with all that the method uses, as if it ran alone, but for reading the file. Not known of
    runs that read features from a store."""
    peak_memory: int | None
    """Bytes, of the process that ran it, with all methods of its run."""
    episodic: bool | None
    """Whether an image's answer depends on no other image; if not, the order of the images is part of the result."""
    gradients: bool | None
    failed: int
    """Images that other methods answer and this one does not."""
    marks: tuple[str, ...] = ()
    """Names in `MARKS`."""


@dataclass(frozen=True)
class TrustTable:
    """All methods on the images of one cell, or of several together."""

    title: str
    cells: tuple[str, ...]
    """Columns of the table that this is made from."""
    n: int
    """Answers of each method."""
    images: int
    """Different images among them: one photograph under many corruptions is one."""
    rows: tuple[TrustRow, ...]
    """By rank, then by accuracy."""
    notes: tuple[str, ...]

    @property
    def pooled(self) -> bool:
        """Whether it is of several cells together."""
        return len(self.cells) > 1


def make_trust(
    tables: Sequence[Table], *, cells: bool = True, on_refused: Callable[[str], None] | None = None
) -> list[TrustTable]:
    """Make of each table of accuracies what can be trusted of it.

    Args:
        tables: as `make_tables` makes them; published and ORACLE rows are left out.
        cells: whether to give each cell of a table beside all of them together.
        on_refused: called with why a table cannot be made, in place of an error; the others are made.

    Returns:
        For each table the averaged cells together, where there are several, then each cell.

    Raises:
        UsageError: the methods of a cell were not run on the same images.
    """
    made: list[TrustTable] = []

    def make(*about: Any) -> None:
        try:
            if (one := _table(*about)) is not None:
                made.append(one)
        except UsageError as error:
            if on_refused is None:
                raise
            on_refused(str(error))

    for table, names in zip(tables, row_names(tables), strict=True):
        rows = [(name, row) for name, row in zip(names, table.rows, strict=True) if row.answers]
        columns = [column for column in table.columns if any(column in row.answers for _, row in rows)]
        pool = [column for column in table.averaged if column in columns]
        whole = {name: row for name, row in rows if all(column in row.answers for column in pool)}
        partly = [name for name, row in rows if name not in whole and any(column in row.answers for column in pool)]
        if len(pool) > 1 and whole:
            note = f"Not on all {len(pool)} cells, and left out: {', '.join(partly)}." if partly else None
            make(f"{table.title}, {TOGETHER}", pool, whole, note)
            alone = [column for column in columns if cells or column not in pool]
        else:
            alone = columns
        for column in alone:
            mine = {name: row for name, row in rows if column in row.answers}
            make(_title(next(iter(mine.values())).answers[column].cell), [column], mine, None)
    return made


def _title(cell: Mapping[str, Any]) -> str:
    return f"{cell['title']}, {cell['corruption']} at level {cell['level']}" if cell["corruption"] else cell["title"]


def ranks(correct: Sequence[NDArray[np.bool_]], image: NDArray[np.integer]) -> list[int]:
    """Rank methods by what the data show, see the module's docstring.

    Args:
        correct: for each method, (n,) whether each answer is; the same images in the same order.
        image: (n,) number of the image that each answer is of, from 0.

    Returns:
        Their ranks from 1, in their order.
    """
    pairs = list(combinations(range(len(correct)), 2))
    changes = [changes_by_image(correct[a], correct[b], image) for a, b in pairs]
    corrected = holm([paired_test(change) for change in changes])
    beaten_by: dict[int, list[int]] = {place: [] for place in range(len(correct))}
    for (a, b), change, p in zip(pairs, changes, corrected, strict=True):
        if p < SIGNIFICANT:
            better, worse = (b, a) if change.sum() > 0 else (a, b)
            beaten_by[worse].append(better)
    found: dict[int, int] = {}
    for place in sorted(beaten_by, key=lambda place: -int(correct[place].sum())):  # the better of a pair comes first
        found[place] = 1 + max((found[better] for better in beaten_by[place]), default=0)
    return [found[place] for place in range(len(correct))]


@dataclass(frozen=True, kw_only=True)
class _Aligned:
    """One method's answers, in the order of images that all methods of a table share."""

    row: TableRow
    answered: NDArray[np.bool_]
    correct: NDArray[np.bool_]
    zero_shot: NDArray[np.bool_]
    """Whether the teacher's own answer is correct."""
    probability: NDArray[np.float64]
    nll: NDArray[np.float64]
    seconds: NDArray[np.float64]
    shared_seconds: NDArray[np.float64]


def _table(title: str, columns: Sequence[str], named: Mapping[str, TableRow], note: str | None) -> TrustTable | None:
    """Compare rows on the images of some columns; None where no method has an answer."""
    names, rows = list(named), list(named.values())
    parts = [_aligned(column, rows) for column in columns]
    image = _images(columns, rows)
    methods = [_joined([part[place] for part in parts]) for place in range(len(rows))]
    anybody = np.logical_or.reduce([one.answered for one in methods])
    if not anybody.any():
        return None
    methods = [_only(one, anybody) for one in methods]
    image = np.unique(image[anybody], return_inverse=True)[1]
    rank = ranks([one.correct for one in methods], image)
    tested = [place for place, one in enumerate(methods) if not _is_zero_shot(one.row)]
    changes = (changes_by_image(methods[place].zero_shot, methods[place].correct, image) for place in tested)
    p = dict(zip(tested, holm([paired_test(change) for change in changes]), strict=True))
    made = [
        _trust_row(names[place], one, columns, image, rank[place], p.get(place)) for place, one in enumerate(methods)
    ]
    made.sort(key=lambda row: (row.rank, -row.accuracy, row.method))
    different = int(image.max()) + 1
    notes = [note] if note else []
    notes += _notes(made, len(image), different, int((~anybody).sum()), len(tested))
    runs = [row.answers[column].run for row in rows for column in columns]
    notes += conditions(runs, stream=any(row.settings.get("stream") for row in rows))
    return TrustTable(title, tuple(columns), len(image), different, tuple(made), tuple(notes))


def _trust_row(
    name: str,
    one: _Aligned,
    columns: Sequence[str],
    image: NDArray[np.integer],
    rank: int,
    p: float | None,
) -> TrustRow:
    low, high = interval(one.correct, image)
    kept, n = one.answered, int(one.answered.sum())
    own, shared = float(one.seconds[kept].sum()), float(one.shared_seconds[kept].sum())
    sure, correct = one.probability[kept], one.correct[kept]
    from_store = any("features" in session for column in columns for session in _sessions(one.row.answers[column]))
    told_else = ("failed", "near chance") if len(columns) > 1 else ("failed",)  # chance is a cell's own
    marks = [mark for column in columns for mark in one.row.cells[column].marks if mark not in told_else]
    marks += ["training data"] * (one.row.uses_training_data == "yes")
    return TrustRow(
        rank=rank,
        method=name,
        accuracy=100 * float(one.correct.mean()),
        low=100 * low,
        high=100 * high,
        gain=100 * float(one.correct.mean() - one.zero_shot.mean()),
        p=p,
        right_to_wrong=int((one.zero_shot & ~one.correct).sum()),
        wrong_to_right=int((~one.zero_shot & one.correct).sum()),
        ece=expected_calibration_error(sure, correct) if n else None,
        nll=float(one.nll[kept].mean()) if n else None,
        auroc=auroc(sure, correct) if n else None,
        ms_given_features=1000 * own / n if n and own > 0 else None,
        ms=1000 * (own + shared) / n if n and own + shared > 0 and not from_store else None,
        peak_memory=_peak_memory(one.row.answers[column] for column in columns),
        episodic=None if (stream := one.row.settings.get("stream")) is None else not stream,
        gradients=_needs_gradients(one.row),
        failed=int((~kept).sum()),
        marks=tuple(dict.fromkeys(marks)),
    )


def _aligned(column: str, rows: Sequence[TableRow]) -> list[_Aligned]:
    """Bring the answers of all rows to one column into one order.

    Raises:
        UsageError: they are not of the same images, or of other labels.
    """
    first = rows[0].answers[column].rows
    order = {name: place for place, name in enumerate(first.id)}
    _check_same_images(column, rows)
    teachers = _teacher_predictions(column, rows, order)
    found = []
    for row in rows:
        answers = row.answers[column]
        mine = answers.rows
        at = np.argsort([order[name] for name in mine.id])
        answered = np.array([error is None for error in mine.error[at]], dtype=bool)
        label = mine.label[at]
        found.append(
            _Aligned(
                row=row,
                answered=answered,
                correct=answered & (mine.prediction[at] == label),
                zero_shot=teachers[_teacher_key(answers)] == label,
                probability=mine.probability[at],
                nll=mine.nll[at],
                seconds=mine.seconds[at],
                shared_seconds=mine.shared_seconds[at],
            )
        )
    return found


def _check_same_images(column: str, rows: Sequence[TableRow]) -> None:
    first = rows[0].answers[column]
    for row in rows:
        answers = row.answers[column]
        if (have := len(answers.rows)) < (wanted := answers.cell["images"]):
            raise UsageError(
                f"{column}: {row.method} has {have:,} of {wanted:,} images in {answers.run.path}. Finish the run by "
                "running its command again."
            )
        theirs, ours = (dict(zip(one.rows.id, one.rows.label, strict=True)) for one in (first, answers))
        if theirs != ours:
            common = len(theirs.keys() & ours.keys())
            raise UsageError(
                f"{column}: the rows are not of the same images. {rows[0].method} in {first.run.path} has "
                f"{len(theirs):,}, {row.method} in {answers.run.path} has {len(ours):,}; {common:,} are in both"
                f"{', with other labels' if common == len(ours) == len(theirs) else ''}. Methods are compared only on "
                "the same images: give runs of the same images (the same --limit and --seed)."
            )


def _teacher_key(answers: Answers) -> tuple[str, str]:
    """What the teacher's own answers depend on."""
    return answers.run.run["teacher"]["identity"], answers.cell["prompt_set"]


def _teacher_predictions(
    column: str, rows: Sequence[TableRow], order: Mapping[str, int]
) -> dict[tuple[str, str], NDArray[np.int64]]:
    """By teacher and prompts, its own answers; -1 where no method of these has one recorded."""
    found: dict[tuple[str, str], NDArray[np.int64]] = {}
    for row in rows:
        answers = row.answers[column]
        at = np.argsort([order[name] for name in answers.rows.id])
        mine = answers.rows.teacher_prediction[at]
        known = found.setdefault(_teacher_key(answers), mine)
        found[_teacher_key(answers)] = np.where(known < 0, mine, known)
    return found


def _images(columns: Sequence[str], rows: Sequence[TableRow]) -> NDArray[np.integer]:
    """The number of the image that each answer is of: the same for one photograph under several corruptions."""
    numbers: dict[tuple[str, str], int] = {}
    answers = [rows[0].answers[column] for column in columns]
    keys = ((one.cell["title"], name) for one in answers for name in one.rows.id)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


_ARRAYS = ("answered", "correct", "zero_shot", "probability", "nll", "seconds", "shared_seconds")


def _joined(parts: Sequence[_Aligned]) -> _Aligned:
    arrays: dict[str, Any] = {name: joined(parts, name) for name in _ARRAYS}
    return replace(parts[0], **arrays)


def _only(one: _Aligned, kept: NDArray[np.bool_]) -> _Aligned:
    arrays: dict[str, Any] = {name: getattr(one, name)[kept] for name in _ARRAYS}
    return replace(one, **arrays)


def _registered(row: TableRow) -> str:
    """A method's name in the registry: what stands before its settings, or before what it differs in from others."""
    return row.method.partition("[")[0].partition(" ")[0]


def _is_zero_shot(row: TableRow) -> bool:
    return _registered(row) == "zero-shot"


def _needs_gradients(row: TableRow) -> bool | None:
    """What the method's class declares, None where there is none of this name (any more)."""
    from ..methods import REGISTRY

    return getattr(REGISTRY.get(_registered(row)), "gradients", None)


def _peak_memory(parts: Iterable[Answers]) -> int | None:
    """The most memory that the sessions of the runs took; None unless all of them say."""
    peaks = [session.get("peak_memory") for one in parts for session in _sessions(one)]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known and len(known) == len(peaks) else None


def _sessions(answers: Answers) -> list[dict[str, Any]]:
    return list(answers.run.run["sessions"])


def _notes(rows: Sequence[TrustRow], n: int, images: int, unanswered: int, tests: int) -> Iterator[str]:
    used = {mark for row in rows for mark in row.marks}
    yield from (f"{sign} {text}" for mark, (sign, text) in MARKS.items() if mark in used)
    counted = f"n = {n:,} answers of each method" + (f" to {images:,} images" if images < n else "")
    yield f"{counted}; {unanswered:,} that no method could answer are excluded." if unanswered else f"{counted}."
    if failed := [f"{row.method} {row.failed:,}" for row in rows if row.failed]:
        yield f"Images without an answer, which count as wrong: {', '.join(failed)}."
    test = "McNemar's exact test" if images == n else "the exact sign-flip test"
    yield (
        f"p: {test} on the flips against zero-shot, corrected by Holm's method for {tests} method{'s' * (tests != 1)}."
        + (" All cells of an image flip together, because they are not independent." if images < n else "")
    )
    yield (
        "rank: of two methods with the same rank, neither is shown to be better by the same test on all pairs, "
        f"corrected by Holm's method (p < {SIGNIFICANT}); each method of a later rank is shown to be worse than one of "
        "the rank before."
    )
