"""Sizes of the student: the paper's, and a small preset for CPUs and tests."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from apm.errors import UsageError, unknown

Readout = Literal["query", "mean"]
Loss = Literal["mse", "cosine", "soft"]
Distil = Literal["cls", "grid", "both"]
Guide = Literal["none", "rgb"]
Precision = Literal["auto", "fp32", "bf16"]
PRESETS = ("paper", "small")


@dataclass(frozen=True, kw_only=True)
class APMConfig:
    """Sizes of the student. The defaults are the paper's; ``dim`` must be the teacher's.

    Raises:
        UsageError: sizes that cannot go together; the message holds both.
    """

    dim: int = 512  # D, width of the teacher's token
    image_size: int = 448  # side of the student's input, pixels
    patch_size: int = 14  # side of one grid cell, pixels
    position_dim: int = 1024  # width of the position code inside a query
    hidden: tuple[int, int, int] = (4096, 2048, 1024)  # widths of the coordinate MLP
    heads: int = 8  # of the object query's attention
    rgb_hidden: int = 256  # width of the RGB head
    init_std: float = 0.01  # every parameter, biases included, starts as N(0, init_std ** 2)
    readout: Readout = "query"
    guide: Guide = "none"  # rgb: a query also holds a code of the colours at its place; not in the paper

    def __post_init__(self) -> None:
        """Check the sizes against one another."""
        sizes = (
            self.dim,
            self.image_size,
            self.patch_size,
            self.position_dim,
            *self.hidden,
            self.heads,
            self.rgb_hidden,
        )
        if min(sizes) < 1 or len(self.hidden) != 3:
            raise UsageError(f"All sizes of the student must be positive and three of them hidden widths: {self}.")
        if self.image_size % self.patch_size:
            raise UsageError(f"Patches of {self.patch_size} pixels do not tile an image of {self.image_size} pixels.")
        if self.position_dim % 4:
            raise UsageError(f"The position code's width must be a multiple of 4, not {self.position_dim}.")
        if self.readout not in get_args(Readout):
            raise unknown("readout", self.readout, get_args(Readout))
        if self.guide not in get_args(Guide):
            raise unknown("guide", self.guide, get_args(Guide))
        if self.readout == "query" and (self.dim % self.heads or self.dim % 4):
            raise UsageError(
                f"The object query needs a dim that both 4 and its {self.heads} heads divide, not {self.dim}: "
                'choose another number of heads, or readout="mean".'
            )
        if not (math.isfinite(self.init_std) and self.init_std > 0):
            raise UsageError(f"init_std must be a positive number, not {self.init_std}.")

    @property
    def grid(self) -> int:
        """Cells along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def cells(self) -> int:
        """Number of grid cells: of locations, and the length of the trigger column."""
        return self.grid**2

    @classmethod
    def preset(cls, name: str, *, dim: int, readout: Readout = "query", guide: Guide = "none") -> "APMConfig":
        """``paper``: the published sizes. ``small``: about a quarter of each on a 16 x 16 grid, for CPUs and tests."""
        if name == "paper":
            return cls(dim=dim, readout=readout, guide=guide)
        if name == "small":
            sizes: dict[str, Any] = {
                "image_size": 224,
                "position_dim": 256,
                "hidden": (1024, 512, 256),
                "rgb_hidden": 64,
            }
            return cls(dim=dim, readout=readout, guide=guide, **sizes)
        raise unknown("preset", name, PRESETS)
