"""What a method is, what it is given, and how its settings are declared.

A method is one object with `name`, `stream`, `gradients`, `settings` and `predict(batch)`. The `Batch` holds everything
that methods share, each part computed when first asked for and then kept. There are no labels in it, and no file names
either, since a file's folder is often its label.
"""

from __future__ import annotations

import dataclasses
import hashlib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from apm.errors import UsageError, unknown
from apm.settings import parse_value
from apm.student.cells import Cells
from apm.test_time.grid_views import view_cells
from apm.test_time.inputs import student_pixels, teacher_tokens
from apm.test_time.options import StudentOptions
from apm.test_time.views import MIN_AREA, check, view_tokens
from apm.test_time.views import views as make_views

if TYPE_CHECKING:
    from apm.teachers.base import Teacher
    from apm.text.descriptors import Descriptors
    from apm.text.zeroshot import ZeroShotHead

Json = str | int | float | bool | None
"""A value of a method's `settings`, as run records hold it."""

SettingsT = TypeVar("SettingsT")

CHUNK = 64
"""Images or views that a teacher encodes at a time."""


class KnownViews(Protocol):
    """Features of a batch's images that are known without looking at the images, as a store holds them."""

    @property
    def count(self) -> int:
        """V, how many views of each image are known; the first is the image itself."""
        ...

    @property
    def min_area(self) -> float:
        """Smallest share of an image's area in their crops."""
        ...

    def first(self, count: int) -> Tensor:
        """The first `count` ≤ V views' features: (B, count, D) float32 on the CPU, not normalised."""
        ...


