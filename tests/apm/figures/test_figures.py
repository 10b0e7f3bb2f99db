"""Figures and arrays on disk: whole, alike each time, with their settings, under names that cannot collide."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from apm.errors import UsageError
from apm.figures import base as figures


def small_figure() -> Any:
    figure = figures.new_figure(2, 1)
    figure.subplots().set_title("costs $5 and $\\frac{1}$ 猫")  # no formula, and no glyphs for the last
    return figure


def test_a_figure_is_written_whole_with_its_settings(tmp_path: Path) -> None:
    path = figures.save(small_figure(), tmp_path / "new" / "a.svg", settings="teacher tiny · seed 7 · $HOME")
    text = path.read_text()
    assert "teacher tiny · seed 7 · $HOME" in text and "costs $5 and" in text
    assert os.listdir(path.parent) == ["a.svg"]
    assert figures.save(small_figure(), tmp_path / "b.png", settings="x").stat().st_size > 500
    plain, wordy = (figures.save(small_figure(), tmp_path / f"{n}.png", settings="w " * n) for n in (1, 400))
    with Image.open(plain) as short, Image.open(wordy) as long:
        assert long.height > short.height  # small print is wrapped, not cut off
        assert long.width < 1.5 * short.width


def test_only_numbers_along_an_axis_are_formulas(tmp_path: Path) -> None:
    figure = figures.new_figure(3, 2)
    axes = figure.subplots()
    axes.barh([0, 1], [10, 10000])
    axes.set_xscale("log")
    axes.set_yticks([0, 1], ["costs $5", "or $6"])
    text = re.sub("<!--.*?-->", "", figures.save(figure, tmp_path / "a.svg", settings="x").read_text())
    assert "costs $5" in text and "or $6" in text
    assert "mathdefault" not in text


def test_the_same_figure_gives_the_same_bytes(tmp_path: Path) -> None:
    for suffix in ("svg", "png"):
        one, two = (figures.save(small_figure(), tmp_path / f"{n}.{suffix}", settings="x") for n in "ab")
        assert one.read_bytes() == two.read_bytes()


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.bmp"):
        figures.save(small_figure(), tmp_path / "a.bmp", settings="x")
    assert not os.listdir(tmp_path)


def test_colours_are_of_one_basis_and_one_scale() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((12, 3)))[0].T
    parts = rng.uniform(-1, 1, (9, 9, 3)) * (3, 2, 1)
    field = parts @ axes + 5
    (alone,) = figures.component_colours([field])
    assert alone.shape == (9, 9, 3) and alone.min() >= 0 and alone.max() <= 1
    for component in range(3):
        correlation = np.corrcoef(alone[..., component].ravel(), parts[..., component].ravel())[0, 1]
        assert abs(correlation) > 0.9
    full, half = figures.component_colours([field, (field - 5) / 2 + 5])
    for component in range(3):
        inside = (full[..., component] > 0) & (full[..., component] < 1)
        slope = np.polyfit(full[..., component][inside], half[..., component][inside], 1)[0]
        assert slope == pytest.approx(0.5)  # half the spread is shown as half the spread
    again, other = figures.component_colours([field, rng.standard_normal((2, 12))], basis=[field])
    np.testing.assert_array_equal(again, alone)
    assert other.shape == (2, 3)


def test_colours_of_a_constant_field_are_grey_not_noise() -> None:
    constant = np.full((4, 4, 8), 0.1, dtype=np.float32)
    (coloured,) = figures.component_colours([constant])
    assert (coloured == 0.5).all()
    line = constant + np.arange(16).reshape(4, 4, 1)  # one component only
    (coloured,) = figures.component_colours([line])
    assert coloured[..., 0].max() == 1 and (coloured[..., 1:] == 0.5).all()


def test_arrays_come_back_without_pickle(tmp_path: Path) -> None:
    path = figures.save_arrays(tmp_path / "a.npz", numbers=[[1.5, 2]], settings='{"a": 1}', names=["tench", "猫"])
    with np.load(path, allow_pickle=False) as read:
        assert read["numbers"].tolist() == [[1.5, 2]]
        assert str(read["settings"]) == '{"a": 1}' and read["names"].tolist() == ["tench", "猫"]
    with pytest.raises(TypeError, match="odd"):
        figures.save_arrays(tmp_path / "b.npz", odd=np.array([None]))
    assert os.listdir(tmp_path) == ["a.npz"]


def test_an_animation_has_its_frames(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 6), (40 * n, 0, 0)) for n in range(4)]
    with Image.open(figures.save_animation(frames, tmp_path / "a.gif")) as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (4, (8, 6), 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name",
    ["a b.png", "../../etc/passwd", "-rf.png", ".hidden", "x" * 300, "\udcff\n.png", "猫.jpg", "$(id);&.png", "."],
)
def test_output_names_are_safe(name: str) -> None:
    stem = figures.output_stem(name)
    assert len(stem) <= 60 and stem.isascii()
    assert stem[0].isalnum() or stem[0] == "_"
    assert set(stem) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_output_names_are_of_one_file_each() -> None:
    names = ["a/cat.png", "b/cat.png", "a/cat.jpg", "a/ca t.png", "a/ca_t.png"]
    assert len({figures.output_stem(name) for name in names}) == len(names)
    assert figures.output_stem("a/cat.png") == figures.output_stem("./a/../a/cat.png")
    assert figures.output_stem("a/cat.png").startswith("cat-")
