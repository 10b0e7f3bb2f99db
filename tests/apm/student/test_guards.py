"""Guards that are no clocks: they fail when the cheap form, or the buffers made once, are lost.

Counts of operations are exact; so a change that adds a product has to change `forward_flops` or `step_flops` here as
well, and whoever reads that change sees what it costs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F

from apm.benchmarks.speed.options import TINY, images_and_targets, loaded_engine
from apm.benchmarks.speed.profile import measured_flops, middle_flops, plain_flops
from apm.student.config import APMConfig
from apm.student.model import APM
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import TestTimeTrainer
from tests.counters import allocations

CPU = torch.device("cpu")
ODD = APMConfig(dim=20, image_size=15, patch_size=3, position_dim=12, hidden=(23, 17, 9), heads=5, rgb_hidden=4)
SMALL = APMConfig.preset("small", dim=256)
REDUCED = replace(SMALL, dim=64, image_size=112, hidden=(512, 256, 128))  # where bf16 products may be emulated
Precision = Literal["fp32", "bf16"]
both = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def forward_flops(config: APMConfig, queries: int | None = None) -> int:
    """Operations of `Engine.evaluate` for one student, from the shapes; at ``queries`` locations or all."""
    n, (h1, h2, h3), dim, heads = queries or config.cells, config.hidden, config.dim, config.heads
    column = 2 * 3 * config.patch_size**2 * config.cells
    layer1 = 2 * config.cells * h1  # the column's share
    layer1 += 2 * config.grid * config.position_dim * h1  # the share of every row and of every column of the grid
    layer1 += 2 * n * 2 * config.grid * h1  # their sum at every location
    query = 8 * dim**2 + 4 * heads * (dim * h3 + n * h3 + n * dim)
    return column + layer1 + 2 * n * (h1 * h2 + h2 * h3) + (query if config.readout == "query" else 2 * dim * h3)


def step_flops(config: APMConfig, queries: int | None = None) -> int:
    """Operations of `Engine.step`, forward and backward.

    The image needs no gradient; nor do the position codes; the column does, and its outer product is no product.
    """
    n, (h1, h2, h3), dim, heads = queries or config.cells, config.hidden, config.dim, config.heads
    query = 8 * dim**2 + heads * (8 * dim * h3 + 8 * n * h3 + 4 * n * dim)
    column = 2 * 3 * config.patch_size**2 * config.cells
    layer1 = 2 * config.cells * h1 + 2 * config.grid * config.position_dim * h1 + 2 * n * 2 * config.grid * h1
    backward = column + layer1 + 4 * n * (h1 * h2 + h2 * h3) + (query if config.readout == "query" else 2 * dim * h3)
    return forward_flops(config, queries) + backward


@both
@pytest.mark.parametrize("readout", ["query", "mean"])
@pytest.mark.parametrize("queries", [None, 7])
def test_operations_of_a_step_are_those_of_the_shapes(
    precision: Precision, readout: Literal["query", "mean"], queries: int | None
) -> None:
    config = replace(ODD, readout=readout)
    engine = loaded_engine(config, precision, CPU, batch=3, queries=queries)
    assert measured_flops(engine.step) == 3 * step_flops(config, queries)
    assert measured_flops(engine.evaluate) == 3 * forward_flops(config)


def test_operations_at_the_papers_size_are_the_middle_layers_and_little_else() -> None:
    config = APMConfig.preset("paper", dim=512)
    assert middle_flops(config) == pytest.approx(64.4e9, rel=1e-3)
    assert middle_flops(config) < step_flops(config) < 1.05 * middle_flops(config)
    assert middle_flops(config, 128) == middle_flops(config) // 8  # fewer queries, fewer operations


def test_an_adaptation_is_its_steps_and_one_readout() -> None:
    images, targets = images_and_targets(TINY, 2, CPU)
    trainer = TestTimeTrainer(TINY, AdaptConfig(steps=5, precision="fp32"))
    expected = 2 * (5 * step_flops(TINY) + forward_flops(TINY))
    assert measured_flops(lambda: trainer.adapt(images, targets)) == expected


def test_the_operation_guard_would_see_the_plain_form() -> None:
    model = APM(SMALL)
    image, target = images_and_targets(SMALL, 1, CPU)
    counted = measured_flops(lambda: F.mse_loss(model(image), target).backward())
    assert counted == pytest.approx(plain_flops(SMALL), rel=1e-3)  # fused attention computes its scores again
    assert counted > 1.5 * step_flops(SMALL)


@both
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_allocates_the_same_few_small_tensors_every_time(precision: Precision, batch: int) -> None:
    engine = loaded_engine(REDUCED, precision, CPU, batch=batch)
    engine.step()
    counts = [allocations(engine.step) for _ in range(3)]
    assert len({(one.count, one.bytes) for one in counts}) == 1
    # vectors, and what the readout has for each head and location; no hidden layer, no matrix of weights
    assert 0 < counts[0].largest < 4 * batch * REDUCED.cells * REDUCED.hidden[2] // 2
    assert counts[0].bytes < batch * 4 * REDUCED.hidden[0] * REDUCED.hidden[1]
    assert counts[0].count < 60 + 40 * batch


def test_the_allocation_guard_would_see_the_plain_form() -> None:
    model = APM(SMALL)
    image, _ = images_and_targets(SMALL, 1, CPU)
    model(image)
    assert allocations(lambda: model(image)).bytes > 4 * SMALL.hidden[0] * SMALL.hidden[1]


@both
def test_an_adaptation_reuses_the_buffers_of_the_one_before(precision: Precision) -> None:
    trainer = TestTimeTrainer(REDUCED, AdaptConfig(steps=3, precision=precision))
    images, targets = images_and_targets(REDUCED, 4, CPU)
    first = allocations(lambda: trainer.adapt(images[:1], targets[:1]))
    engine = trainer._engine
    later = [allocations(lambda i=i: trainer.adapt(images[i : i + 1], targets[i : i + 1])) for i in (1, 2, 3)]  # type: ignore[misc]
    assert trainer._engine is engine
    assert len({(one.count, one.bytes) for one in later}) == 1  # nothing grows with the images
    state = 4 * sum(parameter.numel() for parameter in engine.weights.values())  # type: ignore[union-attr]
    assert first.bytes > 4 * state  # weights, gradients, moments: made for the first image ...
    assert later[0].bytes < state  # ... and not again
    assert later[0].largest <= 2 * images[0].numel() * images.element_size()  # the image, cut into patches


def test_reset_and_update_allocate_next_to_nothing() -> None:
    engine = loaded_engine(REDUCED, "bf16", CPU, batch=2)
    engine.step()
    assert allocations(engine.reset).bytes == 0
    assert allocations(engine.update).bytes <= 64


def test_drawing_fewer_locations_allocates_no_more() -> None:
    engines = [loaded_engine(SMALL, "fp32", CPU, queries=queries) for queries in (None, 16)]
    for engine in engines:
        engine.run(1)
    everywhere, some = (allocations(engine.step).bytes for engine in engines)
    assert some < everywhere
