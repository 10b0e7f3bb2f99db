"""Logits against labels: the rows of a batch, and the running accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..methods.base import Prediction
from .decoding import Readable
from .rows import ROW_SCHEMA, Row

NOT_FINITE = "the numbers are not finite"


def score(
    method: str,
    prediction: Prediction,
    items: Sequence[Readable],
    teacher: Sequence[int],
    seconds: float,
    shared_seconds: float | None,
    record_logits: bool = False,
) -> list[Row]:
    """Compare one method's logits with the labels: a row for each image."""
    logits = prediction.logits.detach().cpu().double()  # (B, C)
    answered = torch.isfinite(logits).all(1).tolist()
    log_probabilities = logits.log_softmax(1)
    labels = torch.tensor([item.sample.label for item in items]).unsqueeze(1)  # (B, 1)
    chosen = logits.argmax(1, keepdim=True)
    of_label = logits.gather(1, labels)
    # Among equal logits the prediction is the first class; the rank follows the same rule.
    earlier = torch.arange(logits.shape[1]) < labels
    ranks = 1 + ((logits > of_label) | ((logits == of_label) & earlier)).sum(1)
    nll = -log_probabilities.gather(1, labels)
    probability = log_probabilities.gather(1, chosen).exp()
    steps = prediction.step_logits
    trails = None if steps is None else steps.detach().cpu().nan_to_num(nan=-torch.inf).argmax(2).tolist()
    figures = {name: values.tolist() for name, values in prediction.extras.items()}
    own = figures.keys() & set(ROW_SCHEMA.names)  # those that have a column of their own
    rows = []
    for index, item in enumerate(items):
        place: dict[str, Any] = {
            "id": item.sample.id,
            "position": item.position,
            "label": item.sample.label,
            "method": method,
        }
        if not answered[index]:
            rows.append(Row(**place, error=NOT_FINITE))
            continue
        rows.append(
            Row(
                **place,
                prediction=int(chosen[index]),
                probability=float(probability[index]),
                nll=float(nll[index]),
                rank=int(ranks[index]),
                teacher_prediction=teacher[index],
                seconds=seconds,
                shared_seconds=shared_seconds,
                step_predictions=None if trails is None else tuple(trails[index]),
                logits=tuple(logits[index].tolist()) if record_logits else None,
                extras=tuple((name, figures[name][index]) for name in figures if name not in own) or None,
                **{name: figures[name][index] for name in own},
            )
        )
    return rows


class Tally:
    """Running accuracy of each method."""

    def __init__(self) -> None:
        self.correct: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()

    def add(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if row.error is None:
                self.answered[row.method] += 1
                self.correct[row.method] += row.rank == 1

    def accuracy(self) -> dict[str, float]:
        return {method: self.correct[method] / n for method, n in self.answered.items()}
