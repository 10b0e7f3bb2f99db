"""How the student's cost grows: with the steps, the grid, the locations read, and the students side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from apm.student.field import SavedField
from apm.student.position import dense_locations, grid_locations

from ..studies.study import numbers
from .kind import Kind, some
from .options import Options, loaded_engine, plain_step
from .plots import at_sizes, band, column, curves, from_zero
from .profile import step_flops
from .tables import shown
from .timing import Work, interleaved, repeated, spread

WHAT = {"step": "a step of a student with this grid", "features": "features read at so many points"}
OF_PATCHES = {"engine": "step, engine", "plain": "step, plain form", "features": "features, one pass"}


def sweep_steps(options: Options, steps: Sequence[int]) -> dict[str, Any]:
    """Seconds of one image against the number of steps: reset, K steps, the last readout."""
    engine = loaded_engine(options.config, options.chosen_precision, options.device)

    def adapt(count: int) -> None:
        engine.reset()
        engine.run(count)

    engine.run(1)
    works = {str(count): partial(adapt, count) for count in steps}
    times = interleaved(works, options.device, options.rounds, warmup=0)
    rows = [
        {"steps": count, "seconds": spread(found), "per_step": spread([value / count for value in found])}
        for count, found in zip(steps, times.values(), strict=True)
    ]
    return options.found(rows, precision=options.chosen_precision)


def sweep_grid(options: Options, grids: Sequence[int], readouts: Sequence[int]) -> dict[str, Any]:
    """Seconds against the side of a grid: of a step of a student with that grid; of reading features at its points.

    A student's image has as many patches as its grid has cells, so its column and first layer grow as well. Features
    are read from one adapted student of the usual grid, at side × side points between and on its cells.
    """
    config, precision = options.config, options.chosen_precision
    rows: list[dict[str, Any]] = []
    for side in grids:
        other = replace(config, image_size=side * config.patch_size)
        engine = loaded_engine(other, precision, options.device)
        times = spread(repeated(engine.advance, options.device, options.rounds))
        rows.append({"what": "step", "side": side, "locations": side**2, "seconds": times, "flops": step_flops(other)})
        del engine
    field = _field(options)
    works = {str(side): partial(field.features, *dense_locations(config.grid, side)) for side in readouts}
    times_of = interleaved(works, options.device, options.rounds, warmup=0)
    rows += [
        {"what": "features", "side": side, "locations": side**2, "seconds": spread(times_of[str(side)])}
        for side in readouts
    ]
    return options.found(rows, precision=precision)


def sweep_patches(options: Options) -> dict[str, Any]:
    """Seconds against the number of patches that are queried: a step that reads only so many, and features of them.

    Beside the engine the plain form with autograd, which reads the same locations.
    """
    config = options.config
    field, rows = _field(options), []
    all_rows, all_cols = grid_locations(config.grid)
    for count in [4**power for power in range(20) if 4**power <= config.cells]:
        where = torch.linspace(0, config.cells - 1, count).long()
        places = all_rows[where], all_cols[where]
        engine = loaded_engine(config, options.chosen_precision, options.device, queries=count)
        engine.run(1)  # draws the locations
        works: dict[str, Work] = {
            "engine": engine.advance,
            "plain": plain_step(config, options.device, *places),
            "features": partial(field.features, *places),
        }
        times = interleaved(works, options.device, options.rounds)
        rows.append({"patches": count, **{name: spread(values) for name, values in times.items()}})
        del engine
    return options.found(rows, precision=options.chosen_precision)


def sweep_batch(options: Options, batches: Sequence[int]) -> dict[str, Any]:
    """Seconds of a step and images a second (20 steps) against the number of students side by side."""
    rows = []
    for batch in batches:
        engine = loaded_engine(options.config, options.chosen_precision, options.device, batch=batch)
        times = repeated(engine.advance, options.device, options.rounds)
        rows.append(
            {
                "batch": batch,
                "seconds": spread(times),
                "per_student": spread([value / batch for value in times]),
                "images_per_second_20_steps": spread([batch / (20 * value) for value in times]),
            }
        )
        del engine
    return options.found(rows, precision=options.chosen_precision)


def _field(options: Options) -> SavedField:
    engine = loaded_engine(options.config, "fp32", options.device)
    engine.run(1)
    return engine.fold(1)


def _plot_steps(figure: Any, record: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    band(axes, record["rows"], "steps", "seconds", "one image")
    axes.set(xlabel="steps", ylabel="seconds")
    from_zero(axes.xaxis, axes.yaxis)


def _plot_grid(figure: Any, record: Mapping[str, Any]) -> None:
    axes = figure.subplots()
    for what, label in (("step", "one step"), ("features", "features, one pass")):
        band(axes, [row for row in record["rows"] if row["what"] == what], "side", "seconds", label)
    axes.set(xlabel="side of the grid", ylabel="seconds", yscale="log")
    at_sizes(axes, column(record["rows"], "side"))
    axes.legend()


STEPS = Kind(
    name="steps",
    question="against the number of steps",
    title="Time against steps",
    measure=lambda given: sweep_steps(Options.of(given), some(given, (1, 2, 5, 10, 25, 50))),
    table=shown({"steps": "steps", "one image": "seconds", "per step": "per_step"}, "Products in {precision}."),
    plot=_plot_steps,
    rounds=3,
)
GRID = Kind(
    name="grid",
    question="against the side of the grid, trained and read",
    title="Time against the side of the grid",
    measure=lambda given: sweep_grid(
        Options.of(given), some(given, (7, 14, 16, 28, 32, 56)), some(given, (7, 14, 28, 56, 112, 224))
    ),
    table=shown(
        {
            "what": lambda row: WHAT[row["what"]],
            "grid": lambda row: f"{row['side']} × {row['side']}",
            "locations": "locations",
            "time": "seconds",
        },
        "Products in {precision}. Features are read in fp32.",
    ),
    plot=_plot_grid,
    rounds=3,
)
PATCHES = Kind(
    name="patches",
    question="against the number of patches queried",
    title="Time against the number of patches",
    measure=lambda given: sweep_patches(Options.of(given)),
    table=shown(
        {"patches queried": "patches", **{label: key for key, label in OF_PATCHES.items()}},
        "Products in {precision}. The plain form and the features are fp32.",
    ),
    plot=curves("patches", OF_PATCHES, xlabel="patches queried", log=True),
)
BATCH = Kind(
    name="batch",
    question="against the students side by side",
    title="Time against students side by side",
    arguments=lambda parser: parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8], help="1,2,4"),
    measure=lambda given: sweep_batch(Options.of(given), some(given, given.batches)),
    table=shown(
        {
            "students side by side": "batch",
            "a step of all": "seconds",
            "per student": "per_student",
            "images/s at 20 steps": lambda row: f"{row['images_per_second_20_steps']['median']:.2f}",
        },
        "Products in {precision}.",
    ),
    plot=curves("batch", {"per_student": "one step"}, xlabel="students side by side", ylabel="seconds per student"),
)
