"""The systems of the paper's figures and of its authors' talks: what runs each here, and what of it was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .study import RESULTS, Record, markdown, read_record

NOT_HERE, NOT_MEASURED = "not here yet", "–"
TEACHER = "teacher's grid"


@dataclass(frozen=True)
class System:
    """A system of the paper's figures or of the talks.

    Attributes:
        name: what it is.
        command: that runs it here.
        needs: to be run as shown.
        record: file in benchmarks/results.
        found: the record → what was measured.
        page: in docs, that says more.
    """

    name: str
    command: str
    needs: str
    record: str = ""
    found: Callable[[Record], str] = lambda record: NOT_MEASURED
    page: str = ""


def _layers(record: Record) -> str:
    ami = {name: values["AMI mask"][0] for name, values in record["layers"]["layer3, 14 × 14"].items()}
    return (
        f"not with these weights; in the embedded teacher's third stage: AMI with masks {ami['image']:.2f}, with "
        f"random weights {ami['random weights']:.2f} ({record['images']} photographs)"
    )


def _ami(record: Record) -> str:
    of = {target: record["conditions"][target]["image"]["AMI image"] for target in ("cls", "grid")}
    return (
        f"AMI with superpixels {of['cls'][0]:.3f} fitted to the token, {of['grid'][0]:.3f} to the grid "
        f"({record['images']} images)"
    )


def _glom_islands(record: Record) -> str:
    masks: dict[str, Any] = record["scores"]["masks"]
    highest = max(name for name in masks if name.startswith("GLOM, "))
    return (
        f"AMI of k-means with masks: {highest} {masks[highest]['clusters'][0]:.3f}, teacher's grid "
        f"{masks[TEACHER]['clusters'][0]:.3f} ({record['images']['masks']} photographs)"
    )


def _colours(record: Record) -> str:
    held_out = record["sets"][0]
    of = {name: found[0] for name, found in held_out["delta_e"].items()}
    return (
        f"held-out images: ΔE76 student {of['student']:.1f}, mean at each location {of['place']:.1f}, grey "
        f"{of['grey']:.1f} ({held_out['images']} images)"
    )


def _explained(record: Record, source: str) -> float:
    return float(record["measures"][source]["explained"][0])


def _skipped(record: Record) -> str:
    """Of the widest gap behind a layer, and of the widest behind the image."""
    told = []
    for image in (True, False):
        pairs = [pair for pair in record["pairs"] if (pair["from"] == 0) == image]
        pair = max(pairs, key=lambda one: one["to"] - one["from"])
        found = {name: f"{100 * one['agreement'][0]:.0f} %" for name, one in pair["stand_ins"].items()}
        told.append(
            f"{pair['from'] or 'image'} → {pair['to']} of {record['layers']}: student {found['column']}, local "
            f"{found['local']}, linear map {found['linear']}"
        )
    return f"same top label as the whole teacher: {'; '.join(told)} ({record['held_out_images']} images)"


SYSTEMS = (
    System(
        "GLOM: columns of levels, bottom-up, top-down, consensus (Hinton 2021)",
        "apm glom train IMAGES --out CKPT",
        "no published figures",
        "glom-reconstruction.json",
        lambda record: (
            f"hidden locations: error {record['errors']['glom'][0]:.3f}, a convolutional autoencoder of the same size "
            f"{record['errors']['autoencoder'][0]:.3f} ({record['images']} images)"
        ),
        "glom.md",
    ),
    System(
        "GLOM's islands as the parse tree",
        "apm glom show IMAGE --checkpoint CKPT --out DIR",
        "no published figures",
        "glom-islands.json",
        _glom_islands,
        "glom.md",
    ),
    System(
        "GLOM as a student in test-time training",
        "apm bench folder --root DATA --method glom-ttt",
        "not published",
        "glom-student.json",
        lambda record: (
            f"agreement with the teacher {100 * record['methods']['glom-ttt']['agreement']:.1f} %, APM's "
            f"{100 * record['methods']['apm']['agreement']:.1f} % ({record['images']} images)"
        ),
        "glom.md",
    ),
    System(
        "Islands of agreement in APM's field (Figure 3)",
        "apm islands IMAGE --out DIR",
        "CLIP's weights; the figure gives no numbers",
        "islands-small.json",
        _ami,
        "islands.md",
    ),
    System(
        "Maps of a label in the field",
        "apm classify IMAGE --explain DIR",
        "CLIP's weights; no published figures",
        "pointing-small.json",
        lambda record: (
            f"pointing game: field {100 * record['scores']['field, grid']['score']:.0f} %, teacher's grid "
            f"{100 * record['scores'][TEACHER]['score']:.0f} % "
            f"({record['composites']} composites)"
        ),
        "explain.md",
    ),
    System(
        "One student for many images, with its error map (Figure 5)",
        "apm pretrain IMAGES --teacher-grid timm:NAME --out CKPT",
        "DINOv2's weights through timm; the paper's images and hours are not stated",
        "pretraining.json",
        lambda record: (
            f"held-out grids: error {record['grid']['student']['mse']:.3f}, mean feature "
            f"{record['grid']['mean']['mse']:.3f} ({record['held_out_images']} images)"
        ),
        "pretraining.md",
    ),
    System(
        "What a student learned without labels: a linear probe",
        "python -m apm.benchmarks.studies.linear_probe CKPT --root TABLE",
        "as above",
        "linear_probe.json",
        lambda record: (
            f"{record['data']}: field {100 * record['probes']['field']['accuracy']:.1f} %, pixels "
            f"{100 * record['probes']['pixels']['accuracy']:.1f} % ({record['test']:,} images)"
        ),
        "pretraining.md",
    ),
    System(
        "Interpolation between the trigger columns of two images",
        "apm interpolate ONE OTHER --checkpoint CKPT --out DIR",
        "no published figures",
        page="pretraining.md",
    ),
    System(
        "Time against the number of queried patches",
        "python -m apm.benchmarks.speed patches",
        "a GPU: `make gpu`",
        "speed-patches-paper-cpu.json",
        lambda record: "[curve](speed.md)",
        "speed.md",
    ),
    System(
        "Islands from a video transformer shown a still image",
        "apm islands IMAGE --source mvit:3,4 --out DIR",
        "MViTv2-S's weights, which torchvision publishes (132 MB); no published figures",
        "layers-teacher.json",
        _layers,
        "islands.md",
    ),
    System(
        "Colourisation of black-and-white photographs",
        "apm colourise IMAGE --checkpoint CKPT --out DIR",
        "a student from `apm pretrain --grey-input`; no published figures",
        "colourising.json",
        _colours,
        "colourise.md",
    ),
    System(
        "Layer skipping: 5 layers of 12",
        "apm pretrain IMAGES --teacher-grid NAME --target-layer 5 --out CKPT",
        "the talk's teacher; no published figures",
        "layer-skipping.json",
        _skipped,
        "pretraining.md",
    ),
    System(
        "Patch tokens from the class token",
        "python -m apm.benchmarks.studies.patch_tokens --root IMAGES",
        "CLIP's weights; no published figures",
        "patch-tokens.json",
        lambda record: (
            f"explained variance of the teacher's patches: {100 * _explained(record, 'token, mean'):.1f} %, "
            f"fitted to the grid {100 * _explained(record, 'grid'):.0f} % ({record['photographs']} photographs)"
        ),
        "islands.md",
    ),
)
"""In the order of the page. Without a command: not here yet."""


def systems() -> str:
    """The systems' table."""
    rows = []
    for one in SYSTEMS:
        path = RESULTS / one.record
        found = one.found(read_record(path)) if one.record and path.is_file() else NOT_MEASURED
        page = f"[{one.page.removesuffix('.md')}]({one.page})" if one.page else ""
        rows.append((one.name, f"`{one.command}`" if one.command else NOT_HERE, found, one.needs, page))
    return markdown(("system", "command", "measured here", "needs, to run as shown", "page"), rows, text=None)
