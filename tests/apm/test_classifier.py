"""`apm.Classifier`: order, errors in their places, independence of images, and what it refuses."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import apm
from apm import classifier as module
from apm.errors import ImageError, TeacherError, UsageError
from apm.images.load import load_image
from apm.settings import settings_of
from apm.student.field import resample
from apm.student.position import grid_locations
from apm.test_time.options import StudentOptions
from apm.test_time.queries import FEWER, locations_a_step
from apm.test_time.targets import TARGETS, aggregate
from apm.test_time.views import pixels_id, views
from tests.fakes import FakeTeacher

pytestmark = pytest.mark.usefixtures("narrow_students")

LABELS = ("cat", "dog", "bird", "house", "tree", "car")


def build(**options: object) -> apm.Classifier:
    student = {"preset": "small", "steps": 3, "precision": "fp32"}
    student |= {name: options.pop(name) for name in set(options) & set(settings_of(StudentOptions))}
    settings = {"teacher": FakeTeacher(), "labels": LABELS, "device": "cpu", **options}
    return apm.Classifier(student=StudentOptions(**student), **settings)  # type: ignore[arg-type]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """Return seven different small images."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(7)]
    for path in paths:
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 32), Image.Resampling.BICUBIC).save(path)
    return paths


def same(one: apm.Answer, other: apm.Answer) -> bool:
    """Compare bit by bit, but for probabilities: their product's last bit depends on where the text features lie."""
    assert one.adaptation is not None and other.adaptation is not None
    assert one.path == other.path
    for mine, theirs in zip(one.top + one.teacher_top, other.top + other.teacher_top, strict=True):
        assert mine.label == theirs.label
        assert mine.probability == pytest.approx(theirs.probability, abs=1e-6)
    return (
        one.adaptation.losses == other.adaptation.losses
        and one.adaptation.last_loss == other.adaptation.last_loss
        and one.adaptation.cosine == other.adaptation.cosine
    )


def test_answer_holds_both_rankings_and_the_record(picture: Path) -> None:
    answer = build(top_k=4)(picture)
    for ranking in (answer.top, answer.teacher_top):
        assert len(ranking) == 4
        assert [one.probability for one in ranking] == sorted((one.probability for one in ranking), reverse=True)
        assert {one.label for one in ranking} <= set(LABELS)
    assert answer.path == picture and answer.error is None and answer.notes == ()
    assert answer.agree == (answer.top[0].label == answer.teacher_top[0].label)
    record = answer.adaptation
    assert record is not None
    assert (record.steps, len(record.losses), len(record.cosines)) == (3, 3, 3)
    assert record.first_loss == record.losses[0] and record.last_loss < record.losses[-1]
    assert record.precision == "fp32" and record.seconds > 0


@pytest.mark.parametrize("mode", ["exif", "I;16", "LA"])
def test_pixels_are_read_as_the_file_is(pictures: list[Path], mode: str, tmp_path: Path) -> None:
    path, exif, picture = tmp_path / "same.png", Image.Exif(), Image.open(pictures[0])
    exif[0x0112] = 6
    if mode == "exif":
        picture.save(path, exif=exif)
    elif mode == "I;16":
        Image.fromarray(np.asarray(picture.convert("L"), dtype=np.uint16) * 257).save(path)
    else:
        picture.putalpha(picture.convert("L"))
        picture.convert("LA").save(path)
    classifier = build()
    from_file, pixels = classifier(path), classifier(Image.open(path))
    assert from_file.adaptation is not None and pixels.adaptation is not None
    assert from_file.adaptation.losses == pixels.adaptation.losses
    assert from_file.notes == pixels.notes
    with pytest.raises(ImageError, match="image: 1×1 pixels"):
        classifier(Image.new("RGB", (1, 1)))


