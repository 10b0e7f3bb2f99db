"""3 × 3 convolutions as one product of patches, for the last stage of the embedded teacher's image tower.

There an image is 2 × 2 or 3 × 3 places large, and the backward pass of a library convolution takes about ten times as
long as its products. Patches written out side by side make it a plain matrix product; a training step takes half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchConv(nn.Conv2d):
    """A 3 × 3 convolution with a border of one zero and no bias; the same parameters and results as `nn.Conv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, ⌈h / stride⌉, ⌈w / stride⌉), in autocast's type where it is on."""
        step = self.stride[0]
        x = x.permute(0, 2, 3, 1)
        height, width = ((side - 1) // step * step + 1 for side in x.shape[1:3])
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        patches = [padded[:, i : i + height : step, j : j + width : step] for i in range(3) for j in range(3)]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(torch.cat(patches, -1), weight).permute(0, 3, 1, 2)


def use_patches(module: nn.Module) -> None:
    """Turn every 3 × 3 convolution below `module` into a `PatchConv`, in place; parameters keep their names."""
    for part in module.modules():
        if type(part) is nn.Conv2d and part.kernel_size == (3, 3):
            assert part.padding == (1, 1) and part.bias is None and part.groups == 1 and part.dilation == (1, 1)
            part.__class__ = PatchConv
