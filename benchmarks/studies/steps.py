"""How many steps a student needs: `python -m apm.benchmarks.studies.steps folder --root DIR`.

Measures, on real images and without their labels, how near the student's token is to its target after each step and how
often student and teacher give the same answer. The default number of steps of `apm.AdaptConfig` is chosen from this.
Writes a JSON record; `--table RECORD…` prints the records as one markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apm.images.load import student_input
from apm.student.config import PRESETS, APMConfig
from apm.teachers import load_teacher
from apm.test_time.trainer import AdaptConfig, TestTimeTrainer
from apm.text.zeroshot import ZeroShotHead

from ..datasets import open_dataset
from ..runs.environment import describe, write_record

SHOWN = (1, 5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 100)
"""Steps that a table shows."""


def measure(
    dataset: str,
    root: Path | None,
    *,
    teacher_name: str = "embedded",
    preset: str = "paper",
    readout: str = "query",
    images: int = 100,
    steps: int = 100,
    precision: str = "auto",
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Any]:
    """Adapt a fresh student to each of `images` images for `steps` steps.

    Returns:
        The record: settings, machine, and for each step k = 0…steps the mean cosine of student and target, its least
        value, and the share of images on which student and teacher agree, with its standard error.
    """
    data = open_dataset(dataset, root, limit=images, seed=seed)
    teacher = load_teacher(teacher_name, device=device)
    head = ZeroShotHead.build(teacher, data.class_names, data.templates)
    config = APMConfig.preset(preset, dim=teacher.dim, readout=readout)  # type: ignore[arg-type]
    trainer = TestTimeTrainer(
        config,
        AdaptConfig(steps=steps, precision=precision, seed=seed),  # type: ignore[arg-type]
        device=device,
    )
    cosines: list[Tensor] = []
    agree: list[Tensor] = []
    seconds = 0.0
    for sample in data.samples:
        image = sample.load()
        target = teacher.encode_image(teacher.preprocess(image)[None])
        result = trainer.adapt(student_input(image, config.image_size)[None], target, record_tokens=True)
        seconds += result.seconds
        assert result.step_tokens is not None
        answers = head.logits(result.step_tokens[0]).argmax(-1)
        agree.append(answers == head.logits(target).argmax(-1))
        cosines.append(torch.cosine_similarity(result.step_tokens[0], target, dim=-1))
    cosine, same = torch.stack(cosines), torch.stack(agree).float()
    n = len(cosine)
    return {
        "command": "python -m apm.benchmarks.studies.steps " + " ".join(sys.argv[1:]).partition(" --out")[0],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "dataset": data.name,
        "layout": data.layout,
        "images": n,
        "classes": len(data.class_names),
        "templates": list(data.templates),
        "teacher": teacher.identity,
        "preset": preset,
        "readout": readout,
        "lr": trainer.config.lr,
        "seed": seed,
        "precision": trainer.precision,
        "seconds_per_step": seconds / n / steps,
        "environment": describe(device),
        "cosine_mean": cosine.mean(0).tolist(),
        "cosine_least": cosine.amin(0).tolist(),
        "agreement": same.mean(0).tolist(),
        "agreement_stderr": [math.sqrt(a * (1 - a) / n) for a in same.mean(0).tolist()],
    }


def table(records: list[dict[str, Any]]) -> str:
    """One markdown table: a row a step, for each record mean and least cosine, and agreement ± standard error."""
    lines = [
        "| steps | " + " | ".join(f"{r['preset']}: cosine (least) | {r['preset']}: agreement" for r in records) + " |",
        "|---:|" + "---:|---:|" * len(records),
    ]
    for k in SHOWN:
        if all(k < len(r["agreement"]) for r in records):
            cells = [
                f"{r['cosine_mean'][k]:.4f} ({r['cosine_least'][k]:.3f}) | "
                f"{100 * r['agreement'][k]:.1f} ± {100 * r['agreement_stderr'][k]:.1f} %"
                for r in records
            ]
            lines.append(f"| {k} | " + " | ".join(cells) + " |")
    described = "; ".join(
        f"{r['preset']}: {r['images']} images, {r['classes']} classes, {r['precision']}, seed {r['seed']}, "
        f"{1000 * r['seconds_per_step']:.0f} ms a step on {r['environment']['threads']} threads of "
        f"{r['environment']['processor']}"
        for r in records
    )
    return "\n".join([*lines, "", f"Teacher `{records[0]['teacher']}`; {described}."])


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m apm.benchmarks.studies.steps", description=__doc__)
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("--table", type=Path, nargs="+", help="print these records instead of measuring")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--readout", choices=("query", "mean"), default="query")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="where to write the record; standard output without it")
    options = parser.parse_args(arguments)
    if options.table:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in options.table]))
        return
    record = measure(
        options.dataset,
        options.root,
        teacher_name=options.teacher,
        preset=options.preset,
        readout=options.readout,
        images=options.images,
        steps=options.steps,
        precision=options.precision,
        seed=options.seed,
        device=options.device,
    )
    write_record(record, options.out)


if __name__ == "__main__":
    main()
