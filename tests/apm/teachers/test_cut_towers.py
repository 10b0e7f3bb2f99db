"""A teacher's tower cut between its layers: what it holds is what its own blocks give, and the way on is its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from apm.errors import TeacherError, UsageError
from apm.teachers.cut_towers import Layers, Shape
from apm.teachers.embedded import load_embedded
from apm.teachers.openclip import load_folder
from apm.teachers.timm import TimmGridTeacher
from tests.apm.teachers.tiny import write_folder
from tests.fakes import FakeTeacher


def tiny_timm(**options: Any) -> TimmGridTeacher:
    """A small random transformer of timm with register tokens, of 32 × 32 pixels."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit3", img_size=32, patch_size=8, reg_tokens=2, num_classes=0, **options)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return TimmGridTeacher(model, name="timm:tiny", device=torch.device("cpu"))


@pytest.fixture(params=["embedded", "open_clip", "timm"])
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "embedded":
        return load_embedded()
    if request.param == "timm":
        return tiny_timm()
    return load_folder(write_folder(tmp_path / "tiny", request.getfixturevalue("tiny")), name="tiny")


def blocks_of(teacher: Any) -> list[nn.Module]:
    visual = getattr(teacher.model, "visual", teacher.model)
    if hasattr(visual, "transformer"):
        return list(visual.transformer.resblocks)
    trunk = getattr(visual, "trunk", visual)
    return list(trunk.blocks) if hasattr(trunk, "blocks") else [getattr(trunk, f"layer{n}") for n in (1, 2, 3, 4)]


def test_layers_are_what_the_blocks_give_and_the_rest_is_the_teachers_own(teacher: Any) -> None:
    layers = Layers(teacher)
    pixels = torch.randn(2, 3, layers.image_size, layers.image_size, generator=torch.Generator().manual_seed(1))
    given: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *parts: given.append(parts[2])) for block in blocks_of(teacher)]
    with torch.no_grad():
        whole = teacher.encode_image(pixels) if hasattr(teacher, "encode_image") else teacher.model(pixels)
    for hook in hooks:
        hook.remove()
    assert layers.count == len(given) > 1 and layers.shapes[0] == Shape(0, layers.image_size, 3)
    for layer, expected in enumerate(given, 1):
        tokens, shape = layers.until(pixels, layer), layers.shapes[layer]
        assert tokens.shape == (2, shape.tokens, shape.width)
        expected = expected if expected.ndim == 3 else expected.permute(0, 2, 3, 1).flatten(1, 2)
        torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layers.finish(tokens, layer), whole, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layers.between(tokens, layer, layers.count), layers.until(pixels, layers.count))


def test_the_embedded_teachers_layers() -> None:
    shapes = Layers(load_embedded()).shapes
    assert [(one.prefix, one.side, one.width) for one in shapes[1:]] == [
        (0, 24, 64),
        (0, 12, 128),
        (0, 6, 256),
        (0, 3, 512),
    ]


def test_wrong_layers_are_told_in_one_line() -> None:
    layers = Layers(tiny_timm())
    last = layers.count
    layers.check(0, last)
    for first, behind, message in (
        (0, last + 1, f'The teacher "timm:tiny" has layers 1 to {last}; there is no {last + 1}.'),
        (-1, 1, "there is no -1"),
        (0, 0, "there is no 0"),
        (2, 2, "Layer 2 does not come after layer 2."),
        (2, 1, "Layer 1 does not come after layer 2."),
    ):
        with pytest.raises(UsageError) as error:
            layers.check(first, behind)
        assert message in str(error.value)


def test_towers_without_layers_are_refused() -> None:
    with pytest.raises(TeacherError, match=r'"fake" has no numbered layers: its image tower is a FakeTeach'):
        Layers(FakeTeacher())
    teacher = tiny_timm()
    teacher.model.forward = lambda x: x.flatten(1)  # type: ignore[method-assign]
    with pytest.raises(TeacherError, match="is not what the whole tower does"):
        Layers(teacher)
    wide = tiny_timm()
    wide.input_shape = (32, 48)  # type: ignore[attr-defined]
    with pytest.raises(TeacherError, match="its input is not square"):
        Layers(wide)
