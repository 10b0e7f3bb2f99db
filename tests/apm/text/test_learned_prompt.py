"""Learned prompts: published checkpoints are read without running anything, and errors name the cause."""

from __future__ import annotations

import collections
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from apm.benchmarks.methods import create_method
from apm.cli.main import app
from apm.errors import UsageError
from apm.text.learned_prompt import META_NET, LearnedPrompt, read_learned_prompt, read_published, write_learned_prompt
from tests.benchmarks.methods.made import SMALL, OpenTeacher, make_batch


class Bomb:
    """Runs a command when an ordinary unpickler meets it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def checkpoint(path: Path, *, conditional: bool = False, **changes: Any) -> dict[str, torch.Tensor]:
    """A checkpoint as CoOp's training code writes it; the tensors that are to be kept."""
    generator = torch.Generator().manual_seed(0)
    kept = {"ctx": torch.randn(4, 16, generator=generator)}
    if conditional:
        for name, shape in zip(META_NET, [(2, 16), (2,), (16, 2), (16,)], strict=True):
            kept[name] = torch.randn(shape, generator=generator)
    weights = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weights], lr=0.1)
    state = collections.OrderedDict(
        {**{name: tensor.half() for name, tensor in kept.items()}, "token_prefix": torch.zeros(7, 1, 16)}
    )
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    content = {
        "state_dict": state,
        "epoch": 50,
        "optimizer": optimiser.state_dict(),
        "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimiser, [1]),  # an object, with a Counter
        "val_result": collections.defaultdict(list, {"top": [1.0]}),
        **changes,
    }
    torch.save(content, path)
    return {name: tensor.half().float() for name, tensor in kept.items()}


@pytest.mark.parametrize("conditional", [False, True])
def test_a_published_checkpoint_is_converted_and_used(tmp_path: Path, conditional: bool) -> None:
    source, fired = tmp_path / "model.pth.tar-50", tmp_path / "fired"
    kept = checkpoint(source, conditional=conditional, bomb=Bomb(fired))
    with pytest.raises(Exception, match=r"Weights only"):
        torch.load(source, weights_only=True)
    done = CliRunner().invoke(app, ["prompts", "convert", str(source), "--json"])
    assert done.exit_code == 0, done.output
    method = "cocoop" if conditional else "coop"
    written = json.loads(done.stdout)
    assert written == {"path": f"{source}.safetensors", "method": method, "words": 4, "width": 16}
    assert not fired.exists()
    prompt = read_learned_prompt(Path(written["path"]))
    assert torch.equal(prompt.context, kept["ctx"])
    assert {name: tensor.tolist() for name, tensor in (prompt.meta_net or {}).items()} == {
        name: tensor.tolist() for name, tensor in kept.items() if name != "ctx"
    }
    teacher = OpenTeacher()
    for name in (method, f"tpt+{method}"):
        made = create_method(f"{name}:file={written['path']}", SMALL)
        assert made.name == f"{name}[model.pth.tar-50]"
        assert str(tmp_path) not in json.dumps(dict(made.settings))
        batch = make_batch(2, teacher)
        answer = made.predict(batch).check(made.name, batch)
        assert (answer.logits - batch.head.logits(batch.tokens())).abs().max() > 1e-2
    fired_by_torch = torch.load(source, weights_only=False)  # the bomb is one
    assert fired.exists() and fired_by_torch["bomb"] == 0


