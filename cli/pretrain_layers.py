"""`apm pretrain --target-layer`: train a student that stands in for layers of its teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from apm.errors import UsageError
from apm.pretrain.config import PretrainConfig
from apm.settings import at_least, check_values, setting

from .data import place_of
from .options import flag
from .training import Session, train_network

if TYPE_CHECKING:
    from apm.pretrain.images import ImageSource


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """Which layers of the teacher the student stands in for.

    Raises:
        UsageError: a value that cannot work.
    """

    target_layer: int | None = setting(
        None,
        "Learn the output of this layer of the teacher (block of a transformer or stage of a ResNet, from 1) instead "
        "of grid and colours. The student replaces the layers after --from-layer up to this one, and the rest of the "
        "teacher runs on its output.",
        default_words="none",
        check=at_least(1),
    )
    from_layer: int = setting(0, "Layer whose output the student is given; 0: the image.", check=at_least(0))
    local: bool = setting(
        False,
        "Queries also contain the input at their location, which is not in the paper.",
    )

    def __post_init__(self) -> None:
        """Check each value, and that they go together."""
        check_values(self, flag)
        if self.target_layer is None and (self.from_layer or self.local):
            raise UsageError("--from-layer and --local need --target-layer, which is missing.")
        if self.target_layer is not None and self.target_layer <= self.from_layer:
            raise UsageError(
                f"--target-layer {self.target_layer} does not lie after --from-layer {self.from_layer}: there is no "
                "layer to replace."
            )


def pretrain_layers(
    source: ImageSource,
    out: Path,
    teacher: str | None,
    config: PretrainConfig,
    session: Session,
    options: LayerOptions,
    *,
    preset: str,
    sized: bool,
) -> None:
    """Train a student in place of layers; `sized`: whether --grid-size or --patch-size was given.

    Raises:
        UsageError: options that do not go together, or layers that the teacher does not have.
        TeacherError: the teacher's layers cannot be counted.
    """
    assert options.target_layer is not None
    if teacher is None:
        raise UsageError("--teacher-grid NAME is missing: it names the teacher whose layers are replaced.")
    if sized or config.grey_input or config.rgb_weight not in (0.0, PretrainConfig.rgb_weight):
        raise UsageError(
            "--grid-size, --patch-size, --grey-input and --rgb-weight cannot be combined with --target-layer: the "
            "layers' own sizes are used, and no colours are learned."
        )
    from apm.pretrain.layers import LayerTokens, LayerTrainer
    from apm.pretrain.stand_in import STAND_IN, StandInSizes
    from apm.teachers import load_grid_teacher
    from apm.teachers.cut_towers import Layers

    layers = Layers(load_grid_teacher(teacher, device=place_of(session.device)))
    first, last = options.from_layer, options.target_layer
    sizes = StandInSizes.between(layers, first, last, preset=preset, local=options.local)
    tokens = LayerTokens(layers, first, last)
    train_network(
        partial(LayerTrainer, tokens=tokens),
        STAND_IN,
        source,
        out,
        sizes,
        replace(config, rgb_weight=0.0),
        session,
        names={"layer": f"layer {last}"},
        result=f"held-out mean squared error on {{held_out:,}}, of the variance: layer {last} {{layer:.5f}}",
        data={"teacher": layers.teacher.identity, "from_layer": first, "target_layer": last},
        teacher=tokens,
        grid_size=tokens.grid_size,
    )
