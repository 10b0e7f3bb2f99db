"""Paired scores of label maps over resampled photographs, and their tables, for the study `segmentation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..corruptions import CORRUPTIONS
from .masked import RESAMPLES, by_category, mean_iou, pixel_accuracy, resampled, tallied, with_interval
from .rows import Row
from .study import Record, markdown

OURS, GUIDED = "field, views", "field, guided"
SOURCES = {
    "grid": "the teacher's grid at its default size, its features upsampled bilinearly",
    "grid, probabilities": "the same grid, classified first, its probabilities upsampled bilinearly",
    "grid, filtered": "*grid*, its probabilities refined by a joint bilateral filter with the image's colours",
    "grid, as fine": "its grid at the input size that makes its cells as large as the average view's",
    "grid, same pixels": "its grid at the input size that has as many pixels as all views together",
    "views' average": "the mean of the views' cells that cover each of the student's locations, without a student",
    "views, bilinear": "the mean of the views at each location that is read, each upsampled bilinearly",
    "views, probabilities": "the same, with each view classified first",
    "views, filtered": "*views, bilinear*, refined by the joint bilateral filter",
    OURS: "`apm segment`: a student fitted to the grids of all views",
    GUIDED: "the same with `--guide rgb`",
    "field, filtered": f"*{OURS}*, refined by the joint bilateral filter",
}
FILTERED = {"grid, filtered": "grid", "views, filtered": "views, bilinear", "field, filtered": OURS}
BASELINES = tuple(name for name in SOURCES if not name.startswith("field"))
CLEAN, COMPOSITES, CORRUPTED = "clean", "composites", "corrupted"
GIVEN = {"present": "those there", "all": "all"}
"""Which labels are given."""


def grouped(rows: Sequence[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by group and condition, in the order of the photographs; of a group the photographs that have all of it."""
    by: dict[str, dict[str, Row]] = {}
    for row in rows:
        by.setdefault(row["condition"], {})[row["name"]] = row
    corruptions = [name for name in by if name in CORRUPTIONS]
    groups = {name: [name] for name in (CLEAN, COMPOSITES) if name in by} | (
        {CORRUPTED: corruptions} if corruptions else {}
    )
    found = {}
    for group, names in groups.items():
        complete = [one for one in by[names[0]] if all(one in by[name] for name in names)]
        if complete:
            found[group] = {name: [by[name][one] for one in complete] for name in names}
    return found


