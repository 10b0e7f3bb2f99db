"""Teachers: small random models in each of open_clip's forms, and what a loaded one is."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip import pretrained
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apm.images.load import student_input
from apm.teachers import Teacher, load_teacher
from apm.teachers.openclip import OpenClipTeacher, weights_hash
from tests.apm.teachers.tiny import (
    MEAN,
    NAME,
    STD,
    TEXTS,
    TIMM_CONFIG,
    assert_same,
    pixels,
    random_model,
    save_half,
    save_plain,
    save_safe,
    save_training,
    write_folder,
    write_hub_cache,
)


@pytest.mark.parametrize(
    ("filename", "save"),
    [("w.pt", save_plain), ("epoch_3.pt", save_training), ("weights", save_plain), ("w.safetensors", save_safe)],
)
def test_checkpoints_load(
    tiny: nn.Module, tmp_path: Path, filename: str, save: Callable[[nn.Module, Path], None]
) -> None:
    path = tmp_path / filename
    save(tiny, path)
    teacher = load_teacher(f"{NAME}/{path}")
    assert_same(teacher, tiny)
    assert teacher.name == f"{NAME}/{path}"
    assert teacher.notes == ()
    assert isinstance(teacher, Teacher)


def test_half_precision_weights_become_float32(tiny: nn.Module, tmp_path: Path) -> None:
    save_half(tiny, tmp_path / "w.safetensors")
    assert_same(load_teacher(f"{NAME}/{tmp_path / 'w.safetensors'}"), copy.deepcopy(tiny).half().float())


def test_checkpoints_relative_to_here_or_home_load(
    tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_safe(tiny, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("w.safetensors", "./w.safetensors", "~/w.safetensors"):
        assert_same(load_teacher(f"{NAME}/{path}"), tiny)


def test_a_folder_loads_with_its_own_preprocessing(tiny: nn.Module, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a model", tiny, resize_mode="squash", interpolation="bilinear")
    teacher = load_teacher(f"local-dir:{folder}")
    assert_same(teacher, tiny)
    assert (teacher.mean, teacher.std) == (MEAN, STD)
    image = Image.new("RGB", (64, 20), (51, 102, 204))
    expected = (torch.tensor([0.2, 0.4, 0.8]) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(teacher.preprocess(image), expected[:, None, None].expand(3, 32, 32))


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_preprocessing_is_open_clips_own_and_leaves_torchs_threads_alone(
    mode: str, tiny: nn.Module, tmp_path: Path, picture: Path
) -> None:
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            done.append(str(func))
            return func(*args, **(kwargs or {}))

    teacher = load_teacher(f"local-dir:{write_folder(tmp_path / 'model', tiny, resize_mode=mode)}")
    config = PreprocessCfg(size=32, mean=MEAN, std=STD, resize_mode=mode)
    image, done = Image.open(picture).convert("RGB"), []
    theirs = image_transform_v2(config, is_train=False)(image)
    with Operations():  # an operation in a thread that decodes opens a team of OpenMP threads there
        ours, _ = teacher.preprocess(image), student_input(image, 224)
    assert torch.equal(ours, theirs) and set(done) <= {"aten.lift_fresh.default"}  # which `from_numpy` tells of


def test_a_folder_with_a_timm_tower_loads(tmp_path: Path) -> None:
    folder = tmp_path / "timm"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": copy.deepcopy(TIMM_CONFIG)}))
    model = random_model(f"local-dir:{folder}")
    shutil.rmtree(folder)
    assert_same(load_teacher(f"local-dir:{write_folder(folder, model, TIMM_CONFIG)}"), model, size=48)


@pytest.mark.parametrize("pickled", [False, True])
def test_a_cached_repository_loads_offline(tiny: nn.Module, tmp_path: Path, hub_cache: Path, pickled: bool) -> None:
    folder = write_folder(tmp_path / "repo", tiny)
    if pickled:
        (folder / "open_clip_model.safetensors").unlink()
        torch.save(tiny.state_dict(), folder / "open_clip_pytorch_model.bin")
    write_hub_cache(hub_cache, "someone/tiny", folder)
    teacher = load_teacher("hf-hub:someone/tiny")
    assert_same(teacher, tiny)
    assert teacher.mean == MEAN


@pytest.fixture
def tags(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the tiny model two tags, as open_clip's registry has them: trained with QuickGELU, and without."""
    common = {"url": "", "mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    openai = {**common, "hf_hub": "someone/tiny-openai/", "quick_gelu": True}
    plain = {**common, "hf_hub": "someone/tiny-plain/pytorch_model.bin"}
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"openai": openai, "plain": plain})
    monkeypatch.setitem(pretrained._PRETRAINED, f"{NAME}-quickgelu", {"openai": openai})


@pytest.mark.usefixtures("tags")
def test_quickgelu_weights_get_their_configuration(tmp_path: Path, hub_cache: Path) -> None:
    model = random_model(f"{NAME}-quickgelu")
    write_hub_cache(hub_cache, "someone/tiny-openai", write_folder(tmp_path / "repo", model))
    said = load_teacher(f"{NAME}/openai")
    assert_same(said, model)
    assert (said.mean, said.std) == (MEAN, STD)
    assert len(said.notes) == 1
    assert f"{NAME}-quickgelu configuration" in said.notes[0]
    silent = load_teacher(f"{NAME}-quickgelu/openai")
    assert_same(silent, model)
    assert silent.notes == ()
    other = load_teacher(f"{NAME}/{tmp_path / 'repo' / 'open_clip_model.safetensors'}")
    assert not torch.equal(other.encode_image(pixels()), said.encode_image(pixels()))


