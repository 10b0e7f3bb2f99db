"""Learning a prompt: the published arithmetic and schedule, exact resumption, and what must not be learned from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from typer.testing import CliRunner, Result

import apm.teachers
from apm.benchmarks.datasets.training import open_training
from apm.benchmarks.methods import create_method
from apm.cli.main import app
from apm.errors import UsageError
from apm.text.learned_prompt import META_NET, read_learned_prompt
from apm.text.prompt_learning import LearningConfig, PromptLearner
from apm.text.prompts import TunablePrompt, _replaced
from tests.benchmarks.made_runs import picture
from tests.benchmarks.methods.made import CLASSES, OpenTeacher, make_batch

CONFIG = LearningConfig(shots=2, epochs=3, batch_size=4)


@pytest.fixture(scope="module")
def teacher() -> OpenTeacher:
    return OpenTeacher()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of each class."""
    place = tmp_path_factory.mktemp("pets") / "train"
    for number, name in enumerate(CLASSES):
        (place / name.replace(" ", "_")).mkdir(parents=True)
        for index in range(3):
            picture(10 * number + index).save(place / name.replace(" ", "_") / f"{index}.png")
    return place


def learner(path: Path, teacher: OpenTeacher, folder: Path, config: LearningConfig = CONFIG) -> PromptLearner:
    images = open_training(str(folder), shots=config.shots, seed=config.seed)
    return PromptLearner(
        path, teacher, images.class_names, images.samples, config, data={"fingerprint": images.fingerprint}
    )


@pytest.mark.parametrize("method", ["coop", "cocoop"])
def test_a_step_is_sgd_on_the_whole_loss(tmp_path: Path, teacher: OpenTeacher, folder: Path, method: str) -> None:
    """Two steps by hand, all classes and images in one graph with torch's own modules, beside the learner's parts."""
    config = replace(CONFIG, method=method)
    mine = learner(tmp_path / "p.safetensors", teacher, folder, config)
    names = [name.replace("_", " ") for name in mine.class_names]
    prompt = TunablePrompt(teacher, names, template="a photo of a {}.")
    context = prompt.initial.clone().requires_grad_()
    net = torch.nn.Sequential(torch.nn.Linear(16, 1), torch.nn.ReLU(), torch.nn.Linear(1, 16))
    if method == "cocoop":
        own = [mine.weights[name].detach().clone() for name in META_NET]
        net.load_state_dict(dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), own, strict=True)))
        with torch.no_grad():  # a hidden unit that does something
            net[0].bias.fill_(1.0)
            mine.weights[META_NET[1]].fill_(1.0)
    leaves = [context, *(net.parameters() if method == "cocoop" else ())]
    sgd = torch.optim.SGD(leaves, lr=2e-3, momentum=0.9, weight_decay=5e-4)
    ids = teacher.tokenizer([f"a photo of a {name}." for name in names])
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        pixels, classes = torch.randn(3, 3, 32, 32, generator=generator), torch.tensor([0, 4, 2])
        features = normalize(teacher.encode_image(pixels), dim=1)
        logits = []
        for feature in features:
            words = context + net(feature) if method == "cocoop" else context
            with _replaced(prompt._embedding, prompt._slots, words):
                text = normalize(teacher.model.encode_text(ids), dim=1)
            logits.append(teacher.logit_scale * text @ feature)
        loss = cross_entropy(torch.stack(logits), classes)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        assert mine.learn(pixels, classes, 2e-3) == pytest.approx(float(loss.detach()), rel=1e-5)
    for ours, theirs in zip(mine.weights.values(), leaves, strict=True):
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-6)
    assert (context - prompt.initial).abs().max() > 1e-4
    assert all(one.grad is None for one in teacher.model.parameters())


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_torch_does_not_take_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed must be from 0 to 9223372036854775807, not {seed}"):
        LearningConfig(seed=seed)


def test_a_context_that_leaves_no_room_for_names_is_refused(tmp_path: Path, teacher: OpenTeacher, folder: Path) -> None:
    for words in (76, 1000):
        with pytest.raises(UsageError, match=f"words is {words}: with so many the class names do not fit"):
            learner(tmp_path / "x.safetensors", teacher, folder, replace(CONFIG, words=words))


