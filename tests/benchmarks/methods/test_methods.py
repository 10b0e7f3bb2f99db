"""Methods: what they share, what they are told, names and settings, and that answers depend on their image alone."""

from __future__ import annotations

import gc
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from PIL import Image

import apm.benchmarks.methods as methods_package
from apm.benchmarks.methods import (
    REGISTRY,
    Batch,
    MethodOptions,
    Prediction,
    create_method,
    create_methods,
    parse_method,
    rlcf,
)
from apm.benchmarks.methods.base import Method
from apm.errors import UsageError
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.methods.made import (
    CLASSES,
    HEADS,
    SMALL,
    STREAM,
    TEMPLATE,
    OpenTeacher,
    full_spec,
    make_batch,
    pictures,
    run_options,
)
from tests.fakes import FakeTeacher
from tests.places import ROOT

# --- what methods share -----------------------------------------------------------------------------------------------


def test_everything_is_computed_once_however_many_methods_ask() -> None:
    batch = make_batch(3)
    same = "views=8,min_area=0.08"  # the peers' crops; the targets' own are larger
    specs = ["zero-shot", "mta", "zero", "tda", "apm", f"apm:target=mean,{same}", f"apm:target=mta,{same}"]
    for method in create_methods(specs, SMALL):
        method.predict(batch).check(method.name, batch)
    assert batch.teacher.image_calls == 3 * 8
    assert batch.teacher.text_calls == len(CLASSES)


@pytest.mark.slow
def test_grids_are_computed_once_and_shared() -> None:
    batch = make_batch(3)
    methods = create_methods(["apm", "apm:distil=grid", "apm:distil=both", "apm:distil=both,target=mta"], SMALL)
    predictions = [method.predict(batch).check(method.name, batch) for method in methods]
    names = [method.name for method in methods]
    assert names[:3] == ["apm", "apm[grid]", "apm[both]"] and names[3].startswith("apm[mta,") and "both" in names[3]
    assert batch.grids().shape == (3, 4, 4, 16)
    assert batch.teacher.grid_calls == 3 + 3  # each method looks once whether there are any
    logits = [prediction.logits for prediction in predictions]
    assert not any(torch.equal(one, logits[0]) for one in logits[1:])
    again = create_method("apm:distil=both", SMALL).predict(make_batch(3, order=[2, 1, 0]))
    torch.testing.assert_close(again.logits.flip(0), logits[2], rtol=1e-5, atol=1e-5)


def test_grids_of_views_are_made_once_and_shared_and_depend_on_no_batch() -> None:
    batch = make_batch(3)
    specs = ["apm:distil=both,grid_views=4", "apm:distil=grid,grid_views=4", "apm:distil=both,grid_views=tokens:3"]
    methods = create_methods([*specs, "apm:distil=both"], SMALL)
    assert [method.name for method in methods] == [
        *("apm[both,grid_views=4]", "apm[grid,grid_views=4]", "apm[both,grid_views=tokens:3]", "apm[both]")
    ]
    assert create_method("apm", run_options(distil="both", grid_views=4)).name == methods[0].name
    assert methods[0].settings["grid_views"] == 4 and "grid_views" not in methods[3].settings
    logits = [method.predict(batch).check(method.name, batch).logits for method in methods]
    assert (
        batch.teacher.grid_calls == 3 * 4 + 3 + 3
    )  # views once, the plain grids, and three looks whether there are any
    assert not torch.equal(logits[0], logits[3]) and not torch.equal(logits[2], logits[3])
    for spec, expected in zip(specs, logits, strict=False):
        again = create_method(spec, SMALL).predict(make_batch(3, order=[2, 1, 0]))
        torch.testing.assert_close(again.logits.flip(0), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="add distil=both"):
        create_method("apm:grid_views=4", SMALL)


