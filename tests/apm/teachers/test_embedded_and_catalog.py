"""The embedded teacher, the default, the catalogue and `apm teachers`."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from apm.cli.teachers import teachers as teachers_command
from apm.errors import TeacherError
from apm.teachers import DEFAULT, catalog, list_teachers, load_default_teacher, load_teacher
from apm.teachers.make_catalog import count_parameters
from apm.teachers.openclip import OpenClipTeacher
from tests.apm.teachers.tiny import CONFIG, TEXTS, random_model, write_folder, write_hub_cache

# --- the embedded teacher and the default


@pytest.fixture
def packaged(tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a small random model in the embedded teacher's place, with a cut vocabulary and labels of its own."""
    merges = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode().split("\n")[:1001]
    config = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": 512 + 1000 + 2}}
    folder = tmp_path / "for-config"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = random_model(f"local-dir:{folder}")
    folder = write_folder(tmp_path / "embedded", model, config)
    (folder / "bpe_vocab.txt.gz").write_bytes(gzip.compress("\n".join(merges).encode()))
    (folder / "labels.txt").write_text("tabby cat\ntench\n\nzero\n")
    monkeypatch.setattr(catalog, "EMBEDDED", folder)
    return folder


def test_the_embedded_teacher_has_labels_and_a_vocabulary(packaged: Path) -> None:
    teacher = load_teacher("embedded")
    assert isinstance(teacher, OpenClipTeacher)
    assert teacher.name == "embedded"
    assert teacher.identity.startswith("embedded@")
    assert teacher.default_labels == ("tabby cat", "tench", "zero")
    assert teacher.default_templates is None
    assert teacher.tokenizer.vocab_size == 1514
    assert teacher.encode_text(TEXTS).isfinite().all()
    (packaged / "templates.txt").write_text("a {}\nthe {}\n")
    assert load_teacher("embedded").default_templates == ("a {}", "the {}")


def test_no_weights_are_drawn_only_to_be_replaced() -> None:
    before = torch.get_rng_state()
    load_teacher("embedded")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_vocabulary_larger_than_the_text_tower_is_refused(packaged: Path) -> None:
    (packaged / "bpe_vocab.txt.gz").unlink()
    with pytest.raises(TeacherError, match="49408 tokens, but its text tower only 1514"):
        load_teacher("embedded")


def test_a_missing_embedded_teacher_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(catalog, "EMBEDDED", tmp_path / "none")
    with pytest.raises(TeacherError, match="missing from this installation"):
        load_teacher("embedded")


@pytest.mark.usefixtures("packaged", "hub_cache")
def test_the_default_falls_back_and_says_so() -> None:
    teacher = load_default_teacher()
    assert teacher.name == "embedded"
    (note,) = teacher.notes
    assert DEFAULT in note
    assert "HF_HUB_OFFLINE" in note
    assert "\n" not in note


@pytest.mark.usefixtures("packaged")
def test_a_damaged_default_does_not_fall_back(hub_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(b"cut off")
    write_hub_cache(hub_cache, "timm/vit_base_patch16_clip_224.openai", folder)
    with pytest.raises(TeacherError, match="damaged"):
        load_default_teacher()


# --- the catalogue and `apm teachers`


def test_the_catalogue_agrees_with_open_clip() -> None:
    registry = set(open_clip.list_pretrained())
    for entry in catalog.entries():
        assert (entry.model, entry.tag) in registry
        weights, config = open_clip.get_pretrained_cfg(entry.model, entry.tag), open_clip.get_model_config(entry.model)
        assert (entry.location, entry.quick_gelu) == (weights["hf_hub"], bool(weights.get("quick_gelu")))
        assert (entry.dim, entry.image_size) == (config["embed_dim"], config["vision_cfg"]["image_size"])
        if entry.quick_gelu:
            assert f"{entry.model}-quickgelu" in open_clip.list_models()
    if catalog.is_complete():
        listed = {(entry.model, entry.tag) for entry in catalog.entries()}
        assert {(model, tag) for model, tag in registry if not model.endswith("-quickgelu")} - listed == set()


def test_the_catalogue_counts_parameters() -> None:
    entry = catalog.find("ViT-B-16", "openai")
    assert entry is not None
    assert entry.parameters == count_parameters("ViT-B-16")
    assert catalog.find("ViT-B-16-quickgelu", "OpenAI") == entry
    assert catalog.find("ViT-B-16-quickgelu", "laion2b-s34b-b88k") is None


def test_the_list_says_what_is_on_this_machine(packaged: Path, hub_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "openai"
    folder.mkdir()
    (folder / "open_clip_model.safetensors").write_bytes(b"x" * 1234)
    write_hub_cache(hub_cache, "timm/vit_base_patch16_clip_224.openai", folder)
    rows = {row.name: row for row in list_teachers()}
    assert (rows[DEFAULT].available, rows[DEFAULT].size, rows[DEFAULT].default) == (True, 1234, True)
    assert (rows["ViT-L-14/openai"].available, rows["ViT-L-14/openai"].size) == (False, None)
    small = rows["embedded"]
    model = load_teacher("embedded").model  # type: ignore[attr-defined]
    assert small.available
    assert (small.dim, small.image_size) == (24, 32)
    assert small.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert len(list_teachers(everything=True)) == 1 + len(catalog.entries())


def run_command(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(teachers_command)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("packaged", "hub_cache")
def test_the_command_prints_a_table_or_json() -> None:
    table = run_command()
    for word in ("embedded", "ViT-B-16/openai (default)", "149.6 M", "part of apm", "hf-hub:apple/DFN5B-CLIP-ViT-H-14"):
        assert word in table
    rows = [json.loads(line) for line in run_command("--json", "--all").splitlines()]
    assert [row["name"] for row in rows] == [row.name for row in list_teachers(everything=True)]
    assert set(rows[0]) == {
        *("name", "dim", "image_size", "parameters", "size", "available", "source", "default"),
    }


@pytest.mark.slow
def test_the_command_imports_neither_torch_nor_open_clip() -> None:
    program = (
        "import sys; from apm.cli.teachers import teachers; teachers(everything=True, as_json=False, debug=False);"
        "sys.exit(bool({'torch', 'open_clip', 'timm'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
