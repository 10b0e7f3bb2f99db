"""Every setting of a student, declared once: `Classifier`, commands, methods, records and studies read it from here.

A field of `StudentOptions` with a `setting` is an option of ``apm classify`` and ``apm bench``, a setting of the method
``apm`` (``apm:name=value``), an entry of the records, and a part of a variant's name.
"""

# No `from __future__ import annotations`: the options of commands are made from the fields' types.

import dataclasses
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from apm.errors import UsageError
from apm.settings import at_least, between, check_values, cosine, not_negative, positive, setting, settings_of
from apm.student.config import PRESETS, APMConfig, Distil, Guide, Loss, Precision, Readout
from apm.test_time.queries import ALL, AUTO, check_queries, locations_a_step, parse_queries
from apm.test_time.view_numbers import check_grid_views, parse_grid_views

if TYPE_CHECKING:
    import torch

    from apm.test_time.targets import TargetPolicy


Reading = Literal["query", "mean", "mode"]

TEMPERATURE = 4.0
"""Of softened targets. At 1 they are the probabilities that answers are read from; where these lie on one label, the
loss hardly depends on the others. At a temperature that is large compared with the spread of the logits, it is nearly
the squared error of all of them (Hinton et al. 2015, section 2.1). In between, the student is soonest near its teacher:
docs/softened.md compares 1, 4 and 16."""


