"""How the student's cost grows: with the steps, the grid, the locations read, and the students side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from apm.student.config import APMConfig
from apm.student.field import SavedField
from apm.student.model import APM
from apm.student.position import grid_locations

from .options import Options, images_and_targets, loaded_engine
from .profile import step_flops
from .record import Recorder
from .timing import Work, interleaved, spread

STEPS = (1, 2, 5, 10, 25, 50)
GRIDS = (7, 14, 16, 28, 32, 56)
READOUTS = (7, 14, 28, 56, 112, 224)
BATCHES = (1, 2, 4, 8)


def sweep_steps(options: Options, steps: Sequence[int] = STEPS) -> dict[str, Any]:
    """Seconds of one image against the number of steps: reset, K steps, the last readout."""
    recorder = Recorder("steps", options.record(precision=options.chosen_precision), options.device)
    engine = loaded_engine(options.config, options.chosen_precision, options.device)

    def adapt(count: int) -> Callable[[], object]:
        def run() -> None:
            engine.reset()
            engine.run(count)

        return run

    engine.run(1)
    works = {str(count): Work(adapt(count), options.rounds) for count in steps}
    times = interleaved(works, options.device, warmup=0)
    rows = [
        {
            "steps": count,
            "seconds": spread(times[str(count)]),
            "per_step": spread([t / count for t in times[str(count)]]),
        }
        for count in steps
    ]
    return recorder.finish(rows)


def sweep_grid(options: Options, grids: Sequence[int] = GRIDS, readouts: Sequence[int] = READOUTS) -> dict[str, Any]:
    """Seconds against the side of a grid: of a step of a student with that grid; of reading features at its points.

    A student's image has as many patches as its grid has cells, so its column and first layer grow as well. Features
    are read from one adapted student of the usual grid, at side × side points between and on its cells.
    """
    config, precision = options.config, options.chosen_precision
    recorder = Recorder("grid", options.record(precision=precision), options.device)
    rows: list[dict[str, Any]] = []
    for side in grids:
        other = replace(config, image_size=side * config.patch_size)
        engine = loaded_engine(other, precision, options.device)
        times = interleaved({"step": Work(engine.advance, options.rounds)}, options.device)["step"]
        rows.append(
            {
                "what": "step",
                "side": side,
                "locations": side**2,
                "seconds": spread(times),
                "flops": step_flops(other),
            }
        )
        del engine
    folded = _folded(options)
    works = {str(side): Work(_read(folded, *_points(config, side)), options.rounds) for side in readouts}
    times_of = interleaved(works, options.device, warmup=0)
    rows += [
        {"what": "features", "side": side, "locations": side**2, "seconds": spread(times_of[str(side)])}
        for side in readouts
    ]
    return recorder.finish(rows)


def sweep_patches(options: Options, counts: Sequence[int] | None = None) -> dict[str, Any]:
    """Seconds against the number of patches that are queried: a step that reads only so many, and features of them.

    Beside the engine the plain form with autograd, which reads the same locations.
    """
    config, precision = options.config, options.chosen_precision
    counts = counts or [4**power for power in range(20) if 4**power <= config.cells]
    recorder = Recorder("patches", options.record(precision=precision), options.device)
    folded = _folded(options)
    image, target = images_and_targets(config, 1, options.device)
    model = APM(config).to(options.device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)
    all_rows, all_cols = grid_locations(config.grid)
    rows = []
    for count in counts:
        where = torch.linspace(0, config.cells - 1, count).long()
        engine = loaded_engine(config, precision, options.device, queries=count)
        engine.run(1)  # draws the locations
        works = {
            "engine": Work(engine.advance, options.rounds),
            "plain": Work(_plain_step(model, adam, image, target, all_rows[where], all_cols[where]), options.rounds),
            "features": Work(_read(folded, all_rows[where], all_cols[where]), options.rounds),
        }
        times = interleaved(works, options.device)
        rows.append({"patches": count, **{name: spread(values) for name, values in times.items()}})
        del engine
    return recorder.finish(rows)


def sweep_batch(options: Options, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """Seconds of a step and images a second (20 steps) against the number of students side by side."""
    config, precision = options.config, options.chosen_precision
    recorder = Recorder("batch", options.record(precision=precision), options.device)
    rows = []
    for batch in batches:
        engine = loaded_engine(config, precision, options.device, batch=batch)
        times = interleaved({"step": Work(engine.advance, options.rounds)}, options.device)["step"]
        rows.append(
            {
                "batch": batch,
                "seconds": spread(times),
                "per_student": spread([value / batch for value in times]),
                "images_per_second_20_steps": spread([batch / (20 * value) for value in times]),
            }
        )
        del engine
    return recorder.finish(rows)


def _folded(options: Options) -> SavedField:
    engine = loaded_engine(options.config, "fp32", options.device)
    engine.run(1)
    return engine.fold(1)


def _points(config: APMConfig, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A regular grid of side × side points over the student's own grid, in its cells."""
    rows, cols = grid_locations(side)
    scale = config.grid / side
    return (rows + 0.5) * scale - 0.5, (cols + 0.5) * scale - 0.5


def _read(folded: SavedField, rows: torch.Tensor, cols: torch.Tensor) -> Callable[[], object]:
    return lambda: folded.features(rows, cols)


def _plain_step(
    model: APM,
    adam: torch.optim.Adam,
    image: torch.Tensor,
    target: torch.Tensor,
    rows: torch.Tensor,
    cols: torch.Tensor,
) -> Callable[[], object]:
    def step() -> None:
        adam.zero_grad()
        F.mse_loss(model(image, rows, cols), target).backward()
        adam.step()

    return step
