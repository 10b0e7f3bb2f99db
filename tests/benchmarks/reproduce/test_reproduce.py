"""The paper's tables as runs: the plan, the hours, ours beside the published cells, and each rule of the causes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apm.benchmarks.datasets import DATASETS
from apm.benchmarks.methods import create_method
from apm.benchmarks.reproduce.beside import TOLERANCE, beside, published_of
from apm.benchmarks.reproduce.causes import RULES, Case, causes
from apm.benchmarks.reproduce.plan import Job, Plan, Rates, expected_seconds, make_plan, measure
from apm.benchmarks.reproduce.recipes import PAPER, WEIGHTS, Recipe
from apm.benchmarks.runs.records import Records
from apm.benchmarks.tables.scores import score_cell
from apm.errors import UsageError
from apm.labels import prompt_templates
from apm.mae.config import MAEConfig
from apm.mae.model import MaskedAutoencoder
from apm.pretrain.checkpoint import Checkpoint, write_checkpoint
from apm.teachers import catalog
from tests.benchmarks.datasets.trees import tree, wnids_of
from tests.benchmarks.methods.made import learned_prompt
from tests.benchmarks.tables.test_trust import write_run
from tests.fakes import FakeTeacher

ZERO_SHOT = PAPER[1].recipes[0]
ENSEMBLE = PAPER[1].recipes[1]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_recipe_has_its_published_row_and_weights_that_are_known(number: int) -> None:
    table = PAPER[number]
    published = published_of(table)
    assert all(float(published[recipe][column]) > 0 for recipe in table.recipes for column in table.columns)
    with_teacher = [recipe for recipe in table.recipes if recipe.teacher != "none"]
    assert all(catalog.find(*WEIGHTS[recipe.teacher].split("/")) for recipe in with_teacher)
    assert all(recipe.learned and recipe.weights == "embedded" for recipe in set(table.recipes) - set(with_teacher))
    assert len(table.recipes) - len(with_teacher) == (4 if number == 2 else 0)


def data(root: Path) -> Path:
    """Two of Table 1's five sets, four images each."""
    tree(root / "imagenet-a", wnids_of("imagenet-a", 2))
    tree(root / "imagenet-r", wnids_of("imagenet-r", 2))
    return root


EMBEDDED = dict.fromkeys(WEIGHTS, "embedded")


