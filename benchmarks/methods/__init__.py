"""The methods that a run can compare, by name.

A new method is one file beside these and one line in `REGISTRY`. On the command line a method may carry settings behind
a colon, as ``tpt:steps=0`` or ``apm:target=mta,views=64``; the names are the fields of its settings dataclass.

Units, the same for all methods and teachers: what is added to logits, entropies and thresholds are in nats, as logits
are; what sharpens likenesses among images is per cosine; both as published. A temperature that its authors wrote as
0.01, CLIP's own, is the teacher's, 1 / `logit_scale`. Nothing else is rescaled to a teacher's logit scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from apm.errors import UsageError, unknown

from ..protocols import PROTOCOLS
from .apm import APMTestTimeTraining
from .base import Batch, Method, MethodOptions, Prediction, StreamMethod
from .boostadapter import BoostAdapter
from .clipartt import CLIPArTT
from .cocoop import CoCoOp, TPTCoCoOp
from .coop import CoOp, TPTCoOp
from .ctpt import CTPT
from .dmn import DMN
from .dota import DOTA
from .dpe import DPE
from .dynaprompt import DynaPrompt
from .ecalp import ECALP
from .glom_ttt import GLOMTestTimeTraining
from .mae import TTTMAE, MAEFineTuned, MAEJoint, ViTProbe
from .mta import MTA
from .oga import OGA
from .onzeta import OnZeta
from .published import AsPublished, Published
from .rlcf import RLCF
from .rtpt import RTPT
from .tda import TDA
from .tent import Tent
from .tps import TPS
from .tpt import TPT
from .ttl import TTL
from .watt import WATT
from .zero import Zero
from .zero_shot import ZeroShot

__all__ = [
    "REGISTRY",
    "Batch",
    "Method",
    "MethodOptions",
    "Prediction",
    "StreamMethod",
    "create_method",
    "create_methods",
    "parse_method",
]

REGISTRY: dict[str, Callable[[MethodOptions], Method]] = {
    "zero-shot": ZeroShot,
    "tpt": TPT,
    "ctpt": CTPT,
    "rtpt": RTPT,
    "rlcf": RLCF,
    "dynaprompt": DynaPrompt,
    "coop": CoOp,
    "cocoop": CoCoOp,
    "tpt+coop": TPTCoOp,
    "tpt+cocoop": TPTCoCoOp,
    "mta": MTA,
    "zero": Zero,
    "tda": TDA,
    "tps": TPS,
    "dmn": DMN,
    "boostadapter": BoostAdapter,
    "onzeta": OnZeta,
    "ecalp": ECALP,
    "dpe": DPE,
    "dota": DOTA,
    "oga": OGA,
    "ttl": TTL,
    "tent": Tent,
    "clipartt": CLIPArTT,
    "watt": WATT,
    "apm": APMTestTimeTraining,
    "glom-ttt": GLOMTestTimeTraining,
    "vit-probe": ViTProbe,
    "mae-finetune": MAEFineTuned,
    "mae-joint": MAEJoint,
    "ttt-mae": TTTMAE,
}


def parse_method(spec: str) -> tuple[str, dict[str, str]]:
    """Split ``name`` or ``name:key=value,key=value`` into the name and its settings, not yet read as numbers.

    Raises:
        UsageError: a setting without ``=``, or given twice. Whether the names are known is seen by `create_method`.
    """
    name, _, rest = spec.partition(":")
    settings: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, separator, value = (part.strip() for part in item.partition("="))
        if not (key and separator and value):
            raise UsageError(f'"{item}" in method "{spec}" is not a setting: write name:key=value,key=value.')
        if key in settings:
            raise UsageError(f'Method "{spec}" sets {key} twice.')
        settings[key] = value
    return name.strip(), settings


def create_method(spec: str, options: MethodOptions | None = None) -> Method:
    """Make one method.

    Args:
        spec: a name in `REGISTRY`, with settings behind a colon if any.
        options: of the run.

    Raises:
        UsageError: unknown method or setting (the nearest are suggested), or a value out of range.
    """
    name, overrides = parse_method(spec)
    if name not in REGISTRY:
        raise unknown("method", name, REGISTRY)
    options = replace(options or MethodOptions(), overrides=overrides)
    if options.protocol not in PROTOCOLS:
        raise unknown("protocol", options.protocol, PROTOCOLS)
    if options.protocol == "published":
        return AsPublished(REGISTRY[name], getattr(REGISTRY[name], "published", Published()), options)
    return REGISTRY[name](options)


def create_methods(
    specs: Sequence[str], options: MethodOptions | None = None, *, targets: Sequence[str] = ()
) -> list[Method]:
    """Make the methods of a run, in order; two of one name are a `UsageError`, since records go by the name.

    Args:
        specs: as for `create_method`.
        options: of the run.
        targets: each ``apm`` without a target of its own is made once for every one of them.
    """
    options = options or MethodOptions()
    variants = [replace(options, target=target) for target in dict.fromkeys(targets)] or [options]
    methods: list[Method] = []
    for spec in specs:
        name, settings = parse_method(spec)
        each = variants if name == "apm" and "target" not in settings else [options]
        for method in (create_method(spec, one) for one in each):
            if any(method.name == earlier.name for earlier in methods):
                raise UsageError(
                    f'Method "{method.name}" is given twice; variants of one method need different settings.'
                )
            methods.append(method)
    return methods
