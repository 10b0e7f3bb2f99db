"""The trainer of the embedded teacher, on sets of a few random images: resume, export, vocabulary."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from apm.labels import imagenet_names, prompt_templates
from apm.teachers.openclip import load_folder
from apm.teachers.training import embedded as train_embedded
from apm.teachers.training.check import mixed_check
from apm.teachers.training.data import (
    CIFAR_START,
    CONCEPTS,
    DIGIT_START,
    MEAN,
    STD,
    Sharp,
    Source,
    augment,
    load_sharp,
    load_sources,
    normalise,
    resave,
)
from apm.teachers.training.embedded import (
    Recipe,
    candidates,
    draw,
    frequencies,
    image_loss,
    rate_at,
    size_at,
    train_images,
    word_directions,
)
from apm.teachers.training.export import calibrate, export
from apm.teachers.training.muon import orthogonalise
from apm.teachers.training.patches import PatchConv, use_patches
from apm.teachers.training.refine import refine
from apm.teachers.training.text import read_lexicon, vocabulary, write_bpe
from apm.teachers.training.words import draw_labels, fit_words, word_loss, word_members

RECIPE = Recipe(
    tower="test_resnet", dim=32, steps=4, batch=24, word_images=60, sizes=((32, 0.5), (40, 0.5)), image_size=32
)
TENCH, CHURCH = 0, 497


def source(name: str, labels: torch.Tensor, share: float) -> Source:
    generator = torch.Generator().manual_seed(len(name))
    count = 130
    soft = torch.rand(count, 10, generator=generator) * (name == "tiny-imagenet")
    return Source(
        name,
        torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8),
        labels[torch.randint(len(labels), (count,), generator=generator)],
        torch.randint(0, 1000, (count, 10), generator=generator),
        soft,
        share,
        flip=name != "digits",
    )


@pytest.fixture
def sources() -> list[Source]:
    return [
        source("tiny-imagenet", torch.tensor([1, 25, 281]), 0.5),
        source("imagenette", torch.tensor([TENCH, CHURCH]), 0.1),
        source("cifar10", torch.arange(CIFAR_START, DIGIT_START), 0.2),
        source("digits", torch.arange(DIGIT_START, CONCEPTS), 0.2),
    ]


@pytest.fixture
def sharp() -> Sharp:
    generator = torch.Generator().manual_seed(7)
    pictures = torch.randint(0, 256, (9, 40, 40, 3), generator=generator, dtype=torch.uint8)
    return Sharp(pictures[:4], torch.tensor([TENCH, CHURCH, TENCH, CHURCH]), pictures[4:])


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_weights(
    sources: list[Source], sharp: Sharp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = train_images(RECIPE, sources, sharp, whole, save_every=2).state_dict()

    save = train_embedded.save

    def save_and_die(state: dict, path: Path) -> None:
        save(state, path)
        if path.name == "image_stage.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_embedded, "save", save_and_die)
        train_images(RECIPE, sources, sharp, killed, save_every=2)
    resumed = train_images(RECIPE, sources, sharp, killed, save_every=2).state_dict()
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name


def test_every_image_is_drawn_once_in_a_pass_and_held_out_ones_never(sources: list[Source]) -> None:
    rows = torch.cat([draw(sources[0], step, 10, seed=3) for step in range(20)])
    first_pass = rows[:127]  # 130 images less the three that are held out
    assert len(first_pass.unique()) == 127
    assert not (rows % 64 == 0).any()
    assert not torch.equal(rows[:50], rows[127:177])


def test_candidates_keep_sets_apart_that_name_the_same_things() -> None:
    seen = torch.tensor([1, 281])
    assert not set(candidates("tiny-imagenet", seen).tolist()) & set(range(CIFAR_START, DIGIT_START))
    assert 281 not in candidates("cifar10", seen)
    assert set(candidates("digits", seen).tolist()) == {1, 281, *range(CIFAR_START, CONCEPTS)}


def test_schedules() -> None:
    assert [size_at(p, ((64, 0.5), (96, 0.5))) for p in (0.0, 0.49, 0.5, 0.999)] == [64, 64, 96, 96]
    assert rate_at(0.025, 0.05) == pytest.approx(0.5)
    assert rate_at(0.05, 0.05) == pytest.approx(1.0)
    assert rate_at(0.9999, 0.05) == pytest.approx(0.0, abs=2e-4)


def test_orthogonalise_flattens_the_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((16, 100), (100, 16)):
        matrix = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(orthogonalise(matrix))
        assert values.min() > 0.6
        assert values.max() < 1.3
        # the same singular vectors: the product with the original stays symmetric and positive
        product = orthogonalise(matrix).T @ matrix if shape[0] > shape[1] else orthogonalise(matrix) @ matrix.T
        assert torch.allclose(product, product.T, atol=0.03 * product.abs().max().item())
        assert torch.linalg.eigvalsh((product + product.T) / 2).min() > 0


def test_augmentation_is_drawn_from_the_generator_alone() -> None:
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    one, two, other = (augment(images, 24, torch.Generator().manual_seed(seed), flip=True) for seed in (5, 5, 6))
    assert one.shape == (6, 3, 24, 24)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def blockiness(images: np.ndarray) -> float:
    """How much larger the steps between 8×8 blocks are than those within, (n, 64, 64, 3): 1 for no JPEG."""
    steps = np.abs(np.diff(images.astype(float), axis=2)).mean(axis=(0, 1, 3))  # (63,)
    return float(steps[7::8].mean() / np.delete(steps, np.s_[7::8]).mean())


def smooth_jpeg(side: int, seed: int) -> bytes:
    """A picture of soft clouds: at 64 pixels a JPEG like Tiny ImageNet's, larger ones of higher quality."""
    clouds = np.random.default_rng(seed).uniform(0, 255, (5, 5, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(clouds).resize((side, side), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=75 if side <= 64 else 95
    )
    return buffer.getvalue()


def parquet(path: Path, side: int, labels: list[int]) -> None:
    """A training file of `len(labels)` pictures without soft targets."""
    rows = {
        "image": [{"bytes": smooth_jpeg(side, seed)} for seed in range(len(labels))],
        "label": labels,
        "soft_index": [[]] * len(labels),
        "soft_prob": [[]] * len(labels),
    }
    pq.write_table(pa.table(rows), path)


@pytest.mark.slow
def test_no_set_is_cleaner_than_another(tmp_path: Path) -> None:
    parquet(tmp_path / "tiny-imagenet-train.parquet", 64, [1] * 20)
    parquet(tmp_path / "imagenette-train.parquet", 128, [TENCH] * 20)
    parquet(tmp_path / "cifar10-train.parquet", 32, [3] * 20)
    tiny, imagenette, cifar, digits = load_sources(tmp_path)
    assert tiny.images.shape == imagenette.images.shape == (20, 64, 64, 3)
    assert cifar.labels[0] == CIFAR_START + 3
    opened = (Image.open(io.BytesIO(smooth_jpeg(128, seed))) for seed in range(20))
    clean = np.stack([np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)) for image in opened])
    artefacts = blockiness(tiny.images.numpy())
    assert artefacts > 1.1 * blockiness(clean)
    assert blockiness(imagenette.images.numpy()) == pytest.approx(artefacts, rel=0.02)
    assert len(digits.images) > 800


