"""Heads on masked autoencoders as methods: whose classes, which checkpoints, how tables mark them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import apm.teachers
from apm.benchmarks.methods import Batch, MethodOptions, create_method
from apm.cli.main import app
from apm.errors import UsageError
from apm.images.load import IMAGENET_MEAN, IMAGENET_STD, central_square, normalised
from apm.mae.config import MAEConfig
from apm.mae.model import MaskedAutoencoder
from apm.mae.test_time import TestTimeAdapter, TestTimeSettings
from apm.mae.training import load_mae
from apm.pretrain.checkpoint import Checkpoint, write_checkpoint
from apm.test_time.inputs import student_pixels
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.made_runs import picture
from tests.benchmarks.methods.made import CLASSES, HEADS, full_spec, make_batch, pictures, trained_head
from tests.fakes import FakeTeacher


@pytest.mark.parametrize("name", ["vit-probe", "mae-finetune", "mae-joint"])
def test_answers_are_the_heads_own_for_the_classes_at_hand(name: str) -> None:
    model = load_mae(trained_head(HEADS[name])).model
    batch = make_batch(3)
    names = ("violin", "class 7", "cat")  # not in the head's order
    batch.head = ZeroShotHead.build(batch.teacher, names, ("{}",))
    found = create_method(full_spec(name)).predict(batch).check(name, batch)
    with torch.no_grad():
        wanted = model.logits(student_pixels(pictures(3), 16))[:, [6, 14, 0]]
    torch.testing.assert_close(found.logits, wanted, rtol=1e-5, atol=1e-5)
    assert found.step_logits is None and not found.extras


def test_of_classes_of_one_name_each_has_its_own_answer(tmp_path: Path) -> None:
    """ImageNet has two classes called missile, and two called sunglasses."""
    sizes = MAEConfig(image_size=16, patch_size=4, width=8, depth=1, heads=1, classes=4)
    names, path = ["missile", "cat", "missile", "dog"], tmp_path / "head.safetensors"
    weights = dict(MaskedAutoencoder(sizes, seed=4).state_dict())
    write_checkpoint(
        path, Checkpoint(sizes, {"class_names": json.dumps(names), "kind": "probe"}, 1, weights, {}, "mae")
    )
    batch, method = make_batch(2), create_method(f"vit-probe:file={path}")
    assert method.own_prompt(()) == "4 learned classes"  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = load_mae(path).model.logits(student_pixels(pictures(2), 16))
    for labels, numbers in ((names, [0, 1, 2, 3]), (["dog", "missile"], [3, 0])):
        batch.head = ZeroShotHead.build(batch.teacher, labels, ("{}",))
        torch.testing.assert_close(method.predict(batch).logits, logits[:, numbers], rtol=1e-5, atol=1e-5)


def test_the_teacher_has_no_part_in_the_answers() -> None:
    for name in HEADS:
        method = create_method(full_spec(name))
        one, other = FakeTeacher(dim=16), FakeTeacher(dim=24, name="other", seed=9)
        batches = [make_batch(2, one), make_batch(2, other)]
        counts = [(one.image_calls, one.text_calls), (other.image_calls, other.text_calls)]
        answers = [method.predict(batch).logits for batch in batches]
        assert torch.equal(*answers)
        assert counts == [(one.image_calls, one.text_calls), (other.image_calls, other.text_calls)]


def test_ttt_mae_adapts_to_each_image_and_gives_every_step_where_asked() -> None:
    spec = f"ttt-mae:file={trained_head('probe')},masks=4,steps=3,lr=0.1"
    batch = make_batch(3)
    plain = create_method(spec, MethodOptions(seed=5)).predict(batch)
    steps = create_method(spec, MethodOptions(seed=5, record_steps=True)).predict(batch).check("ttt-mae", batch)
    assert plain.step_logits is None and steps.step_logits is not None
    assert steps.step_logits.shape == (3, 4, 7) and torch.equal(steps.step_logits[:, -1], plain.logits)
    settings = TestTimeSettings(masks=4, steps=3, lr=0.1)
    adapter = TestTimeAdapter(load_mae(trained_head("probe")).model, settings, seed=5)
    assert torch.equal(plain.logits, adapter.adapt(student_pixels(pictures(3), 16)).logits[:, : len(CLASSES)])
    probe = create_method(full_spec("vit-probe")).predict(batch).logits
    torch.testing.assert_close(steps.step_logits[:, 0], probe, rtol=1e-5, atol=1e-5)
    assert (plain.logits - probe).abs().max() > 1e-3
    assert plain.extras["steps"].tolist() == [3, 3, 3]
    assert plain.extras.keys() == {"loss", "loss_first", "steps"} and plain.extras["loss"].isfinite().all()
    every = torch.stack([steps.extras[f"loss_{step}"] for step in range(4)])
    assert torch.equal(every[0], plain.extras["loss_first"]) and torch.equal(every[2], plain.extras["loss"])
    assert every[3].isfinite().all() and "loss_4" not in steps.extras
    other = create_method(spec, MethodOptions(seed=6)).predict(batch)
    assert not torch.equal(other.logits, plain.logits)  # other masks


def test_random_crops_are_of_what_lies_outside_the_square_too() -> None:
    """Two photographs with the same central square: copies of it are one, random crops are not."""
    spec = f"ttt-mae:file={trained_head('probe')},masks=4,steps=2,lr=0.1"
    wide = [Image.new("RGB", (48, 16), colour) for colour in ("red", "blue")]
    for image in wide:
        image.paste(pictures(1)[0].resize((16, 16)), (16, 0))
    given = make_batch(2)
    batch = Batch(["one", "other"], wide, given.teacher, given.head)
    copies, crops = (create_method(f"{spec}{more}").predict(batch).logits for more in ("", ",crops=random"))
    assert torch.equal(copies[0], copies[1])
    assert (crops[0] - crops[1]).abs().max() > 1e-4 and (crops - copies).abs().max() > 1e-4


def test_the_middle_of_the_square_is_looked_at_where_a_crop_is_set() -> None:
    batch = make_batch(2)
    for name in HEADS:
        common, published = (
            create_method(full_spec(name), MethodOptions(protocol=kind)) for kind in ("common", "published")
        )
        published.begin("imagenet-c")  # type: ignore[attr-defined]
        assert (common.settings["crop"], published.settings["crop"]) == (1.0, 0.875)
    found = create_method(f"vit-probe:file={trained_head('probe')},crop=0.8").predict(batch).logits
    middle = torch.stack([normalised(central_square(p, 20), IMAGENET_MEAN, IMAGENET_STD) for p in pictures(2)])
    with torch.no_grad():
        wanted = load_mae(trained_head("probe")).model.logits(middle[:, :, 2:18, 2:18])[:, : len(CLASSES)]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_joint_training_is_a_start_too() -> None:
    method = create_method(f"ttt-mae:file={trained_head('joint')},masks=2,steps=1")
    assert method.name == "ttt-mae[joint,masks=2,steps=1]" and method.gradients
    assert method.settings["uses_training_data"] == "yes" and method.settings["file"] == "joint.safetensors"
    assert method.settings["lr"] == 5e-3 and method.settings["momentum"] == 0.9


def test_classes_that_were_not_learned_are_named() -> None:
    batch = make_batch(1)
    batch.head = ZeroShotHead.build(batch.teacher, ("cat", "zebra", "gnu", "yak", "okapi"), ("{}",))
    message = r"vit-probe\[probe\] was not trained on 4 of the 5 classes \(zebra, gnu, yak, …\)"
    with pytest.raises(UsageError, match=message):
        create_method(full_spec("vit-probe")).predict(batch)


def test_wrong_checkpoints_and_settings_are_refused(tmp_path: Path) -> None:
    sizes = MAEConfig(image_size=16, patch_size=4, width=8, depth=1, heads=1)

    def written(name: str, classes: int, **settings: str) -> Path:
        chosen = replace(sizes, classes=classes)
        weights = dict(MaskedAutoencoder(chosen).state_dict())
        write_checkpoint(tmp_path / name, Checkpoint(chosen, dict(settings), 1, weights, {}, "mae"))
        return tmp_path / name

    plain = written("plain.safetensors", 0)
    drawn = written("drawn.safetensors", 2, class_names='["a", "b"]', kind="probe", decoder="drawn")
    create_method(f"vit-probe:file={drawn}")
    for spec, message in (
        ("vit-probe", "needs a trained head: name its file, as in vit-probe:file=probe.safetensors"),
        ("ttt-mae:steps=2", "ttt-mae needs a trained head"),
        (f"mae-joint:file={trained_head('probe')}", "a checkpoint of `apm mae probe`: mae-joint needs one of"),
        (f"ttt-mae:file={trained_head('finetune')}", "ttt-mae needs one of `apm mae probe`"),
        (f"vit-probe:file={plain}", "without a head"),
        (f"ttt-mae:file={drawn}", "was never trained, so there is nothing to adapt with"),
        (f"vit-probe:file={tmp_path / 'none.safetensors'}", "no such checkpoint; `apm mae` makes one"),
        (f"vit-probe:file={plain},steps=2", 'no setting of method "vit-probe"|Unknown setting'),
        (f"ttt-mae:file={trained_head('probe')},masks=0", "masks must be 1 or more"),
        (f"vit-probe:file={trained_head('probe')},crop=0", "crop is a share of the side"),
        (f"ttt-mae:file={trained_head('probe')},crop=1.5", "crop is a share of the side"),
        (f"ttt-mae:file={trained_head('probe')},step=2", 'Did you mean "steps"'),
    ):
        with pytest.raises(UsageError, match=message):
            create_method(spec)


@pytest.mark.slow
def test_from_training_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apm.teachers, "check_teacher", lambda name: None)
    monkeypatch.setattr(apm.teachers, "load_teacher", lambda name, **_: FakeTeacher())
    monkeypatch.chdir(tmp_path)
    for part, first in (("learn", 0), ("look", 10)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(4):
                picture(first + number).save(tmp_path / part / name / f"{number}.png")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments, "--device", "cpu"] if arguments[0] != "table" else arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    tiny = "--image-size 16 --patch-size 4 --width 8 --depth 1 --heads 1 --decoder-width 8 --decoder-depth 1 "
    tiny += "--decoder-heads 1 --steps 2 --batch-size 4 --precision fp32 --quiet"
    run("mae", "train", "learn", "--out", "mae.safetensors", *tiny.split())
    few = "--head-width 8 --head-depth 1 --head-heads 1 --steps 2 --batch-size 4 --precision fp32 --quiet"
    run("mae", "probe", "learn", "--base", "mae.safetensors", "--out", "probe.safetensors", *few.split())
    methods = ("zero-shot", "vit-probe:file=probe.safetensors", "ttt-mae:file=probe.safetensors,masks=2,steps=2")
    asked = [part for method in methods for part in ("--method", method)]
    run("bench", "folder", "--root", "look", *asked, "--teacher", "fake", "--record-steps", "--out", "run", "--quiet")
    (table,) = json.loads(run("table", "run", "--oracle", "--json"))["tables"]
    rows = {row["method"]: row for row in table["rows"] if row["kind"] == "ours"}
    marked = {method.partition("[")[0]: row["uses_training_data"] for method, row in rows.items()}
    assert marked == {"zero-shot": "no", "vit-probe": "yes", "ttt-mae": "yes"}
    assert any(row["kind"] == "oracle" and "ttt-mae" in row["method"] for row in table["rows"])
    assert "ttt-mae[probe,masks=2,steps=2] (with training data)" in run("table", "run", "--format", "markdown")
