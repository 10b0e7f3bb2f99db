"""Plots of the records, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

STEP_FORMS = {
    "six products": "six products",
    "engine": "engine",
    "optimiser": "optimiser",
    "plain form": "plain form",
    "published": "published loop",  # records before this one have a shorter loop under another name: not shown
}

Record = Mapping[str, Any]


def plot(record: Record, folder: Path) -> Path | None:
    """Draw a record into ``folder``; returns the file, or None for a kind that has no plot."""
    draw = DRAWN.get(record["kind"])
    if draw is None:
        return None
    import matplotlib
    from matplotlib.figure import Figure

    # the same record gives the same bytes; text stays text
    with matplotlib.rc_context({"svg.hashsalt": "apm", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        draw(figure, record)
        for axes in figure.axes:
            axes.set_xmargin(0.06)
        path = folder / Path(record["file"]).with_suffix(".svg")
        figure.savefig(path, metadata={"Date": None})
    return path


def _step(figure: Any, record: Record) -> None:
    rows = [row for row in record["rows"][::-1] if row["name"] in STEP_FORMS]
    axes = figure.subplots()
    medians = [row["seconds"]["median"] for row in rows]
    low = [row["seconds"]["median"] - row["seconds"]["q1"] for row in rows]
    high = [row["seconds"]["q3"] - row["seconds"]["median"] for row in rows]
    names = [f"{STEP_FORMS[row['name']]} {row['precision']}" for row in rows]
    axes.barh(names, medians, xerr=(low, high), color="#4878a8", height=0.6)
    for precision, style in (("fp32", "-"), ("bf16", "--")):
        if precision not in record["summary"]:
            continue
        least = record["summary"][precision]["floor"]["seconds"]["median"]
        axes.axvline(least, color="#c44e52", linestyle=style, linewidth=1, label=f"floor {precision}")
    axes.set(xscale="log", xlabel="seconds per step of one student", xlim=(min(medians) / 2, 1.5 * max(medians)))
    figure.legend(loc="outside lower center", ncols=2)


def _steps(figure: Any, record: Record) -> None:
    axes = figure.subplots()
    _line(axes, record["rows"], "steps", "seconds", "one image")
    axes.set(xlabel="steps", ylabel="seconds")
    _from_zero(axes.xaxis, axes.yaxis)


def _grid(figure: Any, record: Record) -> None:
    axes = figure.subplots()
    for what, label in (("step", "one step"), ("features", "features, one pass")):
        _line(axes, [row for row in record["rows"] if row["what"] == what], "side", "seconds", label)
    axes.set(xlabel="side of the grid", ylabel="seconds", yscale="log")
    _sizes(axes, [row["side"] for row in record["rows"]])
    axes.legend()


def _patches(figure: Any, record: Record) -> None:
    axes = figure.subplots()
    names = {"engine": "step, engine", "plain": "step, plain form", "features": "features, one pass"}
    for name, label in names.items():
        _line(axes, record["rows"], "patches", name, label)
    axes.set(xlabel="patches queried", ylabel="seconds", yscale="log")
    _sizes(axes, [row["patches"] for row in record["rows"]])
    axes.legend()


def _batch(figure: Any, record: Record) -> None:
    axes = figure.subplots()
    _line(axes, record["rows"], "batch", "per_student", "one step")
    axes.set(xlabel="students side by side", ylabel="seconds per student")
    _sizes(axes, [row["batch"] for row in record["rows"]])
    _from_zero(axes.yaxis)


def _labels(figure: Any, record: Record) -> None:
    axes = figure.subplots()
    _line(axes, record["rows"], "labels", "seconds", "one answer")
    axes.plot(*_columns(record["rows"], "labels", "text_seconds"), "s--", label="text features, once")
    axes.set(xlabel="labels", ylabel="seconds", yscale="log")
    _sizes(axes, [row["labels"] for row in record["rows"]])
    axes.legend()


def _images(figure: Any, record: Record) -> None:
    left, right = figure.subplots(1, 2)
    left.plot(*_columns(record["rows"], "images", "images_per_second"), "o-")
    left.set(xlabel="images so far", ylabel="images/s", xscale="log")
    known = [row for row in record["rows"] if row["resident_bytes"] is not None]
    right.plot([row["images"] for row in known], [row["resident_bytes"] / 1e6 for row in known], "o-")
    right.set(xlabel="images so far", ylabel="memory of the process, MB", xscale="log")
    _from_zero(left.yaxis, right.yaxis)


def _processes(figure: Any, record: Record) -> None:
    axes = figure.subplots()
    _line(axes, record["rows"], "processes", "images_per_second", "")
    axes.set(xlabel="processes", ylabel="images/s")
    _sizes(axes, [row["processes"] for row in record["rows"]])
    _from_zero(axes.yaxis)


def _queries(figure: Any, record: Record) -> None:
    left, right = figure.subplots(1, 2)
    rows = record["rows"]
    left.plot(*_columns(rows, "queries", "agreement"), "o-", label="agrees with the teacher")
    counts, accuracy = _columns(rows, "queries", "accuracy")
    left.errorbar(counts, accuracy, yerr=[row["standard_error"] for row in rows], fmt="s-", capsize=2, label="accuracy")
    left.axhline(record["summary"]["teacher_accuracy"], color="grey", linestyle=":", label="teacher's accuracy")
    left.set(xlabel="locations a step", ylim=(-0.06, 1.06))
    _line(right, rows, "queries", "seconds", "")
    right.set(xlabel="locations a step", ylabel="seconds per image")
    for axes in (left, right):
        _sizes(axes, counts)
    _from_zero(right.yaxis)
    figure.legend(loc="outside lower center", ncols=3)


DRAWN: dict[str, Callable[[Any, Record], None]] = {
    "step": _step,
    "steps": _steps,
    "grid": _grid,
    "patches": _patches,
    "batch": _batch,
    "labels": _labels,
    "images": _images,
    "processes": _processes,
    "queries": _queries,
}


def _line(axes: Any, rows: Sequence[Record], x: str, y: str, label: str) -> None:
    """Medians of ``y`` over ``x``, with a band between the quartiles."""
    where = [row[x] for row in rows]
    axes.plot(where, [row[y]["median"] for row in rows], "o-", label=label)
    axes.fill_between(where, [row[y]["q1"] for row in rows], [row[y]["q3"] for row in rows], alpha=0.25)


def _sizes(axes: Any, values: Sequence[float]) -> None:
    """Make x logarithmic, with a tick at each of the values that was measured; where two are close, at the first."""
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value >= 1.5 * ticks[-1]:
            ticks.append(value)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()


def _from_zero(*which: Any) -> None:
    """Let axes begin at 0 and end above the largest value, so that no curve lies on the frame."""
    for axis in which:
        _, high = axis.get_data_interval()
        axis.axes.set(**{f"{axis.axis_name}lim": (0, 1.1 * high)})


def _columns(rows: Sequence[Record], x: str, y: str) -> tuple[list[float], list[float]]:
    return [row[x] for row in rows], [row[y] for row in rows]
