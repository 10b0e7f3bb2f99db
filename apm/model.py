"""The Asynchronous Perception Machine as the paper writes it, on one page: slow, readable, the tests' oracle.

Modi & Rawat 2024, "Asynchronous Perception Machine for Efficient Test-Time Training", NeurIPS, section 3. Written from
the paper, not from its code. `apm.engine` computes the same numbers far more cheaply.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from apm.column import TriggerColumn, unfold
from apm.errors import UsageError, unknown
from apm.position import grid_locations, position_code
from apm.query import CoordinateMLP, RGBHead
from apm.readout import MeanReadout, ObjectQuery

Readout = Literal["query", "mean"]
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
    def preset(cls, name: str, *, dim: int, readout: Readout = "query") -> "APMConfig":
        """``paper``: the published sizes. ``small``: about a quarter of each on a 16 x 16 grid, for CPUs and tests."""
        if name == "paper":
            return cls(dim=dim, readout=readout)
        if name == "small":
            return cls(
                dim=dim, image_size=224, position_dim=256, hidden=(1024, 512, 256), rgb_hidden=64, readout=readout
            )
        raise unknown("preset", name, PRESETS)


class APM(nn.Module):
    """The student: image -> trigger column -> queries -> field of features -> token.

    Any location can be queried alone, in any order and in any number; the answers are the same.
    """

    def __init__(self, config: APMConfig, *, seed: int = 0) -> None:
        """Build the student and draw its weights from ``seed`` (see `draw_parameters`)."""
        super().__init__()
        self.config = config
        query_dim = config.cells + config.position_dim
        with torch.device("meta"):  # the weights are drawn below, all from one distribution
            self.column = TriggerColumn(config.patch_size)
            self.mlp = CoordinateMLP(query_dim, config.hidden, config.dim)
            self.rgb_head = RGBHead(config.dim, query_dim, config.rgb_hidden)
            self.readout = ObjectQuery(config.dim, config.heads) if config.readout == "query" else MeanReadout()
        drawn = draw_parameters(config, np.random.Generator(np.random.PCG64(seed)))
        self.load_state_dict(drawn, assign=True)
        self.requires_grad_()

    def forward(
        self, images: Tensor, rows: Tensor | Sequence[float] | None = None, cols: Tensor | Sequence[float] | None = None
    ) -> Tensor:
        """Images (B, 3, S, S) -> tokens (B, D), read from the given locations, or from every cell of the grid."""
        if rows is None or cols is None:
            rows, cols = grid_locations(self.config.grid)
        features = self.field(images, rows, cols)  # (B, Q, D)
        if self.config.readout == "mean":
            return self.readout(features)
        return self.readout(features, position_code(rows, cols, self.config.dim).to(images.device))

    def field(self, images: Tensor, rows: Tensor | Sequence[float], cols: Tensor | Sequence[float]) -> Tensor:
        """Features (B, Q, D) at Q locations given as rows and columns in grid cells."""
        return self.mlp(self._queries(images, rows, cols))

    def rgb(self, images: Tensor, rows: Tensor | Sequence[float], cols: Tensor | Sequence[float]) -> Tensor:
        """Colours (B, Q, 3) at Q locations, in the units of the (normalised) image but never negative."""
        queries = self._queries(images, rows, cols)
        return self.rgb_head(self.mlp(queries), queries)

    def _queries(self, images: Tensor, rows: Tensor | Sequence[float], cols: Tensor | Sequence[float]) -> Tensor:
        positions = position_code(rows, cols, self.config.position_dim).to(images.device)  # (Q, P)
        return unfold(self.column(images), positions)  # (B, Q, N + P)


def parameter_shapes(config: APMConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `APM`, in the order in which they are drawn."""
    query_dim = config.cells + config.position_dim
    dim, (first, second, third), rgb = config.dim, config.hidden, config.rgb_hidden
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    if config.readout == "query":
        shapes["readout.query"] = (dim,)
    linear("mlp.layer1", first, query_dim)
    linear("mlp.layer2", second, first)
    linear("mlp.layer3", third, second)
    linear("mlp.head", dim, third)
    linear("rgb_head.layer1", rgb, dim + query_dim)
    linear("rgb_head.layer2", rgb, rgb)
    linear("rgb_head.layer3", 3, rgb)
    shapes["column.filter.weight"] = (1, 3, config.patch_size, config.patch_size)
    shapes["column.filter.bias"] = (1,)
    if config.readout == "query":
        shapes["readout.attention.in_proj_weight"] = (3 * dim, dim)
        shapes["readout.attention.in_proj_bias"] = (3 * dim,)
        linear("readout.attention.out_proj", dim, dim)
    return shapes


def draw_parameters(config: APMConfig, generator: np.random.Generator) -> dict[str, Tensor]:
    """Draw every parameter i.i.d. from N(0, init_std ** 2), float32, in the order of `parameter_shapes`."""
    return {
        name: torch.from_numpy((generator.standard_normal(shape) * config.init_std).astype(np.float32))
        for name, shape in parameter_shapes(config).items()
    }
