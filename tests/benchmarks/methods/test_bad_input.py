"""What every method makes of broken features and odd sizes: a defined answer, and nothing of it stays behind."""

from __future__ import annotations

import functools
import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.benchmarks.methods import REGISTRY, Batch, MethodOptions, create_method
from apm.benchmarks.methods.dota import ClassGaussians, DOTASettings
from apm.errors import UsageError
from apm.test_time.options import StudentOptions
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.methods.made import HEADS, OpenTeacher, full_spec, make_batch, pictures

pytestmark = pytest.mark.usefixtures("narrow_students")

DIM = 16
TOKEN_ONLY = (
    "zero-shot",
    "tda",
    "onzeta",
    "ecalp",
    "oga",
    "coop",
    "cocoop",
    "apm",
    "glom-ttt",
    "ttl",
    "tent",
    "clipartt",
    "watt",
)  # these take no features of views: they see the image itself alone, or encode the views anew
OTHERS = [0, 1, 3, 4, 5]  # than the broken image
SMALL = MethodOptions(student=StudentOptions(preset="small", steps=2, precision="fp32"), views=4)


def spec(name: str) -> str:
    """A method with what it cannot do without, and few rounds where many would be the same again."""
    return {"watt": "watt:rounds=1", "glom-ttt": "glom-ttt:settling=2"}.get(name) or full_spec(name, neighbours=2)


open_teacher = functools.cache(OpenTeacher)


@pytest.fixture(autouse=True)
def _second_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.benchmarks.methods.rlcf.load_teacher", lambda name, device: open_teacher())


class GivenFeatures(Batch):
    """A batch whose teacher's features are given: (B, V, D)."""

    def __init__(self, features: Tensor, classes: int = 7, *, stream_length: int = 6) -> None:
        generator = torch.Generator().manual_seed(3)
        text = normalize(torch.randn(classes, DIM, generator=generator), dim=1)
        names = tuple(f"class {index}" for index in range(classes))
        head = ZeroShotHead(labels=names, features=text, logit_scale=20.0, templates=("a photo of a {}.",))
        ids = [f"image {index}" for index in range(len(features))]
        super().__init__(ids, pictures(len(features)), open_teacher(), head, stream_length=stream_length)
        self.features = features

    def tokens(self) -> Tensor:
        return self.features[:, 0]

    def views(self, count: int, *, min_area: float = 0.08) -> Tensor:
        return self.features[:, :count]


def features(images: int = 6, views: int = 4) -> Tensor:
    common = torch.randn(images, 1, DIM, generator=torch.Generator().manual_seed(1))
    return common + 0.3 * torch.randn(images, views, DIM, generator=torch.Generator().manual_seed(2))


def unread(name: str, where: str) -> bool:
    """Whether a method takes no notice of a feature; one with a head of its own does not ask the teacher at all."""
    return (where == "view" and name in TOKEN_ONLY) or name in HEADS


@pytest.mark.parametrize(
    ("name", "value", "where"),
    [
        (name, value, where)
        for name in REGISTRY
        for where in ("image", "view")
        for value in (math.nan, math.inf, 0.0)[: 1 if unread(name, where) else 3]
    ],
)
def test_a_broken_feature_harms_its_own_image_only(name: str, value: float, where: str) -> None:
    broken = features()
    broken[2, 0 if where == "image" else 3] = value
    answer = create_method(spec(name), SMALL).predict(GivenFeatures(broken)).logits
    if unread(name, where):
        assert torch.equal(answer, _sound_answer(name, alone=False))
        return
    torch.testing.assert_close(answer[OTHERS], _sound_answer(name, alone=True), rtol=1e-4, atol=1e-4)
    assert answer[2].isfinite().all() or answer[2].isnan().all()  # a row of NaN is recorded as a failure
    if where == "image" and value != 0:
        assert answer[2].isnan().all()


@functools.cache
def _sound_answer(name: str, *, alone: bool) -> Tensor:
    """A method's answer where nothing is broken: to all images, or to the others alone."""
    batch = _without(OTHERS) if alone else GivenFeatures(features())
    return create_method(spec(name), SMALL).predict(batch).logits


def _without(others: list[int]) -> GivenFeatures:
    """A batch of the other images, by the names and pixels that they have among all."""
    batch = GivenFeatures(features())
    batch._images = tuple(batch.images[index] for index in others)
    batch._keys = tuple(batch._keys[index] for index in others)
    batch.features = batch.features[others]
    return batch


@pytest.mark.parametrize("name", [*REGISTRY])
@pytest.mark.parametrize(("images", "views", "classes"), [(3, 4, 1), (3, 1, 7), (1, 4, 7), (3, 4, 2)], ids=str)
def test_small_sizes_are_answered(name: str, images: int, views: int, classes: int) -> None:
    batch = GivenFeatures(features(images, views), classes, stream_length=images)
    options = MethodOptions(student=StudentOptions(preset="small", steps=2, precision="fp32"), views=views)
    refusals = {
        ("rtpt", 1, 7): "of 1 views",
        ("rlcf", 4, 1): "at least two labels",
        ("watt", 4, 1): "two labels",
    }
    if message := refusals.get((name, views, classes)):
        with pytest.raises(UsageError, match=message):
            create_method(spec(name), options).predict(batch)
        return
    answer = create_method(spec(name), options).predict(batch).check(name, batch)
    assert answer.logits.isfinite().all()


# They encode and tune prompts by the same code as TPT, and take as long.
LIKE_TPT = ("ctpt", "rtpt", "rlcf", "dynaprompt", "coop", "cocoop", "tpt+coop", "tpt+cocoop", "watt")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "tpt")) for name in REGISTRY if name not in LIKE_TPT],
)
def test_ten_thousand_classes_are_answered_and_what_is_kept_is_bounded(name: str) -> None:
    classes, kept = 10_000, []
    for count in (2, classes):
        batch = GivenFeatures(features(3), count)
        method = create_method(spec(name), SMALL)
        assert method.predict(batch).check(name, batch).logits.isfinite().all()
        kept.append(_kept_numbers(method))
    # DOTA keeps D² numbers a class, TPT its names' token embeddings; the others a few times D.
    assert kept[1] - kept[0] <= (DIM if name == "dota" else 0) * classes * DIM + 30 * classes * DIM


def _kept_numbers(method: Any) -> int:
    """Numbers in the tensors that hang on a method, text features and all."""
    found: dict[int, int] = {}
    seen, queue = set(), [vars(method)]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, type | torch.nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // 4
        elif not callable(thing):
            queue.extend(gc.get_referents(thing))
    return sum(found.values())


def test_covariances_beyond_the_limit_are_refused_with_their_size() -> None:
    with pytest.raises(
        UsageError, match=r"DOTA needs 9\.8 GiB for the covariances of 10000 classes, but its limit is 4"
    ):
        ClassGaussians(torch.empty(10_000, 512), DOTASettings())


def test_onzeta_says_that_it_needs_the_streams_length() -> None:
    with pytest.raises(ValueError, match="stream's length in advance"):
        create_method("onzeta").predict(make_batch(2))
