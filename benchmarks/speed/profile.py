"""Parameters and memory, counted from shapes and confirmed by a real student; floating-point operations, by torch.

Operations are those of matrix products and convolutions, two for each multiply-add: additions, ReLUs, softmaxes, outer
products and Adam (element-wise all) are none. They are counted on torch's device ``meta``, where tensors have shapes
and no numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apm.student.config import APMConfig
from apm.student.engine import Engine
from apm.student.engine_adam import SPAN, AdamRows
from apm.student.engine_losses import Locations
from apm.student.model import APM, parameter_shapes
from apm.teachers.base import Teacher

from ..studies.operations import measured_flops
from .options import images_and_targets, loaded_engine
from .published_loop import COPIES, PublishedLoop

_META = torch.device("meta")
ADAM_BYTES = 28
"""Memory traffic of one Adam step per parameter: weight and both moments read and written, gradient read; float32."""

_PARTS = {
    "trigger column": ("column.",),
    "layer 1": ("mlp.layer1.",),
    "layer 2": ("mlp.layer2.",),
    "layer 3": ("mlp.layer3.",),
    "feature head and readout": ("mlp.head.", "readout."),
    "RGB head": ("rgb_head.",),
}


def student_parameters(config: APMConfig) -> dict[str, int]:
    """Parameters of each part of the student, from the shapes alone."""
    shapes = parameter_shapes(config)
    return {
        part: sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))
        for part, prefixes in _PARTS.items()
    }


def trained_parameters(config: APMConfig) -> int:
    """Parameters that test-time training touches: all but the RGB head's, which has no loss then."""
    return sum(student_parameters(config).values()) - student_parameters(config)["RGB head"]


def middle_flops(config: APMConfig, queries: int | None = None) -> int:
    """Operations of a step that no rearrangement removes: layers 2 and 3, three products each. 64.4e9 in the paper's.

    At ``queries`` locations, or all.
    """
    h1, h2, h3 = config.hidden
    return 3 * 2 * (queries or config.cells) * (h1 * h2 + h2 * h3)


def step_flops(config: APMConfig, queries: int | None = None) -> int:
    """Operations of `apm.student.engine.Engine.step` for one student; at ``queries`` locations, or all."""
    return measured_flops(loaded_engine(config, "fp32", _META, queries=queries).step)


def plain_flops(config: APMConfig) -> int:
    """Operations of a step of `apm.student.model.APM` with autograd: a query a location, keys and values projected."""
    model = APM(config).to(_META)
    image, target = images_and_targets(config, 1, _META)
    return measured_flops(lambda: F.mse_loss(model(image), target).backward())


def published_flops(config: APMConfig) -> int:
    """Operations of one step of the published loop, without the teacher's towers."""
    everything = COPIES * config.cells  # queries in one chunk: the same products in fewer calls
    return measured_flops(PublishedLoop(config, *images_and_targets(config, 1, _META), rows=everything).step)


def engine_bytes(config: APMConfig, precision: str = "fp32", batch: int = 1) -> dict[str, int]:
    """Memory that `apm.student.engine.Engine` holds, from shapes, by purpose (vectors and alignment left out)."""
    parameters = trained_parameters(config)
    h1, h2, h3 = config.hidden
    half = precision == "bf16"
    small = 2 if half else 4  # bytes of what the two middle layers multiply
    sums = 2 * 2 * config.grid * h1  # rows and columns of the grid, and their gradients
    hidden = 2 * config.cells * (small * (h1 + h2) + 4 * h3 + (2 * h3 if half else 0))
    middle = h1 * h2 + h2 * h3
    copies = 2 * middle if half else 0
    shared = 4 * parameters + config.cells * (small * 2 * config.grid + 4 * config.dim)
    return {
        "initial state and codes, shared": shared
        + (4 * min(SPAN, middle) + 2 * config.cells * max(config.hidden) if half else 0),
        "weights": batch * (4 * parameters + copies),
        "gradients": batch * (4 * parameters - (2 * middle if half else 0)),
        "Adam's moments": batch * 8 * parameters,
        "hidden layers and their gradients": batch * (hidden + sums * (4 + (2 if half else 0))),
        "patches": batch * 4 * 3 * config.patch_size**2 * config.cells,
    }


def held_bytes(engine: Engine) -> int:
    """Memory of all distinct buffers that an engine holds, whatever the views into them."""
    found: dict[int, int] = {}
    for tensor in _tensors(vars(engine).values()):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@dataclass(frozen=True)
class StudentProfile:
    """One student: parameters and memory from shapes and really there; operations of a step in each form."""

    config: APMConfig
    precision: str
    parameters: dict[str, int]
    counted_parameters: int
    middle: int
    step: int
    plain: int
    published: int
    memory: dict[str, int]
    counted_memory: int


@dataclass(frozen=True)
class TeacherProfile:
    """One teacher; parameters are None where it is no torch module that could be asked."""

    name: str
    dim: int
    image_parameters: int | None
    text_parameters: int | None
    image_flops: int  # of one image, by torch's counter
    text_flops: int  # of one text


def profile_student(config: APMConfig, *, precision: str = "fp32") -> StudentProfile:
    """Count a student from its shapes, and again a real one."""
    model = APM(config)
    engine = Engine(config, dict(model.state_dict()), precision="bf16" if precision == "bf16" else "fp32")
    return StudentProfile(
        config=config,
        precision=precision,
        parameters=student_parameters(config),
        counted_parameters=sum(parameter.numel() for parameter in model.parameters()),
        middle=middle_flops(config),
        step=step_flops(config),
        plain=plain_flops(config),
        published=published_flops(config),
        memory=engine_bytes(config, precision),
        counted_memory=held_bytes(engine),
    )


def profile_teacher(teacher: Teacher) -> TeacherProfile:
    """Count a teacher's towers, and the operations of one image and of one text."""
    pixels = torch.zeros(1, 3, teacher.image_size, teacher.image_size, device=teacher.device)
    model = getattr(teacher, "model", None)
    visual = getattr(model, "visual", None)
    image_parameters = text_parameters = None
    if isinstance(model, nn.Module) and isinstance(visual, nn.Module):
        image_parameters = _count(visual.parameters())
        text_parameters = _count(model.parameters()) - image_parameters
    return TeacherProfile(
        name=teacher.name,
        dim=teacher.dim,
        image_parameters=image_parameters,
        text_parameters=text_parameters,
        image_flops=measured_flops(lambda: teacher.encode_image(pixels)),
        text_flops=measured_flops(lambda: teacher.encode_text(("a photo of a cat.",))),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """All tensors among some values, also inside of dicts and of objects with attributes of their own."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, (AdamRows, Locations)):
            yield from _tensors(vars(value).values())
