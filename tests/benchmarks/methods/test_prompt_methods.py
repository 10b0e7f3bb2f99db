"""TPT and the other methods that tune a prompt, by what they must do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.benchmarks.methods import MethodOptions, create_method, rlcf
from apm.benchmarks.methods.base import HasOwnPrompt
from apm.benchmarks.methods.dynaprompt import choose
from apm.benchmarks.methods.rtpt import view_weights
from apm.benchmarks.methods.tpt import marginal_entropy
from apm.errors import UsageError
from apm.text.learned_prompt import LearnedPrompt, write_learned_prompt
from apm.text.prompts import TunablePrompt, _replaced
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.methods.made import CLASSES, SMALL, TEMPLATE, OpenTeacher, learned_prompt, make_batch
from tests.fakes import FakeTeacher


@pytest.fixture(scope="module", params=["CLIP", "CustomTextCLIP"])
def open_teacher(request: pytest.FixtureRequest) -> OpenTeacher:
    return OpenTeacher(request.param)


# --- TPT --------------------------------------------------------------------------------------------------------------


def test_untuned_prompts_are_the_teachers_own_features(open_teacher: OpenTeacher) -> None:
    prompt = TunablePrompt(open_teacher, CLASSES, group=3)
    head = ZeroShotHead.build(open_teacher, CLASSES, (TEMPLATE,))
    assert prompt.initial.shape == (4, 16)  # a, photo, of, a
    torch.testing.assert_close(prompt.features(prompt.initial), head.features)


def test_the_prompts_gradient_is_that_of_finite_differences(open_teacher: OpenTeacher) -> None:
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(len(CLASSES), 16, generator=generator)
    prompt = TunablePrompt(open_teacher, CLASSES, group=3)
    gradient = prompt.gradient(prompt.initial, upstream)
    assert torch.equal(TunablePrompt(open_teacher, CLASSES, group=3).gradient(prompt.initial, upstream), gradient)
    torch.testing.assert_close(
        TunablePrompt(open_teacher, CLASSES, group=50).gradient(prompt.initial, upstream),
        gradient,
        rtol=1e-4,
        atol=1e-5,
    )
    for _ in range(3):
        direction = torch.randn(gradient.shape, generator=generator)
        ends = [(prompt.features(prompt.initial + h * direction) * upstream).sum() for h in (-1e-3, 1e-3)]
        torch.testing.assert_close((ends[1] - ends[0]) / 2e-3, (gradient * direction).sum(), rtol=2e-2, atol=2e-2)


def test_tpt_with_zero_steps_is_zero_shot_bit_for_bit(open_teacher: OpenTeacher) -> None:
    batch = make_batch(3, open_teacher)
    answer = create_method("tpt:steps=0", SMALL).predict(batch)
    assert torch.equal(answer.logits, create_method("zero-shot").predict(batch).logits)
    torch.testing.assert_close(answer.extras["entropy_first"], answer.extras["entropy_last"])


def test_tpt_lowers_the_entropy_of_the_views_it_keeps(open_teacher: OpenTeacher) -> None:
    answer = create_method("tpt:keep=0.5", SMALL).predict(make_batch(4, open_teacher))
    assert (answer.extras["entropy_last"] < answer.extras["entropy_first"]).all()
    more = create_method("tpt:keep=0.5,steps=4", SMALL).predict(make_batch(4, open_teacher))
    assert (more.extras["entropy_last"] < answer.extras["entropy_last"]).all()
    torch.testing.assert_close(more.extras["entropy_first"], answer.extras["entropy_first"])


def test_tpt_does_what_adam_on_the_whole_loss_does(open_teacher: OpenTeacher) -> None:
    """One step by hand, with the gradient of the whole loss at once, against TPT's groups of classes."""
    batch = make_batch(1, open_teacher)
    views = normalize(batch.views(8)[0], dim=1)
    prompt, scale = TunablePrompt(open_teacher, CLASSES, group=99), batch.head.logit_scale
    probabilities = (scale * views @ batch.head.features.T).softmax(1)
    kept = views[(-(probabilities * probabilities.log()).sum(1)).argsort()[:4]]
    context = prompt.initial.clone().requires_grad_()
    whole = open_teacher.tokenizer([TEMPLATE.replace("{}", name) for name in CLASSES])  # at their full length
    with _replaced(prompt._embedding, prompt._slots, context):
        text = normalize(open_teacher.model.encode_text(whole), dim=1)
    mean = (scale * kept @ text.T).softmax(1).mean(0)
    (-(mean * mean.log()).sum()).backward()
    torch.optim.AdamW([context], lr=5e-3).step()
    expected = scale * views[0] @ prompt.features(context.detach()).T
    answer = create_method("tpt:keep=0.5,group=2", SMALL).predict(batch)
    torch.testing.assert_close(answer.logits[0], expected, rtol=1e-3, atol=1e-3)
    assert (answer.logits[0] - batch.head.logits(batch.tokens())[0]).abs().max() > 1e-2


