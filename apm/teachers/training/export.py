"""From the trained image stage to the finished embedded teacher: text stage, calibration, files.

The result is a folder in open_clip's local-dir form: `open_clip_config.json`, `open_clip_model.safetensors` (float16),
the cut vocabulary `bpe_vocab.txt.gz` and the default class names `labels.txt`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.images.files import write_atomically
from apm.labels import imagenet_names, prompt_templates
from apm.teachers.training.data import CIFAR_WORDS, DIGIT_NAMES, HOLDOUT, MEAN, STD, Source, at_size
from apm.teachers.training.text import Vocabulary, train_text, vocabulary, write_bpe

if TYPE_CHECKING:
    from open_clip import CustomTextCLIP

TEXT_TOWER = {"context_length": 32, "width": 96, "heads": 4, "layers": 2}
TOKEN_DEVIATION = 0.4
"""Root mean square of a token's numbers after export, about that of OpenAI's CLIP: the same steps then fit both."""


def export(
    visual: nn.Module,
    prototypes: Tensor,
    directions: Mapping[str, Tensor],
    sources: list[Source],
    out: Path,
    *,
    tower: str,
    image_size: int,
    text_steps: int,
    seed: int,
) -> dict[str, Any]:
    """Trains the text tower, calibrates, and writes the teacher's files to `out`.

    Args:
        visual: open_clip's `TimmModel`, trained: (B, 3, s, s) → (B, dim).
        prototypes: (concepts, dim) that the image stage learned beside it.
        directions: everyday word → unit vector (dim,).
        sources: the training sets; their held-out images calibrate.
        out: folder to write to.
        tower: timm's name of the image tower.
        image_size: side of the images that the finished teacher sees.
        text_steps: optimiser steps of the text stage; an eighth as many follow that settle it on what images differ in.
        seed: of the text stage.

    Returns:
        What was measured on held-out images: logit scale, accuracy of the text features, cosine of texts to targets.
    """
    from open_clip import CustomTextCLIP
    from open_clip.tokenizer import SimpleTokenizer

    imagenet = [s for s in sources if s.name in ("tiny-imagenet", "imagenette")]
    seen = torch.unique(torch.cat([s.labels for s in imagenet]))
    names = list(imagenet_names())
    words = vocabulary(prototypes, names, set(seen.tolist()), directions)
    templates = prompt_templates("openai")
    bpe = out / "bpe_vocab.txt.gz"
    size = write_bpe([*words.words, *(t.format("") for t in templates)], bpe)
    config = _model_config(prototypes.shape[1], tower, image_size, size)
    torch.manual_seed(seed)
    model = CustomTextCLIP(**config)
    model.visual.load_state_dict(visual.state_dict())
    tokenizer = SimpleTokenizer(bpe_path=str(bpe), context_length=TEXT_TOWER["context_length"])
    _train_text_tower(model, tokenizer, words, tuple(templates), out, steps=text_steps, seed=seed)
    spread = image_spread(model.visual.eval(), imagenet, image_size)
    train_text(
        model.text, tokenizer, words, tuple(templates), steps=text_steps // 8, lr=3e-4, spread=spread, seed=seed + 1
    )
    measured = _calibrate_model(model, tokenizer, words, imagenet[0], names, image_size)
    _write_files(model, config, image_size, [names[i] for i in seen], out)
    return {**measured, "vocabulary": size}


def _train_text_tower(
    model: CustomTextCLIP,
    tokenizer: Any,
    words: Vocabulary,
    templates: tuple[str, ...],
    out: Path,
    *,
    steps: int,
    seed: int,
) -> None:
    """The long part of the text stage; a run that was stopped after it begins behind it."""
    path, how = out / "text_stage.pt", {"steps": steps, "seed": seed}
    saved = torch.load(path, weights_only=True) if path.exists() else {}
    if saved.get("how") == how:
        model.text.load_state_dict(saved["tower"])
        return
    train_text(model.text, tokenizer, words, templates, steps=steps, seed=seed)
    save({"how": how, "tower": model.text.state_dict()}, path)


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint: a kill leaves the old file or the new one."""
    write_atomically(path, lambda file: torch.save(state, file))


def _model_config(dim: int, tower: str, image_size: int, vocabulary_size: int) -> dict[str, Any]:
    """The model in open_clip's words."""
    return {
        "embed_dim": dim,
        "vision_cfg": {
            "timm_model_name": tower,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": image_size,
        },
        "text_cfg": {**TEXT_TOWER, "vocab_size": vocabulary_size},
    }


