"""Folders of classes, and what users get wrong, on small trees laid out as users have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apm.benchmarks.datasets import DATASETS, SUITES, expand, find, open_dataset
from apm.errors import ImageError, UsageError, did_you_mean
from apm.labels import imagenet_names
from tests.benchmarks.datasets.trees import WNIDS, split_json, tree, wnids_of, write

# ------------------------------------------------------------------------------------------------------- folder


def test_folder_of_wnids_gets_imagenets_names_of_the_classes_present(tmp_path: Path) -> None:
    tree(tmp_path, [WNIDS[217], WNIDS[0]])
    data = open_dataset("folder", tmp_path)
    assert data.class_names == (imagenet_names()[0], imagenet_names()[217])
    assert [s.label for s in data.samples] == [0, 0, 1, 1]
    assert any("2 classes present" in note for note in data.notes)
    whole = open_dataset("folder", tmp_path, label_set="imagenet")
    assert len(whole.class_names) == 1000 and [s.label for s in whole.samples] == [0, 0, 217, 217]
    part = open_dataset("folder", tmp_path, label_set="imagenette")
    assert [s.label for s in part.samples] == [0, 0, 1, 1] and len(part.class_names) == 10


def test_folder_of_plain_classes(tmp_path: Path) -> None:
    tree(tmp_path, ["wild_cat", "Dog"])
    data = open_dataset("folder", tmp_path)
    assert data.class_names == ("Dog", "wild cat")
    (tmp_path / "wild_cat").rename(tmp_path / "cat")
    assert [s.label for s in open_dataset("folder", tmp_path, label_set="cifar10").samples] == [5, 5, 3, 3]
    with pytest.raises(UsageError, match="Dog"):
        open_dataset("folder", tmp_path, label_set="imagenet")


def test_of_two_classes_of_a_label_set_with_one_name_the_first_is_meant(tmp_path: Path) -> None:
    """Their logits are equal, and of equal ones the first is the prediction."""
    twice = next(name for name in imagenet_names() if imagenet_names().count(name) > 1)
    tree(tmp_path, [twice, imagenet_names()[0]])
    data = open_dataset("folder", tmp_path, label_set="imagenet")
    assert {s.label for s in data.samples} == {0, imagenet_names().index(twice)}


def test_folder_with_images_folder_in_each_class_as_tiny_imagenet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "images" / "1.png")
    assert [s.id for s in open_dataset("folder", tmp_path).samples] == ["a/images/1.png", "b/images/1.png"]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([WNIDS[0], "cat"], "mixes wnids"),
        ([WNIDS[0], "n99999999"], "not wnids of ImageNet-1k: n99999999"),
        (["one"], "only one class"),
    ],
)
def test_folder_mistakes(classes: list[str], words: str, tmp_path: Path) -> None:
    tree(tmp_path, classes)
    with pytest.raises(UsageError, match=words):
        open_dataset("folder", tmp_path)


def test_a_folder_whose_pictures_are_all_in_one_class_is_a_wrong_parent(tmp_path: Path) -> None:
    tree(tmp_path / "pets", ["images"])
    tree(tmp_path / "textures", ["banded", "dotted"])
    with pytest.raises(UsageError, match=r"only pets contains pictures.*wrong parent"):
        open_dataset("folder", tmp_path)


def test_folder_one_level_too_high_names_the_right_one(tmp_path: Path) -> None:
    tree(tmp_path / "val", ["a", "b"])
    with pytest.raises(UsageError, match=f"Did you mean {tmp_path / 'val'}"):
        open_dataset("folder", tmp_path)


# ------------------------------------------------------------------------------------------------------ mistakes


def flat(root: Path) -> None:
    write(root / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")


def plain(root: Path) -> None:
    tree(root / "imagenet" / "val", ["cats", "dogs"])


def too_high(root: Path) -> None:
    tree(root / "x" / "y", wnids_of("imagenet"))


def integers(root: Path) -> None:
    tree(root / "imagenet" / "val", ["0", "1"])


def train(root: Path) -> None:
    tree(root / "train", wnids_of("imagenet"))


def whole_instead_of_subset(root: Path) -> None:
    tree(root / "imagenet-a", [WNIDS[0], WNIDS[1], *wnids_of("imagenet-a")])


def doubled(root: Path) -> None:
    tree(root / "imagenet" / "val" / "val", wnids_of("imagenet"))


def only_train(root: Path) -> None:
    tree(root / "imagenet" / "train", wnids_of("imagenet"))


def train_and_val(root: Path) -> None:
    only_train(root)
    tree(root / "imagenet" / "val", wnids_of("imagenet"))


def kaggle(root: Path) -> None:
    write(root / "ILSVRC" / "Data" / "CLS-LOC" / "val" / "ILSVRC2012_val_00000001.JPEG")
    tree(root / "ILSVRC" / "Data" / "CLS-LOC" / "train", wnids_of("imagenet"))


def fog(root: Path) -> None:
    tree(root / "ImageNet-C" / "fog" / "5", wnids_of("imagenet"))


def loop(root: Path) -> None:
    (root / "sub").mkdir()
    (root / "sub" / "imagenet").symlink_to(root)


def archives(root: Path) -> None:
    for name in ("ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        (root / name).write_bytes(b"packed")


def unmounted(root: Path) -> None:
    (root / "imagenet").symlink_to(root / "drive")


def no_levels(root: Path) -> None:
    tree(root / "ImageNet-C" / "fog", wnids_of("imagenet"))
    tree(root / "fog" / "3", wnids_of("imagenet"))


def groups(root: Path) -> None:
    tree(root / "weather" / "fog" / "5", wnids_of("imagenet"))


def sketch(root: Path) -> None:
    tree(root / "ImageNet-Sketch", wnids_of("imagenet"))


def rendition(root: Path) -> None:
    for wnid in wnids_of("imagenet-r", 200):
        (root / "r" / wnid).mkdir(parents=True)


def nothing(root: Path) -> None:
    (root / "something").mkdir()


@pytest.mark.parametrize(
    ("name", "below", "lay", "words"),
    [
        ("imagenet", "", flat, "without class folders"),
        ("imagenet", "imagenet/val", flat, "without class folders"),
        ("imagenet", "", plain, "not wnids: cats, dogs"),
        ("imagenet", "", too_high, "Did you mean .*x/y"),
        ("imagenet", "", doubled, "Did you mean .*imagenet/val/val"),
        ("imagenet", "", integers, "imagenet-v2"),
        ("imagenet", "train", train, "training part; give the validation part, which is not beside it"),
        ("imagenet", "imagenet/train", train_and_val, "training part; give the validation part: .*imagenet/val"),
        ("imagenet", "", only_train, "imagenet/train is the training part; the validation part is wanted"),
        ("imagenet", "", kaggle, r"CLS-LOC/val holds 1 files ILSVRC2012_val_.*LOC_val_solution\.csv"),
        ("imagenet", "ILSVRC", kaggle, "without class folders"),
        ("imagenet", f"imagenet/val/{WNIDS[0]}", train_and_val, "folder of one class.*all classes: .*imagenet/val"),
        ("imagenet", "", fog, "nothing that fits"),
        ("imagenet", "ImageNet-C", fog, "is a part of ImageNet-C: name the data set imagenet-c"),
        ("imagenet", "ImageNet-C/fog", fog, "is a part of ImageNet-C: name the data set imagenet-c"),
        ("imagenet-v2", "ImageNet-C/fog", fog, "is a part of ImageNet-C: name the data set imagenet-c"),
        ("imagenet-a", "ImageNet-C/fog/5", fog, "class folders .* are not among its 200"),
        ("imagenet", "", loop, "nothing that fits"),
        ("imagenet", "", archives, "archives that are not unpacked: ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_val"),
        ("imagenet", "", unmounted, "imagenet is a link to what is not there"),
        ("imagenet", "", groups, "is a part of ImageNet-C: name the data set imagenet-c"),
        ("imagenet", "", sketch, "ImageNet-Sketch is imagenet-sketch, another data set"),
        ("imagenet", "", rendition, "r is imagenet-r, another data set"),
        (
            "imagenet-a",
            "",
            whole_instead_of_subset,
            "2 of 6 class folders .* its 200 classes.*They fit imagenet",
        ),
        ("imagenet", "", nothing, "nothing that fits"),
        ("imagenet", "absent", nothing, "is not a folder"),
    ],
)
def test_mistakes_are_named(name: str, below: str, lay: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    lay(tmp_path)
    with pytest.raises(UsageError, match=words):
        open_dataset(name, tmp_path / below)
    assert find(name, tmp_path / "absent") is None


def test_folders_that_may_not_be_read_do_not_hide_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> list[str]:
        raise UsageError(f"Cannot read the folder {folder}: Permission denied.")

    (tmp_path / "private").mkdir()
    monkeypatch.setattr("apm.benchmarks.datasets.layouts.image_names", refuse)
    with pytest.raises(UsageError, match="nothing that fits"):
        open_dataset("imagenet", tmp_path)


def test_an_absent_level_of_imagenet_c_says_what_is_there(tmp_path: Path) -> None:
    no_levels(tmp_path)
    with pytest.raises(UsageError, match=r"ImageNet-C/fog holds no folder 5 with class folders, but n\d{8}, "):
        open_dataset("imagenet-c", tmp_path, corruption="fog", level=5)
    with pytest.raises(UsageError, match=r"tmp.*/fog holds no folder 5 with class folders, but 3\."):
        open_dataset("imagenet-c", tmp_path / "fog", corruption="fog", level=5)
    assert open_dataset("imagenet-c", tmp_path, corruption="fog", level=3).layout == "fog/3/<wnid>/"


@pytest.mark.parametrize("place", ["imagenet-sketch/images", "ImageNet-Sketch", "r"])
def test_another_set_of_imagenets_classes_does_not_pass_as_imagenet(place: str, tmp_path: Path) -> None:
    name = "imagenet-r" if place == "r" else "imagenet-sketch"
    tree(tmp_path / place, wnids_of(DATASETS[name].label_space, 200 if place == "r" else 2), images=1)
    data = open_dataset("imagenet", tmp_path / place)
    assert [warning for warning in data.warnings if f"is {name}: do not report it as imagenet" in warning]
    assert not open_dataset(name, tmp_path / place).warnings


def test_a_train_folder_is_never_suggested(tmp_path: Path) -> None:
    only_train(tmp_path)
    with pytest.raises(UsageError) as caught:
        open_dataset("imagenet", tmp_path)
    assert "Did you mean" not in str(caught.value)


def test_what_was_given_is_never_suggested(tmp_path: Path) -> None:
    for name, names in SUITES.items():
        with pytest.raises(UsageError, match=f"{name} is a suite.*{names[0]}") as caught:
            open_dataset(name, tmp_path)
        assert "Did you mean" not in str(caught.value)
    assert did_you_mean("fog", ["fog", "frog"]) == ' Did you mean "frog"?'


@pytest.mark.parametrize("name", [name for name, spec in DATASETS.items() if spec.layouts])
def test_missing_data_say_layouts_and_origin(name: str, tmp_path: Path) -> None:
    spec = DATASETS[name]
    corruption = "fog" if spec.reader == "corrupted" else None
    for root in (None, tmp_path):
        with pytest.raises(UsageError) as caught:
            open_dataset(name, root, corruption=corruption)
        text = str(caught.value)
        shown = [layout.format(corruption="<corruption>", level="<1-5>", group="<group>") for layout in spec.layouts]
        assert all(layout in text for layout in shown) and spec.origin in text and spec.split_file in text


def test_folders_of_another_set_are_not_suggested(tmp_path: Path) -> None:
    tree(tmp_path / "x" / "y", [WNIDS[0], *wnids_of("imagenet-a")])
    with pytest.raises(UsageError, match="nothing that fits"):
        open_dataset("imagenet-a", tmp_path)


def test_split_json_mistakes(tmp_path: Path) -> None:
    write(tmp_path / "dtd" / "images" / "a.jpg")
    with pytest.raises(UsageError, match=r"is there, but .*split_zhou_DescribableTextures\.json is not"):
        open_dataset("dtd", tmp_path)
    split_json(tmp_path / "eurosat" / "split_zhou_EuroSAT.json", [["a.jpg", 0, "a"]])
    with pytest.raises(UsageError, match=r"the folder of images .*2750 is not"):
        open_dataset("eurosat", tmp_path / "eurosat")


def test_unknown_names_suggest_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='Did you mean "imagenet-a"'):
        open_dataset("imagnet-a", tmp_path)
    with pytest.raises(UsageError, match='"natural-shifts"'):
        expand(["natural-shift"])
    assert expand(["cross-dataset", "dtd", "natural-shifts"]) == (*SUITES["cross-dataset"], *SUITES["natural-shifts"])


def test_a_suite_is_a_table_of_the_paper() -> None:
    assert len(SUITES["natural-shifts"]) == 5 and len(SUITES["cross-dataset"]) == 9
    assert set(SUITES["natural-shifts"]) | set(SUITES["cross-dataset"]) < set(DATASETS)


def test_damaged_image_is_its_own_error(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"])
    (tmp_path / "a" / "a_0.png").write_bytes(b"not a picture")
    (tmp_path / "b" / "b_0.png").write_bytes((tmp_path / "b" / "b_0.png").read_bytes()[:200])
    data = open_dataset("folder", tmp_path)
    for sample in (data.samples[0], data.samples[2]):
        with pytest.raises(ImageError, match=r"damaged or truncated image|not an image"):
            sample.load()
    assert data.samples[1].load().size == (40, 36)


def test_wide_grey_pictures_are_scaled_and_strips_refused(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"])
    values = np.arange(40 * 36, dtype=np.uint16).reshape(36, 40) * 45  # 0 … 64,755
    Image.fromarray(values).save(tmp_path / "a" / "a_0.png")
    Image.new("RGB", (3000, 2)).save(tmp_path / "a" / "a_1.png")
    data = open_dataset("folder", tmp_path)
    grey = np.asarray(data.samples[0].load())[..., 0]
    assert np.abs(grey - values / 257).max() <= 0.5
    with pytest.raises(ImageError, match=r"a_1\.png: 3000×2 pixels is a strip"):
        data.samples[1].load()


def test_dead_links_of_pictures_become_error_rows_and_are_counted(tmp_path: Path) -> None:
    folder = tree(tmp_path / "imagenet" / "val", wnids_of("imagenet"))
    first, second, third, _ = wnids_of("imagenet")
    for dead in (folder / first / "gone.JPEG", folder / second / "gone.JPEG", folder / "n99999999"):
        dead.symlink_to(tmp_path / "unmounted" / dead.name)
    (folder / third / "alive.png").symlink_to(folder / first / f"{first}_0.png")
    data = open_dataset("imagenet", tmp_path)
    assert len(data.samples) == 4 * 2 + 2 + 1
    assert any(
        note.startswith("2 picture(s) are links to files") and f"{first}/gone.JPEG" in note for note in data.notes
    )
    assert any("1 link(s)" in note and "n99999999" in note for note in data.notes)
    gone = next(sample for sample in data.samples if sample.id == f"{second}/gone.JPEG")
    with pytest.raises(ImageError, match=r"gone\.JPEG: a link to a file that is not there"):
        gone.load()
    plain = tree(tmp_path / "pets", ["cat", "dog"], images=1)
    (plain / "cat" / "gone.png").symlink_to("nowhere.png")
    assert any("1 picture(s) are links" in note for note in open_dataset("folder", plain).notes)
    for picture in plain.glob("*/*_0.png"):
        picture.unlink()
    (plain / "dog" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UsageError, match=r"All 2 pictures .* are links to files that are not there"):
        open_dataset("folder", plain)
