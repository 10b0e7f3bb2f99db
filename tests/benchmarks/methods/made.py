"""Batches, teachers and learned files that the tests of methods are given."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apm.benchmarks.methods import Batch, MethodOptions
from apm.mae.config import MAEConfig
from apm.mae.model import MaskedAutoencoder
from apm.pretrain.checkpoint import Checkpoint, write_checkpoint
from apm.test_time.options import StudentOptions
from apm.text.learned_prompt import META_NET, LearnedPrompt, write_learned_prompt
from apm.text.zeroshot import ZeroShotHead
from tests.fakes import FakeTeacher

CLASSES = ("cat", "dog", "coffee mug", "space rocket", "daisy", "bus", "violin")
TEMPLATE = "a photo of a {}."
FEATURE_STREAMS = ("tda", "dmn", "boostadapter", "onzeta", "ecalp", "dpe", "dota", "oga")
STREAM = {*FEATURE_STREAMS, "dynaprompt", "tent", "clipartt", "watt"}


def run_options(run: dict[str, Any] | None = None, **student: Any) -> MethodOptions:
    """A run's options, of which `student` are the student's; as a run it reads all locations if nothing is said."""
    return MethodOptions(student=StudentOptions(**{"queries": "all", **student}), **(run or {}))


SMALL = run_options({"views": 8}, preset="small", steps=3, precision="fp32")


@functools.cache
def learned_prompt(method: str) -> Path:
    """A file with a prompt of 4 words as CoOp or CoCoOp would have learned it with `OpenTeacher`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 16), (2,), (16, 2), (16,)]
    net = {name: torch.randn(shape, generator=generator) for name, shape in zip(META_NET, shapes, strict=True)}
    folder = Path(tempfile.mkdtemp(prefix="apm-tests-"))
    atexit.register(shutil.rmtree, folder)
    path = folder / "learned.safetensors"
    prompt = LearnedPrompt(
        context=torch.randn(4, 16, generator=generator), meta_net=net if method == "cocoop" else None
    )
    write_learned_prompt(path, prompt)
    return path


HEADS = {"vit-probe": "probe", "mae-finetune": "finetune", "mae-joint": "joint", "ttt-mae": "probe"}
"""Methods that need a trained head, and how it was trained."""


@functools.cache
def trained_head(kind: str) -> Path:
    """A file with a tiny random masked autoencoder and a head that knows `CLASSES` and 10,000 more."""
    sizes = MAEConfig(
        image_size=16, patch_size=4, width=8, depth=1, heads=1, decoder_width=8, decoder_depth=1, decoder_heads=1,
        head_width=8, head_depth=1, head_heads=1, classes=10_007,
    )  # fmt: skip
    names = [*CLASSES, *(f"class {number}" for number in range(10_000))]
    folder = Path(tempfile.mkdtemp(prefix="apm-tests-"))
    atexit.register(shutil.rmtree, folder)
    weights = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        for number, (name, weight) in enumerate(MaskedAutoencoder(sizes, seed=4).state_dict().items())
    }
    settings = {"class_names": json.dumps(names), "kind": kind, "decoder": "trained"}
    path = folder / f"{kind}.safetensors"
    write_checkpoint(path, Checkpoint(sizes, settings, 1, weights, {}, "mae"))
    return path


def full_spec(name: str, *, neighbours: int = 20) -> str:
    """A method's name, with what it cannot do without."""
    if name in HEADS:
        return f"{name}:file={trained_head(HEADS[name])}" + ",masks=3,steps=2" * (name == "ttt-mae")
    if name == "rlcf":
        return "rlcf:reward=embedded"
    if name == "rtpt":
        return f"rtpt:neighbours={neighbours}"
    kind = name.removeprefix("tpt+")
    return f"{name}:file={learned_prompt(kind)}" if kind in ("coop", "cocoop") else name


class OpenTeacher(FakeTeacher):
    """The fake teacher's images with a real, tiny, random open_clip model for its texts."""

    def __init__(self, form: str = "CLIP") -> None:
        import open_clip

        super().__init__(dim=16, name="open")
        text = open_clip.CLIPTextCfg(context_length=24, vocab_size=49408, width=16, heads=2, layers=2)
        vision = open_clip.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=16, image_size=32)
        torch.manual_seed(0)
        self.model = getattr(open_clip, form)(16, vision, text).eval().requires_grad_(False)
        for weights in self.model.parameters():  # the usual tiny start gives texts that hardly differ
            if weights.ndim > 1:
                torch.nn.init.normal_(weights, std=0.3)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=24)
        self.identity = f"open {form}"

    @torch.no_grad()
    def encode_text(self, texts: Any) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)))


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(7)
    coarse = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((48, 40), Image.Resampling.BILINEAR) for pixels in coarse]


def make_batch(count: int = 4, teacher: Any = None, order: list[int] | None = None, **options: Any) -> Batch:
    teacher = teacher or FakeTeacher(dim=16)
    head = ZeroShotHead.build(teacher, CLASSES, (TEMPLATE,))
    order = list(range(count)) if order is None else order
    images = pictures(count)
    return Batch([f"image {i}" for i in order], [images[i] for i in order], teacher, head, **options)
