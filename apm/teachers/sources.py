"""From a teacher's name to the files it is made of, fetching what is missing. Avoids open_clip where it can."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apm.errors import TeacherError, did_you_mean
from apm.startup import import_open_clip
from apm.teachers import catalog, hub
from apm.teachers.folder_config import read_config, read_names

_HUB, _FOLDER = "hf-hub:", "local-dir:"
_CHECKPOINTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_BPE, _LABELS, _TEMPLATES = "bpe_vocab.txt.gz", "labels.txt", "templates.txt"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything that a teacher is loaded from; all of it is on this machine."""

    name: str
    """The name as it was given."""
    model: str
    """What open_clip calls the architecture: a name of its own, or ``local-dir:`` and a folder."""
    weights: Path
    config: Mapping[str, Any]
    """The architecture: ``embed_dim``, ``vision_cfg``, ``text_cfg``, …"""
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    """What `model` does not say of the input: mean, std, interpolation, resize mode."""
    bpe: Path | None = None
    """The tokenizer's own vocabulary."""
    labels: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


def resolve(spec: str) -> Source:
    """Find the files of the teacher that `spec` names, downloading what is not here.

    Raises:
        TeacherUnavailable: the weights are neither on this machine nor reachable.
        TeacherError: the name is not known, or there is nothing usable where it points.
    """
    if spec in (_HUB, _FOLDER):
        raise TeacherError(f'The teacher "{spec}" is incomplete: write {_HUB}ORG/REPO or {_FOLDER}PATH.')
    if spec.startswith(_HUB):
        return _from_hub(spec, spec.removeprefix(_HUB))
    if spec.startswith(_FOLDER):
        return from_folder(Path(spec.removeprefix(_FOLDER)).expanduser(), name=spec)
    model, _, rest = spec.partition("/")
    if not model or not rest:
        raise _unknown(spec)
    entry = catalog.find(model, rest)
    if entry is not None:
        return _from_tag(spec, model, entry)
    return _from_registry(spec, model, rest)


def from_folder(folder: Path, *, name: str) -> Source:
    """Find a teacher in open_clip's local-dir form.

    Beside open_clip's own files the folder may hold ``bpe_vocab.txt.gz`` (the tokenizer's vocabulary), ``labels.txt``
    and ``templates.txt`` (default class names and prompts, one a line).

    Raises:
        TeacherError: the folder, its configuration or its weights are missing or damaged.
    """
    config_path = folder / hub.CONFIG
    if not folder.is_dir():
        raise TeacherError(f'The teacher "{name}" cannot be loaded: there is no folder {folder}.')
    if not config_path.is_file():
        raise TeacherError(f'The teacher "{name}" cannot be loaded: {folder} holds no {hub.CONFIG}.')
    candidates = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth"))
    preferred = [path for wanted in hub.WEIGHTS for path in candidates if path.name == wanted]
    if not candidates:
        raise TeacherError(f'The teacher "{name}" cannot be loaded: {folder} holds no weights ({hub.WEIGHTS[0]}).')
    if not preferred and len(candidates) > 1:
        listing = ", ".join(path.name for path in candidates)
        raise TeacherError(
            f'The teacher "{name}" is ambiguous: {folder} holds {listing}. Rename the right one to {hub.WEIGHTS[0]}.'
        )
    bpe = folder / _BPE
    return Source(
        name=name,
        model=f"{_FOLDER}{folder}",
        weights=(preferred or candidates)[0],
        config=_read_config(config_path, name),
        bpe=bpe if bpe.is_file() else None,
        labels=read_names(folder / _LABELS, "labels"),
        templates=read_names(folder / _TEMPLATES, "templates"),
    )


def _from_hub(spec: str, repo: str) -> Source:
    config_path = hub.fetch(repo, (hub.CONFIG,), wanted_by=spec)
    config = _read_config(config_path, spec)
    weights = hub.fetch(repo, hub.WEIGHTS, wanted_by=spec)
    # A snapshot of the repository is a folder in open_clip's local-dir form, but for transformers' files, which that
    # library fetches by the repository's name.
    model = spec if _uses_transformers(config) else f"{_FOLDER}{config_path.parent}"
    return Source(name=spec, model=model, weights=weights, config=config)


