"""The mode of a field as the student's token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from apm import Classifier, StudentOptions
from apm.benchmarks.methods import create_method
from apm.benchmarks.methods.base import MethodOptions
from apm.errors import UsageError
from apm.student.position import grid_locations
from apm.test_time.readings import mode_of
from apm.text.zeroshot import ZeroShotHead
from tests.fakes import FakeTeacher

LABELS = ["cat", "dog", "hen"]
STUDENT = StudentOptions(
    preset="small", steps=4, lr=1e-3, distil="grid", grid_views=3, readout="mode", precision="fp32"
)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 52, 3), dtype=np.uint8))


def target(classifier: Classifier, image: Image.Image) -> torch.Tensor:
    teacher = classifier.teacher
    return teacher.encode_image(teacher.preprocess(image)[None])[0]


def test_the_mode_is_where_most_places_agree_and_not_their_mean() -> None:
    head = ZeroShotHead.build(FakeTeacher(), LABELS, ("{}",))
    generator = torch.Generator().manual_seed(0)
    many, few = (2 * torch.nn.functional.normalize(torch.randn(16, generator=generator), dim=0) for _ in range(2))
    field = torch.cat((many.expand(70, -1), few.expand(30, -1))) + 0.02 * torch.randn(100, 16, generator=generator)
    mode, mean = mode_of(field, head), field.mean(dim=0)
    assert torch.cosine_similarity(mode, many, dim=0) > 0.995 > torch.cosine_similarity(mean, many, dim=0)
    assert mode.norm() == pytest.approx(mean.norm().item(), rel=1e-5)
    assert torch.allclose(mode_of(field.flip(0), head), mode, atol=1e-5)  # places have no order


def test_the_answer_is_read_from_the_mode_and_depends_on_no_batch() -> None:
    classifier = Classifier(FakeTeacher(), labels=LABELS, student=STUDENT, device="cpu", batch_size=2)
    kept = [classifier.classify_with_field(picture(seed)) for seed in range(3)]
    for seed, one in enumerate(kept):
        field = one.result.features(*grid_locations(16))[0]
        assert torch.equal(one.result.tokens[0], mode_of(field, classifier.head))
        cosine = torch.cosine_similarity(one.result.tokens[0], target(classifier, picture(seed)), dim=0).item()
        assert one.result.final_cosines[0].item() == pytest.approx(cosine, abs=1e-5)
        assert one.answer.top[0].probability == pytest.approx(
            classifier.head.probabilities(one.result.tokens)[0].max().item(), rel=1e-6
        )
    answers = list(classifier._answer([classifier._prepare_any(picture(seed)) for seed in range(3)]))
    assert [answer.top for answer in answers] == [one.answer.top for one in kept]
    mean = Classifier(FakeTeacher(), labels=LABELS, student=replace(STUDENT, readout="mean"), device="cpu")
    assert mean(picture(0)).top != answers[0].top
    assert not torch.equal(mean.classify_with_field(picture(0)).result.tokens, kept[0].result.tokens)


def test_as_a_method_of_a_run() -> None:
    method = create_method("apm:distil=both,grid_views=16,readout=mode", MethodOptions())
    assert method.name == "apm[both,grid_views=16,readout=mode]"
    assert method.settings["readout"] == "mode"
    with pytest.raises(UsageError, match="do not record steps"):
        create_method("apm:distil=both,readout=mode", MethodOptions(record_steps=True))
