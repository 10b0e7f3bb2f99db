"""CLIP as OpenAI publishes it: a TorchScript archive, of which weights are read and nothing is run; its state dict."""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from apm.errors import TeacherError
from apm.teachers import load_teacher
from apm.teachers.checkpoint import read_checkpoint
from apm.teachers.openclip import OpenClipTeacher
from tests.apm.teachers.tiny import NAME, pixels, random_model, write_folder

EXTRA = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(49408)}


class Holder(nn.Module):
    """A module of any state dict's names, as torch.jit can save it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def holder(state: dict[str, Tensor]) -> Holder:
    """Nest modules so that their state dict is `state`."""
    root = Holder()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        module: nn.Module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, Holder())
            module = module.get_submodule(parent)
        module.register_buffer(last, tensor)
    return root


def save_archive(state: dict[str, Tensor], path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; OpenAI's files are what they are
        torch.jit.script(holder(state)).save(str(path))


def save_state(state: dict[str, Any], path: Path) -> None:
    torch.save(state, path)


def save_numbers(state: dict[str, Any], path: Path) -> None:
    torch.save({name: int(value) if name in EXTRA else value for name, value in state.items()}, path)


def save_safe(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


@pytest.fixture(scope="session")
def quick(registered: None) -> nn.Module:
    return random_model(f"{NAME}-quickgelu")


def published(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model as OpenAI writes it: half precision, and three entries more."""
    return {**{name: tensor.half() for name, tensor in model.state_dict().items()}, **EXTRA}


