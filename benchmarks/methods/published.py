"""The protocol ``published``: each method with its authors' own settings, prompts and views for every data set.

The other protocol, ``common``, compares methods: the same prompts and views for all, and one setting of each for all
data sets. ``published`` is what papers' tables hold, where each method has the prompts its authors chose, and often
settings by data set, found with its labels in sight. What is published of a method stands beside it, in a `Published`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apm.errors import UsageError, unknown
from apm.labels import PROMPT_NAMES, prompt_templates
from apm.teachers.base import Teacher
from apm.text.descriptors import Combination, Descriptors, described_head
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
    """Where it is from, and what of it is not available here."""
    settings: Mapping[str, Json] = field(default_factory=dict)
    """For all data sets."""
    by_dataset: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    """For a data set, or for `IMAGENETS` or `OTHERS`. A data set that is in neither has `settings` alone."""
    prompts: str = DATASETS_OWN
    """A name in `PROMPT_NAMES`; ``own``: the data set's own, as in CoOp's papers."""
    augmix: tuple[str, ...] = ()
    """Data sets whose views are AugMix's, with `IMAGENETS` or `OTHERS` for many; those of others are plain crops."""
    descriptors: Combination | None = None
    """How LLM descriptors of the classes join the prompts, where the user has some; None: its authors use none."""

    def values(self, dataset: str) -> dict[str, Json]:
        """The settings for one data set."""
        groups = [name for name, members in _MEMBERS.items() if dataset in members]
        found = dict(self.settings)
        for key in (*groups, dataset):
            found.update(self.by_dataset.get(key, {}))
        return found

    def augmented(self, dataset: str) -> bool:
        """Whether a data set's views are AugMix's."""
        return any(dataset in _MEMBERS.get(key, (key,)) for key in self.augmix)


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
        self.described: Descriptors | None = None
        """What is said of the classes of the data set begun, where there is a file and its authors use one."""
        self._heads: tuple[ZeroShotHead, Descriptors | None, ZeroShotHead] | None = None
        self.name, self.stream, self.gradients = self._method.name, self._method.stream, self._method.gradients
        self.encodes_views = getattr(self._method, "encodes_views", False)
        told = [published.source, getattr(self._method, "published_start", "")]
        descriptors: dict[str, Json] = {}
        if published.descriptors:
            descriptors = {"descriptors": "yes" if options.descriptors else "no"}
            told.append("with LLM descriptors" if options.descriptors else "without LLM descriptors")
        varying = {name for one in published.by_dataset.values() for name in one} - {*options.overrides, "views"}
        plain = make(replace(options, published=published.settings)).settings
        self.settings: Mapping[str, Json] = {
            **plain,
            **dict.fromkeys(sorted(varying), _BY_DATASET),
            "published": "; ".join(filter(None, told)),
            **descriptors,
        }
        if isinstance(self._method, Together):
            self.together = self._method.together

    def begin(self, dataset: str, class_names: Sequence[str] = ()) -> None:
        """Begin a data set: with its own settings, and with nothing kept from another.

        Raises:
            UsageError: the descriptors say nothing of some of the classes.
        """
        values = self._published.values(dataset)
        if self._published.descriptors and self._options.descriptors:
            self.described = self._options.descriptors[dataset]
            try:
                self.described.of(class_names)
            except UsageError as error:
                raise UsageError(f"{dataset}: {error}") from None
        if self._dataset is None or values != self._values:
            self._method = self._make(replace(self._options, published=values))
        self._dataset, self._values = dataset, values

    @property
    def used(self) -> dict[str, Json]:
        """What is used for the data set begun, for the record: settings that differ by data set, prompts and views."""
        assert self._dataset is not None
        views = "AugMix" if self._published.augmented(self._dataset) else "crops"
        mine = self._method.settings
        return {
            **{name: mine[name] for name in mine if name in self._values or name not in self.settings},
            "prompts": self._published.prompts,
            **({"view_policy": views} if "views" in mine else {}),
            **({"descriptors": file.name, "descriptors_sha256": file.digest} if (file := self.described) else {}),
        }

    def views(self, dataset: str) -> tuple[int, float | None] | None:
        """For a data set, how many plain crops it looks at, and their smallest area; None: at no views.

        AugMix's views count as none but the image itself: they are in no store.
        """
        settings = self._make(replace(self._options, published=self._published.values(dataset))).settings
        count, area = settings.get("views"), settings.get("min_area")
        if not isinstance(count, int):
            return None
        return (1 if self._published.augmented(dataset) else count), None if area is None else float(area)

    def own_prompt(self, templates: Sequence[str]) -> str | None:
        """What it uses in the place of the run's templates; None: those."""
        mine = self._templates(templates)
        if isinstance(self._method, HasOwnPrompt) and (own := self._method.own_prompt(mine)) is not None:
            return own
        if self.described is None and tuple(mine) == tuple(templates):
            return None
        if self.described is None and len(mine) == 1:
            return mine[0]
        count = "1 prompt" if len(mine) == 1 else f"{len(mine)} prompts"
        return f"[{self._published.prompts}: {count}{' and LLM descriptors' if self.described else ''}] {{}}"

    def reset(self) -> None:
        """As the method's own."""
        if self.stream:
            stream: Any = self._method
            reset: StreamMethod = stream
            reset.reset()

    def encode_texts(
        self, teacher: Teacher, head: ZeroShotHead, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Make its own head from the run's `head` now, so that its time is charged to no image.

        Args:
            teacher: of the run.
            head: of the run, for the data set begun.
            progress: as for `ZeroShotHead.build`.
        """
        templates = tuple(self._templates(head.templates))
        if self._heads is not None and self._heads[0] is head and self._heads[1] is self.described:
            return
        if self.described is not None:
            assert self._published.descriptors is not None
            combination = self._published.descriptors
            own = described_head(teacher, head.labels, templates, self.described, combination, progress=progress)
        elif templates == head.templates:
            own = head
        else:
            own = ZeroShotHead.build(teacher, head.labels, templates, progress=progress)
        self._heads = head, self.described, own

    def predict(self, batch: Batch) -> Prediction:
        """As the method's own, with its prompts and views."""
        assert self._dataset is not None, "begin() comes first"
        self.encode_texts(batch.teacher, batch.head)
        assert self._heads is not None
        with batch.under(head=self._heads[2], augmix=self._published.augmented(self._dataset)):
            return self._method.predict(batch)

    def _templates(self, templates: Sequence[str]) -> Sequence[str]:
        name = self._published.prompts
        return templates if name == DATASETS_OWN else prompt_templates(name)
