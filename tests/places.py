"""Where things are: the clone, the golden files, the recorded baseline."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
BASELINE = Path(__file__).resolve().parent / "baseline"
