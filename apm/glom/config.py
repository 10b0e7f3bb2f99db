"""Settings of GLOM: its sizes, and how it is trained."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from apm.errors import UsageError
from apm.pretrain.config import Schedule
from apm.settings import at_least, between, check_values, cosine, not_negative, positive, setting, share_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Consensus = Literal["all", "others", "none"]
"""What a location attends to: all locations; others (its own counts as if unrelated); none: columns are independent."""


@dataclass(frozen=True, kw_only=True)
class GLOMConfig:
    """Sizes of GLOM, and which of its parts it has. Without a radius (None) every location attends to all others.

    Raises:
        UsageError: sizes that cannot go together; the message holds the values.
    """

    image_size: int = setting(64, "Side of the images in pixels.", check=at_least(1))  # S
    patch_size: int = setting(8, "Side of a location in pixels.", check=at_least(1))  # P
    dim: int = setting(128, "Width of an embedding.", check=at_least(1))  # D
    levels: int = setting(5, "Levels per column.", check=at_least(1))  # L
    expansion: int = setting(
        4, "Hidden width of the bottom-up and top-down nets, in units of --dim.", check=at_least(1)
    )
    consensus: Consensus = setting(
        "all",
        "Which locations each one attends to: all, others (its own counts as if unrelated) or none.",
        choices=get_args(Consensus),
    )
    radius: float | None = setting(
        1.5, "Distance up to which locations attend to each other; 1.5: the eight neighbours.", check=positive
    )
    top_down: bool = setting(True, "Whether levels get top-down input from the level above.")

    def __post_init__(self) -> None:
        """Check the sizes, and two of them against one another."""
        check_values(self)
        if self.image_size % self.patch_size:
            raise UsageError(f"Patches of {self.patch_size} pixels do not tile an image of {self.image_size} pixels.")

    @property
    def grid(self) -> int:
        """Locations along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def places(self) -> int:
        """N, the number of locations and so of columns."""

        return self.grid**2

    @property
    def steps(self) -> int:
        """Steps in which what the lowest level sees goes up to the highest and comes back."""
        return 2 * self.levels


@dataclass(frozen=True, kw_only=True)
class GLOMTraining(Schedule):
    """How to train GLOM. Every value affects the weights.

    Raises:
        UsageError: a value that cannot work.
    """

    lr: float = setting(1e-3, "Peak learning rate of AdamW.", check=positive)
    seed: int = setting(0, "Seed of weights, split, order and hidden locations.", check=between(0, 2**63 - 1))
    settling: int | None = setting(
        None, "Steps in which the columns settle.", default_words="twice the levels", check=at_least(1)
    )
    hidden: float = setting(0.5, "Share of the locations that are hidden.", check=share_of("the locations"))
    read_level: int = setting(0, "Level that pixels are read from; 0: the lowest, -1: the highest.")
    contrast_weight: float = setting(
        0.1, "Weight of the contrastive loss, relative to 1 for denoising.", check=not_negative
    )
    contrast_columns: int = setting(256, "Columns per step in the contrastive loss.", check=at_least(2))
    temperature: float = setting(0.1, "Temperature of the contrastive loss.", check=between(0.001, 1000))
    agree: float = setting(
        0.7,
        "Minimum cosine, after subtracting the level's mean, at which two locations agree and are not contrasted.",
        check=cosine,
    )

    def check_level(self, model: GLOMConfig) -> None:
        """Refuse a level to read from that the network does not have, by a `UsageError`."""
        if not -model.levels <= self.read_level < model.levels:
            raise UsageError(f"read_level must be below {model.levels}, the number of levels, not {self.read_level}.")

    def settling_steps(self, step: int, model: GLOMConfig) -> int:
        """After how many settling steps an optimiser step computes its loss: drawn from half of them to all."""
        import numpy as np

        most = self.settling or model.steps
        return int(np.random.default_rng([self.seed, 4, step]).integers((most + 1) // 2, most + 1))

    def hidden_places(self, count: int, places: int, *, draw: tuple[int, ...]) -> NDArray[np.bool_]:
        """Which locations are hidden, (count, places): the same number in each image, at least one, never all.

        Args:
            count: images.
            places: of each.
            draw: numbers that, with the seed, decide which; the same ones give the same.
        """
        import numpy as np

        ranks = np.random.default_rng([self.seed, 5, *draw]).random((count, places)).argsort(1).argsort(1)
        return ranks < min(max(1, round(self.hidden * places)), max(1, places - 1))