def test_the_plan_says_what_can_be_run_and_why_not(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no.pt")
    plan = make_plan(PAPER[1], data(tmp_path), teachers={**EMBEDDED, "ViT-L/14": f"ViT-L-14/{nowhere}"})
    assert [cell.column for cell in plan.ready] == ["imagenet-a", "imagenet-r"]
    absent = {cell.column: cell.reason for cell in plan.cells if cell.dataset is None}
    assert set(absent) == {"imagenet", "imagenet-v2", "imagenet-sketch"}
    assert "The data come from: github.com/HaohanWang" in absent["imagenet-sketch"]
    assert [(job.teacher, job.prompts, job.specs) for job in plan.ready_jobs] == [
        ("embedded", None, ("zero-shot", "tpt", "apm")),  # the rows of ViT-H/14 are among these
        ("embedded", "openai", ("zero-shot",)),
    ]
    (missing,) = [job for job in plan.jobs if job.reason]
    assert nowhere in missing.reason and missing.teacher.startswith("ViT-L-14/")
    assert {recipe.row for recipe in plan.left_out} == {"CoOp", "CoCoOp", "TPT + CoOp", "TPT + CoCoOp"}


def test_weights_that_are_not_here_are_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("apm.teachers.hub.cached", lambda repo, files: None)
    monkeypatch.setattr("apm.teachers.hub._probe", lambda repo, file: pytest.fail("asked the network"))
    plan = make_plan(PAPER[3], None, methods=["zero-shot"])
    assert [bool(job.reason) for job in plan.jobs] == [True, True]
    assert "not on this machine" in plan.jobs[0].reason


def test_a_learned_prompt_brings_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "coop.safetensors"
    plan = make_plan(PAPER[3], None, methods=["coop", "cocoop"], teachers=EMBEDDED, learned={"coop": file})
    (job,) = plan.jobs
    assert job.specs == (f"coop:file={file}",) and "No such file" in job.reason and not job.fetchable
    assert [recipe.row for recipe in plan.left_out] == ["CoCoOp"] and "--cocoop" in next(iter(plan.left_out.values()))
    plan = make_plan(PAPER[3], None, methods=["coop"], teachers=EMBEDDED, learned={"coop": learned_prompt("coop")})
    assert [job.reason for job in plan.ready_jobs] == [""]


def head_for(path: Path, kind: str, names: Sequence[str]) -> Path:
    """A checkpoint of tiny random weights that names these classes."""
    sizes = MAEConfig(image_size=16, patch_size=8, width=8, depth=1, heads=1, decoder_width=8, decoder_depth=1,
                      decoder_heads=1, head_width=8, head_depth=0, head_heads=1, classes=len(names))  # fmt: skip
    settings = {"class_names": json.dumps(list(names)), "kind": kind, "decoder": "trained"}
    write_checkpoint(path, Checkpoint(sizes, settings, 1, dict(MaskedAutoencoder(sizes).state_dict()), {}, "mae"))
    return path


def test_rows_that_are_no_clip_need_a_head_and_no_weights_of_clip(tmp_path: Path) -> None:
    tree(tmp_path / "ImageNet-C" / "fog" / "5", wnids_of("imagenet", 2))
    names = make_plan(PAPER[2], tmp_path, methods=["zero-shot"]).ready[0].dataset.class_names  # type: ignore[union-attr]
    files = {"probe": head_for(tmp_path / "p.safetensors", "probe", names)}
    files["finetuned"] = head_for(tmp_path / "f.safetensors", "finetune", names[:-2])
    plan = make_plan(PAPER[2], tmp_path, learned=files)
    (ready,) = plan.ready_jobs  # ViT-L/14 is not here
    assert ready.teacher == "embedded" and [recipe.row for recipe in ready.recipes] == ["ViT Probe", "TTT-MAE"]
    assert ready.specs == (f"vit-probe:file={files['probe']}", f"ttt-mae:file={files['probe']}")
    reasons = {job.recipes[0].row: job.reason for job in plan.jobs if job.reason}
    assert "was not trained on 2 of the 1000 classes" in reasons["Fine-Tune"] and len(reasons) == 2
    assert {recipe.title: why for recipe, why in plan.left_out.items()} == {
        "Joint Train": "needs a trained head: --joint FILE (apm mae joint makes one)"
    }
    wrong = make_plan(PAPER[2], tmp_path, methods=["mae-joint"], learned={"joint": files["probe"]})
    assert "a checkpoint of `apm mae probe`: mae-joint needs one of `apm mae joint`" in wrong.jobs[0].reason
    beside_zero_shot = make_plan(PAPER[2], tmp_path, teachers={**EMBEDDED, "none": "embedded"}, learned=files)
    assert beside_zero_shot.ready_jobs[0].specs == ("zero-shot", "apm", *ready.specs)


def test_a_method_that_the_table_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match='method of Table 2 "tpt"'):
        make_plan(PAPER[2], None, methods=["tpt"])


def test_corruptions_are_found_each_by_itself(tmp_path: Path) -> None:
    tree(tmp_path / "ImageNet-C" / "fog" / "5", wnids_of("imagenet", 2))
    tree(tmp_path / "ImageNet-C" / "snow" / "3", wnids_of("imagenet", 2))
    plan = make_plan(PAPER[2], tmp_path, teachers=EMBEDDED)
    assert [cell.column for cell in plan.ready] == ["fog"] and len(plan.cells) == 15


def job_of(plan: Plan, *recipes: Recipe) -> Job:
    return Job(teacher="embedded", prompts=None, recipes=recipes, specs=tuple(recipe.method for recipe in recipes))


