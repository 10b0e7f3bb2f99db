"""What docs/islands.md holds of the study of islands: its tables, made from the record, and its two pictures."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apm.errors import ApmError
from apm.images.files import write_atomically

from . import study as documents

TARGETS = ("cls", "grid")
CONTROLS = {
    "random target": "the image, with a target of random directions and the same lengths",
    "shuffled image": "the image cut into 8 × 8 patches in random order, as the student and the teacher see it",
    "other target": "the image, with the target of another image",
    "no steps": "the student before its first step",
}
CONDITIONS = ("image", *CONTROLS)
VARIATION = ("in one direction", "of row plus column")
"""What `apm.student.islands.variation` tells of how a field differs between places."""

DOCUMENT = documents.ROOT / "docs" / "islands.md"
RECORD = documents.ROOT / "benchmarks" / "results" / "islands-small.json"
COMMAND = (
    *("islands", "coffee.png", "chelsea.png", "--teacher", "embedded"),
    *("--snapshots", "0,10,50,100,150", "--grid-size", "448", "--out", "islands"),
)
"""Of `apm`, makes the pictures from two photographs of scikit-image."""
PICTURES = {"coffee-*-strip.png": "islands-strip.png", "coffee-*-parts.png": "islands-parts.png"}
"""What it makes: name in the document's folder."""

COLUMNS = {
    "cosine": "neighbours' cosine",
    "regions": "regions",
    "centred cosine": "cosine, mean taken out",
    "centred regions": "regions, mean taken out",
    "AMI image": "AMI, own superpixels",
    "AMI other image": "AMI, another image's",
    "contrast image": "contrast, own superpixels",
    "contrast other image": "contrast, another image's",
}
TARGET_NAMES = {"cls": "the token", "grid": "the grid"}


def table(record: Mapping[str, Any]) -> str:
    """Print a record as markdown: the measures of every condition, then what they are to be read against.

    A difference of more than two standard errors is bold.
    """
    settings = record["settings"]
    grid = " × ".join(str(side) for side in record["teacher_grid"])
    lines = [
        f"**{settings['preset']} student**, {settings['locations']} × {settings['locations']} locations, "
        f"{settings['steps']} steps, {record['images']} images; the teacher's grid is {grid}. Final loss: the token "
        f"{record['final_loss']['cls'][0]:.1e}, the grid {record['final_loss']['grid'][0]:.1e} (of a variance of "
        f"{record['grid_variance'][0]:.1e} over the places). After the last step the features differ between places: "
        f"with the token by {_spread(record, 'cls')}; with the grid by {_spread(record, 'grid')}.",
        "",
        "| target | condition | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for target, condition in itertools.product(TARGETS, CONDITIONS):
        values = record["conditions"][target][condition]
        cells = " | ".join(_plus_minus(values[name], 1 if "regions" in name else 3) for name in COLUMNS)
        lines.append(f"| {TARGET_NAMES[target]} | {condition} | {cells} |")
    lines += [
        "",
        "| own superpixels, less … (paired; bold: beyond two standard errors) | token: AMI | grid: AMI "
        "| token: contrast | grid: contrast |",
        "|---|---:|---:|---:|---:|",
    ]
    pairs = list(itertools.product(("AMI", "contrast"), TARGETS))
    for control in CONTROLS:
        cells = " | ".join(_signed(record["differences"][t][control][f"{name} image"]) for name, t in pairs)
        lines.append(f"| … the same in the control: {control} | {cells} |")
    cells = " | ".join(_signed(record["image_against_other"][t][name]) for name, t in pairs)
    teacher = record["teacher_contrast"]
    return "\n".join(
        [
            *lines,
            f"| … another image's superpixels | {cells} |",
            "",
            f"Clusters in the fields of two images agree by an AMI of {_plus_minus(record['same_regions']['cls'], 3)} "
            f"(the token) and {_plus_minus(record['same_regions']['grid'], 3)} (the grid). What is no student's field "
            "has an AMI with the superpixels of: "
            + "; ".join(f"{name} {_plus_minus(value, 3)}" for name, value in record["references"].items())
            + f". The teacher's grid itself has a contrast of {_plus_minus(teacher['image'], 3)}, with another image's "
            f"superpixels {_plus_minus(teacher['other image'], 3)} (difference {_signed(teacher['difference'])}).",
            "",
            f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}` · {settings['parts']} "
            f"clusters and superpixels · threshold {settings['threshold']} · lr {settings['lr']:g}, of the grid "
            f"{settings['grid_lr']:g} · {settings['precision']} · seed {settings['seed']} · ± is the standard error "
            "over images</sub>",
        ]
    )


def _plus_minus(value: Sequence[float], digits: int) -> str:
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def _spread(record: Mapping[str, Any], target: str) -> str:
    """How much a field varies, and how little of that is rounding."""
    share, rounding = record["spread"][target][0], record["rounding"][target]
    direction, places = (100 * record["variation"][target][name][0] for name in VARIATION)
    return (
        f"{100 * share:.2g} % of their size, of which rounding is at most {100 * rounding:.1g} %; of that variance "
        f"{direction:.1f} % lie in one direction of the features, and {places:.1f} % are a sum of something of the row "
        "and something of the column"
    )


def _signed(value: Sequence[float]) -> str:
    text = f"{value[0]:+.3f} ± {value[1]:.3f}"
    return f"**{text}**" if abs(value[0]) > 2 * value[1] else text


def write(record: Mapping[str, Any]) -> None:
    """Put the tables of a record into the document."""
    documents.fill(DOCUMENT, "islands", table(record))


def draw() -> None:
    """Make the document's pictures with the command that it names.

    Raises:
        ApmError: the command failed.
    """
    documents.require_clone()
    import skimage

    with tempfile.TemporaryDirectory() as folder:
        for name in COMMAND[1:3]:
            Path(folder, name).symlink_to(Path(skimage.__file__).parent / "data" / name)
        done = subprocess.run([sys.executable, "-m", "apm", *COMMAND], cwd=folder, stdout=sys.stderr, check=False)
        if done.returncode:
            raise ApmError(f"apm {' '.join(COMMAND)} failed with exit code {done.returncode}.")
        for pattern, name in PICTURES.items():
            (made,) = Path(folder).glob(f"islands/{pattern}")
            write_atomically(DOCUMENT.parent / name, made.read_bytes())
