"""One image → one answer: the teacher's token, a student overfit to it from scratch, and what both say.

The order of work for each image is that of Modi & Rawat 2024, section 3: the frozen teacher maps the image to one
token; a student drawn afresh is overfit to that token; its own token is compared with the text features of the labels.
Nothing of one image is left when the next one comes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from apm.adapt import LARGEST_BATCH, AdaptConfig, AdaptResult, TestTimeTrainer
from apm.errors import ImageError, UsageError, unknown
from apm.images import MAX_PIXELS, LoadedImage, from_pixels, load_image, student_input
from apm.labels import LABEL_SET_NAMES, check_labels, check_templates, prompt_templates
from apm.labels import label_set as labels_of
from apm.model import APMConfig
from apm.paths import printable
from apm.teachers import DEFAULT, load_default_teacher, load_teacher
from apm.teachers.base import Teacher
from apm.zeroshot import ZeroShotHead

DECODERS = 4
"""Threads that decode ahead of the adaptation; more only fill memory, since the adaptation is the slow part."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One label and its probability in [0, 1]."""

    label: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """What the steps did to the student of one image.

    Attributes:
        losses: loss before each step.
        cosines: cosine between the student's and the teacher's token before each step.
        steps: steps really made; fewer than asked for when a tolerance was reached.
        first_loss: loss of the untrained student.
        last_loss: loss after the last step.
        cosine: cosine after the last step.
        seconds: wall time of the adaptation, shared evenly among the images of a batch.
        precision: of the matrix products, "fp32" or "bf16".
    """

    losses: tuple[float, ...]
    cosines: tuple[float, ...]
    steps: int
    first_loss: float
    last_loss: float
    cosine: float
    seconds: float
    precision: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said about one image.

    Attributes:
        path: the file, or None for an image given as pixels.
        top: the student's best labels, most probable first; empty when there is an error.
        teacher_top: the teacher's own.
        agree: whether both put the same label first; None when there is an error.
        adaptation: the record of the steps; None when none was made.
        notes: what was unusual about the file.
        error: why there is no answer, naming the file; None when there is one.
    """

    path: Path | None
    top: tuple[Prediction, ...] = ()
    teacher_top: tuple[Prediction, ...] = ()
    agree: bool | None = None
    adaptation: Adaptation | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A decoded image as both models want it, or the reason why there is none."""

    path: Path | None
    teacher_pixels: Tensor | None = None  # (3, H, W)
    student_pixels: Tensor | None = None  # (3, S, S)
    notes: tuple[str, ...] = ()
    error: str | None = None


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
        preset: size of the student, "paper" or "small".
        readout: "query" (the object query) or "mean".
        steps: optimisation steps for each image; None for the default of `AdaptConfig`.
        lr: learning rate; None for the default of `AdaptConfig`.
        precision: of the matrix products, "auto", "fp32" or "bf16".
        device: "auto" (CUDA when there is one), "cpu" or "cuda".
        batch_size: images adapted side by side, each with its own weights; None chooses by the device. It changes the
            speed, not the answers.
        seed: of the student's initial weights.
        top_k: how many labels an answer ranks.
        max_pixels: largest width × height of a file that is decoded.

    Raises:
        UsageError: a name or value is wrong, or labels are given twice over.
        TeacherError: the teacher cannot be had.
    """

    def __init__(
        self,
        teacher: str | Teacher | None = None,
        *,
        labels: Sequence[str] | None = None,
        label_set: str | None = None,
        prompts: str | None = None,
        templates: Sequence[str] | None = None,
        preset: str = "paper",
        readout: str = "query",
        steps: int | None = None,
        lr: float | None = None,
        precision: str = "auto",
        device: str = "auto",
        batch_size: int | None = None,
        seed: int = 0,
        top_k: int = 5,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        # Everything cheap is checked before the teacher, which takes seconds to load.
        if labels is not None and label_set is not None:
            raise UsageError("labels and label_set are two ways to say the same; give one of them.")
        if prompts is not None and templates is not None:
            raise UsageError("prompts and templates are two ways to say the same; give one of them.")
        labels = check_labels(labels) if labels is not None else None
        if label_set is not None and label_set not in LABEL_SET_NAMES:
            raise unknown("label set", label_set, LABEL_SET_NAMES)
        templates = check_templates(templates) if templates is not None else None
        if prompts is not None:
            prompt_templates(prompts)
        for name, value in (("top_k", top_k), ("max_pixels", max_pixels), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1.")
        chosen = {name: value for name, value in (("steps", steps), ("lr", lr)) if value is not None}
        self.adapt_config = AdaptConfig(precision=precision, seed=seed, **chosen)  # type: ignore[arg-type]
        student = APMConfig.preset(preset, dim=512, readout=readout)  # type: ignore[arg-type]
        self.device = pick_device(device)

        asked = teacher
        if teacher is None:
            teacher = load_default_teacher(device=self.device)
        elif isinstance(teacher, str):
            teacher = load_teacher(teacher, device=self.device)
        self.teacher: Teacher = teacher
        self.fell_back = asked is None and teacher.name != DEFAULT
        self.top_k = top_k
        self.max_pixels = max_pixels
        self.preset = preset
        self.label_source, names = _choose_labels(labels, label_set, teacher)
        self.prompt_source, chosen_templates = _choose_templates(prompts, templates, teacher)
        self.head = ZeroShotHead.build(teacher, names, chosen_templates)
        self.student_config = APMConfig.preset(preset, dim=teacher.dim, readout=student.readout)
        self.trainer = TestTimeTrainer(
            self.student_config, self.adapt_config, device=self.device, batch_size=batch_size
        )
        # One student's products keep a CPU's cores busy: there, waiting for a batch would only delay the first answer.
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else LARGEST_BATCH)

    def __call__(self, image: str | os.PathLike[str] | Image.Image) -> Answer:
        """Classify one file, or one PIL image.

        Raises:
            ImageError: the file cannot be read, or the steps gave no finite result.
        """
        if isinstance(image, Image.Image):
            prepared = self._prepare(None, from_pixels(image))
        else:
            prepared = self._prepare_file(Path(image))
        answer = next(self._answer([prepared]))
        if answer.error is not None:
            raise ImageError(answer.error)
        return answer

    def classify(self, paths: Iterable[str | os.PathLike[str]]) -> Iterator[Answer]:
        """Yield one answer a path, in the order of `paths`, each as soon as its batch is done.

        Decoding runs ahead in threads, by a bounded number of images. A file that cannot be read gives an answer with
        an `error`, and the others are not touched by it.
        """
        pool = ThreadPoolExecutor(max_workers=min(DECODERS, os.cpu_count() or 1), thread_name_prefix="decode")
        waiting: deque[Future[_Prepared]] = deque()
        source = iter(paths)
        try:
            batch: list[_Prepared] = []
            while True:
                while len(waiting) < 2 * self.batch_size + DECODERS and (path := next(source, None)) is not None:
                    waiting.append(pool.submit(self._prepare_file, Path(path)))
                if not waiting:
                    break
                batch.append(waiting.popleft().result())
                # A failure at the head of a batch has nothing to wait for.
                if sum(one.error is None for one in batch) in (0, self.batch_size):
                    yield from self._answer(batch)
                    batch = []
            yield from self._answer(batch)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _prepare_file(self, path: Path) -> _Prepared:
        try:
            return self._prepare(path, load_image(path, max_pixels=self.max_pixels))
        except ImageError as error:
            return _Prepared(path=path, error=str(error))

    def _prepare(self, path: Path | None, loaded: LoadedImage) -> _Prepared:
        return _Prepared(
            path=path,
            teacher_pixels=self.teacher.preprocess(loaded.image),
            student_pixels=student_input(loaded.image, self.student_config.image_size),
            notes=loaded.notes,
        )

    def _answer(self, batch: Sequence[_Prepared]) -> Iterator[Answer]:
        """Yield the answers of one batch, failed files in their places."""
        good = [one for one in batch if one.error is None]
        answers = iter(self._adapt(good) if good else ())
        for one in batch:
            yield next(answers) if one.error is None else Answer(path=one.path, error=one.error)

    def _adapt(self, batch: Sequence[_Prepared]) -> list[Answer]:
        targets = self._teacher_tokens(
            [one.teacher_pixels for one in batch if one.teacher_pixels is not None]
        )  # (B, D)
        images = torch.stack([one.student_pixels for one in batch if one.student_pixels is not None])  # (B, 3, S, S)
        result = self.trainer.adapt(images, targets)
        return [self._one_answer(one, result, row, targets[row]) for row, one in enumerate(batch)]

    def _teacher_tokens(self, pixels: Sequence[Tensor]) -> Tensor:
        """Return the teacher's tokens (B, D)."""
        # One by one on a CPU, where batching gains nothing and would change the last bits with the batch's size.
        rows = 1 if self.teacher.device.type == "cpu" else len(pixels)
        stacked = torch.stack(list(pixels))
        return torch.cat([self.teacher.encode_image(part) for part in stacked.to(self.teacher.device).split(rows)])

    def _one_answer(self, one: _Prepared, result: AdaptResult, row: int, target: Tensor) -> Answer:
        adaptation = _record(result, row)
        name = printable(one.path) if one.path is not None else "image"
        error = None
        if not bool(target.isfinite().all()):
            error = f"{name}: the teacher's token is not finite; its weights may be damaged"
        elif not bool(result.finite[row]):
            error = f"{name}: the loss is not finite; try a smaller learning rate than {self.adapt_config.lr:g}"
        if error is not None:
            return Answer(path=one.path, adaptation=adaptation, notes=one.notes, error=error)
        # Row by row: a product of several rows may round otherwise, and answers must not depend on the batch.
        student, teacher = (
            self.head.probabilities(token[None])[0] for token in (result.tokens[row], target)
        )  # (C,) each
        top, teacher_top = self._ranking(student), self._ranking(teacher)
        return Answer(
            path=one.path,
            top=top,
            teacher_top=teacher_top,
            agree=bool(student.argmax() == teacher.argmax()),  # by number: ImageNet has two names twice
            adaptation=adaptation,
            notes=one.notes,
        )

    def _ranking(self, probabilities: Tensor) -> tuple[Prediction, ...]:
        best = probabilities.topk(min(self.top_k, len(self.head.labels)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(Prediction(label=self.head.labels[index], probability=value) for index, value in pairs)


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda" ("cuda:1" too).

    Raises:
        UsageError: an unknown name, or CUDA asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise unknown("device", name, ("auto", "cpu", "cuda"))
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f'Device "{name}" was asked for, but PyTorch finds no CUDA device here; use cpu or auto.')
    if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
        raise UsageError(f'There is no device "{name}"; this machine has {torch.cuda.device_count()}, counted from 0.')
    return torch.device(name)


def _choose_labels(
    labels: Sequence[str] | None, label_set: str | None, teacher: Teacher
) -> tuple[str, tuple[str, ...]]:
    """Return where the labels come from, in a word, and the labels."""
    if labels is not None:
        return "labels", tuple(labels)
    name = label_set or ("teacher" if teacher.default_labels else "imagenet")
    return name, labels_of(name, teacher_labels=teacher.default_labels)


def _choose_templates(
    prompts: str | None, templates: Sequence[str] | None, teacher: Teacher
) -> tuple[str, tuple[str, ...]]:
    """Return where the templates come from, in a word, and the templates."""
    if templates is not None:
        return "templates", tuple(templates)
    if prompts is None and teacher.default_templates is not None:
        return "teacher", teacher.default_templates
    return prompts or "single", prompt_templates(prompts or "single")


def _record(result: AdaptResult, row: int) -> Adaptation:
    steps = int(result.steps[row])
    losses = tuple(result.losses[row, :steps].tolist())
    return Adaptation(
        losses=losses,
        cosines=tuple(result.cosines[row, :steps].tolist()),
        steps=steps,
        first_loss=losses[0] if losses else float(result.final_losses[row]),
        last_loss=float(result.final_losses[row]),
        cosine=float(result.final_cosines[row]),
        seconds=result.seconds / len(result.tokens),
        precision=result.precision,
    )