@pytest.mark.usefixtures("tags")
def test_a_tag_with_its_own_file_loads(tiny: nn.Module, tmp_path: Path, hub_cache: Path) -> None:
    folder = tmp_path / "repo"
    folder.mkdir()
    torch.save(tiny.state_dict(), folder / "pytorch_model.bin")
    write_hub_cache(hub_cache, "someone/tiny-plain", folder)
    teacher = load_teacher(f"{NAME}/plain")
    assert_same(teacher, tiny)
    assert teacher.notes == ()


# --- what a loaded teacher is


@pytest.fixture(scope="session")
def loaded(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> OpenClipTeacher:
    path = tmp_path_factory.mktemp("loaded") / "w.safetensors"
    save_safe(tiny, path)
    teacher = load_teacher(f"{NAME}/{path}")
    assert isinstance(teacher, OpenClipTeacher)
    return teacher


def test_a_teacher_is_frozen_and_unchanged_by_use(loaded: OpenClipTeacher, picture: Path) -> None:
    before = weights_hash(loaded.model.state_dict())
    image = loaded.encode_image(loaded.preprocess(Image.open(picture)).unsqueeze(0))
    text = loaded.encode_text(TEXTS)
    weight = torch.ones((), requires_grad=True)
    ((image * weight - text) ** 2).mean().backward()  # both can be targets of a loss
    assert not image.requires_grad
    assert not text.requires_grad
    assert image.dtype == text.dtype == torch.float32
    assert weights_hash(loaded.model.state_dict()) == before
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in loaded.model.parameters())
    assert not any(module.training for module in loaded.model.modules())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_identity_is_name_and_content(loaded: OpenClipTeacher, tiny: nn.Module, tmp_path: Path) -> None:
    name, _, digest = loaded.identity.rpartition("@")
    assert name == loaded.name
    assert len(digest) == 16
    save_plain(tiny, tmp_path / "same.pt")
    assert load_teacher(f"{NAME}/{tmp_path / 'same.pt'}").identity.endswith(f"@{digest}")
    plain, quick = (load_teacher(f"{name}/{tmp_path / 'same.pt'}") for name in (NAME, f"{NAME}-quickgelu"))
    assert [plain.settings["quick_gelu"], quick.settings["quick_gelu"]] == [False, True]
    assert plain.settings["interpolation"] == "bicubic" and plain.settings["image_size"] == plain.image_size
    assert not quick.identity.endswith(f"@{digest}")
    changed = copy.deepcopy(tiny)
    with torch.no_grad():
        changed.ln_final.weight[3] = torch.nextafter(changed.ln_final.weight[3], torch.tensor(9.0))
    save_plain(changed, tmp_path / "changed.pt")
    assert not load_teacher(f"{NAME}/{tmp_path / 'changed.pt'}").identity.endswith(f"@{digest}")


def test_the_hash_depends_on_names_types_shapes_and_bytes() -> None:
    base = {"a": torch.arange(6.0), "b": torch.tensor(1)}
    assert weights_hash(base) == weights_hash(dict(reversed(base.items())))
    variants = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].reshape(2, 3), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"] + torch.tensor([0, 0, 0, 0, 0, 1e-6]), "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({weights_hash(state) for state in [base, *variants]}) == 6
    assert weights_hash(base, also=b"x") != weights_hash(base)


def test_many_texts_are_encoded_a_few_at_a_time(loaded: OpenClipTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, sizes = loaded.tokenizer, []

    def counting(texts: list[str]) -> Tensor:
        sizes.append(len(texts))
        return tokenizer(texts)

    monkeypatch.setattr(loaded, "tokenizer", counting)
    seen: list[int] = []
    hook = loaded.model.token_embedding.register_forward_pre_hook(lambda _, ids: seen.append(ids[0].numel()))  # type: ignore[union-attr, operator, arg-type]
    texts = [f"thing {'so ' * (number % 5)}{number}" for number in range(2500)]
    features = loaded.encode_text(texts)
    hook.remove()
    assert sizes == [1024, 1024, 452]
    assert max(seen) <= 1024
    assert sum(seen) < 2500 * 10  # of 16 places each
    torch.testing.assert_close(features[2250:2252], loaded.encode_text(texts[2250:2252]), rtol=0, atol=1e-5)
    assert loaded.encode_text([]).shape == (0, 24)


def test_many_images_are_encoded_a_few_at_a_time(loaded: OpenClipTeacher) -> None:
    many = loaded.encode_image(pixels(130))
    torch.testing.assert_close(many[128:], loaded.encode_image(pixels(130)[128:]), rtol=0, atol=1e-5)


def test_very_long_images_are_cut_first_without_a_difference(
    loaded: OpenClipTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.effect_noise((20, 800), 90).convert("RGB")
    cut = loaded.preprocess(image)
    assert loaded.preprocess(Image.new("RGB", (1, 60_000))).shape == (3, 32, 32)
    monkeypatch.setattr("apm.teachers.openclip._MAX_ASPECT", 10**9)
    torch.testing.assert_close(cut, loaded.preprocess(image), rtol=0, atol=0)


def test_loading_leaves_logging_alone(tiny: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    save_safe(tiny, tmp_path / "w.safetensors")
    load_teacher(f"{NAME}/{tmp_path / 'w.safetensors'}")
    assert root.handlers == []
    assert root.filters == []
