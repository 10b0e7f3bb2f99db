"""RLCF, reinforcement learning with CLIP feedback (Zhao et al., ICLR 2024): a second CLIP rewards the prompt's guesses.

At each step every confident view proposes its first classes; a second, better model, named by the setting ``reward``,
says how well each fits the view. The reward is its CLIP score, less the mean over the view's proposals, and the prompt
is tuned by policy gradient (REINFORCE) to propose what is rewarded.

The reward model sees the same views, and is loaded once. Published runs start from a prompt that CoOp learned:
``rlcf:reward=TEACHER,file=coop.safetensors``, see `apm prompts`; without a file it starts from the run's own, as every
method here. The reward model's prompt is in words in either case: a learned context means nothing to another teacher.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.functional import normalize

from apm.errors import UsageError
from apm.teachers import check_teacher, load_teacher
from apm.text.zeroshot import ZeroShotHead

from .base import Batch, MethodOptions, display_name
from .learned import LearnedContext
from .prompted import PromptSettings, PromptTuned
from .published import OTHERS, Published

if TYPE_CHECKING:
    from apm.teachers.base import Teacher


@dataclass(frozen=True, kw_only=True)
class RLCFSettings(PromptSettings):
    """The published settings for ImageNet; the authors take 5 steps on fine-grained data sets."""

    reward: str = ""
    """The second teacher, as ``--teacher`` names one; the authors take a ViT-L/14."""
    steps: int = 3
    lr: float = 7e-3
    weight_decay: float = 5e-4
    """Of AdamW."""
    proposals: int = 3
    """Classes that each view proposes at each step; no more than there are."""
    score_weight: float = 2.5
    """Times the reward model's cosine, as in the CLIP score."""
    file: str = ""
    """A prompt that CoOp learned, in safetensors, to start from; empty: words."""
    transfer: bool = False
    """Use it also on other class names than it was learned for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transfer and not self.file:
            raise UsageError(
                "RLCF's transfer=true is about a learned prompt, but none is named: file=coop.safetensors."
            )
        if self.file and self.prompt is not None:
            raise UsageError(f'A learned prompt brings its own words: leave out prompt="{self.prompt}".')
        if not self.reward:
            raise UsageError(
                "RLCF needs a second teacher that rewards the first: name one, as in rlcf:reward=ViT-L-14/openai."
            )
        if self.proposals < 2:
            raise UsageError(
                f"RLCF's proposals must be 2 or more, not {self.proposals}: rewards are compared with their mean."
            )


PUBLISHED = Published(
    source="RLCF: 3 steps, 5 on fine-grained sets",
    by_dataset={OTHERS: {"steps": 5}},
    prompts="single",
    augmix=(OTHERS,),
)


class RLCF(PromptTuned):
    """Tune the prompt by the second teacher's rewards, anew for each image, and classify the image itself.

    The extras ``entropy_first`` and ``entropy_last`` are TPT's: of the kept views' mean prediction, in nats.
    """

    published = PUBLISHED
    registered = "rlcf"
    settings_type = RLCFSettings
    _chosen: RLCFSettings

    def __init__(self, options: MethodOptions) -> None:
        super().__init__(options)
        chosen = self._chosen
        check_teacher(chosen.reward)  # a wrong name fails before anything is computed
        self.weight_decay = chosen.weight_decay
        self.settings = {name: value for name, value in self.settings.items() if name not in ("file", "transfer")}
        if chosen.file:
            self.learned = LearnedContext(chosen.file, transfer=chosen.transfer)
            others = {key: value for key, value in options.overrides.items() if key != "file"}
            self.name = display_name(self.registered, replace(options, overrides=others), self.learned.stem)
            self.settings = {**self.settings, **self.learned.settings}
        self.published_start = "from CoOp's context" if chosen.file else "without its start from CoOp's context"
        self._device = options.device
        self._reward: Teacher | None = None
        self._reward_head: ZeroShotHead | None = None

    def loss(self, logits: Tensor, text: Tensor, beside: Tensor | None) -> Tensor:
        """The mean of reward × cross-entropy over each kept view's first classes."""
        assert beside is not None  # (K, C)
        proposed = logits.detach().topk(min(self._chosen.proposals, logits.shape[1]), dim=1).indices  # (K, n)
        scores = beside.gather(1, proposed)
        rewards = scores - scores.mean(dim=1, keepdim=True)
        return -(rewards * logits.log_softmax(dim=1).gather(1, proposed)).mean()

    def beside(self, batch: Batch) -> Iterable[Tensor]:
        """The reward model's scores of each view and class, (V, C) for each image."""
        if self._reward is None:
            self._reward = load_teacher(self._chosen.reward, device=self._device)
        head = self._reward_head
        template = self.words(batch.head.templates)
        if head is None or (head.labels, head.templates) != (batch.head.labels, (template,)):
            head = self._reward_head = ZeroShotHead.build(self._reward, batch.head.labels, (template,))
        seen = batch.seen_by(self._reward, head)
        for views in seen.views(self._chosen.views, min_area=self._chosen.min_area):
            cosines = normalize(views.float(), dim=1) @ head.features.T
            yield (self._chosen.score_weight * cosines).clamp(min=0).to(batch.teacher.device)
