"""`apm mae` as commands: files, messages, exit codes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from apm.cli.main import app
from apm.mae.training import load_mae
from tests.pretraining import make_folder, make_parquet, picture
from tests.schemas import schema

SIZES = (
    "--image-size", "16", "--patch-size", "4", "--width", "8", "--depth", "1", "--heads", "1",
    "--decoder-width", "8", "--decoder-depth", "1", "--decoder-heads", "1",
)  # fmt: skip
HEAD = ("--head-width", "8", "--head-depth", "1", "--head-heads", "1")
FAST = ("--steps", "2", "--batch-size", "3", "--precision", "fp32", "--device", "cpu")


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["mae", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def labelled_parquet(path: Path, count: int = 9, *, names: tuple[str, ...] = ("red fox", "owl")) -> Path:
    """Rows that say the names of their classes, whose numbers are 7 and 3."""
    rows = []
    for number in range(count):
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    labels = [(7, 3)[number % 2] for number in range(count)]
    table = {"image": rows, "label": labels, "class_name": [names[number % 2] for number in range(count)]}
    pq.write_table(pa.table(table), path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mae")
    table = make_parquet(folder / "images.parquet", 8)
    assert run("train", table, "--out", folder / "mae.safetensors", *SIZES, *FAST, "--quiet")[0] == 0
    return folder / "mae.safetensors"


def test_trains_and_is_done_with_it(tmp_path: Path) -> None:
    table, out = make_parquet(tmp_path / "images.parquet", 8), tmp_path / "runs" / "mae.safetensors"
    command = ("train", table, "--out", out, *SIZES, *FAST)
    code, said, told = run(*command)
    assert code == 0
    assert said.startswith(f"{out}: 2 steps on 7 images; held out on 1: mean squared error of masked patches ")
    assert "train: step 2 of 2: masked patches held out " in told
    rows = [json.loads(line) for line in out.with_name(out.name + ".log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2] and {"reconstruction", "held_out_reconstruction"} < rows[1].keys()
    again = run(*command)
    assert again[:2] == (0, said) and "finished: nothing left to train" in again[2]
    for changed, difference in (
        ((*command, "--masked", "0.5"), "masked: 0.75 there, 0.5 here"),
        ((*command, "--width", "12"), "width: 8 there, 12 here"),
        (("train", make_folder(tmp_path / "others", 5), *command[2:]), "data: "),
    ):
        code, said, told = run(*changed)
        assert (code, said) == (2, "") and difference in told


def test_training_goes_on_from_other_weights(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "more.safetensors"
    code, said, _ = run(
        "train", make_folder(tmp_path / "images", 5), "--out", out, "--base", base, *FAST, "--lr", "1e-9", "--quiet"
    )
    assert code == 0 and "2 steps" in said
    first, then = load_mae(base), load_mae(out)
    assert then.model.config == first.model.config  # the base's sizes, not the options'
    for name, weight in first.model.state_dict().items():
        torch.testing.assert_close(weight, then.model.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["probe", "finetune", "joint"])
def test_heads_are_trained_on_the_classes_of_the_data(base: Path, tmp_path: Path, kind: str) -> None:
    table, out = labelled_parquet(tmp_path / "images.parquet"), tmp_path / "head.safetensors"
    command = (kind, table, "--base", base, "--out", out, *HEAD, *FAST)
    code, said, told = run(*command)
    assert code == 0, told
    assert said.startswith(f"{out}: 2 steps on 8 images; held out on 1: accuracy ") and "cross-entropy " in said
    assert ("masked patches held out" in told) is (kind == "joint")
    found = load_mae(out)
    assert (found.kind, found.class_names) == (kind, ("owl", "red fox"))  # 3 before 7
    labelled_parquet(table, names=("red fox", "bat"))
    code, said, told = run(*command)
    assert (code, said) == (2, "") and "labels: " in told and "class_names" not in told


def test_class_folders_are_classes(base: Path, tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "images", 7), tmp_path / "head.safetensors"
    assert run("probe", folder, "--base", base, "--out", out, "--head-depth", "0", *FAST, "--quiet")[0] == 0
    assert load_mae(out).class_names == ("a", "b")


def test_what_was_reached_as_json(base: Path, tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "images", 7), tmp_path / "head.safetensors"
    command = ("probe", folder, "--base", base, "--out", out, *HEAD, *FAST, "--json")
    code, said, told = run(*command)
    assert code == 0 and said.count("\n") == 1 and "train: " in told
    record = json.loads(said)
    schema("cli/training.json").validate(record)
    assert record == {
        "checkpoint": str(out), "steps": 2, "images": 6, "held_out": 1, "losses": record["losses"], "skipped": [],
    }  # fmt: skip
    log = [json.loads(line) for line in out.with_name(out.name + ".log.jsonl").read_text().splitlines()]
    assert record["losses"] == {name: log[-1][f"held_out_{name}"] for name in ("cross_entropy", "accuracy")}
    table = make_parquet(tmp_path / "t.parquet", 6, broken=(4,))
    code, said, told = run("train", table, "--out", tmp_path / "m.safetensors", *SIZES, *FAST, "--json", "--quiet")
    assert code == 1 and json.loads(said)["skipped"] == ["t.parquet, row 4"] and told.count("\n") == 1
    schema("cli/training.json").validate(json.loads(said))


def test_joint_training_needs_no_base(tmp_path: Path) -> None:
    out = tmp_path / "joint.safetensors"
    code, said, _ = run("joint", make_folder(tmp_path / "images", 7), "--out", out, *SIZES, *HEAD, *FAST, "--quiet")
    assert code == 0 and "accuracy" in said and load_mae(out).kind == "joint"


def test_an_encoder_alone_is_told(base: Path, tmp_path: Path) -> None:
    weights = {
        name.removeprefix("encoder."): weight
        for name, weight in load_mae(base).model.state_dict().items()
        if name.startswith("encoder.")
    }
    torch.save(weights, tmp_path / "encoder.pth")
    out = tmp_path / "h.safetensors"
    command = ("probe", make_folder(tmp_path / "images", 7), "--base", tmp_path / "encoder.pth", "--out", out)
    code, _, told = run(*command, *HEAD, *FAST, "--quiet")
    assert code == 0 and "The base has no decoder" in told


def test_skipped_images_are_named_at_the_end(tmp_path: Path) -> None:
    table = make_parquet(tmp_path / "t.parquet", 6, broken=(4,))
    code, said, told = run("train", table, "--out", tmp_path / "m.safetensors", *SIZES, *FAST, "--quiet")
    assert code == 1 and "2 steps on 4 images" in said
    assert told.startswith("error: t.parquet, row 4: ") and told.endswith(": skipped\n") and told.count("\n") == 1


def test_wrong_use_is_told_before_anything_is_read(base: Path, tmp_path: Path) -> None:
    folder, out = make_folder(tmp_path / "images", 5), ("--out", tmp_path / "m.safetensors")
    (tmp_path / "code.pth").write_bytes(b"\x80\x04cos\nsystem\nX\x02\x00\x00\x00ls\x85R.")
    for arguments, message in (
        (("train", tmp_path / "none", *out), "none: no such folder"),
        (("train", folder, "--out", tmp_path), "is a folder; --out names the checkpoint's file"),
        (("train", folder, *out, "--patch-size", "7"), "Patches of 7 pixels do not tile"),
        (("train", folder, *out, "--masked", "1"), "masked is a share of the patches"),
        (("train", folder, *out, "--base", tmp_path / "none"), "none: no such file; name a checkpoint, or timm:NAME"),
        (("train", folder, *out, "--base", tmp_path / "code.pth"), "could run code; it is refused"),
        (("train", folder, *out, "--base", "timm:vit_smal_patch16_224"), "timm has no model vit_smal_patch16_224"),
        (("probe", folder, *out, "--base", base, "--head-width", "10"), "head_width must be a multiple of 4"),
        (("probe", tmp_path / "none", *out, "--base", base), "no such folder or file"),
        (("probe", make_folder(tmp_path / "val", 5), *out, "--base", base), '"val": what is trained on its labels'),
        (
            ("probe", make_parquet(tmp_path / "t.parquet"), *out, "--base", base),
            "does not name its classes",
        ),
        (("fine", folder, *out), 'Unknown command "fine"'),
    ):
        code, said, told = run(*arguments)
        assert (code, said) == (2, "") and message in " ".join(told.split()), (arguments, told)
    assert not list(tmp_path.glob("m.safetensors*"))
    allowed = run("probe", tmp_path / "val", *out, "--base", base, *HEAD, *FAST, "--allow-test", "--quiet")
    assert allowed[0] == 0


def test_images_without_a_class_are_refused(base: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 6)
    picture(9).save(folder / "stray.png")
    code, said, told = run(
        "probe", folder, "--base", base, "--out", tmp_path / "h.safetensors", *HEAD, *FAST, "--quiet"
    )
    assert (code, said) == (2, "") and "1 image(s) have no class, first stray.png" in told


def test_a_checkpoint_of_another_network_is_told(base: Path, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 6)
    code, _, told = run("probe", folder, "--base", base, "--out", base, *HEAD, *FAST)
    assert code == 2 and "was made with other settings" in told and "classes: 0 there, 2 here" in told
    glom = CliRunner().invoke(app, ["glom", "train", str(folder), "--out", str(base)])
    assert glom.exit_code == 2 and "is not a checkpoint of `apm glom train` but of another network" in glom.stderr
