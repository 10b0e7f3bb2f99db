"""A field that is looked at or measured is read in float32, in whatever precision the steps were taken.

A student fitted to one token has a field that is nearly constant. Rounded to bfloat16 and stretched to its own scale,
its smooth gradient becomes a plaid of rows and columns that is in no weight of the student.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.position import grid_locations
from apm.test_time.options import AdaptConfig
from apm.test_time.trainer import AdaptResult, TestTimeTrainer

MODEL = APMConfig(dim=64, image_size=224, patch_size=14, position_dim=64, hidden=(512, 256, 128), rgb_hidden=16)
STEPS = 30


def adapted(precision: str, distil: str = "cls") -> AdaptResult:
    """Two students. The images are bright, so that the column, the same everywhere, outweighs the position code."""
    draw = torch.Generator().manual_seed(0)
    images, targets = (torch.randn(2, *shape, generator=draw) for shape in ((3, 224, 224), (64,)))
    grids = torch.randn(2, MODEL.cells, 64, generator=draw) if distil != "cls" else None
    config = AdaptConfig(steps=STEPS, lr=1e-3, precision=precision, distil=distil)  # type: ignore[arg-type]
    trainer = TestTimeTrainer(MODEL, config)
    return trainer.adapt(8 * images, targets, grids=grids, keep_field=True, snapshots=(STEPS,))


def in_float64(result: AdaptResult) -> Tensor:
    """The same weights' field at the student's own locations, in float64: (B, N, D)."""
    assert result.folded is not None
    return result.folded.double().features(*grid_locations(MODEL.grid))


def unevenness(field: Tensor) -> float:
    """Mean second difference along rows and columns (N, D), as a share of the field's spread about its mean."""
    centred = field.double() - field.double().mean(dim=0)
    cells = (centred / centred.square().mean().sqrt()).reshape(MODEL.grid, MODEL.grid, -1)
    return float((cells.diff(n=2, dim=0).abs().mean() + cells.diff(n=2, dim=1).abs().mean()) / 2)


@pytest.mark.parametrize("distil", ["cls", "both"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_snapshot_is_the_float64_reading_of_the_weights(precision: str, distil: str) -> None:
    result = adapted(precision, distil)
    exact = in_float64(result)
    assert exact.dtype == torch.float64
    spread = (exact - exact.mean(dim=1, keepdim=True)).square().mean().sqrt()
    (snapshot,) = result.fields.values()
    for read in (snapshot, result.features(*grid_locations(MODEL.grid))):
        assert read.dtype == torch.float32
        assert (read - exact).abs().max() < 1e-5 * exact.abs().max()
        assert (read - exact).square().mean().sqrt() < 1e-3 * spread  # of what a picture stretches, too


def test_bf16_steps_draw_no_stripes_into_the_field() -> None:
    """The snapshot of a run in bfloat16 is as smooth as that of the same run in float32."""
    smooth, tested = (adapted(precision).fields[STEPS] for precision in ("fp32", "bf16"))
    for one, other in zip(smooth, tested, strict=True):
        assert unevenness(other) == pytest.approx(unevenness(one), rel=0.03)
        assert unevenness(one.bfloat16()) > 1.1 * unevenness(one)  # the measure would tell