def test_the_expected_time_by_hand(tmp_path: Path) -> None:
    plan = make_plan(PAPER[1], data(tmp_path), teachers=EMBEDDED)
    method = create_method("zero-shot")
    rates = Rates(classes=(100, 300), seconds={"zero-shot": (1.0, 2.0)}, per_text=0.01)
    names = {name for cell in plan.ready if cell.dataset for name in cell.dataset.class_names}
    assert rates.image("zero-shot", 200) == 1.5  # on the line between what was measured
    seconds = expected_seconds(job_of(plan, ZERO_SHOT), plan, [method], rates, tmp_path / "out")
    assert seconds == pytest.approx(2 * 4 * 1.5 + 0.01 * len(names))
    job = replace(job_of(plan, ZERO_SHOT), prompts="openai")
    more = expected_seconds(job, plan, [method], rates, tmp_path / "out")
    assert more - seconds == pytest.approx(0.01 * (80 - 1) * len(names), rel=0.01)  # a few templates may be the same


def test_what_is_measured_is_the_methods_own_time(tmp_path: Path) -> None:
    plan = make_plan(PAPER[1], data(tmp_path), teachers=EMBEDDED)
    rates = measure(FakeTeacher(), [create_method("zero-shot"), create_method("tda")], plan.ready)
    assert rates.classes == (200,) and rates.per_text > 0
    assert all(0 < values[0] < 2 for values in rates.seconds.values())


def test_ours_beside_the_published_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(PAPER[1], data(tmp_path), methods=["zero-shot", "apm"], teachers={"ViT-B/16": "embedded"})
    job = plan.jobs[0]
    right = np.arange(40) < 19  # 47.5 %, published: 47.8 on imagenet-a, 73.9 on imagenet-r
    about = {name: {"dataset": name, "title": name} for name in ("imagenet-a", "imagenet-r")}
    write_run(tmp_path / "out" / job.folder, about, {"zero-shot": right, "apm": right})
    methods = {job: {recipe: create_method(recipe.method) for recipe in job.recipes}}
    found = {(one.recipe.row, one.recipe.teacher, one.column): one for one in beside(plan, tmp_path / "out", methods)}
    agrees, differs = (found["CLIP zero-shot", "ViT-B/16", name] for name in ("imagenet-a", "imagenet-r"))
    assert agrees.difference == pytest.approx(-0.3) and TOLERANCE == 0.3
    assert (agrees.verdict, agrees.causes) == ("agrees", ())
    assert differs.verdict == "differs" and differs.causes[0].name == "teacher"
    assert found["APM", "ViT-B/16", "imagenet-r"].verdict == ""  # only zero-shot is judged
    assert found["CLIP zero-shot", "ViT-B/16", "imagenet"].reason.startswith("nothing that fits")
    assert found["Ensemble (80 templates)", "ViT-B/16", "imagenet-a"].reason == "not run"
    assert found["CLIP zero-shot", "ViT-L/14", "imagenet-a"].score is None


SETTINGS = {
    "quick_gelu": True,
    "image_size": 224,
    "interpolation": "bicubic",
    "resize": "shortest",
    "precision": "fp32",
}


def case(
    path: Path,
    *,
    recipe: Recipe = ZERO_SHOT,
    teacher: str = "ViT-B-16/openai",
    settings: Mapping[str, Any] | None = None,
    templates: tuple[str, ...] = ("a photo of a {}.",),
    features: Mapping[str, Any] | None = None,
    failed: tuple[int, ...] = (),
    **cell: Any,
) -> Case:
    """A run that nothing explains but what is given."""
    about = {"dataset": "imagenet-a", "title": "imagenet-a", "images": 40, "total": 40, **cell}
    told = {**SETTINGS, **(settings or {})} if settings != {} else {}
    folder = write_run(path, {"cell": about}, {"zero-shot": np.arange(40) < 9}, name=teacher, settings=told,
                       failed={"zero-shot": failed})  # fmt: skip
    run = Records.open(folder)
    run.run["prompt_sets"]["prompts"] = list(templates)
    if features:
        run.run["sessions"][0]["features"] = dict(features)
    ((_, rows),) = run.rows("cell")
    score = score_cell(rows, run.cells["cell"], "zero-shot")
    published = {**published_of(PAPER[1])[recipe], "prompts": "80 templates"}
    return Case(recipe=recipe, published=published, run=run, cell=run.cells["cell"], score=score)


