"""Folders that anybody may have written: whatever is in them, a teacher that answers, or one line that says why not."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from apm.errors import TeacherError, UsageError
from apm.teachers import load_teacher
from apm.test_time.views import views
from tests.apm.teachers.tiny import random_model

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 714, "width": 16, "heads": 2, "layers": 1},
}
MERGES = gzip.decompress(Path(open_clip.tokenizer.default_bpe()).read_bytes()).decode().split("\n")[:201]
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "resize_mode": "squash"}

Change = Callable[[Path], Any]


def packed(lines: list[str]) -> bytes:
    return gzip.compress("\n".join(lines).encode())


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with all the files that a folder may hold."""
    folder = tmp_path_factory.mktemp("sound")
    content = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    model: nn.Module = random_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "bpe_vocab.txt.gz").write_bytes(packed(MERGES))
    (folder / "labels.txt").write_text("cat\ndog\n")
    (folder / "templates.txt").write_text("a {}.\n")
    return folder


def setting(path: str, value: Any) -> Change:
    """Set, or with `...` remove, one entry of the configuration."""

    def change(folder: Path) -> None:
        file = folder / "open_clip_config.json"
        content = json.loads(file.read_text())
        *groups, last = path.split(".")
        group = content
        for name in groups:
            group = group[name]
        if value is ...:
            del group[last]
        else:
            group[last] = value
        file.write_text(json.dumps(content))

    return change


def file(name: str, content: bytes | str) -> Change:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def weight(name: str, value: float) -> Change:
    def change(folder: Path) -> None:
        path = folder / "open_clip_model.safetensors"
        state = {key: tensor.clone() for key, tensor in load_file(path).items()}
        state[name].fill_(value)
        save_file(state, path)

    return change


