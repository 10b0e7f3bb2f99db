"""Parameters, floating-point operations and memory, counted from shapes, and torch's own counts to confirm them.

Operations are those of matrix products and convolutions, two for each multiply-add, as torch's counter counts them:
additions, ReLUs, softmaxes, outer products and Adam (element-wise all) are none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apm.student.config import APMConfig
from apm.student.engine import SPAN, Engine
from apm.student.engine_losses import Locations
from apm.student.model import APM, parameter_shapes
from apm.teachers.base import Teacher

ADAM_BYTES = 28
"""Memory traffic of one Adam step per parameter: weight and both moments read and written, gradient read; float32."""
COPIES = 8
"""Identical copies of the image in a batch of the published loop."""

_PARTS = {
    "trigger column": ("column.",),
    "layer 1": ("mlp.layer1.",),
    "layer 2": ("mlp.layer2.",),
    "layer 3": ("mlp.layer3.",),
    "feature head and readout": ("mlp.head.", "readout."),
    "RGB head": ("rgb_head.",),
}
PARTS = tuple(_PARTS)


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


def forward_flops(config: APMConfig, queries: int | None = None) -> dict[str, int]:
    """Operations of `apm.student.engine.Engine.evaluate` for one student, by part; at ``queries`` locations or all."""
    n, (h1, h2, h3), dim, heads = queries or config.cells, config.hidden, config.dim, config.heads
    layer1 = 2 * config.cells * h1  # the column's share
    layer1 += 2 * config.grid * config.position_dim * h1  # the share of every row and of every column of the grid
    layer1 += 2 * n * 2 * config.grid * h1  # their sum at every location
    query = 8 * dim**2 + 4 * heads * (dim * h3 + n * h3 + n * dim)
    return {
        "trigger column": 2 * 3 * config.patch_size**2 * config.cells,
        "layer 1": layer1,
        "layer 2": 2 * n * h1 * h2,
        "layer 3": 2 * n * h2 * h3,
        "feature head and readout": query if config.readout == "query" else 2 * dim * h3,
        "RGB head": 0,
    }


def step_flops(config: APMConfig, queries: int | None = None) -> dict[str, int]:
    """Operations of `apm.student.engine.Engine.step` (forward and backward) for one student, by part."""
    n, h3, dim, heads = queries or config.cells, config.hidden[2], config.dim, config.heads
    forward = forward_flops(config, queries)
    query = 8 * dim**2 + heads * (8 * dim * h3 + 8 * n * h3 + 4 * n * dim)
    backward = {
        # the image needs no gradient; nor do the position codes; the column does, and its outer product is no product
        "trigger column": forward["trigger column"],
        "layer 1": forward["layer 1"],
        "layer 2": 2 * forward["layer 2"],
        "layer 3": 2 * forward["layer 3"],
        "feature head and readout": query if config.readout == "query" else 2 * dim * h3,
        "RGB head": 0,
    }
    return {part: forward[part] + backward[part] for part in PARTS}


def middle_flops(config: APMConfig, queries: int | None = None) -> int:
    """The part of `step_flops` that no rearrangement removes: the two middle layers. 64.4e9 at the paper's sizes."""
    step = step_flops(config, queries)
    return step["layer 2"] + step["layer 3"]


def plain_flops(config: APMConfig, queries: int | None = None) -> dict[str, int]:
    """Operations of a step of `apm.student.model.APM` with autograd: a query a location, keys and values projected."""
    n, (h1, h2, h3), dim = queries or config.cells, config.hidden, config.dim
    projections = 4 * dim**2 + 4 * n * dim**2  # query and output; keys and values
    readout = 3 * (projections + 4 * n * dim) if config.readout == "query" else 0
    return {
        "trigger column": 2 * 2 * 3 * config.patch_size**2 * config.cells,
        "layer 1": 3 * 2 * n * (config.cells + config.position_dim) * h1,
        "layer 2": 3 * 2 * n * h1 * h2,
        "layer 3": 3 * 2 * n * h2 * h3,
        "feature head and readout": 3 * 2 * n * h3 * dim + readout,
        "RGB head": 0,
    }


def published_flops(config: APMConfig, copies: int = COPIES) -> dict[str, int]:
    """Operations of one step of the published loop: the plain form on identical copies, and the RGB head as well."""
    width = config.rgb_hidden
    rgb = 3 * 2 * config.cells * width * (config.dim + config.cells + config.position_dim + width + 3)
    return {part: copies * count for part, count in {**plain_flops(config), "RGB head": rgb}.items()}


def engine_bytes(config: APMConfig, precision: str = "fp32", batch: int = 1) -> dict[str, int]:
    """Memory that `apm.student.engine.Engine` holds, from shapes, by purpose (vectors and alignment left out)."""
    parameters = trained_parameters(config)
    h1, h2, h3 = config.hidden
    half = precision == "bf16"
    small = 2 if half else 4  # bytes of what the two middle layers multiply
    sums = 2 * 2 * config.grid * h1  # rows and columns of the grid, and their gradients
    hidden = 2 * config.cells * (small * (h1 + h2) + 4 * h3 + (2 * h3 if half else 0))
    copies = 2 * (h1 * h2 + h2 * h3) if half else 0
    shared = 4 * parameters + config.cells * (small * 2 * config.grid + 4 * config.dim)
    return {
        "initial state and codes, shared": shared + (2 * min(SPAN, max(h1 * h2, h2 * h3)) if half else 0),
        "weights": batch * (4 * parameters + copies),
        "gradients": batch * 4 * parameters,
        "Adam's moments": batch * 8 * parameters,
        "hidden layers and their gradients": batch * (hidden + sums * (4 + (2 if half else 0))),
        "patches": batch * 4 * 3 * config.patch_size**2 * config.cells,
    }


def measured_flops(work: Callable[[], Any]) -> int:
    """What torch's counter counts while ``work`` runs."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def held_bytes(engine: Engine) -> int:
    """Memory of all distinct buffers that an engine holds, whatever the views into them."""
    found: dict[int, int] = {}
    for tensor in _tensors(vars(engine).values()):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@dataclass(frozen=True)
class StudentProfile:
    """One student, counted from shapes (by part) and by torch (in all)."""

    config: APMConfig
    precision: str
    parameters: dict[str, int]
    counted_parameters: int
    step: dict[str, int]
    counted_step: int
    plain: dict[str, int]
    published: dict[str, int]
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
    """Count a student from its shapes, and again from a real one that makes one step."""
    model = APM(config)
    engine = Engine(config, dict(model.state_dict()), precision="bf16" if precision == "bf16" else "fp32")
    return StudentProfile(
        config=config,
        precision=precision,
        parameters=student_parameters(config),
        counted_parameters=sum(parameter.numel() for parameter in model.parameters()),
        step=step_flops(config),
        counted_step=measured_flops(engine.step),
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
        elif isinstance(value, Locations):
            yield from _tensors(vars(value).values())
