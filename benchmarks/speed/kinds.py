"""All kinds of measurements, in the order of the page."""

from __future__ import annotations

from .features import features
from .fewer_queries import queries
from .gpu import gpu
from .kind import Kind
from .pipeline import images, labels, processes
from .scaling import batch, grid, patches, steps
from .segments import segment
from .startup import startup
from .step import step
from .tuning import tuning

_STUDENT = (step, steps, grid, patches, batch)
_ANSWERS = (labels, images, processes, segment, queries, startup, tuning)
KINDS: dict[str, Kind] = {kind.name: kind for kind in (*_STUDENT, *_ANSWERS, features, gpu)}
