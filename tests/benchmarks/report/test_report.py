"""The report: its numbers are those of the tables, its structure is sound, and hostile names stay names."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from importlib import resources
from itertools import combinations, count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab
from typer.testing import CliRunner

from apm.benchmarks.datasets import Sample, open_dataset
from apm.benchmarks.datasets.files import read_rgb, stable_id
from apm.benchmarks.report import Options, sections, write_report
from apm.benchmarks.report.charts import NARROW, WIDE, Chart
from apm.benchmarks.report.drawing import COLOUR, SERIES, STYLE, VARIABLES, shape
from apm.benchmarks.report.flipped import flipped_images
from apm.benchmarks.report.pictures import SIDE, Pictures
from apm.benchmarks.report.series import name_rows
from apm.benchmarks.report.trust import trust
from apm.benchmarks.runs.records import Records
from apm.benchmarks.runs.rows import MethodRows
from apm.benchmarks.tables.build import make_tables
from apm.benchmarks.tables.formats import DETAIL_HEADINGS, details, grid
from apm.benchmarks.tables.stats import reliability_bins
from apm.benchmarks.tables.table import Table, TableRow
from apm.benchmarks.tables.trust import make_trust
from apm.benchmarks.tables.trust_formats import HEADINGS, lines
from apm.cli.main import app
from apm.errors import UsageError
from apm.figures import base as figures
from apm.images.paths import printable
from tests.benchmarks.made_runs import CLASSES, Plain, Stream, make_dataset, make_run
from tests.places import BASELINE

HOSTILE_CLASSES = (
    "<script>document.title='PWNED'</script>",
    "\"'><img src=x onerror=alert(1)>",
    "a\u202egnp & {{ 7*7 }}",
)

HOSTILE_FILES = ("<b>.png", "' onload='x.png", 'q".png', "\x1b[31mline\nbreak.png", "y" * 200 + ".png", "{% raw %}.png")


class Page(HTMLParser):
    """What the tests ask of a page."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "caption":
            self.captions.append("")
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        elif "caption" in self.open:
            self.captions[-1] += data
        elif not {"script", "style"} & set(self.open):
            self.text.append(data)

    def values(self, *names: str) -> list[str]:
        return [value for _, attributes in self.tags for name, value in attributes.items() if name in names]


def hostile_run(folder: Path) -> Path:
    """Record a run on a folder of pictures whose classes and files have hostile names; one picture is broken."""
    samples = []
    for number in range(18):
        name = f"{number}{HOSTILE_FILES[number % len(HOSTILE_FILES)]}"
        path = folder / "data" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (40, 24), (13 * number, 90, 250 - 13 * number)).save(path)
        samples.append(Sample(name, number % 3, partial(read_rgb, path)))
    (folder / "data" / samples[5].id).write_bytes(b"<svg onload=alert(1)>")
    data = make_dataset(class_names=HOSTILE_CLASSES, samples=samples, source=str(folder / "data"), total=18)
    make_run(folder / "run", [Plain(), Plain("other <i>", turn=-3.0)], data, record_steps=True, command=("a", "<u>"))
    return folder / "run"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    return write_report([hostile_run(folder)], folder / "out", Options())[0]


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record a run over a clean set, two corruptions and two levels."""
    folder = tmp_path_factory.mktemp("levels") / "run"
    cells = [make_dataset(24)]
    for corruption in ("fog", "contrast"):
        cells += [make_dataset(24, corruption=corruption, level=level, generated=True) for level in (2, 5)]
    make_run(folder, [Plain(), Plain("other", turn=-3.0)], cells, record_steps=True)
    return folder


@pytest.fixture(scope="module")
def levels_page(levels: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Read the report of that run."""
    return Page(write_report([levels], tmp_path_factory.mktemp("page"), Options())[0].read_text(encoding="utf-8"))


def tables_of(*runs: Path) -> list[Table]:
    return make_tables([Records.open(run) for run in runs])


