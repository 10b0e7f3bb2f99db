"""What a `Classifier` answers: rankings of labels, and the record of the steps behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from apm.test_time.trainer import AdaptResult


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One label and its probability in [0, 1]."""

    label: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What the steps did to the student of one image.

    Attributes:
        losses: loss before each step.
        cosines: cosine between the student's token and its target before each step.
        steps: steps really made; fewer than asked for when a tolerance was reached.
        first_loss: loss of the untrained student.
        last_loss: loss after the last step.
        cosine: cosine after the last step.
        seconds: wall time of the adaptation, shared evenly among the images of a batch.
        precision: of the matrix products, "fp32" or "bf16".
    """

    losses: tuple[float, ...]
    cosines: tuple[float, ...]
    steps: int
    first_loss: float
    last_loss: float
    cosine: float
    seconds: float
    precision: str

    @classmethod
    def of(cls, result: AdaptResult, row: int) -> Adaptation:
        """The record of one image of a batch."""
        steps = int(result.steps[row])
        losses = tuple(result.losses[row, :steps].tolist())
        return cls(
            losses=losses,
            cosines=tuple(result.cosines[row, :steps].tolist()),
            steps=steps,
            first_loss=losses[0] if losses else float(result.final_losses[row]),
            last_loss=float(result.final_losses[row]),
            cosine=float(result.final_cosines[row]),
            seconds=result.seconds / len(result.tokens),
            precision=result.precision,
        )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said about one image.

    Attributes:
        path: the file, or None for an image given as pixels.
        top: the student's best labels, most probable first; empty when there is an error.
        teacher_top: the teacher's own.
        agree: whether both put the same label first; None when there is an error.
        unsure: whether the student's best label is less probable than the classifier's `min_probability`.
        adaptation: the record of the steps; None when none was made.
        notes: what was unusual about the file.
        error: why there is no answer, naming the file; None when there is one.
    """

    path: Path | None
    top: tuple[Prediction, ...] = ()
    teacher_top: tuple[Prediction, ...] = ()
    agree: bool | None = None
    unsure: bool = False
    adaptation: Adaptation | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Perception:
    """An answer, and all that it was read from.

    The field is asked at rows and columns of the student's grid, whose cell centres are at 0, 1, … and which covers the
    square that `apm.images.load.central_square` cuts, as the teacher's grid does.

    Attributes:
        answer: what `Classifier.__call__` says of the image.
        image: the whole image, upright, RGB.
        result: of this one image (B = 1), with its adapted field kept: ``features(rows, cols)``,
            ``attention(rows, cols)`` with the readout "query", and the snapshots asked for, ``fields``.
        token: the teacher's, (D,).
        grid: the teacher's own grid, (h', w', D); None where it has none.
    """

    answer: Answer
    image: Image.Image = field(repr=False)
    result: AdaptResult = field(repr=False)
    token: Tensor = field(repr=False)
    grid: Tensor | None = field(repr=False)
