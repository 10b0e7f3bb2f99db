"""Class names and prompts: what is accepted, what is refused and in which words, and the well-known sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apm.errors import UsageError
from apm.labels import (
    IMAGENET_SUBSETS,
    LABEL_SET_NAMES,
    check_labels,
    check_templates,
    imagenet_names,
    imagenet_subset,
    imagenet_wnids,
    label_set,
    parse_labels,
    prompt_templates,
    read_labels_file,
)


def test_names_are_split_and_tidied() -> None:
    assert parse_labels(" cat , dog,,  polar \t bear,\nfox\n\n") == ("cat", "dog", "polar bear", "fox")
    assert parse_labels("cafe\u0301,tea") == ("caf\u00e9", "tea")


@pytest.mark.parametrize("text", ["", "  ", ",,,", "\n \n"])
def test_no_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="contain no name"):
        parse_labels(text)


def test_a_single_name_is_refused() -> None:
    with pytest.raises(UsageError, match='only one name, "cat"'):
        parse_labels("cat")


def test_names_given_twice_are_named() -> None:
    with pytest.raises(UsageError, match=r'more than once: "cat", "Cat"\.'):
        parse_labels("cat,dog,Cat")


@pytest.mark.parametrize("bad", ["a\x1b[31mred", "a\x00b", "half\udce9"])
def test_names_that_cannot_be_printed_are_refused_in_printable_words(bad: str) -> None:
    with pytest.raises(UsageError, match="cannot be printed") as caught:
        check_labels(["cat", bad])
    assert str(caught.value).isprintable()


def test_a_file_holds_a_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "my labels.txt"
    path.write_bytes("\ufeffcat\r\n\r\n  toucan, the bird \n".encode())
    assert read_labels_file(path) == ("cat", "toucan, the bird")


@pytest.mark.parametrize(
    ("content", "cause"),
    [("caf\u00e9\ncat".encode("latin-1"), "not UTF-8"), (b"", "contain no name"), (b"cat\ncat\n", "more than once")],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, cause: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=cause) as caught:
        read_labels_file(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            read_labels_file(path)
        assert str(path) in str(caught.value)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero on this system")
def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(UsageError, match="is larger than 64 MiB"):
        read_labels_file("/dev/zero")


@pytest.mark.slow
@given(st.text(max_size=60) | st.text(alphabet="ab,\n \t\x00\u0301A", max_size=30))
def test_any_text_gives_names_or_a_sentence(text: str) -> None:
    try:
        names = parse_labels(text)
    except UsageError as error:
        assert str(error).endswith(".")
        return
    assert len(names) >= 2
    assert len({name.casefold() for name in names}) == len(names)
    assert all(name == name.strip() != "" and "," not in name and "\n" not in name for name in names)
    assert parse_labels(",".join(names)) == names


@pytest.mark.slow
@given(st.binary(max_size=80))
def test_any_file_gives_names_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed-labels.txt"
    path.write_bytes(content)
    try:
        names = read_labels_file(path)
    except UsageError as error:
        assert "fuzzed-labels.txt" in str(error)
    else:
        assert len(set(names)) == len(names) >= 2


def test_known_sets_have_their_sizes() -> None:
    sizes = {name: len(label_set(name, teacher_labels=("x", "y"))) for name in LABEL_SET_NAMES}
    assert sizes == {
        "cifar10": 10,
        "digits": 10,
        "imagenet": 1000,
        "imagenet-a": 200,
        "imagenet-r": 200,
        "imagenette": 10,
        "teacher": 2,
        "tiny-imagenet": 200,
    }


def test_imagenet_names_that_occur_twice_stay_at_both_positions() -> None:
    names = label_set("imagenet")
    assert {name for name in names if names.count(name) > 1} == {"missile", "sunglasses"}


def test_sets_of_imagenet_classes_are_in_the_order_of_their_wnids() -> None:
    wnids = imagenet_wnids()
    assert len(wnids) == 1000
    assert list(wnids) == sorted(wnids)
    for name in IMAGENET_SUBSETS:
        chosen = imagenet_subset(name)
        assert list(chosen) == sorted(set(chosen))
        assert label_set(name) == tuple(imagenet_names()[index] for index in chosen)


def test_sets_of_imagenet_classes_hold_the_right_classes() -> None:
    assert [imagenet_wnids()[index] for index in imagenet_subset("imagenette")] == [
        *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
        *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
    ]
    assert label_set("imagenette")[0] == "tench"
    assert label_set("imagenette")[-1] == "parachute"
    assert imagenet_subset("imagenet-a")[:3] == (6, 11, 13)
    assert imagenet_subset("imagenet-r")[:3] == (1, 2, 4)


def test_folders_of_the_real_sets_are_the_classes(real_data: Path) -> None:
    for name in ("tiny-imagenet", "imagenette"):
        folders = sorted(path.name for path in (real_data / "eval" / name / "val").iterdir())
        assert folders == [imagenet_wnids()[index] for index in imagenet_subset(name)]


def test_an_unknown_set_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r'Unknown label set "imagnet".*"imagenet"'):
        label_set("imagnet")
    with pytest.raises(UsageError, match=r'Unknown prompt set "opanai".*"openai"'):
        prompt_templates("opanai")
    with pytest.raises(UsageError, match="imagenet-r"):
        imagenet_subset("cifar10")


def test_the_teachers_own_set_needs_one() -> None:
    with pytest.raises(UsageError, match="this one has none"):
        label_set("teacher")


def test_prompt_sets_have_1_7_and_80_templates() -> None:
    sizes = [len(check_templates(prompt_templates(name))) for name in ("single", "simple", "openai")]
    assert sizes == [1, 7, 80]
    assert prompt_templates("single") == ("a photo of a {}.",)
    assert set(prompt_templates("simple")) <= set(prompt_templates("openai"))


def test_templates_need_a_place_for_the_name() -> None:
    with pytest.raises(UsageError, match=r'"a photo" has no {}'):
        check_templates(["a photo of a {}.", "a photo"])
    with pytest.raises(UsageError, match="No prompt template"):
        check_templates([])