class Batch:
    """B test images and what the teacher makes of them, shared by all methods of a run.

    Args:
        ids: one stable name per image. Only a hash of it is kept: it seeds the image's views.
        images: RGB images, or a function that opens them when a method first asks for pixels; pixels are copied without
            file name and metadata.
        teacher: the frozen teacher.
        head: its zero-shot head for the data set's class names.
        seed: of the run, for the views.
        chunk: how many images or views are encoded at a time; bounds the memory.
        stream_length: number of images in the whole stream that this batch is a part of, where it is known.
        known: features that need not be computed; views beyond them are.
    """

    def __init__(
        self,
        ids: Sequence[str],
        images: Sequence[Image.Image] | Callable[[], Sequence[Image.Image]],
        teacher: Teacher,
        head: ZeroShotHead,
        *,
        seed: int = 0,
        chunk: int = CHUNK,
        stream_length: int | None = None,
        known: KnownViews | None = None,
    ) -> None:
        if not callable(images) and len(ids) != len(images):
            raise ValueError(f"{len(ids)} ids for {len(images)} images")
        self.teacher = teacher
        self.head = head
        self.seed = seed
        self.stream_length = stream_length
        self._open: Callable[[], Sequence[Image.Image]] | None = images if callable(images) else None
        self._images = None if callable(images) else tuple(_bare(image) for image in images)
        self._keys = tuple(view_key(name) for name in ids)
        self._known = known
        self._chunk = chunk
        self._pixels: Tensor | None = None
        self._tokens: Tensor | None = None
        self.augmix = False
        """Whether views are also augmented by AugMix (`apm.test_time.augmix`); set by `under`."""
        self._views: dict[tuple[float, bool], Tensor] = {}
        self._student_images: dict[int, Tensor] = {}
        self._grids: Tensor | None = None
        self._cells: dict[tuple[int | str, int], Cells] = {}

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The images: RGB, without file names and metadata; opened only now where features were known."""
        if self._images is None:
            assert self._open is not None
            self._images = tuple(_bare(image) for image in self._open())
        return self._images

    @property
    def looked_at(self) -> bool:
        """Whether the images themselves were given or requested, not only their features."""
        return self._images is not None

    def pixels(self) -> Tensor:
        """The images as the teacher takes them: (B, 3, H, W) float32 on the CPU."""
        if self._pixels is None:
            self._pixels = torch.stack([self.teacher.preprocess(image) for image in self.images])
        return self._pixels

    def tokens(self) -> Tensor:
        """The teacher's CLS tokens: (B, D) float32, not normalised, on the teacher's device."""
        if self._tokens is None:
            if self._known is not None:
                self._tokens = self._known.first(1)[:, 0].to(self.teacher.device)
            else:
                self._tokens = teacher_tokens(self.teacher, self.pixels(), chunk=self._chunk)
        return self._tokens

    def views(self, count: int, *, min_area: float = MIN_AREA) -> Tensor:
        """The teacher's features of augmented views.

        Args:
            count: V ≥ 1. Fewer views are the first of more: asking for 33 and then for 64 encodes 31 more.
            min_area: smallest share of the image's area in a crop.

        Returns:
            (B, V, D) float32, not normalised, on the teacher's device; view 0 is `tokens`.
        """
        check(count, min_area)
        policy = (min_area, self.augmix)
        have = self._views.get(policy, self.tokens().unsqueeze(1))  # (B, 1, D) at first
        stored = self._known is not None and self._known.min_area == min_area and not self.augmix
        known = self._known if stored else None
        if known is not None and have.shape[1] < min(count, known.count):
            have = self._views[policy] = known.first(min(count, known.count)).to(self.teacher.device)
        if have.shape[1] < count:
            more = [self._encode_views(index, have.shape[1], count, min_area) for index in range(len(self))]
            have = torch.cat([have, torch.stack(more)], dim=1)  # (B, count, D)
            self._views[policy] = have
        return have[:, :count]

    def view_pixels(self, index: int, count: int, *, min_area: float = MIN_AREA) -> Tensor:
        """The views of one image as the teacher takes them, the same as those of `views`: made anew at each call.

        Returns:
            (count, 3, H, W) float32 on the CPU.
        """
        return make_views(
            self.images[index],
            count,
            self.teacher,
            seed=self.seed,
            sample_id=self._keys[index],
            min_area=min_area,
            augmix=self.augmix,
        )

    def grids(self) -> Tensor:
        """The teacher's grids at its default size: (B, h', w', D) float32, not normalised, on the teacher's device."""
        if self._grids is None:
            self._grids = torch.stack([self.teacher.encode_grid(image) for image in self.images])
        return self._grids

    def view_cells(self, views: int | str, side: int) -> Cells:
        """The teacher's grids, or tokens, of many views of each image, see `apm.test_time.grid_views`.

        Args:
            views: how many, or ``tokens``, or ``tokens:N``.
            side: of the student's grid, in cells.
        """
        key = (views, side)
        if key not in self._cells:
            self._cells[key] = view_cells(self.images, self.teacher, side, views, seed=self.seed, sample_ids=self._keys)
        return self._cells[key]

    def student_images(self, size: int) -> Tensor:
        """The images as the student takes them: (B, 3, size, size) float32 on the CPU."""
        if size not in self._student_images:
            self._student_images[size] = student_pixels(self.images, size)
        return self._student_images[size]

    def seen_by(self, teacher: Teacher, head: ZeroShotHead) -> Batch:
        """The same images, and the same views of them, for another teacher and its zero-shot head."""
        opened, length = (lambda: self.images), self.stream_length
        other = Batch((), opened, teacher, head, seed=self.seed, chunk=self._chunk, stream_length=length)
        other._keys, other.augmix = self._keys, self.augmix
        return other

    @contextmanager
    def under(self, *, head: ZeroShotHead, augmix: bool) -> Iterator[None]:
        """Inside the block, use another head, of other prompts, and AugMix or plain views."""
        before = self.head, self.augmix
        self.head, self.augmix = head, augmix
        try:
            yield
        finally:
            self.head, self.augmix = before

    def _encode_views(self, index: int, start: int, stop: int, min_area: float) -> Tensor:
        """Views `start` … `stop` − 1 of one image: (stop − start, D)."""
        return view_tokens(
            self.images[index],
            stop,
            self.teacher,
            seed=self.seed,
            sample_id=self._keys[index],
            start=start,
            min_area=min_area,
            augmix=self.augmix,
            chunk=self._chunk,
        )


@dataclass(kw_only=True)
class Prediction:
    """A method's output for B images."""

    logits: Tensor
    """(B, C) float32; their softmax is the method's probability of each class. A row with NaN is no answer."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """Figures to record per image, such as ``loss`` and ``entropy_last``: name → (B,)."""
    step_logits: Tensor | None = None
    """(B, K + 1, C) before each of K steps and after the last; only where steps are recorded."""

    def check(self, method: str, batch: Batch) -> Prediction:
        """Return this prediction, or raise a ValueError that names the method if a shape does not fit the batch."""
        rows, classes = len(batch), len(batch.head.features)
        if tuple(self.logits.shape) != (rows, classes):
            raise ValueError(
                f"method {method}: logits of shape {tuple(self.logits.shape)}, expected ({rows}, {classes})"
            )
        for name, values in self.extras.items():
            if tuple(values.shape) != (rows,):
                raise ValueError(f"method {method}: extra {name} of shape {tuple(values.shape)}, expected ({rows},)")
        steps = self.step_logits
        if steps is not None and (steps.ndim != 3 or steps.shape[0] != rows or steps.shape[2] != classes):
            raise ValueError(
                f"method {method}: step logits of shape {tuple(steps.shape)}, expected ({rows}, K + 1, {classes})"
            )
        return self


class Method(Protocol):
    """A method to classify test images; it never sees labels."""

    name: str
    """Names its column in records and tables; distinct within a run."""
    stream: bool
    """False: episodic, an image's answer does not depend on other images. True: it depends on those before it, or on
    those of its batch (see `Together`), so the order is part of the result."""
    gradients: bool
    """Whether answering takes back-propagation, through the student, a tower or vectors of the method's own."""
    settings: Mapping[str, Json]
    """Everything that shapes the answers, for the run's record."""

    def predict(self, batch: Batch) -> Prediction:
        """Classify the images of a batch."""
        ...


