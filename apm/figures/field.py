"""What a trained student makes of images, on disk: its field at any locations, and walks between two images."""

from __future__ import annotations

import csv
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apm.errors import UsageError
from apm.figures import base as figures
from apm.images.files import write_atomically
from apm.images.load import central_square
from apm.images.paths import printable
from apm.pretrain.student import CHUNK, Student, walk
from apm.student.position import dense_locations, grid_locations

LIMIT = 8192
"""Largest side of a picture that is asked for: 67 million queries."""


def read_locations(path: Path, grid: int) -> tuple[Tensor, Tensor]:
    """Read a CSV file with columns ``y`` and ``x``, fractions of the image's central square from its top left corner.

    Returns:
        Rows and columns, each (Q,) float64, in cells of a grid of `grid` x `grid`.

    Raises:
        UsageError: no such file, no such columns, no rows, or a value that is no number in [0, 1]; the line is named.
    """
    places: list[tuple[float, float]] = []
    shown = printable(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"y", "x"} <= set(reader.fieldnames or ()):
                raise UsageError(f"{shown} needs a first line with the columns y and x, fractions of the square.")
            for row in reader:
                try:
                    place = float(row["y"]), float(row["x"])
                except (TypeError, ValueError):
                    raise UsageError(
                        f"{shown}, line {reader.line_num}: y and x must be numbers: {row['y']}, {row['x']}."
                    ) from None
                if not (0 <= place[0] <= 1 and 0 <= place[1] <= 1):
                    raise UsageError(
                        f"{shown}, line {reader.line_num}: y = {place[0]:g}, x = {place[1]:g} is outside of the "
                        "square; both must be from 0 to 1."
                    )
                places.append(place)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{shown} cannot be read as CSV ({error}).") from error
    if not places:
        raise UsageError(f"{shown} holds no locations.")
    y, x = torch.tensor(places, dtype=torch.float64).unbind(1)
    return y * grid - 0.5, x * grid - 0.5


def ordered(count: int, order: str, seed: int) -> NDArray[np.int64]:
    """The order in which `count` queries are asked: ``reading`` or ``random``."""
    return np.arange(count) if order == "reading" else np.random.default_rng(seed).permutation(count)


