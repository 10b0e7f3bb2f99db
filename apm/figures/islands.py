"""Pictures of fields and their islands: a strip over the steps, curves of the measures, the parts, and an animation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from apm.figures.base import bare, component_colours, new_figure, save, save_animation, save_arrays
from apm.images.files import write_atomically
from apm.student import islands

if TYPE_CHECKING:
    from apm.test_time.island_fields import Observation, Watched

NAMES = {"cls": "target: the token", "grid": "target: the grid"}
COLOURS = {
    "image": "#1b6ca8",
    "random target": "#d1495b",
    "shuffled image": "#edae49",
    "other target": "#66a182",
    "no steps": "#777777",
}
PANELS = {
    "cosine": "mean cosine of neighbours",
    "centred cosine": "the same, mean taken out",
    "centred regions": "regions, mean taken out",
    "AMI image": "AMI with superpixels",
    "contrast image": "contrast at superpixels' edges",
}


def write_islands(
    found: Observation, stem: Path, *, shown: Sequence[int], settings: Mapping[str, Any], kind: str = "png"
) -> list[Path]:
    """Write pictures, animation, arrays (npz) and measures (json) of one image.

    Args:
        found: of the image.
        stem: path of all the files, without endings.
        shown: steps that the pictures show.
        settings: for the small print and the record; plain JSON values, ``seed`` among them.
        kind: ``png`` or ``svg``, of the pictures.

    Returns:
        The files.
    """
    runs, square = found.of_image, found.square
    words = " · ".join(f"{name} {value}" for name, value in settings.items())

    def path(ending: str) -> Path:
        return stem.with_name(f"{stem.name}{ending}")

    kept = list(next(iter(runs.values())).fields)
    record = {
        "settings": settings,
        "losses": {target: run.losses for target, run in runs.items()},
        "measures": found.measured,
    }
    return [
        strip(path(f"-strip.{kind}"), square, runs, shown=shown, seed=settings["seed"], settings=words),
        curves(path(f"-curves.{kind}"), found.measured, settings=words),
        parts(path(f"-parts.{kind}"), square, found.subject.superpixels, found.clusters, settings=words),
        animate(path("-field.gif"), square, runs),
        save_arrays(
            path(".npz"),
            settings=json.dumps(settings),
            superpixels=found.subject.superpixels,
            **{f"fields/{target}": [run.fields[step] for step in kept] for target, run in runs.items()},
            **{f"losses/{target}": [run.losses[step] for step in kept] for target, run in runs.items()},
            **{f"last/{t}/{c}": run.last for t, of in found.runs.items() for c, run in of.items()},
            **{f"clusters/{t}/{c}": labels for t, of in found.clusters.items() for c, labels in of.items()},
            steps=kept,
        ),
        write_atomically(path(".json"), (json.dumps(record, indent=1) + "\n").encode()),
    ]


def strip(
    path: Path, square: Image.Image, runs: Mapping[str, Watched], *, shown: Sequence[int], seed: int, settings: str
) -> Path:
    """Draw the field at some steps, with the loss: by principal components, in two scales, and by t-SNE.

    Args:
        path: .png or .svg.
        square: what the student sees.
        runs: by target.
        shown: steps, all among those of the runs.
        seed: of t-SNE.
        settings: small print.
    """
    figure = new_figure(1.25 * (len(shown) + 1), 4.4 * len(runs))
    axes = figure.subplots(3 * len(runs), len(shown) + 1, squeeze=False)
    for number, (target, run) in enumerate(runs.items()):
        fields = [run.fields[step] for step in shown]
        joint = component_colours(fields)
        own = [component_colours([field])[0] for field in fields]
        cells = _cell_colours(square, fields[0].shape[0])
        rows = axes[3 * number : 3 * number + 3]
        words = ("principal components,\none scale for all steps", "the same,\neach step its own scale", "t-SNE")
        for row, text in zip(rows, words, strict=True):
            row[0].imshow(square)
            row[0].set_ylabel(f"{NAMES[target]}\n{text}", fontsize=7)
        rows[2][0].set_xlabel("dots have the\nimage's colours", fontsize=6)
        for column, step in enumerate(shown, start=1):
            rows[0][column].imshow(joint[column - 1], interpolation="nearest")
            rows[0][column].set_title(f"step {step}\nloss {run.losses[step]:.1e}", fontsize=7)
            rows[1][column].imshow(own[column - 1], interpolation="nearest")
            laid = islands.embed(fields[column - 1], seed=seed)
            rows[2][column].scatter(laid[:, 0], laid[:, 1], c=cells, s=4, linewidths=0)
            rows[2][column].set_facecolor("0.85")
    bare(axes.flat)
    return save(figure, path, settings=settings)


def curves(
    path: Path, measured: Mapping[str, Mapping[str, Mapping[int, Mapping[str, float]]]], *, settings: str
) -> Path:
    """Draw the measures against the steps.

    Args:
        path: .png or .svg.
        measured: target → condition → step → measure; "no steps" is a level line.
        settings: small print.
    """
    figure = new_figure(2.7 * len(PANELS), 2.4 * len(measured) + 0.3)
    axes = figure.subplots(len(measured), len(PANELS), squeeze=False, sharex=True, sharey="col")
    for number, (target, by_condition) in enumerate(measured.items()):
        row = axes[number]
        for one, (name, title) in zip(row, PANELS.items(), strict=True):
            for condition, by_step in by_condition.items():
                colour = COLOURS[condition]
                values = [by_step[step][name] for step in by_step]
                if condition == "no steps":
                    one.axhline(values[0], color=colour, linestyle=":", linewidth=1, label=condition)
                else:
                    one.plot(list(by_step), values, "o-", markersize=3, color=colour, linewidth=1.4, label=condition)
            one.set_xscale("symlog", linthresh=1)
            one.set_xlim(left=-0.3)  # a logarithmic scale from 1 on, and room for the points at 0
            one.tick_params(labelsize=7)
            if "regions" in name:
                one.set_yscale("log")
            if number == 0:
                one.set_title(title, fontsize=9)
            if number == len(measured) - 1:
                one.set_xlabel("steps", fontsize=8)
        row[0].set_ylabel(NAMES[target], fontsize=8)
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=8, frameon=False
    )
    return save(figure, path, settings=settings)


def parts(
    path: Path,
    square: Image.Image,
    superpixels: islands.Labels,
    found: Mapping[str, Mapping[str, islands.Labels]],
    *,
    settings: str,
) -> Path:
    """Draw the clusters of the fields after the last step beside the image's superpixels.

    Args:
        path: .png or .svg.
        square: what the student sees.
        superpixels: (H, H) of the image.
        found: target → condition → clusters (H, H).
        settings: small print.
    """
    columns = 1 + max(len(of) for of in found.values())
    figure = new_figure(1.7 * columns, 2.1 * len(found))
    axes = figure.subplots(len(found), columns, squeeze=False)
    side = square.width
    for row, (target, by_condition) in zip(axes, found.items(), strict=True):
        row[0].imshow(outlined(square, superpixels))
        row[0].set_ylabel(NAMES[target], fontsize=8)
        row[0].set_title("superpixels", fontsize=8)
        for one, (condition, labels) in zip(row[1:], by_condition.items(), strict=False):
            one.imshow(labels, cmap="tab20", interpolation="nearest", vmin=0, vmax=19, extent=(0, side, side, 0))
            one.set_title(f"{condition}\nAMI {islands.agreement(labels, superpixels):.2f}", fontsize=8)
    bare(axes.flat)
    return save(figure, path, settings=settings)


def animate(path: Path, square: Image.Image, runs: Mapping[str, Watched]) -> Path:
    """Write the fields over the steps as a GIF: the image, then a field for each target, with step and loss.

    Each step's mean is taken out, and the components are those of the last step: what a frame shows is how its places
    differ, in colours that mean the same in all frames.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    coloured = {}
    for target, run in runs.items():
        centred = [field - field.mean(axis=(0, 1)) for field in run.fields.values()]
        coloured[target] = component_colours(centred, basis=centred[-1:])
    frames = []
    for number, step in enumerate(next(iter(runs.values())).fields):
        figure = new_figure(2.24 * (len(runs) + 1), 2.688)
        axes = figure.subplots(1, len(runs) + 1)
        axes[0].imshow(square)
        axes[0].set_title(f"step {step}", fontsize=8)
        for one, (target, run) in zip(axes[1:], runs.items(), strict=True):
            one.imshow(coloured[target][number], interpolation="nearest")
            one.set_title(f"{NAMES[target]}, loss {run.losses[step]:.1e}", fontsize=8)
            one.set_xlabel("mean taken out, components of the last step", fontsize=6)
        bare(axes)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return save_animation(frames, path)


def _cell_colours(square: Image.Image, grid: int) -> NDArray[np.float64]:
    """Mean colour (grid², 3) in [0, 1] of the image in each cell, in reading order."""
    return np.asarray(square.resize((grid, grid), Image.Resampling.BOX), dtype=np.float64).reshape(-1, 3) / 255


def outlined(square: Image.Image, labels: islands.Labels) -> NDArray[np.float64]:
    """Draw the edges of parts (H, H) into an image, in yellow: about 224 pixels a side, (S, S, 3) in [0, 1]."""
    from skimage.segmentation import mark_boundaries

    side = labels.shape[0] * max(1, round(224 / labels.shape[0]))
    large = np.kron(labels, np.ones((side // labels.shape[0],) * 2, dtype=np.int64))
    pixels = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
    drawn: NDArray[np.float64] = mark_boundaries(pixels, large, color=(1, 1, 0))
    return drawn