def damaged(path: Path, what: str) -> None:
    checkpoint(path)
    content = path.read_bytes()
    if what == "cut":
        path.write_bytes(content[:700])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "text":
        path.write_text("no checkpoint at all")
    elif what == "other":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, path)
    elif what == "list":
        torch.save([torch.zeros(3)], path)
    elif what == "classes":
        torch.save({"state_dict": {"ctx": torch.zeros(7, 4, 16)}}, path)
    elif what == "nan":
        torch.save({"state_dict": {"ctx": torch.full((4, 16), torch.nan)}}, path)
    elif what == "half a net":
        torch.save({"state_dict": {"ctx": torch.zeros(4, 16), META_NET[0]: torch.zeros(2, 16)}}, path)
    elif what == "another net":
        net = dict(zip(META_NET, map(torch.zeros, [(2, 16), (3,), (16, 2), (16,)]), strict=True))
        torch.save({"state_dict": {"ctx": torch.zeros(4, 16), **net}}, path)
    elif what == "old":
        torch.save({"state_dict": {"ctx": torch.zeros(4, 16)}}, path, _use_new_zipfile_serialization=False)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("cut", "damaged"),
        ("empty", "damaged"),
        ("text", "damaged"),
        ("old", "before version 1.6"),
        ("missing", "cannot be read: No such file"),
        ("other", 'has no tensor "ctx"'),
        ("list", 'has no tensor "ctx"'),
        ("classes", "class-specific"),
        ("nan", "not finite"),
        ("half a net", "has only meta_net.linear1.weight"),
        ("another net", "shapes"),
    ],
)
def test_what_is_no_checkpoint_of_coop_is_refused_in_a_line(tmp_path: Path, what: str, message: str) -> None:
    path = tmp_path / "model.pth.tar-50"
    damaged(path, what)
    with pytest.raises(UsageError, match=message):
        read_published(path)
    done = CliRunner().invoke(app, ["prompts", "convert", str(path)])
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Traceback" not in done.output
    assert not Path(f"{path}.safetensors").exists()


def test_a_learned_prompt_goes_with_its_method_and_its_teacher(tmp_path: Path) -> None:
    path, other = tmp_path / "learned.safetensors", tmp_path / "other.safetensors"
    with pytest.raises(UsageError, match="need a learned prompt"):
        create_method("coop")
    with pytest.raises(UsageError, match="cannot be read"):
        create_method(f"coop:file={path}")
    save_file({"ctx": torch.zeros(4, 16)}, path)
    with pytest.raises(UsageError, match="apm prompts convert"):
        create_method(f"coop:file={path}")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UsageError, match="not a learned prompt"):
        create_method(f"tpt+coop:file={path}")
    write_learned_prompt(path, LearnedPrompt(context=torch.zeros(4, 16), origin={"teacher": "another"}))
    with pytest.raises(UsageError, match="learned by CoOp: use it with coop"):
        create_method(f"cocoop:file={path}")
    with pytest.raises(UsageError, match='"steps"'):
        create_method(f"coop:file={path},steps=3")
    with pytest.raises(UsageError, match="its own words"):
        create_method(f"tpt+coop:file={path},prompt=a {{}}")
    teacher = OpenTeacher()
    with pytest.raises(UsageError, match="learned was learned with another, but the teacher is open CLIP"):
        create_method(f"coop:file={path}").predict(make_batch(1, teacher))
    write_learned_prompt(other, LearnedPrompt(context=torch.zeros(4, 512)))
    with pytest.raises(UsageError, match="4 word vectors of 512 numbers, and teacher open takes 4 of 16"):
        create_method(f"tpt+coop:file={other}").predict(make_batch(1, teacher))
    net = dict(zip(META_NET, map(torch.zeros, [(2, 9), (2,), (16, 2), (16,)]), strict=True))
    write_learned_prompt(other, LearnedPrompt(context=torch.zeros(4, 16), meta_net=net))
    with pytest.raises(UsageError, match="image features of 9 numbers, and teacher open gives 16"):
        create_method(f"cocoop:file={other}").predict(make_batch(1, teacher))


def test_tpt_from_the_words_themselves_is_tpt(tmp_path: Path) -> None:
    """A "learned" context that is "a photo of a" gives the answers of zero-shot and of TPT."""
    teacher, path = OpenTeacher(), tmp_path / "words.safetensors"
    tpt = create_method("tpt", SMALL)
    batch = make_batch(3, teacher)
    expected = tpt.predict(batch).logits
    words = tpt._prompt.initial  # type: ignore[attr-defined]
    write_learned_prompt(path, LearnedPrompt(context=words, origin={"teacher": teacher.identity}))
    torch.testing.assert_close(create_method(f"tpt+coop:file={path}", SMALL).predict(batch).logits, expected)
    plain = create_method(f"coop:file={path}").predict(batch).logits
    torch.testing.assert_close(plain, batch.head.logits(batch.tokens()))
