"""What does one answer read from many views gain? From the records of finished runs.

`python -m apm.benchmarks.studies.readouts RUN… --record FILE`. The runs are of `apm bench`, with students that are
fitted to the grids of many views and read out in several ways, beside MTA and ZERO with as many views of the same
images; the record holds the same as that of `softened`.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from . import softened
from .study import ROOT, run

STUDY = replace(
    softened.STUDY,
    name="readouts",
    question=__doc__,
    results="readouts.json",
    document=ROOT / "docs" / "fields.md",
    marker="readouts",
)

if __name__ == "__main__":
    sys.exit(run(STUDY.main))
