"""One picture an image: where the answer's labels are, by the student's field and by the teacher's grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from apm.errors import UsageError
from apm.figures.base import bare, new_figure, output_stem, save, save_arrays
from apm.images.load import central_square
from apm.images.paths import printable
from apm.student.position import dense_locations
from apm.test_time.grid_views import GRID_SIDES, TOKEN_SIDES
from apm.test_time.label_maps import LabelMaps, field_maps, label_maps
from apm.test_time.view_numbers import number_of

if TYPE_CHECKING:
    from apm.classifier import Classifier, Perception

SHOWN = 3
"""Labels that get a map: the student's best ones."""
WIDEST = 26
"""Characters of a label that are drawn."""


def write_explanation(
    perception: Perception, classifier: Classifier, folder: Path, *, size: int = 112
) -> tuple[Path, Path]:
    """Write picture and arrays of one image, under names that belong to this file alone.

    Args:
        perception: of a classifier that distils the grid.
        classifier: that classifier.
        folder: where to; made if need be.
        size: places a side at which the field is asked.

    Returns:
        The PNG and the npz.
    """
    if perception.grid is None:
        raise UsageError(f"The teacher {classifier.teacher.name} has no grid, and so nothing to explain with.")
    head, result, answer = classifier.head, perception.result, perception.answer
    student, teacher = (head.probabilities(token)[0].cpu() for token in (result.tokens, perception.token[None]))
    chosen = student.topk(min(SHOWN, len(student))).indices.tolist()
    cells = classifier.student_config.grid
    maps = field_maps(lambda rows, cols: result.features(rows, cols)[0], cells, size, head, chosen)
    teacher_maps = label_maps(perception.grid, head, chosen)
    attention = None
    if classifier.student_config.readout == "query":
        attention = result.attention(*dense_locations(cells, size))[0].unflatten(-1, (size, size)).cpu()  # (heads, …)
    settings = _settings(perception, classifier)
    stem = output_stem(answer.path) if answer.path is not None else "image"
    order = student.topk(min(classifier.top_k, len(student))).indices.tolist()
    picture = draw(
        folder / f"{stem}.png",
        central_square(perception.image, 448),
        maps=maps,
        teacher_maps=teacher_maps,
        attention=None if attention is None else attention.mean(dim=0).numpy(),
        ranking=[(printable(head.labels[n]), float(student[n]), float(teacher[n])) for n in order],
        heading=f"{printable(answer.path.name) if answer.path is not None else 'image'}: "
        f"{printable(head.labels[order[0]])} ({student[order[0]]:.0%})",
        settings=" · ".join(f"{name} {value}" for name, value in settings.items() if name != "image"),
    )
    arrays: dict[str, ArrayLike] = {
        "settings": json.dumps(settings),
        "labels": list(maps.labels),
        "maps": maps.probabilities.numpy(),
        "log_odds": maps.log_odds.numpy(),
        "best": maps.best.numpy(),
        "teacher_maps": teacher_maps.probabilities.numpy(),
        "teacher_grid": perception.grid.cpu().numpy(),
        "all_labels": list(head.labels),
        "probabilities": student.numpy(),
        "teacher_probabilities": teacher.numpy(),
    }
    if attention is not None:
        arrays["attention"] = attention.numpy()
    return picture, save_arrays(folder / f"{stem}.npz", **arrays)


def _settings(perception: Perception, classifier: Classifier) -> dict[str, Any]:
    """What was explained, with what; plain JSON values."""
    head, result, path = classifier.head, perception.result, perception.answer.path
    cells, config = classifier.student_config.grid, classifier.adapt_config
    return {
        "image": None if path is None else printable(path),
        "teacher": classifier.teacher.identity,
        "labels": f"{len(head.labels)} ({classifier.label_source})",
        "templates": len(head.templates),
        "student": f"{classifier.student.preset}, {cells} × {cells} locations",
        "distil": config.distil,
        "guide": classifier.student.guide,
        "grid_views": classifier.student.grid_views,
        "nothing in the field is finer than": _finest_in_words(perception, classifier),
        "token's loss": f"soft, temperature {config.temperature:g}" if config.loss == "soft" else config.loss,
        "rgb_weight": config.rgb_weight,
        "agree": config.agree,
        "steps": int(result.steps[0]),
        "lr": config.lr,
        "precision": result.precision,
        "seed": config.seed,
        "loss": float(f"{float(result.final_losses[0]):.4g}"),
        "map": "softmax over all labels of logit scale × cosine of the feature at a place with each label's text",
    }


