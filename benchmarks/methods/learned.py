"""A prompt learned by CoOp or CoCoOp as the start of a method, read from a file; see `apm prompts`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from apm.errors import UsageError
from apm.teachers.base import Teacher
from apm.text.learned_prompt import check_class_names, read_learned_prompt, tunable
from apm.text.prompts import TunablePrompt
from apm.text.zeroshot import ZeroShotHead

from .base import Json


class LearnedContext:
    """A learned context in the place of a prompt's words.

    Args:
        file: the learned prompt, in safetensors.
        conditional: whether it must be CoCoOp's; else it must be CoOp's.
        transfer: whether it may be used with class names that it was not learned for.

    Raises:
        UsageError: the file is not there, damaged, no learned prompt, or of the other kind.
    """

    def __init__(self, file: str, *, conditional: bool = False, transfer: bool = False) -> None:
        path = Path(file).expanduser()
        self.stem = path.stem
        self.prompt = read_learned_prompt(path)
        if (self.prompt.meta_net is not None) is not conditional:
            kind, fits = ("CoOp", "coop") if conditional else ("CoCoOp", "cocoop")
            raise UsageError(f'"{path}" was learned by {kind}: use it with {fits} or tpt+{fits}.')
        self.template = f"[{len(self.prompt.context)} vectors of {self.stem}] {{}}."
        """What stands for the prompt in records and tables."""
        digest = hashlib.sha256(path.read_bytes()).hexdigest()  # where the file is has no part in the answers
        self.settings: Mapping[str, Json] = {
            "file": path.name,
            "transfer": transfer,
            "sha256": digest,
            "uses_training_data": "yes",
        }
        self._transfer = transfer

    def before(self, head: ZeroShotHead, teacher: Teacher, *, group: int) -> tuple[TunablePrompt, ZeroShotHead]:
        """Put it before a head's class names: the prompt, and its zero-shot head before any step.

        Raises:
            UsageError: it was learned for other class names, or with another teacher.
        """
        if not self._transfer:
            check_class_names(self.prompt, head.labels, name=self.stem)
        self.prompt = self.prompt.to(teacher.device)
        prompt = tunable(self.prompt, teacher, list(head.labels), name=self.stem, group=group)
        features = prompt.features(prompt.initial)
        return prompt, ZeroShotHead(head.labels, features, head.logit_scale, (self.template,))
