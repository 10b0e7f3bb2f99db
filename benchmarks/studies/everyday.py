"""Whether everyday words are recognised among others: `python -m apm.benchmarks.studies.everyday --root DIR`.

`DIR` has a folder of photographs for each of a few everyday words (dog, house, person). Each photograph is classified
among these words and imagenette's ten labels. It *falls* if the answer is one of the ten, to which an earlier embedded
teacher assigned nearly every sharp photograph.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from apm.labels import label_set
from apm.teachers import load_teacher
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from .study import USUAL, Options, Record, Study, each, markdown, run

TEMPLATE = "a photo of a {}."


def measure(options: Options) -> Record:
    """Answer zero-shot, and count."""
    data = open_dataset("folder", options.root)
    words, ten = list(data.class_names), list(label_set("imagenette"))
    teacher = load_teacher(options.teacher, device=options.device)
    head = ZeroShotHead.build(teacher, [*words, *ten], (TEMPLATE,))
    logits = each(
        data.samples,
        lambda sample: head.logits(teacher.encode_image(teacher.preprocess(sample.load())[None]))[0],
        "photographs",
    )
    answers = torch.stack(logits)
    labels = torch.tensor([sample.label for sample in data.samples])
    best, among = answers.argmax(-1), answers[:, : len(words)].argmax(-1)

    def counts(rows: torch.Tensor) -> dict[str, Any]:
        """Of these photographs: how many there are, fall, are correct among all labels, and among the words alone."""
        return {
            "photographs": int(rows.sum()),
            "fallen": int((best[rows] >= len(words)).sum()),
            "correct": int((best == labels)[rows].sum()),
            "correct_among_words": int((among == labels)[rows].sum()),
        }

    every = torch.ones_like(labels, dtype=torch.bool)
    return {
        "teacher": teacher.identity,
        "template": TEMPLATE,
        "words": words,
        "others": ten,
        "counts": {**{word: counts(labels == k) for k, word in enumerate(words)}, "all": counts(every)},
    }


def table(record: Record) -> str:
    """A row for each word, and one for all."""
    titles = ["photographs of", "n", "called one of imagenette's ten", "correct", "correct among the words alone"]
    rows = ((word, *found.values()) for word, found in record["counts"].items())
    return markdown(titles, rows)


STUDY = Study(
    name="everyday",
    question=__doc__,
    measure=measure,
    table=table,
    shared=USUAL,
    results="everyday.json",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