VISION, TEXT, PRE = "model_cfg.vision_cfg", "model_cfg.text_cfg", "preprocess_cfg"
DEEP = '{"model_cfg":' * 100_000
REFUSED: dict[str, Change] = {
    # numbers out of all proportion
    "image size negative": setting(f"{VISION}.image_size", -16),
    "image size zero": setting(f"{VISION}.image_size", 0),
    "image size huge": setting(f"{VISION}.image_size", 10**9),
    "image size that no memory holds": setting(f"{VISION}.image_size", 2**70),
    "image size a million": setting(f"{VISION}.image_size", 10**6),
    "image size and patches for a large grid": lambda folder: (
        setting(f"{VISION}.image_size", 2048)(folder),
        setting(f"{VISION}.patch_size", 1)(folder),
    ),
    "embed dim huge": setting("model_cfg.embed_dim", 10**8),
    "embed dim negative": setting("model_cfg.embed_dim", -1),
    "width huge": setting(f"{VISION}.width", 9_999_999),
    "text width of another model": setting(f"{TEXT}.width", 100_000),
    "layers huge": setting(f"{TEXT}.layers", 10**6),
    "many layers": setting(f"{TEXT}.layers", 201),
    "layers negative": setting(f"{VISION}.layers", -3),
    "heads zero": setting(f"{TEXT}.heads", 0),
    "heads that do not divide": setting(f"{TEXT}.heads", 7),
    "head width zero": setting(f"{VISION}.head_width", 0),
    "patches larger than the image": setting(f"{VISION}.patch_size", 64),
    "vocabulary huge": setting(f"{TEXT}.vocab_size", 9_000_000),
    "context huge": setting(f"{TEXT}.context_length", 9_000_000),
    "context zero": setting(f"{TEXT}.context_length", 0),
    "MLP ratio huge": setting(f"{TEXT}.mlp_ratio", 1e6),
    # preprocessing
    "std zero": setting(f"{PRE}.std", [0.2, 0, 0.2]),
    "std negative": setting(f"{PRE}.std", [0.2, 0.2, -0.2]),
    "std NaN": setting(f"{PRE}.std", [0.2, float("nan"), 0.2]),
    "std of two channels": setting(f"{PRE}.std", [0.2, 0.2]),
    "std of words": setting(f"{PRE}.std", "abc"),
    "mean NaN": setting(f"{PRE}.mean", [float("nan")] * 3),
    "mean infinite": setting(f"{PRE}.mean", [float("inf"), 0, 0]),
    "mean null": setting(f"{PRE}.mean", None),
    "interpolation unknown": setting(f"{PRE}.interpolation", "magic"),
    "interpolation a list": setting(f"{PRE}.interpolation", []),
    "resize mode unknown": setting(f"{PRE}.resize_mode", 3),
    "colour mode unknown": setting(f"{PRE}.mode", "CMYK"),
    "preprocessing a list": setting(PRE, [1, 2]),
    # wrong types
    "embed dim a word": setting("model_cfg.embed_dim", "16"),
    "embed dim true": setting("model_cfg.embed_dim", True),
    "embed dim a fraction": setting("model_cfg.embed_dim", 16.5),
    "no embed dim": setting("model_cfg.embed_dim", ...),
    "vision a word": setting(VISION, "image_size"),
    "no vision": setting(VISION, ...),
    "text null": setting(TEXT, None),
    "text a list": setting(TEXT, []),
    "no image size": setting(f"{VISION}.image_size", ...),
    "image size of three sides": setting(f"{VISION}.image_size", [16, 16, 16]),
    "image size of words": setting(f"{VISION}.image_size", ["a", "b"]),
    "width a group": setting(f"{TEXT}.width", {"a": 1}),
    "pooling unknown": setting(f"{TEXT}.pool_type", "best"),
    "a setting that is none": setting(f"{TEXT}.sugar", 3),
    "tokenizer settings of nonsense": setting(f"{TEXT}.tokenizer_kwargs", {"clean": "nothing"}),
    "tokenizer settings a number": setting(f"{TEXT}.tokenizer_kwargs", 3),
    "a tower of timm that is none": setting(f"{VISION}.timm_model_name", "no_such_model"),
    "a tower of timm that is large": setting(f"{VISION}.timm_model_name", "vit_giant_patch14_224"),
    "model a number": setting("model_cfg", 3),
    # files
    "deep JSON": file("open_clip_config.json", DEEP),
    "deep lists": file("open_clip_config.json", "[" * 100_000),
    "deep within": setting(f"{TEXT}.tokenizer_kwargs", json.loads("[" * 50 + "]" * 50)),
    "a list": file("open_clip_config.json", "[]"),
    "a word": file("open_clip_config.json", '"model_cfg"'),
    "half a file": file("open_clip_config.json", '{"model_cfg": {'),
    "no text": file("open_clip_config.json", b"\xff\xfe\x00"),
    "a long number": file("open_clip_config.json", '{"model_cfg": ' + "9" * 5000 + "}"),
    "labels twice": file("labels.txt", "cat\ndog\nCat\n"),
    "one label": file("labels.txt", "cat\n"),
    "labels with an escape": file("labels.txt", "cat\n\x1b[31mdog\n"),
    "labels of bytes": file("labels.txt", b"cat\n\xe9\n"),
    "a template without a place": file("templates.txt", "a photo\n"),
    "vocabulary of another model": file("bpe_vocab.txt.gz", packed(MERGES[:150])),
    "vocabulary with a line twice": file("bpe_vocab.txt.gz", packed([*MERGES[:200], MERGES[5]])),
    "vocabulary of single words": file("bpe_vocab.txt.gz", packed([MERGES[0]] + ["word"] * 200)),
    "vocabulary unpacked": file("bpe_vocab.txt.gz", "\n".join(MERGES)),
    "vocabulary cut off": lambda folder: file("bpe_vocab.txt.gz", packed(MERGES)[:200])(folder),
    "vocabulary of zeros without end": file("bpe_vocab.txt.gz", gzip.compress(bytes(50_000_000))),
    "vocabulary missing": lambda folder: (folder / "bpe_vocab.txt.gz").unlink(),
    # weights
    "logit scale that overflows": weight("logit_scale", 500.0),
    "logit scale beyond all use": weight("logit_scale", 80.0),
    "logit scale that vanishes": weight("logit_scale", -200.0),
    "logit scale NaN": weight("logit_scale", float("nan")),
    "weights that overflow": weight("visual.proj", 3e38),
}


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "teacher"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_teacher_is_refused_in_one_line(folder: Path, name: str) -> None:
    REFUSED[name](folder)
    with pytest.raises(TeacherError) as caught:
        load_teacher(f"local-dir:{folder}")
    said = str(caught.value)
    assert str(folder) in said
    assert len(said) < 700
    assert said.isprintable()