class _Palette:
    """Colours of features by the components of some of them (n, D), found once."""

    def __init__(self, features: NDArray[np.float32]) -> None:
        self.mean = features.mean(0)
        self.axes = np.linalg.svd(features - self.mean, full_matrices=False)[2][:3].T  # (D, 3)
        self.basis = (features - self.mean) @ self.axes

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Features (q, D) -> colours (q, 3)."""
        return _bytes(figures.component_colours([(features - self.mean) @ self.axes], basis=[self.basis])[0])


def write_field(
    student: Student,
    image: Image.Image,
    stem: Path,
    *,
    settings: str,
    size: int = 224,
    locations: tuple[Tensor, Tensor] | None = None,
    order: str = "reading",
    seed: int = 0,
    chunk: int = CHUNK,
) -> tuple[Path, Path]:
    """Query the field of one image and write ``stem.npz`` and ``stem.png``.

    The arrays are ``rows`` and ``cols`` (Q,) in grid cells, ``features`` (Q, D) and ``colours`` (Q, 3), float32, in the
    order of the queries. They go to the disk chunk by chunk: beside the picture, memory does not grow with Q.

    Args:
        student: the trained student.
        image: RGB; its central square is what the student sees.
        stem: path of both files, without suffix.
        settings: for the small print.
        size: side of the picture in pixels, one query each; not used with `locations`.
        locations: rows and columns (Q,) in grid cells.
        order: of the queries, ``reading`` or ``random``. Changes the order in the file, and no answer.
        seed: of the random order.
        chunk: queries answered at once.

    Returns:
        The two files.
    """
    rows, cols = dense_locations(student.config.grid, size) if locations is None else locations
    asked = torch.from_numpy(ordered(len(rows), order, seed))
    rows, cols = rows[asked], cols[asked]
    column = student.column(image)
    palette = _Palette(student.field(column, *grid_locations(student.config.grid))[0][0].numpy())
    seen = np.empty((len(rows), 3), np.uint8)
    shown = np.empty((len(rows), 3), np.uint8)
    with tempfile.TemporaryDirectory(dir=_made(stem.parent), prefix=".apm-") as folder:
        parts = {name: Path(folder, name) for name in ("features", "colours")}
        with parts["features"].open("wb") as features_file, parts["colours"].open("wb") as colours_file:
            for part, features, colours in student.answers(column, rows, cols, chunk=chunk):
                features_file.write(features[0].numpy().tobytes())
                colours_file.write(colours[0].numpy().tobytes())
                where = asked[part].numpy()
                seen[where] = _bytes(colours[0].numpy())
                shown[where] = palette(features[0].numpy())
        wide = {"features": student.config.dim, "colours": 3}
        arrays = _write_arrays(stem.with_name(stem.name + ".npz"), rows, cols, parts, wide)
    picture = stem.with_name(stem.name + ".png")
    if locations is None:
        _draw_field(student, image, seen.reshape(size, size, 3), shown.reshape(size, size, 3), picture, settings)
    else:
        back = np.argsort(asked.numpy())
        _draw_points(student, image, rows.numpy()[back], cols.numpy()[back], seen, shown, picture, settings)
    return arrays, picture


def _write_arrays(path: Path, rows: Tensor, cols: Tensor, parts: dict[str, Path], wide: dict[str, int]) -> Path:
    """Write an npz of locations (Q,), and of files that hold the float32 numbers (Q, ``wide``) of an array each."""

    def write(file: BinaryIO) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, values in (("rows", rows), ("cols", cols)):
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, values.double().numpy())
            for name, part in parts.items():
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(rows), wide[name])}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member, part.open("rb") as source:
                    np.lib.format.write_array_header_1_0(member, header)
                    shutil.copyfileobj(source, member, 1 << 20)

    return write_atomically(path, write)


def write_walk(
    student: Student,
    images: Sequence[Image.Image],
    folder: Path,
    *,
    frames: int,
    size: int,
    settings: str,
    names: Sequence[str],
) -> tuple[Path, Path, Path]:
    """Walk from the first image's trigger column to the second's; write ``walk.npz``, ``walk.gif`` and ``walk.png``.

    The arrays: ``columns`` (F, N), ``features`` (F, N, D) at the student's own locations, ``colours``
    (F, size, size, 3), float32.

    Returns:
        The three files.
    """
    first, last = (student.column(image) for image in images)
    columns = walk(first, last, frames)
    grid = student.config.grid
    own = np.stack([student.field(column[None], *grid_locations(grid))[0][0].numpy() for column in columns])
    places, palette = dense_locations(grid, size), _Palette(own.reshape(-1, student.config.dim))
    colours = np.empty((frames, size, size, 3), np.float32)
    shown = np.empty((frames, size, size, 3), np.uint8)
    for number, column in enumerate(columns):
        for part, features, seen in student.answers(column[None], *places):
            colours[number].reshape(-1, 3)[part] = seen[0].numpy()
            shown[number].reshape(-1, 3)[part] = palette(features[0].numpy())
    arrays = figures.save_arrays(folder / "walk.npz", columns=columns.cpu().numpy(), features=own, colours=colours)
    pictures = [
        Image.fromarray(np.concatenate((_bytes(one), np.full((size, 4, 3), 255, np.uint8), two), axis=1))
        for one, two in zip(colours, shown, strict=True)
    ]
    animation = figures.save_animation(pictures, folder / "walk.gif")
    strip = folder / "walk.png"
    _draw_walk(images, names, colours.clip(0, 1), shown, strip, settings)
    return arrays, animation, strip


def _draw_walk(
    images: Sequence[Image.Image],
    names: Sequence[str],
    colours: NDArray[np.float32],
    shown: NDArray[np.uint8],
    path: Path,
    settings: str,
) -> None:
    count = min(len(colours), 9)  # a strip of more could not be read
    numbers = np.round(np.linspace(0, len(colours) - 1, count)).astype(int)
    figure = figures.new_figure(1.15 * (count + 2), 2.6)
    axes = figure.subplots(2, count + 2, squeeze=False)
    for column, image, name in ((0, images[0], names[0]), (count + 1, images[1], names[1])):
        _show(axes[0, column], central_square(image, 224), name)
        axes[1, column].axis("off")
    for column, number in enumerate(numbers, start=1):
        _show(axes[0, column], colours[number], f"{number / (len(colours) - 1):.2f}")
        _show(axes[1, column], shown[number], "")
    axes[0, 1].set_ylabel("colours", fontsize=8)
    axes[1, 1].set_ylabel("features", fontsize=8)
    figures.save(figure, path, settings=settings)


def _draw_field(
    student: Student,
    image: Image.Image,
    seen: NDArray[np.uint8],
    shown: NDArray[np.uint8],
    path: Path,
    settings: str,
) -> None:
    figure = figures.new_figure(9.6, 2.7)
    axes = figure.subplots(1, 4)
    grid = student.config.grid
    column = student.column(image).reshape(grid, grid).cpu().numpy()
    _show(axes[0], central_square(image, 448), "photograph (central square)")
    _show(axes[1], column, f"trigger column, {grid}×{grid} numbers", cmap="gray")
    _show(axes[2], seen, f"colours, {len(seen)}×{len(seen)} queries")
    _show(axes[3], shown, "features, 3 components")
    figures.save(figure, path, settings=settings)


def _draw_points(
    student: Student,
    image: Image.Image,
    rows: NDArray[np.float64],
    cols: NDArray[np.float64],
    seen: NDArray[np.uint8],
    shown: NDArray[np.uint8],
    path: Path,
    settings: str,
) -> None:
    figure = figures.new_figure(7.2, 3.7)
    axes = figure.subplots(1, 2)
    cell = 448 / student.config.grid
    for axis, colours, title in ((axes[0], seen, "colours"), (axes[1], shown, "features, 3 components")):
        _show(axis, central_square(image, 448), f"{title} at {len(rows):,} locations")
        x, y = (cols + 0.5) * cell - 0.5, (rows + 0.5) * cell - 0.5
        axis.scatter(x, y, c=colours / 255.0, s=36, edgecolors="white", linewidths=0.8)
        axis.set(xlim=(-0.5, 447.5), ylim=(447.5, -0.5))
    figures.save(figure, path, settings=settings)


def _show(axis: Any, picture: Any, title: str, **options: Any) -> None:
    axis.imshow(picture, interpolation="nearest", **options)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)


def _bytes(colours: NDArray[Any]) -> NDArray[np.uint8]:
    return np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
