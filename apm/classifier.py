"""One image → one answer: the teacher's token, a student overfit to it from scratch, and what both say.

The order of work for each image is that of Modi & Rawat 2024, section 3: the frozen teacher maps the image to one
token; a new student is overfit to that token; its own token is compared with the text features of the labels.
Nothing of one image is left when the next one comes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from apm.answers import Adaptation, Answer, Perception, Prediction
from apm.devices import pick_device
from apm.errors import ImageError, TeacherError, UsageError
from apm.images.ahead import in_order
from apm.images.load import MAX_PIXELS, LoadedImage, from_pixels, load_image, opened_image, student_input
from apm.images.paths import printable
from apm.labels import check_labels, check_templates, check_words, choose_labels, choose_templates
from apm.segment_values import PLACES
from apm.segmentation import Segmentation, segment_image
from apm.student.cells import Cells
from apm.student.drawn_ahead import DrawnAhead
from apm.student.field import SavedField, resample
from apm.teachers import DEFAULT, load_default_teacher, load_teacher
from apm.teachers.base import Teacher, check_grid
from apm.test_time.grid_views import view_cells
from apm.test_time.inputs import teacher_tokens
from apm.test_time.options import StudentOptions
from apm.test_time.readings import read_modes
from apm.test_time.targets import aggregate
from apm.test_time.trainer import LARGEST_BATCH, AdaptResult, TestTimeTrainer
from apm.test_time.view_numbers import number_of
from apm.test_time.views import pixels_id, view_tokens
from apm.text.zeroshot import ZeroShotHead

__all__ = ["Adaptation", "Answer", "Classifier", "Perception", "Prediction"]

_LIKELY_DIM = 512  # of the default teacher; a guess until one is loaded

DECODERS = 4
"""Threads that decode ahead of the adaptation; more only fill memory, since the adaptation is the slow part."""


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A decoded image as both models want it."""

    path: Path | None
    teacher_pixels: Tensor  # (3, H, W)
    student_pixels: Tensor  # (3, S, S)
    notes: tuple[str, ...]
    image: Image.Image | None  # kept where the target is made from it: from its grid, or from views of it
    grid: Tensor | None = None  # the teacher's (h', w', D), if it is there already


