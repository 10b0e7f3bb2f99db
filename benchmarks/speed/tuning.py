"""Test-time prompt tuning (TPT) of one image, beside the loop as it is published, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from apm.labels import label_set
from apm.teachers.openclip import OpenClipTeacher, quiet
from apm.teachers.sources import Source
from apm.test_time.targets import entropies, kept_count
from apm.text.prompts import TunablePrompt
from apm.text.zeroshot import ZeroShotHead

from ..methods.base import Batch, MethodOptions
from ..methods.tpt import PAPER_PROMPT, TPT, TPTSettings, marginal_entropy
from .kind import Kind
from .options import Options, Record
from .tables import Table, shown
from .timing import interleaved, spread

MODEL = "ViT-B-16"
_TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


class PublishedTuning:
    """The published loop's work for one image: every prompt at its full length, and views and texts encoded anew.

    One difference favours it: the gradient of the loss in the text features is known beforehand. The published code
    keeps what lies between for all classes at once, tens of GB; here they go forward and back in groups.
    """

    def __init__(self, teacher: OpenClipTeacher, head: ZeroShotHead, settings: TPTSettings) -> None:
        self.teacher, self.head, self.settings = teacher, head, settings
        self.prompt = TunablePrompt(teacher, head.labels, template=PAPER_PROMPT, group=settings.group, cut=False)

    def answer(self, pixels: Tensor) -> Tensor:
        """Tune the prompt on the views (V, 3, H, W) of an image, the first the image itself: its logits (C,)."""
        scale, text = self.head.logit_scale, self.head.features
        views = normalize(self.teacher.encode_image(pixels), dim=1)  # (V, D)
        confidence = entropies((scale * views @ text.T).softmax(dim=1))
        kept = views[confidence.argsort(stable=True)[: kept_count(len(views), self.settings.keep)]]
        leaf = text.clone().requires_grad_()
        with torch.enable_grad():
            (upstream,) = torch.autograd.grad(marginal_entropy(scale * kept @ leaf.T), leaf)
        context = self.prompt.initial.clone().requires_grad_()
        context.grad = self.prompt.gradient(context, upstream)
        torch.optim.AdamW([context], lr=self.settings.lr).step()
        image = normalize(self.teacher.encode_image(pixels[:1]), dim=1)
        return (scale * image @ self.prompt.features(context).T)[0]


def measure_tuning(options: Options) -> Record:
    """Record the seconds that TPT takes for one image: ours, the published loop, and the views that both encode.

    Of ImageNet's class names; with ``quick`` a tiny model and ten of them.
    """
    teacher = _random_teacher(options)
    names = label_set("imagenet")[: 10 if options.quick else None]
    settings = TPTSettings(views=8 if options.quick else 64)
    head = ZeroShotHead.build(teacher, names, (PAPER_PROMPT,), cache=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))
    method = TPT(MethodOptions(views=settings.views))
    published = PublishedTuning(teacher, head, settings)
    pixels = _views(teacher, image, settings)

    def batch() -> Batch:
        fresh = Batch(["noise"], [image], teacher, head)
        encoded = teacher.encode_image(pixels)[None]  # the views are made outside of the clock, and encoded inside
        fresh._tokens, fresh._views = encoded[:, 0], {(settings.min_area, False): encoded}
        return fresh

    ours, theirs = method.predict(batch()).logits[0], published.answer(pixels)  # warms up, too
    works = {
        "apm": lambda: method.predict(batch()),
        "published loop": lambda: published.answer(pixels),
        "views alone": lambda: teacher.encode_image(pixels),
    }
    times = interleaved(works, options.device, options.rounds, warmup=0)
    pairs = list(zip(times["published loop"], times["apm"], times["views alone"], strict=False))
    summary = {
        "published_over_apm": spread([loop / mine for loop, mine, _ in pairs]),
        "published_over_apm_without_views": spread([(loop - views) / (mine - views) for loop, mine, views in pairs]),
        "largest_difference_of_logits": float((ours - theirs).abs().max()),
        "largest_change_by_tuning": float((theirs - head.logits(batch().tokens())[0]).abs().max()),
        "same_first_label": bool(ours.argmax() == theirs.argmax()),
    }
    model = "tiny" if options.quick else MODEL
    rows = [{"name": name, "seconds": spread(values)} for name, values in times.items()]
    return options.found(rows, summary, model=model, labels=len(names), views=settings.views)


def _views(teacher: OpenClipTeacher, image: Image.Image, settings: TPTSettings) -> Tensor:
    from apm.test_time.views import views

    return views(image, settings.views, teacher, seed=0, sample_id="noise", min_area=settings.min_area)


def _random_teacher(options: Options) -> OpenClipTeacher:
    """A teacher of CLIP's size with random weights; the clock does not care."""
    torch.manual_seed(0)
    config: dict[str, Any] = _TINY if options.quick else open_clip.get_model_config(MODEL)
    with quiet():
        model: nn.Module = open_clip.model.CLIP(**config)
    size = config["vision_cfg"]["image_size"]
    set_model_preprocess_cfg(model, {"size": size, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    source = Source(name=f"{MODEL}, random weights", model=MODEL, weights=Path("none"), config=config)
    return OpenClipTeacher(model.to(options.device), tokenizer, source=source, device=options.device)


TUNING = Kind(
    name="tuning",
    question="test-time prompt tuning with 1,000 class names, beside the published loop",
    title="Test-time prompt tuning",
    measure=measure_tuning,
    table=shown(
        Table({"one image": "{name}", "time": "{seconds}"}),
        "Test-time prompt tuning with {labels} class names, {views} views, 1 step. Published loop ÷ apm: "
        "{published_over_apm:x}; without the views that both encode: {published_over_apm_without_views:x}. Their "
        "logits differ by {largest_difference_of_logits:.1e} at most, where tuning moved them by "
        "{largest_change_by_tuning:.1e}.",
    ),
    rounds=3,
)
