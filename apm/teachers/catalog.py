"""What teachers there are, without importing torch or open_clip.

``catalog.tsv`` is generated from open_clip's registry (``python -m apm.teachers.make_catalog``), so that names are
checked, and missing weights reported, before anything slow is loaded. Its first line names the version that it was made
from; with another one, what the catalogue lacks is looked up in the registry itself.
"""

from __future__ import annotations

import csv
import functools
import json
import math
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from apm.teachers import hub

DEFAULT = "ViT-B-16/openai"
WELL_KNOWN = (
    DEFAULT,
    "ViT-B-32/openai",
    "ViT-L-14/openai",
    "ViT-L-14-336/openai",
    "ViT-B-16/laion2b_s34b_b88k",
    "ViT-L-14/datacomp_xl_s13b_b90k",
    "ViT-H-14/laion2b_s32b_b79k",
    "ViT-H-14-quickgelu/dfn5b",
)
"""Those that `apm teachers` shows unless it is asked for all."""
QUICKGELU = "-quickgelu"
FILE = Path(__file__).with_name("catalog.tsv")
EMBEDDED = Path(__file__).with_name("embedded_weights")
"""Files of the embedded teacher, in open_clip's local-dir form; its model card is the README.md there."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One set of weights that open_clip knows by a tag."""

    model: str
    tag: str
    location: str
    """``org/name/`` on the Hugging Face hub, or ``org/name/file``."""
    quick_gelu: bool
    """Whether it was trained with the QuickGELU activation, so that the ``-quickgelu`` configuration is needed."""
    needs_transformers: bool
    """Whether its text tower or tokenizer comes from the transformers library."""
    dim: int
    image_size: int
    parameters: int | None
    """Of both towers; None where it takes transformers to count them."""


@dataclass(frozen=True, kw_only=True)
class TeacherInfo:
    """One line of `apm teachers`."""

    name: str
    dim: int | None
    image_size: int | None
    """None, as `dim`, when it is not known before the weights are here."""
    parameters: int | None
    size: int | None
    """Bytes of its weights on this machine; None when they are not here."""
    available: bool
    """Whether its weights are on this machine."""
    source: str
    """Where the weights come from."""
    default: bool


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Return all rows of the catalogue, in open_clip's order."""
    with FILE.open(encoding="utf-8", newline="") as file:
        next(file)  # the version
        return tuple(
            Entry(
                model=row["model"],
                tag=row["tag"],
                location=row["location"],
                quick_gelu=row["quick_gelu"] == "1",
                needs_transformers=row["needs_transformers"] == "1",
                dim=int(row["dim"]),
                image_size=int(row["image_size"]),
                parameters=int(row["parameters"]) if row["parameters"] else None,
            )
            for row in csv.DictReader(file, delimiter="\t")
        )


def is_complete() -> bool:
    """Return whether the catalogue was made from the open_clip that is installed, so that it lacks nothing."""
    with FILE.open(encoding="utf-8") as file:
        made_from = file.readline().split()[-1]
    return made_from == metadata.version("open_clip_torch")


def find(model: str, tag: str) -> Entry | None:
    """Return the entry of ``model/tag``; the model may be spelled with ``-quickgelu`` where that is what it is.

    Tags are compared as open_clip does: without case, ``-`` like ``_``.
    """
    wanted = tag.lower().replace("-", "_")
    plain = model.removesuffix(QUICKGELU)
    for entry in entries():
        if entry.tag == wanted and (entry.model == model or (entry.model == plain and entry.quick_gelu)):
            return entry
    return None


def names() -> tuple[str, ...]:
    """Return every name with a fixed spelling: ``embedded`` and all ``model/tag``."""
    return ("embedded", *(f"{entry.model}/{entry.tag}" for entry in entries()))


def list_teachers(*, everything: bool = False) -> tuple[TeacherInfo, ...]:
    """Return what there is to choose from, and whether its weights are on this machine.

    Args:
        everything: all that open_clip knows, instead of the well-known ones.
    """
    known = names()[1:] if everything else WELL_KNOWN
    return (_embedded_info(), *(_info(name) for name in known))


def _info(name: str) -> TeacherInfo:
    entry = find(*name.split("/"))
    if entry is None:
        raise KeyError(name)
    repo, filenames = hub.weight_files(entry.location)
    path = hub.cached(repo, filenames)
    return TeacherInfo(
        name=name,
        dim=entry.dim,
        image_size=entry.image_size,
        parameters=entry.parameters,
        size=path.stat().st_size if path else None,
        available=path is not None,
        source=f"hf-hub:{repo}",
        default=name == DEFAULT,
    )


def _embedded_info() -> TeacherInfo:
    config, weights = EMBEDDED / hub.CONFIG, EMBEDDED / hub.WEIGHTS[0]
    here = config.is_file() and weights.is_file()
    model = json.loads(config.read_text(encoding="utf-8"))["model_cfg"] if here else {}
    return TeacherInfo(
        name="embedded",
        dim=model.get("embed_dim"),
        image_size=model.get("vision_cfg", {}).get("image_size"),
        parameters=_count_parameters(weights) if here else None,
        size=weights.stat().st_size if here else None,
        available=here,
        source="part of apm",
        default=False,
    )


def _count_parameters(path: Path) -> int:
    """Count the floating-point numbers in a safetensors file, from its header (8 bytes of length, then JSON)."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(
        math.prod(tensor["shape"])
        for name, tensor in header.items()
        if name != "__metadata__" and tensor["dtype"].startswith(("F", "BF"))
    )
