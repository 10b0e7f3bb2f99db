"""The protocols of a run, by name, and what tables say of them; see `apm.benchmarks.methods.published`."""

from __future__ import annotations

PROTOCOLS = {
    "common": "the same prompts and views for all methods, and one setting of each for all data sets",
    "published": "each method with its authors' own prompts, views and settings by data set",
}