def _from_tag(spec: str, model: str, entry: catalog.Entry) -> Source:
    if entry.needs_transformers:
        _require_transformers(spec)
    repo, filenames = hub.weight_files(entry.location)
    weights = hub.fetch(repo, filenames, wanted_by=spec)
    open_clip = import_open_clip()

    notes: tuple[str, ...] = ()
    if entry.quick_gelu and not model.endswith(catalog.QUICKGELU):
        model += catalog.QUICKGELU
        notes = (f"{spec}: open_clip's {model} configuration is used: its weights were trained with QuickGELU.",)
    return Source(
        name=spec,
        model=model,
        weights=weights,
        config=_registered(spec, model),
        preprocess=open_clip.get_pretrained_cfg(entry.model, entry.tag),
        notes=notes,
    )


def _from_registry(spec: str, model: str, rest: str) -> Source:
    """Ask open_clip itself: for a checkpoint of one of its models, or weights that the catalogue lacks."""
    path = Path(rest).expanduser()
    looks_like_path = path.suffix in _CHECKPOINTS or "/" in rest
    if catalog.is_complete() and not (looks_like_path or path.is_file()) and "open_clip" not in sys.modules:
        raise _unknown(spec)  # not worth the seconds that importing open_clip takes
    open_clip = import_open_clip()

    if model not in open_clip.list_models():
        raise _unknown(spec)
    if weights := open_clip.get_pretrained_cfg(model, rest):
        quick_gelu = bool(weights.get("quick_gelu"))
        entry = catalog.Entry(
            model=model,
            tag=rest,
            location=weights.get("hf_hub", ""),
            quick_gelu=quick_gelu and f"{model}{catalog.QUICKGELU}" in open_clip.list_models(),
            needs_transformers=False,
            dim=0,
            image_size=0,
            parameters=None,
        )
        return _from_tag(spec, model, entry)
    if path.is_file():
        return Source(name=spec, model=model, weights=path, config=_registered(spec, model))
    if looks_like_path:
        raise TeacherError(f'The teacher "{spec}" cannot be loaded: there is no checkpoint file {path}.')
    raise _unknown(spec)


def _registered(spec: str, model: str) -> Mapping[str, Any]:
    """Return open_clip's own configuration of a model."""
    open_clip = import_open_clip()

    config: Mapping[str, Any] | None = open_clip.get_model_config(model)
    if config is None:
        raise TeacherError(
            f'The teacher "{spec}" cannot be loaded: the installed open_clip {open_clip.__version__} has no model'
            f" {model}. Update it: pip install -U open_clip_torch"
        )
    if _uses_transformers(config):
        _require_transformers(spec)
    return config


def _read_config(path: Path, name: str) -> Mapping[str, Any]:
    model = read_config(path, name)
    if _uses_transformers(model):
        _require_transformers(name)
    return model


def _uses_transformers(config: Mapping[str, Any]) -> bool:
    text = config["text_cfg"]
    return bool(text.get("hf_model_name") or text.get("hf_tokenizer_name"))


def _require_transformers(spec: str) -> None:
    if importlib.util.find_spec("transformers") is None:
        raise TeacherError(
            f'The teacher "{spec}" takes its text tower or tokenizer from the transformers library, which is not'
            " installed: pip install transformers sentencepiece"
        )


def _unknown(spec: str) -> TeacherError:
    """Build the error for a name that nothing answers to, with what may have been meant."""
    model = spec.split("/")[0]
    tags = [entry.tag for entry in catalog.entries() if entry.model == model.removesuffix(catalog.QUICKGELU)]
    hint = did_you_mean(spec, [f"{model}/{tag}" for tag in tags] if tags else catalog.names())
    if tags and (not hint or spec == model):
        hint = f" {model} has the tags {', '.join(tags)}."
    elif spec and Path(spec).expanduser().is_dir():
        hint = f' For a folder in open_clip\'s form, write "{_FOLDER}{spec}".'
    return TeacherError(
        f'Unknown teacher "{spec}".{hint} A teacher is NAME/TAG of open_clip (ViT-B-16/openai),'
        " NAME/PATH-TO-CHECKPOINT, hf-hub:ORG/REPO, local-dir:PATH or embedded; `apm teachers --all` lists them."
    )
