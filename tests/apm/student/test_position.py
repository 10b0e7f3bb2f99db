"""The position code against its formula, written out number by number."""

import math

import pytest
import torch

from apm.errors import UsageError
from apm.student.position import axis_code, dense_locations, grid_locations, position_code


@pytest.mark.parametrize(("row", "col", "width"), [(0, 0, 8), (5, 9, 16), (31, 17, 1024), (2.5, -3.25, 12)])
def test_each_entry_is_the_formula(row: float, col: float, width: int) -> None:
    half = width // 2
    expected = []
    for coordinate in (col, row):  # the first half is x
        for k in range(half // 2):
            angle = coordinate * math.exp(-2 * k * math.log(10000) / half)
            expected += [math.sin(angle), math.cos(angle)]
    torch.testing.assert_close(position_code([row], [col], width)[0], torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_halves_are_separable() -> None:
    rows, cols = grid_locations(7)
    code = position_code(rows, cols, 24).view(7, 7, 24)
    axis = axis_code(torch.arange(7), 12)
    assert torch.equal(code[:, :, :12], axis[None].expand(7, 7, 12))  # x alone
    assert torch.equal(code[:, :, 12:], axis[:, None].expand(7, 7, 12))  # y alone


def test_grid_is_in_reading_order() -> None:
    rows, cols = grid_locations(3)
    assert rows.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert cols.tolist() == [0, 1, 2] * 3


def test_all_locations_of_the_paper_differ() -> None:
    code = position_code(*grid_locations(32), 1024)
    assert torch.pdist(code).min() > 0.1


@pytest.mark.parametrize("width", [0, 3, -2])
def test_odd_widths_are_refused(width: int) -> None:
    with pytest.raises(UsageError, match=f"not {width}"):
        axis_code([1.0], width)


def test_unequal_lists_are_refused() -> None:
    with pytest.raises(UsageError, match="2 rows and 1 columns"):
        position_code([1, 2], [1], 8)
    with pytest.raises(UsageError, match=r"\(1, 1\)"):
        axis_code(torch.zeros(1, 1), 8)


def test_locations_at_the_grids_own_size_are_the_cells() -> None:
    rows, cols = dense_locations(4, 4)
    assert rows.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert cols.tolist() == [0, 1, 2, 3] * 4


def test_finer_locations_cover_the_square_evenly() -> None:
    rows, cols = dense_locations(4, 8)
    assert len(rows) == len(cols) == 64
    assert cols[:8].tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25]  # two in each cell, none on its edge
    assert rows[::8].tolist() == cols[:8].tolist()
    with pytest.raises(UsageError, match="not 0"):
        dense_locations(4, 0)
