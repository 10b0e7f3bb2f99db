"""Corrupted data sets: read from their files, made of clean images, and not mistaken for clean ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apm.benchmarks.corruptions import CORRUPTIONS
from apm.benchmarks.datasets import find, open_dataset
from apm.benchmarks.datasets.specs import CORRUPTION_GROUPS
from apm.errors import UsageError
from tests.benchmarks.datasets.trees import tree, wnids_of

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
