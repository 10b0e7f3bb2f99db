"""Teachers: small random models written in each of open_clip's forms, the hub with and without a network, bad files."""

from __future__ import annotations

import copy
import gzip
import http.server
import importlib.util
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import open_clip
import pytest
import torch
import typer
from open_clip import pretrained
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from apm.cli.teachers import teachers as teachers_command
from apm.errors import TeacherError
from apm.teachers import (
    DEFAULT,
    Teacher,
    TeacherUnavailable,
    catalog,
    check_teacher,
    list_teachers,
    load_default_teacher,
    load_teacher,
)
from apm.teachers.make_catalog import count_parameters
from apm.teachers.openclip import OpenClipTeacher, weights_hash
from tests.places import ROOT

NAME = "apm-test-tiny"
TEXTS = ["a photo of a cat.", "a handwritten seven", "naïve café"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TIMM_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {
        "timm_model_name": "test_resnet",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 48,
    },
    "text_cfg": CONFIG["text_cfg"],
}


@pytest.fixture(scope="session")
def registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Make open_clip know the tiny model, with and without QuickGELU."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    (folder / f"{NAME}-quickgelu.json").write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    open_clip.add_model_config(folder)


def random_model(name: str, seed: int = 0) -> nn.Module:
    """Build a model whose weights are all large enough to matter."""
    logging.getLogger().addHandler(logging.NullHandler())
    # Frozen as a teacher is: torch takes another kernel for attention where gradients are wanted.
    model: nn.Module = open_clip.create_model(name).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="session")
def tiny(registered: None) -> nn.Module:
    return random_model(NAME)