def test_settings_say_what_is_distilled_only_where_it_is_not_the_token_alone() -> None:
    settings = {spec: create_method(spec, SMALL).settings for spec in ("apm", "apm:distil=cls", "apm:distil=grid")}
    assert settings["apm"]["readout"] == "query" and not {"distil", "rgb_weight"} & set(settings["apm"])
    assert dict(settings["apm"]) == dict(settings["apm:distil=cls"])
    assert (settings["apm:distil=grid"]["distil"], settings["apm:distil=grid"]["readout"]) == ("grid", "mean")
    coloured = create_method("apm:rgb_weight=0.5", SMALL)
    assert coloured.settings["rgb_weight"] == 0.5 and coloured.name == "apm[rgb_weight=0.5]"
    assert create_method("apm", run_options(distil="both")).name == "apm[both]"
    soft = create_method("apm:loss=soft", SMALL)
    assert soft.name == "apm[loss=soft]" and soft.settings["temperature"] == 4.0
    assert "temperature" not in settings["apm"] and settings["apm"]["loss"] == "mse"
    assert create_method("apm", run_options(loss="soft", temperature=3.0)).name == "apm[loss=soft,temperature=3]"
    assert create_method("apm:loss=soft,temperature=3", SMALL).name == "apm[loss=soft,temperature=3]"
    assert create_method("apm", run_options(agree=0.5)).name == "apm[agree=0.5]"
    assert create_method("apm:agree=0.5", SMALL).settings["agree"] == 0.5 and "agree" not in settings["apm"]
    for spec, words in (
        ("apm:agree=0.5,queries=9", "leave one out"),
        ("apm:temperature=3", "add loss=soft"),
        ("apm:distil=grid,target=mta", "uses no token; write distil=both"),
        ("apm:distil=grid,readout=query", "the object query is not trained"),
        ("apm:distil=gird", 'Did you mean "grid"'),
    ):
        with pytest.raises(UsageError, match=words):
            create_method(spec, SMALL)


def test_fewer_views_are_the_first_of_more_and_are_not_encoded_again() -> None:
    batch = make_batch(2)
    few = batch.views(5).clone()
    assert batch.teacher.image_calls == 2 * 5
    many = batch.views(9)
    assert batch.teacher.image_calls == 2 * 9
    assert torch.equal(many[:, :5], few)
    assert torch.equal(batch.views(9), make_batch(2).views(9))
    assert torch.equal(many[:, 0], batch.tokens())
    assert batch.views(5, min_area=0.9).shape == (2, 5, 16)
    assert not torch.allclose(batch.views(5, min_area=0.9)[:, 1:], few[:, 1:])


def test_views_do_not_depend_on_chunk_batch_or_order() -> None:
    whole = make_batch(4).views(7)
    assert torch.equal(make_batch(4, chunk=2).views(7), whole)
    assert torch.equal(make_batch(4, order=[2, 0]).views(7), whole[[2, 0]])


@pytest.mark.parametrize("views", [0, -3])
def test_no_views_are_refused(views: int) -> None:
    with pytest.raises(UsageError, match=f"{views} views"):
        create_method("mta", MethodOptions(views=views)).predict(make_batch(1))


