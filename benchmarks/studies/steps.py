"""How many steps a student needs: `python -m apm.benchmarks.studies.steps folder --root DIR`.

Measures, on real images and without their labels, how close the student's token is to its target after each step, and
how often student and teacher give the same answer. The default number of steps of `apm.StudentOptions` was chosen from
this.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apm.teachers import load_teacher
from apm.test_time.inputs import student_inputs
from apm.test_time.options import StudentOptions
from apm.test_time.queries import ALL
from apm.test_time.trainer import TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from ..datasets.readers import Sample
from ..tables.stats import standard_error
from .study import ROOT, USUAL, Options, Record, Study, each, markdown, run

SHOWN = (1, 5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 100)
"""Steps that a table shows."""


def measure(options: Options) -> Record:
    """Adapt a new student to each image, for `options.steps` steps.

    Returns:
        Settings, and for each step k = 0…steps the mean cosine of student and target, its minimum, and the share of
        images on which student and teacher agree, with its standard error.
    """
    data = open_dataset(options.dataset, options.root, limit=options.limit, seed=options.seed)
    teacher = load_teacher(options.teacher, device=options.device)
    head = ZeroShotHead.build(teacher, data.class_names, data.templates)
    student = StudentOptions(
        preset=options.preset,
        readout=options.readout,
        steps=options.steps,
        precision=options.precision,
        seed=options.seed,
        queries=ALL,
    )
    trainer = TestTimeTrainer(
        student.model(teacher.dim), student.training(torch.device(options.device)), device=options.device
    )

    def watch(sample: Sample) -> tuple[Tensor, Tensor, float]:
        """Of the token after each step: its cosine to the target, whether it answers as the teacher; the seconds."""
        seen = student_inputs([sample.load()], teacher, trainer.model)
        target = seen.tokens
        result = trainer.adapt(seen.pixels, target, record_tokens=True)
        assert result.step_tokens is not None
        answers = head.logits(result.step_tokens[0]).argmax(-1)
        cosines = torch.cosine_similarity(result.step_tokens[0], target, dim=-1)
        return cosines, answers == head.logits(target).argmax(-1), result.seconds

    cosines, agree, seconds = zip(*each(data.samples, watch, "images"), strict=True)
    cosine, same = torch.stack(cosines), torch.stack(agree).float().mean(0)
    n = len(cosine)
    return {
        "dataset": data.name,
        "layout": data.layout,
        "images": n,
        "classes": len(data.class_names),
        "templates": list(data.templates),
        "teacher": teacher.identity,
        "preset": options.preset,
        "readout": options.readout,
        "lr": trainer.config.lr,
        "seed": options.seed,
        "precision": trainer.precision,
        "seconds_per_step": sum(seconds) / n / options.steps,
        "cosine_mean": cosine.mean(0).tolist(),
        "cosine_minimum": cosine.amin(0).tolist(),
        "agreement": same.tolist(),
        "agreement_stderr": [standard_error(share, n) for share in same.tolist()],
    }


def table(records: Sequence[Record]) -> str:
    """One markdown table: a row a step, for each record mean and minimum cosine, and agreement ± standard error."""

    def cells(k: int) -> Iterator[str]:
        for r in records:
            yield f"{r['cosine_mean'][k]:.4f} ({r['cosine_minimum'][k]:.3f})"
            yield f"{100 * r['agreement'][k]:.1f} ± {100 * r['agreement_stderr'][k]:.1f} %"

    titles = (f"{r['preset']}: {what}" for r in records for what in ("cosine (minimum)", "agreement"))
    shown = [k for k in SHOWN if all(k < len(r["agreement"]) for r in records)]
    described = "; ".join(
        f"{r['preset']}: teacher `{r['teacher']}`, {r['images']} images, {r['classes']} classes, {r['precision']}, "
        f"seed {r['seed']}, "
        f"{1000 * r['seconds_per_step']:.0f} ms a step on {r['environment']['threads']} threads of "
        f"{r['environment']['processor']}"
        for r in records
    )
    rows = markdown(["steps", *titles], ([k, *cells(k)] for k in shown), text=0)
    return f"{rows}\n\nPreset {described}."


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("--readout", choices=("query", "mean"), default="query")


STUDY = Study(
    name="steps",
    question=__doc__,
    measure=measure,
    table=table,
    side_by_side=True,
    arguments=_arguments,
    shared={**USUAL, "preset": "paper", "steps": 100, "precision": "auto", "limit": 100},
    results="steps-*.json",
    document=ROOT / "README.md",
    marker="steps",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
