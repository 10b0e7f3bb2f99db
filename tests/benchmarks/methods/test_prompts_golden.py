"""The methods that tune a prompt against recorded outputs of the published ones, on a text tower of two layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.benchmarks.methods import Batch, create_method, dynaprompt, rlcf
from apm.benchmarks.methods.cocoop import TPTCoCoOp
from apm.benchmarks.methods.prompted import PromptTuned
from apm.benchmarks.methods.rtpt import view_weights
from apm.text.learned_prompt import LearnedPrompt, write_learned_prompt
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.goldens import close, each_golden, read_golden

TEMPLATE = "a photo of a {}."
Golden = Mapping[str, Tensor]


class GoldenTeacher:
    """A teacher whose text tower is the recorded one, in open_clip's own class; it has seen no image."""

    name = "golden"
    device = torch.device("cpu")

    def __init__(self, golden: Golden) -> None:
        (_, length), (vocabulary, width) = golden["tokens"].shape, golden["w.token_embedding.weight"].shape
        layers = len({name.split(".")[3] for name in golden if ".resblocks." in name})
        heads = int(golden["heads"])
        text = open_clip.CLIPTextCfg(
            context_length=length, vocab_size=vocabulary, width=width, heads=heads, layers=layers
        )
        vision = open_clip.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=16, image_size=32)
        self.dim = golden["w.text_projection"].shape[1]
        self.model = open_clip.CLIP(self.dim, vision, text, quick_gelu=True).eval().requires_grad_(False)
        weights = {name.removeprefix("w."): value for name, value in golden.items() if name.startswith("w.")}
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert not unexpected and {name.partition(".")[0] for name in missing} == {"visual", "logit_scale"}
        self.logit_scale = float(golden["logit_scale"])
        self.identity = "golden"
        self.tokenizer = RecordedTokens(golden)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts))


class RecordedTokens:
    """Gives "… class 3." the third row of the recorded tokens, and words alone those of the context."""

    def __init__(self, golden: Golden) -> None:
        self.tokens, self.context = golden["tokens"], golden["context_tokens"][0]
        self.sot_token_id = int(self.tokens[0, 0])

    def __call__(self, texts: Sequence[str]) -> Tensor:
        rows = [text.rstrip(".").rpartition("class ")[2] for text in texts]
        return torch.stack([self.tokens[int(row)] if row.isdigit() else self.context for row in rows])


def batch_of(golden: Golden, views: Tensor | None = None) -> Any:
    """What these methods read of a `Batch`, with the recorded features, (B, V, D), for those of images."""
    teacher = GoldenTeacher(golden)
    names = [f"class {index}" for index in range(len(golden["tokens"]))]
    head = ZeroShotHead.build(teacher, names, (TEMPLATE,), cache=False)  # type: ignore[arg-type]
    features = golden["views"] if views is None else views
    if "reward_views" in golden:
        rewarded = SimpleNamespace(views=lambda count, min_area: golden["reward_views"][:, :count])
    else:
        rewarded = None
    assert all(hasattr(Batch, name) for name in ("tokens", "views", "seen_by"))
    return SimpleNamespace(
        teacher=teacher,
        head=head,
        tokens=lambda: features[:, 0],
        views=lambda count, min_area: features[:, :count],
        seen_by=lambda teacher, head: rewarded,
    )


def holds(golden: Golden, spec: str, suffix: str = "") -> PromptTuned:
    """Compare answers and tuned contexts; the method."""
    batch = batch_of(golden)
    settings = {"views": golden["views"].shape[1], "keep": float(golden["selection"]), "lr": float(golden["lr"])}
    name, _, own = spec.partition(":")
    written = ",".join([own, *(f"{key}={value:g}" for key, value in settings.items())])
    method = create_method(f"{name}:{written}")
    assert isinstance(method, PromptTuned)
    assert method.weight_decay == pytest.approx(float(golden["weight_decay"]))
    close(method.predict(batch).logits, golden[f"logits{suffix}"])
    if "text_features" in golden:
        close(method._start.features, golden["text_features"])
    views = normalize(golden["views"], dim=2)
    pairs = zip(views, islice(method.beside(batch), len(views)), strict=True)
    close(torch.stack([method.tune(*pair).context for pair in pairs]), golden[f"context{suffix}"])
    return method


@each_golden("tpt")
def test_tpt(path: Path) -> None:
    holds(read_golden(path), "tpt")
    holds(read_golden(path), "tpt:steps=3", "_3steps")


@each_golden("ctpt")
@pytest.mark.parametrize("weight", [20, 50])
def test_ctpt(path: Path, weight: int) -> None:
    golden = read_golden(path)
    method = holds(golden, f"ctpt:dispersion={weight}", f"_lambda{weight}")
    first = method.predict(batch_of(golden)).extras["dispersion_first"]
    close(first, golden["dispersion_first"].expand_as(first))