def test_ids_and_images_must_go_together() -> None:
    batch = make_batch(1)
    with pytest.raises(ValueError, match="2 ids for 1 images"):
        Batch(["a", "b"], batch.images, batch.teacher, batch.head)


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        (Prediction(logits=torch.zeros(2, 3)), r"method x: logits of shape \(2, 3\), expected \(2, 7\)"),
        (Prediction(logits=torch.zeros(2, 7), extras={"loss": torch.zeros(3)}), "extra loss"),
        (Prediction(logits=torch.zeros(2, 7), step_logits=torch.zeros(2, 7)), "step logits"),
    ],
)
def test_a_prediction_of_the_wrong_shape_is_named(prediction: Prediction, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prediction.check("x", make_batch(2))


# --- no labels --------------------------------------------------------------------------------------------------------

FORBIDDEN = {"label", "labels", "target_class", "true_class", "ground_truth", "truth", "y", "y_true", "correct"}


def test_no_signature_or_attribute_of_methods_names_a_label() -> None:
    batch = make_batch(1)
    assert not FORBIDDEN & {*vars(batch), *dir(Batch), *vars(Prediction(logits=torch.zeros(1, 1)))}
    for info in pkgutil.iter_modules(methods_package.__path__):
        module = import_module(f"{methods_package.__name__}.{info.name}")
        functions: list[tuple[str, Any]] = inspect.getmembers(module, inspect.isfunction)
        for _, kind in inspect.getmembers(module, inspect.isclass):
            functions += inspect.getmembers(kind, inspect.isfunction)
        for name, function in functions:
            if function.__module__.startswith("apm.benchmarks.methods"):
                found = FORBIDDEN & set(inspect.signature(function).parameters)
                assert not found, f"{module.__name__}.{name} takes {found}"


@pytest.mark.parametrize("name", [*REGISTRY])
def test_predict_is_given_the_batch_and_nothing_else(name: str) -> None:
    method = create_method(full_spec(name))
    assert list(inspect.signature(method.predict).parameters) == ["batch"]


def test_a_batch_holds_neither_file_names_nor_metadata(tmp_path: Any) -> None:
    """A file's folder is often its label, and PIL remembers both the path and comments."""
    path = tmp_path / "n02123045-secret" / "photo.png"
    path.parent.mkdir()
    pictures(1)[0].save(path, pnginfo=_comment("secret"))
    teacher = FakeTeacher(dim=16)
    with Image.open(path) as opened:
        assert "secret" in str(opened.info)
        batch = Batch(
            ["n02123045-secret/photo.png"], [opened], teacher, ZeroShotHead.build(teacher, CLASSES, (TEMPLATE,))
        )
    create_method("zero", SMALL).predict(batch)
    seen, queue = set(), [batch]
    while queue:
        found = queue.pop()
        if id(found) in seen or isinstance(found, type | Callable | type(gc)):  # type: ignore[arg-type]
            continue
        seen.add(id(found))
        assert not (isinstance(found, str | bytes) and "secret" in str(found))
        queue.extend(gc.get_referents(found))
    assert len(seen) > 30  # the walk went into the images


def _comment(text: str) -> Any:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", text)
    return info


# --- names and settings -----------------------------------------------------------------------------------------------


def test_method_specs_are_parsed() -> None:
    assert parse_method("apm") == ("apm", {})
    assert parse_method("apm:target=mta, views=64") == ("apm", {"target": "mta", "views": "64"})
    assert parse_method("tpt:prompt=art: a {}") == ("tpt", {"prompt": "art: a {}"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zero_shot", 'Did you mean "zero-shot"'),
        ("apm:targt=mta", 'Did you mean "target"'),
        ("apm:target=mtaa", 'Did you mean "mta"'),
        ("apm:views", "is not a setting"),
        ("apm:views=8,views=9", "sets views twice"),
        ("mta:views=many", '"many", which is not a whole number'),
        ("tda:positive_alpha=nan", '"nan", which is not a finite number'),
        ("tps:lr=inf", '"inf", which is not a finite number'),
        ("zero:keep=2", "keep is 2.0"),
        ("apm:views=8", 'target "cls"'),
        ("apm:preset=papper", 'Did you mean "paper"'),
        ("apm:steps=0", "steps must be 1 or more"),
        ("glom-ttt:steps=0", "steps must be 1 or more"),
        ("glom-ttt:grid_level=3", "grid_level must be below 3"),
        ("glom-ttt:patch_size=7", "do not tile an image of 64"),
        ("tpt:steps=-1", "not -1"),
        ("tpt:lr=0", "lr must be above 0, not 0.0"),
        ("ctpt:dispersion=-1", "dispersion must be 0 or more, not -1.0"),
        ("rtpt:views=20", "not 20 of 20 views.*rtpt:views=64"),
        ("rtpt:temperature=0", "temperature must be above 0, not 0.0"),
        ("rlcf", "needs a second teacher"),
        ("rlcf:reward=embedded,proposals=1", "not 1: rewards"),
        ("rlcf:reward=embeded", "Unknown teacher"),
        ("dynaprompt:prompts=0", "prompts must be 1 or more, not 0"),
        ("tpt:prompt={} texture.", "needs words before"),
        ("dpe:answer=men", 'Did you mean "mean"'),
        ("boostadapter:mode=imagee", 'Did you mean "image"'),
        ("tps:keep=0", "keep is 0.0"),
        ("dmn:shots=0", "shots must be 1 or more, not 0"),
        ("onzeta:beta=2", "beta between 0 and 1"),
        ("dmn:alpha=inf", "alpha must be 0 or more, not inf"),
        ("mta:lambda_y=0", "lambda_y must be above 0.*not 0.0, 4.0 and 5"),
        ("mta:neighbours=2", "neighbours is 2.0"),
        ("tda:negative_shots=-1", "shots must be 0 or more, not 3 and -1"),
        ("tpt:group=0", "group 1 or more, not 1 and 0"),
        ("zero-shot:views=3", 'Unknown setting of method "zero-shot" "views"'),
    ],
)
def test_wrong_specs_are_refused_and_say_why(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_method(spec)


def test_variants_of_one_method_have_names_of_their_own() -> None:
    specs = [
        "apm",
        "apm:target=mta",
        "apm:target=mta,views=64",
        "apm:steps=9",
        "apm:target=best,keep=0.5",
        "tpt:steps=0",
    ]
    names = [method.name for method in create_methods(specs)]
    assert names[:4] == ["apm", "apm[mta,16]", "apm[mta,64]", "apm[steps=9]"]
    assert names[4].startswith("apm[best,")
    assert names[4].endswith(",keep=0.5]")
    assert names[5] == "tpt[steps=0]"
    assert create_method("apm", run_options({"views": 32}, target="mean")).name == "apm[mean,32]"
    with pytest.raises(UsageError, match=r'"apm\[mta,16\]" is given twice'):
        create_methods(["apm:target=mta", "apm:views=16,target=mta"])


def test_what_stands_behind_the_name_wins_over_the_run() -> None:
    method = create_method(
        "apm:steps=9,target=mean", run_options({"views": 16, "seed": 5}, steps=4, target="mta", lr=0.01)
    )
    expected = {"steps": 9, "target": "mean", "aggregate": "mean", "views": 16, "seed": 5, "lr": 0.01}
    assert expected.items() <= dict(method.settings).items()


def test_each_target_of_a_run_is_a_variant_of_apm_unless_one_stands_behind_its_name() -> None:
    specs = ["zero-shot", "apm", "apm:steps=9", "apm:target=mean"]
    methods = create_methods(specs, SMALL, targets=["cls", "mta", "cls"])
    names = ["zero-shot", "apm", "apm[mta,8]", "apm[steps=9]", "apm[mta,8,steps=9]", "apm[mean,8]"]
    assert [method.name for method in methods] == names
    assert [method.settings.get("target") for method in methods] == [None, "cls", "mta", "cls", "mta", "mean"]
    (both,) = create_methods(["apm:distil=both"], run_options(distil="grid"), targets=["mta"])
    assert both.name == "apm[mta,16,both]"


@pytest.mark.parametrize("name", [*REGISTRY])
def test_settings_are_json_values(name: str) -> None:
    method = create_method(full_spec(name))
    assert json.loads(json.dumps(dict(method.settings))) == dict(method.settings)
    assert method.stream is (name in STREAM)


def test_every_method_has_its_row_and_its_kind_in_the_table_of_methods() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w+-]+)` \|[^|]+\| (episodic|stream) \|", text.split("## The methods")[1], re.MULTILINE)
    assert dict(rows) == {name: "stream" if name in STREAM else "episodic" for name in REGISTRY}


@pytest.mark.parametrize(
    ("name", "setting", "words"),
    [
        ("dynaprompt", "prompts", "{} prompts"),
        ("rlcf", "steps", "{} steps"),
        ("dmn", "shots", "{} images per class"),
        ("oga", "shots", "{} images per class"),
        ("ecalp", "images", "{} images"),
        ("clipartt", "classes", "{} classes"),
        ("watt", "rounds", "{} rounds"),
    ],
)
def test_the_table_of_methods_has_the_codes_defaults(name: str, setting: str, words: str) -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split("## The methods")[1]
    (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.MULTILINE)
    assert words.format(create_method(full_spec(name)).settings[setting]) in row


def test_a_strangers_method_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Uniform:
        name = "uniform"
        stream = False
        gradients = False

        def __init__(self, options: MethodOptions) -> None:
            self.settings: dict[str, Any] = {}

        def predict(self, batch: Batch) -> Prediction:
            return Prediction(logits=torch.zeros_like(batch.head.logits(batch.tokens())))

    monkeypatch.setitem(REGISTRY, "uniform", Uniform)
    method: Method = create_method("uniform")
    batch = make_batch(2)
    assert method.predict(batch).check(method.name, batch).logits.shape == (2, len(CLASSES))


# --- the same alone, in a batch, in any order -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec",
    [
        "zero-shot",
        "tpt",
        "mta",
        "zero",
        "tps",
        "apm",
        "apm:target=confident",
        "glom-ttt",
        *HEADS,
        "ctpt",
        "rtpt",
        "rlcf",
        "coop",
        "cocoop",
        "tpt+coop",
        "tpt+cocoop",
    ],
)
def test_an_episodic_answer_depends_on_its_image_alone(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlcf, "load_teacher", lambda spec, device: FakeTeacher(dim=24, name="second", seed=5))
    teacher, spec = OpenTeacher(), full_spec(spec, neighbours=3)
    together = create_method(spec, SMALL).predict(make_batch(3, teacher))
    method = create_method(spec, SMALL)  # one object for all that follow: nothing may stay in it
    backwards = method.predict(make_batch(3, teacher, order=[2, 1, 0]))
    torch.testing.assert_close(backwards.logits.flip(0), together.logits, rtol=1e-5, atol=1e-5)
    alone = method.predict(make_batch(3, teacher, order=[1]))
    torch.testing.assert_close(alone.logits, together.logits[1:2], rtol=1e-5, atol=1e-5)
    for name, values in together.extras.items():
        torch.testing.assert_close(alone.extras[name], values[1:2], rtol=1e-4, atol=1e-5)
