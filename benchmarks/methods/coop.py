"""CoOp, context optimisation (Zhou et al., IJCV 2022): a prompt learned from labelled images, used as it is.

And TPT from there: ``tpt+coop`` makes the learned context the state to which TPT returns for each image. (TPT's own
code means to do so, and fails where it copies the context from the learner.) The context is read from a file, see
`apm prompts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from apm.errors import UsageError, unknown
from apm.text.learned_prompt import check_class_names, read_learned_prompt, tunable
from apm.text.zeroshot import ZeroShotHead

from .base import Batch, Json, MethodOptions, Prediction, display_name
from .prompted import PromptSettings
from .published import Published
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


PUBLISHED = Published(source="the learned context; where it is tuned, views as TPT", augmix=True)


class TPTCoOp(TPT):
    """TPT from a context that CoOp learned. Its extras are TPT's."""

    published = PUBLISHED
    registered = "tpt+coop"
    settings_type = LearnedSettings
    conditional = False
    """Whether it takes CoCoOp's prompts, and not CoOp's."""
    _chosen: LearnedSettings

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        path = Path(self._chosen.file).expanduser()
        self._learned = read_learned_prompt(path)
        if (self._learned.meta_net is not None) is not self.conditional:
            kind, fits = ("CoOp", "coop") if self.conditional else ("CoCoOp", "cocoop")
            raise UsageError(f'"{path}" was learned by {kind}: use it with {fits} or tpt+{fits}.')
        others = {key: value for key, value in options.overrides.items() if key != "file"}
        self.name = display_name(self.registered, replace(options, overrides=others), path.stem)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()  # where the file is has no part in the answers
        learned = {"file": path.name, "sha256": digest, "uses_training_data": "yes"}
        self.settings: Mapping[str, Json] = {**self.settings, **learned}

    def own_prompt(self, templates: Sequence[str]) -> str:
        """The words before the class name."""
        return f"[{len(self._learned.context)} vectors of {Path(self._chosen.file).stem}] {{}}."

    def prepare(self, batch: Batch) -> None:
        """Put the learned context before the class names, once for a teacher and its class names."""
        if self._run_head is batch.head:
            return
        names, stem = batch.head.labels, Path(self._chosen.file).stem
        if not self._chosen.transfer:
            check_class_names(self._learned, names, name=stem)
        self._learned = self._learned.to(batch.teacher.device)
        self._prompt = tunable(self._learned, batch.teacher, list(names), name=stem, group=self._chosen.group)
        features = self._prompt.features(self._prompt.initial)
        self._start = ZeroShotHead(names, features, batch.head.logit_scale, (self.own_prompt(()),))
        self._run_head = batch.head


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