@torch.no_grad()
def assert_answers_as(teacher: Any, model: Any) -> None:
    half = copy.deepcopy(model).half().float()
    texts = ["a photo of a cat.", "naïve café"]
    ids = open_clip.SimpleTokenizer(context_length=16)(texts)
    torch.testing.assert_close(teacher.encode_image(pixels()), half.encode_image(pixels()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(teacher.encode_text(texts), half.encode_text(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("filename", "save"),
    [("clip.pt", save_archive), ("s.pt", save_state), ("n.pt", save_numbers), ("s.safetensors", save_safe)],
)
@pytest.mark.parametrize("name", [NAME, f"{NAME}-quickgelu"])
def test_openais_own_files_load_with_quickgelu(
    quick: nn.Module, tmp_path: Path, filename: str, save: Callable[[dict[str, Tensor], Path], None], name: str
) -> None:
    save(published(quick), tmp_path / filename)
    teacher = load_teacher(f"{name}/{tmp_path / filename}")
    assert_answers_as(teacher, quick)
    said = [note for note in teacher.notes if "QuickGELU" in note]
    assert len(said) == (name == NAME)  # where the name says it already, nothing is to be told


def test_the_same_weights_have_the_same_identity(quick: nn.Module, tmp_path: Path) -> None:
    save_archive(published(quick), tmp_path / "a.pt")
    save_state(published(quick), tmp_path / "b.pt")
    first, second, third = (
        load_teacher(f"{name}/{tmp_path / file}").identity.rpartition("@")[2]
        for name, file in ((NAME, "a.pt"), (NAME, "b.pt"), (f"{NAME}-quickgelu", "b.pt"))
    )
    assert first == second == third


def test_a_folder_takes_openais_file_too(quick: nn.Module, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "folder", quick)
    (folder / "open_clip_model.safetensors").unlink()
    save_archive(published(quick), folder / "open_clip_pytorch_model.bin")
    assert_answers_as(load_teacher(f"local-dir:{folder}"), quick)


def test_an_archive_of_another_model_loads_as_its_configuration_says(quick: nn.Module, tmp_path: Path) -> None:
    plain = random_model(NAME)
    buffers = {name: tensor for name, tensor in plain.named_buffers() if name not in plain.state_dict()}
    assert buffers  # the causal mask: an archive holds it, a state dict does not
    save_archive({**{name: tensor.half() for name, tensor in plain.state_dict().items()}, **buffers}, tmp_path / "a.pt")
    teacher = load_teacher(f"{NAME}/{tmp_path / 'a.pt'}")
    assert isinstance(teacher, OpenClipTeacher)
    assert teacher.notes == ()
    assert_answers_as(teacher, plain)


def test_weights_that_share_a_storage_are_read(tmp_path: Path) -> None:
    shared = torch.arange(24.0).reshape(4, 6)
    save_archive({"a": shared, "b.c": shared.T[1:4], "d": torch.zeros(0), "e": torch.tensor(7)}, tmp_path / "a.pt")
    state = read_checkpoint(tmp_path / "a.pt").state
    assert state is not None
    assert torch.equal(state["a"], shared)
    assert torch.equal(state["b.c"], shared.T[1:4])
    assert state["d"].shape == (0,)
    assert state["e"] == 7


# --- archives that somebody has tampered with


class Call:
    """A pickle that, read carelessly, calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def rewritten(path: Path, member: str, content: bytes, *, compress: bool = False) -> Path:
    """A copy of an archive with another content of one member."""
    copied = path.with_name("tampered.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copied, "w") as new:
        for info in old.infolist():
            data = content if info.filename.endswith(member) else old.read(info)
            new.writestr(info.filename, data, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
    return copied


@pytest.fixture(scope="module")
def archived(quick: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archived") / "clip.pt"
    save_archive(published(quick), path)
    return path


@pytest.fixture
def archive(archived: Path, tmp_path: Path) -> Path:
    """Return an archive that a test may spoil."""
    return Path(shutil.copy(archived, tmp_path))


def test_nothing_of_an_archive_is_run(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loot = tmp_path / "loot"
    for content in (
        Call(os.mkdir, str(loot)),
        {"weights": Call(os.system, f"mkdir {loot}")},
        Call(eval, f"__import__('os').mkdir({str(loot)!r})"),
        Call(shutil.rmtree, str(tmp_path / "clip.pt")),
    ):
        with pytest.raises(TeacherError, match=r"is damaged|holds no tensors"):
            load_teacher(f"{NAME}/{rewritten(archive, '/data.pkl', pickle.dumps(content, protocol=2))}")
    assert not loot.exists()

    def never(*_arguments: Any, **_named: Any) -> None:
        raise AssertionError("torch.jit was asked to load an archive")

    monkeypatch.setattr(torch.jit, "load", never)
    changed = rewritten(archive, ".py", b"import os; os.mkdir('loot')")  # the code is not even looked at
    load_teacher(f"{NAME}/{changed}")


class Stored:
    """What the pickle of an archive names a storage by, with a tensor that is to be made of it."""

    def __init__(self, key: Any, offset: Any, size: Any, stride: Any) -> None:
        self.key, self.tensor = key, (offset, size, stride)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, (Key(self.key), *self.tensor, False, {})


class Key:
    def __init__(self, key: Any) -> None:
        self.key = key


class Pickler(pickle.Pickler):
    def persistent_id(self, thing: Any) -> Any:
        return ("storage", torch.FloatStorage, thing.key, "cpu", 4) if isinstance(thing, Key) else None


class Module:
    """An object with attributes, as an archive's module is one."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (10**12,), (1,)),
        (10**9, (1,), (1,)),
        (0, (2,), (10**15,)),
        (-1, (1,), (1,)),
        (0, (-5,), (1,)),
        (0, ("a",), (1,)),
        (0, (2, 2), (1,)),
        (0, 3, 1),
        (2**70, (1,), (1,)),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    archive: Path, registered: None, offset: Any, size: Any, stride: Any
) -> None:
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(Module(weight=Stored("0", offset, size, stride)))
    with pytest.raises(TeacherError, match="is damaged"):
        load_teacher(f"{NAME}/{rewritten(archive, '/data.pkl', stream.getvalue())}")


def test_damaged_archives_are_refused(archive: Path, tmp_path: Path) -> None:
    good = archive.read_bytes()

    def refused(path: Path, cause: str) -> None:
        with pytest.raises(TeacherError, match=cause) as caught:
            load_teacher(f"{NAME}/{path}")
        assert "\n" not in str(caught.value)

    for content in (b"", b"3", b"\x80\x02.", b"\x80\x02]q\x00h\x00a."):
        refused(rewritten(archive, "/data.pkl", content), "is damaged")
    refused(rewritten(archive, "/data/0", b"short"), "is damaged")
    refused(rewritten(archive, "nothing", b"", compress=True), "is damaged")
    circle = Module(name="a")
    circle.itself = circle  # type: ignore[attr-defined]
    stream = io.BytesIO()
    Pickler(stream, protocol=2).dump(circle)
    refused(rewritten(archive, "/data.pkl", stream.getvalue()), "holds no tensors")
    for kept in (10, len(good) // 2, len(good) - 5):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(good[:kept])
        refused(cut, "is damaged")
    other = tmp_path / "other.pt"
    save_archive({"something": torch.zeros(3)}, other)
    refused(other, f"does not fit the model {NAME}")
