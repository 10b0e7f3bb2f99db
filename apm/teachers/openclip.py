"""Teachers made by open_clip, from any of its forms."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from apm.errors import TeacherError
from apm.images.load import central_square, normalised
from apm.teachers import hub
from apm.teachers.checkpoint import Checkpoint, not_finite, read_checkpoint
from apm.teachers.folder_config import check_vocabulary
from apm.teachers.grid_towers import GridTower
from apm.teachers.sources import Source, from_folder
from apm.teachers.text_tower import TextTower

DEFAULT_VOCABULARY = 49408
"""Tokens of CLIP's own vocabulary, which open_clip assumes where a configuration says nothing."""
CONVOLUTIONAL_GRID_SIZE = 192
"""Least input, in pixels, of a convolutional tower's grid unless asked otherwise. Of the embedded teacher, 200 images
of Imagenette, 10 classes: the mean of the grid is right on 89.0 % at 96 pixels (3 x 3 cells), 89.0 at 128, 88.5 at 160,
85.0 at 192 (6 x 6), 85.0 at 224, 81.0 at 256; of its single cells 61.9, 54.0, 45.8, 41.1, 37.1 and 34.9 %."""
_BATCH = 128
_CPU_BATCH = 16  # what a processor's caches hold is soon full: larger batches are slower there
_TEXTS = 1024  # turned into ids together
_TOKENS, _CPU_TOKENS = 16384, 1024  # encoded together
_MAX_ASPECT = 16
_DRAWS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
_MAX_LOGIT_SCALE = 12  # before the exponential: logits up to 163,000


class OpenClipTeacher:
    """An open_clip model as a `Teacher`: float32, frozen, in evaluation mode.

    See `apm.teachers.base.Teacher` for what the attributes mean.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        source: Source,
        device: torch.device,
    ) -> None:
        config = PreprocessCfg(**model.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
        height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
        # convolutions are half as fast again with channels last; the numbers agree to rounding
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.tokenizer = tokenizer
        self.name = source.name
        self.identity = f"{source.name}@{weights_hash(model.state_dict(), also=_settings(source, config))[:16]}"
        self.dim = int(source.config["embed_dim"])
        self.logit_scale = float(model.logit_scale.detach().exp())  # type: ignore[operator]
        self.input_shape = (int(height), int(width))
        """Height and width, in pixels, of what `preprocess` returns; not square for a few models."""
        self.image_size = int(height)
        self.mean = _triple(config.mean)
        self.std = _triple(config.std)
        self.notes = source.notes
        self.settings = {
            "quick_gelu": bool(source.config.get("quick_gelu")),
            "image_size": self.image_size,
            "interpolation": config.interpolation,
            "resize": config.resize_mode,
            "precision": "fp32",
        }
        """Settings of architecture and input that are known to affect accuracy, for records."""
        self.default_labels = source.labels
        self.default_templates = source.templates
        self.device = device
        self._text = TextTower(model)
        self._tower = GridTower(model.visual, name=source.name, image_size=self.image_size)  # type: ignore[arg-type]
        small = self._tower.is_convolutional and self.image_size < CONVOLUTIONAL_GRID_SIZE
        self.grid_size = CONVOLUTIONAL_GRID_SIZE if small else self.image_size
        self._crops = config.resize_mode == "shortest"
        *self._resize_and_crop, _, _ = image_transform_v2(config, is_train=False).transforms  # then `normalised`

    def preprocess(self, image: Image.Image) -> Tensor:
        """Apply the model's own resize, crop and normalisation: (3, image_size, image_size) float32."""
        if self._crops:
            image = _limit_aspect(image)
        for transform in self._resize_and_crop:
            image = transform(image)
        return normalised(image, self.mean, self.std)

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) to (B, D), not normalised, at most 128 images at a time, 16 on a CPU."""
        size = _CPU_BATCH if self.device.type == "cpu" else _BATCH
        parts = [self.model.encode_image(part.to(self.device, torch.float32)) for part in pixels.split(size)]  # type: ignore[operator]
        return torch.cat(parts).float()

    @torch.no_grad()
    def encode_grid(self, image: Image.Image, *, size: int | None = None) -> Tensor:
        """Encode the parts of the central square, scaled to `size` pixels: (h', w', D), not normalised.

        See `apm.teachers.grid_towers` for what it is in each kind of tower. Where an input of other than the tower's
        own size needs other position codes, they are interpolated.
        """
        size = self.grid_size if size is None else size
        if size < 1:
            raise TeacherError(f'The teacher "{self.name}" has no grid at {size}×{size} pixels.')
        square = central_square(image, size)
        pixels = normalised(square, self.mean, self.std)[None]  # (1, 3, S, S)
        return self._tower(pixels.to(self.device))[0].float()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Encode T texts to (T, D), not normalised, a bounded number of tokens at a time.

        Texts beyond the context length are cut. Short ones cost less where the tower allows it, see `TextTower`.
        """
        features = torch.empty(len(texts), self.dim, device=self.device)
        tokens = _CPU_TOKENS if self.device.type == "cpu" else _TOKENS
        for start in range(0, len(texts), _TEXTS):
            ids = self.tokenizer(list(texts[start : start + _TEXTS]))  # (n, L)
            for batch in self._text.batches(ids, tokens=tokens):
                features[start + batch] = self._text.encode(ids[batch].to(self.device))
        return features