class Classifier:
    """Zero-shot classification with test-time training, one image at a time.

    Args:
        teacher: a name that `apm.load_teacher` knows, a `Teacher`, or None for the default one (which falls back to the
            embedded teacher when its weights cannot be had, and says so in its notes).
        labels: class names to choose from, two or more.
        label_set: name of a set of class names instead, such as "imagenet". With neither, the teacher's own labels,
            else ImageNet's 1000.
        prompts: name of a set of prompt templates: "single", "simple" or "openai". None takes the teacher's own, else
            "single".
        templates: prompt templates instead, each with one ``{}`` for the class name.
        student: the settings of the student; None for the defaults of `apm.StudentOptions`.
        device: "auto" (CUDA when there is one), "cpu" or "cuda".
        batch_size: images adapted side by side, each with its own weights; None chooses by the device. It changes the
            speed, not the answers.
        top_k: how many labels an answer ranks.
        min_probability: answers whose best label is less probable are marked as unsure, in [0, 1].
        max_pixels: largest width × height of a file that is decoded. Decoding takes 8 bytes a pixel for most formats,
            up to 24 for WebP, AVIF and JPEG 2000, and all threads together `apm.images.load.DECODING_BYTES`, or what
            one larger picture takes.
        progress: called with the number of labels whose text is encoded and the number of all; not at all where their
            features are cached.

    Raises:
        UsageError: a name or value is wrong, or labels are given twice over.
        TeacherError: the teacher cannot be had, or has no grid where one is to be distilled.
    """

    def __init__(
        self,
        teacher: str | Teacher | None = None,
        *,
        labels: Sequence[str] | None = None,
        label_set: str | None = None,
        prompts: str | None = None,
        templates: Sequence[str] | None = None,
        student: StudentOptions | None = None,
        device: str = "auto",
        batch_size: int | None = None,
        top_k: int = 5,
        min_probability: float = 0.0,
        max_pixels: int = MAX_PIXELS,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        # Everything cheap is checked before the teacher, which takes seconds to load.
        check_words(labels, label_set, prompts, templates)
        for name, value in (("top_k", top_k), ("max_pixels", max_pixels), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= min_probability <= 1:
            raise UsageError(f"min_probability is {min_probability}; it must lie between 0 and 1.")
        labels = None if labels is None else check_labels(labels)
        templates = None if templates is None else check_templates(templates)
        self.device = pick_device(device)
        self.student = student or StudentOptions()
        self._policy = self.student.policy()
        self.adapt_config = self.student.training(self.device)
        TestTimeTrainer.check(self.student.model(dim=512), self.adapt_config)

        drawn = DrawnAhead(self.student.model(getattr(teacher, "dim", _LIKELY_DIM)), self.adapt_config.seed)
        asked = teacher
        if teacher is None:
            teacher = load_default_teacher(device=self.device)
        elif isinstance(teacher, str):
            teacher = load_teacher(teacher, device=self.device)
        self.teacher: Teacher = teacher
        if self.student.distil != "cls" and not number_of(self.student.grid_views)[1]:
            check_grid(teacher)
        self.fell_back = asked is None and teacher.name != DEFAULT
        self.top_k = top_k
        self.min_probability = min_probability
        self.max_pixels = max_pixels
        self.label_source, names = choose_labels(labels, label_set, teacher.default_labels)
        self.prompt_source, chosen_templates = choose_templates(prompts, templates, teacher.default_templates)
        self.head = ZeroShotHead.build(teacher, names, chosen_templates, progress=progress)
        self.student_config = self.student.model(teacher.dim)
        self.trainer = TestTimeTrainer(
            self.student_config,
            self.adapt_config,
            device=self.device,
            batch_size=batch_size,
            initial=drawn.parameters(self.student_config),
        )
        # One student's products keep a CPU's cores busy: there, waiting for a batch would only delay the first answer.
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else LARGEST_BATCH)

    def __call__(self, image: str | os.PathLike[str] | Image.Image) -> Answer:
        """Classify one file, or one PIL image.

        Raises:
            ImageError: the file cannot be read, or the steps gave no finite result.
        """
        answer = next(self._answer([self._prepare_any(image)]))
        if answer.error is not None:
            raise ImageError(answer.error)
        return answer

    def classify_with_field(
        self,
        image: str | os.PathLike[str] | Image.Image,
        *,
        snapshots: Sequence[int] = (),
        grid_size: int | None = None,
    ) -> Perception:
        """Classify one file, or one PIL image, and keep what the answer was read from.

        Args:
            image: path, or pixels.
            snapshots: numbers of steps after which to keep the field.
            grid_size: side, in pixels, that the square is scaled to for the `Perception`'s grid; None: the teacher's
                default. What is distilled is always the default grid.

        Raises:
            ImageError: the file cannot be read, or the steps gave no finite result.
            TeacherError: the teacher has a grid, but not at this size.
        """
        prepared = self._prepare_any(image, keep_image=True)
        if isinstance(prepared, Answer):
            raise ImageError(prepared.error)
        whole = prepared.image
        assert whole is not None
        grid = None
        try:
            if hasattr(self.teacher, "encode_grid"):
                grid = self.teacher.encode_grid(whole, size=grid_size)
        except TeacherError:
            if grid_size is not None:
                raise
        if grid_size is None:
            prepared = replace(prepared, grid=grid)
        (answer,), result, tokens = self._adapt([prepared], keep_field=True, snapshots=snapshots)
        if answer.error is not None:
            raise ImageError(answer.error)
        return Perception(answer=answer, image=whole, result=result, token=tokens[0], grid=grid)

    def segment(
        self,
        image: str | os.PathLike[str] | Image.Image,
        *,
        background: Sequence[str] = (),
        min_area: float = 0.001,
        places: int = PLACES,
    ) -> Segmentation:
        """Say which label is where on the whole of a file, or a PIL image, of any shape.

        Args:
            image: path, or pixels.
            background: labels of this classifier that count as none; so do places where the best label is less probable
                than its `min_probability`.
            min_area: connected pieces with a smaller share of the image's area are given to what is next to them.
            places: along the shorter side, at which the fields are read.

        Raises:
            ImageError: the file cannot be read, or the steps gave no finite result.
            UsageError: only the token is distilled, which says nothing of places; or a value that cannot work.
        """
        if self.student.distil == "cls":
            raise UsageError(
                "Segmentation needs a target with information about locations: distil both or grid, not cls."
            )
        if isinstance(image, Image.Image):
            path, loaded = None, from_pixels(image)
        else:
            path, loaded = Path(image), load_image(image, max_pixels=self.max_pixels)

        def adapted(tile: Image.Image) -> SavedField:
            (answer,), result, _ = self._adapt(
                [self._prepare(path, LoadedImage(image=tile), keep_image=True)], keep_field=True
            )
            if answer.error is not None:
                raise ImageError(answer.error)
            assert result.folded is not None
            return result.folded

        return segment_image(
            loaded.image,
            adapted,
            self.head,
            background=background,
            min_probability=self.min_probability,
            min_area=min_area,
            places=places,
            notes=loaded.notes,
        )

    def classify(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[Answer]:
        """Yield one answer a path, in the order of `paths`, each as soon as its batch is done.

        Decoding runs ahead in threads, by a bounded number of images. A file that cannot be read gives an answer with
        an `error`, and the others are not touched by it.
        """
        workers = min(DECODERS, os.cpu_count() or 1)
        prepared = in_order(
            map(Path, paths), self._prepare_file, ahead=2 * self.batch_size + workers, workers=workers, size=_bytes
        )
        batch: list[_Prepared | Answer] = []
        try:
            for one in prepared:
                batch.append(one)
                # A failure at the head of a batch has nothing to wait for.
                if sum(isinstance(other, _Prepared) for other in batch) in (0, self.batch_size):
                    yield from self._answer(batch)
                    batch = []
            yield from self._answer(batch)
        finally:
            prepared.close()

    @property
    def _wants_image(self) -> bool:
        """Whether a target is made from the image itself: from its grid, or from views of it."""
        return self.adapt_config.distil != "cls" or self._policy.kind != "cls"

    def _prepare_any(
        self, image: str | os.PathLike[str] | Image.Image, *, keep_image: bool = False
    ) -> _Prepared | Answer:
        if isinstance(image, Image.Image):
            return self._prepare(None, from_pixels(image), keep_image=keep_image)
        return self._prepare_file(Path(image), keep_image=keep_image)

    def _prepare_file(self, path: Path, *, keep_image: bool = False) -> _Prepared | Answer:
        """Decode a file; what cannot be read is answered with its error."""
        try:
            if keep_image or self._wants_image:
                return self._prepare(path, load_image(path, max_pixels=self.max_pixels), keep_image=True)
            with opened_image(path, max_pixels=self.max_pixels) as loaded:
                return self._prepare(path, loaded, keep_image=False)
        except ImageError as error:
            return Answer(path=path, error=str(error))

    def _prepare(self, path: Path | None, loaded: LoadedImage, *, keep_image: bool) -> _Prepared:
        keep_image = keep_image or self._wants_image
        return _Prepared(
            path=path,
            image=loaded.image if keep_image else None,
            teacher_pixels=self.teacher.preprocess(loaded.image),
            student_pixels=student_input(loaded.image, self.student_config.image_size),
            notes=loaded.notes,
        )

    def _answer(self, batch: Sequence[_Prepared | Answer]) -> Iterator[Answer]:
        """Yield the answers of one batch, failed files in their places."""
        good = [one for one in batch if isinstance(one, _Prepared)]
        answers = iter(self._adapt(good)[0] if good else ())
        for one in batch:
            yield next(answers) if isinstance(one, _Prepared) else one

    def _adapt(
        self, batch: Sequence[_Prepared], *, keep_field: bool = False, snapshots: Sequence[int] = ()
    ) -> tuple[list[Answer], AdaptResult, Tensor]:
        """Return the answers, what they were read from, and the teacher's tokens (B, D)."""
        seen = torch.stack([one.teacher_pixels for one in batch])  # (B, 3, H, W)
        tokens = teacher_tokens(self.teacher, seen)  # (B, D)
        targets = torch.stack([self._target(one, token) for one, token in zip(batch, tokens, strict=True)])  # (B, D)
        images = torch.stack([one.student_pixels for one in batch])  # (B, 3, S, S)
        grids = self._target_grids(batch) if self.adapt_config.distil != "cls" else None
        modes = self.student.readout == "mode"
        result = self.trainer.adapt(
            images, targets, grids=grids, head=self.head, keep_field=keep_field or modes, snapshots=snapshots
        )
        if modes:
            result = read_modes(result, self.head, self.student_config.grid, targets)
        answers = [self._one_answer(one, result, row, tokens[row]) for row, one in enumerate(batch)]
        return answers, result, tokens

    def _target(self, one: _Prepared, token: Tensor) -> Tensor:
        """Return what the student's token is overfit to (D,): the teacher's token, or an aggregate over views."""
        if self._policy.kind == "cls" or not bool(token.isfinite().all()):
            return token
        assert one.image is not None
        others = view_tokens(
            one.image,
            self._policy.views,
            self.teacher,
            seed=self.adapt_config.seed,
            sample_id=pixels_id(one.image),
            start=1,
            min_area=self._policy.min_area,
        )  # (V − 1, D)
        return aggregate(self._policy, torch.cat((token[None], others)), self.head)

    def _target_grids(self, batch: Sequence[_Prepared]) -> Tensor | Cells:
        """Return the teacher's grids at the student's own locations (B, N, D), or those of several views."""
        images = [one.image for one in batch if one.image is not None]
        if self.student.grid_views != 1:
            return view_cells(
                images,
                self.teacher,
                self.student_config.grid,
                self.student.grid_views,
                seed=self.adapt_config.seed,
                sample_ids=[pixels_id(image) for image in images],
                grids=[one.grid for one in batch],
            )
        grids = [
            self.teacher.encode_grid(image) if one.grid is None else one.grid
            for one, image in zip(batch, images, strict=True)
        ]
        return torch.stack([resample(grid, self.student_config.grid) for grid in grids])

    def _one_answer(self, one: _Prepared, result: AdaptResult, row: int, teacher_token: Tensor) -> Answer:
        adaptation = Adaptation.of(result, row)
        name = printable(one.path) if one.path is not None else "image"
        error = None
        if not bool(teacher_token.isfinite().all()):
            error = f"{name}: the teacher's token is not finite; its weights may be damaged"
        elif not bool(result.finite[row]):
            error = f"{name}: the loss is not finite; try a smaller learning rate than {self.adapt_config.lr:g}"
        if error is not None:
            return Answer(path=one.path, adaptation=adaptation, notes=one.notes, error=error)
        # Row by row: a product of several rows may round otherwise, and answers must not depend on the batch.
        student, teacher = (
            self.head.probabilities(token[None])[0] for token in (result.tokens[row], teacher_token)
        )  # (C,) each
        top, teacher_top = self._ranking(student), self._ranking(teacher)
        return Answer(
            path=one.path,
            top=top,
            teacher_top=teacher_top,
            agree=bool(student.argmax() == teacher.argmax()),  # by number: ImageNet has two names twice
            unsure=top[0].probability < self.min_probability,
            adaptation=adaptation,
            notes=one.notes,
        )

    def _ranking(self, probabilities: Tensor) -> tuple[Prediction, ...]:
        best = probabilities.topk(min(self.top_k, len(self.head.labels)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(Prediction(label=self.head.labels[index], probability=value) for index, value in pairs)


def _bytes(one: _Prepared | Answer) -> int:
    if isinstance(one, Answer):
        return 0
    image = 4 * one.image.width * one.image.height if one.image is not None else 0
    return image + one.teacher_pixels.nbytes + one.student_pixels.nbytes