def test_the_teachers_ranking_is_its_zero_shot_answer(picture: Path) -> None:
    teacher = FakeTeacher()
    answer = build(teacher=teacher, top_k=len(LABELS))(picture)
    token = teacher.encode_image(teacher.preprocess(load_image(picture).image)[None])
    texts = torch.nn.functional.normalize(teacher.encode_text([f"a photo of a {label}." for label in LABELS]), dim=-1)
    cosines = torch.nn.functional.normalize(token, dim=-1) @ texts.T
    expected = (cosines * teacher.logit_scale).softmax(-1)[0]
    got = {one.label: one.probability for one in answer.teacher_top}
    torch.testing.assert_close(torch.tensor([got[label] for label in LABELS]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_enough_steps_make_the_student_answer_as_its_teacher(picture: Path) -> None:
    answer = build(steps=120, lr=1e-3)(picture)
    assert answer.agree and answer.adaptation is not None and answer.adaptation.cosine > 0.999
    assert answer.top[0].probability == pytest.approx(answer.teacher_top[0].probability, abs=0.02)


def test_a_pil_image_is_the_same_as_its_file(pictures: list[Path]) -> None:
    classifier = build()
    from_file, from_pixels = classifier(pictures[0]), classifier(Image.open(pictures[0]))
    assert from_pixels.path is None and from_pixels.top == from_file.top


def test_answers_do_not_depend_on_batch_or_order(pictures: list[Path]) -> None:
    alone = {path: build()(path) for path in pictures}
    for size, order in ((7, pictures), (3, pictures[::-1]), (1, pictures[::-1])):
        answers = list(build(batch_size=size).classify(order))
        assert [answer.path for answer in answers] == order
        assert all(same(answer, alone[answer.path]) for answer in answers if answer.path is not None)


def test_failed_files_stay_in_their_places_and_touch_no_other(pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    missing, text = tmp_path / "missing.png", tmp_path / "text.jpg"
    order = [missing, pictures[0], text, text, pictures[1], pictures[2], missing]
    classifier = build(batch_size=2)
    answers = list(classifier.classify(order))
    assert [answer.path for answer in answers] == order
    assert [answer.error is None for answer in answers] == [False, True, False, False, True, True, False]
    for answer in answers:
        if answer.path is not None and answer.error is None:
            assert same(answer, classifier(answer.path))
        else:
            assert answer.error.startswith(f"{answer.path}: ")
            assert (answer.top, answer.teacher_top, answer.agree, answer.adaptation) == ((), (), None, None)


def test_one_bad_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        build()(tmp_path / "nothing.png")


def test_reading_ahead_is_bounded(pictures: list[Path]) -> None:
    taken = itertools.count()
    last = 0

    def endless() -> Iterator[Path]:
        nonlocal last
        for path in itertools.cycle(pictures):
            last = next(taken)
            yield path

    answers = build(batch_size=2, steps=1).classify(endless())
    for _ in range(4):
        next(answers)
    assert last < 4 + 2 * 2 + module.DECODERS + 2
    answers.close()
    deadline = time.monotonic() + 30
    while any(thread.name.startswith("decode") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "decoding threads outlive the answers"
        time.sleep(0.01)


def test_a_loss_that_is_not_finite_is_said(pictures: list[Path]) -> None:
    teacher = FakeTeacher()
    healthy = build(teacher=teacher)(pictures[1])
    encode = teacher.encode_image

    def broken_for_the_first(pixels: torch.Tensor) -> torch.Tensor:
        tokens = encode(pixels)
        if torch.equal(pixels[0], first):
            tokens = tokens.clone()
            tokens[0, 0] = torch.nan
        return tokens

    first = teacher.preprocess(load_image(pictures[0]).image)
    teacher.encode_image = broken_for_the_first  # type: ignore[method-assign]
    bad, good = build(teacher=teacher, batch_size=2).classify(pictures[:2])
    assert bad.error is not None and "not finite" in bad.error and bad.error.startswith(str(pictures[0]))
    assert bad.top == () and bad.agree is None
    assert same(good, healthy)


def test_divergence_is_said(picture: Path) -> None:
    answer = next(build(lr=1e30, steps=5).classify([picture]))
    assert answer.error is not None and "the loss is not finite" in answer.error and "1e+30" in answer.error
    assert answer.top == ()


def test_notes_reach_the_answer(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 200, 30, 90)).save(tmp_path / "a.png")
    assert build()(tmp_path / "a.png").notes == ("transparent parts are shown on white",)


def test_default_labels_are_the_teachers_else_imagenets() -> None:
    own = build(teacher=FakeTeacher(default_labels=("left", "right")), labels=None)
    assert own.head.labels == ("left", "right") and own.label_source == "teacher"
    imagenet = build(labels=None)
    assert len(imagenet.head.labels) == 1000 and imagenet.label_source == "imagenet"
    assert len(build(labels=None, label_set="digits").head.labels) == 10


def test_default_prompts_are_the_teachers_else_single() -> None:
    own = build(teacher=FakeTeacher(default_templates=("{} here", "{} there")))
    assert own.head.templates == ("{} here", "{} there") and own.prompt_source == "teacher"
    assert build().head.templates == ("a photo of a {}.",)
    assert len(build(prompts="simple").head.templates) == 7
    assert build(templates=["a sketch of {}"]).head.templates == ("a sketch of {}",)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": LABELS, "label_set": "imagenet"}, "label_set"),
        ({"labels": ["cat"]}, "only one name"),
        ({"labels": ["cat", "Cat"]}, "more than once"),
        ({"labels": []}, "no name"),
        ({"labels": None, "label_set": "imagnet"}, 'Did you mean "imagenet"'),
        ({"prompts": "sinple"}, '"single"'),
        ({"prompts": "single", "templates": ["a {}"]}, "templates"),
        ({"templates": ["a photo"]}, "{}"),
        ({"preset": "papr"}, 'Did you mean "paper"'),
        ({"readout": "querry"}, 'Did you mean "query"'),
        ({"precision": "fp23"}, 'Did you mean "fp32"'),
        ({"steps": 0}, "untrained student"),
        ({"lr": -1.0}, "-1.0"),
        ({"device": "cdua"}, 'Did you mean "cuda"'),
        ({"top_k": 0}, "top_k is 0"),
        ({"batch_size": -3}, "batch_size is -3"),
        ({"max_pixels": 0}, "max_pixels is 0"),
    ],
)
def test_wrong_settings_are_refused_before_the_teacher_is_loaded(
    options: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    with pytest.raises(UsageError) as caught:
        build(teacher="embedded", **options)
    assert words in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        build(device="cuda")
    assert build(device="auto").device.type == "cpu"


def test_public_names_are_loaded_on_first_use() -> None:
    for name in apm.__all__:
        assert getattr(apm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Clasifier'"):
        _ = apm.Clasifier  # type: ignore[attr-defined]
    assert set(apm.__all__) <= set(dir(apm))


@pytest.mark.slow
@pytest.mark.parametrize("distil", ["grid", "both"])
def test_distilling_the_grid_does_not_depend_on_batch_or_order(pictures: list[Path], distil: str) -> None:
    options = {"distil": distil, "rgb_weight": 0.1}
    alone = {path: build(**options)(path) for path in pictures[:4]}
    records = [one(pictures[0]).adaptation for one in (build(**options), build())]
    assert records[0] is not None and records[1] is not None and records[0].losses != records[1].losses
    for size, order in ((4, pictures[:4]), (3, pictures[3::-1])):
        answers = list(build(batch_size=size, **options).classify(order))
        assert all(same(answer, alone[answer.path]) for answer in answers if answer.path is not None)


def test_the_grid_alone_is_read_by_its_mean() -> None:
    assert build(distil="grid").student_config.readout == "mean"
    assert build(distil="both").student_config.readout == "query"
    assert build(distil="both", readout="mean").student_config.readout == "mean"
    with pytest.raises(UsageError, match='choose readout="mean"'):
        build(distil="grid", readout="query")


def test_a_teacher_without_a_grid_is_refused_before_any_image() -> None:
    class TokenTeacher(FakeTeacher):
        encode_grid = property()  # type: ignore[assignment]

    class WideTeacher(FakeTeacher):
        def encode_grid(self, image: Image.Image, *, size: int | None = None) -> torch.Tensor:
            return torch.zeros(2, 2, self.dim + 1)

    with pytest.raises(TeacherError, match='"fake" has no grid'):
        build(teacher=TokenTeacher(), distil="both")
    with pytest.raises(TeacherError, match=r"is \(2, 2, 17\); \(h, w, 16\) was expected"):
        build(teacher=WideTeacher(), distil="both")
    assert build(teacher=TokenTeacher()).adapt_config.distil == "cls"


@pytest.mark.parametrize("distil", ["cls", "grid", "both"])
def test_what_is_perceived_is_what_the_answer_was_read_from(pictures: list[Path], distil: str) -> None:
    teacher = FakeTeacher()
    classifier = build(teacher=teacher, distil=distil)
    answer = classifier(pictures[0])
    calls = teacher.grid_calls
    perceived = classifier.classify_with_field(pictures[0], snapshots=(0, 3))
    assert teacher.grid_calls == calls + 1
    assert same(perceived.answer, answer) and perceived.answer.top == answer.top
    assert perceived.image.size == (40, 32)
    assert perceived.grid is not None and torch.equal(perceived.grid, teacher.encode_grid(perceived.image))
    assert torch.equal(perceived.token, teacher.encode_image(teacher.preprocess(perceived.image)[None])[0])
    probabilities = classifier.head.probabilities(perceived.result.tokens)[0]
    assert float(probabilities.max()) == pytest.approx(answer.top[0].probability, abs=1e-6)
    cells = classifier.student_config.grid
    field = perceived.result.features(*grid_locations(cells))
    torch.testing.assert_close(field, perceived.result.fields[3], rtol=1e-4, atol=1e-5)
    if distil != "cls":
        wanted = resample(perceived.grid, cells)
        before, after = ((perceived.result.fields[k][0] - wanted).square().mean() for k in (0, 3))
        assert after < before
    if distil != "grid":
        attention = perceived.result.attention(*grid_locations(cells))
        assert attention.shape == (1, classifier.student_config.heads, cells**2)
        torch.testing.assert_close(attention.sum(dim=2), torch.ones(attention.shape[:2]))
    assert classifier.classify_with_field(Image.open(pictures[0]), grid_size=64).grid.shape == (8, 8, 16)  # type: ignore[union-attr]


def test_a_teacher_without_a_grid_is_perceived_without_one(picture: Path, tmp_path: Path) -> None:
    class TokenTeacher(FakeTeacher):
        def encode_grid(self, image: Image.Image, *, size: int | None = None) -> torch.Tensor:
            raise TeacherError("no grid")

    classifier = build(teacher=TokenTeacher())
    assert classifier.classify_with_field(picture).grid is None
    with pytest.raises(TeacherError, match="no grid"):
        classifier.classify_with_field(picture, grid_size=32)
    with pytest.raises(ImageError, match="no such file"):
        classifier.classify_with_field(tmp_path / "nothing.png")


@pytest.mark.parametrize("target", ["mean", "mta"])
def test_a_target_of_views_is_that_of_bench(pictures: list[Path], target: str) -> None:
    """The token is fitted to what `apm bench` aggregates, whatever the batch, the order and the place of the file."""
    teacher = FakeTeacher()
    image = load_image(pictures[0]).image
    classifier = build(teacher=teacher, target=target, seed=3)
    policy = TARGETS[target]
    tokens = [
        teacher.encode_image(one[None])[0]
        for one in views(image, policy.views, teacher, seed=3, sample_id=pixels_id(image), min_area=policy.min_area)
    ]
    wanted = aggregate(target, torch.stack(tokens), classifier.head)
    result = classifier.classify_with_field(pictures[0]).result
    expected = torch.cosine_similarity(result.tokens[0], wanted, dim=0)
    torch.testing.assert_close(result.final_cosines[0], expected, rtol=0, atol=1e-5)
    own = teacher.encode_image(teacher.preprocess(image)[None])[0]
    assert torch.equal(classifier.classify_with_field(pictures[0]).token, own) and not torch.allclose(
        own, wanted, atol=1e-3
    )
    alone = {path: build(target=target)(path) for path in pictures[:3]}
    answers = list(build(target=target, batch_size=3).classify(pictures[2::-1]))
    assert all(same(answer, alone[answer.path]) for answer in answers if answer.path is not None)


def test_agreement_is_that_of_the_first_labels(picture: Path) -> None:
    answers = [build(steps=1, seed=seed)(picture) for seed in range(6)]
    agreed = [answer.top[0].label == answer.teacher_top[0].label for answer in answers]
    assert [answer.agree for answer in answers] == agreed and not all(agreed)


def test_a_target_of_one_view_is_the_images_own_token(pictures: list[Path]) -> None:
    own, *others = (
        build(**settings)(pictures[0]) for settings in ({}, *({"target": t, "views": 1} for t in ("mean", "mta")))
    )
    assert own.adaptation is not None
    for answer in others:
        assert answer.adaptation is not None
        assert answer.adaptation.last_loss == pytest.approx(own.adaptation.last_loss, rel=1e-3)
        assert answer.top[0].label == own.top[0].label


def test_auto_reads_fewer_locations_where_that_was_measured() -> None:
    assert build().adapt_config.queries is None  # the small student: no number was found that changes no answer
    paper = StudentOptions(preset="paper")
    assert paper.training(torch.device("cpu")).queries == FEWER["paper"] < paper.model(8).cells
    options: dict[str, Any]
    for options in (
        {"queries": "all"},
        {"distil": "both"},
        {"distil": "grid"},
        {"rgb_weight": 0.1},
        {"loss": "soft"},
        {"agree": 0.1},
        {"readout": "mean"},
    ):
        assert replace(paper, **options).training(torch.device("cpu")).queries is None
    assert build(queries=5).adapt_config.queries == 5
    cuda = torch.device("cuda")
    common = {"preset": "paper", "readout": "query", "distil": "cls", "loss": "mse", "rgb_weight": 0.0, "agree": 0.0}
    assert locations_a_step("auto", device=cuda, **common) is None
    assert locations_a_step("auto", device=torch.device("cpu"), **common) == FEWER["paper"]
    with pytest.raises(UsageError, match='queries is "few"'):
        build(queries="few")


def test_unsure_is_below_the_bound(picture: Path) -> None:
    probability = build()(picture).top[0].probability
    assert not build(min_probability=probability - 0.01)(picture).unsure
    assert build(min_probability=(probability + 1) / 2)(picture).unsure