def load_folder(folder: Path, *, name: str, device: str | torch.device = "cpu") -> OpenClipTeacher:
    """Load a teacher from a folder in open_clip's local-dir form; see `apm.teachers.sources.from_folder`."""
    return load_source(from_folder(folder, name=name), device=device)


def load_source(source: Source, *, device: str | torch.device = "cpu") -> OpenClipTeacher:
    """Build the model, load its weights, and check them.

    Raises:
        TeacherError: the weights are damaged, unsafe, not finite, or do not fit the model.
    """
    checkpoint = read_checkpoint(source.weights)
    if checkpoint.from_openai and not source.config.get("quick_gelu"):
        note = f"{source.name}: QuickGELU is used: the file is one of OpenAI's own, whose weights were trained with it."
        source = replace(source, config={**source.config, "quick_gelu": True}, notes=(*source.notes, note))
    known = source.config["text_cfg"].get("vocab_size", DEFAULT_VOCABULARY)
    if source.bpe:
        check_vocabulary(source.bpe, known)
    device = torch.device(device)
    try:
        with quiet(), _network_for(source):
            _check_size(source, checkpoint)
            with _Undrawn():
                model = _build(source)
            if checkpoint.state is None:
                open_clip.load_checkpoint(model, str(source.weights))
            else:
                checkpoint.load_into(model)
            # A SigLIP tokenizer is chosen by the model's name; a vocabulary of the folder's own by its path.
            options = {"bpe_path": str(source.bpe)} if source.bpe else {}
            tokenizer = open_clip.get_tokenizer(source.model, **options)
        _check_model(source, model, tokenizer, known)
        teacher = OpenClipTeacher(model.to(device), tokenizer, source=source, device=device)
        if _is_foreign(source):
            _try(teacher)
    except TeacherError:
        raise
    except Exception as error:  # open_clip, timm and torch report what does not fit in many ways
        reason = " ".join(str(error).split())
        raise TeacherError(
            f'The teacher "{source.name}" cannot be loaded: {source.weights} does not fit the model'
            f" {source.model} ({type(error).__name__}: {reason[:240]})."
        ) from error
    return teacher


def untrained_tower(source: Source) -> nn.Module:
    """Build the image tower alone, with the weights that open_clip draws."""
    with quiet(), _network_for(source):
        tower: nn.Module = _build(source).visual  # type: ignore[assignment]
    return tower


