"""From an image tower of open_clip to its grid: what it knows of each part, in the space of the texts.

A tower's token is something pooled from its last feature map; the grid is what would be pooled if there were no other
place than this one. For each kind of tower that is exact in its own way:

* a transformer of open_clip whose token is its class token: the last block's VALUE path (MaskCLIP: Zhou, Loy & Dai
  2022, "Extract Free Dense Labels from CLIP", section 3.2, drops query and key in the same way). In the last block each
  location attends to itself alone, so that nothing but values and output projection is left of the attention; residual
  connections and MLP are as the block has them, then its last norm and the projection follow;
* a transformer whose token is the mean over its patches: the patches before the mean, projected;
* CLIP's ResNet: each location's value (position code included) through the attention pool's projections;
* towers of timm: the map before pooling, each location through the tower's own head. The mean of the grid is then the
  token wherever the pooling is a mean and all behind it linear.
"""

from __future__ import annotations

import copy

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from apm.errors import TeacherError


class GridTower:
    """A tower's grid at any input size that the tower can take."""

    def __init__(self, visual: nn.Module, *, name: str, image_size: int) -> None:
        """Look at a tower; nothing is computed.

        Args:
            visual: the image tower, frozen and in evaluation mode.
            name: the teacher's, for errors.
            image_size: side of the tower's own input, in pixels.
        """
        self.visual, self.name, self.image_size = visual, name, image_size
        self._resized: tuple[int, TimmModel] | None = None

    @property
    def is_convolutional(self) -> bool:
        """Whether the tower is of convolutions up to its pooling, so that a larger input gives a finer grid."""
        if isinstance(self.visual, TimmModel):
            return not (hasattr(self.visual.trunk, "patch_embed") or hasattr(self.visual.trunk, "set_input_size"))
        return isinstance(self.visual, ModifiedResNet)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Square normalised images (B, 3, S, S) -> grids (B, h', w', D).

        Raises:
            TeacherError: the tower has no grid, or none at this size.
        """
        visual, size = self.visual, pixels.shape[-1]
        try:
            if isinstance(visual, VisionTransformer):
                return self._transformer(visual, pixels)
            if isinstance(visual, ModifiedResNet):
                return _attention_pooled(visual, pixels)
            if isinstance(visual, TimmModel):
                return self._timm(visual, pixels)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise TeacherError(
                f'The teacher "{self.name}" has no grid at {size}×{size} pixels ({type(error).__name__}: {reason});'
                f" its own input is {self.image_size}×{self.image_size}."
            ) from error
        raise self._none(f"its image tower is a {type(visual).__name__}")

    def _none(self, reason: str) -> TeacherError:
        return TeacherError(
            f'The teacher "{self.name}" has no grid: {reason}. Only its token can be distilled (distil=cls).'
        )

    def _transformer(self, visual: VisionTransformer, pixels: Tensor) -> Tensor:
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            raise self._none("its transformer pools by attention or not at all")
        maps = visual.conv1(pixels)  # (B, W, h', w')
        batch, width, height, columns = maps.shape
        codes = resample_abs_pos_embed(
            visual.positional_embedding[None].float(), [height, columns], list(visual.grid_size)
        )
        class_token = visual.class_embedding.expand(batch, 1, width)
        x = visual.ln_pre(torch.cat((class_token, maps.flatten(2).mT), dim=1) + codes)  # (B, 1 + h' w', W)
        transformer = visual.transformer
        if not transformer.batch_first:
            x = x.transpose(0, 1)
        *blocks, last = transformer.resblocks
        for block in blocks:
            x = block(x)
        if visual.pool_type == "avg":
            x = last(x)
        else:
            count = 1 + height * columns
            alone = torch.full((count, count), -torch.inf, device=x.device).fill_diagonal_(0)
            x = last(x, attn_mask=alone)
        if not transformer.batch_first:
            x = x.transpose(0, 1)
        _, patches = x.split((1, height * columns), dim=1)  # the class token, and the rest
        patches = visual.ln_post(patches)
        if visual.proj is not None:
            patches = patches @ visual.proj
        return patches.unflatten(1, (height, columns))

    def _timm(self, visual: TimmModel, pixels: Tensor) -> Tensor:
        if getattr(visual.head, "pool", None) is not None:
            raise self._none("its head pools a map of fixed size by attention")
        trunk = self._at_size(visual, pixels.shape[-1]).trunk
        if hasattr(trunk, "patch_embed") and hasattr(trunk, "num_prefix_tokens"):
            maps = last_map(trunk, pixels).permute(0, 2, 3, 1)  # (B, h', w', W)
            lone = maps.reshape(-1, 1, maps.shape[-1])  # each location as the only token
            pooled = trunk.attn_pool(lone) if getattr(trunk, "attn_pool", None) is not None else lone[:, 0]
            vectors = trunk.head(trunk.head_drop(trunk.fc_norm(pooled)))
        else:
            maps = trunk.forward_features(pixels)
            if maps.ndim != 4:
                raise self._none(f"its trunk, a {type(trunk).__name__}, ends without a map")
            if getattr(trunk, "output_fmt", "NCHW") != "NHWC":
                maps = maps.permute(0, 2, 3, 1)  # (B, h', w', W)
            lone = maps.reshape(-1, 1, 1, maps.shape[-1])  # each location as the whole map
            vectors = trunk.forward_head(
                lone if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else lone.permute(0, 3, 1, 2)
            )
        grid: Tensor = visual.head(vectors).view(*maps.shape[:3], -1)
        return grid

    def _at_size(self, visual: TimmModel, size: int) -> TimmModel:
        """The tower for inputs of this size: one that is made for a single size is copied and resized by timm."""
        if size == self.image_size or not hasattr(visual.trunk, "set_input_size"):
            return visual
        if self._resized is None or self._resized[0] != size:
            resized = copy.deepcopy(visual)
            resized.trunk.set_input_size(img_size=(size, size))
            self._resized = (size, resized)
        return self._resized[1]


def last_map(trunk: nn.Module, pixels: Tensor) -> Tensor:
    """The last, normed feature map (B, W, h', w') of a timm transformer, class and register tokens left out by timm."""
    maps: Tensor
    (maps,) = trunk.forward_intermediates(  # type: ignore[operator]
        pixels,
        indices=1,  # the last block alone
        norm=True,
        output_fmt="NCHW",
        intermediates_only=True,
        return_prefix_tokens=False,
    )
    return maps


def _attention_pooled(visual: ModifiedResNet, pixels: Tensor) -> Tensor:
    maps = visual.stem(pixels)
    for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        maps = layer(maps)
    pool, (height, columns) = visual.attnpool, maps.shape[-2:]
    codes = resample_abs_pos_embed(pool.positional_embedding[None].float(), [height, columns])
    _, codes = codes.split((1, height * columns), dim=1)  # the mean's, and those of the places
    grid: Tensor = pool.c_proj(pool.v_proj(maps.flatten(2).mT + codes)).unflatten(1, (height, columns))
    return grid