class StreamMethod(Method, Protocol):
    """A method that learns from the stream of images it has seen."""

    def reset(self) -> None:
        """Forget every image seen."""
        ...


@runtime_checkable
class Together(Protocol):
    """A method that answers a number of images together, and starts new with the next ones."""

    together: int
    """How many: a run hands it this many at a time, from the start of its order, and fewer at the end."""


@runtime_checkable
class HasOwnPrompt(Protocol):
    """A method that uses one prompt, where it cannot use the run's."""

    def own_prompt(self, templates: Sequence[str]) -> str | None:
        """The prompt that it uses in a run with these templates; None: these."""
        ...


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What a run gives to each method it makes. None: the method's own default."""

    student: StudentOptions = field(default_factory=lambda: StudentOptions(queries="all"))
    """``apm``: the run's student, all locations read at each step as in the paper. Its seed is the run's."""
    target: str | None = None
    """``apm``: what the student is overfit to, where a run compares several; None: the student's."""
    views: int | None = None
    """Number of views, for every method that uses views."""
    device: str | torch.device = "cpu"
    """Where methods compute."""
    seed: int = 0
    """Of the run."""
    batch_size: int | None = None
    """``apm``: students adapted at a time; never changes an answer."""
    record_steps: bool = False
    """``apm``: also give the logits of every step."""
    protocol: str = "common"
    """``common`` or ``published``, see `apm.benchmarks.methods.published`."""
    published: Mapping[str, Json] = field(default_factory=dict)
    """Settings that are published for the data set at hand; they win over the run's."""
    descriptors: Mapping[str, Descriptors] = field(default_factory=dict)
    """``published``: LLM descriptors of the classes of every data set of the run, by its name; empty: none."""
    oracle: bool = False
    """Whether settings that are chosen by the test labels may be asked for."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """Settings written behind the method's own name, which win: ``tpt:steps=0`` gives ``{"steps": "0"}``."""


def make_settings(kind: type[SettingsT], method: str, options: MethodOptions, **given: Any) -> SettingsT:
    """Make a method's settings: its defaults, what the run gives, what is published, what stands behind its name.

    Args:
        kind: a dataclass of values of type str, int, float, bool or a Literal of words, all with defaults; a field's
            `Setting` may say how else it is read.
        method: its name, for errors.
        options: of the run.
        given: values from the run's options, by field; None leaves the default.

    Raises:
        UsageError: an override names no field, or its value is not of the field's type.
    """
    fields = {entry.name: entry.metadata.get("setting") for entry in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values = {name: value for name, value in given.items() if value is not None}
    values.update({name: value for name, value in options.published.items() if name in fields})
    for name, text in options.overrides.items():
        if name not in fields:
            raise unknown(f'setting of method "{method}"', name, fields)
        values[name] = parse_value(f'Setting {name} of method "{method}"', text, hints[name], fields[name])
    return kind(**values)


def check_share(name: str, value: float) -> None:
    """Refuse a share outside (0, 1] with a `UsageError`."""
    if not 0 < value <= 1:
        raise UsageError(f"Setting {name} is {value}; it must be above 0 and at most 1.")


def settings_record(settings: Any) -> dict[str, Json]:
    """A settings dataclass as JSON values."""
    return dataclasses.asdict(settings)


def display_name(method: str, options: MethodOptions, *parts: str) -> str:
    """Name a variant: the method, then in brackets what sets it apart.

    Args:
        method: its name in the registry.
        options: their overrides are written as ``key=value`` unless `parts` already say them.
        parts: short words for the settings that always belong to the name.
    """
    words = list(parts) + [f"{name}={text}" for name, text in sorted(options.overrides.items())]
    return f"{method}[{','.join(words)}]" if words else method


def view_key(sample_id: str) -> str:
    """Replacement for a sample's id when its views are drawn: the id itself often contains the label."""
    return hashlib.sha256(sample_id.encode("utf-8", "surrogatepass")).hexdigest()


def _bare(image: Image.Image) -> Image.Image:
    """A copy of only the pixels: PIL keeps path and metadata, which may reveal the label, on images it opened."""
    copy = image.convert("RGB")
    copy.info = {}
    return copy
