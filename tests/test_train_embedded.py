"""The trainer of the embedded teacher, on sets of a few random images: resume, export, vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apm.labels import imagenet_names, prompt_templates
from apm.teachers import train_embedded
from apm.teachers.export_embedded import calibrate, export
from apm.teachers.muon import orthogonalise
from apm.teachers.openclip import load_folder
from apm.teachers.train_data import CIFAR_START, CONCEPTS, DIGIT_START, Source, augment
from apm.teachers.train_embedded import Recipe, candidates, draw, rate_at, size_at, train_images
from apm.teachers.train_text import read_lexicon, vocabulary, write_bpe

RECIPE = Recipe(tower="test_resnet", dim=32, steps=4, batch=24, sizes=((32, 0.5), (40, 0.5)))


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
        source("tiny-imagenet", torch.tensor([1, 25, 281]), 0.6),
        source("cifar10", torch.arange(CIFAR_START, DIGIT_START), 0.2),
        source("digits", torch.arange(DIGIT_START, CONCEPTS), 0.2),
    ]


def test_a_killed_run_ends_with_the_same_weights(
    sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = train_images(RECIPE, sources, whole, save_every=2).state_dict()

    save = train_embedded.save_atomically

    def save_and_die(state: dict, path: Path) -> None:
        save(state, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_embedded, "save_atomically", save_and_die)
        train_images(RECIPE, sources, killed, save_every=2)
    resumed = train_images(RECIPE, sources, killed, save_every=2).state_dict()
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


def test_the_cut_vocabulary_reads_its_texts_like_the_full_one(tmp_path: Path) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    texts = [*imagenet_names(), *read_lexicon(), *(t.format("seven") for t in prompt_templates("openai"))]
    path = tmp_path / "bpe.txt.gz"
    size = write_bpe(texts, path, common=100)
    full, cut = SimpleTokenizer(), SimpleTokenizer(bpe_path=str(path))
    assert size == cut.vocab_size < 8000
    for text in texts:
        assert [cut.decoder[i] for i in cut.encode(text)] == [full.decoder[i] for i in full.encode(text)], text


def test_words_of_the_lexicon_aim_at_the_mean_of_their_classes() -> None:
    prototypes = torch.randn(CONCEPTS, 16, generator=torch.Generator().manual_seed(0))
    names = list(imagenet_names())
    words = vocabulary(prototypes, names, seen={281})
    unit = torch.nn.functional.normalize(prototypes, dim=-1)

    def target(word: str) -> torch.Tensor:
        return words.targets[words.target[words.words.index(word)]]

    assert torch.allclose(target("tabby"), unit[281])
    assert torch.allclose(target("a handwritten seven"), unit[DIGIT_START + 7])
    dogs = torch.stack([unit[CIFAR_START + 5], *(unit[names.index(n)] for n in read_lexicon()["dog"] if n != "dog")])
    assert torch.allclose(target("puppy"), torch.nn.functional.normalize(dogs.mean(0), dim=0), atol=1e-6)
    assert words.frequent[words.words.index("tabby cat")]
    assert not words.frequent[words.words.index("tiger cat")]


def test_a_line_of_the_lexicon_without_classes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt"
    path.write_text("# remark\n\ncat, kitten: tabby cat\ndog\n")
    with pytest.raises(ValueError, match="'dog'"):
        read_lexicon(path)


def test_calibration_finds_the_scale_that_made_the_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(20_000, 10, generator=generator) * 2 - 1
    labels = torch.multinomial(torch.softmax(6.0 * cosines, dim=1), 1, generator=generator).squeeze(1)
    assert calibrate(cosines, labels) == pytest.approx(6.0, rel=0.05)


def test_the_exported_folder_is_a_teacher(sources: list[Source], tmp_path: Path) -> None:
    stage = train_images(RECIPE, sources, tmp_path, save_every=10)
    measured = export(
        stage.visual,
        stage.prototypes,
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
    assert teacher.default_labels[:3] == tuple(imagenet_names()[i] for i in (1, 25, 281))
    assert len(teacher.default_labels) == 3 + 20
    assert len(set(teacher.default_labels)) == len(teacher.default_labels)
    tokens = teacher.encode_image(torch.randn(64, 3, 32, 32))
    assert tokens.shape == (64, 32)
    assert torch.isfinite(teacher.encode_text(["a photo of a cat.", "quite unknown words"])).all()
