"""What TTT-MAE does to the answers of the probe that it starts from, image by image and step by step.

From the records of finished runs of both on the same images, and the checkpoint that both took:

    apm bench folder --root CLASS_FOLDERS --label-set NAME --corruption all --corruption clean --limit 60 \\
        --method vit-probe:file=PROBE --method ttt-mae:file=PROBE,masks=32 --record-steps --out RUN
    apm bench folder --root CLASS_FOLDERS --label-set NAME --limit 2000 --method vit-probe:file=PROBE --out CLEAN
    python -m apm.benchmarks.studies.mae_bench RUN CLEAN --checkpoint PROBE --base MAE --record FILE

Corruptions may be spread over several runs. The rows are too many to keep; the record holds what the page shows, and
how autoencoder and probe were trained, from their checkpoints and logs. Labels only score; the best step, which they
choose, is told apart as ORACLE.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from apm.errors import UsageError
from apm.images.paths import printable
from apm.mae.config import HeadConfig, HeadTraining, MAEConfig, MAETraining
from apm.mae.published import NETWORK, read_start
from apm.mae.training import load_mae
from apm.pretrain.checkpoint import read_network
from apm.settings import settings_of

from ..runs.records import Records, RunFolder
from ..runs.rows import MethodRows
from ..tables.stats import paired_test, standard_error
from .evidence import described, made_by
from .study import ROOT, Options, Record, Study, markdown, plus_minus, run

PROBE, ADAPTED = "vit-probe", "ttt-mae"
CLEAN = "clean"
BASE_SIZES = tuple(name for name, one in settings_of(MAEConfig).items() if one.option)


@dataclass(frozen=True)
class Pair:
    """Both methods on the images of one corruption, or on clean ones; arrays by image.

    Attributes:
        run: that they are of.
        image: names.
        before: whether the probe is right.
        after: whether TTT-MAE is right, before the first step and after each (n, K + 1).
        losses: of reconstruction, at the same times.
        seconds: of the methods for an image, with what they share.
    """

    run: Records
    image: NDArray[np.object_]
    before: NDArray[np.bool_]
    after: NDArray[np.bool_]
    losses: NDArray[np.float64]
    seconds: dict[str, float]


def measure(options: Options) -> Record:
    """Put together what runs and checkpoints say.

    Raises:
        UsageError: no runs, runs without both methods or steps, or of another checkpoint.
    """
    if not options.runs:
        raise UsageError("No runs were given: name their folders.")
    if options.checkpoint is None or options.base is None:
        raise UsageError("--checkpoint and --base, the probe and the autoencoder that it stands on, are needed.")
    runs = [Records.open(path) for path in options.runs]
    trained = training(options.checkpoint, options.base)
    pairs = dict(found for one in runs for found in pairs_of(one, trained["probe"]["weights"]))
    corrupted = {name: pair for name, pair in pairs.items() if name != CLEAN}
    if not corrupted:
        raise UsageError(f"No run has {PROBE} and {ADAPTED} on corrupted images, with --record-steps.")
    (settings,) = _same([dict(pair.run.methods[_named(pair.run, ADAPTED)]) for pair in pairs.values()])
    return {
        "runs": [described(one) for one in runs],
        "trained": trained,
        "settings": settings,
        "clean": _clean(runs, trained["probe"]["weights"]),
        "cells": {name: compared([pair]) for name, pair in sorted(pairs.items())},
        "together": compared(list(corrupted.values())),
        "steps": by_step(list(corrupted.values())),
        "seconds": {name: float(np.mean([pair.seconds[name] for pair in pairs.values()])) for name in (PROBE, ADAPTED)},
    }


def training(checkpoint: Path, base: Path) -> dict[str, Any]:
    """How a probe and the autoencoder that it stands on were trained, and what their logs say at the end.

    Raises:
        UsageError: no probe, no such files, or the probe stands on another autoencoder.
    """
    probe, whole = load_mae(checkpoint), read_network(base, NETWORK)
    if probe.kind != "probe":
        raise UsageError(f"{printable(checkpoint)} is no checkpoint of `apm mae probe`.")
    if read_start(base, whole.student).digest != probe.settings["start"]:
        raise UsageError(f"{printable(checkpoint)} was not trained on {printable(base)}.")
    sizes = {name: getattr(whole.student, name) for name in BASE_SIZES}
    head = {name: getattr(probe.model.config, name) for name in settings_of(HeadConfig)}
    counts = {name: sum(one.numel() for one in part.parameters()) for name, part in probe.model.named_children()}
    return {
        "autoencoder": {
            "command": command_of("train", base, "", {**sizes, **whole.settings}, MAEConfig, MAETraining),
            "step": whole.step,
            **_kept(whole.settings),
            **_last(base),
        },
        "probe": {
            "command": command_of(
                "probe", checkpoint, f" --base {base.name}", {**head, **probe.settings}, HeadConfig, HeadTraining
            ),
            "step": probe.step,
            "weights": probe.digest,
            "classes": len(probe.class_names),
            **_kept(probe.settings),
            **_last(checkpoint),
        },
        "sizes": {**sizes, **head},
        "parameters": counts,
    }


def command_of(verb: str, path: Path, more: str, values: Mapping[str, Any], *kinds: type) -> str:
    """The command of a training, with the options that are not as they are by default."""
    defaults = {field.name: field.default for kind in kinds for field in dataclasses.fields(kind)}
    asked = [name for kind in kinds for name, one in settings_of(kind).items() if one.option]
    given = "".join(f" --{name.replace('_', '-')} {values[name]}" for name in asked if values[name] != defaults[name])
    return f"apm mae {verb} DATA{more} --out {path.name} --precision {values['precision']}{given}"


def _kept(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("steps", "batch_size", "lr", "seed", "images", "held_out", "precision")}


def _last(checkpoint: Path) -> dict[str, Any]:
    """What the log of a training says last of the held-out images."""
    log = Path(f"{checkpoint}.log.jsonl")
    try:
        row = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        raise UsageError(f"{printable(log)}, the log that training wrote, cannot be read.") from None
    return {name: value for name, value in row.items() if name.startswith("held_out_")} | {"logged": row["step"]}


def _named(one: Records, kind: str) -> str:
    names = [name for name in one.methods if name.partition("[")[0] == kind]
    if len(names) > 1:
        raise UsageError(f"{one.path} has {' and '.join(names)}: give runs with one of them.")
    return names[0] if names else ""


def _same(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [value for place, value in enumerate(values) if value not in values[:place]]
    if len(found) > 1:
        raise UsageError(f"The runs have {ADAPTED} with different settings: give runs with the same ones.")
    return found


def pairs_of(one: Records, weights: str) -> Iterator[tuple[str, Pair]]:
    """Yield each corruption of a run, or `CLEAN`, on which both methods answered.

    Raises:
        UsageError: its answers are of other weights, its steps are not recorded, or it is not finished.
    """
    names = {kind: _named(one, kind) for kind in (PROBE, ADAPTED)}
    for kind in (PROBE, ADAPTED):
        if names[kind] and one.methods[names[kind]]["weights"] != weights:
            raise UsageError(f"{one.path}: {names[kind]} is of another checkpoint than the one named.")
    if not all(names.values()):
        return
    for key, cell in one.cells.items():
        found = dict(one.rows(key))
        before, after = (found.get(names[kind]) for kind in (PROBE, ADAPTED))
        if before is None or after is None or len(before) < cell["images"] or len(after) < cell["images"]:
            raise UsageError(f"{one.path} is not finished: run its command again, or leave it out.")
        if after.step_predictions is None:
            raise UsageError(f"{one.path} has no answers of steps: it was made without --record-steps.")
        order, mine = np.argsort(before.id), np.argsort(after.id)
        label = after.label[mine]
        yield (
            cell["corruption"] or CLEAN,
            Pair(
                one,
                before.id[order],
                before.prediction[order] == before.label[order],
                after.step_predictions[mine] == label[:, None],
                _losses(one, key, names[ADAPTED], after.id[mine]),
                {kind: _seconds(rows) for kind, rows in ((PROBE, before), (ADAPTED, after))},
            ),
        )


def _losses(one: Records, cell: str, method: str, image: NDArray[np.object_]) -> NDArray[np.float64]:
    """Reconstruction error at each step (n, K + 1); NaN where there is no answer."""
    rows = RunFolder(one.path).read(cell, ["id", "method", "extras"]).to_pylist()
    of = {row["id"]: dict(row["extras"] or ()) for row in rows if row["method"] == method}
    steps = sum(name.removeprefix("loss_").isdigit() for name in max(of.values(), key=len))
    return np.array([[of[name].get(f"loss_{step}", math.nan) for step in range(steps)] for name in image])


def _seconds(rows: MethodRows) -> float:
    return float(np.nanmean(rows.seconds + np.nan_to_num(rows.shared_seconds)))


def _clean(runs: Sequence[Records], weights: str) -> dict[str, Any] | None:
    """The probe on the most clean images of any run."""
    found: list[MethodRows] = []
    for one in runs:
        name = _named(one, PROBE)
        if name and one.methods[name]["weights"] == weights:
            keys = [key for key, cell in one.cells.items() if not cell["corruption"]]
            found += [rows for key in keys for method, rows in one.rows(key) if method == name]
    if not found:
        return None
    most = max(found, key=len)
    return {"images": len(most), "accuracy": float((most.prediction == most.label).mean())}


def compared(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Both methods on some corruptions together: shares, paired difference, flips, exact p.

    The corruptions of one photograph are no independent evidence: the interval and the p are over photographs.
    """
    before, after = np.concatenate([one.before for one in pairs]), np.concatenate([one.after[:, -1] for one in pairs])
    names, image = np.unique(np.concatenate([one.image for one in pairs]), return_inverse=True)
    change = np.bincount(image, weights=after.astype(int) - before.astype(int))
    each = change / np.bincount(image)
    error = float(each.std(ddof=1) / math.sqrt(len(names))) if len(names) > 1 else math.nan
    reach = float(student_t.ppf(0.975, len(names) - 1)) * error if len(names) > 1 else math.nan
    difference = float(each.mean())
    return {
        "answers": len(before),
        "images": len(names),
        "probe": float(before.mean()),
        "adapted": float(after.mean()),
        "difference": difference,
        "low": difference - reach,
        "high": difference + reach,
        "lost": int((before & ~after).sum()),
        "won": int((~before & after).sum()),
        "p": paired_test(np.rint(change).astype(np.int64)),
    }


