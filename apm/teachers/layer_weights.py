"""Models whose layers are looked at: of a teacher, of timm, of torchvision; weights from files or caches, or drawn.

Weights are found on this machine or fetched, and read as safetensors or as tensors alone; nothing else is unpickled.
"""

from __future__ import annotations

import copy
import re
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from apm.errors import TeacherError, did_you_mean
from apm.teachers import catalog, hub
from apm.teachers.base import Teacher, TeacherUnavailable
from apm.teachers.checkpoint import model_from, read_torch
from apm.teachers.layer_sources import SourceName
from apm.teachers.layers import Weights, drawn, random_words
from apm.teachers.openclip import OpenClipTeacher, quiet, untrained_tower
from apm.teachers.sources import from_folder, resolve
from apm.teachers.timm import published_file, with_weights

HEADS = ("head.", "heads.", "fc.", "classifier.")
"""How the names of torchvision's classifier weights begin: they are not loaded, since a file may have other classes."""


def of_teacher(source: SourceName, teacher: Teacher | None, size: int | None) -> Weights:
    """The image tower of a teacher."""
    if not isinstance(teacher, OpenClipTeacher):
        raise TeacherError(f'The source "{source.text}" needs a teacher of open_clip or the embedded one.')
    if source.weights is not None:
        raise TeacherError(
            f'The source "{source.text}" names weights, but a teacher has its own: name another --teacher, or use '
            "@random."
        )

    def untrained() -> nn.Module:
        embedded = teacher.name == "embedded"
        return untrained_tower(from_folder(catalog.EMBEDDED, name="embedded") if embedded else resolve(teacher.name))

    made = None if source.seed is None else drawn(untrained, source.seed)
    return Weights(
        model=copy.deepcopy(teacher.model.visual) if made is None else made,  # type: ignore[arg-type]
        untrained=untrained,
        words=f"those of the teacher {teacher.identity}" if source.seed is None else random_words(source.seed),
        size=size or teacher.grid_size,
        own_size=teacher.image_size,
        mean=teacher.mean,
        std=teacher.std,
    )


def of_library(source: SourceName, size: int | None) -> Weights:
    """A model of timm, or of torchvision where timm has none of that name."""
    name = source.model
    if not timm.is_model(name):
        others = torchvision.models.list_models(module=torchvision.models)
        if name in others:
            return of_torchvision(source, name, size)
        raise TeacherError(
            f'The source "{source.text}" cannot be loaded: neither timm nor torchvision has a model {name}.'
            f"{did_you_mean(name, [*timm.list_models(), *others])}"
        )

    def untrained() -> nn.Module:
        with quiet(), hub.no_network():
            return timm.create_model(name, num_classes=0)

    def made_for(model: Any) -> tuple[int, Sequence[float], Sequence[float]]:
        settings = model.pretrained_cfg
        return int(settings["input_size"][-1]), settings["mean"], settings["std"]

    return _loaded(
        source,
        size,
        untrained=untrained,
        trained=lambda path: with_weights(name, path),
        published=lambda: published_file(source.text, name),
        published_words="as timm publishes them",
        made_for=made_for,
    )


def of_torchvision(source: SourceName, name: str, size: int | None) -> Weights:
    """A model of torchvision, of images or of videos."""
    entry = torchvision.models.get_model_weights(name).DEFAULT
    prepare: Any = entry.transforms()

    def untrained() -> nn.Module:
        made: nn.Module = torchvision.models.get_model(name, weights=None)
        return made

    def trained(path: Path) -> nn.Module:
        model = untrained()
        load_but_heads(model, read_state(path))
        return model

    return _loaded(
        source,
        size,
        untrained=untrained,
        trained=trained,
        published=lambda: fetched(source.text, entry.url),
        published_words=f"as torchvision publishes them ({entry})",
        made_for=lambda model: (int(prepare.crop_size[-1]), prepare.mean, prepare.std),
    )


def _loaded(
    source: SourceName,
    size: int | None,
    *,
    untrained: Callable[[], nn.Module],
    trained: Callable[[Path], nn.Module],
    published: Callable[[], Path],
    published_words: str,
    made_for: Callable[[nn.Module], tuple[int, Sequence[float], Sequence[float]]],
) -> Weights:
    """A library's model with the weights that a source names; `made_for` tells its own input: side, mean, deviation."""
    if source.seed is not None:
        model, words = drawn(untrained, source.seed), random_words(source.seed)
    else:
        model, path = _with_weights(source, trained, published)
        words = published_words if source.weights is None else f"of the file {path.name}"
    own, mean, std = made_for(model)
    return Weights(model=model, untrained=untrained, words=words, size=size or own, own_size=own, mean=mean, std=std)


def _with_weights(
    source: SourceName, trained: Callable[[Path], nn.Module], published: Callable[[], Path]
) -> tuple[nn.Module, Path]:
    """A model with weights of a file, the source's own or the published one, and that file."""
    if source.weights is None:
        try:
            path = published()
        except TeacherUnavailable as error:
            raise TeacherUnavailable(
                f"{error} Weights in a file are named by {source.text}@FILE; {source.text}@random takes them at random,"
                " to see what the architecture alone gives."
            ) from error
    else:
        path = Path(source.weights).expanduser()
    return model_from(path, trained, wanted_by=f'The source "{source.text}"', name="the model"), path


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file that `read_checkpoint` has accepted."""
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    content = read_torch(path)
    state: dict[str, Tensor] = content.get("state_dict", content)
    return state


def load_but_heads(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load all weights but those of the classifier.

    Raises:
        ValueError: weights are missing, or unknown.
        RuntimeError: a shape differs.
    """
    found = model.load_state_dict({k: v for k, v in state.items() if not k.startswith(HEADS)}, strict=False)
    missing = [key for key in found.missing_keys if not key.startswith(HEADS)]
    if missing or found.unexpected_keys:
        raise ValueError(f"{_first('lacks', missing)}{_first(' has unknown', found.unexpected_keys)}".strip())


def _first(what: str, keys: Sequence[str]) -> str:
    return f"{what} {len(keys)}, first {keys[0]}" if keys else ""


def fetched(wanted_by: str, url: str) -> Path:
    """Return a file that torch's hub publishes: from its cache, else downloaded after a quick look whether it is there.

    Raises:
        TeacherUnavailable: it is neither here nor reachable.
    """
    name = Path(urlsplit(url).path).name
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.is_file():
        return path
    problem = _unreachable(url)
    if problem is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checksum = re.search(r"-([0-9a-f]{8,})\.", name)
            torch.hub.download_url_to_file(url, str(path), checksum and checksum[1], progress=False)
            return path
        except (OSError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
    raise TeacherUnavailable(
        f'The weights of "{wanted_by}" ({name}) are not on this machine, and {urlsplit(url).netloc} cannot be reached'
        f" ({problem}). Run it once with network access, or put {url} into {path.parent}."
    )


def _unreachable(url: str) -> str | None:
    """Why a file's head does not come within seconds, or None."""

    def ask() -> None:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=hub.PROBE_SECONDS):
            pass

    return hub.within_seconds(ask)