def _finest_in_words(perception: Perception, classifier: Classifier) -> str:
    """How fine the field can be: with colours in its queries it can also turn where these do."""
    beside = "" if classifier.student.guide == "none" else ", but for edges of the image's colours"
    return f"1/{_finest(perception, classifier)} of the side{beside}"


def _finest(perception: Perception, classifier: Classifier) -> int:
    """Cells along a side of the finest target: those of the most zoomed view, or the student's own locations."""
    assert perception.grid is not None
    views = classifier.student.grid_views
    cells = max(perception.grid.shape[:2]) if isinstance(views, int) else 1
    count, by_token = number_of(views)
    zoomed = (TOKEN_SIDES if by_token else GRID_SIDES)[0] if count > 1 else 1.0
    return min(classifier.student_config.grid, round(cells / zoomed))


def draw(
    path: Path,
    square: Image.Image,
    *,
    maps: LabelMaps,
    teacher_maps: LabelMaps,
    attention: ArrayLike | None,
    ranking: Sequence[tuple[str, float, float]],
    heading: str,
    settings: str,
) -> Path:
    """Draw maps, attention and answer of one image.

    Args:
        path: .png or .svg.
        square: what the student saw.
        maps: of the K labels shown, in the student's field.
        teacher_maps: of the same labels, in the teacher's grid.
        attention: (size, size) of the object query, or None without one.
        ranking: label, student's and teacher's probability; the best first.
        heading: above the picture; one line.
        settings: small print.
    """
    count = len(maps.labels)
    figure = new_figure(2.3 * (count + 2), 5.4)
    figure.suptitle(_short(heading, 30 * (count + 2)), fontsize=9)
    cells = figure.subplot_mosaic(
        [
            ["square", *(f"field {number}" for number in range(count)), "answer"],
            ["attention", *(f"grid {number}" for number in range(count)), "answer"],
        ]
    )
    cells["square"].imshow(square)
    cells["square"].set_title("what the student sees", fontsize=8)
    field, grid = maps.probabilities.numpy(), teacher_maps.probabilities.numpy()
    top = max(float(field.max()), float(grid.max()))  # one scale: brightness can be compared between maps
    drawn = [cells["square"], cells["attention"]]
    for what, values, whose in (("field", field, "student's field"), ("grid", grid, "teacher's grid")):
        for number, (label, one) in enumerate(zip(maps.labels, values, strict=True)):
            cell = cells[f"{what} {number}"]
            shown = _overlay(cell, square, one, top, "magma")
            sizes = f"{one.shape[0]} × {one.shape[1]}"
            cell.set_title(f"{_short(printable(label), WIDEST)}\n{whose} {sizes}, max {one.max():.2f}", fontsize=8)
            drawn.append(cell)
    bar = figure.colorbar(shown, ax=drawn, location="bottom", shrink=0.4, aspect=40, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.set_label("probability of the label at the place", fontsize=7)
    _attention(cells["attention"], square, attention)
    bare(drawn)
    _bars(cells["answer"], ranking)
    return save(figure, path, settings=settings)


def _attention(cell: Any, square: Image.Image, attention: ArrayLike | None) -> None:
    if attention is None:
        cell.axis("off")
        return
    values = np.asarray(attention)
    _overlay(cell, square, values, float(values.max()), "viridis")
    even = values * values.size  # an own scale alone would make much of nearly even attention
    cell.set_title(
        f"attention of the object query, mean of\nheads: {even.min():.2f} to {even.max():.2f} of an even share",
        fontsize=8,
    )


def _overlay(cell: Any, square: Image.Image, values: NDArray[Any], top: float, colours: str) -> Any:
    grey = np.asarray(square.convert("L").convert("RGB"), dtype=float) / 255
    cell.imshow(0.3 + 0.7 * grey)
    extent = (0, square.width, square.height, 0)
    return cell.imshow(
        values, extent=extent, cmap=colours, vmin=0, vmax=max(top, 1e-12), alpha=0.6, interpolation="nearest"
    )


def _bars(axes: Any, ranking: Sequence[tuple[str, float, float]]) -> None:
    places = np.arange(len(ranking))[::-1]
    axes.barh(places + 0.19, [student for _, student, _ in ranking], 0.36, color="#1b6ca8", label="student")
    axes.barh(places - 0.19, [teacher for _, _, teacher in ranking], 0.36, color="#bbbbbb", label="teacher")
    axes.set_yticks(places, [_short(label, WIDEST) for label, _, _ in ranking], fontsize=7)
    axes.set_xlim(0, 1)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title("the answer", fontsize=8)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