def test_defaults_are_the_published_ones() -> None:
    epochs = {(s, c): LearningConfig(shots=s).filled(c).epochs for s in (1, 2, 4, 8, 16) for c in (10, 1000)}
    assert [epochs[s, 10] for s in (1, 2, 4, 8, 16)] == [50, 100, 100, 200, 200]
    assert epochs[16, 1000] == 50
    coop, cocoop = LearningConfig().filled(10), LearningConfig(method="cocoop").filled(1000)
    assert (coop.batch_size, cocoop.batch_size, cocoop.epochs) == (32, 1, 10)
    assert (coop.lr, coop.momentum, coop.weight_decay) == (2e-3, 0.9, 5e-4)
    rates = [replace(coop, epochs=4).rate(epoch) for epoch in range(4)]
    assert rates == pytest.approx([1e-5, 2e-3, 1e-3 * (1 + math.cos(math.pi / 4)), 1e-3])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["coop", "cocoop"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    tmp_path: Path, teacher: OpenTeacher, folder: Path, method: str
) -> None:
    class Killed(Exception):
        pass

    config = replace(CONFIG, method=method, epochs=2)
    whole = learner(tmp_path / "whole.safetensors", teacher, folder, config)
    assert whole.steps == 2 * 4  # 14 images, 4 at a time
    losses: list[float] = []
    whole.run(on_step=lambda step, one: losses.append(one["loss"]))
    assert len(losses) == 8 and whole.finished
    path, seen = tmp_path / "killed.safetensors", []

    def kill(step: int, one: dict[str, float]) -> None:
        seen.append(one["loss"])
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        learner(path, teacher, folder, config).run(save_every=5, on_step=kill)
    assert not path.exists()
    again = learner(path, teacher, folder, config)
    assert again.step == 5
    again.run(on_step=lambda step, one: seen.append(one["loss"]))
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert seen == [*losses[:6], *losses[5:]]
    assert sorted(one.name for one in tmp_path.iterdir() if one.suffix != ".lock") == [path.name, "whole.safetensors"]
    done = learner(path, teacher, folder, config)
    done.run()
    assert done.finished and torch.equal(done.learned().context, again.learned().context)


def test_learning_lowers_the_loss_and_is_seeded(tmp_path: Path, teacher: OpenTeacher, folder: Path) -> None:
    config = replace(CONFIG, epochs=12, lr=2e-2, words=3)
    losses: list[float] = []
    one = learner(tmp_path / "a.safetensors", teacher, folder, config)
    one.run(on_step=lambda step, found: losses.append(found["loss"]))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert read_learned_prompt(tmp_path / "a.safetensors").context.shape == (3, 16)
    other = learner(tmp_path / "b.safetensors", teacher, folder, replace(config, seed=1))
    assert not torch.equal(other.weights["ctx"], learner(tmp_path / "c", teacher, folder, config).weights["ctx"])


def test_other_settings_do_not_continue_a_prompt(tmp_path: Path, teacher: OpenTeacher, folder: Path) -> None:
    path = tmp_path / "p.safetensors"
    learner(path, teacher, folder).run()
    with pytest.raises(UsageError, match=r"lr: 0\.002 there, 0\.004 here"):
        learner(path, teacher, folder, replace(CONFIG, lr=4e-3))
    half = tmp_path / "half.safetensors"
    unfinished = learner(half, teacher, folder)
    unfinished.learn(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), 1e-3)
    unfinished.step = 1
    unfinished.save()
    with pytest.raises(UsageError, match="epochs: 3 there, 9 here"):
        learner(half, teacher, folder, replace(CONFIG, epochs=9))
    unfinished.partial.write_bytes(b"cut")
    with pytest.raises(UsageError, match="is damaged"):
        learner(half, teacher, folder)


def test_a_learned_prompt_is_for_its_teacher_and_its_classes(
    tmp_path: Path, teacher: OpenTeacher, folder: Path
) -> None:
    path = tmp_path / "p.safetensors"
    learner(path, teacher, folder).run()
    batch = make_batch(2, teacher)
    for name in ("coop", "tpt+coop"):
        answer = create_method(f"{name}:file={path}").predict(batch)
        assert answer.check(name, batch).logits.isfinite().all()
    other = OpenTeacher()
    other.identity = "another"
    with pytest.raises(UsageError, match="was learned with open CLIP, but the teacher is another"):
        create_method(f"coop:file={path}").predict(make_batch(2, other))
    strange: Any = make_batch(2, teacher)
    strange.head = replace(strange.head, labels=(*strange.head.labels[:-1], "zebra"))
    with pytest.raises(UsageError, match=r"learned for 7 class names.*1 of the 7 given.*\"zebra\".*transfer=true"):
        create_method(f"coop:file={path}").predict(strange)
    assert create_method(f"coop:file={path},transfer=true").predict(strange).logits.isfinite().all()
    fewer: Any = make_batch(2, teacher)
    fewer.head = replace(fewer.head, labels=fewer.head.labels[:4], features=fewer.head.features[:4])
    assert create_method(f"coop:file={path}").predict(fewer).logits.shape == (2, 4)


# --- what is learned from ---------------------------------------------------------------------------------------------


def table(path: Path, **columns: Any) -> Path:
    files = []
    for number in range(8):
        picture(number).save(path.with_suffix(".png"))
        files.append({"bytes": path.with_suffix(".png").read_bytes()})
    pq.write_table(pa.table({"image": files, "label": [3, 3, 3, 7, 7, 7, 7, 7]} | columns), path, row_group_size=3)
    return path


