"""The documents: links lead somewhere, pictures of the gallery are those that `make gallery` makes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from apm.cli import gallery
from tests.places import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "apm/teachers/embedded_weights/*.md")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:|#", link)]
    assert [link for link in local if not (document.parent / link).exists()] == []


def anchors(document: Path) -> set[str]:
    """Names by which a page's headings can be linked, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_heading_leads_to_one(document: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [
        link.partition("#")[::2] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", link)
    ]
    named = [(document.parent / file if file else document, name) for file, name in links if name]
    assert [f"{page.name}#{name}" for page, name in named if name not in anchors(page)] == []


def test_the_gallery_of_the_readme_is_what_make_gallery_makes() -> None:
    shown = re.findall(r"!\[[^]]+\]\(docs/gallery/(\w+)\.png\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown == list(gallery.PICTURES)
    assert sorted(path.stem for path in gallery.GALLERY.iterdir()) == sorted(shown)
    assert gallery.CHECKPOINT.is_file()


def captions() -> dict[str, list[str]]:
    """Name of each picture of the README's gallery → the command that its caption begins with."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"!\[[^]]+\]\(docs/gallery/(\w+)\.png\)\n\n`([^`]+)`", text)
    return {name: shlex.split(command) for name, command in found}


def test_captions_name_the_very_commands_that_make_gallery_runs() -> None:
    assert captions() == {name: ["apm", *arguments] for name, (arguments, _) in gallery.PICTURES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["field", "walk"])
def test_commands_of_captions_run_as_they_are_written(name: str, tmp_path: Path) -> None:
    gallery.lay_out(tmp_path / "work")
    command = [sys.executable, "-m", "apm", *captions()[name][1:]]
    done = subprocess.run(command, cwd=tmp_path / "work", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "work").glob(gallery.PICTURES[name][1]))) == 1


def test_the_gallery_stops_where_a_command_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "GALLERY", tmp_path)
    monkeypatch.setattr(gallery, "WORKSHOP", tmp_path.parent / "workshop")
    monkeypatch.setattr(gallery, "PICTURES", {"nothing": (["clasify"], "*.png"), "later": (["--version"], "*.png")})
    assert gallery.main() == 2
    assert list(tmp_path.iterdir()) == []
