"""Layouts, labels, subsets and identity, on small trees laid out as users have them."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apm.benchmarks.datasets import DATASETS, DatasetSpec, Sample, balanced_subset, expand, find, open_dataset
from apm.errors import ImageError, UsageError
from apm.labels import imagenet_names, imagenet_subset
from apm.teachers.digits import digits_split
from tests.benchmarks.datasets.trees import split_json, tree, wnids_of, write

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
        ('{"test": [["a.jpg", 0, "a"]], "train": 3}', "train is not a list"),
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
    assert Counter(sample.label for sample in data.samples) == {0: 2, 1: 2}
    assert any("4 of 10 images, class-balanced, drawn with seed 3" in note for note in data.notes)
    whole = open_dataset("folder", tmp_path, limit=10)
    assert whole.limit is None and not any("Subset" in note for note in whole.notes)
    assert whole.fingerprint != data.fingerprint
    with pytest.raises(UsageError, match="--limit 0"):
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