def test_sharp_photographs_are_those_that_training_never_sees(tmp_path: Path) -> None:
    parquet(tmp_path / "imagenette-train.parquet", 128, list(range(130)))
    Image.new("RGB", (300, 200), "red").save(tmp_path / "photo.jpg")
    sharp = load_sharp(tmp_path, tmp_path)
    assert sharp.labels.tolist() == [0, 64, 128]
    assert sharp.images.shape == (3, 128, 128, 3)
    assert sharp.others.shape == (1, 128, 128, 3)
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        load_sharp(tmp_path, tmp_path / "nothing-here")


def test_resaved_images_are_jpegs_at_their_final_size() -> None:
    clouds = torch.from_numpy(np.asarray(Image.open(io.BytesIO(smooth_jpeg(256, 0))).resize((64, 64))).copy())
    clean = normalise(clouds.expand(40, -1, -1, -1))
    saved = resave(clean.clone(), torch.Generator().manual_seed(0), share=1.0)
    pixels = ((saved * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255).permute(0, 2, 3, 1)
    assert blockiness(pixels.numpy()) > 1.1 * blockiness(clouds[None].numpy())
    assert torch.equal(resave(clean.clone(), torch.Generator().manual_seed(0), share=0.0), clean)
    some = resave(clean.clone(), torch.Generator().manual_seed(0), share=0.5)
    assert 5 < int((some != clean).flatten(1).any(1).sum()) < 35


def test_the_loss_of_an_image_is_balanced_among_its_candidates(sources: list[Source]) -> None:
    generator = torch.Generator().manual_seed(1)
    tiny, rows = sources[0], torch.tensor([3, 9])
    seen = torch.unique(torch.cat([s.labels for s in sources[:2]]))
    logits, frequency = torch.randn(2, CONCEPTS, generator=generator), frequencies(sources)
    assert frequency.sum() == pytest.approx(1)
    assert frequency[281] == pytest.approx(0.5 * (tiny.labels == 281).float().mean().item() / 1.0)
    recipe = Recipe(smoothing=0.0, soft_weight=0.0)
    expected = 0.0
    for logit, row in zip(logits, rows, strict=True):
        allowed = candidates("tiny-imagenet", seen)
        weights = frequency[allowed] * logit[allowed].exp()
        own = tiny.labels[row]
        expected -= float((frequency[own] * logit[own].exp() / weights.sum()).log())
    assert image_loss(logits, tiny, rows, seen, frequency, recipe).item() == pytest.approx(expected, rel=1e-5)


def test_words_of_a_step_share_no_concept_and_leave_the_other_classes() -> None:
    rows, members = word_members()
    names = list(imagenet_names())
    dog = torch.zeros(CONCEPTS)
    for name in read_lexicon()["dog"]:
        dog[CIFAR_START + 5 if name == "dog" else names.index(name)] = 1
    assert torch.equal(members[rows["dog"]], dog)
    assert rows["puppy"] == rows["dog"] != rows["cat"]
    seen = torch.tensor([TENCH, CHURCH, names.index("Chihuahua"), names.index("golf ball")])
    labels = draw_labels(members, seen, 24, torch.Generator().manual_seed(0))
    assert labels.sum(0).max() == 1
    assert (labels.sum(0)[seen] == 1).all()
    assert 20 < len(labels) <= 28
    assert not torch.equal(labels, draw_labels(members, seen, 24, torch.Generator().manual_seed(1)))


def test_the_loss_of_words_equals_a_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 8, generator=generator)
    prototypes = torch.nn.functional.normalize(torch.randn(CONCEPTS, 8, generator=generator), dim=-1)
    frequency = torch.rand(CONCEPTS, generator=generator)
    sets = [[1, 2], [7], [10, 11, 12]]
    labels = torch.zeros(3, CONCEPTS)
    for row, members in enumerate(sets):
        labels[row, members] = 1
    concepts = torch.tensor([2, 500, 11, 7, 1])  # no label covers 500
    expected = 0.0
    for token, concept in zip(tokens, concepts.tolist(), strict=True):
        if concept == 500:
            continue
        logits = []
        for members in sets:
            mean = prototypes[members].mean(0)
            logits.append(float(token @ (mean / mean.norm())) + math.log(sum(float(frequency[m]) for m in members)))
        own = next(number for number, members in enumerate(sets) if concept in members)
        expected -= logits[own] - math.log(sum(math.exp(value) for value in logits))
    assert word_loss(tokens, prototypes, concepts, labels, frequency).item() == pytest.approx(expected, rel=1e-4)


