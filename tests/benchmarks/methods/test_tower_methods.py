"""Methods that tune the image tower: what they must do, and plain implementations that change a real model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from apm.benchmarks.methods import MethodOptions, create_method
from apm.benchmarks.methods.towers import TunableTower
from apm.benchmarks.methods.ttl import LowRank, TTLSettings
from apm.errors import UsageError
from apm.labels import prompt_templates
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.methods.made import CLASSES, OpenTeacher, make_batch

SMALL = MethodOptions(views=6)
BATCHED = ("tent:steps=2", "clipartt:steps=2", "watt:steps=1,rounds=1")


class TowerTeacher(OpenTeacher):
    """A whole tiny random open_clip model, its image tower too."""

    def __init__(self, vision: Any = None, form: str = "CLIP") -> None:
        super().__init__(form)
        torch.manual_seed(1)
        vision = vision or open_clip.CLIPVisionCfg(layers=4, width=16, head_width=8, patch_size=16, image_size=32)
        text = open_clip.CLIPTextCfg(context_length=24, vocab_size=49408, width=16, heads=2, layers=2)
        words = self.model
        self.model = getattr(open_clip, form)(16, vision, text).eval().requires_grad_(False)
        own = {name: value for name, value in words.state_dict().items() if not name.startswith("visual.")}
        self.model.load_state_dict(own, strict=False)
        self.identity = "open tower"

    @torch.no_grad()
    def encode_image(self, pixels: Tensor) -> Tensor:
        self.image_calls += len(pixels)
        return self.model.encode_image(pixels)


@pytest.fixture(scope="module")
def teacher() -> TowerTeacher:
    return TowerTeacher()


def unit(model: nn.Module, pixels: Tensor) -> Tensor:
    return normalize(model.encode_image(pixels), dim=1)  # type: ignore[operator]


def entropy(logits: Tensor) -> Tensor:
    p = logits.softmax(1)
    return -(p * p.log()).sum(1)


def norm_weights(model: Any) -> list[nn.Parameter]:
    """The parameters of the LayerNorms of the image tower, by name."""
    return [one.requires_grad_() for name, one in model.visual.named_parameters() if ".ln_" in f".{name}"]


# --- beside plain implementations -------------------------------------------------------------------------------------


def plain_tent(teacher: TowerTeacher, batch: Any) -> Tensor:
    model: Any = copy.deepcopy(teacher.model)
    optimiser = torch.optim.Adam(norm_weights(model), lr=1e-3)
    scale, text = batch.head.logit_scale, batch.head.features
    for _ in range(10):
        optimiser.zero_grad()
        entropy(scale * unit(model, batch.pixels()) @ text.T).mean().backward()
        optimiser.step()
    with torch.no_grad():
        return scale * unit(model, batch.pixels()) @ text.T


def drawn_together(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    """CLIPArTT's loss, with torch's own cross-entropy of probabilities."""
    with torch.no_grad():
        target = torch.softmax((images @ images.T + texts @ texts.T) / 2 * scale, dim=-1).T
    return cross_entropy(scale * images @ texts.T, target)


def plain_clipartt(teacher: TowerTeacher, batch: Any) -> Tensor:
    model: Any = copy.deepcopy(teacher.model)
    optimiser = torch.optim.Adam(norm_weights(model), lr=1e-3)
    scale, text = batch.head.logit_scale, batch.head.features
    for _ in range(10):
        optimiser.zero_grad()
        images = unit(model, batch.pixels())
        order = (images @ text.T).argsort(dim=1, descending=True)[:, :3].tolist()
        words = [f"a photo of a {CLASSES[a]} or {CLASSES[b]} or {CLASSES[c]}." for a, b, c in order]
        drawn_together(images, normalize(teacher.encode_text(words), dim=1), scale).backward()
        optimiser.step()
    with torch.no_grad():
        return scale * unit(model, batch.pixels()) @ text.T


def plain_watt(teacher: TowerTeacher, batch: Any, *, parallel: bool) -> Tensor:
    model: Any = copy.deepcopy(teacher.model)
    weights, scale = norm_weights(model), batch.head.logit_scale
    prompts = ["a photo of a {}.", *prompt_templates("simple")]
    texts = [normalize(teacher.encode_text([prompt.replace("{}", c) for c in CLASSES]), dim=1) for prompt in prompts]
    average = [one.detach().clone() for one in weights]
    for _ in range(2):
        results = []
        for number, text in enumerate(texts):
            if parallel or number == 0:
                with torch.no_grad():
                    for one, value in zip(weights, average, strict=True):
                        one.copy_(value)
            optimiser = torch.optim.Adam(weights, lr=1e-3)
            for _ in range(2):
                optimiser.zero_grad()
                images = unit(model, batch.pixels())
                drawn_together(images, text[(images @ text.T).argmax(1)], scale).backward()
                optimiser.step()
            results.append([one.detach().clone() for one in weights])
        average = [torch.stack(values).mean(0) for values in zip(*results, strict=True)]
    with torch.no_grad():
        for one, value in zip(weights, average, strict=True):
            one.copy_(value)
        mean = normalize(torch.stack(texts).mean(0), dim=1)
        return scale * unit(model, batch.pixels()) @ mean.T


def plain_ttl(teacher: TowerTeacher, batch: Any) -> Tensor:
    """LoRA as matrices in a changed model, rank 2, on the last two blocks, two steps."""
    rows = []
    text, scale = batch.head.features, batch.head.logit_scale
    for index in range(len(batch)):
        views = batch.view_pixels(index, 6)
        model: Any = copy.deepcopy(teacher.model)
        generator = torch.Generator().manual_seed(0)
        sites, matrices = [], []
        for block in model.visual.transformer.resblocks[-2:]:
            own = block.attn.in_proj_weight.detach().clone()
            del block.attn.in_proj_weight
            pairs = []
            for _ in ("q", "v"):
                bound = math.sqrt(6 / (16 + 2))
                a = ((torch.rand(2, 16, generator=generator) * 2 - 1) * bound).requires_grad_()
                b = torch.zeros(16, 2, requires_grad=True)
                pairs.append((a, b))
                matrices += [a, b]
            sites.append((block.attn, own, pairs))
        optimiser = torch.optim.AdamW(matrices, lr=5e-3)

        def fill(sites: Any = sites) -> None:
            for attention, own, ((qa, qb), (va, vb)) in sites:
                attention.in_proj_weight = own + 2 * torch.cat([qb @ qa, torch.zeros(16, 16), vb @ va])

        for _ in range(2):
            optimiser.zero_grad()
            fill()
            h = entropy(scale * unit(model, views) @ text.T)
            (h * (0.4 - h.detach()).exp()).mean().backward()
            optimiser.step()
        fill()
        with torch.no_grad():
            rows.append(scale * text @ unit(model, views[:1])[0])
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("spec", "plain"),
    [
        ("tent", plain_tent),
        ("clipartt", plain_clipartt),
        ("watt:rounds=2", lambda teacher, batch: plain_watt(teacher, batch, parallel=False)),
        ("watt:mode=parallel,rounds=2", lambda teacher, batch: plain_watt(teacher, batch, parallel=True)),
        ("ttl:rank=2,blocks=2,steps=2", plain_ttl),
    ],
)
def test_it_does_what_a_plain_implementation_on_a_changed_model_does(
    teacher: TowerTeacher, spec: str, plain: Callable[[TowerTeacher, Any], Tensor]
) -> None:
    batch = make_batch(5, teacher)
    answer = create_method(spec, SMALL).predict(batch).logits
    untouched = batch.head.logits(batch.tokens())
    expected = plain(teacher, batch)
    moved = (expected - untouched).abs().max()
    assert moved > 0.02
    # Adam magnifies rounding where a gradient is nearly zero.
    assert (answer - expected).abs().max() < 0.01 * moved


# --- what they must do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        *("ttl:steps=4,lr=0.001", "tent", "clipartt", "watt:rounds=2"),
        pytest.param("watt:mode=parallel,rounds=2", marks=pytest.mark.slow),
    ],
)
def test_the_loss_falls_and_the_teacher_is_the_same_bit_for_bit(teacher: TowerTeacher, spec: str) -> None:
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    method = create_method(spec, SMALL)
    batch = make_batch(5, teacher)
    answer = method.predict(batch)
    kind = "loss" if spec.startswith(("clipartt", "watt")) else "entropy"
    assert answer.extras[f"{kind}_last"].mean() < answer.extras[f"{kind}_first"].mean()
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert all(one.grad is None and not one.requires_grad for one in teacher.model.parameters())
    assert torch.equal(method.predict(make_batch(5, teacher)).logits, answer.logits)
    assert torch.equal(teacher.encode_image(batch.pixels()), make_batch(5, teacher, chunk=5).tokens())


def test_only_the_named_parameters_move(teacher: TowerTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Tensor]] = []
    encode = TunableTower._encode

    def spy(self: TunableTower, pixels: Tensor, weights: Any) -> Tensor:
        given.append({name: value.detach().clone() for name, value in weights.items()})
        return encode(self, pixels, weights)

    monkeypatch.setattr(TunableTower, "_encode", spy)
    own = dict(teacher.model.visual.named_parameters())
    norms = {name for name in own if ".ln_" in f".{name}"}
    assert len(norms) == 2 * (2 * 4 + 2)  # two in each block, one before and one behind
    for name in BATCHED:
        given.clear()
        create_method(name, SMALL).predict(make_batch(3, teacher))
        assert all(set(one) == norms for one in given)
        moved = {key for key, value in given[-1].items() if not torch.equal(value, own[key])}
        assert len(moved) > len(norms) / 2
    given.clear()
    create_method("ttl", SMALL).predict(make_batch(1, teacher))
    assert set(given[-1]) == {f"transformer.resblocks.{block}.attn.in_proj_weight" for block in (1, 2, 3)}
    for key, value in given[-1].items():
        query, keys, values = (value - own[key]).split(16)
        assert query.abs().max() > 0 and values.abs().max() > 0 and not keys.any()


def test_ttl_starts_from_the_teacher_and_from_the_same_matrices(teacher: TowerTeacher) -> None:
    tower = TunableTower(teacher, "ttl")
    first, again, other = (LowRank(tower, TTLSettings(), seed) for seed in (0, 0, 1))
    for name, value in first.weights().items():
        assert torch.equal(value, tower.parameter(name))
    assert all(torch.equal(a, b) for a, b in zip(first.leaves, again.leaves, strict=True))
    assert not torch.equal(first.leaves[0], other.leaves[0])
    batch = make_batch(2, teacher)
    torch.testing.assert_close(create_method("ttl:steps=0").predict(batch).logits, batch.head.logits(batch.tokens()))


def test_ttl_answers_an_image_alone_as_in_any_batch(teacher: TowerTeacher) -> None:
    method = create_method("ttl", SMALL)
    together = method.predict(make_batch(3, teacher)).logits
    assert torch.equal(method.predict(make_batch(3, teacher, order=[2, 1, 0])).logits.flip(0), together)
    assert torch.equal(method.predict(make_batch(3, teacher, order=[1])).logits, together[1:2])


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_is_cut_as_the_settings_say_and_each_starts_new(teacher: TowerTeacher, name: str) -> None:
    method: Any = create_method(f"{name},batch=3")
    assert method.together == 3 and method.stream
    whole = method.predict(make_batch(5, teacher)).logits
    parts = [method.predict(make_batch(5, teacher, order=part)).logits for part in ([3, 4], [0, 1, 2])]
    assert torch.equal(torch.cat(parts[::-1]), whole)
    one = method.predict(make_batch(5, teacher, order=[0])).logits
    assert (one - whole[:1]).abs().max() > 1e-4  # it depends on what else is in the batch


def test_gradients_do_not_depend_on_how_many_images_are_encoded_at_a_time(teacher: TowerTeacher) -> None:
    batch = make_batch(5, teacher)
    slope = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (2, 5):
        tower = TunableTower(teacher, "tent", chunk=chunk)
        leaves = {name: value.requires_grad_() for name, value in tower.norm_parameters("layer").items()}
        found.append(
            tower.gradients(
                batch.pixels(), [*leaves.values()], lambda leaves=leaves: leaves, lambda x, at: (x * slope[at]).sum()
            )
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_several_prompts_are_averaged_in_clipartts_texts(teacher: TowerTeacher) -> None:
    batch = make_batch(3, teacher)
    single = create_method("clipartt").predict(batch).logits
    batch.head = ZeroShotHead.build(teacher, CLASSES, ("art of a {}.", "a {} at night."))
    assert (create_method("clipartt").predict(batch).logits - single).abs().max() > 0.01


# --- every kind of tower ----------------------------------------------------------------------------------------------

VISION = {
    "class token": {},
    "mean": {"pool_type": "avg", "final_ln_after_pool": True},
    "attentional pool": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "qk norm": {"block_type": "custom", "qk_norm": True},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "timm vit": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"},
    "timm eva": {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": "linear"},
    "timm convnext": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear"},
    "timm resnet": {"timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"},
}
NO_LAYER_NORM = ("resnet", "timm resnet")
NO_ATTENTION = ("resnet", "timm convnext", "timm resnet")


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("timm vit", "timm eva"))) for kind in VISION],
)
def any_tower(request: pytest.FixtureRequest) -> tuple[str, TowerTeacher]:
    settings = {"layers": 3, "width": 16, "head_width": 8, "patch_size": 16, "image_size": 32, **VISION[request.param]}
    if "patch" in str(settings.get("timm_model_name")):
        settings["image_size"] = 224
    try:
        made = TowerTeacher(open_clip.CLIPVisionCfg(**settings))
    except TypeError as error:
        pytest.skip(f"this open_clip has no such tower: {error}")
    made.image_size = settings["image_size"]
    return request.param, made


@pytest.mark.parametrize("spec", ["tent:steps=2", "ttl:views=2"])
def test_every_kind_of_tower_is_tuned_or_refused_by_name(any_tower: tuple[str, TowerTeacher], spec: str) -> None:
    kind, teacher = any_tower
    batch = make_batch(3, teacher)
    if spec.startswith("ttl") and kind in NO_ATTENTION:
        with pytest.raises(UsageError, match=r"adapts the attention .* teacher open \(\w+\) is of an unknown kind"):
            create_method(spec).predict(batch)
        return
    if spec.startswith("tent") and kind in NO_LAYER_NORM:
        with pytest.raises(UsageError, match=r"tunes the LayerNorm .* teacher open has none.*tent:norms=batch"):
            create_method(spec).predict(batch)
        spec = f"{spec},norms=batch"
    answer = create_method(spec).predict(batch)
    assert answer.logits.isfinite().all()
    assert (answer.logits - batch.head.logits(batch.tokens())).abs().max() > 1e-4


def test_a_teacher_without_a_tower_to_reach_is_named() -> None:
    with pytest.raises(UsageError, match="ttl tunes the image tower, and that of teacher fake is not accessible"):
        create_method("ttl", SMALL).predict(make_batch(1))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tent:norms=layers", 'Did you mean "layer"'),
        ("tent:batch=0", "batch must be 1 or more .* not 0 and"),
        ("watt:mode=serial", "sequence"),
        ("clipartt:classes=0", "classes must be 1 or more, not 0"),
        ("ttl:rank=0", "rank must be 1 or more, not 3 and 0"),
        ("ttl:lr=0", "lr must be above 0, not 0.0"),
    ],
)
def test_wrong_settings_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_method(spec)
