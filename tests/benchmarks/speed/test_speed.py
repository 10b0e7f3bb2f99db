"""The measurements: their arithmetic, their records, their report. Never the times themselves."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import apm.benchmarks
import apm.classifier
from apm.benchmarks.datasets import Dataset, Sample
from apm.benchmarks.speed import __main__ as command
from apm.benchmarks.speed import children, fewer_queries, kind, options, pipeline, report, startup, step, timing
from apm.benchmarks.speed.kinds import KINDS
from apm.benchmarks.speed.machine import floor, rate_probe, stream_probe
from apm.benchmarks.speed.options import TINY, Options, images_and_targets
from apm.benchmarks.speed.profile import ADAM_BYTES, middle_flops, trained_parameters
from apm.benchmarks.speed.published_loop import PublishedLoop
from apm.benchmarks.tables.stats import mcnemar
from apm.student.config import APMConfig
from apm.student.model import APM
from tests.counters import Operations
from tests.fakes import FakeTeacher
from tests.places import ROOT

CPU = torch.device("cpu")
QUICK = Options(quick=True, rounds=2, precision="fp32")
FOLDER = Path(apm.benchmarks.__file__).parent


def check(found: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """See of what was found that it is plain JSON and has a table with a line for each row; return its rows."""
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    table = KINDS[name].table(found)
    assert sum(line.startswith("| ") for line in table.splitlines()) >= len(found["rows"])
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def measure(name: str, **changes: Any) -> dict[str, Any]:
    """What a kind finds with tiny sizes, and these changes of the options."""
    found: dict[str, Any] = KINDS[name].measure(QUICK.but(**changes))
    check(found, name)
    return found


# -- clocks and floors


def test_spread() -> None:
    assert timing.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "min": 1.0, "n": 5}


def test_interleaved_gives_everybody_a_turn_in_every_round() -> None:
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "abc"}  # type: ignore[misc]
    times = timing.interleaved(works, CPU, 3, fewer={"c": 1})
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 1}
    assert calls == ["a", "b", "c", "a", "b", "c", "b", "a", "a", "b"]  # warm-up, then each round starts elsewhere


def test_floor_is_the_larger_of_compute_and_memory() -> None:
    operations, traffic = middle_flops(TINY), ADAM_BYTES * trained_parameters(TINY)
    low = floor(TINY, rate=operations / 2.0, bandwidth=traffic / 0.5)
    assert low == pytest.approx({"compute": 2.0, "memory": 0.5, "seconds": 2.0})
    assert floor(TINY, rate=operations / 2.0, bandwidth=traffic / 3.0)["seconds"] == pytest.approx(3.0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_probes_do_what_they_say(precision: str) -> None:
    from apm.benchmarks.speed.profile import measured_flops

    run, operations = rate_probe(TINY, precision, 2, CPU)
    assert measured_flops(run) == operations
    assert 3 * operations == 2 * middle_flops(TINY)  # forward is a third of a step, for two students
    assert measured_flops(step.six_products(TINY, precision, 2, CPU)) == 2 * middle_flops(TINY)
    run, traffic = stream_probe(TINY, 1, CPU)
    assert traffic == 8 * trained_parameters(TINY)
    assert float(run().sum()) == trained_parameters(TINY)  # type: ignore[attr-defined]


def test_the_published_loop_computes_the_plain_step_row_by_row() -> None:
    config = replace(TINY, image_size=40)  # 8 copies of 25 locations: no multiple of 16 rows
    image, target = (values.double() for values in images_and_targets(config, 1, CPU))
    towers = iter(range(3))  # run out unless they are called once a step
    loop = PublishedLoop(config, image, target, lr=1e-3, towers=lambda: next(towers))
    loop.model.double()  # Adam makes much of a gradient that is rounding: float64 leaves none of it but the keys' bias
    model = APM(config).double()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    sizes: list[int] = []
    joined: list[tuple[int, ...]] = []

    def see(operation: object, _: object, made: list[torch.Tensor]) -> None:
        if operation is torch.ops.aten.cat.default:
            joined.append(tuple(made[0].shape))

    loop.model.mlp.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    for _ in range(3):
        adam.zero_grad()
        loss = F.mse_loss(model(image), target)
        loss.backward()
        adam.step()
        sizes.clear()
        joined.clear()
        with Operations(see):
            assert loop.step().item() == pytest.approx(loss.item(), rel=1e-9)
        assert sizes == [16] * 12 + [8]  # 8 copies x 25 locations, row by row
        so_far = [min(16 * chunk, 200) for chunk in range(1, 14)]
        for width in (config.dim, 3):  # features and colours: joined again after every chunk (and before the backward)
            assert [rows for rows, *rest in joined if rest == [width]][:13] == so_far
    assert next(towers, None) is None
    for name, value in model.named_parameters():
        if not name.endswith("in_proj_bias"):
            assert torch.allclose(loop.model.get_parameter(name), value, rtol=0, atol=1e-7), name


def test_the_published_loop_runs_with_either_readout() -> None:
    config = replace(TINY, readout="mean")
    loop = PublishedLoop(config, *images_and_targets(config, 1, CPU))
    assert loop.step() > loop.step()


# -- records


def test_progress_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measure(*_: object) -> None:
        logging.getLogger(f"{apm.benchmarks.__name__}.speed.timing").info("round 1 of 1")

    monkeypatch.setattr(command, "_do", measure)
    again = logging.StreamHandler()  # as logging.basicConfig adds it to the root
    logging.getLogger().addHandler(again)
    try:
        assert command.main(["steps"]) == 0
    finally:
        logging.getLogger().removeHandler(again)
    assert capsys.readouterr().err == "round 1 of 1\n"


def test_step(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(options, "measured_precision", lambda _: "bf16")
    caplog.set_level("INFO")
    made = measure("step", rounds=3, batch=2, precision="auto", published_rounds=1)
    rows = {(row["name"], row["precision"]): row for row in made["rows"]}
    assert set(rows) == {
        *((name, precision) for name in ("six products", "engine", "optimiser") for precision in ("fp32", "bf16")),
        ("plain form", "fp32"),
        ("published", "fp32"),
    }
    assert rows["engine", "fp32"]["seconds"]["n"] == 3 and rows["published", "fp32"]["seconds"]["n"] == 1
    summary = made["summary"]
    assert summary["middle_flops"] == middle_flops(TINY) and summary["auto_precision"] == "bf16"
    for precision in ("fp32", "bf16"):
        values = summary[precision]
        assert values["floor"]["compute"]["min"] <= middle_flops(TINY) / values["rate"]["median"]
        assert values["published_ratio"]["n"] == 1 and values["plain_over_engine"]["n"] == 3
    said = [message.getMessage() for message in caplog.records]
    assert "warm-up: engine bf16" in said and "warm-up: published fp32" in said and "round 3 of 3" in said


@pytest.mark.parametrize("chosen", [pytest.param("fp32", marks=pytest.mark.slow), "auto"])
def test_a_step_in_float32_touches_no_bfloat16(
    chosen: Literal["fp32", "auto"], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where bfloat16 is emulated, one step in it would take minutes."""
    monkeypatch.setattr(options, "measured_precision", lambda _: "fp32")
    seen: set[torch.dtype] = set()
    with Operations(lambda _, __, made: seen.update(value.dtype for value in made)):
        made = measure("step", precision=chosen, batch=None, published_rounds=1)
    assert torch.float32 in seen and torch.bfloat16 not in seen
    assert {row["precision"] for row in made["rows"]} == {"fp32"}
    assert report.plot({**made, "kind": "step", "file": "step.json"}, tmp_path).is_file()