@each_golden("rtpt")
def test_rtpt(path: Path) -> None:
    golden = read_golden(path)
    neighbours, temperature = int(golden["neighbours"]), float(golden["temperature"])
    holds(golden, f"rtpt:neighbours={neighbours},temperature={temperature * float(golden['logit_scale']):g}")
    weights = [view_weights(views, neighbours, temperature) for views in golden["views"]]
    close(torch.stack(weights), golden["weights"])


@each_golden("rlcf")
@pytest.mark.parametrize(("settings", "suffix"), [("", ""), (",steps=1", "_1step"), (",proposals=5", "_k5")])
def test_rlcf(path: Path, settings: str, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = read_golden(path)
    text = golden["reward_text"]

    class Reward(GoldenTeacher):
        dim = text.shape[1]

        def __init__(self) -> None:
            self.logit_scale, self.identity = 1.0, f"reward {path}"

        def encode_text(self, texts: Sequence[str]) -> Tensor:
            return text[[int(words.rstrip(".").rpartition(" ")[2]) for words in texts]]

    monkeypatch.setattr(rlcf, "load_teacher", lambda spec, device: Reward())
    weight = float(golden["clipscore_weight"])
    holds(golden, f"rlcf:reward=embedded,score_weight={weight:g}{settings}", suffix)


@each_golden("dynaprompt")
@pytest.mark.parametrize("at_a_time", [1, 7, 24])
def test_dynaprompt(path: Path, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = read_golden(path)
    spec = f"dynaprompt:prompts={int(golden['prompts'])},views={golden['views'].shape[1]}"
    method = create_method(f"{spec},keep={float(golden['selection']):g},lr={float(golden['lr']):g}")
    assert isinstance(method, dynaprompt.DynaPrompt)
    batch = batch_of(golden)
    chosen, residues, logits = [], [], []
    choose = dynaprompt.choose

    def note(*arguments: Any) -> list[int]:
        chosen.append(choose(*arguments))
        return chosen[-1]

    monkeypatch.setattr(dynaprompt, "choose", note)
    for views in golden["views"].split(at_a_time):
        part = SimpleNamespace(**{**vars(batch), "views": lambda count, min_area, views=views: views})
        logits.append(method.predict(part).logits)
        assert method.order == golden["order"][len(chosen) - 1].tolist()
        residues.append(method._residues.clone())
    close(torch.cat(logits), golden["logits"])
    close(residues[-1], golden["residual"])
    width = golden["chosen_padded_minus1"].shape[1]
    assert [[*row, *[-1] * (width - len(row))] for row in chosen] == golden["chosen_padded_minus1"].tolist()
    if at_a_time == 1:
        close(residues[0], golden["residual_first"])
    method.reset()
    again = SimpleNamespace(**{**vars(batch), "views": lambda count, min_area: golden["views"][:3]})
    close(method.predict(again).logits, golden["logits"][:3])


@each_golden("coop")
def test_coop_and_cocoop_and_tpt_from_there(path: Path, tmp_path: Path) -> None:
    golden = read_golden(path)
    features = golden["image_features"]
    net = {name: value for name, value in golden.items() if name.startswith("meta_net.")}
    write_learned_prompt(tmp_path / "coop.safetensors", LearnedPrompt(context=golden["ctx"]))
    write_learned_prompt(tmp_path / "cocoop.safetensors", LearnedPrompt(context=golden["ctx"], meta_net=net))
    batch = batch_of(golden, features)
    tuning = f"views={features.shape[1]},keep={float(golden['selection']):g},lr={float(golden['lr']):g}"
    for name in ("coop", "cocoop"):
        plain = create_method(f"{name}:file={tmp_path / name}.safetensors")
        close(plain.predict(batch).logits, golden[f"{name}_logits"])
        tuned = create_method(f"tpt+{name}:file={tmp_path / name}.safetensors,{tuning}")
        assert isinstance(tuned, PromptTuned) and tuned.weight_decay == pytest.approx(float(golden["weight_decay"]))
        close(tuned.predict(batch).logits, golden[f"tpt_{name}_logits"])
        if name == "coop":
            close(tuned._start.features, golden["coop_text_features"])
    assert isinstance(tuned, TPTCoCoOp)
    contexts = torch.stack([tuned.learned.prompt.for_image(feature) for feature in features[:, 0]])
    close(contexts, golden["tpt_cocoop_context_first"])
    pairs = zip(normalize(features, dim=2), features[:, 0], strict=True)
    close(torch.stack([tuned.tune(*pair).context for pair in pairs]), golden["tpt_cocoop_context"])