@pytest.mark.parametrize("name", ["a tower of timm that is large", "image size and patches for a large grid"])
def test_a_model_much_larger_than_its_weights_is_refused_before_it_takes_memory(folder: Path, name: str) -> None:
    REFUSED[name](folder)
    with pytest.raises(TeacherError, match=r"its configuration describes [\d,]+ parameters"):
        load_teacher(f"local-dir:{folder}")


def test_the_sound_one_answers(folder: Path) -> None:
    assert len(REFUSED) >= 30
    assert_answers(folder)


@pytest.mark.parametrize(
    "change",
    [
        setting(PRE, {}),
        setting(f"{PRE}.std", 0.25),
        setting(f"{PRE}.size", 99999),
        setting(f"{PRE}.fill_color", 3),
        setting(f"{VISION}.image_size", [16, 16]),
        setting(f"{VISION}.image_size", 32),  # position codes are interpolated
        setting(f"{VISION}.image_size", [16, 24]),
        setting(f"{TEXT}.context_length", 16),
        setting(f"{TEXT}.eos_id", 3),
        setting("model_cfg.quick_gelu", True),
        setting("model_cfg.init_logit_bias", None),
        file("labels.txt", "\n\n"),
        weight("logit_scale", 4.6),
    ],
)
def test_what_can_be_one_answers(folder: Path, change: Change) -> None:
    change(folder)
    assert_answers(folder)


def test_a_teacher_that_is_not_square_answers_and_has_no_views(folder: Path) -> None:
    setting(f"{VISION}.image_size", [16, 24])(folder)
    teacher = load_teacher(f"local-dir:{folder}")
    image = Image.new("RGB", (40, 20), (9, 99, 200))
    assert teacher.preprocess(image).shape == (3, 16, 24)
    with pytest.raises(UsageError, match="24×16 pixels"):
        views(image, 8, teacher, seed=0, sample_id="a")


def assert_answers(folder: Path) -> None:
    teacher = load_teacher(f"local-dir:{folder}")
    image = teacher.encode_image(teacher.preprocess(Image.new("RGB", (40, 20), (9, 99, 200)))[None])
    text = teacher.encode_text(["cat", "dog"])
    assert image.isfinite().all()
    assert text.isfinite().all()
    assert 0 < teacher.logit_scale < 1e6


@pytest.mark.slow
def test_random_damage_to_the_configuration_is_survived(folder: Path) -> None:
    """Each value in turn is replaced by others; whatever comes of it is an answer or one line."""
    whole = json.loads((folder / "open_clip_config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    values = [None, True, -1, 0, 1, 2.5, 10**7, 1e300, "", "word", [], [1], {}, {"a": None}]
    places = [
        (group, name)
        for group in ("model_cfg", VISION, TEXT, PRE)
        for name in copy.deepcopy(whole if "." not in group else whole["model_cfg"])[group.rpartition(".")[2]]
    ]
    refused = 0
    for group, name in places:
        for number in torch.randperm(len(values), generator=generator)[:4].tolist():
            (folder / "open_clip_config.json").write_text(json.dumps(whole))
            setting(f"{group}.{name}", values[number])(folder)
            try:
                assert_answers(folder)
            except TeacherError as error:
                refused += 1
                assert str(error).isprintable()
                assert len(str(error)) < 700
    assert refused > 2 * len(places)
