"""The small teacher that comes with the package: no download, weaker than any CLIP model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apm.errors import TeacherError
from apm.startup import import_open_clip
from apm.teachers import catalog

if TYPE_CHECKING:
    import torch

    from apm.teachers.openclip import OpenClipTeacher


def load_embedded(*, device: str | torch.device = "cpu") -> OpenClipTeacher:
    """Load the embedded teacher.

    Raises:
        TeacherError: its files are not in this installation, or are damaged.
    """
    if not catalog.EMBEDDED.is_dir():
        raise TeacherError(
            f"The embedded teacher's files are missing from this installation ({catalog.EMBEDDED}): reinstall apm."
        )
    import_open_clip()
    from apm.teachers.openclip import load_folder

    return load_folder(catalog.EMBEDDED, name="embedded", device=device)
