"""The small teacher that comes with the package: no download, weaker than any CLIP model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from apm.errors import TeacherError
from apm.startup import import_open_clip

if TYPE_CHECKING:
    import torch

    from apm.teachers.openclip import OpenClipTeacher

FOLDER = Path(__file__).with_name("embedded_weights")
"""Where its files are, in open_clip's local-dir form; its model card is the README.md there."""


def load_embedded(*, device: str | torch.device = "cpu") -> OpenClipTeacher:
    """Load the embedded teacher.

    Raises:
        TeacherError: its files are not in this installation, or are damaged.
    """
    if not FOLDER.is_dir():
        raise TeacherError(
            f"The embedded teacher's files are missing from this installation ({FOLDER}): reinstall apm."
        )
    import_open_clip()
    from apm.teachers.openclip import load_folder

    return load_folder(FOLDER, name="embedded", device=device)