def scores(conditions: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Mean IoU and pixel accuracy of every way, means over the conditions, and how far our two are above each.

    Intervals are of resampled photographs, the same ones for both of a pair and for all conditions.
    """
    n = len(next(iter(conditions.values())))
    weights = resampled(n)
    found: dict[str, Any] = {"n": n, "conditions": list(conditions)}
    for given in GIVEN:
        samples: dict[str, dict[str, NDArray[np.float64]]] = {}
        for name in SOURCES:
            sums = [
                np.tensordot(weights, tallied([row["counts"][given][name] for row in rows]), axes=(1, 0))
                for rows in conditions.values()
            ]  # (R, K, 3) each
            samples[name] = {
                "miou": np.mean([mean_iou(one) for one in sums], axis=0),
                "accuracy": np.mean([pixel_accuracy(one) for one in sums], axis=0),
            }
            if all(row["pasted"] for rows in conditions.values() for row in rows):
                objects = np.array([object_iou(row, given, name) for rows in conditions.values() for row in rows])
                samples[name]["object"] = weights @ objects / n
        found[given] = {
            name: {
                of: {
                    **with_interval(values),
                    "ours_above": with_interval(samples[OURS][of] - values),
                    "guided_above": with_interval(samples[GUIDED][of] - values),
                }
                for of, values in mine.items()
            }
            for name, mine in samples.items()
        }
    return found


def object_iou(row: Row, given: str, name: str) -> float:
    """IoU of the pasted object's category, which is nowhere else on the photograph."""
    right, said, there = row["counts"][given][name][str(row["pasted"])]
    return float(right / (said + there - right))


def per_category(rows: Sequence[Row], names: Mapping[int, str]) -> dict[str, Any]:
    """IoU of each category on the clean photographs with the labels that are there, by ours and by the grid."""
    found: dict[str, Any] = {}
    for name in (OURS, GUIDED, "grid", "views, bilinear"):
        for category, one in by_category([row["counts"]["present"][name] for row in rows]).items():
            row = found.setdefault(names[int(category)], {"images": one["images"]})
            row[name] = one["iou"]
    return found


def table(record: Record) -> str:
    """Print a record as markdown."""
    settings = record["settings"]
    parts = []
    for group, found in record["groups"].items():
        parts.append(f"**{_title(group, found, settings)}**")
        parts.append(_scores_table(found))
    parts.append("\n".join(f"- *{name}*: {meaning}" for name, meaning in SOURCES.items()))
    if record["categories"]:
        parts.append(_categories_table(record["categories"]))
    sizes = "; ".join(f"{name} {size}" for name, size in record["teacher_sizes"].items())
    parts.append(
        f"Input size of the teacher's grids in pixels: {sizes}. {record['tiles']:.1f} tiles on average. The filter's "
        f"standard deviations: {settings['filter']['reach']} of the shorter side in space, "
        f"{settings['filter']['spread']} in colour."
    )
    parts.append(
        f"<sub>`{record['command']}` · {record['date']} · teacher `{record['teacher']}`, {record['labels']} labels · "
        f"{settings['views']} views · {settings['preset']} student, {settings['locations']} × {settings['locations']} "
        f"locations, {settings['steps']} steps, lr {settings['lr']:g}, {settings['precision']} · read at "
        f"{settings['places']} locations along the shorter side · regions below {settings['min_area']} of the image "
        f"merged into neighbours · seed {settings['seed']} · 95 % intervals from {RESAMPLES:,} paired bootstrap "
        "resamples of the photographs</sub>"
    )
    return "\n\n".join(parts)


def _title(group: str, found: Record, settings: Mapping[str, Any]) -> str:
    if group == CORRUPTED:
        return (
            f"{found['n']} corrupted photographs, mean of {', '.join(found['conditions'])} at level {settings['level']}"
        )
    if group == COMPOSITES:
        return f"{found['n']} composites: an object, cut out along its outline, pasted on another photograph"
    return f"{found['n']} {group} photographs"


def _scores_table(found: Record) -> str:
    columns = {
        "mIoU": ("present", "miou"),
        "pixel accuracy": ("present", "accuracy"),
        "mIoU, all labels": ("all", "miou"),
    }
    if "object" in found["present"][OURS]:
        columns["IoU of the object"] = ("present", "object")
    titles = ["map", *(title for of in columns for title in (of, f"gain of {OURS}", f"gain of {GUIDED}"))]
    rows = []
    for name in SOURCES:
        row = [name]
        for given, of in columns.values():
            one = found[given][name][of]
            row.append(f"{100 * one['value']:.1f}")
            row.append("–" if name == OURS else _interval(one["ours_above"]))
            row.append("–" if name == GUIDED else _interval(one["guided_above"]))
        rows.append(row)
    return markdown(titles, rows)


def _interval(one: Mapping[str, float]) -> str:
    return f"{100 * one['value']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"


def _categories_table(categories: Mapping[str, Mapping[str, float]]) -> str:
    names = ("grid", "views, bilinear", OURS, GUIDED)
    shown = sorted(categories.items(), key=lambda one: (-one[1]["images"], one[0]))
    rows = [(name, one["images"], *(f"{100 * one[of]:.0f}" for of in names)) for name, one in shown]
    found = markdown(("category", "photographs", *names), rows)
    summary = "IoU per category on the clean photographs, among the labels present"
    return f"<details><summary>{summary}</summary>\n\n{found}\n\n</details>"
