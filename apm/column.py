"""The trigger column: what one image leaves behind, and how it is unfolded over the locations and folded up again."""

from torch import Tensor, nn


class TriggerColumn(nn.Module):
    """ONE convolution filter over the image's patches; its response at every patch, flattened, is the column.

    Modi & Rawat 2024, section 3. The column is as long as the grid has cells.
    """

    def __init__(self, patch_size: int) -> None:
        """Make the filter (3 x patch_size x patch_size, in pixels)."""
        super().__init__()
        self.filter = nn.Conv2d(3, 1, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), ImageNet-normalised -> columns (B, N), N = (S / patch_size) ** 2, in reading order."""
        return self.filter(images).flatten(1)


def unfold(column: Tensor, positions: Tensor) -> Tensor:
    """Lay the same column at every location and join it with that location's position code: the queries.

    Args:
        column: (B, N) trigger columns.
        positions: (Q, P) position codes of the locations wanted; any number, any order.

    Returns:
        (B, Q, N + P) queries ``[T ; p(y, x)]``, independent of one another.
    """
    batch, cells = column.shape
    count, width = positions.shape
    out = column.new_empty(batch, count, cells + width)
    out[..., :cells] = column[:, None, :]
    out[..., cells:] = positions
    return out


def fold(queries: Tensor, cells: int) -> Tensor:
    """Drop the queries (B, Q, N + P) and keep what they shared: the column (B, N), N = ``cells``. Undoes `unfold`."""
    return queries[:, 0, :cells]