class _Undrawn(TorchFunctionMode):
    """Skips the drawing of random weights, which takes seconds for a large model: a file's replace them all."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs.get("tensor", *args[:1]) if func in _DRAWS else func(*args, **kwargs)


def _build(source: Source, device: str = "cpu") -> nn.Module:
    """Build the model, with random weights."""
    model: nn.Module = open_clip.create_model(
        source.model,
        device=device,
        load_weights=False,
        pretrained_text=False,
        force_quick_gelu=bool(source.config.get("quick_gelu")),
        force_preprocess_cfg=dict(source.preprocess),
    )
    return model


def _is_foreign(source: Source) -> bool:
    """Whether the architecture is described by a file that comes with the weights, and not by open_clip itself."""
    return source.model.startswith(("local-dir:", "hf-hub:")) and source.name != "embedded"


def _check_size(source: Source, checkpoint: Checkpoint) -> None:
    """Refuse an architecture much larger than its weights before memory is taken for it."""
    if not _is_foreign(source):
        return
    try:
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in _build(source, "meta").parameters())
    except NotImplementedError:  # a few towers compute with their weights while they are built
        return
    if wanted > 2 * checkpoint.numbers + 10_000_000:  # position codes may be interpolated to more places
        raise TeacherError(
            f'The teacher "{source.name}" cannot be loaded: its configuration describes {wanted:,} parameters, but'
            f" {source.weights} holds {checkpoint.numbers:,}."
        )


def _check_model(source: Source, model: nn.Module, tokenizer: Any, known: int) -> None:
    """Refuse weights and tokenizers that would only be noticed when something is asked of them."""
    if getattr(tokenizer, "vocab_size", 0) > known:
        raise TeacherError(
            f'The teacher "{source.name}" cannot be used: its tokenizer has {tokenizer.vocab_size} tokens, but its text'
            f" tower only {known}."
        )
    if broken := not_finite(model.state_dict()):
        raise TeacherError(
            f'The teacher "{source.name}" cannot be used: {source.weights} holds values that are not finite,'
            f" in {len(broken)} tensors, first {broken[0]}. Download the file again, or name another teacher."
        )
    exponent = float(model.logit_scale.detach())  # type: ignore[operator]
    if abs(exponent) > _MAX_LOGIT_SCALE:
        raise TeacherError(
            f'The teacher "{source.name}" cannot be used: the logit_scale in {source.weights} is {exponent:g}. Its'
            f" exponential multiplies every logit: CLIP's is about 4.6, and beyond ±{_MAX_LOGIT_SCALE} probabilities "
            "are meaningless."
        )


def _try(teacher: OpenClipTeacher) -> None:
    """Ask for one image and one text, so that what is wrong shows now.

    Raises:
        TeacherError: an answer is not finite, or of another width than the configuration says.
    """
    image = teacher.encode_image(torch.zeros(1, 3, *teacher.input_shape))
    text = teacher.encode_text(["a"])
    for what, answer in (("image", image), ("text", text)):
        if tuple(answer.shape) != (1, teacher.dim) or not bool(answer.isfinite().all()):
            raise TeacherError(
                f'The teacher "{teacher.name}" cannot be used: for a blank image and the text "a" its {what} features'
                f" are of shape {tuple(answer.shape)}, where (1, {teacher.dim}) was expected, or not finite."
            )


def weights_hash(state: Mapping[str, Tensor], *, also: bytes = b"") -> str:
    """Hash the names, types, shapes and bytes of all weights.

    Args:
        state: a state dict, on any device; the order of its entries does not matter.
        also: further bytes that belong to the identity.

    Returns:
        64 hex digits: the sha256 of the tensors' sha256s, which are computed in parallel.
    """

    def digest(name: str) -> bytes:
        tensor = state[name].detach().cpu().contiguous()
        own = hashlib.sha256(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        own.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return own.digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(also + b"".join(pool.map(digest, sorted(state)))).hexdigest()


def _settings(source: Source, config: PreprocessCfg) -> bytes:
    """Return what, besides the weights, decides the vectors: architecture, input and vocabulary."""
    text = json.dumps([dict(source.config), vars(config)], sort_keys=True, default=str)
    return text.encode() + (source.bpe.read_bytes() if source.bpe else b"")


def _triple(values: Sequence[float] | float) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in (values if isinstance(values, Sequence) else (values,) * 3))
    return red, green, blue


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Cut a very long image around its centre: the crop drops the ends anyway, but only after blowing them up."""
    width, height = image.size
    limit = _MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    new_width, new_height = min(width, limit), min(height, limit)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return image.crop((left, top, left + new_width, top + new_height))


@contextlib.contextmanager
def _network_for(source: Source) -> Iterator[None]:
    """Keep open_clip off the network, but for a tokenizer or text tower of transformers that is not cached yet."""
    text = source.config["text_cfg"]
    wanted = {text.get("hf_model_name")} - {None, ""}
    if not source.model.startswith("local-dir:"):  # there, the tokenizer's files are in the folder
        wanted |= {text.get("hf_tokenizer_name")} - {None, ""}
    files = ("tokenizer_config.json", "config.json")
    missing = [name for name in sorted(wanted) if hub.cached(name, files) is None]
    for name in missing:
        hub.fetch(name, files, wanted_by=source.name)
    with contextlib.nullcontext() if missing else hub.no_network():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what open_clip logs through the root logger, and keep it from installing a handler there."""
    root = logging.getLogger()
    handler = logging.NullHandler()

    def nothing(record: logging.LogRecord) -> bool:
        return False

    root.addHandler(handler)
    root.addFilter(nothing)  # filters of a logger see only what is logged through it directly
    try:
        yield
    finally:
        root.removeFilter(nothing)
        root.removeHandler(handler)
