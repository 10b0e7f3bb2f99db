"""Prompts whose context was learned: CoOp's and CoCoOp's (Zhou et al., IJCV and CVPR 2022), on disk and in use.

A context of M word vectors stands before every class name, "[v1] … [vM] name.". CoCoOp adds to each of them one vector
that a small network, the meta-net, makes of the image. A learned prompt belongs to the teacher whose word vectors it
stands among. It fits before any class names, but was learned for some: others are refused unless explicitly allowed.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import linear, normalize

from apm.errors import UsageError
from apm.images.files import write_atomically
from apm.teachers.torchscript import read_state_dict
from apm.text.prompts import TunablePrompt

CONTEXT = "ctx"
META_NET = tuple(f"meta_net.{layer}.{kind}" for layer in ("linear1", "linear2") for kind in ("weight", "bias"))
"""The meta-net's weights: (H, D), (H,), (W, H), (W,)."""
_FORMAT = "apm-learned-prompt-1"


@dataclass(frozen=True, kw_only=True)
class LearnedPrompt:
    """A learned context, with CoCoOp's meta-net where it has one."""

    context: Tensor
    """(M, W) float32 word vectors, shared by all classes."""
    meta_net: Mapping[str, Tensor] | None = None
    """By the names in `META_NET`; None: CoOp's."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """How it was made: ``teacher``, the identity of the teacher it was learned with; ``converted``, …"""

    def __post_init__(self) -> None:
        """Raise a ValueError where shapes or numbers are not those of a learned prompt."""
        tensors = {CONTEXT: self.context, **(self.meta_net or {})}
        if self.context.ndim == 3:
            raise ValueError("its context is class-specific, one for each class, which is not supported")
        if self.context.ndim != 2 or not self.context.numel():
            raise ValueError(f"its context has the shape {tuple(self.context.shape)}, not (words, width)")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("it holds numbers that are not finite")
        if self.meta_net is not None:
            shapes = [tuple(self.meta_net[name].shape) for name in META_NET]
            hidden, width = len(self.meta_net[META_NET[1]]), self.context.shape[1]
            expected = [(hidden, *shapes[0][1:]), (hidden,), (width, hidden), (width,)]
            if shapes != expected or len(shapes[0]) != 2:
                raise ValueError(f"the meta-net's weights have the shapes {shapes}")

    def for_image(self, feature: Tensor) -> Tensor:
        """The context (M, W) for an image's feature (D,), whose length matters: CoCoOp normalises it first."""
        if self.meta_net is None:
            return self.context
        first, first_bias, second, second_bias = (self.meta_net[name] for name in META_NET)
        return self.context + linear(linear(feature, first, first_bias).relu(), second, second_bias)

    def conditioned(self, feature: Tensor) -> Tensor:
        """CoCoOp's context for an image, from its feature (D,) brought to unit length."""
        return self.for_image(normalize(feature, dim=0))

    def to(self, device: torch.device) -> LearnedPrompt:
        """The same on a device."""
        net = None if self.meta_net is None else {name: tensor.to(device) for name, tensor in self.meta_net.items()}
        return LearnedPrompt(context=self.context.to(device), meta_net=net, origin=self.origin)


def write_learned_prompt(path: Path, prompt: LearnedPrompt) -> None:
    """Write a prompt as safetensors, equal prompts as equal bytes; a `WriteError` says why it cannot be written."""
    tensors = {CONTEXT: prompt.context, **(prompt.meta_net or {})}
    metadata = {**prompt.origin, "format": _FORMAT}
    content = save({name: value.float().contiguous() for name, value in tensors.items()}, metadata)
    write_atomically(path, _in_order(content))


