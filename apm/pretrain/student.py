"""The field of a student whose weights many images share: any locations, any number, from one trigger column each.

The arithmetic is `apm.student.model.APM`'s with two savings that are exact: in ``fc1 . [T ; p]`` the column's part is
the same at every location, and the position's part the same for every image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from apm.errors import UsageError
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD, student_input
from apm.student.config import APMConfig
from apm.student.model import APM
from apm.student.position import position_code

LUMA = (0.299, 0.587, 0.114)
"""Parts of red, green and blue in the luma of ITU-R BT.601."""
CHUNK = 4096
"""Locations answered at once. 4096 take about 100 MB at the published sizes."""


def answer(model: APM, columns: Tensor, positions: Tensor, *, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Answer Q queries for each of B columns.

    Args:
        model: weights shared by all.
        columns: (B, N) trigger columns.
        positions: (Q, P) position codes of the locations.
        precision: of the two middle layers: ``bf16`` (by autocast) or ``fp32``.

    Returns:
        Features (B, Q, D) and colours (B, Q, 3), float32. Colours are never negative.
    """
    mlp, head = model.mlp, model.rgb_head
    cells, dim = model.config.cells, model.config.dim
    of_column, of_place = mlp.layer1.weight.split((cells, model.config.position_dim), dim=1)
    at_columns = columns @ of_column.T  # (B, H1): once an image
    at_places = functional.linear(positions, of_place, mlp.layer1.bias)  # (Q, H1): once for all images
    low = torch.bfloat16 if precision == "bf16" else torch.float32
    x = (at_columns.to(low)[:, None] + at_places.to(low)).relu()  # (B, Q, H1)
    device = columns.device.type
    with torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext():
        x = mlp.layer2(x).relu()
        x = mlp.layer3(x).relu()  # (B, Q, H3)
    features = mlp.head(x.float())  # (B, Q, D)
    of_feature, of_column, of_place = head.layer1.weight.split((dim, cells, model.config.position_dim), dim=1)
    y = functional.linear(features, of_feature) + (columns @ of_column.T)[:, None]
    y = (y + functional.linear(positions, of_place, head.layer1.bias)).relu()
    return features, head.layer3(head.layer2(y).relu()).relu()


def grey(images: Tensor) -> Tensor:
    """What a student with grey input sees of images (B, 3, S, S), ImageNet-normalised: their luma in every channel.

    As in a black-and-white photograph: 0.299 R + 0.587 G + 0.114 B, normalised likewise. What was grey stays as it is.
    """
    mean, std, share = (torch.tensor(values).to(images) for values in (IMAGENET_MEAN, IMAGENET_STD, LUMA))
    weight = share * std / std[:, None]  # (3, 3): of channel `column` in channel `row`
    return functional.conv2d(images, weight[:, :, None, None], (share @ mean - mean) / std)


class Student:
    """A trained student, frozen: what `apm pretrain` made, for looking at images with it.

    Attributes:
        config: sizes of the student.
        record: how it was made: see `apm.pretrain.checkpoint`.
    """

    def __init__(self, model: APM, record: dict[str, Any]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.record = record

    @classmethod
    def load(cls, path: str | Path, *, device: str | torch.device = "cpu") -> Student:
        """Read a checkpoint of `apm pretrain`, finished or not.

        Raises:
            UsageError: no such file, or not such a checkpoint.
        """
        from apm.pretrain.checkpoint import read_checkpoint

        checkpoint = read_checkpoint(path)
        model = APM(checkpoint.student)
        model.load_state_dict({name: tensor.float() for name, tensor in checkpoint.weights.items()})
        return cls(model.to(device), checkpoint.record)

    @property
    def config(self) -> APMConfig:
        """Sizes of the student."""
        return self.model.config

    @property
    def grey_input(self) -> bool:
        """Whether it sees images in grey and was trained to predict their colours."""
        return bool(self.record["settings"].get("grey_input", False))

    def describe(self) -> str:
        """Describe in one line what it is and how it was trained."""
        settings: Mapping[str, Any] = self.record["settings"]
        return (
            f"student {self.config.grid}×{self.config.grid}, D = {self.config.dim}, {self.record['step']} steps of "
            f"{settings['batch_size']} images (of {settings['images']}), teacher {settings['teacher'] or 'none'}, "
            f"seed {settings['seed']}{', grey input' if self.grey_input else ''}"
        )

    def columns(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S), ImageNet-normalised -> trigger columns (B, N): all that is kept of an image."""
        return self.model.column(grey(images) if self.grey_input else images)

    def column(self, image: Image.Image) -> Tensor:
        """The trigger column (1, N) of one RGB image, of its central square."""
        return self.columns(student_input(image, self.config.image_size)[None].to(self.device))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.column.filter.weight.device

    def answers(
        self,
        columns: Tensor,
        rows: Tensor | Sequence[float],
        cols: Tensor | Sequence[float],
        *,
        chunk: int = CHUNK,
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Answer any number of queries, `chunk` locations at a time: memory does not grow with their number.

        Args:
            columns: (B, N) trigger columns; B counts towards the memory.
            rows: (Q,) rows in grid cells: centres at 0, 1, ...; any real number.
            cols: (Q,) columns, likewise.
            chunk: locations at a time.

        Yields:
            Which of the Q locations; their features (B, q, D) and colours (B, q, 3), float32 on the CPU.
        """
        for start in range(0, len(rows), chunk):
            part = slice(start, min(start + chunk, len(rows)))
            positions = position_code(rows[part], cols[part], self.config.position_dim).to(self.device)
            features, colours = answer(self.model, columns, positions)
            yield part, features.cpu(), colours.cpu()

    def field(
        self, columns: Tensor, rows: Tensor | Sequence[float], cols: Tensor | Sequence[float], *, chunk: int = CHUNK
    ) -> tuple[Tensor, Tensor]:
        """Features (B, Q, D) and colours (B, Q, 3) at all Q locations; arguments as `answers`."""
        features = columns.new_empty(len(columns), len(rows), self.config.dim, device="cpu")
        colours = columns.new_empty(len(columns), len(rows), 3, device="cpu")
        for part, found, seen in self.answers(columns, rows, cols, chunk=chunk):
            features[:, part], colours[:, part] = found, seen
        return features, colours


def walk(first: Tensor, last: Tensor, frames: int) -> Tensor:
    """Go from one trigger column (1, N) to another in equal steps along a line: (frames, N), both ends included.

    Raises:
        UsageError: fewer than two frames, which would leave out an end.
    """
    if frames < 2:
        raise UsageError(f"A walk between two images needs 2 frames or more, not {frames}.")
    share = torch.linspace(0, 1, frames, device=first.device)[:, None]  # exactly 0 and 1 at its ends
    return (1 - share) * first + share * last
