"""Test-time prompt tuning (TPT) of one image, beside the loop as it is published, in one run."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.model import set_model_preprocess_cfg
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from apm.labels import label_set
from apm.teachers.openclip import OpenClipTeacher, quiet
from apm.teachers.sources import Source
from apm.test_time.targets import entropies, kept_count
from apm.test_time.views import views
from apm.text.prompts import TunablePrompt
from apm.text.zeroshot import ZeroShotHead

from ..methods.base import Batch, MethodOptions
from ..methods.tpt import PAPER_PROMPT, TPT, TPTSettings, marginal_entropy
from .kind import kind
from .options import Options, Record
from .published_loop import TOWERS
from .timing import Work, interleaved, spread

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
        seen = normalize(self.teacher.encode_image(pixels), dim=1)  # (V, D)
        confidence = entropies((scale * seen @ text.T).softmax(dim=1))
        kept = seen[confidence.argsort(stable=True)[: kept_count(len(seen), self.settings.keep)]]
        leaf = text.clone().requires_grad_()
        with torch.enable_grad():
            (upstream,) = torch.autograd.grad(marginal_entropy(scale * kept @ leaf.T), leaf)
        context = self.prompt.initial.clone().requires_grad_()
        context.grad = self.prompt.gradient(context, upstream)
        torch.optim.AdamW([context], lr=self.settings.lr).step()
        image = normalize(self.teacher.encode_image(pixels[:1]), dim=1)
        return (scale * image @ self.prompt.features(context).T)[0]


def random_teacher(device: torch.device, *, tiny: bool) -> OpenClipTeacher:
    """The teacher `TOWERS`, or a tiny one, with random weights; the clock does not care."""
    torch.manual_seed(0)
    config: dict[str, Any] = _TINY if tiny else open_clip.get_model_config(TOWERS)
    with quiet():
        model = open_clip.model.CLIP(**config)
    size = config["vision_cfg"]["image_size"]
    set_model_preprocess_cfg(model, {"size": size, "mean": (0.5,) * 3, "std": (0.25,) * 3})
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    source = Source(name=f"{TOWERS}, random weights", model=TOWERS, weights=Path("none"), config=config)
    return OpenClipTeacher(model.to(device), tokenizer, source=source, device=device)


@kind(
    "| one image | time |\n| {name} | {seconds} |",
    "Test-time prompt tuning with {labels} class names, {views} views, 1 step. Published loop ÷ apm: "
    "{published_over_apm:x}; without the views that both encode: {published_over_apm_without_views:x}. Their "
    "logits differ by {largest_difference_of_logits:.1e} at most, where tuning moved them by "
    "{largest_change_by_tuning:.1e}.",
    title="Test-time prompt tuning",
    rounds=3,
)
def tuning(options: Options) -> Record:
    """Test-time prompt tuning of one image: ours, the published loop, and the views that both encode.

    With ImageNet's class names; with ``quick`` a tiny model and ten of them.
    """
    teacher = random_teacher(options.device, tiny=options.quick)
    names = label_set("imagenet")[: 10 if options.quick else None]
    settings = TPTSettings(views=8 if options.quick else 64)
    head = ZeroShotHead.build(teacher, names, (PAPER_PROMPT,), cache=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))
    method = TPT(MethodOptions(views=settings.views))
    published = PublishedTuning(teacher, head, settings)
    pixels = views(image, settings.views, teacher, seed=0, sample_id="noise", min_area=settings.min_area)
    fresh = Batch(["noise"], [image], teacher, head)

    def ours() -> Tensor:
        encoded = teacher.encode_image(pixels)[None]  # the views are made outside of the clock, and encoded inside
        fresh._tokens, fresh._views = encoded[:, 0], {(settings.min_area, False): encoded}
        return method.predict(fresh).logits[0]

    mine, theirs = ours(), published.answer(pixels)  # warms up, too
    before = head.logits(fresh.tokens())[0]
    works: dict[str, Work] = {"apm": ours, "published loop": partial(published.answer, pixels)}
    works["views alone"] = partial(teacher.encode_image, pixels)
    times = interleaved(works, options.device, options.rounds, warmup=False)
    loop, apm, looks = times["published loop"], times["apm"], times["views alone"]
    summary = {
        "published_over_apm": spread(loop / apm),
        "published_over_apm_without_views": spread((loop - looks) / (apm - looks)),
        "largest_difference_of_logits": float((mine - theirs).abs().max()),
        "largest_change_by_tuning": float((theirs - before).abs().max()),
        "same_first_label": bool(mine.argmax() == theirs.argmax()),
    }
    rows = [{"name": name, "seconds": spread(values)} for name, values in times.items()]
    model = "tiny" if options.quick else TOWERS
    return options.found(rows, summary, model=model, labels=len(names), views=settings.views)
