"""The protocol ``published``: each method with its authors' own settings, prompts and views for every data set.

The other protocol, ``common``, compares methods: the same prompts and views for all, and one setting of each for all
data sets. ``published`` is what papers' tables hold, where each method has the prompts its authors chose, and often
settings by data set, found with its labels in sight. What is published of a method stands beside it, in a `Published`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apm.errors import unknown
from apm.labels import PROMPT_NAMES, prompt_templates
from apm.text.zeroshot import ZeroShotHead

from ..datasets.specs import SUITES
from .base import Batch, HasOwnPrompt, Json, Method, MethodOptions, Prediction, StreamMethod, Together

IMAGENETS, OTHERS = "ImageNet and its variants", "the cross-dataset sets"
"""Keys for many data sets in `Published.by_dataset`; a data set's own entry wins."""
DATASETS_OWN = "own"
_MEMBERS = {IMAGENETS: (*SUITES["natural-shifts"], "imagenet-c"), OTHERS: SUITES["cross-dataset"]}
_BY_DATASET = "by data set"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a method's authors use where it is not what `common` uses."""

    source: str = "as common"
    """Where it is from, and what of it cannot be had here."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """For all data sets."""
    by_dataset: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    """For a data set, or for `IMAGENETS` or `OTHERS`. A data set that is in neither has `settings` alone."""
    prompts: str = DATASETS_OWN
    """A name in `PROMPT_NAMES`; ``own``: the data set's own, as in CoOp's papers."""
    augmix: bool = False
    """Whether the views of the `OTHERS` are AugMix's; those of `IMAGENETS` are plain crops."""

    def values(self, dataset: str) -> dict[str, Json]:
        """The settings for one data set."""
        groups = [name for name, members in _MEMBERS.items() if dataset in members]
        found = dict(self.settings)
        for key in (*groups, dataset):
            found.update(self.by_dataset.get(key, {}))
        return found

    def augmented(self, dataset: str) -> bool:
        """Whether a data set's views are AugMix's."""
        return self.augmix and dataset in _MEMBERS[OTHERS]


class AsPublished:
    """A method that is made anew, as its authors have it, for each data set.

    Args:
        make: makes the method, from options.
        published: what is published of it.
        options: of the run; settings behind the method's name win here too.
    """

    def __init__(self, make: Callable[[MethodOptions], Method], published: Published, options: MethodOptions) -> None:
        if published.prompts not in (*PROMPT_NAMES, DATASETS_OWN):
            raise unknown("prompt set", published.prompts, PROMPT_NAMES)
        self._make, self._published, self._options = make, published, options
        self._dataset: str | None = None
        self._values: dict[str, Json] = {}
        self._method = make(options)
        self._heads: tuple[ZeroShotHead, ZeroShotHead] | None = None
        self.name, self.stream, self.gradients = self._method.name, self._method.stream, self._method.gradients
        varying = {name for one in published.by_dataset.values() for name in one} - {*options.overrides, "views"}
        plain = make(replace(options, published=published.settings)).settings
        self.settings: Mapping[str, Json] = {
            **plain,
            **dict.fromkeys(sorted(varying), _BY_DATASET),
            "published": published.source,
        }
        if isinstance(self._method, Together):
            self.together = self._method.together

    def begin(self, dataset: str) -> None:
        """Be ready for a data set: with its settings, and nothing of another."""
        values = self._published.values(dataset)
        if self._dataset is None or values != self._values:
            self._method = self._make(replace(self._options, published=values))
        self._dataset, self._values = dataset, values

    @property
    def used(self) -> dict[str, Json]:
        """What is used for the data set begun, for the record: settings that differ by data set, prompts and views."""
        assert self._dataset is not None
        views = "AugMix" if self._published.augmented(self._dataset) else "crops"
        return {
            **{name: self._method.settings[name] for name in self._values if name in self._method.settings},
            "prompts": self._published.prompts,
            **({"view_policy": views} if "views" in self._method.settings else {}),
        }

    def own_prompt(self, templates: Sequence[str]) -> str | None:
        """What it uses in the place of the run's templates; None: those."""
        mine = self._templates(templates)
        if isinstance(self._method, HasOwnPrompt) and (own := self._method.own_prompt(mine)) is not None:
            return own
        if tuple(mine) == tuple(templates):
            return None
        return mine[0] if len(mine) == 1 else f"[{self._published.prompts}: {len(mine)} prompts] {{}}"

    def reset(self) -> None:
        """As the method's own."""
        if self.stream:
            stream: Any = self._method
            reset: StreamMethod = stream
            reset.reset()

    def predict(self, batch: Batch) -> Prediction:
        """As the method's own, with its prompts and views."""
        assert self._dataset is not None, "begin() comes first"
        with batch.under(head=self._head(batch), augmix=self._published.augmented(self._dataset)):
            return self._method.predict(batch)

    def _templates(self, templates: Sequence[str]) -> Sequence[str]:
        name = self._published.prompts
        return templates if name == DATASETS_OWN else prompt_templates(name)

    def _head(self, batch: Batch) -> ZeroShotHead:
        """The head with the method's prompts, the same object for as long as the run's is the same."""
        templates = tuple(self._templates(batch.head.templates))
        if templates == batch.head.templates:
            return batch.head
        if self._heads is None or self._heads[0] is not batch.head:
            self._heads = batch.head, ZeroShotHead.build(batch.teacher, batch.head.labels, templates)
        return self._heads[1]
