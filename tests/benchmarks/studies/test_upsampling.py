"""Upsampling without a student, each way against a slow or a known one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from apm.benchmarks.studies.upsampling import GridField, Overlay, joint_bilateral
from apm.student.field import resample
from apm.test_time.grid_views import GridView


def middles(side: int) -> Tensor:
    axis = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)


def test_a_grid_is_read_as_it_is_resampled() -> None:
    grid = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(GridField(grid).read(middles(8)), resample(grid[None], 8))


def test_views_lie_where_they_were_cut() -> None:
    """Views of a plane say the plane wherever their cells reach on both sides."""

    def plane(box: tuple[float, ...], flipped: bool) -> Tensor:
        points = middles(4)
        y, x = box[0] + points[:, 0] * (box[2] - box[0]), box[1] + points[:, 1] * (box[3] - box[1])
        grid = (3 * y + x).reshape(4, 4, 1).float()
        return grid.flip(1) if flipped else grid

    views = [GridView(), GridView((0.1, 0.3, 0.6, 0.8), flipped=True), GridView((0.5, 0.0, 1.0, 0.5))]
    field = Overlay([(view, plane(view.box, view.flipped)) for view in views])
    points = torch.tensor([[0.3, 0.5], [0.45, 0.62], [0.8, 0.3], [0.4, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(field.read(points)[0, :, 0].double(), 3 * points[:, 0] + points[:, 1], atol=1e-5, rtol=0)


def test_smaller_cells_count_more() -> None:
    half = GridView((0.0, 0.0, 0.5, 0.5))
    field = Overlay([(GridView(), torch.zeros(2, 2, 1)), (half, torch.ones(2, 2, 1))])
    read = field.read(torch.tensor([[0.25, 0.25], [0.75, 0.25]], dtype=torch.float64))[0, :, 0]
    assert read.tolist() == pytest.approx([0.8, 0.0])


@pytest.mark.parametrize("stride", [1, 2])
def test_the_filter_is_the_plain_sum(stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values, colours = torch.rand(2, 7, 9, generator=generator), torch.rand(3, 7, 9, generator=generator)
    found = joint_bilateral(values, colours, reach=1.5, spread=0.4, stride=stride)
    far = stride * int(3 / stride)
    for y, x in np.ndindex(7, 9):
        total, weights = torch.zeros(2), 0.0
        for v, u in np.ndindex(7, 9):
            down, across = v - y, u - x
            if max(abs(down), abs(across)) > far or down % stride or across % stride:
                continue
            apart = float((colours[:, y, x] - colours[:, v, u]).square().sum())
            weight = float(np.exp(-(down**2 + across**2) / (2 * 1.5**2) - apart / (2 * 0.4**2)))
            total, weights = total + weight * values[:, v, u], weights + weight
        torch.testing.assert_close(found[:, y, x], total / weights)


def test_where_all_has_one_colour_the_filter_is_a_gaussian() -> None:
    values = torch.rand(1, 30, 30, generator=torch.Generator().manual_seed(0))
    found = joint_bilateral(values, torch.full((3, 30, 30), 0.5), reach=2.0, spread=0.1)
    blurred = ndimage.gaussian_filter(values[0].numpy(), 2.0, radius=4)
    np.testing.assert_allclose(found[0, 6:-6, 6:-6], blurred[6:-6, 6:-6], rtol=1e-4)


def test_borders_follow_the_colours() -> None:
    """A border that lies four places beside that of the colours moves onto it."""
    values, colours = torch.zeros(1, 20, 40), torch.zeros(3, 20, 40)
    values[:, :, 16:], colours[:, :, 20:] = 1, 1
    found = joint_bilateral(values, colours, reach=6.0, spread=0.1)[0]
    assert (found[:, 20:] > 0.99).all() and (found[:, :14] < 0.5).all() and (found[:, 19] < 0.6).all()
