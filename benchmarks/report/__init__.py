"""`apm report`: one self-contained HTML page from run folders. Every score is one of `benchmarks.tables`."""

from __future__ import annotations

from .page import Options, write_report

__all__ = ["Options", "write_report"]
