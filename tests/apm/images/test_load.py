"""`apm.images.load`: every kind of file works or is refused in one line that names it and the cause."""

from __future__ import annotations

import io
import itertools
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from apm.errors import ImageError
from apm.images import load as images
from apm.images.load import (
    DECODING_BYTES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MAX_PIXELS,
    decode_image,
    from_pixels,
    load_image,
    student_input,
)
from apm.images.paths import expand_paths, printable
from tests.fakes import png_of_size
from tests.places import ROOT

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)


def refused(path: Path | str, **options: int) -> str:
    with pytest.raises(ImageError) as caught:
        load_image(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{printable(path)}: ")
    assert "\n" not in message
    return message


def array(path: Path) -> np.ndarray:
    image = load_image(path).image
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_plain_image_is_unchanged(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert np.array_equal(np.asarray(loaded.image), pixels)
    assert loaded.notes == ()


def test_missing_empty_text_and_folder(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nothing.jpg")
    (tmp_path / "empty.jpg").touch()
    assert "empty file" in refused(tmp_path / "empty.jpg")
    (tmp_path / "notes.jpg").write_text("these are notes\n")
    assert "text, not an image" in refused(tmp_path / "notes.jpg")
    (tmp_path / "noise.jpg").write_bytes(bytes(range(256)))
    assert "not an image of a known format" in refused(tmp_path / "noise.jpg")
    (tmp_path / "folder").mkdir()
    assert "a folder without images" in refused(tmp_path / "folder")
    Image.new("RGB", (8, 8)).save(tmp_path / "folder" / "a.png")
    assert "a folder, not an image" in refused(tmp_path / "folder")
    assert "no file matches" in refused(tmp_path / "*.gif")
    assert "no such file" in refused("nul\0l.jpg")
    assert "cannot be read" in refused("x" * 5000)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "not a regular file" in refused(tmp_path / "pipe.jpg")


def test_permission_denied(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may read everything, so the refusal has to be played

        def closed(self: Path, *_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", closed)
    else:
        picture.chmod(0)
    assert "permission denied" in refused(picture)


def test_truncated(picture: Path, tmp_path: Path) -> None:
    whole = picture.read_bytes()
    for share in (0.3, 0.6, 0.9):
        (tmp_path / "cut.jpg").write_bytes(whole[: int(len(whole) * share)])
        assert "truncated" in refused(tmp_path / "cut.jpg")


def test_sizes(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert "1×1 pixels is too small" in refused(tmp_path / "dot.png")
    Image.new("RGB", (1, 40)).save(tmp_path / "line.png")
    assert "1×40" in refused(tmp_path / "line.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "four.png")
    assert load_image(tmp_path / "four.png").image.size == (2, 2)
    Image.new("RGB", (402, 4)).save(tmp_path / "strip.png")
    assert "402×4 pixels is a strip" in refused(tmp_path / "strip.png")
    Image.new("RGB", (400, 4)).save(tmp_path / "strip.png")
    assert load_image(tmp_path / "strip.png").image.size == (400, 4)


def test_huge_image_is_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_of_size(30_000, 30_000))
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    message = refused(path)
    assert "30000×30000" in message and str(MAX_PIXELS) in message and "--max-pixels" in message
    assert limit == Image.MAX_IMAGE_PIXELS


def test_limit_is_adjustable(picture: Path) -> None:
    assert "limit of 1535 pixels" in refused(picture, max_pixels=48 * 32 - 1)
    assert load_image(picture, max_pixels=48 * 32).image.size == (48, 32)


def test_limit_may_exceed_pillows_own(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 48×32 is now what Pillow calls a decompression bomb
    assert load_image(picture).image.size == (48, 32)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_cmyk(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(array(tmp_path / "a.jpg") - (200, 30, 60)).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
    assert np.array_equal(array(path), np.stack([RAMP] * 3, axis=-1))
    dark = np.full((4, 4), 200, dtype=np.uint16)  # nearly black on the scale of 16 bits, not nearly white
    Image.fromarray(dark).save(path)
    assert array(path).max() == 1


def test_float_and_32_bit(tmp_path: Path) -> None:
    path, grey = tmp_path / "a.tif", np.stack([RAMP] * 3, axis=-1)
    for values in (RAMP / 255, RAMP, RAMP * 257.0):
        Image.fromarray(values.astype(np.float32)).save(path)
        assert np.array_equal(array(path), grey)
    Image.fromarray(RAMP.astype(np.int32) * 100_000 - 7).save(path)
    assert np.array_equal(array(path), grey)
    assert "stretched" in load_image(path).notes[0]
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(path)
    assert array(path).max() == 0


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    half = np.zeros((4, 4), dtype=np.uint8)
    half[:, 2:] = 255
    expected = np.where(half[..., None] == 255, 40, 255) * np.ones(3, dtype=int)

    grey_alpha = Image.merge("LA", [Image.new("L", (4, 4), 40), Image.fromarray(half)])
    grey_alpha.save(tmp_path / "la.png")
    rgba = Image.merge("RGBA", [Image.new("L", (4, 4), 40)] * 3 + [Image.fromarray(half)])
    rgba.save(tmp_path / "rgba.png")
    palette = Image.fromarray((half // 255).astype(np.uint8))
    palette = palette.convert("L")
    palette = Image.frombytes("P", (4, 4), palette.tobytes())
    palette.putpalette([0, 0, 0, 40, 40, 40])
    palette.save(tmp_path / "index.png", transparency=0)
    palette.save(tmp_path / "bytes.png", transparency=b"\x00\xff")
    keyed = Image.merge("RGB", [Image.fromarray(np.where(half == 255, 40, 9).astype(np.uint8))] * 3)
    keyed.save(tmp_path / "keyed.png", transparency=(9, 9, 9))
    for name in ("la.png", "rgba.png", "index.png", "bytes.png", "keyed.png"):
        assert np.array_equal(array(tmp_path / name), expected), name
        assert load_image(tmp_path / name).notes == ("transparent parts are shown on white",)


def test_opaque_alpha_needs_no_note(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (1, 2, 3, 255)).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.notes == () and loaded.image.getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_first_frame_is_used_and_said(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    loaded = load_image(path)
    assert loaded.image.getpixel((3, 3)) == (255, 0, 0)
    assert loaded.notes == (f"{kind.upper()} with several frames: only the first is used",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((6, 4, 3), dtype=np.uint8)
    upright[0, 0], upright[0, -1], upright[-1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # How a camera held otherwise stores the picture, straight from the tag's definition: where row 0 and column 0 lie.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(array(path), upright)


def test_an_orientation_counts_where_other_tags_are_wrong(tmp_path: Path) -> None:
    """These tags can be read, but not written again, which Pillow does when it turns a picture."""
    path, wrong = tmp_path / "a.jpg", struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0")  # a width that is text
    right = struct.pack("<HHII", 0x0112, 3, 1, 6)
    data = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + wrong + right + bytes(4)
    Image.new("RGB", (8, 4), "red").save(path, exif=data)
    with Image.open(path) as opened:
        with pytest.raises(Exception, match=r"."):
            opened.getexif().tobytes()
        assert load_image(path).image.size == from_pixels(opened).image.size == (4, 8)


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff garbage")
    assert load_image(tmp_path / "a.jpg").image.size == (8, 8)


@pytest.mark.parametrize(
    "name", ["two words.png", "naïve Ünïcode 猫.png", "line\nbreak.png", "[bold]tag.png", "-dash.png"]
)
def test_strange_names(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    assert load_image(tmp_path / name).image.size == (8, 8)
    assert "\n" not in printable(tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path / name)


def test_printable_escapes_what_a_terminal_would_obey() -> None:
    assert printable("a\x1b[31m\nb\udcff.jpg") == r"a\x1b[31m\nb\udcff.jpg"
    assert printable("猫 é.jpg") == "猫 é.jpg"


def test_expand_paths(tmp_path: Path, picture: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("b/2.png", "b/10.JPG", "a.webp", ".hidden/x.png", "b/.x.png", "b/readme.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    below = [tree / "a.webp", tree / "b/10.JPG", tree / "b/2.png"]
    assert list(expand_paths([str(tree)])) == below
    assert list(expand_paths([f"{tree}/**/*.png"])) == [tree / "b/2.png"]
    assert list(expand_paths([f"{tree}/*"])) == below
    for recursive in ("**", "**/*", "**/**/*", "**/"):
        found = [path for path in expand_paths([f"{tree}/{recursive}"]) if path.suffix != ".txt"]
        assert sorted(found) == below, recursive
    assert list(expand_paths([f"{tmp_path}/**/b/*.png"])) == [tree / "b/2.png"]
    assert list(expand_paths([str(picture), str(tree / "none.jpg")])) == [picture, tree / "none.jpg"]
    assert list(expand_paths([str(tree / "*.bmp")])) == [tree / "*.bmp"]
    (tmp_path / "bare").mkdir()
    assert list(expand_paths([str(tmp_path / "bare")])) == [tmp_path / "bare"]
    (tmp_path / "what[1].png").touch()
    assert list(expand_paths([str(tmp_path / "what[1].png")])) == [tmp_path / "what[1].png"]


def test_links_in_circles_are_not_walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two such links: following them would give 2 ** 40 paths to one image."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x.png").touch()
    (tmp_path / "a/self").symlink_to(".")
    (tmp_path / "a/b/up").symlink_to("..")
    monkeypatch.chdir(tmp_path)
    for argument in ("a", "a/**/*.png", "**/x.*", str(tmp_path / "**/*")):
        found = list(itertools.islice(expand_paths([argument]), 3))
        assert [path.absolute() for path in found] == [tmp_path / "a/b/x.png"], argument


def test_paths_from_stdin_are_not_collected() -> None:
    def lines():
        yield b"a b.jpg\n"
        yield b"\r\n"
        yield b"caf\xe9.jpg\r\n"
        yield b"-\n"
        raise AssertionError("read ahead")

    paths = expand_paths(["first.jpg", "-"], lines())
    assert [os.fsencode(next(paths)) for _ in range(4)] == [b"first.jpg", b"a b.jpg", b"caf\xe9.jpg", b"-"]


def test_student_input_matches_its_definition() -> None:
    side = 24
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8))
    wanted = (np.asarray(image).astype(np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    got = student_input(image, side)
    assert got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), wanted, atol=1e-6)


def test_student_input_is_scaled_bicubically() -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    wanted = student_input(image.resize((24, 24), Image.Resampling.BICUBIC), 24)
    torch.testing.assert_close(student_input(image, 24), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(40, 24), (24, 40), (25, 24)])
def test_student_input_is_the_centre(size: tuple[int, int]) -> None:
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    left, top = (size[0] - 24) // 2, (size[1] - 24) // 2
    pixels[top : top + 24, left : left + 24] = 255
    got = student_input(Image.fromarray(pixels), 24) * torch.tensor(IMAGENET_STD).view(3, 1, 1)
    inner = (got + torch.tensor(IMAGENET_MEAN).view(3, 1, 1))[:, 1:-1, 1:-1]
    assert torch.allclose(inner, torch.ones_like(inner), atol=1e-6)


def test_threads_decode_side_by_side_and_restore_the_switches(picture: Path, tmp_path: Path) -> None:
    before = (list(warnings.filters), Image.MAX_IMAGE_PIXELS)
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 bad")
    failures: list[BaseException] = []

    def work(path: Path, good: bool) -> None:
        for _ in range(50):
            try:
                load_image(path)
                assert good
            except ImageError:
                assert not good
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=a) for a in [(picture, True), (tmp_path / "bad.jpg", False)] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (list(warnings.filters), Image.MAX_IMAGE_PIXELS) == before


def _samples() -> list[bytes]:
    base = Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 11, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    variants = [
        (base, "JPEG", {"exif": exif}),
        (base.convert("CMYK"), "JPEG", {}),
        (base, "PNG", {}),
        (base.convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG", {}),
        (base.convert("P"), "GIF", {"save_all": True, "append_images": [base.rotate(90).convert("P")]}),
        (base, "WEBP", {}),
        (base, "BMP", {}),
        (base, "TIFF", {"compression": "tiff_lzw", "exif": exif}),
        (Image.fromarray(RAMP.astype(np.float32)), "TIFF", {}),
        (base, "PPM", {}),
        (base.convert("LA"), "PNG", {}),
    ]
    out = []
    for image, kind, options in variants:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        out.append(buffer.getvalue())
    return out


SAMPLES = _samples()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1))
        action = draw(st.sampled_from(("set", "insert", "delete", "cut")))
        if action == "set":
            data[at] = draw(st.integers(0, 255))
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif action == "delete":
            del data[at : at + draw(st.integers(1, 16))]
        else:
            del data[at:]
        if not data:
            break
    return bytes(data)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(mutated(), mutated(), st.binary(max_size=200)))
def test_any_bytes_give_an_image_or_an_image_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.jpg"
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loaded = load_image(path, max_pixels=1_000_000)
        except ImageError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
        else:
            assert loaded.image.mode == "RGB" and min(loaded.image.size) >= 2
            loaded.image.getpixel((0, 0))
    assert said == []
    assert sys.exc_info() == (None, None, None)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_every_reader_refuses_a_format_whose_decoder_starts_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EPS picture by any name would be handed to Ghostscript."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import EpsImagePlugin

    from apm.benchmarks.datasets import open_dataset
    from apm.pretrain.images import open_images

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    assert Image.open(io.BytesIO(EPS)).format == "EPS"  # Pillow itself would
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "a.jpg").write_bytes(EPS)
    pq.write_table(pa.table({"image": [EPS, EPS], "label": ["cat", "dog"]}), tmp_path / "test.parquet")
    refusals = [partial(load_image, tmp_path / "set" / "cat" / "a.jpg")]
    refusals += [sample.load for sample in open_dataset("folder", tmp_path / "set").samples]
    refusals += [sample.load for sample in open_dataset("folder", source=f"hf:{tmp_path}:test").samples]
    for refusal in refusals:
        with pytest.raises(ImageError, match="not an image"):
            refusal()
    found = [error for _, error in open_images(tmp_path / "test.parquet").read()]
    assert len(found) == 2 and all(isinstance(error, ImageError) for error in found)


def test_bytes_of_images_are_read_in_one_place() -> None:
    """But for what a corruption has encoded itself, and masks, whose numbers are no colours."""
    root = ROOT
    sources = [path for folder in ("apm", "benchmarks", "cli") for path in (root / folder).rglob("*.py")]
    found = {path.relative_to(root).as_posix() for path in sources if "Image.open(" in path.read_text(encoding="utf-8")}
    others = {"benchmarks/corruptions/digital.py", "benchmarks/studies/scenes.py"}
    assert found == {"apm/images/load.py", *others}


def test_published_decoding_looks_at_neither_orientation_nor_transparency(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (8, 4), (200, 0, 0, 0)).save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").image.size == (4, 8)
    assert load_image(tmp_path / "a.png").image.getpixel((0, 0)) == (255, 255, 255)
    published = load_image(tmp_path / "a.png", as_published=True)
    assert published.image.size == (8, 4) and published.image.getpixel((0, 0)) == (200, 0, 0) and not published.notes
    assert decode_image((tmp_path / "a.png").read_bytes(), "a", as_published=True).image == published.image


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F"])
@pytest.mark.parametrize("transparent", [False, True])
def test_strips_give_what_the_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, transparent: bool
) -> None:
    rng = np.random.default_rng(3)
    if mode == "F":
        image = Image.fromarray((rng.standard_normal((37, 23)) * 300).astype(np.float32))
    elif mode.startswith("I"):
        image = Image.fromarray(rng.integers(0, 65536, (37, 23)).astype(np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8)).convert(mode)
    kind = "TIFF" if mode in ("I", "F") else "PNG"
    options = {"transparency": 3} if transparent and mode in ("L", "P") else {}
    image.save(tmp_path / "a", kind, **options)
    whole = load_image(tmp_path / "a")
    monkeypatch.setattr(images, "_STRIP", 23 * 5)
    cut = load_image(tmp_path / "a")
    assert cut.image == whole.image and cut.notes == whole.notes


def test_no_two_images_are_decoded_at_once_that_do_not_fit_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    inside, most = [0], [0]
    counting = threading.Lock()

    def slow(image: Image.Image, **options: object) -> tuple[Image.Image, tuple[str, ...]]:
        with counting:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with counting:
            inside[0] -= 1
        return image.convert("RGB"), ()

    monkeypatch.setattr(images, "_to_rgb", slow)
    for total, expected in ((8 * 10_000 * 2, 2), (8 * 10_000 - 1, 1)):  # the last fits by itself alone
        monkeypatch.setattr(images, "_BUDGET", images._Budget(total))
        most[0] = 0
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(load_image, [tmp_path / "a.png"] * 12))
        assert most[0] == expected


PEAK = """
import sys
from concurrent.futures import ThreadPoolExecutor
from apm.images.load import load_image, opened_image

def small(path):
    with opened_image(path) as loaded:
        return loaded.image.size

def peak():  # not ru_maxrss, which a process inherits from the one that started it
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

before = peak()
with ThreadPoolExecutor(4) as pool:
    sizes = list(pool.map(small, [sys.argv[1]] * 4))
print(sizes[0], peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_decoding_stays_within_its_bytes(tmp_path: Path) -> None:
    """A small file that is large when decoded: four in threads took 11 GB once, and one 3.5 GB."""
    path = tmp_path / "large.png"
    Image.new("I;16", (9400, 9400), 30_000).save(path)
    assert path.stat().st_size < 300_000
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    size, _, peak = done.stdout.rpartition(" ")
    assert size == "(9400, 9400)"
    # Its own 16 bits and RGB, once; the C library keeps some of what each thread has given back.
    assert 9400 * 9400 * 6 <= int(peak) < 1.6 * DECODING_BYTES
