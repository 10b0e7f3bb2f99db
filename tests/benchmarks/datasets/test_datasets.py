"""Layouts, labels, subsets and mistakes, on small trees laid out as users have them."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apm.benchmarks.corruptions import CORRUPTIONS
from apm.benchmarks.datasets import DATASETS, SUITES, DatasetSpec, Sample, balanced_subset, expand, find, open_dataset
from apm.benchmarks.datasets.specs import CORRUPTION_GROUPS
from apm.errors import ImageError, UsageError, did_you_mean
from apm.labels import imagenet_names, imagenet_subset, imagenet_wnids
from apm.teachers.digits import digits_split

WNIDS = imagenet_wnids()


def write(path: Path, value: int = 0, size: tuple[int, int] = (40, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def tree(folder: Path, classes: Sequence[str], images: int = 2) -> Path:
    for name in classes:
        for number in range(images):
            write(folder / name / f"{name}_{number}.png", number)
    return folder


def split_json(path: Path, test: list[list[object]], train: list[list[object]] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"train": train or [], "val": [], "test": test}))


def wnids_of(label_space: str, count: int = 4) -> list[str]:
    return [WNIDS[index] for index in imagenet_subset(label_space)[:count]]


WNID_SETS = ("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch")
LAYOUTS = [(name, layout) for name in WNID_SETS for layout in DATASETS[name].layouts]


# ----------------------------------------------------------------------------------------------- layouts, labels


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_wnid_layout_is_recognised_and_named(name: str, layout: str, tmp_path: Path) -> None:
    spec = DATASETS[name]
    tree(tmp_path / layout, wnids_of(spec.label_space))
    data = open_dataset(name, tmp_path)
    assert data.layout == f"{layout}/<wnid>/"
    assert [sample.label for sample in data.samples] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(data.class_names) == spec.classes
    assert data.class_names[3] == imagenet_names()[imagenet_subset(spec.label_space)[3]]
    assert data.samples[0].id == f"{wnids_of(spec.label_space)[0]}/{wnids_of(spec.label_space)[0]}_0.png"
    assert data.samples[0].load().mode == "RGB"
    assert any("8 images" in note for note in data.notes) and any("4 of" in note for note in data.notes)
    found = find(name, tmp_path)
    assert found is not None and found.layout == data.layout


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("imagenet", "ILSVRC/Data/CLS-LOC/val"),  # as Kaggle's archive unpacks
        ("imagenet", "imagenet/images/val"),  # CoOp and TPT
        ("imagenet-a", "imagenet-adversarial/imagenet-a"),
        ("imagenet-r", "imagenet-rendition/imagenet-r"),
        ("imagenet-sketch", "imagenet-sketch/images"),
        ("imagenet-sketch", "ImageNet-Sketch/sketch"),  # its own archive
    ],
)
def test_the_folders_of_publishers_and_peers_are_known(name: str, layout: str, tmp_path: Path) -> None:
    tree(tmp_path / layout, wnids_of(DATASETS[name].label_space))
    assert open_dataset(name, tmp_path).layout == f"{layout}/<wnid>/"


def test_first_layout_wins(tmp_path: Path) -> None:
    tree(tmp_path / "imagenet" / "val", wnids_of("imagenet", 2))
    tree(tmp_path / "imagenet" / "images" / "val", wnids_of("imagenet", 3))
    assert open_dataset("imagenet", tmp_path).layout == "imagenet/images/val/<wnid>/"


@pytest.mark.parametrize(("below", "layout"), [("imagenet", "val/<wnid>/"), ("imagenet/val", "./<wnid>/")])
def test_explicit_path_works_at_any_depth(below: str, layout: str, tmp_path: Path) -> None:
    tree(tmp_path / "imagenet" / "val", wnids_of("imagenet"))
    data = open_dataset("imagenet", tmp_path / below)
    assert data.layout == layout
    assert data.fingerprint == open_dataset("imagenet", tmp_path).fingerprint


def test_root_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "imagenet-a", wnids_of("imagenet-a"))
    monkeypatch.setenv("APM_DATA", str(tmp_path))
    assert len(open_dataset("imagenet-a").samples) == 8


@pytest.mark.parametrize("layout", DATASETS["imagenet-v2"].layouts)
def test_v2_folders_are_numbers_not_text(layout: str, tmp_path: Path) -> None:
    tree(tmp_path / layout, ["0", "2", "10", "100", "999"], images=1)
    data = open_dataset("imagenet-v2", tmp_path)
    assert [sample.label for sample in data.samples] == [0, 2, 10, 100, 999]
    named = "matched-frequency" if "matched-frequency" in layout else "variant-unknown"
    assert data.layout == f"{layout}/<0..999>/ ({named})" and data.variant == named


V2_FOLDERS = {
    "matched-frequency": ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency"),
    "threshold-0.7": ("imagenetv2-threshold0.7-format-val", "imagenetv2-threshold-0.7", "ImageNetV2-threshold0.7"),
    "top-images": ("imagenetv2-top-images-format-val", "imagenetv2-topimages", "ImageNetV2-topimages"),
    "variant-unknown": ("v2",),
}


@pytest.mark.parametrize(("variant", "folder"), [(v, folder) for v, names in V2_FOLDERS.items() for folder in names])
def test_v2_variants_are_told_by_the_folders_name(variant: str, folder: str, tmp_path: Path) -> None:
    tree(tmp_path / folder, ["0", "1"])
    data = open_dataset("imagenet-v2", tmp_path / folder)
    assert data.variant == variant
    if variant == "matched-frequency":
        assert data.title == data.cell == "imagenet-v2" and not data.warnings
        return
    assert data.title == data.cell == f"imagenet-v2-{variant}"
    assert len(data.warnings) == 1 and "Published numbers" in data.warnings[0] and variant in data.warnings[0]
    linked = tmp_path / "imagenetv2-matched-frequency-format-val"
    linked.symlink_to(tmp_path / folder)  # the name of what is meant counts, unless it tells nothing
    assert open_dataset("imagenet-v2", tmp_path).variant == variant


def test_v2_with_more_pictures_than_a_variant_has_is_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "imagenetv2-matched-frequency-format-val", ["0", "1"], images=3)
    monkeypatch.setitem(DATASETS, "imagenet-v2", replace(DATASETS["imagenet-v2"], images=6))
    assert open_dataset("imagenet-v2", tmp_path).title == "imagenet-v2"
    monkeypatch.setitem(DATASETS, "imagenet-v2", replace(DATASETS["imagenet-v2"], images=5))
    data = open_dataset("imagenet-v2", tmp_path)
    assert data.title == "imagenet-v2-variant-unknown" and "its number of pictures" in data.warnings[0]


def test_another_variant_of_v2_is_never_suggested(tmp_path: Path) -> None:
    tree(tmp_path / "x" / "imagenetv2-top-images-format-val", ["0", "1"])
    with pytest.raises(UsageError, match="another variant, top-images; published numbers are on matched") as caught:
        open_dataset("imagenet-v2", tmp_path)
    assert "Did you mean" not in str(caught.value)
    tree(tmp_path / "y" / "imagenetv2-matched-frequency-format-val", ["0", "1"])
    with pytest.raises(UsageError, match=r"Did you mean .*y/imagenetv2-matched-frequency-format-val"):
        open_dataset("imagenet-v2", tmp_path)


@pytest.mark.parametrize(("folders", "words"), [(["0", "1000"], "outside"), (["1", "01"], "twice")])
def test_v2_numbers_that_are_no_classes(folders: list[str], words: str, tmp_path: Path) -> None:
    tree(tmp_path / "imagenet-v2", folders)
    with pytest.raises(UsageError, match=words):
        open_dataset("imagenet-v2", tmp_path)


def test_files_that_are_no_images_are_skipped(tmp_path: Path) -> None:
    folder = tree(tmp_path / "imagenet-a", wnids_of("imagenet-a"))
    (folder / "README.txt").write_text("read me")
    (folder / wnids_of("imagenet-a")[0] / "._n01498041_0.png").write_bytes(b"macOS")
    (folder / wnids_of("imagenet-a")[0] / "Thumbs.db").write_bytes(b"Windows")
    for system in ("__MACOSX", "@eaDir", "lost+found"):
        tree(folder / system, wnids_of("imagenet-a"))
    (folder / ".cache").mkdir()
    assert len(open_dataset("imagenet-a", tmp_path).samples) == 8


COOP = [spec for spec in DATASETS.values() if spec.reader == "split-json"]


@pytest.mark.parametrize("spec", COOP, ids=lambda spec: spec.name)
def test_coop_split(spec: DatasetSpec, tmp_path: Path) -> None:
    images = tmp_path / spec.layouts[0]
    write(images / "a" / "1.jpg")
    write(images / "b" / "2.jpg")
    entries: list[list[object]] = [["b/2.jpg", 1, "wild_cat"], ["a/1.jpg", 0, "face"]]
    split_json(images.parent / spec.split_file, entries, [["c/3.jpg", 2, "not_tested"]])
    for root in (tmp_path, images.parent, images):
        data = open_dataset(spec.name, root)
        assert [(s.id, s.label) for s in data.samples] == [("b/2.jpg", 1), ("a/1.jpg", 0)]
        assert data.class_names == ("face", "wild cat", "not tested")
        assert data.templates == (spec.template,) and data.split == "test"
    assert open_dataset(spec.name, tmp_path).layout == f"{spec.layouts[0]} (split json beside it)"


@pytest.mark.parametrize("spec", COOP, ids=lambda spec: spec.name)
def test_coop_splits_in_every_layout_and_in_tpts_place(spec: DatasetSpec, tmp_path: Path) -> None:
    for number, layout in enumerate(spec.layouts):
        root = tmp_path / str(number)
        write(root / layout / "a" / "1.jpg")
        write(root / layout / "b" / "2.jpg")
        split_json(root / "data_splits" / spec.split_file, [["b/2.jpg", 1, "cat"], ["a/1.jpg", 0, "face"]])
        data = open_dataset(spec.name, root)
        assert data.layout.startswith(f"{layout} ") and data.samples[0].load().size == (40, 36)
        own = (root / layout).parent / spec.split_file  # goes before the shared one
        split_json(own, [["b/2.jpg", 0, "other"]])
        assert open_dataset(spec.name, root).class_names == ("other",)


def test_the_split_json_is_found_from_inside_the_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "dtd" / "images"
    write(images / "a" / "1.jpg")
    split_json(images.parent / DATASETS["dtd"].split_file, [["a/1.jpg", 0, "a"]])
    monkeypatch.chdir(images)
    assert [sample.load().size for sample in open_dataset("dtd", ".").samples] == [(40, 36)]
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "textures"
    link.symlink_to(images)
    assert [sample.id for sample in open_dataset("dtd", link).samples] == ["a/1.jpg"]
    own = tmp_path / "elsewhere" / DATASETS["dtd"].split_file  # beside the link, it goes before the one beside its end
    split_json(own, [["./a/1.jpg", 0, "other name"]])
    data = open_dataset("dtd", link)
    assert data.class_names == ("other name",) and data.samples[0].id == "a/1.jpg"


def test_prompts_are_those_of_coop() -> None:
    expected = {
        "pets": "a photo of a {}, a type of pet.",
        "flowers102": "a photo of a {}, a type of flower.",
        "aircraft": "a photo of a {}, a type of aircraft.",
        "food101": "a photo of {}, a type of food.",
        "dtd": "{} texture.",
        "eurosat": "a centered satellite photo of {}.",
        "ucf101": "a photo of a person doing {}.",
        "sun397": "a photo of a {}.",
        "caltech101": "a photo of a {}.",
        "imagenet": "a photo of a {}.",
    }
    assert {name: DATASETS[name].template for name in expected} == expected


def test_absent_images_become_error_rows_and_are_named(tmp_path: Path) -> None:
    images = tmp_path / "dtd" / "images"
    write(images / "a" / "1.jpg")
    split_json(
        tmp_path / "dtd" / "split_zhou_DescribableTextures.json", [["a/1.jpg", 0, "a"], ["gone/2.jpg", 1, "gone"]]
    )
    data = open_dataset("dtd", tmp_path)
    assert any("1 absent image(s)" in note and "gone/2.jpg" in note for note in data.notes)
    assert len(data.samples) == 2 and data.samples[0].load().size == (40, 36)
    with pytest.raises(ImageError, match=r"gone/2\.jpg: no such file"):
        data.samples[1].load()
    (images / "a" / "1.jpg").unlink()
    with pytest.raises(UsageError, match="none of them is in"):
        open_dataset("dtd", tmp_path)


def test_json_without_all_classes_is_renumbered_and_said(tmp_path: Path) -> None:
    images = tmp_path / "eurosat" / "2750"
    write(images / "x.jpg")
    write(images / "y.jpg")
    split_json(tmp_path / "eurosat" / "split_zhou_EuroSAT.json", [["x.jpg", 8, "River"], ["y.jpg", 1, "Forest"]])
    data = open_dataset("eurosat", tmp_path)
    assert data.class_names == ("Forest", "River") and [s.label for s in data.samples] == [1, 0]
    assert any("names 2 of 10 classes" in note for note in data.notes)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "not a split json"),
        ('{"test": [["a.jpg", "0", "a"]]}', "is no"),
        ('{"test": [["a.jpg", true, "a"]]}', "is no"),
        ('{"test": [["../a.jpg", 0, "a"]]}', "leaves the folder"),
        ('{"test": [["/a.jpg", 0, "a"]]}', "leaves the folder"),
        ('{"test": [["a.jpg", 0, "a"], ["a.jpg", 0, "a"]]}', "twice"),
        ('{"test": [["a.jpg", 0, "a"], ["b.jpg", 0, "b"]]}', "is called both"),
        ('{"test": []}', "empty"),
        ('{"test": [["a.jpg", 0, "a"]], "train": 3}', "train is no list"),
        ('{"test": [["a.jpg", 0, " "]]}', "is no"),
        (r'{"test": [["a.jpg", 0, "a"], ["\ud800.jpg", 1, "b"]]}', "is no"),
        (r'{"test": [["a.jpg", 0, "a"], ["\u0000.jpg", 1, "b"]]}', "is no"),
        ('{"test": [["a.jpg", 0, "a"], ["./a.jpg", 0, "a"]]}', "twice"),
    ],
)
def test_damaged_json_is_an_error_that_names_it(content: str, words: str, tmp_path: Path) -> None:
    write(tmp_path / "dtd" / "images" / "a.jpg")
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        open_dataset("dtd", tmp_path)
    assert "split_zhou_DescribableTextures.json" in str(caught.value)


def test_aircraft(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    write(folder / "images" / "0034309.jpg")
    write(folder / "images" / "1.jpg")
    (folder / "variants.txt").write_text("707-320\nF/A-18\nModel B200\n")
    (folder / "images_variant_test.txt").write_text("0034309 Model B200\n1 F/A-18\n2 707-320\n")
    data = open_dataset("aircraft", tmp_path)
    assert data.class_names == ("707-320", "F/A-18", "Model B200")
    assert [(s.id, s.label) for s in data.samples] == [("0034309.jpg", 2), ("1.jpg", 1), ("2.jpg", 0)]
    assert any("1 absent" in note for note in data.notes)
    (folder / "images_variant_test.txt").write_text("0034309 Boeing\n")
    with pytest.raises(UsageError, match="names no variant"):
        open_dataset("aircraft", folder)


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


def test_folder_with_images_folder_in_each_class_as_tiny_imagenet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "images" / "1.png")
    assert [s.id for s in open_dataset("folder", tmp_path).samples] == ["a/images/1.png", "b/images/1.png"]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([WNIDS[0], "cat"], "mixes wnids"),
        ([WNIDS[0], "n99999999"], "no wnids of ImageNet-1k: n99999999"),
        (["one"], "one class only"),
    ],
)
def test_folder_mistakes(classes: list[str], words: str, tmp_path: Path) -> None:
    tree(tmp_path, classes)
    with pytest.raises(UsageError, match=words):
        open_dataset("folder", tmp_path)


def test_a_folder_whose_pictures_are_all_in_one_class_is_a_wrong_parent(tmp_path: Path) -> None:
    tree(tmp_path / "pets", ["images"])
    tree(tmp_path / "textures", ["banded", "dotted"])
    with pytest.raises(UsageError, match=r"only pets holds pictures.*wrong parent"):
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
        ("imagenet", "", plain, "no wnids: cats, dogs"),
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
        ("imagenet-a", "ImageNet-C/fog/5", fog, "class folders .* are none of its 200"),
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


# -------------------------------------------------------------------------------------------------------- digits


def test_digits_halves_are_apart_and_even() -> None:
    split = digits_split()
    assert set(split.train_indices).isdisjoint(split.test_indices)
    assert len(split.train_indices) + len(split.test_indices) == 1797
    for label in range(10):
        train, test = (int((labels == label).sum()) for labels in (split.train_labels, split.test_labels))
        assert test - train in (0, 1)
    np.testing.assert_array_equal(digits_split().test_indices, split.test_indices)


def test_digits_need_no_folder() -> None:
    data = open_dataset("digits")
    assert len(data.samples) == DATASETS["digits"].images == 901
    assert data.class_names[7] == "seven" and not data.notes
    image = data.samples[0].load()
    assert image.mode == "RGB" and image.size == (96, 96)
    assert {sample.id for sample in data.samples} == {f"digits/{i:04d}" for i in digits_split().test_indices}
    assert find("digits", None) is not None


# ------------------------------------------------------------------------------------------------- limit, identity


def fake_samples(sizes: Sequence[int]) -> list[Sample]:
    return [Sample(f"{label}/{i}", label, Image.Image) for label, size in enumerate(sizes) for i in range(size)]


def test_subset_is_balanced_seeded_nested_and_blind_to_order() -> None:
    samples = fake_samples([50, 50, 3, 50])
    chosen = balanced_subset(samples, 30, seed=1)
    assert sorted(Counter(s.label for s in chosen).values()) == [3, 9, 9, 9]
    assert chosen == [s for s in samples if s in chosen], "order of the data set"
    assert set(balanced_subset(samples, 10, seed=1)) <= set(chosen)
    shuffled = random.Random(0).sample(samples, len(samples))
    assert set(balanced_subset(shuffled, 30, seed=1)) == set(chosen)
    assert set(balanced_subset(samples, 30, seed=2)) != set(chosen)
    assert balanced_subset(samples, 1000, seed=1) == samples


def test_limit_is_said(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"], images=5)
    data = open_dataset("folder", tmp_path, limit=4, seed=3)
    assert len(data.samples) == 4 and data.total == 10 and data.limit == 4
    assert any("4 of 10 images, class-balanced, drawn with seed 3" in note for note in data.notes)
    whole = open_dataset("folder", tmp_path, limit=10)
    assert whole.limit is None and not any("Subset" in note for note in whole.notes)
    assert whole.fingerprint != data.fingerprint
    with pytest.raises(UsageError, match="limit of 0"):
        open_dataset("folder", tmp_path, limit=0)


def test_fingerprint_knows_ids_and_labels_not_the_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        tree(tmp_path / place, ["a", "b"])
    one, two = (open_dataset("folder", tmp_path / place).fingerprint for place in ("one", "two"))
    assert one == two
    write(tmp_path / "two" / "a" / "new.png")
    assert open_dataset("folder", tmp_path / "two").fingerprint != one


def test_samples_of_folders_travel_to_other_processes(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"])
    for data in (open_dataset("folder", tmp_path), open_dataset("folder", tmp_path, corruption="fog")):
        copies = pickle.loads(pickle.dumps(list(data.samples)))
        np.testing.assert_array_equal(np.asarray(copies[0].load()), np.asarray(data.samples[0].load()))


def test_names_that_are_no_utf8_get_printable_ids(tmp_path: Path) -> None:
    tree(tmp_path, ["a", "b"])
    raw = bytes(tmp_path / "a") + b"/caf\xe9.png"
    (tmp_path / "a" / "a_0.png").rename(raw.decode("utf-8", "surrogateescape"))
    data = open_dataset("folder", tmp_path)
    assert data.samples[1].id == "a/caf\\xe9.png" and data.samples[1].load()


# ---------------------------------------------------------------------------------------------------- corruptions


EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


@pytest.mark.parametrize("corruption", [*CORRUPTIONS, *EXTRA])
@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_a_corrupted_folder_does_not_pass_as_clean(name: str, corruption: str, tmp_path: Path) -> None:
    folder = tree(tmp_path / "ImageNet-C" / corruption / "5", wnids_of("imagenet", 2), images=1)
    link = tmp_path / "clean"
    link.symlink_to(folder)
    for root in (folder, link):
        data = open_dataset(name, root)
        assert len(data.warnings) == 1 and f"corrupted by {corruption} at level 5" in data.warnings[0]
        told = f"apm bench imagenet-c --corruption {corruption}" in data.warnings[0]
        assert told == (name == "imagenet" and corruption in CORRUPTIONS)
    if corruption in CORRUPTIONS:
        assert not open_dataset("imagenet-c", folder, corruption=corruption).warnings
        twice = open_dataset("imagenet-c", folder, corruption=corruption, from_clean=True)
        assert "not clean ones" in twice.warnings[0]


@pytest.mark.parametrize("below", ["imagenet/val", "fog/val", "fog/6", "5/val", "fogs/5"])
def test_clean_folders_are_not_called_corrupted(below: str, tmp_path: Path) -> None:
    tree(tmp_path / below, wnids_of("imagenet"))
    assert not open_dataset("imagenet", tmp_path / below).warnings


def test_the_usual_subset_of_imagenet_c_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tree(tmp_path / "fog" / "5", wnids_of("imagenet", 2), images=1)
    names = [f"{number}.JPEG" for number in range(2500)]
    monkeypatch.setattr("apm.benchmarks.datasets.readers.class_images", lambda place: names)
    notes = open_dataset("imagenet-c", folder, corruption="fog").notes
    assert "5,000 images (the usual subset of 5,000); imagenet-c has 50,000: compare with care." in notes


@pytest.mark.parametrize(
    ("group", "corruption"), [(g, c) for g, all_ in CORRUPTION_GROUPS.items() for c in all_[:1]][:4]
)
@pytest.mark.parametrize("outer", ["ImageNet-C", "imagenet-c", "."])
def test_imagenet_c_as_its_archives_unpack(outer: str, group: str, corruption: str, tmp_path: Path) -> None:
    tree(tmp_path / outer / group / corruption / "5", wnids_of("imagenet"))
    for root in (tmp_path, tmp_path / outer, tmp_path / outer / group):
        data = open_dataset("imagenet-c", root, corruption=corruption, level=5)
        assert data.source.endswith(f"{group}/{corruption}/5") and not data.warnings
    assert find("imagenet-c", tmp_path) is not None


def test_the_archives_hold_the_15_corruptions_and_4_more() -> None:
    *usual, extra = CORRUPTION_GROUPS.values()
    assert sorted(name for group in usual for name in group) == sorted(CORRUPTIONS)
    assert set(extra) == set(EXTRA)


@pytest.mark.parametrize("layout", ["ImageNet-C/{}/{}", "imagenet-c/{}/{}", "{}/{}"])
def test_imagenet_c_from_the_official_tree(layout: str, tmp_path: Path) -> None:
    tree(tmp_path / layout.format("fog", 3), wnids_of("imagenet"))
    data = open_dataset("imagenet-c", tmp_path, corruption="fog", level=3)
    assert data.layout == layout.format("fog", 3) + "/<wnid>/" and not data.generated
    assert data.cell == "imagenet-c/fog/3" and len(data.class_names) == 1000
    assert data.samples[0].load().size == (40, 36), "official pictures are taken as they are"
    assert find("imagenet-c", tmp_path) is not None
    for root in (tmp_path / layout.format("fog", 3), (tmp_path / layout.format("fog", 3)).parent):
        assert open_dataset("imagenet-c", root, corruption="fog", level=3).fingerprint == data.fingerprint
        with pytest.raises(UsageError, match="from-clean"):
            open_dataset("imagenet-c", root, corruption="snow", level=3)


def test_imagenet_c_from_clean(tmp_path: Path) -> None:
    tree(tmp_path / "imagenet" / "val", wnids_of("imagenet"))
    data = open_dataset("imagenet-c", tmp_path, corruption="gaussian_noise", level=5, from_clean=True)
    clean = open_dataset("imagenet", tmp_path)
    assert data.generated and any("not comparable with the official files" in note for note in data.notes)
    assert [s.id for s in data.samples] == [s.id for s in clean.samples]
    pictures = [np.asarray(sample.load()) for sample in data.samples]
    assert pictures[0].shape == (224, 224, 3)
    backwards = [np.asarray(sample.load()) for sample in reversed(data.samples)][::-1]
    np.testing.assert_array_equal(pictures, backwards)
    other = open_dataset("imagenet-c", tmp_path, corruption="gaussian_noise", level=5, from_clean=True, seed=1)
    assert not np.array_equal(np.asarray(other.samples[0].load()), pictures[0])


def test_any_set_can_be_corrupted() -> None:
    data = open_dataset("digits", corruption="contrast", level=1, limit=2)
    assert data.generated and data.corruption == "contrast" and data.level == 1
    assert data.samples[0].load().size == (224, 224)


def test_corruption_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a corruption"):
        open_dataset("imagenet-c", tmp_path)
    with pytest.raises(UsageError, match='Did you mean "fog"'):
        open_dataset("imagenet-c", tmp_path, corruption="fogg")
    with pytest.raises(UsageError, match="level 6"):
        open_dataset("imagenet-c", tmp_path, corruption="fog", level=6)
    with pytest.raises(UsageError, match="name a --corruption"):
        open_dataset("digits", from_clean=True)
    with pytest.raises(UsageError, match="--label-set"):
        open_dataset("digits", label_set="imagenet")
    assert len(CORRUPTIONS) == 15


# ------------------------------------------------------------------------------------------- one entry, real data


def test_a_stranger_adds_a_data_set_in_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DatasetSpec(
        name="birds", title="Birds", reader="split-json", layouts=("birds/pictures",), split_file="split.json",
        template="a photo of a {}, a type of bird.", prompts_name="birds", origin="my garden",
    )  # fmt: skip
    monkeypatch.setitem(DATASETS, "birds", spec)
    write(tmp_path / "birds" / "pictures" / "tit.jpg")
    split_json(tmp_path / "birds" / "split.json", [["tit.jpg", 0, "blue_tit"]])
    data = open_dataset("birds", tmp_path)
    assert data.class_names == ("blue tit",) and data.templates == ("a photo of a {}, a type of bird.",)
    assert expand(["birds"]) == ("birds",)


@pytest.mark.parametrize(
    ("name", "below", "images", "classes"),
    [
        ("folder", "tiny-imagenet/val", 4969, 200),
        ("folder", "imagenette/val", 288, 10),
        ("caltech101", "", 188, 92),
        ("dtd", "", 48, 10),
        ("eurosat", "", 259, 5),
        ("pets", "", 135, 37),
    ],
)
def test_real_data(name: str, below: str, images: int, classes: int, real_data: Path) -> None:
    data = open_dataset(name, real_data / "eval" / below)
    assert (len(data.samples), len(data.class_names)) == (images, classes)
    assert {s.label for s in data.samples} == set(range(classes))
    assert not any("absent" in note for note in data.notes)
    for sample in balanced_subset(data.samples, 5, seed=0):
        assert sample.load().mode == "RGB"
