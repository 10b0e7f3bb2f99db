"""All kinds of measurements, in the order of the page."""

from __future__ import annotations

from . import features, fewer_queries, gpu_report, pipeline, scaling, segments, startup, step, tuning
from .kind import Kind

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        step.STEP,
        scaling.STEPS,
        scaling.GRID,
        scaling.PATCHES,
        scaling.BATCH,
        pipeline.LABELS,
        pipeline.IMAGES,
        pipeline.PROCESSES,
        segments.SEGMENT,
        fewer_queries.QUERIES,
        startup.STARTUP,
        tuning.TUNING,
        features.FEATURES,
        gpu_report.GPU,
    )
}
