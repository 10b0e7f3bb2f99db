"""Answers and cost of GLOM as a student in test-time training, compared with APM.

``python -m apm.benchmarks.studies.glom_student --root FOLDER --record FILE`` adapts both to the same images (class
folders), with the same number of steps, to the teacher's token and to token and grid, as `apm bench` does. Labels are
used only for scoring. The cost is given in operations, as torch counts them in one step of one image, which do not
depend on the machine.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np

from apm.teachers import load_teacher
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from ..datasets.readers import Sample
from ..methods import Batch, MethodOptions, create_methods
from ..tables.stats import mcnemar, standard_error
from .operations import measured_flops
from .study import ROOT, USUAL, Options, Record, Study, each, markdown, plus_minus, run

SPECS = ("apm", "glom-ttt", "apm:distil=both", "glom-ttt:distil=both", "glom-ttt:settling=1")
"""Methods; in the last one nothing of the image reaches the highest level, from which the token is read."""


def operations(spec: str, options: MethodOptions, batch: Batch) -> int:
    """Operations of one step of one image: those of two steps less those of one."""
    counts = []
    for steps in (1, 2):
        (method,) = create_methods([f"{spec}{',' if ':' in spec else ':'}steps={steps}"], options)
        method.predict(batch)  # what is made once is made now
        counts.append(measured_flops(partial(method.predict, batch)))
    return counts[1] - counts[0]


def measure(options: Options) -> Record:
    """Answer every image by every method, and count."""
    data = open_dataset("folder", options.root, limit=options.limit, seed=options.seed)
    teacher = load_teacher(options.teacher, device=options.device)
    head = ZeroShotHead.build(teacher, data.class_names, data.templates)
    student = StudentOptions(preset=options.preset, steps=options.steps, precision="fp32", queries=ALL)
    given = MethodOptions(student=student, seed=options.seed, device=options.device)
    methods = dict(zip(SPECS, create_methods(SPECS, given), strict=True))

    def batch_of(sample: Sample) -> Batch:
        return Batch([sample.id], [sample.load()], teacher, head, seed=options.seed)

    def one(sample: Sample) -> dict[str, tuple[int, float]]:
        """By method: which class it answers, and the cosine of its token to the teacher's."""
        batch = batch_of(sample)
        found: dict[str, tuple[int, float]] = {"teacher": (int(head.logits(batch.tokens()).argmax()), 1.0)}
        for spec, method in methods.items():
            answer = method.predict(batch)
            found[spec] = int(answer.logits.argmax()), float(answer.extras["cosine"][0])
        return found

    found = each(data.samples, one, "images", minimum=2)
    truth = np.array([sample.label for sample in data.samples[: len(found)]])
    answers = {name: np.array([row[name][0] for row in found]) for name in ("teacher", *SPECS)}
    first = batch_of(data.samples[0])
    return {
        "dataset": data.name,
        "classes": len(data.class_names),
        "images": len(found),
        "teacher": teacher.identity,
        "preset": options.preset,
        "steps": options.steps,
        "seed": options.seed,
        "settings": {spec: dict(method.settings) for spec, method in methods.items()},
        "teacher_accuracy": float((answers["teacher"] == truth).mean()),
        "methods": {
            spec: {
                **_compared(answers[spec], answers["teacher"], truth),
                "cosine": float(np.mean([row[spec][1] for row in found])),
                "cosine_minimum": float(min(row[spec][1] for row in found)),
                "operations": operations(spec, given, first),
            }
            for spec in SPECS
        },
    }


def _compared(mine: np.ndarray[Any, Any], teacher: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> dict[str, Any]:
    correct, before = mine == truth, teacher == truth
    lost, won = int((before & ~correct).sum()), int((~before & correct).sum())
    return {
        "accuracy": float(correct.mean()),
        "agreement": float((mine == teacher).mean()),
        "right_to_wrong": lost,
        "wrong_to_right": won,
        "p": mcnemar(lost, won),
    }


def table(record: Record) -> str:
    """A row a method."""
    n = record["images"]
    rows = [
        (
            f"`{spec}`",
            f"{plus_minus((100 * row['accuracy'], 100 * standard_error(row['accuracy'], n)), 1)} %",
            f"{100 * row['agreement']:.1f} %",
            f"{row['right_to_wrong']} / {row['wrong_to_right']}",
            f"{row['p']:.2g}",
            f"{row['cosine']:.4f} ({row['cosine_minimum']:.3f})",
            f"{row['operations'] / 1e9:.2f}",
        )
        for spec, row in record["methods"].items()
    ]
    titles = (
        *(
            "method",
            "top-1",
            "agreement with the teacher",
            "right→wrong / wrong→right",
            "p",
            "cosine to its token (minimum)",
        ),
        "10⁹ operations per step",
    )
    return (
        f"{markdown(titles, rows)}\n\n"
        f"{n} images, {record['classes']} classes; the teacher `{record['teacher']}` scores "
        f"{100 * record['teacher_accuracy']:.1f} %. {record['steps']} steps, float32, {record['preset']} preset of "
        f"APM, seed {record['seed']}; ± binomial standard error, p by McNemar's test. {record['date']}, "
        f"{record['environment']['processor']}. `{record['command']}`"
    )


STUDY = Study(
    name="glom_student",
    question=__doc__,
    measure=measure,
    table=table,
    shared={**USUAL, "preset": "small", "steps": StudentOptions.steps, "limit": 200},
    results="glom-student.json",
    document=ROOT / "docs" / "glom.md",
    marker="student",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