def test_a_table_gives_so_many_of_each_class_and_its_names(tmp_path: Path) -> None:
    names = ["a_cat"] * 3 + ["dog"] * 5
    path = table(tmp_path / "pets-train.parquet", class_name=names)
    two, four = (open_training(str(path), shots=shots, seed=0) for shots in (2, 4))
    assert two.class_names == ("a cat", "dog") and two.name == "pets-train"
    assert [sample.label for sample in two.samples] == [0, 0, 1, 1]
    assert {sample.id for sample in two.samples} < {sample.id for sample in four.samples}
    assert four.notes == ("1 class(es) have fewer than 4 images: all of theirs are used, 3 at least.",)
    for sample in four.samples:
        expected = picture(int(sample.id.split("/")[1]))
        assert sample.load().tobytes() == expected.tobytes()
    assert open_training(str(path), shots=2, seed=1).fingerprint != two.fingerprint
    wnids = table(tmp_path / "w.parquet", wnid=["n01440764"] * 3 + ["n01443537"] * 5, class_name=names)
    assert open_training(str(wnids), shots=1, seed=0).class_names == ("tench", "goldfish")
    with pytest.raises(UsageError, match="does not name its classes"):
        open_training(str(table(tmp_path / "none.parquet")), shots=1, seed=0)


def test_images_without_a_class_are_left_out_and_labels_that_are_no_numbers_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "part.parquet", label=[-1, 0, None, 1, 1, -1, 0, 1])
    declared = {b"huggingface": b'{"info": {"features": {"label": {"names": ["cat", "dog"]}}}}'}
    pq.write_table(pq.read_table(path).replace_schema_metadata(declared), path)
    images = open_training(str(path), shots=8, seed=0)
    assert images.class_names == ("cat", "dog")
    assert sorted((sample.id[-1], sample.label) for sample in images.samples) == [
        ("1", 0),
        ("3", 1),
        ("4", 1),
        ("6", 0),
        ("7", 1),
    ]
    for labels, shown in ((["cat"] * 8, "'cat'"), ([0.0, 1.0] * 4, r"0\.0")):
        words = table(tmp_path / "words.parquet", label=labels, class_name=["cat", "dog"] * 4)
        with pytest.raises(UsageError, match=f'column "label" contains {shown}, which is no class number'):
            open_training(str(words), shots=1, seed=0)


@pytest.mark.parametrize("name", ["val", "Validation", "test", "imagenet-val", "pets-test.parquet"])
def test_what_is_for_testing_is_refused_unless_asked_for(tmp_path: Path, folder: Path, name: str) -> None:
    place = tmp_path / name
    if place.suffix:
        table(place, class_name=["a"] * 3 + ["b"] * 5)
    else:
        place.symlink_to(folder)
    with pytest.raises(UsageError, match="is test data, going by its name"):
        open_training(str(place), shots=1, seed=0)
    assert open_training(str(place), shots=1, seed=0, allow_test=True).samples


def test_the_training_part_of_a_split_is_taken(tmp_path: Path, folder: Path) -> None:
    images = tmp_path / "oxford_pets" / "images"
    images.mkdir(parents=True)
    parts: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for number in range(6):
        picture(number).save(images / f"{number}.jpg")
        parts["train" if number < 4 else "test"].append([f"{number}.jpg", number % 2, ("cat", "dog")[number % 2]])
    (images.parent / "split_zhou_OxfordPets.json").write_text(json.dumps(parts))
    found = open_training("pets", root=tmp_path, shots=9, seed=0)
    assert sorted(sample.id for sample in found.samples) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    for place, message in (("imagenet", "no training part"), ("nowhere", "no such folder"), ("digits", "no training")):
        with pytest.raises(UsageError, match=message):
            open_training(place, root=tmp_path, shots=1, seed=0)


# --- the command ------------------------------------------------------------------------------------------------------


def learn(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prompts", "learn", *map(str, arguments), "--teacher", "open", "--device", "cpu"])


def test_the_command_learns_a_prompt_that_bench_takes(
    tmp_path: Path, teacher: OpenTeacher, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apm.teachers, "check_teacher", lambda name: None)
    monkeypatch.setattr(apm.teachers, "load_teacher", lambda name, **_: teacher)
    monkeypatch.chdir(tmp_path)
    done = learn("coop", folder, "--shots", 2, "--epochs", 1, "--json")
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert written["method"] == "coop" and (written["words"], written["width"]) == (4, 16)
    name = f"coop-{folder.parent.name}-train-2shots-seed0.safetensors"
    assert written["path"] == name
    again = learn("coop", folder, "--shots", 2, "--epochs", 1)
    assert again.exit_code == 0 and "learned already" in again.stderr and name in again.stdout
    assert create_method(f"coop:file={name}").predict(make_batch(1, teacher)).logits.shape == (1, len(CLASSES))
    for arguments, message in (
        (("cop", folder), 'Did you mean "coop"'),
        (("coop", folder, "--shots", 0), "0 shots"),
        (("coop", folder, "--epochs", 0), "epochs is 0"),
        (("coop", folder, "--save-every", 0), "--save-every must be 1 or more, not 0"),
        (("coop", folder, "--shots", 2, "--epochs", 2, "--out", name), "epochs: 1 there, 2 here"),
    ):
        failed = learn(*arguments)
        assert failed.exit_code == 2 and message in failed.stderr, failed.output
        assert "Traceback" not in failed.output
