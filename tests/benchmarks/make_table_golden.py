"""Make the records and the expected tables of `test_tables`: ``python -m tests.benchmarks.make_table_golden``.

The records are drawn from a fixed generator, not measured. Run this when the schema or the layout changes on purpose,
and read the difference in the expected texts line by line.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from apm.benchmarks.runs.records import Records, RunFolder
from apm.benchmarks.runs.rows import Row
from apm.benchmarks.runs.run_json import SCHEMA_VERSION
from apm.benchmarks.tables.build import make_tables
from apm.benchmarks.tables.formats import FORMATS
from tests import places

GOLDEN = places.GOLDEN / "tables"
RUNS = ("shifts", "corrupted", "hub")
SUFFIXES = {"markdown": "md", "csv": "csv", "json": "json", "latex": "tex"}

APM = {"stream": False, "steps": 3, "target": "cls"}
ZERO_SHOT: dict[str, Any] = {"stream": False}
TDA = {"stream": True}
SESSION = {
    "command": ["apm", "bench"],
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 0.0,
    "processes": 1,
    "batch_size": 8,
    "workers": 4,
    "git_commit": None,
    "versions": {},
    "system": "a system",
    "processor": "a processor",
    "cores": 2,
    "device": "cpu",
    "device_name": "a processor",
    "threads": 2,
}


def cell(name: str, images: int, total: int, classes: int, **changes: Any) -> dict[str, Any]:
    """What run.json says of a cell."""
    return {
        "dataset": name,
        "title": name,
        "corruption": None,
        "level": None,
        "generated": False,
        "layout": f"{name}/<wnid>/",
        "source": f"/data/{name}",
        "split": "test",
        "fingerprint": "0" * 64,
        "classes": classes,
        "label_set": f"{classes} classes",
        "prompts": "single",
        "prompt_set": "prompts",
        "images": images,
        "total": total,
        "notes": [],
        **changes,
    }


def write_run(
    name: str, cells: dict[str, dict[str, Any]], methods: dict[str, dict[str, Any]], *, better: float, seed: int
) -> None:
    """Write a run folder in which a method answers as the teacher but for some images, more often to the better by
    `better`.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    folder = RunFolder(name)
    for key, header in cells.items():
        shutil.rmtree(folder.shard_folder(key), ignore_errors=True)
        n, classes = header["images"], header["classes"]
        skill = 0.0 if header["source"].startswith("hf:") else 0.6
        label = draw.integers(0, classes, n)
        teacher = np.where(draw.random(n) < skill, label, draw.integers(0, classes, n))
        rows = []
        for method in methods:
            adapted = method != "zero-shot"
            chosen = np.where(draw.random(n) < better, label, teacher) if adapted else teacher
            chosen = np.where(draw.random(n) < 0.05, draw.integers(0, classes, n), chosen) if adapted else chosen
            sure = np.round(draw.uniform(0.3, 1.0, n), 3)
            for i in range(n):
                shared: dict[str, Any] = {
                    "id": f"{key}/{i:03d}",
                    "position": i,
                    "label": int(label[i]),
                    "method": method,
                }
                if i == 5 and key == "digits":
                    rows.append(Row(**shared, error="the file is cut off"))
                    continue
                right = chosen[i] == label[i]
                steps = tuple(int(x) for x in (*draw.integers(0, classes, 3), chosen[i]))
                rows.append(
                    Row(
                        **shared,
                        prediction=int(chosen[i]),
                        probability=float(sure[i]),
                        nll=float(-np.log(sure[i] if right else (1 - sure[i]) / 2 + 1e-3)),
                        rank=1 if right else 2,
                        teacher_prediction=int(teacher[i]),
                        cosine=0.99 if method == "apm" else None,
                        steps=3 if method == "apm" else None,
                        seconds=0.25 if adapted else 0.001,
                        shared_seconds=0.015625,
                        step_predictions=steps if method == "apm" else None,
                    )
                )
        shard = folder.append(key, rows)
        shard.rename(shard.with_name("00000000-000000000000.parquet"))
    identity = ("fingerprint", "label_set", "prompt_set")
    folder.write_run(
        {
            "schema": SCHEMA_VERSION,
            "config": {
                "teacher": "embedded@0123456789abcdef",
                "methods": methods,
                "cells": {key: {**{k: one[k] for k in identity}, "generated": None} for key, one in cells.items()},
                "seed": 0,
                "limit": None,
                "prompts": None,
                "record_steps": True,
            },
            "teacher": {"name": "embedded", "identity": "embedded@0123456789abcdef", "notes": []},
            "stream_order": {"generator": "numpy PCG64 permutation", "seed": 0},
            "cells": cells,
            "label_sets": {one["label_set"]: [f"class {i}" for i in range(one["classes"])] for one in cells.values()},
            "prompt_sets": {"prompts": ["a photo of a {}."]},
            "counts": {},
            "wall_seconds": 0.0,
            "sessions": [SESSION],
        }
    )


def main() -> None:
    """Write records and expected texts."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    os.chdir(GOLDEN)  # the run folders' names in the tables do not depend on where the repository lies
    shifts = {
        "imagenet-a": cell("imagenet-a", 60, 7500, 200, notes=["Subset: one.", "The same of both."]),
        "imagenet-r": cell("imagenet-r", 60, 30000, 200, notes=["The same of both."]),
    }
    write_run("shifts", shifts, {"zero-shot": ZERO_SHOT, "apm": APM}, better=0.2, seed=1)
    corrupted = {"digits": cell("digits", 50, 50, 10)}
    for name in ("fog", "contrast"):
        corrupted[f"digits/{name}/5"] = cell("digits", 50, 50, 10, corruption=name, level=5, generated=True)
    write_run("corrupted", corrupted, {"zero-shot": ZERO_SHOT, "apm": APM, "tda": TDA}, better=0.5, seed=2)
    hub = {"caltech101": cell("caltech101", 80, 80, 100, source="hf:clip-benchmark/wds_vtab-caltech101:test")}
    write_run("hub", hub, {"zero-shot": ZERO_SHOT}, better=0.0, seed=3)
    tables = make_tables([Records.open(name) for name in RUNS], oracle=True)
    for name, suffix in SUFFIXES.items():
        Path(f"expected.{suffix}").write_text(FORMATS[name](tables), encoding="utf-8")


if __name__ == "__main__":
    main()