def test_bf16_alone_can_be_asked_for() -> None:
    made = measure("step", precision="bf16", batch=None, published_rounds=0)
    rows = {(row["name"], row["precision"]): row for row in made["rows"]}
    assert ("engine", "bf16") in rows and ("engine", "fp32") not in rows
    assert "ratio_to_floor" not in rows["plain form", "fp32"]  # its floor was not measured


def test_step_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every time is known; so every ratio is."""
    config, batch = TINY, 2
    known = {
        "rate fp32": 1.0,
        "six products fp32": 3.3,
        "engine fp32": 4.5,
        "optimiser fp32": 0.9,
        "rate bf16": 0.5,
        "six products bf16": 1.6,
        "engine bf16": 3.0,
        "optimiser bf16": 0.9,
        "memory": 1e-9,
        "plain form fp32": 6.0,
        "published fp32": 180.0,
    }
    monkeypatch.setattr(options, "measured_precision", lambda _: "bf16")
    monkeypatch.setattr(step, "interleaved", lambda works, *_, **__: {name: np.full(2, known[name]) for name in works})
    made = measure("step", batch=batch, precision="auto", published_rounds=1)
    rows = {(row["name"], row["precision"]): row for row in made["rows"]}
    # the probe is a third of a step of two students: the floor of one is 1.5 s in fp32 and 0.75 s in bf16
    assert made["summary"]["fp32"]["floor"]["seconds"]["median"] == pytest.approx(1.5)
    assert made["summary"]["bf16"]["rate"]["median"] == pytest.approx(batch * middle_flops(config) / 3 / 0.5)
    assert rows["engine", "fp32"]["seconds"]["median"] == pytest.approx(2.25)
    assert rows["engine", "fp32"]["ratio_to_floor"]["median"] == pytest.approx(1.5)
    assert rows["engine", "bf16"]["ratio_to_floor"]["median"] == pytest.approx(2.0)
    assert rows["plain form", "fp32"]["ratio_to_floor"]["median"] == pytest.approx(4.0)
    assert made["summary"]["fp32"]["optimiser_share"]["median"] == pytest.approx(0.2)
    assert made["summary"]["fp32"]["published_ratio"]["median"] == pytest.approx(80.0)
    assert "ratio_to_floor" not in rows["optimiser", "fp32"]


def test_sweeps_of_the_student() -> None:
    assert [row["steps"] for row in measure("steps")["rows"]] == [1, 2]
    rows = measure("grid")["rows"]
    assert [(row["what"], row["side"], row["locations"]) for row in rows] == [
        ("step", 7, 49),
        ("step", 14, 196),
        ("features", 7, 49),
        ("features", 14, 196),
    ]
    assert rows[1]["flops"] > rows[0]["flops"]
    assert [row["patches"] for row in measure("patches")["rows"]] == [1, 4, 16]
    rows = measure("batch", batches=[1, 3])["rows"]
    assert rows[1]["per_student"]["median"] == pytest.approx(rows[1]["seconds"]["median"] / 3)


@pytest.mark.slow
def test_sweeps_of_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "load_teacher", lambda *_, **__: FakeTeacher(dim=32))
    monkeypatch.setattr(pipeline, "CHECKPOINTS", (1, 5))
    rows = measure("labels", teacher="fake", steps=1)["rows"]
    assert [(row["labels"], row["head_bytes"]) for row in rows] == [(10, 4 * 10 * 32), (100, 4 * 100 * 32)]
    rows = measure("images", teacher="fake", steps=1, limit=3)["rows"]
    assert [row["images"] for row in rows] == [1, 3]
    assert rows[0]["images_per_second"] == pytest.approx(1 / rows[0]["seconds"], rel=1e-6)
    assert rows[0]["seconds"] < rows[1]["seconds"]


@pytest.mark.slow
def test_processes_under_torchs_launcher() -> None:
    rows = measure("processes", rounds=1, processes=[2], limit=3, steps=1)["rows"]
    assert rows[0]["processes"] == 2
    assert rows[0]["images_per_second"]["median"] == pytest.approx(3 / rows[0]["seconds"]["median"])


def test_fewer_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = FakeTeacher(dim=32)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(6)]
    samples = [Sample(f"{i}.png", i % 2, lambda i=i: pictures[i]) for i in range(6)]  # type: ignore[misc]
    dataset = Dataset(
        name="folder",
        samples=samples,
        class_names=("cat", "dog"),
        templates=("a photo of a {}.",),
        prompts_name="single",
        layout="",
        source="",
        split="",
        fingerprint="0",
        notes=(),
        total=6,
    )
    of = {"root": None, "limit": None, "teacher": "fake"}
    monkeypatch.setattr(fewer_queries, "load_teacher", lambda *_, **__: teacher)
    monkeypatch.setattr(fewer_queries, "open_dataset", lambda *_, **__: dataset)
    rows = measure("queries", counts=[2, 8], steps=4, **of)["rows"]
    assert [row["queries"] for row in rows] == [2, 8, TINY.cells]
    assert rows[0]["flops"] < rows[1]["flops"] < rows[2]["flops"]
    whole = rows[-1]
    assert (whole["lost"], whole["won"], whole["mcnemar_p"]) == (0, 0, 1.0)
    for row in rows:
        assert row["accuracy"] * 6 == pytest.approx(whole["accuracy"] * 6 - row["lost"] + row["won"])
        assert row["mcnemar_p"] == mcnemar(row["lost"], row["won"])
        assert 0 <= row["agreement"] <= 1 and row["seconds"]["n"] == 6
        assert {part: values["n"] for part, values in row["step"].items()} == dict.fromkeys(
            ("products", "adam", "whole", "ratio", "first", "readout", "update"), QUICK.rounds
        )
    # a picture of one's own token: labels given by the teacher make its accuracy one, and agreement is accuracy
    tokens = [teacher.encode_image(teacher.preprocess(one)[None]) for one in pictures]
    from apm.text.zeroshot import ZeroShotHead

    head = ZeroShotHead.build(teacher, ("cat", "dog"), ("a photo of a {}.",))
    own = [Sample(one.id, int(head.logits(t).argmax()), one.load) for one, t in zip(samples, tokens, strict=True)]
    dataset = replace(dataset, samples=own)
    made = measure("queries", counts=[2], steps=2, **of)
    assert made["summary"]["teacher_accuracy"] == 1.0
    assert all(row["agreement"] == row["accuracy"] for row in made["rows"])


def test_prompt_tuning_beside_the_published_loop() -> None:
    made = measure("tuning", rounds=1)
    assert [row["name"] for row in made["rows"]] == ["apm", "published loop", "views alone"]
    summary = made["summary"]
    assert summary["same_first_label"]
    assert summary["largest_difference_of_logits"] < 1e-4
    assert summary["largest_change_by_tuning"] > 1e-3  # there was something to agree on
    assert "10 class names, 8 views" in KINDS["tuning"].table(made)


def test_a_step_is_held_to_its_products_and_adams_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every time is known; so the ratio is. The probe of the memory moves 8 bytes a parameter, Adam 28."""
    known = {name: np.array(two) for name, two in {"products": (1, 2), "adam": (2, 2), "whole": (12, 18)}.items()}
    more = {"first", "readout", "update"}

    def timed(works: dict[str, Callable[[], object]], *_: object) -> dict[str, Any]:
        assert set(works) == {*known, *more}
        for name in more:
            works[name]()
        return {name: known.get(name, np.array([3.0, 3.0])) for name in works}

    monkeypatch.setattr(fewer_queries, "interleaved", timed)
    parts = fewer_queries.parts_of_a_step(QUICK, TINY, 4)
    assert (parts["adam"]["min"], parts["ratio"]["min"], parts["whole"]["median"]) == (7.0, 1.5, 15.0)
    assert parts["ratio"]["median"] == pytest.approx((12 / 8 + 18 / 9) / 2)


