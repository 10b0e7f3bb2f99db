"""Streams: local parquet, imagefolder and webdataset in the forms of the hub; and a hub that does not answer."""

from __future__ import annotations

import io
import json
import socket
import tarfile
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request

import numpy as np
import pytest
from PIL import Image

from apm.benchmarks.datasets import DATASETS, Dataset, open_dataset
from apm.benchmarks.datasets.hub import _commit_and_content, _Rows, parse_source
from apm.errors import ApmError, ImageError, UsageError
from apm.labels import imagenet_subset, imagenet_wnids

WNIDS = imagenet_wnids()


def picture(value: int) -> bytes:
    """A PNG whose first pixel tells which one it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), (value, 255 - value, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def values(data: Dataset) -> list[int]:
    return [sample.load().getpixel((0, 0))[0] for sample in data.samples]  # type: ignore[index]


def write_parquet(
    folder: Path, labels: list[int] | list[str], *, column: str = "label", names: list[str] | None = None
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"image": [{"bytes": picture(i), "path": None} for i in range(len(labels))], column: labels})
    plain = {"dtype": "string" if isinstance(labels[0], str) else "int64", "_type": "Value"}
    features = {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"} if names else plain}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(metadata), folder / "test-00000-of-00001.parquet")


def write_webdataset(folder: Path, labels: list[int], suffix: str = "jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "test-0000.tar", "w") as tar:
        for row, label in enumerate(labels):
            for name, content in ((f"s{row:04d}.cls", str(label).encode()), (f"s{row:04d}.{suffix}", picture(row))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_parquet_with_named_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path, [1, 0, 1], names=["cat", "wild_dog"])
    data = open_dataset("folder", source=f"hf:{tmp_path}")
    assert data.class_names == ("cat", "wild dog") and [s.label for s in data.samples] == [1, 0, 1]
    assert values(data) == [0, 1, 2] and data.split == "test"
    assert [s.id for s in data.samples] == ["test/0000000", "test/0000001", "test/0000002"]


def test_rows_may_be_read_in_any_order_and_by_threads(tmp_path: Path) -> None:
    write_parquet(tmp_path, [i % 2 for i in range(40)], names=["a", "b"])
    data = open_dataset("folder", source=f"hf:{tmp_path}")
    order = np.random.default_rng(0).permutation(40)
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda row: data.samples[row].load().getpixel((0, 0))[0], order))
    assert seen == list(order)


def test_limit_of_a_stream_is_balanced(tmp_path: Path) -> None:
    write_parquet(tmp_path, [0] * 10 + [1] * 10, names=["a", "b"])
    data = open_dataset("folder", source=f"hf:{tmp_path}", limit=4)
    assert [s.label for s in data.samples] == [0, 0, 1, 1] and data.total == 20
    assert values(data) == [int(s.id[-7:]) for s in data.samples]


def test_imagefolder(tmp_path: Path) -> None:
    for row, name in enumerate(("cat", "dog", "dog")):
        (tmp_path / "test" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "test" / name / f"{row}.png").write_bytes(picture(row))
    data = open_dataset("folder", source=f"hf:{tmp_path}:test")
    assert data.class_names == ("cat", "dog") and [s.label for s in data.samples] == [0, 1, 1]
    assert values(data) == [0, 1, 2]


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_webdataset_of_a_fine_grained_set_says_that_it_is_not_coops_split(suffix: str, tmp_path: Path) -> None:
    write_webdataset(tmp_path, [1, 0, 1], suffix)
    with pytest.raises(UsageError, match=r"numbers without names.*classnames\.txt"):
        open_dataset("dtd", source=f"hf:{tmp_path}")
    (tmp_path / "classnames.txt").write_text("banded\npolka_dotted\n")
    data = open_dataset("dtd", source=f"hf:{tmp_path}")
    assert data.class_names == ("banded", "polka dotted") and [s.label for s in data.samples] == [1, 0, 1]
    assert values(data) == [0, 1, 2]
    assert any("Not CoOp's split" in note for note in data.notes)
    assert data.templates == (DATASETS["dtd"].template,)


def test_numbers_of_classes_of_one_name_stay_apart(tmp_path: Path) -> None:
    write_webdataset(tmp_path, [2, 0, 1])
    (tmp_path / "classnames.txt").write_text("missile\ncat\nmissile\n")
    data = open_dataset("folder", source=f"hf:{tmp_path}")
    assert [s.label for s in data.samples] == [2, 0, 1] and data.class_names == ("missile", "cat", "missile")


def test_webdataset_numbers_of_a_subset(tmp_path: Path) -> None:
    write_webdataset(tmp_path, [0, 199, 7])
    data = open_dataset("imagenet-a", source=f"hf:{tmp_path}")
    assert [s.label for s in data.samples] == [0, 199, 7] and len(data.class_names) == 200


def test_imagenets_numbers_are_brought_to_the_subset(tmp_path: Path) -> None:
    subset = imagenet_subset("imagenet-a")
    write_parquet(tmp_path, [subset[3], subset[199]], names=list(WNIDS))
    assert [s.label for s in open_dataset("imagenet-a", source=f"hf:{tmp_path}").samples] == [3, 199]
    write_parquet(tmp_path / "plain", [subset[3], subset[199]])
    assert [s.label for s in open_dataset("imagenet-a", source=f"hf:{tmp_path / 'plain'}").samples] == [3, 199]


def test_wnid_column(tmp_path: Path) -> None:
    subset = imagenet_subset("imagenet-r")
    write_parquet(tmp_path, [WNIDS[subset[5]], WNIDS[subset[0]]], column="wnid")
    assert [s.label for s in open_dataset("imagenet-r", source=f"hf:{tmp_path}").samples] == [5, 0]
    with pytest.raises(UsageError, match="2 of its classes are not in imagenet-a"):
        open_dataset("imagenet-a", source=f"hf:{tmp_path}")


def test_streamed_images_can_be_corrupted(tmp_path: Path) -> None:
    write_parquet(tmp_path, [WNIDS[0], WNIDS[1]], column="wnid")
    data = open_dataset("imagenet-c", source=f"hf:{tmp_path}", corruption="fog", from_clean=True)
    assert data.generated and data.samples[1].load().size == (224, 224)


def test_damaged_row_is_its_own_error(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    with tarfile.open(folder / "test.tar", "w") as tar:
        for name, content in (("a.png", picture(0)), ("a.cls", b"0"), ("b.png", b"no picture"), ("b.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / "classnames.txt").write_text("a\nb\n")
    data = open_dataset("folder", source=f"hf:{folder}")
    assert data.samples[0].load()
    with pytest.raises(ImageError, match="row 1"):
        data.samples[1].load()


def test_a_stream_that_breaks_off_is_no_fault_of_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path, [0, 1, 0], names=["a", "b"])
    data = open_dataset("folder", source=f"hf:{tmp_path}")
    keep = _Rows._keep

    def fail_at_the_second(rows: _Rows, row: dict[str, object]) -> None:
        if rows._spans:
            raise ConnectionError("the line is dead")
        keep(rows, row)

    monkeypatch.setattr(_Rows, "_keep", fail_at_the_second)
    assert data.samples[0].load().size == (16, 12)
    for sample in data.samples[1:]:
        with pytest.raises(ApmError, match="broke off at row") as caught:
            sample.load()
        assert not isinstance(caught.value, ImageError)  # which would be recorded as the image's own


def test_damaged_files_of_a_stream_are_an_error_for_people(tmp_path: Path) -> None:
    write_webdataset(tmp_path / "tar", [0] * 30)
    (tmp_path / "tar" / "classnames.txt").write_text("cat\ndog\n")
    path = tmp_path / "tar" / "test-0000.tar"
    with tarfile.open(path) as tar:
        inside = tar.getmember("s0020.jpg").offset_data + 10
    path.write_bytes(path.read_bytes()[:inside])
    write_parquet(tmp_path / "table", [0] * 30, names=["a", "b"])
    path = next((tmp_path / "table").glob("*.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes(len(content) // 2) + content[8 + len(content) // 2 :])
    for name in ("tar", "table"):
        with pytest.raises(UsageError, match="cannot be"):
            open_dataset("folder", source=f"hf:{tmp_path / name}")


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path, [0, 1], names=["a", "b"])
    with pytest.raises(UsageError, match='no split "val"; it has test'):
        open_dataset("folder", source=f"hf:{tmp_path}:val")
    with pytest.raises(UsageError, match="not understood"):
        open_dataset("folder", source="s3:bucket")
    with pytest.raises(UsageError, match="no such folder"):
        open_dataset("folder", source="hf:/absent/folder")
    with pytest.raises(UsageError, match="cannot be streamed with --source"):
        open_dataset("digits", source=f"hf:{tmp_path}")
    write_parquet(tmp_path / "x", ["a", "b"], column="colour")
    with pytest.raises(UsageError, match="none of the columns wnid, label"):
        open_dataset("folder", source=f"hf:{tmp_path / 'x'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="cannot be opened"):
        open_dataset("folder", source=f"hf:{tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("hf:barkermrl/imagenet-a:train", ("barkermrl/imagenet-a", "train")),
        ("hf:barkermrl/imagenet-a", ("barkermrl/imagenet-a", None)),
    ],
)
def test_source_is_repository_and_split(source: str, expected: tuple[str, str | None]) -> None:
    assert parse_source(source) == expected


def test_hub_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE"):
        open_dataset("imagenet-a", source="hf:barkermrl/imagenet-a")


def test_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as server:  # accepts connections and says nothing
        server.bind(("127.0.0.1", 0))
        server.listen()
        host = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", host)
        monkeypatch.setattr("apm.benchmarks.datasets.hub._SECONDS", 0.2)
        with pytest.raises(UsageError, match="is not reachable"):
            open_dataset("imagenet-a", source="hf:barkermrl/imagenet-a")
        server.settimeout(0.5)
        server.accept()[0].close()
        with pytest.raises(TimeoutError):  # no second attempt was made
            server.accept()


def test_other_images_under_the_same_names_are_another_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(folder: str, pixel: int = 0) -> str:
        write_webdataset(tmp_path / folder, [0, 1, 0])
        (tmp_path / folder / "classnames.txt").write_text("cat\ndog\n")
        tar = tmp_path / folder / "test-0000.tar"
        tar.write_bytes(tar.read_bytes().replace(picture(1), picture(1 + pixel)))
        return open_dataset("folder", source=f"hf:{tmp_path / folder}").fingerprint

    monkeypatch.setattr("time.time", lambda: 0.0)  # archives hold times
    assert len(picture(1)) == len(picture(2))
    assert fingerprint("one") == fingerprint("moved") != fingerprint("changed", 1)
    monkeypatch.setattr("apm.benchmarks.datasets.hub._READ_WHOLE_BELOW", 100)
    monkeypatch.setattr("apm.benchmarks.datasets.hub._SAMPLE", 5000)
    assert fingerprint("one") == fingerprint("moved") != fingerprint("changed", 1)


def test_what_the_hub_says_of_a_repository_is_its_images() -> None:
    def answer(*files: tuple[str, str], sha: str = "c1") -> tuple[str | None, str]:
        siblings = [{"rfilename": name, "blobId": blob, "size": 1} for name, blob in files]
        return _commit_and_content(json.dumps({"sha": sha, "siblings": siblings}).encode())

    images = ("test.parquet", "b1")
    commit, content = answer(images, ("README.md", "r1"))
    assert commit == "c1" and len(content) == 64
    assert answer(("README.md", "r2"), images, sha="c2") == ("c2", content)  # words, and the order
    assert answer(("test.parquet", "b2"), ("README.md", "r1"))[1] != content
    for other in (b"", b"[]", b'{"sha": "c1"}', b'{"sha": "c1", "siblings": [{"rfilename": "x"}]}', b"\xff"):
        assert _commit_and_content(other) == (None, "")


@pytest.mark.parametrize("status", [401, 404, 500])
def test_hub_that_refuses_says_so(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    def refuse(request: Request, timeout: float) -> None:
        assert request.full_url.endswith("/api/datasets/nobody/nothing?blobs=true") and timeout < 5
        raise HTTPError(request.full_url, status, "no", Message(), None)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("apm.benchmarks.datasets.hub.urlopen", refuse)
    with pytest.raises(UsageError, match=f"nobody/nothing: .* answers {status}"):
        open_dataset("imagenet", source="hf:nobody/nothing")