def _in_order(content: bytes) -> bytes:
    """The same safetensors file with its metadata sorted, which the library leaves in any order."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def read_learned_prompt(path: Path) -> LearnedPrompt:
    """Read what `write_learned_prompt` wrote.

    Raises:
        UsageError: the file is not there, damaged, or not a learned prompt.
    """
    try:
        with safe_open(path, framework="pt") as file:
            origin = dict(file.metadata() or {})
            if origin.pop("format", None) != _FORMAT:
                raise ValueError("it is not a learned prompt of apm")
            return _of({name: file.get_tensor(name) for name in file.keys()}, origin)  # noqa: SIM118
    except OSError as error:
        raise UsageError(f'The learned prompt "{path}" cannot be read: {error.strerror or error}.') from error
    except (SafetensorError, ValueError) as error:
        raise UsageError(
            f'"{path}" is not a learned prompt: {error}. Convert checkpoints of CoOp\'s code with apm prompts convert.'
        ) from error


def read_published(path: Path) -> LearnedPrompt:
    """Read the prompt in a checkpoint that CoOp's code wrote, ``model.pth.tar-50``.

    The file is a pickle with a scheduler and an optimiser beside the weights. Nothing of it is run: the unpickler knows
    tensors and containers, and whatever else is named becomes an inert placeholder. The vectors of the class names
    (``token_prefix`` and ``token_suffix``) are left out, since they are rebuilt for the names at hand.

    Raises:
        UsageError: the file is not there, damaged, of torch's format before 1.6, or holds no learned context.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            state = read_state_dict(archive, lambda name: name == CONTEXT or name in META_NET)
        return _of(state, {"converted": path.name})
    except OSError as error:
        raise UsageError(f'The checkpoint "{path}" cannot be read: {error.strerror or error}.') from error
    except zipfile.BadZipFile as error:
        raise UsageError(
            f'The checkpoint "{path}" is damaged, or in the format of torch before version 1.6: save it again.'
        ) from error
    except ValueError as error:
        raise UsageError(f'The checkpoint "{path}" holds no prompt of CoOp or CoCoOp: {error}.') from error
    except Exception as error:  # damaged bytes fail in the unpickler in many ways
        raise UsageError(f'The checkpoint "{path}" is damaged: it cannot be read ({type(error).__name__}).') from error


def check_class_names(prompt: LearnedPrompt, class_names: Sequence[str], *, name: str) -> None:
    """Refuse class names that a prompt was not learned for, if it records those that it was learned for.

    Raises:
        UsageError: some of the given names are not among those; not all of those need be given.
    """
    learned = json.loads(prompt.origin.get("class_names", "null"))
    if learned is None:  # a published one does not say
        return
    known = {str(one).replace("_", " ").casefold() for one in learned}
    if strange := [one for one in class_names if one.replace("_", " ").casefold() not in known]:
        raise UsageError(
            f'The prompt {name} was learned for {len(learned)} class names, such as "{learned[0]}", and {len(strange)} '
            f'of the {len(class_names)} given are not among them, such as "{strange[0]}". To use it on other classes '
            "than those it was learned for, write transfer=true after the file, as in coop:file=FILE,transfer=true."
        )


def tunable(prompt: LearnedPrompt, teacher: Any, class_names: list[str], *, name: str, group: int) -> TunablePrompt:
    """The prompts of these classes with the learned context in place of its M words.

    Args:
        prompt: what was learned.
        teacher: with an open text tower.
        class_names: C names; underscores become spaces, as in CoOp.
        name: of the prompt, for errors.
        group: classes encoded at a time.

    Raises:
        UsageError: it was learned with another teacher, or this one's text tower cannot be reached.
    """
    words, width = prompt.context.shape
    learned_with = prompt.origin.get("teacher", teacher.identity)
    if learned_with != teacher.identity:
        raise UsageError(f"The prompt {name} was learned with {learned_with}, but the teacher is {teacher.identity}.")
    names = [name.replace("_", " ") for name in class_names]
    found = TunablePrompt(teacher, names, template=" ".join(["X"] * words) + " {}.", group=group)
    if found.initial.shape != prompt.context.shape:
        raise UsageError(
            f"The prompt {name} has {words} word vectors of {width} numbers, and teacher {teacher.name} takes "
            f"{found.initial.shape[0]} of {found.initial.shape[1]}: it was learned with another."
        )
    if prompt.meta_net is not None and (dim := prompt.meta_net[META_NET[0]].shape[1]) != teacher.dim:
        raise UsageError(
            f"The meta-net of {name} takes image features of {dim} numbers, and teacher {teacher.name} gives "
            f"{teacher.dim}: it was learned with another."
        )
    found.initial = prompt.context.to(found.initial.device)
    return found


def _of(state: Mapping[str, Tensor], origin: Mapping[str, str]) -> LearnedPrompt:
    if CONTEXT not in state:
        raise ValueError(f'it has no tensor "{CONTEXT}"')
    net = {name: state[name].float() for name in META_NET if name in state}
    if net and len(net) != len(META_NET):
        raise ValueError(f"its meta-net has only {', '.join(net)}")
    return LearnedPrompt(context=state[CONTEXT].float(), meta_net=net or None, origin=origin)
