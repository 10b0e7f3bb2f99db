"""How CoOp's and CoCoOp's contexts are learned from a few labelled images (Zhou et al., IJCV and CVPR 2022).

Both towers are frozen: what is learned are the word vectors before the class name and, for CoCoOp, a small network that
adds to them what it makes of the image. Cross-entropy, SGD with a cosine schedule by epoch, random resized
crops and flips.

The order of the images and their crops are functions of seed, epoch and image, so that nothing but weights, momentum
and the number of steps has to be kept: a run that was killed goes on to the very same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

from apm.errors import ApmError, UsageError
from apm.images.ahead import in_order
from apm.images.crops import MIN_AREA, crop_box, view_generator
from apm.images.files import alone_with, write_atomically
from apm.images.load import normalised
from apm.images.paths import printable
from apm.settings import between, differences, refuse_other
from apm.teachers.base import Teacher
from apm.text.learned_prompt import CONTEXT, META_NET, LearnedPrompt, read_learned_prompt, write_learned_prompt
from apm.text.prompts import TunablePrompt

METHODS = ("coop", "cocoop")
WORDS = "a photo of a"
_FIRST_RATE = 1e-5  # of epoch 0
_MOMENTUM = "momentum."
_FORMAT = "apm-prompt-learning-1"


class Labelled(Protocol):
    """An image to learn from."""

    @property
    def id(self) -> str:
        """Names it among all; its crops depend on it."""
        ...

    @property
    def label(self) -> int:
        """Its class."""
        ...

    @property
    def load(self) -> Callable[[], Image.Image]:
        """Decodes it as RGB."""
        ...


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """What the learned weights depend on, besides images and teacher. The defaults are the published settings."""

    method: str = "coop"
    shots: int = 16
    epochs: int | None = None
    """None: CoCoOp's 10; CoOp's 50 with ImageNet's 1,000 classes or one shot, 100 with 2 to 4 shots, else 200."""
    batch_size: int | None = None
    """None: CoOp's 32, CoCoOp's 1."""
    words: int | None = None
    """Number of word vectors, drawn from N(0, 0.02²); None: they start from "a photo of a"."""
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 5e-4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "words"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be 1 or more.")
        if not self.lr > 0 or not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            raise UsageError(
                "The learning rate must be above 0, the momentum in [0, 1), weight decay 0 or more, not "
                f"{self.lr:g}, {self.momentum:g} and {self.weight_decay:g}."
            )
        between(0, 2**63 - 1)("seed", self.seed)

    def filled(self, classes: int) -> LearningConfig:
        """The same with the defaults filled in for so many classes."""
        coop = self.method == "coop"
        few = {1: 50, 2: 100, 3: 100, 4: 100}.get(self.shots, 200)
        epochs = self.epochs or ((50 if classes >= 1000 else few) if coop else 10)
        values = {**asdict(self), "epochs": epochs, "batch_size": self.batch_size or (32 if coop else 1)}
        return LearningConfig(**values)

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, from 0."""
        assert self.epochs is not None
        return _FIRST_RATE if epoch == 0 else self.lr * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2


@dataclass
class PromptLearner:
    """Learns a prompt, or goes on where an earlier run stopped.

    Args:
        path: of the learned prompt; until it is finished, what is needed to go on lies beside it.
        teacher: frozen, with an open text tower.
        class_names: C names.
        samples: what is learned from.
        config: all else.
        data: name and fingerprint of the images, for the record.
        workers: threads that decode images.

    Raises:
        UsageError: what lies at the path was made with other settings, images or teacher; the differences are named.
    """

    path: Path
    teacher: Teacher
    class_names: Sequence[str]
    samples: Sequence[Labelled]
    config: LearningConfig
    data: dict[str, str] = field(default_factory=dict)
    workers: int = 4

    def __post_init__(self) -> None:
        self.config = self.config.filled(len(self.class_names))
        self.step = 0
        self.partial = self.path.with_name(self.path.name + ".partial")
        names = [name.replace("_", " ") for name in self.class_names]
        words = " ".join(["X"] * self.config.words) if self.config.words else WORDS
        self._prompt = TunablePrompt(self.teacher, names, template=f"{words} {{}}.")
        if self.config.words and len(self._prompt.initial) != self.config.words:  # the tokenizer cuts what is too long
            raise UsageError(
                f"words is {self.config.words}: with so many the class names do not fit into the texts that "
                f"{self.teacher.name} takes. Use fewer."
            )
        self.weights = self._first_weights()
        self._optimiser = torch.optim.SGD(
            list(self.weights.values()),
            lr=self.config.lr,
            momentum=self.config.momentum,
            weight_decay=self.config.weight_decay,
        )
        self.finished = self._already_learned()
        if not self.finished:
            self._restore()

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self._per_epoch * int(self.config.epochs or 0)

    @property
    def _per_epoch(self) -> int:
        return math.ceil(len(self.samples) / int(self.config.batch_size or 1))

    def run(
        self, *, save_every: int = 100, on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None
    ) -> None:
        """Learn to the end and write the prompt; where it is learned already, do nothing.

        Args:
            save_every: steps between the files to go on from.
            on_step: called after each step with its number and ``loss``.

        Raises:
            ApmError: an image cannot be read, or the loss is not finite.
            UsageError: another process learns this prompt.
        """
        if self.finished:
            return
        with alone_with(self.path, "learning"):
            self._learn_to_the_end(save_every, on_step)

    def _learn_to_the_end(self, save_every: int, on_step: Callable[[int, dict[str, float]], None]) -> None:
        while self.step < self.steps:
            for pixels, classes in self._rest_of_epoch():
                loss = self.learn(pixels, classes, self.config.rate(self.step // self._per_epoch))
                if not math.isfinite(loss):
                    raise ApmError(
                        f"Step {self.step + 1}: the loss is not finite. Try a learning rate below {self.config.lr:g}."
                    )
                self.step += 1
                on_step(self.step, {"loss": loss})
                if self.step % save_every == 0 and self.step < self.steps:
                    self.save()
        write_learned_prompt(self.path, self.learned())
        self.partial.unlink(missing_ok=True)
        self.finished = True

    def learn(self, pixels: Tensor, classes: Tensor, rate: float) -> float:
        """Make one step on images (B, 3, H, W) of classes (B,); returns the loss before it."""
        features = normalize(self.teacher.encode_image(pixels).float(), dim=1)
        context, *net = self.weights.values()
        if net:
            loss = self._conditional_gradients(features, classes)
        else:
            text = self._prompt.features(context.detach())
            loss, slope = self._loss(features, text, classes)
            context.grad = self._prompt.gradient(context, slope)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        return loss

    def learned(self) -> LearnedPrompt:
        """The prompt as it is now."""
        context, *net = (value.detach().cpu() for value in self.weights.values())
        origin = {"settings": json.dumps(self.settings, sort_keys=True), "teacher": self.teacher.identity}
        origin["class_names"] = json.dumps(list(self.class_names))
        meta_net = dict(zip(META_NET, net, strict=True)) if net else None
        return LearnedPrompt(context=context, meta_net=meta_net, origin=origin)

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the bytes: settings, images and teacher."""
        return {**asdict(self.config), **self.data, "teacher": self.teacher.identity, "classes": len(self.class_names)}

    def save(self) -> None:
        """Write what is needed to continue."""
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.weights.items()}
        for name, value in self.weights.items():
            momentum = self._optimiser.state[value].get("momentum_buffer")
            tensors[_MOMENTUM + name] = (torch.zeros_like(value) if momentum is None else momentum).cpu().contiguous()
        record = {"settings": self.settings, "class_names": list(self.class_names), "step": self.step}
        write_atomically(self.partial, save(tensors, {"format": _FORMAT, "record": json.dumps(record)}))

    def _first_weights(self) -> dict[str, Tensor]:
        """The context, and CoCoOp's meta-net as torch draws linear layers."""
        generator = torch.Generator().manual_seed(self.config.seed)
        context = self._prompt.initial
        if self.config.words:
            context = 0.02 * torch.randn(context.shape, generator=generator).to(context.device)
        weights = {CONTEXT: context.clone()}
        if self.config.method == "cocoop":
            width, dim = context.shape[1], self.teacher.dim
            hidden = max(1, dim // 16)
            for name, shape, fan in zip(
                META_NET, [(hidden, dim), (hidden,), (width, hidden), (width,)], (dim, dim, hidden, hidden), strict=True
            ):
                drawn = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan)
                weights[name] = drawn.to(context.device)
        return {name: value.requires_grad_() for name, value in weights.items()}

    def _loss(self, features: Tensor, text: Tensor, classes: Tensor) -> tuple[float, Tensor]:
        """Cross-entropy of images (B, D) with the texts (C, D), and its gradient in the texts."""
        leaf = text.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(self.teacher.logit_scale * features @ leaf.T, classes)
            (slope,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), slope

    def _conditional_gradients(self, features: Tensor, classes: Tensor) -> float:
        """CoCoOp's: every image has texts of its own. Sets the gradients and returns the mean loss."""
        leaves, total = list(self.weights.values()), 0.0
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        for feature, one in zip(features, classes, strict=True):
            with torch.enable_grad():
                base, first, first_bias, second, second_bias = leaves
                context = base + linear(linear(feature, first, first_bias).relu(), second, second_bias)
            text = self._prompt.features(context.detach())
            loss, slope = self._loss(feature[None], text, one[None])
            upstream = self._prompt.gradient(context.detach(), slope) / len(features)
            for leaf, gradient in zip(leaves, torch.autograd.grad(context, leaves, upstream), strict=True):
                assert leaf.grad is not None
                leaf.grad += gradient
            total += loss / len(features)
        return total

    def _rest_of_epoch(self) -> Any:
        """Yield the batches that are left of this epoch: pixels (B, 3, H, W) and classes (B,)."""
        epoch, begun = divmod(self.step, self._per_epoch)
        size = int(self.config.batch_size or 1)
        generator = np.random.Generator(np.random.PCG64([self.config.seed, epoch]))
        order = generator.permutation(len(self.samples)).tolist()[begun * size :]
        crops = in_order(
            order,
            lambda number: self._crop(self.samples[number], epoch),
            ahead=2 * size + self.workers,
            workers=self.workers,
            size=lambda pixels: pixels.nbytes,
        )
        device = self.teacher.device
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            pixels = torch.stack([next(crops) for _ in numbers]).to(device)
            yield pixels, torch.tensor([self.samples[number].label for number in numbers], device=device)

    def _crop(self, sample: Labelled, epoch: int) -> Tensor:
        """A random resized crop, bicubic, in half of the cases mirrored: (3, H, W)."""
        generator = view_generator(self.config.seed, f"{epoch}|{sample.id}", 1)
        image = sample.load()
        height, width = getattr(self.teacher, "input_shape", (self.teacher.image_size, self.teacher.image_size))
        crop = image.crop(crop_box(*image.size, generator, MIN_AREA)).resize((width, height), Image.Resampling.BICUBIC)
        if generator.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return normalised(crop, self.teacher.mean, self.teacher.std)

    def _already_learned(self) -> bool:
        if not self.path.exists():
            return False
        prompt = read_learned_prompt(self.path)
        there, names = prompt.origin.get("settings", "{}"), prompt.origin.get("class_names", "[]")
        self._compare(self.path, json.loads(there), json.loads(names))
        self._put({CONTEXT: prompt.context, **(prompt.meta_net or {})})
        self.step = self.steps
        return True

    def _restore(self) -> None:
        """Go on from what an earlier session left."""
        if not self.partial.exists():
            return
        try:
            with safe_open(self.partial, framework="pt") as file:
                metadata = file.metadata() or {}
                record = json.loads(metadata["record"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                expected = {*self.weights, *(_MOMENTUM + name for name in self.weights)}
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UsageError(f"{printable(self.partial)} is damaged ({error}). Remove it and learn again.") from error
        self._compare(self.partial, record["settings"], record["class_names"])
        if set(tensors) != expected or any(tensors[name].shape != self.weights[name].shape for name in self.weights):
            raise UsageError(
                f"{printable(self.partial)} is damaged: its tensors do not match. Remove it and learn again."
            )
        self.step = int(record["step"])
        self._put(tensors)
        for name, value in self.weights.items():
            self._optimiser.state[value]["momentum_buffer"] = tensors[_MOMENTUM + name].to(value.device)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in self.weights.items():
            value.copy_(tensors[name])

    def _compare(self, path: Path, there: dict[str, Any], names: list[str]) -> None:
        refuse_other(path, differences(there, self.settings))
        refuse_other(path, [] if names == list(self.class_names) else ["other class names"])
