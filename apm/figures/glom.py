"""Pictures of GLOM: each level's embeddings over the steps, the islands of its parse tree, an animation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from apm.figures.base import bare, component_colours, new_figure, save, save_animation, save_arrays
from apm.glom.islands import Island, island_labels, parse_tree
from apm.glom.model import GLOM
from apm.images.files import write_atomically
from apm.images.load import central_square
from apm.student.islands import Labels
from apm.test_time.inputs import student_pixels

SHOWN = 9  # steps in the picture at most; the animation has all
_PANEL = 160  # side of an image in a frame of the animation, pixels


@torch.no_grad()
def watch(model: GLOM, image: Image.Image, steps: int | None = None) -> NDArray[np.float32]:
    """Embeddings (steps + 1, G, G, L, D) of one RGB image, before the first step and after each; in float32."""
    config = model.config
    pixels = student_pixels([image], config.image_size).to(next(model.parameters()).device)
    states = torch.cat([state.float().cpu() for state in model.states(pixels, steps=steps)])  # (T, N, L, D)
    return states.unflatten(1, (config.grid, config.grid)).numpy()


def level_colours(states: NDArray[np.float32]) -> NDArray[np.float64]:
    """Colour embeddings (T, G, G, L, D) by their first three principal components: (T, L, G, G, 3) in [0, 1].

    Each step's mean over the places is taken out, and a level's components and scale are those of its last step: what
    is shown is how places differ, in colours that mean the same at all steps.
    """
    coloured = []
    for level in range(states.shape[3]):
        centred = [state - state.mean(axis=(0, 1)) for state in states[:, :, :, level]]
        coloured.append(component_colours(centred, basis=centred[-1:]))
    return np.stack(coloured, axis=1)


def draw_levels(path: Path, square: Image.Image, states: NDArray[np.float32], *, settings: str) -> Path:
    """Draw the embeddings in colours: a row for each level, the highest above, a column for each of some steps.

    Args:
        path: .png or .svg.
        square: what the network sees.
        states: from `watch`.
        settings: small print.
    """
    last, levels = len(states) - 1, states.shape[3]
    shown = sorted({round(step) for step in np.linspace(0, last, min(SHOWN, last + 1))})
    colours = level_colours(states)
    figure = new_figure(1.2 * (len(shown) + 1), 1.3 * levels + 0.3)
    axes = figure.subplots(levels, len(shown) + 1, squeeze=False)
    for row, level in enumerate(reversed(range(levels))):
        axes[row][0].set_ylabel(f"level {level}", fontsize=8)
        axes[row][0].imshow(square)
        for column, step in enumerate(shown, start=1):
            axes[row][column].imshow(colours[step, level], interpolation="nearest", vmin=0, vmax=1)
            if row == 0:
                axes[row][column].set_title(f"step {step}", fontsize=8)
    bare(axes.flat)
    told = "each step's mean taken out; principal components of each level's last step"
    return save(figure, path, settings=f"{settings} · {told}")


def draw_tree(path: Path, square: Image.Image, labels: Labels, *, settings: str) -> Path:
    """Draw the islands of each level in the image's own mean colours, and below them the tree that they form.

    Args:
        path: .png or .svg.
        square: what the network sees.
        labels: islands (L, G, G), from `apm.glom.islands.island_labels`.
        settings: small print.
    """
    levels, grid = labels.shape[:2]
    tree = parse_tree(labels)
    cells = np.asarray(square.resize((grid, grid), Image.Resampling.BOX), dtype=np.float64) / 255  # (G, G, 3)
    figure = new_figure(1.7 * (levels + 1), 4.6)
    above, below = np.ravel(figure.subfigures(2, 1, height_ratios=(1.7, 2.9), squeeze=False))
    panels = above.subplots(1, levels + 1, squeeze=False)
    panels[0][0].imshow(square)
    for panel, level in zip(panels[0][1:], reversed(range(levels)), strict=True):
        panel.imshow(_painted(cells, labels[level]), interpolation="nearest")
        panel.set_title(f"level {level}: {labels[level].max() + 1} islands", fontsize=7)
    bare(panels.flat)
    axes = below.subplots()
    for island, x, under in _laid_out(tree):
        for end in under:
            axes.plot([x, end], [island.level, island.level - 1], color="0.6", linewidth=0.7, zorder=1)
        colour = np.mean([cells[place] for place in island.places], axis=0)
        size = 12 + 300 * len(island.places) / grid**2
        axes.scatter([x], [island.level], s=size, color=[colour], edgecolors="0.3", linewidths=0.5, zorder=2)
    axes.set_yticks(range(levels), [f"level {level}" for level in range(levels)], fontsize=7)
    axes.set_xticks([])
    axes.margins(0.05, 0.15)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    return save(figure, path, settings=f"{settings} · size of a node: its places; colour: their mean in the image")


def animate(path: Path, square: Image.Image, states: NDArray[np.float32]) -> Path:
    """Write all steps as a GIF: the image, then each level from the lowest up, coloured as in `draw_levels`."""
    colours = level_colours(states)
    frames = []
    for coloured in colours:  # (L, G, G, 3)
        panels = [square.resize((_PANEL, _PANEL), Image.Resampling.BICUBIC)]
        for level in coloured:
            cells = Image.fromarray((level * 255).round().astype(np.uint8))
            panels.append(cells.resize((_PANEL, _PANEL), Image.Resampling.NEAREST))
        frame = Image.new("RGB", (len(panels) * (_PANEL + 4) - 4, _PANEL), "white")
        for number, panel in enumerate(panels):
            frame.paste(panel, (number * (_PANEL + 4), 0))
        frames.append(frame)
    return save_animation(frames, path)


def write_show(
    model: GLOM,
    image: Image.Image,
    stem: Path,
    *,
    steps: int,
    threshold: float,
    settings: Mapping[str, Any],
) -> tuple[Path, ...]:
    """Watch the columns of one image and write what there is to see.

    Args:
        model: a trained network.
        image: mode RGB; its central square is used.
        stem: of the files: STEM-levels.png, STEM-tree.png, STEM-levels.gif, STEM-tree.json and STEM.npz, which holds
            ``embeddings`` (steps + 1, G, G, L, D) and ``islands`` (L, G, G).
        steps: of the columns.
        threshold: cosine from which on neighbours are of one island.
        settings: what the pictures and the JSON say of how they were made.

    Returns:
        The files.
    """
    states = watch(model, image, steps)
    labels = island_labels(states[-1], threshold)
    square = central_square(image, model.config.image_size)
    told = {**settings, "steps": steps, "threshold": threshold}
    record = {
        "settings": told,
        "grid": [model.config.grid] * 2,
        "islands": [int(level.max()) + 1 for level in labels],
        "tree": [island.as_json() for island in parse_tree(labels)],
    }
    words = " · ".join(f"{name} {value}" for name, value in told.items())

    def named(ending: str) -> Path:
        return stem.with_name(stem.name + ending)

    return (
        draw_levels(named("-levels.png"), square, states, settings=words),
        draw_tree(named("-tree.png"), square, labels, settings=words),
        animate(named("-levels.gif"), square, states),
        write_atomically(named("-tree.json"), (json.dumps(record) + "\n").encode()),
        save_arrays(named(".npz"), embeddings=states, islands=labels, settings=json.dumps(told)),
    )


def _painted(cells: NDArray[np.float64], labels: Labels) -> NDArray[np.float64]:
    """Paint each island in its mean colour, with its border: (24 G, 24 G, 3)."""
    from skimage.segmentation import mark_boundaries

    means = np.empty_like(cells)
    for number in np.unique(labels):
        means[labels == number] = cells[labels == number].mean(axis=0)
    block = np.ones((24, 24), dtype=np.int64)
    drawn: NDArray[np.float64] = mark_boundaries(np.kron(means, block[..., None]), np.kron(labels, block), (1, 1, 0))
    return drawn


def _laid_out(tree: tuple[Island, ...]) -> Iterator[tuple[Island, float, list[float]]]:
    """Yield each island, where it stands from left to right, and where its parts do: leaves evenly, wholes above."""
    leaves = 0

    def place(island: Island) -> Iterator[tuple[Island, float, list[float]]]:
        nonlocal leaves
        if not island.parts:
            yield island, float(leaves), []
            leaves += 1
            return
        ends = []
        for part in island.parts:
            below = list(place(part))
            ends.append(below[-1][1])  # the part itself comes last
            yield from below
        yield island, float(np.mean(ends)), ends

    for island in tree:
        yield from place(island)