@pytest.fixture(autouse=True)
def _forty_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "imagenet-a", replace(DATASETS["imagenet-a"], images=40))


OPENAI = prompt_templates("openai")
EXPLAINED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "teacher": [({"teacher": "embedded"}, "the run's teacher is embedded, the published one ViT-B/16")],
    "variant": [({"title": "imagenet-a-other"}, "the images are imagenet-a-other")],
    "unfinished": [({"images": 50, "total": 50}, "40 of 50"), ({"failed": (1, 2)}, "2 images have no answer")],
    "subset": [
        ({"total": 7500}, "40 of 7,500 images; the 95 % interval of ours is 12.3 to 37.5"),
        ({"images": 39, "total": 39}, "39 images, where"),
    ],
    "generated": [({"generated": True}, "generated here")],
    "split": [({"dataset": "dtd", "title": "dtd", "source": "hf:clip-benchmark/wds_vtab-dtd:test"}, "is not CoOp's")],
    "QuickGELU": [
        ({"settings": {"quick_gelu": False}, "teacher": "ViT-B-16/weights.pt"}, "built without QuickGELU"),
        ({"settings": {"quick_gelu": False}}, "built without QuickGELU"),
    ],
    "prompt set": [
        ({"templates": OPENAI}, 'are 80 templates (single), where "a photo of a {}." is'),
        ({"recipe": ENSEMBLE}, 'are "a photo of a {}." (single), where 80 templates is'),
    ],
    "interpolation": [
        ({"settings": {"interpolation": "bilinear"}}, "by bilinear interpolation"),
        ({"settings": {"resize": "squash"}}, "by the rule squash"),
        ({"settings": {"image_size": 336}}, "336 pixels wide, that of the published weights 224"),
    ],
    "weights": [({"teacher": "ViT-B-16/laion2b_s34b_b88k"}, "the run's weights are ViT-B-16/laion2b")],
    "precision": [
        ({"settings": {"precision": "fp16"}}, "in fp16"),
        ({"features": {"store": "s", "key": "k", "precision": "float16", "views": 64}}, "in float16"),
    ],
    "weights not stated": [({"recipe": PAPER[1].recipes[-2], "teacher": WEIGHTS["ViT-H/14"]}, "is a guess")],
    "prompts not stated": [],  # of the published row, see below
    "not recorded": [({"settings": {}}, "does not say how the teacher was built")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "said"), [(name, *one) for name, many in EXPLAINED.items() for one in many]
)
def test_each_rule_sees_its_cause(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    found = {cause.name: cause.text for cause in causes(case(tmp_path, **changes))}
    assert said in found[name]


def test_nothing_is_named_where_nothing_differs(tmp_path: Path) -> None:
    assert set(EXPLAINED) == set(RULES)
    assert causes(case(tmp_path / "single")) == []
    assert causes(case(tmp_path / "ensemble", recipe=ENSEMBLE, templates=OPENAI)) == []


def test_prompts_that_the_published_row_does_not_state_are_a_last_resort(tmp_path: Path) -> None:
    one = case(tmp_path)
    unsaid = replace(one, published={**one.published, "prompts": "not stated"})
    assert [cause.name for cause in causes(unsaid)] == ["prompts not stated"]


def test_quick_gelu_is_no_cause_where_the_model_is_another(tmp_path: Path) -> None:
    names = [one.name for one in causes(case(tmp_path, teacher="embedded", settings={"quick_gelu": False}))]
    assert names == ["teacher"]
