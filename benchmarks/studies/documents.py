"""Puts what a study measured into its document: the text between two markers is never written by hand."""

from __future__ import annotations

import re
from pathlib import Path

from apm.errors import UsageError
from apm.images.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]
"""Of a clone; an installed package has no documents."""


def require_clone() -> None:
    """Raise a `UsageError` where there are no documents to write to."""
    if not (ROOT / "docs").is_dir():
        raise UsageError("Documents are written in a clone of the repository; this is an installed package.")


def block(document: Path, name: str) -> str:
    """Return the text between ``<!-- name … -->`` and ``<!-- end -->``, without the line breaks about it."""
    return _find(document.read_text(encoding="utf-8"), document, name)[2].strip("\n")


def fill(document: Path, name: str, text: str) -> None:
    """Replace that text."""
    require_clone()
    old = document.read_text(encoding="utf-8")
    found = _find(old, document, name)
    new = f"{old[: found.start(2)]}{text.rstrip()}\n{old[found.end(2) :]}".encode()
    write_atomically(document, new)


def _find(text: str, document: Path, name: str) -> re.Match[str]:
    found = re.search(rf"(<!-- {re.escape(name)}(?:: [^\n]*)? -->\n)(.*?)<!-- end -->", text, re.DOTALL)
    if found is None:
        raise UsageError(f"{document} has no place for {name}: <!-- {name} --> and <!-- end --> are missing.")
    return found
