"""Files that are no teacher, or not a sound one, are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from apm.errors import TeacherError
from apm.teachers import load_teacher
from tests.apm.teachers.tiny import CONFIG, NAME, save_plain, save_safe, write_folder


class Burglar:
    """A pickle that, read carelessly, leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_with_code_is_refused_and_not_run(registered: None, tmp_path: Path) -> None:
    loot = tmp_path / "loot"
    torch.save({"state_dict": Burglar(loot)}, tmp_path / "new.pt")
    torch.save(Burglar(loot), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Burglar(loot)))
    for filename in ("new.pt", "old.pt", "bare.pt"):
        with pytest.raises(TeacherError, match="could run code; it is refused") as caught:
            load_teacher(f"{NAME}/{tmp_path / filename}")
        assert filename in str(caught.value)
    assert not loot.exists()


@pytest.mark.parametrize("save", [save_plain, save_safe])
@pytest.mark.parametrize("kept", [0, 5, 200, -100])
def test_a_truncated_file_is_refused(
    tiny: nn.Module, tmp_path: Path, save: Callable[[nn.Module, Path], None], kept: int
) -> None:
    path = tmp_path / ("w.safetensors" if save is save_safe else "w.pt")
    save(tiny, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(TeacherError, match=r"is empty|is damaged") as caught:
        load_teacher(f"{NAME}/{path}")
    assert str(path) in str(caught.value)


def test_files_of_other_kinds_are_refused(registered: None, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "numbers.pt")
    torch.save({}, tmp_path / "nothing.pt")
    save_file({}, tmp_path / "nothing.safetensors")
    causes = {
        "text.pt": "holds no weights: it is neither",
        "text.safetensors": "damaged",
        "list.pt": "no state dict",
        "numbers.pt": "no state dict",
        "nothing.pt": "no tensors",
        "nothing.safetensors": "no tensors",
    }
    for filename, cause in causes.items():
        with pytest.raises(TeacherError, match=cause):
            load_teacher(f"{NAME}/{tmp_path / filename}")


def test_weights_of_another_model_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    state = tiny.state_dict()
    save_file({**state, "ln_final.weight": torch.ones(7)}, tmp_path / "shape.safetensors")
    state.pop("visual.conv1.weight")
    save_file(state, tmp_path / "missing.safetensors")
    for filename in ("shape", "missing"):
        with pytest.raises(TeacherError, match=f"{filename}.safetensors does not fit the model {NAME}") as caught:
            load_teacher(f"{NAME}/{tmp_path / filename}.safetensors")
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    state["ln_final.bias"][2] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(TeacherError, match=r"not finite, in 1 tensors, first ln_final\.bias"):
        load_teacher(f"{NAME}/{tmp_path / 'w.safetensors'}")


def test_incomplete_folders_are_refused(tiny: nn.Module, tmp_path: Path) -> None:
    def broken(name: str, change: Callable[[Path], Any], cause: str) -> None:
        folder = write_folder(tmp_path / name, tiny)
        change(folder)
        with pytest.raises(TeacherError, match=cause) as caught:
            load_teacher(f"local-dir:{folder}")
        assert str(folder) in str(caught.value)

    broken("no-config", lambda folder: (folder / "open_clip_config.json").unlink(), "holds no open_clip_config.json")
    broken("no-weights", lambda folder: (folder / "open_clip_model.safetensors").unlink(), "holds no weights")
    broken("no-json", lambda folder: (folder / "open_clip_config.json").write_text("{"), "not a configuration")
    wrong = {"model_cfg": {**CONFIG, "text_cfg": []}}
    broken(
        "list", lambda folder: (folder / "open_clip_config.json").write_text(json.dumps(wrong)), "not a configuration"
    )
    broken("latin", lambda folder: (folder / "labels.txt").write_bytes(b"caf\xe9"), "UTF-8")
    broken("no-model", lambda folder: (folder / "open_clip_config.json").write_text("{}"), "not a configuration")
    broken("no-folder", shutil.rmtree, "there is no folder")
    with pytest.raises(TeacherError, match="is incomplete"):
        load_teacher("local-dir:")

    def twice(folder: Path) -> None:
        for name in ("a.safetensors", "b.safetensors"):
            shutil.copy(folder / "open_clip_model.safetensors", folder / name)
        (folder / "open_clip_model.safetensors").unlink()

    broken("twice", twice, "ambiguous")


def test_a_model_of_transformers_says_what_to_install(tiny: nn.Module, tmp_path: Path, hub_cache: Path) -> None:
    if importlib.util.find_spec("transformers"):
        pytest.skip("transformers is installed")
    foreign = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "hf_tokenizer_name": "bert-base-uncased"}}
    for spec in ("ViT-B-16-SigLIP/webli", f"local-dir:{write_folder(tmp_path / 'a', tiny, foreign)}"):
        with pytest.raises(TeacherError, match="pip install transformers"):
            load_teacher(spec)
