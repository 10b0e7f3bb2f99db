"""How the student's cost grows: with the steps, the grid, the locations read, and the students side by side."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from apm.student.field import SavedField
from apm.student.position import dense_locations, grid_locations

from ..studies.study import numbers
from .kind import Kind
from .options import Options, Record, loaded_engine, plain_step
from .plots import Panel, Row, side_by_side
from .profile import step_flops
from .tables import Table, shown
from .timing import Work, interleaved, repeated, spread

WHAT = {"step": "a step of a student with this grid", "features": "features read at so many points"}
OF_PATCHES = {"engine": "step, engine", "plain": "step, plain form", "features": "features, one pass"}
NOTE = "Products in {precision}."


def sweep_steps(options: Options) -> Record:
    """Seconds of one image against the number of steps: reset, K steps, the last readout."""
    engine = loaded_engine(options.config, options.chosen_precision, options.device)

    def adapt(count: int) -> None:
        engine.reset()
        engine.run(count)

    engine.run(1)
    works = {count: partial(adapt, count) for count in options.some((1, 2, 5, 10, 25, 50))}
    times = interleaved(works, options.device, options.rounds, warmup=0)
    rows = [
        {"steps": count, "seconds": spread(found), "per_step": spread([value / count for value in found])}
        for count, found in times.items()
    ]
    return options.found(rows, precision=options.chosen_precision)


def sweep_grid(options: Options) -> Record:
    """Seconds against the side of a grid: of a step of a student with that grid; of reading features at its points.

    A student's image has as many patches as its grid has cells, so its column and first layer grow as well. Features
    are read from one adapted student of the usual grid, at side × side points between and on its cells.
    """
    config, precision = options.config, options.chosen_precision

    def row(what: str, side: int, times: list[float], **more: int) -> Record:
        return {"what": what, "side": side, "locations": side**2, "seconds": spread(times), **more}

    rows = []
    for side in options.some((7, 14, 16, 28, 32, 56)):
        other = replace(config, image_size=side * config.patch_size)
        engine = loaded_engine(other, precision, options.device)
        times = repeated(engine.advance, options.device, options.rounds)
        rows.append(row("step", side, times, flops=step_flops(other)))
        del engine
    field = _field(options)
    works = {
        side: partial(field.features, *dense_locations(config.grid, side))
        for side in options.some((7, 14, 28, 56, 112, 224))
    }
    found = interleaved(works, options.device, options.rounds, warmup=0)
    rows += [row("features", side, times) for side, times in found.items()]
    return options.found(rows, precision=precision)


def sweep_patches(options: Options) -> Record:
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


def sweep_batch(options: Options) -> Record:
    """Seconds of a step and images a second (20 steps) against the number of students side by side."""
    rows = []
    for batch in options.some(options.batches):
        engine = loaded_engine(options.config, options.chosen_precision, options.device, batch=batch)
        times = repeated(engine.advance, options.device, options.rounds)
        each, rate = [value / batch for value in times], [batch / (20 * value) for value in times]
        row = {"batch": batch, "seconds": spread(times), "per_student": spread(each)}
        rows.append({**row, "images_per_second_20_steps": spread(rate)})
        del engine
    return options.found(rows, precision=options.chosen_precision)


def _field(options: Options) -> SavedField:
    engine = loaded_engine(options.config, "fp32", options.device)
    engine.run(1)
    return engine.fold(1)


def _of_grid(record: Row) -> list[Record]:
    """What was timed in words, and its seconds under a name of their own."""
    return [{**row, "of": WHAT[row["what"]], row["what"]: row["seconds"]} for row in record["rows"]]


STEPS = Kind(
    name="steps",
    question="against the number of steps",
    title="Time against steps",
    measure=sweep_steps,
    table=shown(Table({"steps": "{steps}", "one image": "{seconds}", "per step": "{per_step}"}), NOTE),
    plot=side_by_side(Panel("steps", {"seconds": "one image", "per_step": "per step"}, log=True)),
    rounds=3,
)
GRID = Kind(
    name="grid",
    question="against the side of the grid, trained and read",
    title="Time against the side of the grid",
    measure=sweep_grid,
    table=shown(
        Table({"what": "{of}", "grid": "{side} × {side}", "locations": "{locations}", "time": "{seconds}"}, _of_grid),
        f"{NOTE} Features are read in fp32.",
    ),
    plot=side_by_side(
        Panel(
            "side", {"step": "one step", "features": "features, one pass"}, "side of the grid", log=True, rows=_of_grid
        )
    ),
    rounds=3,
)
PATCHES = Kind(
    name="patches",
    question="against the number of patches queried",
    title="Time against the number of patches",
    measure=sweep_patches,
    table=shown(
        Table({"patches queried": "{patches}", **{label: f"{{{key}}}" for key, label in OF_PATCHES.items()}}),
        f"{NOTE} The plain form and the features are fp32.",
    ),
    plot=side_by_side(Panel("patches", OF_PATCHES, "patches queried", log=True)),
)
BATCH = Kind(
    name="batch",
    question="against the students side by side",
    title="Time against students side by side",
    arguments=lambda parser: parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8], help="1,2,4"),
    measure=sweep_batch,
    table=shown(
        Table(
            {
                "students side by side": "{batch}",
                "a step of all": "{seconds}",
                "per student": "{per_student}",
                "images/s at 20 steps": "{images_per_second_20_steps:.2f}",
            }
        ),
        NOTE,
    ),
    plot=side_by_side(Panel("batch", {"per_student": "one step"}, "students side by side", "seconds per student")),
)