@pytest.mark.slow
def test_startup_stages_are_those_of_the_script(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(apm.classifier, "load_teacher", lambda _: FakeTeacher(default_labels=("cat", "dog")))
    monkeypatch.setattr(sys, "argv", ["-c", "fake", str(picture), "small"])
    monkeypatch.setattr(apm.classifier.Classifier, "__call__", None)  # the command decodes in threads: `classify`
    exec(compile(startup._CHILD, "child", "exec"), {})
    output = capsys.readouterr().out
    spans = json.loads(output)
    assert all(span > 0 for span in spans.values())

    commands: list[list[str]] = []

    def run(arguments: list[str]) -> Any:
        commands.append(list(arguments[1:]))
        listing = "import time:   1250000 |    1250000 | torch\n"
        return children.subprocess.CompletedProcess(arguments, 0, output, listing)

    monkeypatch.setattr(startup, "must_run", run)
    made = measure("startup", rounds=1, photograph=picture, teacher="fake")
    assert made["summary"]["imports"] == {"torch": 1.25}
    assert {row["what"]: row["seconds"]["median"] for row in made["rows"] if row["stage"]} == spans
    assert commands[0] == ["-m", "apm", "--help"] and commands[2][:3] == ["-m", "apm", "classify"]


def test_imports_are_summed_up_by_package() -> None:
    listing = (
        "import time: self [us] | cumulative | imported package\n"
        "import time:       250 |        250 |     numpy.core\n"
        "import time:    400000 |     400250 |   numpy\n"
        "import time:   1000000 |    1400250 | torch\n"
        "note: something else\n"
    )
    assert startup.by_package(listing) == {"torch": 1.0, "numpy": pytest.approx(0.40025)}


def test_a_failed_child_is_an_error_with_its_words() -> None:
    from apm.errors import ApmError

    with pytest.raises(ApmError, match="no such thing"):
        children.must_run([sys.executable, "-c", "raise SystemExit('no such thing')"])


# -- the command and the report


@pytest.mark.slow
def test_command_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, docs = tmp_path / "results", tmp_path / "docs"
    where = ["--out", str(results), "--docs", str(docs)]
    assert command.main(["report", *where]) == 2
    assert "There are no records" in capsys.readouterr().err
    for name in ("steps", "step"):
        assert command.main([name, "--quick", "--precision", "fp32", "--device", "cpu", "--out", str(results)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("| steps |") and captured.err.endswith("speed-step-tiny-cpu-fp32.json\n")
    assert command.main(["report", *where]) == 0
    assert {path.name for path in docs.iterdir()} == {
        "speed.md",
        "speed-step-tiny-cpu-fp32.svg",
        "speed-steps-tiny-cpu-fp32.svg",
    }
    page = (docs / "speed.md").read_text(encoding="utf-8")
    assert page == report.page_of(kind.read_all(results))
    assert page.index("One step beside the floor") < page.index("Time against steps") < page.index("On a GPU")
    first = {path.name: path.read_bytes() for path in docs.iterdir()}
    assert command.main(["report", *where]) == 0
    assert {path.name: path.read_bytes() for path in docs.iterdir()} == first  # the same records, the same bytes


def test_the_tables_of_records_are_printed_without_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["--table"], ["--table", str(ROOT / "benchmarks" / "results" / "speed-steps-paper-cpu.json")]):
        assert command.main(["steps", *arguments]) == 0
        assert "| steps | one image | per step |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_page_says_nothing_of_missing_gpus_once_one_was_measured() -> None:
    given = KINDS["steps"].read(["--quick", "--device", "cpu", "--precision", "fp32"])
    assert given.record.name == "speed-steps-tiny-cpu-fp32.json"
    made = {**KINDS["steps"].measured(given), "file": "speed-steps-tiny-cuda.json"}
    assert made["kind"] == "steps" and made["environment"]["load_average"].keys() == {"before", "after"}
    made["environment"] = {**made["environment"], "device": "cuda"}
    page = report.page_of([made])
    assert "tiny student, GPU" in page and "Not measured" not in page


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("speed-*.json")), ids=lambda p: p.stem)
def test_plots_are_legible(path: Path) -> None:
    """Labels along the axes stand apart, sizes that cannot be halved are not, and no curve lies on the frame."""
    made = json.loads(path.read_text(encoding="utf-8"))
    if not KINDS[made["kind"]].panels:
        pytest.skip("this kind is a table only")
    figure = report.drawn(made)
    figure.draw_without_rendering()
    for axes in figure.axes:
        shown = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
        boxes = sorted((label.get_window_extent() for label in shown), key=lambda box: box.x0)
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
        if axes.get_xlabel() in ("processes", "locations a step", "students side by side"):
            assert all(label.get_text().replace(",", "").isdecimal() for label in shown)
        frame = axes.get_window_extent()
        for line in axes.get_lines():
            if line.get_transform() == axes.transData:  # not one from edge to edge
                x, y = axes.transData.transform(line.get_xydata()).T
                assert x.min() > frame.x0 + 2 and x.max() < frame.x1 - 2, made["kind"]
                assert y.min() > frame.y0 + 2 and y.max() < frame.y1 - 2, made["kind"]
        legend = axes.get_legend()
        points = [axes.transData.transform(line.get_xydata()) for line in axes.get_lines()]
        assert legend is None or not any(legend.get_window_extent().count_contains(each) for each in points)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--device", "gpu"], "device"),
        (["stpes"], 'Did you mean "steps"'),
        (["labels", "--teacher", "embeded"], "embeded"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*arguments, "--out", str(tmp_path)]) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_records_in_the_repository_and_the_page_made_of_them() -> None:
    folder = ROOT / "benchmarks" / "results"
    if not list(folder.glob("speed-*.json")):
        pytest.skip("no speed records in benchmarks/results yet")
    records = kind.read_all(folder)
    for one in records:
        assert one["settings"]["preset"] in ("paper", "small")
        name = kind.file_name(one["kind"], one["settings"]["preset"], one["environment"]["device"])
        assert one["file"].replace("-fp32.json", ".json") == name
        assert ("-fp32.json" in one["file"]) == ("--precision fp32" in one["command"])
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == report.page_of(records)
    for one in records:
        if KINDS[one["kind"]].panels:
            assert (ROOT / "docs" / report.plot_name(one)).is_file()


def test_presets_reach_the_student() -> None:
    assert Options(preset="small").config == APMConfig.preset("small", dim=512)
    assert Options(quick=True).found([])["settings"]["preset"] == "tiny"