@torch.no_grad()
def _calibrate_model(
    model: CustomTextCLIP, tokenizer: Any, words: Vocabulary, source: Source, names: list[str], image_size: int
) -> dict[str, Any]:
    """Give tokens their size and the logits their scale, on the held-out images of `source`; what was measured."""
    model.eval()
    tokens, labels = held_out(model.visual, source, image_size)
    model.visual.head.proj.weight.mul_(TOKEN_DEVIATION / tokens.square().mean().sqrt())
    classes = torch.unique(source.labels)
    text = F.normalize(model.text(tokenizer([f"a photo of a {names[i]}." for i in classes])), dim=-1)
    cosines = F.normalize(tokens, dim=-1) @ text.T
    place = torch.searchsorted(classes, labels)
    scale = calibrate(cosines, place)
    model.logit_scale.fill_(math.log(scale))
    nearest = _nearest_texts(model.text, tokenizer, words)
    return {
        "logit_scale": round(scale, 3),
        "held_out_tiny_imagenet_top1": round((cosines.argmax(1) == place).float().mean().item(), 4),
        "held_out_count": len(place),
        "texts_nearest_to_their_target": round(nearest, 4),
        "texts": len(words.words),
        "token_deviation": TOKEN_DEVIATION,
    }


def held_out(visual: nn.Module, source: Source, size: int) -> tuple[Tensor, Tensor]:
    """Tokens (n, dim) and labels (n,) of the images of `source` that training never saw, at `size` pixels."""
    rows = torch.arange(0, len(source.images), HOLDOUT)
    return _tokens(visual, source, rows, size), source.labels[rows]


@torch.no_grad()
def image_spread(visual: nn.Module, sources: list[Source], size: int, *, images: int = 4000) -> Tensor:
    """The root of the covariance of unit image tokens, × √dim: (dim, dim), symmetric.

    Args:
        visual: (B, 3, s, s) → (B, dim).
        sources: training sets, each of which gives as much.
        size: side of the images.
        images: of each source, evenly spaced.
    """
    rows = [torch.linspace(0, len(source.images) - 1, min(images, len(source.images))).long() for source in sources]
    tokens = torch.cat([_tokens(visual, source, row, size) for source, row in zip(sources, rows, strict=True)])
    values, vectors = torch.linalg.eigh(torch.cov(F.normalize(tokens.float(), dim=-1).T))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T * math.sqrt(tokens.shape[1])


def _tokens(visual: nn.Module, source: Source, rows: Tensor, size: int) -> Tensor:
    """Tokens (n, dim) of some images at `size` pixels."""
    return torch.cat([visual(at_size(source.images[part], size)) for part in rows.split(128)])


def calibrate(cosines: Tensor, labels: Tensor) -> float:
    """The logit scale of minimum negative log-likelihood: (n, C) cosines, (n,) columns → scale in [1, 100]."""
    scales = torch.logspace(0, 2, 401)
    losses = torch.stack([F.cross_entropy(scale * cosines, labels) for scale in scales])
    return float(scales[losses.argmin()])


def _nearest_texts(tower: nn.Module, tokenizer: Any, words: Vocabulary) -> float:
    """Share of the bare texts whose embedding is nearest to their own target, in [0, 1]."""
    hits = 0
    for part in torch.arange(len(words.words)).split(256):
        tokens = F.normalize(tower(tokenizer([words.words[i] for i in part])), dim=-1)
        hits += int(((tokens @ words.targets.T).argmax(1) == words.target[part]).sum())
    return hits / len(words.words)


def _write_files(
    model: nn.Module, config: dict[str, Any], image_size: int, trained_names: list[str], out: Path
) -> None:
    from safetensors.torch import save

    preprocess = {
        "size": image_size,
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    text = json.dumps({"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": preprocess}, indent=2) + "\n"
    write_atomically(out / "open_clip_config.json", text.encode())
    labels = [*trained_names, *CIFAR_WORDS, *(f"handwritten {name}" for name in DIGIT_NAMES)]
    write_atomically(out / "labels.txt", ("\n".join(labels) + "\n").encode())
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    write_atomically(out / "open_clip_model.safetensors", save(state, metadata={"format": "pt"}))