def pixels(count: int = 3, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same(teacher: Teacher, model: Any, size: int = 32) -> None:
    """Check that the teacher answers as the model it was saved from, to rounding.

    A teacher computes its convolutions with channels last, and its texts without their padding.
    """
    ids = open_clip.SimpleTokenizer(context_length=16)(TEXTS)
    torch.testing.assert_close(
        teacher.encode_image(pixels(size=size)), model.encode_image(pixels(size=size)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(teacher.encode_text(TEXTS), model.encode_text(ids), rtol=1e-5, atol=1e-6)
    assert teacher.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert (teacher.dim, teacher.image_size) == (24, size)


def write_folder(folder: Path, model: nn.Module, config: dict[str, Any] = CONFIG, **preprocess: Any) -> Path:
    """Write open_clip's local-dir form."""
    folder.mkdir(parents=True)
    content = {"model_cfg": config, "preprocess_cfg": {"mean": MEAN, "std": STD, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_hub_cache(cache: Path, repo: str, folder: Path) -> None:
    """Lay a folder out as the hub's cache does."""
    home, commit = cache / f"models--{repo.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


# --- open_clip's forms


def save_plain(model: nn.Module, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_training(model: nn.Module, path: Path) -> None:
    """Save as open_clip's training does, from several devices."""
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}, path)


def save_half(model: nn.Module, path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, path)


def save_safe(model: nn.Module, path: Path) -> None:
    save_file(model.state_dict(), path)


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


# --- files that are refused


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
        with pytest.raises(TeacherError, match="could run code, so it is refused") as caught:
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
        "text.pt": "damaged",
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
    broken("no-json", lambda folder: (folder / "open_clip_config.json").write_text("{"), "no configuration")
    wrong = {"model_cfg": {**CONFIG, "text_cfg": []}}
    broken("list", lambda folder: (folder / "open_clip_config.json").write_text(json.dumps(wrong)), "no configuration")
    broken("latin", lambda folder: (folder / "labels.txt").write_bytes(b"caf\xe9"), "UTF-8")
    broken("no-model", lambda folder: (folder / "open_clip_config.json").write_text("{}"), "no configuration")
    broken("no-folder", shutil.rmtree, "there is no folder")
    with pytest.raises(TeacherError, match="names nothing"):
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


# --- names


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("embeded", 'Did you mean "embedded"'),
        ("ViT-B-16/opnai", 'Did you mean "ViT-B-16/openai"'),
        ("ViT-B-16", "ViT-B-16 has the tags openai, laion400m_e31"),
        ("ViT-B16/openai", 'Did you mean "ViT-B-16/openai"'),
        ("", "A teacher is NAME/TAG"),
        ("/", "A teacher is NAME/TAG"),
        ("\n\x1b[31m", "A teacher is NAME/TAG"),
        (str(ROOT), f"local-dir:{ROOT}"),
        ("ViT-B-16/none.pt", "no checkpoint file none.pt"),
        ("ViT-B-16//nowhere/weights", "no checkpoint file /nowhere/weights"),
        ("hf-hub:", "hf-hub:ORG/REPO"),
    ],
)
def test_unknown_names_say_what_is_meant(spec: str, hint: str, hub_cache: Path) -> None:
    with pytest.raises(TeacherError) as caught:
        load_teacher(spec)
    assert hint in str(caught.value)
    assert not isinstance(caught.value, TeacherUnavailable)


@pytest.mark.slow
def test_a_name_is_checked_without_loading() -> None:
    check_teacher("embedded")
    program = (
        "import sys\n"
        "from apm.errors import TeacherError\n"
        "from apm.teachers import check_teacher\n"
        "for spec in ('ViT-B-16/opnai', 'ViT-B-16/openai', 'local-dir:nowhere', 'nothing'):\n"
        "    try:\n"
        "        check_teacher(spec)\n"
        "        sys.exit(f'{spec} was found')\n"
        "    except TeacherError:\n"
        "        pass\n"
        "sys.exit(bool({'torch', 'open_clip'} & set(sys.modules)))\n"
    )
    settings = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "nowhere"}
    subprocess.run([sys.executable, "-c", program], env=os.environ | settings, cwd=ROOT, check=True)


# --- the hub


@pytest.mark.parametrize("spec", [DEFAULT, "ViT-H-14-quickgelu/dfn5b", "hf-hub:someone/nothing"])
def test_a_named_teacher_that_is_not_here_is_an_error_offline(spec: str, hub_cache: Path) -> None:
    with pytest.raises(TeacherUnavailable, match="HF_HUB_OFFLINE") as caught:
        load_teacher(spec)
    assert spec in str(caught.value)
    assert "HF_HOME" in str(caught.value)


def fetch_elsewhere(tmp_path: Path, endpoint: str, *, spec: str = DEFAULT, **variables: str) -> str:
    """Resolve a teacher in a process of its own, whose hub is `endpoint`; return the error or the path found."""
    program = (
        "import sys\n"
        "from apm.errors import TeacherError\n"
        "from apm.teachers import hub, catalog\n"
        "repo, files = hub.weight_files(catalog.find(*sys.argv[1].split('/')).location)\n"
        "try:\n"
        "    print(hub.fetch(repo, files, wanted_by=sys.argv[1]))\n"
        "except TeacherError as error:\n"
        "    print(type(error).__name__, error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    hidden = ("HF_", "HUGGING", "http_proxy", "https_proxy", "all_proxy")
    clean = {
        key: value for key, value in os.environ.items() if not key.lower().startswith(tuple(map(str.lower, hidden)))
    }
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", program, spec],
        env=clean | settings,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_a_hub_that_refuses_the_connection_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = fetch_elsewhere(tmp_path, f"http://127.0.0.1:{port}")
    assert said.startswith("TeacherUnavailable")
    assert f"127.0.0.1:{port} cannot be reached" in said


@pytest.mark.slow
def test_a_hub_that_never_answers_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        said = fetch_elsewhere(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert said.startswith("TeacherUnavailable")
    assert "cannot be reached" in said


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Serves files as the hub does, or one status for everything."""

    files: ClassVar[dict[str, bytes]] = {}
    status = 200
    asked: ClassVar[list[str]] = []

    def respond(self, *, with_body: bool) -> None:
        type(self).asked.append(f"{self.command} {self.path}")
        content = self.files.get(self.path)
        status = self.status if self.status != 200 else 200 if content is not None else 404
        body = content if content is not None and status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"0123456789abcdef"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def do_GET(self) -> None:
        self.respond(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def fake_hub() -> Iterator[tuple[type[FakeHub], str]]:
    class Handler(FakeHub):
        files: ClassVar[dict[str, bytes]] = {}
        asked: ClassVar[list[str]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield Handler, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "kind", "cause"),
    [
        (200, "TeacherError", "holds no open_clip model"),
        (401, "TeacherError", "private or gated"),
        (403, "TeacherError", "private or gated"),
        (503, "TeacherUnavailable", "answers with status 503"),
    ],
)
def test_what_a_hub_answers_is_told_apart(
    fake_hub: tuple[type[FakeHub], str], tmp_path: Path, status: int, kind: str, cause: str
) -> None:
    handler, endpoint = fake_hub
    handler.status = status
    said = fetch_elsewhere(tmp_path, endpoint)
    assert said.startswith(f"{kind} ")
    assert cause in said


@pytest.mark.slow
@pytest.mark.parametrize("filename", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_weights_are_downloaded_once(fake_hub: tuple[type[FakeHub], str], tmp_path: Path, filename: str) -> None:
    handler, endpoint = fake_hub
    handler.files[f"/timm/vit_base_patch16_clip_224.openai/resolve/main/{filename}"] = b"weights" * 999
    found = fetch_elsewhere(tmp_path, endpoint)
    assert found.startswith(str(tmp_path / "home"))
    assert Path(found).read_bytes() == b"weights" * 999
    handler.asked.clear()
    assert fetch_elsewhere(tmp_path, endpoint) == found
    assert handler.asked == []
    assert fetch_elsewhere(tmp_path, endpoint, HF_HUB_OFFLINE="1") == found
    moved = tmp_path / "home" / "hub"
    elsewhere = fetch_elsewhere(tmp_path, endpoint, HF_HOME=str(tmp_path / "other"), HF_HUB_CACHE=str(moved))
    assert elsewhere == found
    assert handler.asked == []


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


def test_a_vocabulary_larger_than_the_text_tower_is_refused(packaged: Path) -> None:
    (packaged / "bpe_vocab.txt.gz").unlink()
    with pytest.raises(TeacherError, match="49408 tokens and its text tower knows 1514"):
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
