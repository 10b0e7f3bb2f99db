"""TTT-MAE against the probe that it starts from: figures counted again from the rows, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from apm.benchmarks.methods import MethodOptions, create_method
from apm.benchmarks.runs.records import RunFolder
from apm.benchmarks.runs.rows import Row
from apm.benchmarks.studies import mae_bench
from apm.benchmarks.studies.mae_bench import STUDY, Pair, compared
from apm.benchmarks.tables.stats import mcnemar
from apm.errors import UsageError
from apm.mae.config import HeadTraining, MAEConfig, MAETraining
from apm.mae.model import MaskedAutoencoder
from apm.mae.published import read_start
from apm.pretrain.checkpoint import Checkpoint, write_checkpoint
from tests.benchmarks.made_runs import CLASSES, make_dataset, make_run

SIZES = MAEConfig(image_size=16, patch_size=4, width=8, depth=2, heads=1, decoder_width=8, decoder_depth=1,
                  decoder_heads=1, head_width=8, head_depth=1, head_heads=1)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Autoencoder and probe, and two runs: both methods on two corruptions and 9 clean images, the probe on 15."""
    folder = tmp_path_factory.mktemp("mae")
    base, probe = folder / "mae.safetensors", folder / "probe.safetensors"
    more = {"images": 40, "precision": "fp32"}

    def write(path: Path, sizes: MAEConfig, settings: dict[str, Any]) -> None:
        weights = {name: 3 * weight for name, weight in MaskedAutoencoder(sizes, seed=2).state_dict().items()}
        write_checkpoint(path, Checkpoint(sizes, settings, settings["steps"], weights, {}, "mae"))
        losses = {"held_out_reconstruction": 0.75, "held_out_accuracy": 0.25, "held_out_cross_entropy": 1.5}
        lines = [{"step": 0, "seconds": 0.0}, {"step": settings["steps"], **losses, "seconds": 2.0}]
        Path(f"{path}.log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    write(base, SIZES, {**asdict(MAETraining(steps=7, lr=2e-3)), **more})
    known = {"start": read_start(base, SIZES).digest, "class_names": json.dumps(CLASSES), "decoder": "trained"}
    write(probe, replace(SIZES, classes=3), {**asdict(HeadTraining(steps=9, held_out=0.2)), **more, **known})
    asked = MethodOptions(record_steps=True)
    methods = [
        create_method(spec, asked) for spec in (f"vit-probe:file={probe}", f"ttt-mae:file={probe},masks=2,steps=3,lr=1")
    ]
    sets = [make_dataset(9, corruption=name, level=5 if name else None) for name in ("fog", "snow", None)]
    make_run(folder / "run", methods, sets, record_steps=True)
    make_run(folder / "clean", methods[:1], make_dataset(15))
    return {"folder": folder, "base": base, "probe": probe, "run": folder / "run", "clean": folder / "clean"}


def record_of(files: dict[str, Path], *runs: str, **changes: Any) -> dict[str, Any]:
    given = {"runs": [files[name] for name in runs], "checkpoint": files["probe"], "base": files["base"]}
    return mae_bench.measure(SimpleNamespace(**{**given, **changes}))  # type: ignore[arg-type]


def rows_of(files: dict[str, Path], cell: str, method: str) -> list[dict[str, Any]]:
    rows = RunFolder(files["run"]).read(cell).to_pylist()
    return sorted((row for row in rows if row["method"].startswith(method)), key=lambda row: row["id"])


def test_figures_are_those_of_the_rows(files: dict[str, Path]) -> None:
    record = record_of(files, "run", "clean")
    steps, losses, seconds, lost, won = [], [], [], 0, 0
    for name in ("fog", "snow"):
        before, after = (rows_of(files, f"digits/{name}/5", method) for method in ("vit-probe", "ttt-mae"))
        right = [[row["prediction"] == row["label"] for row in rows] for rows in (before, after)]
        flips = [a - b for b, a in zip(*right, strict=True)]
        cell = record["cells"][name]
        assert (cell["answers"], cell["images"]) == (9, 9)
        assert cell["probe"] == pytest.approx(np.mean(right[0])) and cell["adapted"] == pytest.approx(np.mean(right[1]))
        assert (cell["lost"], cell["won"]) == (flips.count(-1), flips.count(1))
        assert cell["p"] == pytest.approx(mcnemar(cell["lost"], cell["won"]))
        lost, won = lost + cell["lost"], won + cell["won"]
        steps.append([[choice == row["label"] for choice in row["step_predictions"]] for row in after])
        losses.append([[dict(row["extras"])[f"loss_{step}"] for step in range(4)] for row in after])
        seconds += [row["seconds"] + row["shared_seconds"] for row in after]
    whole = record["together"]
    assert (whole["answers"], whole["images"], whole["lost"], whole["won"]) == (18, 9, lost, won)
    assert record["steps"]["accuracy"] == pytest.approx(np.mean(steps, (0, 1)).tolist())
    assert record["steps"]["loss"] == pytest.approx(np.mean(losses, (0, 1)).tolist())
    best = np.array(steps)[:, :, 1:]
    oracle = record["steps"]["oracle"]
    assert oracle["accuracy"] == pytest.approx(best.mean((0, 1)).max())
    assert oracle["each corruption"] == pytest.approx(best.mean(1).max(1).mean())
    assert oracle["each image"] == pytest.approx(best.any(2).mean())
    clean = [row["seconds"] + row["shared_seconds"] for row in rows_of(files, "digits", "ttt-mae")]
    assert record["seconds"]["ttt-mae"] == pytest.approx(np.mean(seconds + clean))
    assert record["clean"]["images"] == 15 and record["cells"]["clean"]["answers"] == 9
    assert record_of(files, "run")["clean"]["images"] == 9


def test_photographs_are_what_is_counted_and_not_their_corruptions() -> None:
    before = np.array([1, 1, 0, 0, 1], dtype=bool)
    afters = [np.array(one, dtype=bool) for one in ([0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 1, 1, 0, 1])]
    names = np.array(list("abcde"), dtype=object)
    pairs = [
        Pair(None, names, before, np.stack([before, after], 1), np.zeros((5, 2)), {})  # type: ignore[arg-type]
        for after in afters
    ]
    found = compared(pairs)
    each = np.mean([after.astype(float) - before for after in afters], axis=0)
    interval = ttest_1samp(each, 0).confidence_interval(0.95)
    assert (found["difference"], found["low"], found["high"]) == pytest.approx((each.mean(), *interval))
    assert (found["answers"], found["images"], found["lost"], found["won"]) == (15, 5, 5, 3)
    signs = [sum(s * c for s, c in zip(np.array(list(f"{n:04b}"), int) * 2 - 1, (3, 2, 1, 2), strict=True))
             for n in range(16)]  # fmt: skip
    assert found["p"] == pytest.approx(np.mean([abs(one) >= 2 for one in signs]))


def test_the_page_says_training_flips_steps_and_cost(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(files[name]) for name in ("run", "clean")]
    out = str(tmp_path / "r.json")
    STUDY.main([*places, "--checkpoint", str(files["probe"]), "--base", str(files["base"]), "--record", out])
    said = capsys.readouterr().out
    assert "apm mae train DATA --out mae.safetensors --precision fp32 --image-size 16 --patch-size 4 --width 8" in said
    assert "--depth 2 --heads 1" in said and "--steps 7 --lr 0.002\n" in said
    assert "apm mae probe DATA --base mae.safetensors --out probe.safetensors" in said and "--held-out 0.2\n" in said
    assert "held-out accuracy 25.00 % of 3 classes" in said and "On 15 clean images outside the training set: " in said
    assert "32 images with 8 held out" in said and "9 of 9 steps of 128 images" in said
    assert said.count("\n| fog | 9 |") == said.count("\n| clean | 9 |") == said.count("\n| 2 corruptions | 18 |") == 1
    assert "| 3 | " in said and "ORACLE" in said and "(3 steps of 2 masks, lr 1, momentum 0.9)" in said


def test_what_does_not_belong_together_is_refused(files: dict[str, Path]) -> None:
    folder = files["folder"]
    other = folder / "other.safetensors"
    if not other.exists():
        weights = MaskedAutoencoder(SIZES, seed=9).state_dict()
        write_checkpoint(other, Checkpoint(SIZES, {"steps": 1}, 1, dict(weights), {}, "mae"))
        settings = {"class_names": json.dumps(CLASSES), "kind": "probe", "decoder": "trained"}
        sizes = replace(SIZES, classes=3)
        file = folder / "probe-2.safetensors"
        write_checkpoint(file, Checkpoint(sizes, settings, 1, dict(MaskedAutoencoder(sizes).state_dict()), {}, "mae"))
        make_run(folder / "foreign", [create_method(f"vit-probe:file={file}")], make_dataset(3))
        both = [create_method(f"{name}:file={files['probe']}") for name in ("vit-probe", "ttt-mae")]
        both[1] = create_method(f"ttt-mae:file={files['probe']},steps=1,masks=1")
        make_run(folder / "silent", both, make_dataset(3, corruption="fog", level=5))
    with pytest.raises(UsageError, match="No runs were given"):
        record_of(files)
    with pytest.raises(UsageError, match="--checkpoint and --base"):
        record_of(files, "run", base=None)
    with pytest.raises(UsageError, match=r"was not trained on .*other"):
        record_of(files, "run", base=other)
    with pytest.raises(UsageError, match="of another checkpoint"):
        record_of(files, "run", runs=[folder / "foreign"])
    with pytest.raises(UsageError, match="made without --record-steps"):
        record_of(files, "run", runs=[folder / "silent"])


def test_what_is_not_finished_is_left_out_and_named(files: dict[str, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(files["run"], half)
    folder = RunFolder(half)
    for cell in ("digits/snow/5", "digits"):
        rows = [Row(**row) for row in folder.read(cell).to_pylist()]
        shutil.rmtree(folder.shard_folder(cell))
        if cell != "digits":
            folder.append(cell, rows[:5])
    environment = {"command": "c", "date": "d"}
    record = record_of(files, runs=[half]) | environment
    assert record["unfinished"] == ["clean", "snow"] and record["clean"] is None
    assert set(record["cells"]) == {"fog"} and record["together"] == record["cells"]["fog"]
    assert "Unfinished and left out: clean, snow." in mae_bench.table(record)
    alone = record_of(files, "clean") | environment
    assert "cells" not in alone and "held-out accuracy 25.00 %" in mae_bench.table(alone)
    shutil.rmtree(folder.shard_folder("digits/fog/5"))
    with pytest.raises(UsageError, match="No run has come to the end"):
        record_of(files, runs=[half])


def test_an_image_without_an_answer_counts_as_wrong_and_has_no_error() -> None:
    losses = np.array([[1.0, 2.0], [math.nan, math.nan]])
    right = np.array([[True, True], [False, False]])
    pair = Pair(None, np.array(["a", "b"], dtype=object), right[:, 0], right, losses, {})  # type: ignore[arg-type]
    found = mae_bench.by_step([pair])
    assert found["accuracy"] == [0.5, 0.5] and found["loss"] == [1.0, 2.0]
