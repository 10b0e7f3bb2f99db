"""The Asynchronous Perception Machine as the paper writes it, on one page: slow, readable, the tests' oracle.

Modi & Rawat 2024, "Asynchronous Perception Machine for Efficient Test-Time Training", NeurIPS, section 3. Written from
the paper, not from its code. `apm.student.engine` computes the same numbers far more cheaply.

One image leaves a trigger column behind; the column is unfolded to queries, one for each location; the coordinate MLP
answers each query with a feature; an object query, or the plain mean, reads one token from the field of features.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from apm.student.config import APMConfig
from apm.student.guide import WIDTH, colour_code, guide_of
from apm.student.position import grid_locations, position_code

SOME = 2**19
"""Numbers that are drawn at a time; how many changes nothing but the time."""


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


class CoordinateMLP(nn.Module):
    """Query -> feature, the same network for every location: three layers with ReLU, then a linear feature head."""

    def __init__(self, query_dim: int, hidden: Sequence[int], dim: int, *, guided: bool = False) -> None:
        """Make the layers ``query_dim -> hidden[0] -> hidden[1] -> hidden[2] -> dim``; a guide has one of its own."""
        super().__init__()
        self.guide = nn.Linear(WIDTH, hidden[0], bias=False) if guided else None
        self.layer1 = nn.Linear(query_dim, hidden[0])
        self.layer2 = nn.Linear(hidden[0], hidden[1])
        self.layer3 = nn.Linear(hidden[1], hidden[2])
        self.head = nn.Linear(hidden[2], dim)

    def forward(self, queries: Tensor, colours: Tensor | None = None) -> Tensor:
        """Queries (..., N + P), and with a guide the codes of their colours (..., C) -> features (..., D)."""
        x = self.layer1(queries)
        if self.guide is not None:
            x = x + self.guide(colours)  # the first layer of [T ; p ; colours], its last columns apart
        x = x.relu()
        x = self.layer2(x).relu()
        x = self.layer3(x).relu()
        return self.head(x)


class RGBHead(nn.Module):
    """Feature and query -> colour. Has a loss in self-supervised training only, none in test-time training."""

    def __init__(self, dim: int, query_dim: int, hidden: int) -> None:
        """Make the layers ``dim + query_dim -> hidden -> hidden -> 3``."""
        super().__init__()
        self.layer1 = nn.Linear(dim + query_dim, hidden)
        self.layer2 = nn.Linear(hidden, hidden)
        self.layer3 = nn.Linear(hidden, 3)

    def forward(self, features: Tensor, queries: Tensor) -> Tensor:
        """Features (..., D) and their queries (..., N + P) -> colours (..., 3), never negative."""
        x = torch.cat((features, queries), dim=-1)  # [f ; T ; p]
        x = self.layer1(x).relu()
        x = self.layer2(x).relu()
        return self.layer3(x).relu()


class ObjectQuery(nn.Module):
    """One learned query attends over features plus their position codes; what it gathers is the token.

    Keys are values; biases and output projection as in multi-head attention (Vaswani et al. 2017, section 3.2.2).
    """

    def __init__(self, dim: int, heads: int) -> None:
        """Make the query vector (dim,) and the attention with ``heads`` heads."""
        super().__init__()
        self.query = nn.Parameter(torch.empty(dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, features: Tensor, positions: Tensor) -> Tensor:
        """Features (B, Q, D) at locations with codes (Q, D) -> tokens (B, D)."""
        keys = features + positions  # (B, Q, D)
        query = self.query.expand(len(features), 1, -1)  # (B, 1, D)
        token, _ = self.attention(query, keys, keys, need_weights=False)
        return token[:, 0]


class MeanReadout(nn.Module):
    """The mean of the features, as Modi & Rawat 2024 draw it in Figure 1."""

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, Q, D) -> tokens (B, D); their locations do not matter."""
        return features.mean(dim=1)


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
            self.mlp = CoordinateMLP(query_dim, config.hidden, config.dim, guided=config.guide == "rgb")
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
        return self.mlp(self._queries(images, rows, cols), self._colours(images, rows, cols))

    def rgb(self, images: Tensor, rows: Tensor | Sequence[float], cols: Tensor | Sequence[float]) -> Tensor:
        """Colours (B, Q, 3) at Q locations, in the units of the (normalised) image but never negative."""
        queries = self._queries(images, rows, cols)
        return self.rgb_head(self.mlp(queries, self._colours(images, rows, cols)), queries)

    def _colours(self, images: Tensor, rows: Tensor | Sequence[float], cols: Tensor | Sequence[float]) -> Tensor | None:
        if self.config.guide == "none":
            return None
        y, x = (torch.as_tensor(axis, dtype=torch.float64) for axis in (rows, cols))
        return colour_code(guide_of(images, self.config.grid), y, x, self.config.grid)

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
    if config.guide == "rgb":  # last, so that all others are drawn alike with it and without
        shapes["mlp.guide.weight"] = (first, WIDTH)
    return shapes


def draw_parameters(config: APMConfig, generator: np.random.Generator) -> dict[str, Tensor]:
    """Draw every parameter i.i.d. from N(0, init_std ** 2), float32, in the order of `parameter_shapes`."""
    return {
        name: torch.from_numpy(draw_numbers(math.prod(shape), config.init_std, generator)).view(shape)
        for name, shape in parameter_shapes(config).items()
    }


def draw_numbers(count: int, std: float, generator: np.random.Generator) -> np.ndarray:
    """Draw from N(0, std ** 2), in double precision, rounded to float32 (count,)."""
    numbers = np.empty(count, dtype=np.float32)
    for start in range(0, count, SOME):  # rounded while they are in the cache: half the time
        some = numbers[start : start + SOME]
        np.multiply(generator.standard_normal(some.size), std, out=some, casting="same_kind")
    return numbers
