"""Settings of the masked autoencoder: its sizes, and how it and its heads are trained."""

# ruff: noqa: RUF009  (`setting` makes fields)
from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from apm.errors import UsageError
from apm.pretrain.config import Schedule
from apm.settings import at_least, between, check_values, not_negative, positive, setting, share_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Kind = Literal["probe", "finetune", "joint"]
"""What is trained on labels: a head on the frozen encoder; head and encoder; these and the decoder, on both losses."""


def _share_from_zero(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise UsageError(f"{name} must be 0 or more and below 1, not {value}.")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Sizes of the head.

    Raises:
        UsageError: sizes that cannot go together.
    """

    head_width: int = setting(192, "Width of the head.", check=at_least(1))
    head_depth: int = setting(4, "Blocks of the head; 0: one linear layer on the class token.", check=at_least(0))
    head_heads: int = setting(3, "Attention heads of the head's blocks.", check=at_least(1))

    def __post_init__(self) -> None:
        """Check the sizes, and those that must divide others."""
        check_values(self)
        _check_width("head_width", self.head_width, self.head_heads)


@dataclass(frozen=True, kw_only=True)
class MAEConfig:
    """Sizes of a masked autoencoder, and of its head where it has one.

    Raises:
        UsageError: sizes that cannot go together; the message holds the values.
    """

    image_size: int = setting(64, "Side of the images in pixels.", check=at_least(1))  # S
    patch_size: int = setting(8, "Side of a patch in pixels.", check=at_least(1))  # P
    width: int = setting(192, "Width of the encoder.", check=at_least(1))  # W
    depth: int = setting(8, "Blocks of the encoder.", check=at_least(1))
    heads: int = setting(3, "Attention heads of the encoder's blocks.", check=at_least(1))
    decoder_width: int = setting(96, "Width of the decoder.", check=at_least(1))
    decoder_depth: int = setting(2, "Blocks of the decoder.", check=at_least(1))
    decoder_heads: int = setting(3, "Attention heads of the decoder's blocks.", check=at_least(1))
    head_width: int = setting(192, "Width of the head.", check=at_least(1), option=False)
    head_depth: int = setting(4, "Blocks of the head.", check=at_least(0), option=False)
    head_heads: int = setting(3, "Attention heads of the head's blocks.", check=at_least(1), option=False)
    classes: int = setting(0, "Classes of the head; 0: there is none.", check=at_least(0), option=False)  # C

    def __post_init__(self) -> None:
        """Check the sizes, and those that must divide others."""
        check_values(self)
        if self.image_size % self.patch_size or self.image_size == self.patch_size:
            raise UsageError(
                f"Patches of {self.patch_size} pixels do not tile an image of {self.image_size} pixels with 4 or more."
            )
        for name in ("width", "decoder_width", "head_width"):
            _check_width(name, getattr(self, name), getattr(self, name.replace("width", "heads")))

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def places(self) -> int:
        """N, the number of patches."""
        return self.grid**2

    def with_head(self, head: HeadConfig, classes: int) -> MAEConfig:
        """The same network with such a head."""
        return MAEConfig(**{**asdict(self), **asdict(head), "classes": classes})


def _check_width(name: str, width: int, heads: int) -> None:
    if width % heads or width % 4:
        raise UsageError(f"{name} must be a multiple of 4 and of its {heads} attention heads, not {width}.")


def kept_places(places: int, masked: float) -> int:
    """How many of the patches the encoder sees where this share is masked: at least one, never all."""
    return min(max(1, int(places * (1 - masked))), places - 1)


@dataclass(frozen=True, kw_only=True)
class _OnImages(Schedule):
    """What trainings of autoencoder and heads share: the optimiser, the crops."""

    batch_size: int = setting(128, "Images per step, over all processes.", check=at_least(1))
    lr: float = setting(1e-3, "Peak learning rate of AdamW.", check=positive)
    weight_decay: float = setting(
        0.05, "AdamW's weight decay, applied to weights but not to biases.", check=not_negative
    )
    min_area: float = setting(0.2, "Smallest share of the image in a random crop.", check=between(0, 1))
    seed: int = setting(0, "Seed of weights, split, order, crops and masks.", check=between(0, 2**63 - 1))

    def orders(self, count: int, places: int, *, draw: tuple[int, ...]) -> NDArray[np.int64]:
        """An order of the patches for each image, (count, places): the first ones are those that the encoder sees.

        Args:
            count: images.
            places: of each.
            draw: numbers that, with the seed, decide; the same ones give the same.
        """
        import numpy as np

        return np.random.default_rng([self.seed, 8, *draw]).random((count, places)).argsort(1)


@dataclass(frozen=True, kw_only=True)
class MAETraining(_OnImages):
    """How to train a masked autoencoder. Every value decides the weights.

    Raises:
        UsageError: a value that cannot work.
    """

    steps: int = setting(20000, "Optimiser steps.", check=at_least(1))
    warmup: int = setting(1000, "Warm-up steps until the peak learning rate.", check=at_least(0))
    masked: float = setting(0.75, "Share of the patches that are masked.", check=share_of("the patches"))


@dataclass(frozen=True, kw_only=True)
class HeadTraining(_OnImages):
    """How to train on labels. Every value decides the weights.

    Raises:
        UsageError: a value that cannot work.
    """

    steps: int = setting(10000, "Optimiser steps.", check=at_least(1))
    warmup: int = setting(500, "Warm-up steps until the peak learning rate.", check=at_least(0))
    smoothing: float = setting(0.1, "Amount of label smoothing.", check=_share_from_zero)
    masked: float = setting(0.75, "Share of the patches that are masked (joint only).", check=share_of("the patches"))
    mask_weight: float = setting(
        1.0, "Weight of the reconstruction loss, relative to 1 for the labels' (joint only).", check=positive
    )
    kind: Kind = setting("probe", "What is trained.", choices=get_args(Kind), option=False)