def test_the_mixed_check_sees_photographs_drift(sources: list[Source], sharp: Sharp) -> None:
    class Stage(torch.nn.Module):
        """Calls everything a church."""

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.full((len(pixels),), CHURCH), CONCEPTS).float()

    assert mixed_check(Stage(), sources, sharp, 32) == {"tiny": 0.0, "sharp": 0.5, "drift": 1.0, "score": -0.25}


@pytest.mark.slow
def test_the_best_late_checkpoint_is_kept(
    sources: list[Source], sharp: Sharp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([9.0, 9.0, 0.7, 0.1])  # the first two are too early to count
    monkeypatch.setattr(train_embedded, "mixed_check", lambda *_: {"score": next(scores)})
    recipe = replace(RECIPE, steps=10)
    stage = train_images(recipe, sources, sharp, tmp_path, save_every=3)
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    assert kept["step"] == 9
    assert torch.equal(stage.prototypes, kept["stage"]["prototypes"])


def test_the_cut_vocabulary_reads_its_texts_like_the_full_one(tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    texts = [*imagenet_names(), *read_lexicon(), *(t.format("seven") for t in prompt_templates("openai"))]
    path = tmp_path / "bpe.txt.gz"
    size = write_bpe(texts, path, common=100)
    full, cut = SimpleTokenizer(), SimpleTokenizer(bpe_path=str(path))
    assert size == cut.vocab_size < 8000
    for text in texts:
        assert [cut.decoder[i] for i in cut.encode(text)] == [full.decoder[i] for i in full.encode(text)], text


def test_texts_aim_at_their_prototype_or_their_word() -> None:
    prototypes = torch.randn(CONCEPTS, 16, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(prototypes, dim=-1)
    words = vocabulary(prototypes, list(imagenet_names()), {281}, {"puppy": unit[3]})

    def target(word: str) -> torch.Tensor:
        return words.targets[words.target[words.words.index(word)]]

    assert torch.allclose(target("tabby cat"), unit[281])
    assert torch.allclose(target("a handwritten seven"), unit[DIGIT_START + 7])
    assert torch.equal(target("puppy"), unit[3])
    assert words.frequent[words.words.index("tabby cat")]
    assert words.frequent[words.words.index("puppy")]
    assert not words.frequent[words.words.index("tiger cat")]


def test_a_fitted_word_wins_where_the_mean_of_its_classes_fell() -> None:
    """Concepts 0 and 1 are "dog", 2 is "church". Images of 1 are nearer to 2 than to the mean of 0 and 1."""
    axes = torch.eye(8)
    generator = torch.Generator().manual_seed(0)
    prototypes = axes[:3].repeat(CONCEPTS, 1)[:CONCEPTS]
    members = torch.zeros(1, CONCEPTS)
    members[0, :2] = 1
    concepts = torch.arange(3).repeat_interleave(200)
    means = torch.stack([axes[0] + axes[3], 0.6 * axes[1] + 0.55 * axes[2] + 0.5 * axes[3], axes[2]])
    tokens = means[concepts] + 0.05 * torch.randn(600, 8, generator=generator)
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    frequency = torch.bincount(concepts, minlength=CONCEPTS) / len(concepts)

    def fitted(steps: int) -> torch.Tensor:
        return fit_words(tokens, concepts, prototypes, members, frequency, scale=16.0, seed=0, steps=steps, lr=0.02)[0]

    def wins(direction: torch.Tensor) -> float:
        return (tokens[200:400] @ direction > tokens[200:400] @ axes[2]).float().mean().item()

    mean = torch.nn.functional.normalize(prototypes[0] + prototypes[1], dim=0)
    assert torch.allclose(fitted(0), mean, atol=1e-6)
    assert wins(mean) < 0.05
    assert wins(fitted(300)) > 0.25
    assert (tokens[400:] @ fitted(300) < tokens[400:] @ axes[2]).all()
    assert torch.equal(fitted(20), fitted(20))


def test_refined_prototypes_tell_sharp_images_apart_and_keep_what_they_share() -> None:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=-1)
    concepts = torch.tensor([2, 4]).repeat_interleave(200)
    sharpness = torch.eye(8)[7]
    off = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    tokens = prototypes[concepts] + 0.9 * off * (concepts == 2)[:, None] + sharpness
    tokens = torch.nn.functional.normalize(tokens + 0.2 * torch.randn(400, 8, generator=generator), dim=-1)

    def right(found: torch.Tensor) -> float:
        return (tokens @ found[[2, 4]].T).argmax(1).eq((concepts == 4).long()).float().mean().item()

    found = refine(prototypes, tokens, concepts, scale=16.0, seed=0)
    assert right(found) > right(prototypes)
    others = [0, 1, 3, 5]
    assert torch.equal(found[others], prototypes[others])
    assert ((found - prototypes)[[2, 4]].mean(0) @ sharpness).abs() < 0.02


def test_a_word_of_unknown_classes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.teachers.training.words.read_lexicon", lambda: {"cat": ("tabby cat", "moggy")})
    with pytest.raises(ValueError, match="'cat' names unknown classes \\['moggy'\\]"):
        word_members()


def test_patches_equal_a_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    for height, width, stride in ((2, 2, 1), (3, 4, 1), (3, 4, 2), (5, 2, 2), (1, 1, 2)):
        convolution = torch.nn.Conv2d(8, 5, 3, stride, 1, bias=False).double()
        pixels = torch.randn(2, 8, height, width, dtype=torch.double, generator=generator, requires_grad=True)
        expected = convolution(pixels)
        direction = torch.randn(expected.shape, dtype=torch.double, generator=generator)
        gradients = torch.autograd.grad(expected, (pixels, convolution.weight), direction)
        use_patches(torch.nn.Sequential(convolution))
        assert isinstance(convolution, PatchConv)
        torch.testing.assert_close(convolution(pixels), expected)
        torch.testing.assert_close(
            torch.autograd.grad(convolution(pixels), (pixels, convolution.weight), direction), gradients
        )


def test_a_line_of_the_lexicon_without_classes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("# remark\n\ncat, kitten: tabby cat\ndog\n")
    with pytest.raises(ValueError, match="'dog'"):
        read_lexicon(path)


@pytest.mark.slow
def test_calibration_finds_the_scale_that_made_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(20_000, 10, generator=generator) * 2 - 1
    labels = torch.multinomial(torch.softmax(6.0 * cosines, dim=1), 1, generator=generator).squeeze(1)
    assert calibrate(cosines, labels) == pytest.approx(6.0, rel=0.05)


@pytest.mark.slow
def test_the_exported_folder_is_a_teacher(sources: list[Source], sharp: Sharp, tmp_path: Path) -> None:
    stage = train_images(RECIPE, sources, sharp, tmp_path, save_every=10)
    measured = export(
        stage.visual,
        stage.prototypes,
        word_directions(stage, torch.nn.functional.normalize(stage.prototypes.detach(), dim=-1), sources, RECIPE),
        sources,
        tmp_path,
        tower=RECIPE.tower,
        image_size=32,
        text_steps=3,
        seed=0,
    )
    teacher = load_folder(tmp_path, name="fresh")
    assert teacher.dim == 32
    assert teacher.image_size == 32
    assert teacher.logit_scale == pytest.approx(measured["logit_scale"], rel=2e-3)  # float16 in the file
    assert teacher.default_labels is not None
    assert teacher.default_labels[:3] == tuple(imagenet_names()[i] for i in (TENCH, 1, 25))
    assert len(teacher.default_labels) == 5 + 20
    assert len(set(teacher.default_labels)) == len(teacher.default_labels)
    tokens = teacher.encode_image(torch.randn(64, 3, 32, 32))
    assert tokens.shape == (64, 32)
    assert torch.isfinite(teacher.encode_text(["a photo of a cat.", "quite unknown words"])).all()
