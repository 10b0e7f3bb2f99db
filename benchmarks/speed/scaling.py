"""How the student's cost grows: with the steps, the grid, the locations read, and the students side by side."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from apm.student.field import SavedField
from apm.student.position import dense_locations, grid_locations

from ..studies.study import numbers
from .kind import argument, kind
from .options import Options, Record, loaded_engine, plain_step
from .plots import curves
from .profile import step_flops
from .tables import Row
from .timing import Work, interleaved, repeated, spread, spreads

USUAL_STEPS = 20
WHAT = {"step": "a step of a student with this grid", "features": "features read at so many points"}
OF_PATCHES = {"engine": "step, engine", "plain": "step, plain form", "features": "features, one pass"}


def _field(options: Options) -> SavedField:
    engine = loaded_engine(options.config, "fp32", options.device)
    engine.run(1)
    return engine.fold(1)


def _of_grid(record: Row) -> list[Record]:
    """What was timed in words, and its seconds under a name of their own."""
    return [{**row, "of": WHAT[row["what"]], row["what"]: row["seconds"]} for row in record["rows"]]


@kind(
    """
    | steps   | one image | per step   |
    | {steps} | {seconds} | {per_step} |

    Products in {precision}.
    """,
    title="Time against steps",
    panels=[curves("steps", {"seconds": "one image", "per_step": "per step"}, log=True)],
    rounds=3,
)
def steps(options: Options) -> Record:
    """Seconds of one image against the number of steps: reset, K steps, the last readout."""
    engine = loaded_engine(options.config, options.chosen_precision, options.device)

    def adapt(count: int) -> None:
        engine.reset()
        engine.run(count)

    engine.run(1)
    works = {count: partial(adapt, count) for count in options.some((1, 2, 5, 10, 25, 50))}
    times = interleaved(works, options.device, options.rounds, warmup=False)
    rows = [{"steps": k, "seconds": spread(found), "per_step": spread(found / k)} for k, found in times.items()]
    return options.found(rows, precision=options.chosen_precision)


@kind(
    (
        _of_grid,
        """
        | what | grid            | locations   | time      |
        | {of} | {side} × {side} | {locations} | {seconds} |
        """,
    ),
    "Products in {precision}. Features are read in fp32.",
    title="Time against the side of the grid",
    panels=[
        curves(
            "side", {"step": "one step", "features": "features, one pass"}, "side of the grid", log=True, rows=_of_grid
        )
    ],
    rounds=3,
)
def grid(options: Options) -> Record:
    """Seconds against the side of a grid: of a step of a student with that grid; of reading features at its points.

    A student's image has as many patches as its grid has cells, so its column and first layer grow as well. Features
    are read from one adapted student of the usual grid, at side × side points between and on its cells.
    """
    config, precision = options.config, options.chosen_precision
    rows: list[Record] = []
    for side in options.some((7, 14, 16, 28, 32, 56)):
        other = replace(config, image_size=side * config.patch_size)
        times = repeated(loaded_engine(other, precision, options.device).advance, options.device, options.rounds)
        rows.append({"what": "step", "side": side, "seconds": spread(times), "flops": step_flops(other)})
    field, sides = _field(options), options.some((7, 14, 28, 56, 112, 224))
    works = {side: partial(field.features, *dense_locations(config.grid, side)) for side in sides}
    found = spreads(interleaved(works, options.device, options.rounds, warmup=False))
    rows += [{"what": "features", "side": side, "seconds": found[side]} for side in sides]
    return options.found([{**row, "locations": row["side"] ** 2} for row in rows], precision=precision)


@kind(
    """
    | patches queried | step, engine | step, plain form | features, one pass |
    | {patches}       | {engine}     | {plain}          | {features}         |

    Products in {precision}. The plain form and the features are fp32.
    """,
    title="Time against the number of patches",
    panels=[curves("patches", OF_PATCHES, "patches queried", log=True)],
)
def patches(options: Options) -> Record:
    """Seconds against the number of patches that are queried: a step that reads only so many, and features of them.

    Beside the engine the plain form with autograd, which reads the same locations.
    """
    config, field, rows = options.config, _field(options), []
    all_rows, all_cols = grid_locations(config.grid)
    for count in [4**power for power in range(20) if 4**power <= config.cells]:
        where = torch.linspace(0, config.cells - 1, count).long()
        places = all_rows[where], all_cols[where]
        engine = loaded_engine(config, options.chosen_precision, options.device, queries=count)
        engine.run(1)  # draws the locations
        plain, features = plain_step(config, options.device, *places), partial(field.features, *places)
        works: dict[str, Work] = {"engine": engine.advance, "plain": plain, "features": features}
        rows.append({"patches": count, **spreads(interleaved(works, options.device, options.rounds))})
    return options.found(rows, precision=options.chosen_precision)


@kind(
    """
    | students side by side | a step of all | per student   | images/s at 20 steps             |
    | {batch}               | {seconds}     | {per_student} | {images_per_second_20_steps:.2f} |

    Products in {precision}.
    """,
    title="Time against students side by side",
    own=argument("--batches", "1,2,4", type=numbers, default=[1, 2, 4, 8]),
    panels=[curves("batch", {"per_student": "one step"}, "students side by side", "seconds per student")],
)
def batch(options: Options) -> Record:
    """Seconds of a step and images a second against the number of students side by side."""
    rows = []
    for batch in options.some(options.batches):
        engine = loaded_engine(options.config, options.chosen_precision, options.device, batch=batch)
        times = repeated(engine.advance, options.device, options.rounds)
        rate = {f"images_per_second_{USUAL_STEPS}_steps": spread(batch / (USUAL_STEPS * times))}
        rows.append({"batch": batch, "seconds": spread(times), "per_student": spread(times / batch), **rate})
    return options.found(rows, precision=options.chosen_precision)