def test_the_structure_is_sound_and_nothing_is_loaded(hostile: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    page = Page(text)
    ids = Counter(page.values("id"))
    assert [name for name, times in ids.items() if times > 1] == []
    for value in page.values("aria-labelledby"):
        assert set(value.split()) <= set(ids)
    references = page.values("src", "href", "action", "data", "poster", "srcset", "xlink:href")
    assert references
    assert all(value.startswith(("#", "data:")) for value in references)
    assert {value[1:] for value in references if value.startswith("#")} <= set(ids)
    assert "url(" not in text and "@import" not in text
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    assert len(buttons) > 10 and all(one["type"] == "button" for one in buttons)
    assert all(
        {"tabindex", "aria-label"} <= set(a) for tag, a in page.tags if tag == "div" and "scroll" in a.get("class", "")
    )


def test_hostile_names_stay_names(hostile: Path) -> None:
    page = Page(hostile.read_text(encoding="utf-8"))
    assert Counter(tag for tag, _ in page.tags)["script"] == 1
    assert not {"b", "i", "u", "iframe", "object", "foreignobject"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"]
    said = "".join(page.text)
    assert all(printable(name) in said for name in HOSTILE_CLASSES)
    assert "\u202e" not in said and "\x1b" not in said
    assert "other <i>" in said
    assert "a '<u>'" in said


def test_the_policy_knows_the_script_and_style_by_their_content(hostile: Path) -> None:
    text = hostile.read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    policy = policy.replace("&#43;", "+").replace("&#39;", "'")
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


@pytest.mark.slow
def test_tables_are_those_of_apm_table(levels: Path, levels_page: Page) -> None:
    for table in tables_of(levels):
        headings, rows, _ = grid(table)
        assert [headings, *rows] in levels_page.tables
        assert [list(DETAIL_HEADINGS), *details(table)] in levels_page.tables


@pytest.mark.slow
def test_what_can_be_trusted_comes_first_and_is_that_of_apm_table(levels: Path, levels_page: Page) -> None:
    page, tables = levels_page, make_trust(tables_of(levels))
    assert len(tables) == 2 * 4  # by level: two corruptions together, clean, each corruption
    for table in tables:
        assert [list(HEADINGS), *lines(table)] in page.tables
    assert page.captions.index(tables[0].title) < page.captions.index("Accuracy ± standard error, percent")
    folded = [attributes for tag, attributes in page.tags if tag == "details" and "open" not in attributes]
    assert len(folded) >= 4  # single corruptions


def test_gain_against_cost_shows_each_method_once(levels: Path) -> None:
    tables = tables_of(levels)
    found = trust(count(1), tables, name_rows(tables))
    (group,) = found.charts
    assert len(group.charts) == 2 * 2  # by level: the corruptions together, and clean
    pooled = make_trust(tables)[0]
    rows = {row.method: row for row in pooled.rows}
    for method, ms, gain, _, rank in group.charts[0].sheet.rows:
        row = rows.pop(method)
        assert (ms, gain, rank) == (f"{row.ms:.3g}", f"{row.gain:+.1f}", str(row.rank))
    assert not rows
    drawn = group.charts[0].svg()
    assert "logarithmic" in drawn and "mathdefault" not in drawn  # ticks are plain numbers


@pytest.mark.slow
def test_runs_of_other_images_are_reported_and_not_compared(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [Plain()])
    other = [Sample(f"other/{one.id}", one.label, one.load) for one in make_dataset().samples]
    make_run(tmp_path / "b", [Plain("other")], make_dataset(samples=other))
    page = Page(write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "out", Options())[0].read_text("utf-8"))
    assert "digits: the rows are not of the same images." in "".join(page.text)


def test_accuracy_by_level_is_that_of_the_tables(levels: Path) -> None:
    tables = tables_of(levels)
    (group,) = sections.accuracy(count(1), name_rows(tables))
    assert [chart.title for chart in group.charts] == ["contrast", "fog"]
    expected = {}
    for level, table in zip((2, 5), tables, strict=True):
        assert f"level {level}" in table.title
        for row in table.rows:
            for column in ("clean", "fog", "contrast"):
                score = row.cells[column]
                assert score.accuracy is not None and score.stderr is not None
                at = "clean" if column == "clean" else str(level)
                expected[column, row.method, at] = (f"{score.accuracy:.1f}", f"{score.stderr:.1f}", "24")
    for chart in group.charts:
        assert len(chart.sheet.rows) == 6  # two methods, clean and two levels
        for method, _, level, *numbers in chart.sheet.rows:
            wanted = expected["clean" if level == "clean" else chart.title, method, level]
            assert tuple(n.replace("–", "0.0") for n in numbers) == wanted


def test_one_level_is_shown_by_column(tmp_path: Path) -> None:
    make_run(tmp_path / "run", dataset=[make_dataset(), make_dataset(corruption="fog", level=5, generated=True)])
    (group,) = sections.accuracy(count(1), name_rows(tables_of(tmp_path / "run")))
    assert [row[0] for row in group.charts[0].sheet.rows] == ["clean", "fog"]


def test_curves_end_where_the_table_stands(levels: Path) -> None:
    tables = tables_of(levels)
    groups = sections.steps(count(1), name_rows(tables))
    assert [group.heading for group in groups] == [table.title for table in tables]
    row = tables[0].rows[0]
    for chart in groups[0].charts:
        lines = [line for line in chart.sheet.rows if line[0] == row.method]
        last = {line[1]: line for line in lines}  # of each, the last step
        score = row.cells[chart.title]
        assert last["accuracy"][2:4] == ("2", f"{score.accuracy:.1f}")
        assert last["agreement"][2:4] == ("2", f"{score.agreement:.1f}")
        assert {line[2] for line in lines} == {"0", "1", "2"}


def test_what_is_not_recorded_is_said(levels: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", [Stream()])
    parts = name_rows(tables_of(tmp_path / "run"))
    assert sections.last_step(count(1), parts) == sections.steps(count(1), parts) == []
    assert sections.absent(parts) == ["No method of these runs adapts a student: there is nothing to show."]
    baseline = BASELINE
    said = sections.absent(name_rows(tables_of(baseline)))
    assert "No predictions of each step for apm, apm[mta,8]: make them with apm bench --record-steps." in said
    (cosine, loss) = sections.last_step(count(1), name_rows(tables_of(baseline)))[0].charts
    assert {row[1] for row in cosine.sheet.rows} == {row[1] for row in loss.sheet.rows} == {"apm", "apm[mta,8]"}


def answers_of(row: TableRow) -> list[MethodRows]:
    return [answers.rows for answers in row.answers.values()]


def test_calibration_counts_all_cells_of_a_table(levels: Path) -> None:
    tables = tables_of(levels)
    for group, table in zip(sections.calibration(count(1), name_rows(tables)), tables, strict=True):
        for chart, row in zip(group.charts, table.rows, strict=True):
            assert row.total is not None and row.total.ece is not None
            assert [int(line[4]) for line in chart.sheet.rows] == [36, 36] and row.total.n == 72
            right = sum(float(line[2]) for line in chart.sheet.rows) / 2
            assert right == pytest.approx(np.mean([rows.rank == 1 for rows in answers_of(row)]), abs=1e-3)
            assert f"ECE {row.total.ece:.3f}" in chart.title  # the tables' own, over bins of equal width


def test_flips_are_those_of_the_table_and_limited(levels: Path) -> None:
    tables = tables_of(levels)
    parts = name_rows(tables)
    every = flipped_images(parts, limit=1000, pictures=Pictures(wanted=False))
    assert len({cell.heading for cell in every}) == len(every)
    for table in tables:
        for row in table.rows:
            for column, score in row.cells.items():
                level = table.title[-1]
                heading = "digits" if column == "clean" else f"digits, {column}, level {level}"
                cell = next((cell for cell in every if cell.heading == heading), None)
                changes = [c for image in (cell.shown if cell else ()) for c in image.changes if c.method == row.method]
                assert sum(change.gained for change in changes) == score.wrong_to_right
                assert sum(not change.gained for change in changes) == score.right_to_wrong
    few = flipped_images(parts, limit=2, pictures=Pictures(wanted=False))
    assert [cell.flipped for cell in few] == [cell.flipped for cell in every]
    assert [cell.shown for cell in few] == [cell.shown[:2] for cell in every]
    assert max(cell.flipped for cell in few) > 2


def test_flipped_pictures_are_the_images_themselves(hostile: Path) -> None:
    page = Page(hostile.read_text(encoding="utf-8"))
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert pictures
    for one in pictures:
        (number,) = map(int, re.findall(r": (\d+)[^:]*$", one["alt"]))
        data = base64.b64decode(one["src"].removeprefix("data:image/jpeg;base64,"))
        pixel = np.asarray(Image.open(io.BytesIO(data)))[12, 20].astype(int)
        assert np.abs(pixel - (13 * number, 90, 250 - 13 * number)).max() <= 4


def test_generated_corruptions_are_shown_as_the_methods_saw_them(tmp_path: Path) -> None:
    data = open_dataset("digits", corruption="contrast", level=3, limit=6, seed=0)
    make_run(tmp_path / "run", [Stream()], data, limit=6)
    ((_, _, answers),) = name_rows(tables_of(tmp_path / "run"))[0].rows[0].cells()
    for sample in data.samples:
        uri = Pictures().find(answers, sample.id)
        assert uri is not None
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"), dtype=float)
        seen = sample.load()
        seen.thumbnail((SIDE, SIDE))
        assert np.abs(shown - np.asarray(seen, dtype=float)).mean() < 3
    assert Pictures(wanted=False).find(answers, data.samples[0].id) is None


def test_an_id_never_leads_out_of_the_recorded_folder(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "data" / "inside.png")
    os.mkdir(os.fsencode(tmp_path / "data") + b"/caf\xe9")
    Image.new("RGB", (40, 40)).save(os.fsdecode(os.fsencode(tmp_path / "data") + b"/caf\xe9/a.png"))
    make_run(tmp_path / "run", dataset=make_dataset(source=str(tmp_path / "data")))
    ((_, _, answers),) = name_rows(tables_of(tmp_path / "run"))[0].rows[0].cells()
    found = Pictures()
    assert found.find(answers, "inside.png") and found.find(answers, stable_id(os.fsdecode(b"caf\xe9/a.png")))
    for outside in ("../secret.png", str(tmp_path / "secret.png"), "a/../../secret.png", "absent.png", "", "\x00.png"):
        assert found.find(answers, outside) is None


@pytest.mark.slow
def test_the_same_records_give_the_same_bytes_and_other_files_are_left(levels: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    first = write_report([levels], tmp_path / "out", Options())[0].read_bytes()
    second = write_report([levels], tmp_path / "out", Options())[0].read_bytes()
    assert first == second
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.html", "notes.txt"]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_two_runs_with_the_same_cells_are_told_apart(levels: Path, tmp_path: Path) -> None:
    shutil.copytree(levels, tmp_path / "copy")
    parts = name_rows(tables_of(levels, tmp_path / "copy"))
    for part in parts:
        names = [named.name for named in part.rows]
        assert len(set(names)) == len(names) == 4
        assert any(str(levels) in name for name in names) and any("copy" in name for name in names)
    assert len({named.series for part in parts for named in part.rows}) == 4


def report(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_path(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    code, stdout, _ = report(tmp_path / "run", "--out", tmp_path / "out", "--flips", 1, "--no-images")
    assert (code, stdout) == (0, f"{tmp_path / 'out' / 'index.html'}\n")


@pytest.mark.parametrize("foreign", ["<html>mine</html>", ""])
def test_a_page_that_is_not_ours_is_not_replaced(levels: Path, tmp_path: Path, foreign: str) -> None:
    (tmp_path / "index.html").write_text(foreign)
    code, stdout, stderr = report(levels, "--out", tmp_path)
    assert (code, stdout) == (2, "")
    assert "was not written by apm report" in stderr
    assert (tmp_path / "index.html").read_text() == foreign


def test_errors_are_sentences(levels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "index.html").symlink_to(tmp_path / "file")
    shutil.copytree(levels, tmp_path / "damaged")
    next((tmp_path / "damaged").glob("shards/*/*.parquet")).write_bytes(b"PAR1")
    shutil.copytree(levels, tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty" / "shards")
    for arguments, said in [
        ((tmp_path,), "No run at"),
        ((levels, levels), "more than once"),
        ((levels, levels / "." / ".." / levels.name), "more than once"),
        ((tmp_path / "damaged",), "is damaged"),
        ((tmp_path / "empty",), "No rows yet"),
    ]:
        code, stdout, stderr = report(*arguments, "--out", out)
        assert (code, stdout) == (2, "")
        assert said in stderr and "Traceback" not in stderr
        assert not out.exists()
    assert report(levels, "--out", tmp_path / "file")[0] == 2
    assert report(levels, "--out", tmp_path / "linked")[0] == 2
    with pytest.raises(UsageError, match="is a file"):
        write_report([levels], tmp_path / "file", Options())


def test_names_that_are_not_utf8_come_through_a_run_record(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"tea"):
        os.makedirs(os.fsencode(tmp_path) + b"/tree/" + name)
        Image.new("RGB", (40, 40)).save(os.fsdecode(os.fsencode(tmp_path) + b"/tree/" + name + b"/a.png"))
    assert open_dataset("folder", tmp_path / "tree").class_names == ("caf\\xe9", "tea")
    strange = os.fsdecode(b"caf\xe9")
    make_run(tmp_path / "run", dataset=make_dataset(source=strange))
    assert next(iter(Records.open(tmp_path / "run").cells.values()))["source"] == strange
    page = write_report([tmp_path / "run"], tmp_path / "out", Options())[0]
    assert "caf\\udce9" in page.read_text(encoding="utf-8")


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


COLOUR_VISION = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    # Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
    "no red cones": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green cones": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "no blue cones": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


def seen(colour: str, vision: str) -> np.ndarray:
    """A colour as CIELAB, as someone with this colour vision sees it."""
    value = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    left = np.clip(np.array(COLOUR_VISION[vision]) @ linear, 0, 1)
    return rgb2lab(np.where(left <= 0.0031308, 12.92 * left, 1.055 * left ** (1 / 2.4) - 0.055))


def test_colours_stand_out_from_the_page_in_both_themes() -> None:
    style = (resources.files("apm.benchmarks.report") / "templates" / "page.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r"\{([^{}]*--paper:[^}]*)\}", style)
    ]
    assert len(themes) == 3 and themes[1] == themes[2]
    for theme in themes[:2]:
        assert contrast(theme["ink"], theme["paper"]) >= 7
        assert all(contrast(theme[name], theme["paper"]) >= 4.5 for name in ("soft", "link", "warn"))
        assert contrast(theme["warn"], theme["warn-paper"]) >= 4.5
        assert all(contrast(theme[f"c{number}"], theme["paper"]) >= 3 for number in range(SERIES))
        for vision in COLOUR_VISION:
            series = [seen(theme[f"c{number}"], vision) for number in range(SERIES)]
            assert min(float(np.linalg.norm(one - other)) for one, other in combinations(series, 2)) > 15, vision
    assert len({shape(0, 0, number, 4) for number in range(SERIES)}) == SERIES  # colour is never the only sign


def drawn(chart: Chart, width: int) -> Any:
    """A chart's axes, laid out."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with matplotlib.rc_context(STYLE):
        figure = figures.new_figure(width / 72, chart.height / 72)
        axes = figure.subplots()
        chart.draw(axes, width)
        FigureCanvasAgg(figure).draw()
    return axes


def charts_of(run: Path) -> list[Chart]:
    parts, ids = name_rows(tables_of(run)), count(1)
    of = (sections.accuracy, sections.flips, sections.steps, sections.last_step, sections.calibration, sections.speed)
    return [chart for section in of for group in section(ids, parts) for chart in group.charts]


@pytest.mark.slow
@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_marks_are_whole_within_the_frame_and_nothing_is_written_over(levels: Path, tmp_path: Path, width: int) -> None:
    """At values of 0 and 100 too: no mark touches the frame, no text meets another or a line of chance."""
    make_run(tmp_path / "one", [Plain(), Stream()], [make_dataset(24), make_dataset(24, corruption="fog", level=5)])
    charts = charts_of(levels)[:6] + charts_of(tmp_path / "one")
    assert len({chart.description[:12] for chart in charts}) >= 5
    for chart in charts:
        axes = drawn(chart, width)
        frame = axes.get_window_extent()
        marks = [line for line in axes.lines if str(line.get_gid()).startswith("say:")]
        assert marks or axes.patches
        for one in marks:
            (x,), (y,) = one.get_data()
            at = axes.transData.transform((x, y))
            assert min(at[0] - frame.x0, frame.x1 - at[0], at[1] - frame.y0, frame.y1 - at[1]) > 3, chart.title
        texts = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert not any(one.overlaps(other) for one, other in combinations(texts, 2)), chart.title
        for line in axes.lines:
            if line.get_linestyle() != "-" and line.get_color() == COLOUR["soft"]:
                box = line.get_path().transformed(line.get_transform()).get_extents()
                assert not any(box.overlaps(text) for text in texts), chart.title


def test_charts_have_the_pages_colours_and_can_be_read_by_keyboard(levels: Path) -> None:
    page = Page(f"<html>{''.join(chart.svg() for chart in charts_of(levels)[:5])}</html>")
    inside = [attributes for _, attributes in page.tags]
    painted = {attributes[name] for attributes in inside for name in ("fill", "stroke") if name in attributes}
    assert {"var(--c0)", "var(--c1)", "var(--rule)", "var(--soft)"} <= painted
    assert painted <= {"none", *(f"var(--{name})" for name in VARIABLES)}
    roots = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(roots) == 5 and all(one["tabindex"] == "0" for one in roots)
    marks = [attributes for attributes in inside if attributes.get("class") == "said"]
    assert len(marks) > 12 and all(one["tabindex"] == "-1" and ": " in one["aria-label"] for one in marks)
    assert {tag for tag, _ in page.tags} <= {
        "html",
        "svg",
        "title",
        "desc",
        "g",
        "defs",
        "path",
        "use",
        "text",
        "tspan",
    }


@pytest.mark.slow
def test_a_chart_alone_fills_the_page(levels: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", dataset=[make_dataset(), make_dataset(corruption="fog", level=5, generated=True)])
    (page,) = [write_report([tmp_path / "run"], tmp_path / "out", Options())[0].read_text(encoding="utf-8")]
    widths = re.findall(r'<div class="on-(wide|narrow)"><svg viewBox="0 0 (\d+)', page)
    assert set(widths) == {("wide", str(WIDE)), ("narrow", str(NARROW))} and len(widths) >= 4


def test_reliability_bins_hold_as_many_answers_each_with_their_intervals() -> None:
    draw = np.random.default_rng(0)
    sure = draw.random(260)
    right = draw.random(260) < sure
    bins = reliability_bins(sure, right)
    assert [one.count for one in bins] == [26] * 10
    order = np.argsort(sure).reshape(10, 26)
    for one, part in zip(bins, order, strict=True):
        assert (one.minimum, one.maximum) == (sure[part].min(), sure[part].max())
        assert one.confidence == pytest.approx(sure[part].mean()) and one.accuracy == right[part].mean()
        p, n, z = right[part].mean(), 26, 1.959964  # Wilson's interval, written out
        middle, reach = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert (one.low, one.high) == pytest.approx(
            ((middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n))
        )
    assert len(reliability_bins(sure[:50], right[:50])) == 2
    assert reliability_bins(sure[:49], right[:49]) == []


@pytest.mark.slow
def test_too_few_answers_are_said_to_be_too_few(tmp_path: Path) -> None:
    make_run(tmp_path / "run", [Plain()], [make_dataset(36)])
    (group,) = sections.calibration(count(1), name_rows(tables_of(tmp_path / "run")))
    assert group.charts == () and len(group.notes) == 1
    assert re.search(r"ECE .*, n = 36: too few answers for a diagram, which needs 50", group.notes[0])
    page = write_report([tmp_path / "run"], tmp_path / "out", Options())[0].read_text(encoding="utf-8")
    assert "too few answers for a diagram" in page


@pytest.mark.slow
def test_a_browser_shows_it_and_runs_nothing_else(hostile: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom")
    done = subprocess.run([browser, *flags, hostile.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    page = Page(done.stdout)
    assert dict(page.tags)["html"]["class"] == "js"  # our own script has run
    (title,) = re.findall(r"<title>(apm report[^<]*)</title>", done.stdout)
    assert title.endswith("run") and "PWNED" not in title
    assert Counter(tag for tag, _ in page.tags)["script"] == 1
    theme = next(attributes for _, attributes in page.tags if attributes.get("id") == "theme")
    assert "hidden" not in theme


@pytest.mark.slow
def test_settings_name_what_a_run_was_made_with(levels: Path, levels_page: Page) -> None:
    said = "".join(levels_page.text)
    run = json.loads((levels / "run.json").read_text(encoding="utf-8"))
    session = run["sessions"][0]
    for value in (
        run["teacher"]["identity"],
        session["started"],
        session["device_name"],
        session["versions"]["torch"],
        *CLASSES,
    ):
        assert printable(str(value)) in said