def _queries(_: str, value: int | str) -> None:
    check_queries(value)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How each student is trained: the settings shared by users and the trainer. Constant learning rate.

    Raises:
        UsageError: a value that cannot work; the message holds it.
    """

    steps: int = setting(
        50,  # from the table of steps in the README
        "Optimisation steps for each image.",
        check=at_least(1, ": an untrained student is useless"),
    )
    lr: float = setting(1e-4, "Adam's learning rate.", check=positive)
    distil: Distil = setting(
        "cls",
        "What the loss compares: cls (the --target token), grid (the teacher's patch features) or both.",
        choices=typing.get_args(Distil),
    )
    # Modi & Rawat 2024: 0 in test-time training. The colour head ends in a ReLU, which the first draw may shut for a
    # channel: that channel then stays black, without a gradient.
    rgb_weight: float = setting(0.0, "Weight of an added loss towards the image's own colours.", check=not_negative)
    agree: float = setting(
        0.0,
        "Weight of an added loss that pulls each location's feature towards the mean of its neighbours, weighted by "
        "similarity (GLOM's consensus).",
        check=not_negative,
    )
    precision: Precision = setting(
        "auto",  # bf16 where it is measured to be clearly faster
        "Number format of the matrix products: auto, fp32 or bf16.",
        choices=typing.get_args(Precision),
    )
    seed: int = setting(
        0, "Seed of the student's initial weights and of the augmented views.", check=between(0, 2**63 - 1)
    )
    loss: Loss = setting(
        "mse",
        "Loss of the token: mse (mean squared error), cosine (one minus the cosine), or soft (KL divergence of the "
        "label probabilities of token and target, both softened; Hinton et al. 2015).",
        choices=typing.get_args(Loss),
    )
    temperature: float = setting(
        TEMPERATURE,
        "With --loss soft: temperature that the logits, at the teacher's own scale, are divided by.",
        check=between(0.01, 1000, ": float32 has too few digits for the loss outside that range"),
    )
    tolerance: float | None = setting(
        None,
        "Stop an image early, once its loss (no label is involved) is at or below this.",
        check=positive,
        option=False,
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_values(self)
        if self.distil == "grid" and self.loss != "mse":
            raise UsageError(
                f'loss="{self.loss}" is a loss of the token, which is not compared with distil="grid": use '
                'distil="both".'
            )
        if self.temperature != TEMPERATURE and self.loss != "soft":
            raise UsageError(
                f"temperature={self.temperature:g} but loss={self.loss} uses no temperature; add loss=soft."
            )


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(TrainingOptions):
    """The trainer's settings: `StudentOptions.training` makes them from a user's options."""

    queries: int | None = setting(
        None,
        "Locations read at each step, new ones each time: an approximation; None: all.",
        check=at_least(1),
        option=False,
    )


@dataclass(frozen=True, kw_only=True)
class StudentOptions(TrainingOptions):
    """Every setting of a student that a user may choose.

    Raises:
        UsageError: a value that cannot work, or settings that do not go together.
    """

    preset: str = setting("paper", "The student's size: paper or small.", choices=PRESETS)
    readout: Reading | None = setting(
        None,
        "How the student's token is read: query (attention of a learned object query), mean (the field's mean) or mode "
        "(the field's mode by mean shift; fitted as mean, with --distil grid or both).",
        default_words="query; mean with --distil grid",  # the grid alone would leave the object query as it was drawn
        choices=typing.get_args(Reading),
    )
    queries: int | str = setting(
        AUTO,
        "Locations read per step: all (as in the paper), a number (drawn anew for each step: an approximation, faster "
        "on a CPU), or auto (a number on a CPU if only a token is distilled, else all).",
        check=_queries,
        parse=parse_queries,
    )
    guide: Guide = setting(
        "none",
        "What a query contains besides trigger column and position: none (as in the paper), or rgb (a code of the "
        "colours there).",
        choices=typing.get_args(Guide),
    )
    grid_views: int | str = setting(
        1,
        "Views of the image whose grids are the field's target, with --distil grid or both: 1 (the whole image), a "
        "number (adds zoomed, shifted, mirrored crops), or tokens, tokens:N (the tokens of N crops instead of grids).",
        check=check_grid_views,
        parse=parse_grid_views,
    )
    target: str = setting(
        "cls",
        "Which token the student is overfit to: cls (the teacher's token of the image, as in the paper), or "
        "an aggregate over augmented views: mean, confident, mta; best is the best one found (mta of 64 views).",
    )
    views: int | None = setting(
        None, "Number of augmented views that --target aggregates.", default_words="16; 64 with --target best"
    )
    min_area: float | None = setting(None, "Smallest share of the image's area in a crop.", option=False)
    keep: float | None = setting(None, "For target=confident: the share of the views kept.", option=False)
    cls_weight: float | None = setting(
        None, "Share of the image's own direction blended into the target's.", option=False
    )

    def __post_init__(self) -> None:
        """Check every value, and those of the target among themselves."""
        super().__post_init__()
        from apm.test_time.targets import check_distilled

        check_distilled(self.target, self.distil)
        self.policy()
        if self.readout == "mode" and self.distil == "cls":
            raise UsageError("readout=mode but distil=cls, which has no information about locations; add distil=both.")
        if self.grid_views != 1 and self.distil == "cls":
            raise UsageError(
                f"grid_views={self.grid_views} but distil=cls, which has no target for the field; add distil=both."
            )
        if self.grid_views != 1 and self.queries not in (ALL, AUTO):
            raise UsageError(
                f"queries={self.queries} but grid_views={self.grid_views} reads all locations: leave one out."
            )

    @property
    def chosen_readout(self) -> Readout:
        """The readout of the network: the one given, else what suits what is distilled; the mode's is the mean."""
        if self.readout == "mode":
            return "mean"
        return self.readout or ("mean" if self.distil == "grid" else "query")

    def model(self, dim: int) -> APMConfig:
        """The student's sizes, for a teacher with tokens of width `dim`."""
        return APMConfig.preset(self.preset, dim=dim, readout=self.chosen_readout, guide=self.guide)

    def training(self, device: "torch.device") -> AdaptConfig:
        """How the student is trained on a device, which decides what ``queries="auto"`` means."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(TrainingOptions)}
        locations = locations_a_step(
            self.queries,
            preset=self.preset,
            readout=self.chosen_readout,
            distil=self.distil,
            loss=self.loss,
            rgb_weight=self.rgb_weight,
            agree=self.agree,
            device=device,
        )
        return AdaptConfig(**shared, queries=locations)

    def policy(self) -> "TargetPolicy":
        """The named target with what was set for it.

        Raises:
            UsageError: unknown target, or a setting of views where the target is the image's own token.
        """
        from apm.test_time.targets import TargetPolicy, policy

        named = policy(self.target)
        names = {field.name for field in dataclasses.fields(TargetPolicy)} & set(settings_of(type(self)))
        changes = {name: value for name in sorted(names) if (value := getattr(self, name)) is not None}
        if named.kind == "cls" and changes:
            raise UsageError(
                f'{", ".join(changes)} with the target "cls", which is the image\'s own token and uses no views; '
                "choose the target mean, confident, mta or best."
            )
        return dataclasses.replace(named, **changes)

    def record(self, device: "torch.device") -> dict[str, Any]:
        """All settings as they are used on a device, as JSON values; ``queries`` is None for all locations."""
        policy = dataclasses.asdict(self.policy())
        del policy["kind"]
        used = {**dataclasses.asdict(self.training(device)), **policy, "readout": self.readout or self.chosen_readout}
        return {**dataclasses.asdict(self), **used}


@dataclass(frozen=True, kw_only=True)
class IslandOptions:
    """How a student's field is watched while it forms, and its islands measured.

    Raises:
        UsageError: a value that cannot work.
    """

    steps: int = setting(150, "Optimisation steps.", check=at_least(1))
    preset: str = setting("small", "Size of the student: small (16 × 16) or paper (32 × 32).", choices=PRESETS)
    lr: float = setting(1e-4, "Learning rate for the token.", check=positive)
    grid_lr: float = setting(1e-3, "Learning rate for the grid, which is harder to fit.", check=positive)
    grid_size: int | None = setting(
        None,
        "Input size in pixels for the teacher's grid or for --source.",
        default_words="the model's own",
        check=at_least(1),
    )
    grid_views: int | str = setting(
        1,
        "Views of the image whose grids are the target: 1 (the whole image), a number, tokens, or tokens:N.",
        check=check_grid_views,
        parse=parse_grid_views,
    )
    guide: Guide = setting(
        "none",
        "What a query contains besides trigger column and position: none, or rgb (a code of the colours there).",
        choices=typing.get_args(Guide),
    )
    agree: float = setting(
        0.0, "Weight of an added loss that pulls each location's feature towards its neighbours.", check=not_negative
    )
    threshold: float = setting(0.9, "Minimum cosine of neighbours in one region.", check=cosine)
    parts: int = setting(12, "Number of clusters and of superpixels.", check=between(2, 20))
    seed: int = setting(
        0,
        "Seed of initial weights, random targets, patch order and t-SNE.",
        check=between(0, 2**32 - 1),  # scikit-learn's range
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_values(self)

    def student(self) -> StudentOptions:
        """The student's settings among these; every location is read at each step."""
        return StudentOptions(
            preset=self.preset,
            steps=self.steps,
            lr=self.lr,
            seed=self.seed,
            queries=ALL,
            guide=self.guide,
            agree=self.agree,
        )
