"""Figures and arrays on disk: PNG, SVG, GIF and npz, each with its settings in sight.

Nothing here touches pyplot or a screen, and every file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from apm.errors import UsageError
from apm.images.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

SUFFIXES = (".png", ".svg")
STYLE: dict[Any, Any] = {"svg.hashsalt": "apm", "svg.fonttype": "none", "font.size": 9, "text.usetex": False}
"""The same numbers give the same bytes; text stays text."""


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of `width` × `height` inches, laid out by constraints, with no window behind it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | os.PathLike[str], *, settings: str, dpi: int = 120) -> Path:
    """Write a figure as PNG or SVG, by the suffix of `path`, with its settings in small print below.

    Args:
        figure: from `new_figure`; it gains the line of settings, so it is saved once.
        path: where to; the folder is made when it is not there.
        settings: what a reader needs to make the same figure again: teacher, sizes, steps, seed.
        dpi: pixels an inch, of a PNG.

    Returns:
        The path.

    Raises:
        UsageError: another suffix than .png or .svg.
    """
    import matplotlib

    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f'"{path.name}" is neither .png nor .svg: figures are written as one of these.')
    from matplotlib.text import Text

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # a name in a script that the font lacks is drawn as boxes, and the picture is good all the same
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        columns = max(40, int(figure.get_figwidth() * 19))  # characters of this size in an inch
        figure.text(0.01, -0.01, textwrap.fill(settings, columns), fontsize=6, color="0.35", va="top", ha="left")
        numbers = _tick_labels(figure)
        for text in figure.findobj(Text):
            # a dollar in a label or a file's name is only a dollar; powers of ten along an axis are formulas
            text.set_parse_math(text in numbers)
        kind = path.suffix.lower()[1:]
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        return write_atomically(
            path,
            lambda file: figure.savefig(
                file, format=kind, dpi=dpi, metadata=metadata, bbox_inches="tight", pad_inches=0.08, facecolor="white"
            ),
        )


def _tick_labels(figure: Figure) -> set[Any]:
    """Labels along axes that matplotlib writes by itself; not those that were given, such as names of bars."""
    from matplotlib.ticker import FixedFormatter

    return {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        if not isinstance(axis.get_major_formatter(), FixedFormatter)
        for label in axis.get_ticklabels(which="both")
    }


def component_colours(
    features: Sequence[ArrayLike], *, basis: Sequence[ArrayLike] | None = None
) -> list[NDArray[np.float64]]:
    """Colour features by their first three principal components: one basis and one scale for all arrays.

    Args:
        features: arrays (…, D), D the same in all; finite.
        basis: the arrays that mean, components and scale are taken from; None for `features` themselves.

    Returns:
        For each array its colours (…, 3) in [0, 1]. 0.5 is the middle of the range between the 1st and the 99th
        percentile of a component; what lies outside is cut off. A component without spread is 0.5 everywhere.
    """
    given = [np.asarray(one, dtype=np.float64) for one in features]
    source = given if basis is None else [np.asarray(one, dtype=np.float64) for one in basis]
    rows = np.concatenate([one.reshape(-1, one.shape[-1]) for one in source])
    centre = rows.mean(axis=0)
    spread = rows - centre
    _, values, vectors = np.linalg.svd(spread.T @ spread, hermitian=True)
    axes = vectors[:3]  # (≤ 3, D)
    # the sign of a component is arbitrary: its largest entry is made positive
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
    low, high = np.percentile(spread @ axes.T, (1, 99), axis=0)
    noise = 1e-7 * max(float(np.abs(rows).max(initial=0.0)), 1e-30)
    flat = ((high - low) <= noise) | (values[: len(axes)] <= 1e-12 * max(float(values[0]), 1e-300))
    middle, width = (low + high) / 2, np.where(flat, 1.0, high - low)
    coloured = []
    for one in given:
        components = np.where(flat, 0.0, ((one - centre) @ axes.T - middle) / width) + 0.5
        padded = np.full((*one.shape[:-1], 3), 0.5)
        padded[..., : len(axes)] = components
        coloured.append(padded.clip(0, 1))
    return coloured


def bare(pictures: Iterable[Any]) -> None:
    """Leave some axes without numbers along their sides."""
    for axes in pictures:
        axes.set(xticks=[], yticks=[])


def output_stem(path: str | os.PathLike[str]) -> str:
    """Name the output for an image, without suffix: readable, safe on any file system, and of this file alone.

    A hash of the absolute path keeps apart files of the same name from different folders, in one run and over several.

    Returns:
        At most 60 ASCII letters, digits and ``._-``, beginning with a letter, digit or ``_``.
    """
    path = Path(path)
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", path.stem).lstrip(".-")[:48] or "image"
    return f"{readable}-{hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:8]}"


def save_animation(frames: Sequence[Image.Image], path: str | os.PathLike[str]) -> Path:
    """Write frames of one size as an endless GIF; the last one stays four times as long."""
    first, *rest = frames
    durations = [400] * len(rest) + [1600]  # milliseconds
    return write_atomically(
        path,
        lambda file: first.save(
            file, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, disposal=2
        ),
    )


def save_arrays(path: str | os.PathLike[str], **arrays: ArrayLike) -> Path:
    """Write arrays, by name, as a compressed npz; strings become arrays of text, nothing needs pickling to read."""
    plain = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in plain.items():
        if array.dtype.hasobject:
            raise TypeError(f"{name} is not numbers or text: its dtype is {array.dtype}.")
    return write_atomically(path, lambda file: np.savez_compressed(file, **plain))  # type: ignore[arg-type]
