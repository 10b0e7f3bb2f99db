"""Images of any folder, and the cache of inputs and grids."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from apm.errors import ApmError, ImageError, UsageError
from apm.images.files import WriteError, write_atomically
from apm.images.load import load_image, student_input
from apm.pretrain.cache import build_cache
from apm.pretrain.images import open_images
from tests.pretraining import GridTeacher, make_folder, make_parquet, picture


def test_folder_and_parquet_give_the_same_pictures_in_order(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 7)
    (folder / "notes.txt").write_text("no image")
    source = open_images(folder)
    names = [name for name, _ in source.read()]
    assert names == sorted(names) and len(names) == len(source) == 7 and names[0] == "a/00.png"
    for plain in (False, True):
        table = open_images(make_parquet(tmp_path / f"p{plain}" / "x.parquet", 7, plain=plain))
        assert len(table) == 7
        for number, (name, image) in enumerate(table.read()):
            assert name == f"x.parquet, row {number}"
            assert np.array_equal(np.asarray(image), np.asarray(picture(number)))


@pytest.mark.parametrize("start", [0, 1, 5, 9, 11, 12, 16, 17])
def test_parquet_can_be_read_from_any_row_on(tmp_path: Path, start: int) -> None:
    make_parquet(tmp_path / "deep" / "a.parquet", 12)
    make_parquet(tmp_path / "b.parquet", 5)
    source = open_images(tmp_path)
    everything = [name for name, _ in source.read()]
    assert len(everything) == len(source) == 17
    assert [name for name, _ in source.read(start)] == everything[start:]


def test_what_is_no_data_is_told(tmp_path: Path, picture: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UsageError, match="no such folder"):
        open_images(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no images in this folder or below it .*files either\.$"):
        open_images(tmp_path / "empty")
    (tmp_path / "empty" / "gone.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(
        UsageError, match=r"files either\. 1 path leads to no image .*gone.png: a link to a file that is"
    ):
        open_images(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"is one file; give a folder"):
        open_images(picture)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UsageError, match="is not a Parquet file"):
        open_images(tmp_path / "text.parquet")
    pq.write_table(pa.table({"img": [b"x"]}), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match='no column "image"; its columns: img'):
        open_images(tmp_path / "other.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    with pytest.raises(UsageError, match="have no rows"):
        open_images(tmp_path / "none.parquet")


def test_damaged_and_too_large_images_are_skipped_and_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", 4)
    (folder / "a" / "bad.jpg").write_bytes(b"\x89PNG\r\n\x1a\n\0\0 no picture")
    seen: list[str | None] = []
    cache = build_cache(open_images(folder), GridTeacher(), tmp_path / "cache", size=16, on_image=seen.append)
    assert cache.names == ("a/00.png", "a/02.png", "b/01.png", "b/03.png")
    assert [name for name, _ in cache.skipped] == ["a/bad.jpg"]
    assert [error for error in seen if error] == [cache.skipped[0][1]] and "bad.jpg: " in cache.skipped[0][1]

    source = open_images(make_parquet(tmp_path / "t.parquet", 4, broken=(2,)))
    found = dict(source.read(max_pixels=100))
    assert all(isinstance(image, ImageError) for image in found.values())
    assert "480 pixels" not in str(found["t.parquet, row 0"]) and "24×20 pixels" in str(found["t.parquet, row 0"])
    assert [isinstance(image, ImageError) for _, image in source.read()] == [False, False, True, False]
    with pytest.raises(UsageError, match="0 of 4 images in"):
        build_cache(source, GridTeacher(), tmp_path / "cache", size=16, max_pixels=100)


def test_cache_holds_what_student_and_teacher_see(tmp_path: Path) -> None:
    folder, teacher = make_folder(tmp_path / "images", 5), GridTeacher()
    cache = build_cache(open_images(folder), teacher, tmp_path / "cache", size=16)
    numbers = np.array([4, 0])
    for row, number in enumerate(numbers):
        image = load_image(folder / cache.names[number]).image
        assert torch.equal(cache.inputs(numbers)[row], student_input(image, 16))
        torch.testing.assert_close(cache.targets(numbers)[row], teacher.encode_grid(image), rtol=5e-4, atol=0)


def test_two_processes_do_not_fill_one_cache(tmp_path: Path) -> None:
    source, folder = open_images(make_folder(tmp_path / "images", 3)), tmp_path / "cache"

    def another(_: str | None) -> None:
        with pytest.raises(UsageError, match=r"Another process is writing .*index\.json"):
            build_cache(source, GridTeacher(), folder, size=16)

    assert len(build_cache(source, GridTeacher(), folder, size=16, on_image=another).names) == 3


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    path = make_parquet(tmp_path / "t.parquet", 12)
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
        start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    bad = [isinstance(image, ImageError) for _, image in open_images(path).read()]
    assert bad == [False] * 5 + [True] * 5 + [False] * 2


def test_cache_is_computed_once_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apm.pretrain.cache._FLUSH_EVERY", 4)
    source = open_images(make_folder(tmp_path / "images", 10))
    whole = build_cache(source, GridTeacher(), tmp_path / "whole", size=16)

    class Killed(Exception):
        pass

    teacher = GridTeacher()

    def kill(_: str | None) -> None:
        if teacher.calls == 7:
            raise Killed

    with pytest.raises(Killed):
        build_cache(source, teacher, tmp_path / "cache", size=16, on_image=kill)
    teacher = GridTeacher()
    cache = build_cache(source, teacher, tmp_path / "cache", size=16)
    assert teacher.calls == 6  # the four that were flushed are not computed again
    assert cache.names == whole.names
    assert np.array_equal(cache.images, whole.images) and np.array_equal(cache.grids, whole.grids)
    build_cache(source, teacher, tmp_path / "cache", size=16)
    assert teacher.calls == 6
    other = GridTeacher()
    other.identity = "fake@1"
    build_cache(source, other, tmp_path / "cache", size=16)
    build_cache(source, other, tmp_path / "cache", size=20)
    assert other.calls == 20  # another teacher, another size: caches of their own


def test_a_damaged_cache_is_told(tmp_path: Path) -> None:
    source = open_images(make_folder(tmp_path / "images", 4))
    build_cache(source, GridTeacher(), tmp_path / "cache", size=16)
    (where,) = (tmp_path / "cache").iterdir()
    with (where / "grids.f16").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ApmError, match=r"grids\.f16 is not what .*; remove the folder"):
        build_cache(source, GridTeacher(), tmp_path / "cache", size=16)
    (where / "index.json").write_text("{")
    with pytest.raises(ApmError, match="is damaged"):
        build_cache(source, GridTeacher(), tmp_path / "cache", size=16)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners here")
@pytest.mark.parametrize("name", ["index.json", "images.u8", "grids.f16"])
def test_a_cache_that_others_may_change_is_refused(tmp_path: Path, name: str) -> None:
    source = open_images(make_folder(tmp_path / "images", 4))
    build_cache(source, GridTeacher(), tmp_path / "cache", size=16)
    (where,) = (tmp_path / "cache").iterdir()
    assert [path.stat().st_mode & 0o777 for path in where.iterdir() if path.suffix != ".lock"] == [0o600] * 3
    build_cache(source, GridTeacher(), tmp_path / "cache", size=16)
    (where / name).chmod(0o606)
    with pytest.raises(ApmError, match=rf"{name} belongs to another user, or can be changed by one"):
        build_cache(source, GridTeacher(), tmp_path / "cache", size=16)


@pytest.mark.parametrize("scale", [float("nan"), 1e6])
def test_grids_that_float16_cannot_hold_are_refused(tmp_path: Path, scale: float) -> None:
    source = open_images(make_folder(tmp_path / "images", 3))
    with pytest.raises(ApmError, match=r"a/00\.png: the teacher's grid holds values that are not finite, or beyond"):
        build_cache(source, GridTeacher(scale), tmp_path / "cache", size=16)


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, b"{}")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteError, match=r"Cannot write .*file\.json: the disk is full"):
        write_atomically(path, fail)
    assert json.loads(path.read_text()) == {} and [one.name for one in path.parent.iterdir()] == ["file.json"]