def test_tpt_leaves_teacher_and_context_as_they_were(open_teacher: OpenTeacher) -> None:
    before = {name: weights.clone() for name, weights in open_teacher.model.state_dict().items()}
    method = create_method("tpt", SMALL)
    batch = make_batch(2, open_teacher)
    first = method.predict(batch)
    context = method._prompt.initial.clone()  # type: ignore[attr-defined]
    again = method.predict(batch)
    assert torch.equal(again.logits, first.logits)
    assert torch.equal(method._prompt.initial, context)  # type: ignore[attr-defined]
    for name, weights in open_teacher.model.state_dict().items():
        assert torch.equal(weights, before[name])
    assert all(weights.grad is None and not weights.requires_grad for weights in open_teacher.model.parameters())
    assert not any(module._forward_hooks for module in open_teacher.model.modules())


def test_tpt_takes_the_runs_own_single_prompt_and_says_when_it_cannot(
    open_teacher: OpenTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    batch = make_batch(2, open_teacher)
    batch.head = ZeroShotHead.build(open_teacher, CLASSES, ("this is a {}, a kind of thing.",))
    answer = create_method("tpt:steps=0", SMALL).predict(batch)
    assert torch.equal(answer.logits, batch.head.logits(batch.tokens()))
    assert not caplog.records
    batch.head = ZeroShotHead.build(open_teacher, CLASSES, ("an image of a {}.", "art of a {}."))
    answer = create_method("tpt:steps=0", SMALL).predict(batch)
    paper = ZeroShotHead.build(open_teacher, CLASSES, (TEMPLATE,))
    assert torch.equal(answer.logits, paper.logits(batch.tokens()))
    assert "not what the run's other methods use" in caplog.text


def test_tpt_says_which_prompt_it_uses() -> None:
    own, paper = create_method("tpt:prompt=art of a {}"), create_method("tpt")
    assert isinstance(own, HasOwnPrompt)
    assert isinstance(paper, HasOwnPrompt)
    assert not isinstance(create_method("zero-shot"), HasOwnPrompt)
    assert own.own_prompt(["a photo of a {}."]) == "art of a {}"
    assert paper.own_prompt(["this is a {}."]) == "this is a {}."
    assert paper.own_prompt(["{} texture."]) == paper.own_prompt(["a {}", "the {}"]) == "a photo of a {}."


# --- other methods that tune a prompt ---------------------------------------------------------------------------------


def test_ctpt_without_dispersion_is_tpt_and_with_it_keeps_texts_apart(open_teacher: OpenTeacher) -> None:
    batch = make_batch(3, open_teacher)
    tpt = create_method("tpt", SMALL).predict(batch)
    none = create_method("ctpt:dispersion=0", SMALL).predict(batch)
    assert torch.equal(none.logits, tpt.logits)
    much = create_method("ctpt:dispersion=1000", SMALL).predict(batch)
    assert (much.extras["dispersion_last"] > much.extras["dispersion_first"]).all()
    assert (much.extras["dispersion_last"] > none.extras["dispersion_last"]).all()


def test_rtpt_lowers_each_views_entropy_and_an_outlier_hardly_counts(open_teacher: OpenTeacher) -> None:
    answer = create_method("rtpt:neighbours=3,keep=0.5", SMALL).predict(make_batch(4, open_teacher))
    assert (answer.extras["entropy_last"] < answer.extras["entropy_first"]).all()
    like = normalize(torch.ones(7, 16) + 0.1 * torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = view_weights(torch.cat([like, -like[:1]]), 3, 0.01)
    assert weights.sum() == pytest.approx(1)
    assert weights[7] < 1e-6 < weights[:7].min()
    asked: list[float] = []

    def weigh(views: Tensor, neighbours: int, temperature: float) -> Tensor:
        asked.append(temperature)
        return view_weights(views, neighbours, temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apm.benchmarks.methods.rtpt.view_weights", weigh)
        create_method("rtpt:neighbours=3", SMALL).predict(make_batch(1, open_teacher))
    assert asked == [pytest.approx(1 / open_teacher.logit_scale)]  # the teacher's own, as CLIP's is 0.01
    twice = view_weights(torch.cat([like[:1], like]), 3, 0.01)  # a view's copy is another view
    assert twice[0] == pytest.approx(float(twice[1]))


def test_the_reward_model_sees_the_same_views_and_its_favourite_gains(
    open_teacher: OpenTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    favourite = 2

    class Second(FakeTeacher):
        """Finds the third class in every view, and no other."""

        def encode_image(self, pixels: Tensor) -> Tensor:
            self.image_calls += len(pixels)
            seen.append(pixels)
            return torch.eye(16)[:1].expand(len(pixels), -1)

        def encode_text(self, texts: Any) -> Tensor:
            return torch.eye(16)[[0 if CLASSES[favourite] in text else 1 for text in texts]]

    seen: list[Tensor] = []
    second = Second(dim=16, name="second")
    monkeypatch.setattr(rlcf, "load_teacher", lambda spec, device: second)
    batch = make_batch(2, open_teacher)
    own: list[Tensor] = []
    encode = open_teacher.encode_image
    monkeypatch.setattr(open_teacher, "encode_image", lambda pixels: (own.append(pixels), encode(pixels))[1])
    spec = f"rlcf:reward=embedded,proposals={len(CLASSES)},lr=0.002"
    create_method(spec, SMALL).predict(batch)
    assert torch.equal(torch.cat(seen), torch.cat(own))
    assert second.image_calls == 2 * 8
    before = batch.head.probabilities(batch.tokens())[:, favourite]
    alone = create_method(f"{spec},views=1", SMALL).predict(batch)  # the image is the one view that is tuned on
    assert (alone.logits.softmax(1)[:, favourite] > 1.005 * before).all()


def test_rlcf_starts_from_a_learned_context(
    open_teacher: OpenTeacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    second = FakeTeacher(dim=16, name="second")
    told: list[str] = []
    encode = second.encode_text
    monkeypatch.setattr(second, "encode_text", lambda texts: (told.extend(texts), encode(texts))[1])
    monkeypatch.setattr(rlcf, "load_teacher", lambda spec, device: second)
    monkeypatch.setenv("APM_CACHE", str(tmp_path / "cache"))
    batch = make_batch(2, open_teacher)
    origin = {"teacher": open_teacher.identity, "class_names": json.dumps(CLASSES)}
    words = TunablePrompt(open_teacher, CLASSES).initial
    moved = words + 0.5 * torch.randn(words.shape, generator=torch.Generator().manual_seed(0))
    for name, context in (("words", words), ("coop", moved)):
        write_learned_prompt(tmp_path / f"{name}.safetensors", LearnedPrompt(context=context, origin=origin))
    plain = create_method("rlcf:reward=embedded", SMALL)
    expected = plain.predict(batch).logits
    same = create_method(f"rlcf:reward=embedded,file={tmp_path / 'words.safetensors'}", SMALL)
    torch.testing.assert_close(same.predict(batch).logits, expected)  # "a photo of a", learned
    spec = f"rlcf:reward=embedded,file={tmp_path / 'coop.safetensors'}"
    method = create_method(spec, SMALL)
    assert not torch.allclose(method.predict(batch).logits, expected, atol=1e-2)
    still = create_method(f"{spec},steps=0", SMALL).predict(batch).logits
    coop = create_method(f"coop:file={tmp_path / 'coop.safetensors'}").predict(batch).logits
    torch.testing.assert_close(still, coop)
    assert all("vectors" not in text for text in told) and told  # the second teacher is told words
    assert (method.name, plain.name) == ("rlcf[coop,reward=embedded]", "rlcf[reward=embedded]")
    assert method.settings["uses_training_data"] == "yes" and method.settings["file"] == "coop.safetensors"
    assert set(method.settings) - set(plain.settings) == {"file", "sha256", "transfer", "uses_training_data"}
    for one, words_of_it in ((spec, "; from CoOp's context"), ("rlcf:reward=embedded", "without its start from CoOp")):
        made = create_method(one, MethodOptions(protocol="published"))
        assert words_of_it in str(made.settings["published"])


def test_rlcf_refuses_a_learned_context_of_others(
    open_teacher: OpenTeacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rlcf, "load_teacher", lambda spec, device: FakeTeacher(dim=16, name="second"))
    path = tmp_path / "coop.safetensors"
    spec = f"rlcf:reward=embedded,file={path}"
    with pytest.raises(UsageError, match="cannot be read"):
        create_method(spec)
    names = json.dumps(["zebra", "horse"])
    for origin, message in (
        ({"teacher": "another"}, "coop was learned with another, but the teacher is open"),
        ({"class_names": names}, "learned for 2 class names.*7 of the 7 given.*transfer=true"),
    ):
        write_learned_prompt(path, LearnedPrompt(context=torch.zeros(4, 16), origin=origin))
        with pytest.raises(UsageError, match=message):
            create_method(spec, SMALL).predict(make_batch(1, open_teacher))
    answer = create_method(f"{spec},transfer=true", SMALL).predict(make_batch(1, open_teacher))
    assert answer.logits.isfinite().all()
    with pytest.raises(UsageError, match="learned by CoCoOp: use it with cocoop"):
        create_method(f"rlcf:reward=embedded,file={learned_prompt('cocoop')}")
    with pytest.raises(UsageError, match="its own words"):
        create_method(f"{spec},prompt=art of a {{}}")
    with pytest.raises(UsageError, match="none is named"):
        create_method("rlcf:reward=embedded,transfer=true")


def test_dynaprompt_depends_on_the_order_and_forgets_on_reset(open_teacher: OpenTeacher) -> None:
    method: Any = create_method("dynaprompt:prompts=4,keep=0.5,views=4", SMALL)
    forward = method.predict(make_batch(8, open_teacher))
    assert forward.extras["prompts"].max() > 1
    method.reset()
    turned = method.predict(make_batch(8, open_teacher, order=[*range(7, -1, -1)])).logits.flip(0)
    assert (turned - forward.logits).abs().max() > 1e-3
    method.reset()
    parts = [method.predict(make_batch(8, open_teacher, order=part)).logits for part in ([0, 1, 2, 3, 4], [5, 6, 7])]
    torch.testing.assert_close(torch.cat(parts), forward.logits, rtol=1e-4, atol=1e-4)


def test_of_dynaprompts_candidates_those_are_taken_that_both_rankings_prefer() -> None:
    """Worked by hand: entropies fall from prompt 0 to 3; prompt 1 is the oldest, at place 1; 0 and 3 differ most."""
    height = torch.tensor([1.0, 2.0, 3.0, 4.0])  # of the one class that stands out: the higher, the surer
    logits = torch.zeros(4, 3, 5)
    logits[:, :, 0] = height[:, None]
    logits[3, 1:, 0] -= 0.5
    assert choose(logits, oldest=1) == [3, 1]  # the candidate 3 alone is in the first of the second ranking
    assert choose(logits, oldest=0) == [0]  # nothing stands before it in the second ranking
    logits[1, 1:, 0] -= 0.1
    assert choose(logits[[0, 2, 1, 3]], oldest=1) == [3, 1]


def test_a_teacher_with_a_closed_text_tower_is_named() -> None:
    with pytest.raises(UsageError, match="Teacher fake cannot tune its prompt"):
        create_method("tpt", SMALL).predict(make_batch(1))


def test_marginal_entropy_is_that_of_the_mean_prediction() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 1.0]])
    mean = logits.softmax(1).mean(0)
    torch.testing.assert_close(marginal_entropy(logits), -(mean * mean.log()).sum())
