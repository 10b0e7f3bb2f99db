"""Teachers: frozen image and text models, by name.

``load_teacher`` takes

* ``NAME/TAG`` of open_clip, such as ``ViT-B-16/openai`` or ``ViT-H-14-quickgelu/dfn5b``,
* ``NAME/PATH`` to a checkpoint of that open_clip model,
* ``hf-hub:ORG/REPO``, an open_clip model on the Hugging Face hub,
* ``local-dir:PATH``, a folder with open_clip_config.json and weights,
* ``embedded``, the small one that comes with this package.

``load_grid_teacher`` takes all of these, and models that have a grid of features but know no texts:

* ``timm:NAME``, a vision transformer of timm, such as ``timm:vit_small_patch14_reg4_dinov2.lvd142m``,
* ``timm:NAME@FILE``, the same with weights from a file.

``load_layers`` opens such models, and others, at layers of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apm.errors import TeacherError
from apm.startup import import_open_clip
from apm.teachers.base import GridTeacher, Teacher, TeacherUnavailable
from apm.teachers.catalog import DEFAULT, TeacherInfo, list_teachers
from apm.teachers.layer_sources import FRAMES, VIDEO, parse_source

if TYPE_CHECKING:
    import torch

    from apm.teachers.layers import LayerSource

__all__ = [
    "DEFAULT",
    "GridTeacher",
    "Teacher",
    "TeacherInfo",
    "TeacherUnavailable",
    "check_teacher",
    "list_teachers",
    "load_default_teacher",
    "load_grid_teacher",
    "load_layers",
    "load_teacher",
]

_TIMM = "timm:"


def check_teacher(spec: str) -> None:
    """Find, or fetch, what `load_teacher` would load, so that a wrong name is told before the slow imports.

    Raises:
        TeacherError: as `load_teacher`, but for what only reading the weights shows.
    """
    if spec.startswith(_TIMM):
        raise _without_texts(spec)
    if spec != "embedded":
        from apm.teachers.sources import resolve

        resolve(spec)


def load_teacher(spec: str, *, device: str | torch.device = "cpu") -> Teacher:
    """Load the teacher that `spec` names, and no other.

    Args:
        spec: one of the forms above.
        device: where its weights go. They are float32, frozen, and in evaluation mode.

    Raises:
        TeacherUnavailable: its weights are neither on this machine nor reachable; found out within seconds.
        TeacherError: the name is not known, or the file is damaged, unsafe or of another model.
    """
    if spec == "embedded":
        from apm.teachers.embedded import load_embedded

        return load_embedded(device=device)
    if spec.startswith(_TIMM):
        raise _without_texts(spec)
    from apm.teachers.sources import resolve

    source = resolve(spec)  # before the slow imports
    import_open_clip()
    from apm.teachers.openclip import load_source

    return load_source(source, device=device)


def load_grid_teacher(spec: str, *, device: str | torch.device = "cpu") -> GridTeacher:
    """Load what `load_teacher` loads, in the same way, or a model of timm that has a grid of features and no texts."""
    if not spec.startswith(_TIMM):
        return load_teacher(spec, device=device)
    import_open_clip()
    from apm.teachers.timm import load_timm

    return load_timm(spec, device=device)


def load_layers(
    spec: str,
    *,
    teacher: Teacher | None = None,
    size: int | None = None,
    frames: int | None = None,
    device: str | torch.device = "cpu",
) -> LayerSource:
    """Load a model whose layers are looked at: ``mvit:LAYER``, ``vit:NAME:LAYER`` or ``teacher:LAYER``.

    Args:
        spec: see `apm.teachers.layers`.
        teacher: whose layers ``teacher:`` means.
        size: side of the input in pixels; None: the model's own, or of a teacher that at which its grid is made.
        frames: how often a video transformer sees the image, 8 or 16 times; None: 16.
        device: where the weights go. They are float32, frozen, and in evaluation mode.

    Raises:
        TeacherUnavailable: the weights are neither on this machine nor reachable; found out within seconds.
        TeacherError: there is no such model or layer; the weights are damaged, unsafe or another model's.
    """
    source = parse_source(spec)
    import_open_clip()
    import torch

    from apm.teachers.layer_weights import of_library, of_teacher, of_torchvision
    from apm.teachers.layers import LayerSource

    if source.kind == "teacher":
        weights = of_teacher(source, teacher, size)
    elif source.kind == "mvit":
        weights = of_torchvision(source, VIDEO, size)
    else:
        weights = of_library(source, size)
    repeated = (frames or FRAMES[-1]) if source.kind == "mvit" else None
    return LayerSource(weights, source.layers, name=spec, device=torch.device(device), frames=repeated)


def load_default_teacher(*, device: str | torch.device = "cpu") -> Teacher:
    """Load `DEFAULT`, or the embedded teacher with a note that says why when the default cannot be had now.

    Raises:
        TeacherError: the default's weights are here but damaged, or there is no embedded teacher either.
    """
    try:
        return load_teacher(DEFAULT, device=device)
    except TeacherUnavailable as error:
        from apm.teachers.embedded import load_embedded

        teacher = load_embedded(device=device)
        teacher.notes = (f"The embedded teacher, a small one, stands in for the default. {error}", *teacher.notes)
        return teacher


def _without_texts(spec: str) -> TeacherError:
    return TeacherError(
        f'The teacher "{spec}" has a grid but no text tower, so it cannot classify: name a teacher of open_clip, or'
        " embedded. It can be used where only a grid is needed."
    )
