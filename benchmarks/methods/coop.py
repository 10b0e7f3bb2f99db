"""CoOp, context optimisation (Zhou et al., IJCV 2022): a prompt learned from labelled images, used as it is.

And TPT from there: ``tpt+coop`` makes the learned context the state to which TPT returns for each image. (TPT's own
code means to do so, and fails where it copies the context from the learner.) The context is read from a file, see
`apm prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from apm.errors import UsageError, unknown

from .base import Batch, Json, MethodOptions, Prediction, display_name
from .learned import LearnedContext
from .prompted import PromptSettings
from .published import OTHERS, Published
from .tpt import TPT


@dataclass(frozen=True, kw_only=True)
class LearnedSettings(PromptSettings):
    """TPT's settings, and which learned prompt."""

    file: str = ""
    """The learned prompt, in safetensors."""
    transfer: bool = False
    """Use it also on other class names than it was learned for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.file:
            raise UsageError(
                "CoOp and CoCoOp need a learned prompt: name its file, as in coop:file=coop.safetensors. "
                "apm prompts learn makes one; a published checkpoint is converted by apm prompts convert."
            )
        if self.prompt is not None:
            raise UsageError(f'A learned prompt brings its own words: leave out prompt="{self.prompt}".')


PUBLISHED = Published(source="the learned context; where it is tuned, views as TPT", augmix=(OTHERS,))


class TPTCoOp(TPT):
    """TPT from a context that CoOp learned. Its extras are TPT's."""

    published = PUBLISHED
    registered = "tpt+coop"
    settings_type = LearnedSettings
    conditional = False
    """Whether it takes CoCoOp's prompts, and not CoOp's."""
    _chosen: LearnedSettings
    learned: LearnedContext

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        chosen = self._chosen
        self.learned = LearnedContext(chosen.file, conditional=self.conditional, transfer=chosen.transfer)
        others = {key: value for key, value in options.overrides.items() if key != "file"}
        self.name = display_name(self.registered, replace(options, overrides=others), self.learned.stem)
        self.settings: Mapping[str, Json] = {**self.settings, **self.learned.settings}


class CoOp(TPTCoOp):
    """Zero-shot with a learned prompt; no views and no steps."""

    registered = "coop"
    gradients = False

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        used = ("file", "group", "transfer")
        for name in options.overrides:
            if name not in used:
                raise unknown(f'setting of method "{self.registered}"', name, used)
        self.settings = {name: self.settings[name] for name in (*used, "sha256", "uses_training_data")}

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images with the learned prompt."""
        self.prepare(batch)
        return Prediction(logits=self._start.logits(batch.tokens()))