def by_step(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Means over corruptions before the first step and after each, and what labels would choose (ORACLE)."""
    accuracy = np.mean([one.after.mean(0) for one in pairs], axis=0)  # (K + 1,)
    best = 1 + int(accuracy[1:].argmax()) if len(accuracy) > 1 else 0
    return {
        "accuracy": accuracy.tolist(),
        "loss": np.mean([np.nanmean(one.losses, axis=0) for one in pairs], axis=0).tolist(),
        "oracle": {
            "step": best,
            "accuracy": float(accuracy[best]),
            "each corruption": float(np.mean([one.after[:, 1:].mean(0).max() for one in pairs])),
            "each image": float(np.mean([one.after[:, 1:].any(1).mean() for one in pairs])),
        },
    }


def table(record: Record) -> str:
    """How it was trained, each corruption, all together, each step, and what it costs."""
    return "\n\n".join([_trained(record), _cells(record), _together(record), _steps(record), _cost(record)])


def _trained(record: Record) -> str:
    trained = record["trained"]
    whole, probe, sizes, counts = (trained[name] for name in ("autoencoder", "probe", "sizes", "parameters"))
    clean = record["clean"]
    shown = "" if clean is None else f" On {clean['images']:,} clean images of the run: {_share(clean, 'accuracy')}."
    return (
        f"    {whole['command']}\n    {probe['command']}\n\n"
        f"Images of {sizes['image_size']} pixels in patches of {sizes['patch_size']}; encoder {sizes['depth']} blocks "
        f"{sizes['width']} wide ({counts['encoder'] / 1e6:.2f} million weights), decoder {sizes['decoder_depth']} "
        f"blocks {sizes['decoder_width']} wide ({counts['decoder'] / 1e6:.2f}), head {sizes['head_depth']} blocks "
        f"{sizes['head_width']} wide ({counts['head'] / 1e6:.2f}). Autoencoder: {_made(whole)}; held-out error of "
        f"masked patches {whole['held_out_reconstruction']:.4f}. Probe: {_made(probe)}; held-out accuracy "
        f"{100 * probe['held_out_accuracy']:.2f} % of {probe['classes']} classes, cross-entropy "
        f"{probe['held_out_cross_entropy']:.3f}.{shown}"
    )


def _made(of: Mapping[str, Any]) -> str:
    held = round(of["held_out"] * of["images"])
    return (
        f"{of['step']:,} of {of['steps']:,} steps of {of['batch_size']} images, lr {of['lr']:g}, seed {of['seed']}, on "
        f"{of['images'] - held:,} images with {held:,} held out"
    )


def _share(of: Mapping[str, Any], name: str) -> str:
    error = standard_error(of[name], of.get("images", of.get("answers", 0)))
    return f"{plus_minus((100 * of[name], 100 * error), 1)} %"


def _cells(record: Record) -> str:
    rows = [
        (
            name.replace("_", " "),
            one["answers"],
            f"{100 * one['probe']:.1f}",
            f"{100 * one['adapted']:.1f}",
            f"{100 * one['difference']:+.1f}",
            f"{one['lost']} / {one['won']}",
        )
        for name, one in _ordered(record)
    ]
    titles = ("images", "n", "ViT probe, %", "TTT-MAE, %", "difference", "right→wrong / wrong→right")
    return markdown(titles, rows)


def _ordered(record: Record) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Clean first, the corruptions by name, then these together."""
    cells = record["cells"]
    if CLEAN in cells:
        yield CLEAN, cells[CLEAN]
    yield from ((name, one) for name, one in cells.items() if name != CLEAN)
    yield f"{len([name for name in cells if name != CLEAN])} corruptions", record["together"]


def _together(record: Record) -> str:
    one = record["together"]
    return (
        f"Together: {100 * one['difference']:+.2f} points for TTT-MAE, 95 % interval {100 * one['low']:+.2f} to "
        f"{100 * one['high']:+.2f}; {one['lost']} answers lost and {one['won']} won, p = {one['p']:.2g} (McNemar's, "
        f"exact, the corruptions of one photograph flipping together: {one['answers']:,} answers to {one['images']:,} "
        "photographs; the interval is over photographs too)."
    )


def _steps(record: Record) -> str:
    found = record["steps"]
    rows = [
        (step, f"{100 * accuracy:.2f}", f"{loss:.4f}")
        for step, (accuracy, loss) in enumerate(zip(found["accuracy"], found["loss"], strict=True))
    ]
    oracle = found["oracle"]
    return (
        f"{markdown(('steps made', 'accuracy, %', 'reconstruction error'), rows, text=0)}\n\n"
        "Means over the corruptions; each error is of masks of its own step. ORACLE, steps chosen by the labels: the "
        f"best step for all ({oracle['step']}) {100 * oracle['accuracy']:.2f} %, for each corruption "
        f"{100 * oracle['each corruption']:.2f} %, for each image {100 * oracle['each image']:.2f} %."
    )


def _cost(record: Record) -> str:
    own, settings = record["seconds"], record["settings"]
    return (
        f"An image takes {own[PROBE] * 1000:.1f} ms by the probe and {own[ADAPTED]:.2f} s by TTT-MAE "
        f"({settings['steps']} steps of {settings['masks']} masks, lr {settings['lr']:g}, momentum "
        f"{settings['momentum']:g}), answers and errors of all steps included; other work ran beside it. Runs:\n\n"
        f"{made_by(record['runs'])}"
    )


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folders of runs")
    parser.add_argument("--checkpoint", type=Path, metavar="PROBE", help="of apm mae probe, with its log beside it")
    parser.add_argument("--base", type=Path, metavar="MAE", help="of apm mae train, on which it stands, likewise")


STUDY = Study(
    name="mae_bench",
    question=__doc__,
    measure=measure,
    table=table,
    arguments=_arguments,
    shared={},
    results="mae-bench.json",
    document=ROOT / "docs" / "mae.md",
    marker="bench",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
