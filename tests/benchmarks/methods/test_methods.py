"""Methods: what they share, what they are told, names and settings; APM, TPT, ZERO and TDA by what they must do."""

from __future__ import annotations

import atexit
import functools
import gc
import inspect
import json
import pkgutil
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

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
from apm.benchmarks.methods.base import HasOwnPrompt, Method
from apm.benchmarks.methods.dynaprompt import choose
from apm.benchmarks.methods.rtpt import view_weights
from apm.benchmarks.methods.tda import Cache
from apm.benchmarks.methods.tpt import marginal_entropy
from apm.benchmarks.methods.zero import vote_logits, zero_votes
from apm.errors import UsageError
from apm.mae.config import MAEConfig
from apm.mae.model import MaskedAutoencoder
from apm.pretrain.checkpoint import Checkpoint, write_checkpoint
from apm.test_time.options import StudentOptions
from apm.test_time.queries import FEWER
from apm.text.learned_prompt import META_NET, LearnedPrompt, write_learned_prompt
from apm.text.prompts import TunablePrompt, _replaced
from apm.text.zeroshot import ZeroShotHead
from tests.fakes import FakeTeacher
from tests.places import ROOT

CLASSES = ("cat", "dog", "coffee mug", "space rocket", "daisy", "bus", "violin")
TEMPLATE = "a photo of a {}."
FEATURE_STREAMS = ("tda", "dmn", "boostadapter", "onzeta", "ecalp", "dpe", "dota", "oga")
STREAM = {*FEATURE_STREAMS, "dynaprompt", "tent", "clipartt", "watt"}


def run_options(run: dict[str, Any] | None = None, **student: Any) -> MethodOptions:
    """A run's options, of which `student` are the student's; as a run it reads all locations if nothing is said."""
    return MethodOptions(student=StudentOptions(**{"queries": "all", **student}), **(run or {}))


SMALL = run_options({"views": 8}, preset="small", steps=3, precision="fp32")


@functools.cache
def learned_prompt(method: str) -> Path:
    """A file with a prompt of 4 words as CoOp or CoCoOp would have learned it with `OpenTeacher`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 16), (2,), (16, 2), (16,)]
    net = {name: torch.randn(shape, generator=generator) for name, shape in zip(META_NET, shapes, strict=True)}
    folder = Path(tempfile.mkdtemp(prefix="apm-tests-"))
    atexit.register(shutil.rmtree, folder)
    path = folder / "learned.safetensors"
    prompt = LearnedPrompt(
        context=torch.randn(4, 16, generator=generator), meta_net=net if method == "cocoop" else None
    )
    write_learned_prompt(path, prompt)
    return path


HEADS = {"vit-probe": "probe", "mae-finetune": "finetune", "mae-joint": "joint", "ttt-mae": "probe"}
"""Methods that need a trained head, and how it was trained."""


@functools.cache
def trained_head(kind: str) -> Path:
    """A file with a tiny random masked autoencoder and a head that knows `CLASSES` and 10,000 more."""
    sizes = MAEConfig(
        image_size=16, patch_size=4, width=8, depth=1, heads=1, decoder_width=8, decoder_depth=1, decoder_heads=1,
        head_width=8, head_depth=1, head_heads=1, classes=10_007,
    )  # fmt: skip
    names = [*CLASSES, *(f"class {number}" for number in range(10_000))]
    folder = Path(tempfile.mkdtemp(prefix="apm-tests-"))
    atexit.register(shutil.rmtree, folder)
    weights = {
        name: weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        for number, (name, weight) in enumerate(MaskedAutoencoder(sizes, seed=4).state_dict().items())
    }
    settings = {"class_names": json.dumps(names), "kind": kind, "decoder": "trained"}
    path = folder / f"{kind}.safetensors"
    write_checkpoint(path, Checkpoint(sizes, settings, 1, weights, {}, "mae"))
    return path


def full_spec(name: str, *, neighbours: int = 20) -> str:
    """A method's name, with what it cannot do without."""
    if name in HEADS:
        return f"{name}:file={trained_head(HEADS[name])}" + ",masks=3,steps=2" * (name == "ttt-mae")
    if name == "rlcf":
        return "rlcf:reward=embedded"
    if name == "rtpt":
        return f"rtpt:neighbours={neighbours}"
    kind = name.removeprefix("tpt+")
    return f"{name}:file={learned_prompt(kind)}" if kind in ("coop", "cocoop") else name


class OpenTeacher(FakeTeacher):
    """The fake teacher's images with a real, tiny, random open_clip model for its texts."""

    def __init__(self, form: str = "CLIP") -> None:
        import open_clip

        super().__init__(dim=16, name="open")
        text = open_clip.CLIPTextCfg(context_length=24, vocab_size=49408, width=16, heads=2, layers=2)
        vision = open_clip.CLIPVisionCfg(layers=1, width=16, head_width=8, patch_size=16, image_size=32)
        torch.manual_seed(0)
        self.model = getattr(open_clip, form)(16, vision, text).eval().requires_grad_(False)
        for weights in self.model.parameters():  # the usual tiny start gives texts that hardly differ
            if weights.ndim > 1:
                torch.nn.init.normal_(weights, std=0.3)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=24)
        self.identity = f"open {form}"

    @torch.no_grad()
    def encode_text(self, texts: Any) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)))


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(7)
    coarse = generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((48, 40), Image.Resampling.BILINEAR) for pixels in coarse]


def make_batch(count: int = 4, teacher: Any = None, order: list[int] | None = None, **options: Any) -> Batch:
    teacher = teacher or FakeTeacher(dim=16)
    head = ZeroShotHead.build(teacher, CLASSES, (TEMPLATE,))
    order = list(range(count)) if order is None else order
    images = pictures(count)
    return Batch([f"image {i}" for i in order], [images[i] for i in order], teacher, head, **options)


@pytest.fixture(scope="module", params=["CLIP", "CustomTextCLIP"])
def open_teacher(request: pytest.FixtureRequest) -> OpenTeacher:
    return OpenTeacher(request.param)


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
    for spec, words in (
        ("apm:distil=grid,target=mta", "has no loss for it; add distil=both"),
        ("apm:distil=grid,readout=query", "nothing trains the object query"),
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
        ("apm:views", "is no setting"),
        ("apm:views=8,views=9", "sets views twice"),
        ("mta:views=many", '"many", which is not a whole number'),
        ("zero:keep=2", "keep is 2.0"),
        ("apm:views=8", 'target "cls"'),
        ("apm:preset=papper", 'Did you mean "paper"'),
        ("apm:steps=0", "steps must be 1 or more"),
        ("glom-ttt:steps=0", "steps must be 1 or more"),
        ("glom-ttt:grid_level=3", "grid_level must be below 3"),
        ("glom-ttt:patch_size=7", "do not tile an image of 64"),
        ("tpt:steps=-1", "-1 steps"),
        ("tpt:lr=0", "learning rate 0.0"),
        ("ctpt:dispersion=-1", "dispersion weighted -1.0"),
        ("rtpt:views=20", "20 neighbours of 20 views.*rtpt:views=64"),
        ("rtpt:temperature=0", "temperature 0.0"),
        ("rlcf", "needs a second teacher"),
        ("rlcf:reward=embedded,proposals=1", "1 proposals"),
        ("rlcf:reward=embeded", "Unknown teacher"),
        ("dynaprompt:prompts=0", "0 prompts"),
        ("tpt:prompt={} texture.", "needs words before"),
        ("dpe:answer=men", 'Did you mean "mean"'),
        ("boostadapter:mode=imagee", 'Did you mean "image"'),
        ("tps:keep=0", "keep is 0.0"),
        ("dmn:shots=0", "0 shots"),
        ("onzeta:beta=2", "beta between 0 and 1"),
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


# --- APM --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_apm_gives_losses_and_its_token_turns_to_the_target() -> None:
    batch = make_batch(2)
    answer = create_method("apm:steps=40,lr=0.001", SMALL).predict(batch)
    assert answer.extras["steps"].tolist() == [40, 40]
    assert (answer.extras["cosine"] > 0.9).all()
    assert torch.isfinite(answer.extras["loss"]).all()
    assert answer.step_logits is None
    torch.testing.assert_close(answer.logits, batch.head.logits(batch.tokens()), atol=8, rtol=0)


def test_apm_records_steps_and_the_last_is_the_answer() -> None:
    batch = make_batch(2)
    answer = create_method("apm", run_options({"record_steps": True}, preset="small", steps=3)).predict(batch)
    assert answer.step_logits is not None
    assert answer.step_logits.shape == (2, 4, len(CLASSES))
    torch.testing.assert_close(answer.step_logits[:, -1], answer.logits)
    assert not torch.allclose(answer.step_logits[:, 0], answer.logits, atol=1e-4)


@pytest.mark.slow
def test_apm_is_overfit_to_the_target_that_is_asked_for() -> None:
    batch = make_batch(2)
    spread = (batch.views(8)[:, 0] - batch.views(8).mean(1)).norm(dim=1)
    assert (spread > 0.1).all()
    cls = create_method("apm:steps=60,lr=0.001", SMALL).predict(batch)
    mean = create_method("apm:target=mean,steps=60,lr=0.001", SMALL).predict(batch)
    target = normalize(normalize(batch.views(8), dim=2).mean(1), dim=1)
    to_mean = (mean.logits - batch.head.logits(target)).norm(dim=1)
    assert (to_mean < (cls.logits - batch.head.logits(target)).norm(dim=1)).all()


def test_a_student_whose_loss_is_not_finite_has_no_answer() -> None:
    batch = make_batch(2)
    tokens = batch.tokens().clone()
    tokens[1, 0] = torch.inf
    batch._tokens = tokens
    answer = create_method("apm", SMALL).predict(batch)
    assert torch.isfinite(answer.logits[0]).all()
    assert answer.logits[1].isnan().all()


# --- TPT --------------------------------------------------------------------------------------------------------------


def test_untuned_prompts_are_the_teachers_own_features(open_teacher: OpenTeacher) -> None:
    prompt = TunablePrompt(open_teacher, CLASSES, group=3)
    head = ZeroShotHead.build(open_teacher, CLASSES, (TEMPLATE,))
    assert prompt.initial.shape == (4, 16)  # a, photo, of, a
    torch.testing.assert_close(prompt.features(prompt.initial), head.features)


def test_the_prompts_gradient_is_that_of_finite_differences(open_teacher: OpenTeacher) -> None:
    generator = torch.Generator().manual_seed(0)
    upstream = torch.randn(len(CLASSES), 16, generator=generator)
    prompt = TunablePrompt(open_teacher, CLASSES, group=3)
    gradient = prompt.gradient(prompt.initial, upstream)
    assert torch.equal(TunablePrompt(open_teacher, CLASSES, group=3).gradient(prompt.initial, upstream), gradient)
    torch.testing.assert_close(
        TunablePrompt(open_teacher, CLASSES, group=50).gradient(prompt.initial, upstream),
        gradient,
        rtol=1e-4,
        atol=1e-5,
    )
    for _ in range(3):
        direction = torch.randn(gradient.shape, generator=generator)
        ends = [(prompt.features(prompt.initial + h * direction) * upstream).sum() for h in (-1e-3, 1e-3)]
        torch.testing.assert_close((ends[1] - ends[0]) / 2e-3, (gradient * direction).sum(), rtol=2e-2, atol=2e-2)


def test_tpt_with_zero_steps_is_zero_shot_bit_for_bit(open_teacher: OpenTeacher) -> None:
    batch = make_batch(3, open_teacher)
    answer = create_method("tpt:steps=0", SMALL).predict(batch)
    assert torch.equal(answer.logits, create_method("zero-shot").predict(batch).logits)
    torch.testing.assert_close(answer.extras["entropy_first"], answer.extras["entropy_last"])


def test_tpt_lowers_the_entropy_of_the_views_it_keeps(open_teacher: OpenTeacher) -> None:
    answer = create_method("tpt:keep=0.5", SMALL).predict(make_batch(4, open_teacher))
    assert (answer.extras["entropy_last"] < answer.extras["entropy_first"]).all()
    more = create_method("tpt:keep=0.5,steps=4", SMALL).predict(make_batch(4, open_teacher))
    assert (more.extras["entropy_last"] < answer.extras["entropy_last"]).all()
    torch.testing.assert_close(more.extras["entropy_first"], answer.extras["entropy_first"])


def test_tpt_does_what_adam_on_the_whole_loss_does(open_teacher: OpenTeacher) -> None:
    """One step by hand, with the gradient of the whole loss at once, against TPT's groups of classes."""
    batch = make_batch(1, open_teacher)
    views = normalize(batch.views(8)[0], dim=1)
    prompt, scale = TunablePrompt(open_teacher, CLASSES, group=99), batch.head.logit_scale
    probabilities = (scale * views @ batch.head.features.T).softmax(1)
    kept = views[(-(probabilities * probabilities.log()).sum(1)).argsort()[:4]]
    context = prompt.initial.clone().requires_grad_()
    whole = open_teacher.tokenizer([TEMPLATE.replace("{}", name) for name in CLASSES])  # at their full length
    with _replaced(prompt._embedding, prompt._slots, context):
        text = normalize(open_teacher.model.encode_text(whole), dim=1)
    mean = (scale * kept @ text.T).softmax(1).mean(0)
    (-(mean * mean.log()).sum()).backward()
    torch.optim.AdamW([context], lr=5e-3).step()
    expected = scale * views[0] @ prompt.features(context.detach()).T
    answer = create_method("tpt:keep=0.5,group=2", SMALL).predict(batch)
    torch.testing.assert_close(answer.logits[0], expected, rtol=1e-3, atol=1e-3)
    assert (answer.logits[0] - batch.head.logits(batch.tokens())[0]).abs().max() > 1e-2


def test_tpt_leaves_teacher_and_context_as_they_were(open_teacher: OpenTeacher) -> None:
    before = {name: weights.clone() for name, weights in open_teacher.model.state_dict().items()}
    method = create_method("tpt", SMALL)
    batch = make_batch(2, open_teacher)
    first = method.predict(batch)
    context = method._prompt.initial.clone()  # type: ignore[attr-defined]
    again = method.predict(batch)
    assert torch.equal(again.logits, first.logits)
    assert torch.equal(method._prompt.initial, context)  # type: ignore[attr-defined]
    for name, weights in open_teacher.model.state_dict().items():
        assert torch.equal(weights, before[name])
    assert all(weights.grad is None and not weights.requires_grad for weights in open_teacher.model.parameters())
    assert not any(module._forward_hooks for module in open_teacher.model.modules())


def test_tpt_takes_the_runs_own_single_prompt_and_says_when_it_cannot(
    open_teacher: OpenTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    batch = make_batch(2, open_teacher)
    batch.head = ZeroShotHead.build(open_teacher, CLASSES, ("this is a {}, a kind of thing.",))
    answer = create_method("tpt:steps=0", SMALL).predict(batch)
    assert torch.equal(answer.logits, batch.head.logits(batch.tokens()))
    assert not caplog.records
    batch.head = ZeroShotHead.build(open_teacher, CLASSES, ("an image of a {}.", "art of a {}."))
    answer = create_method("tpt:steps=0", SMALL).predict(batch)
    paper = ZeroShotHead.build(open_teacher, CLASSES, (TEMPLATE,))
    assert torch.equal(answer.logits, paper.logits(batch.tokens()))
    assert "not what the run's other methods use" in caplog.text


def test_tpt_says_which_prompt_it_uses() -> None:
    own, paper = create_method("tpt:prompt=art of a {}"), create_method("tpt")
    assert isinstance(own, HasOwnPrompt)
    assert isinstance(paper, HasOwnPrompt)
    assert not isinstance(create_method("zero-shot"), HasOwnPrompt)
    assert own.own_prompt(["a photo of a {}."]) == "art of a {}"
    assert paper.own_prompt(["this is a {}."]) == "this is a {}."
    assert paper.own_prompt(["{} texture."]) == paper.own_prompt(["a {}", "the {}"]) == "a photo of a {}."


# --- other methods that tune a prompt ---------------------------------------------------------------------------------


def test_ctpt_without_dispersion_is_tpt_and_with_it_keeps_texts_apart(open_teacher: OpenTeacher) -> None:
    batch = make_batch(3, open_teacher)
    tpt = create_method("tpt", SMALL).predict(batch)
    none = create_method("ctpt:dispersion=0", SMALL).predict(batch)
    assert torch.equal(none.logits, tpt.logits)
    much = create_method("ctpt:dispersion=1000", SMALL).predict(batch)
    assert (much.extras["dispersion_last"] > much.extras["dispersion_first"]).all()
    assert (much.extras["dispersion_last"] > none.extras["dispersion_last"]).all()


def test_rtpt_lowers_each_views_entropy_and_an_outlier_hardly_counts(open_teacher: OpenTeacher) -> None:
    answer = create_method("rtpt:neighbours=3,keep=0.5", SMALL).predict(make_batch(4, open_teacher))
    assert (answer.extras["entropy_last"] < answer.extras["entropy_first"]).all()
    like = normalize(torch.ones(7, 16) + 0.1 * torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    weights = view_weights(torch.cat([like, -like[:1]]), 3, 0.01)
    assert weights.sum() == pytest.approx(1)
    assert weights[7] < 1e-6 < weights[:7].min()
    asked: list[float] = []

    def weigh(views: Tensor, neighbours: int, temperature: float) -> Tensor:
        asked.append(temperature)
        return view_weights(views, neighbours, temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apm.benchmarks.methods.rtpt.view_weights", weigh)
        create_method("rtpt:neighbours=3", SMALL).predict(make_batch(1, open_teacher))
    assert asked == [pytest.approx(1 / open_teacher.logit_scale)]  # the teacher's own, as CLIP's is 0.01
    twice = view_weights(torch.cat([like[:1], like]), 3, 0.01)  # a view's copy is another view
    assert twice[0] == pytest.approx(float(twice[1]))


def test_the_reward_model_sees_the_same_views_and_its_favourite_gains(
    open_teacher: OpenTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    favourite = 2

    class Second(FakeTeacher):
        """Finds the third class in every view, and no other."""

        def encode_image(self, pixels: Tensor) -> Tensor:
            self.image_calls += len(pixels)
            seen.append(pixels)
            return torch.eye(16)[:1].expand(len(pixels), -1)

        def encode_text(self, texts: Any) -> Tensor:
            return torch.eye(16)[[0 if CLASSES[favourite] in text else 1 for text in texts]]

    seen: list[Tensor] = []
    second = Second(dim=16, name="second")
    monkeypatch.setattr(rlcf, "load_teacher", lambda spec, device: second)
    batch = make_batch(2, open_teacher)
    own: list[Tensor] = []
    encode = open_teacher.encode_image
    monkeypatch.setattr(open_teacher, "encode_image", lambda pixels: (own.append(pixels), encode(pixels))[1])
    spec = f"rlcf:reward=embedded,proposals={len(CLASSES)},lr=0.002"
    create_method(spec, SMALL).predict(batch)
    assert torch.equal(torch.cat(seen), torch.cat(own))
    assert second.image_calls == 2 * 8
    before = batch.head.probabilities(batch.tokens())[:, favourite]
    alone = create_method(f"{spec},views=1", SMALL).predict(batch)  # the image is the one view that is tuned on
    assert (alone.logits.softmax(1)[:, favourite] > 1.005 * before).all()


def test_dynaprompt_depends_on_the_order_and_forgets_on_reset(open_teacher: OpenTeacher) -> None:
    method: Any = create_method("dynaprompt:prompts=4,keep=0.5,views=4", SMALL)
    forward = method.predict(make_batch(8, open_teacher))
    assert forward.extras["prompts"].max() > 1
    method.reset()
    turned = method.predict(make_batch(8, open_teacher, order=[*range(7, -1, -1)])).logits.flip(0)
    assert (turned - forward.logits).abs().max() > 1e-3
    method.reset()
    parts = [method.predict(make_batch(8, open_teacher, order=part)).logits for part in ([0, 1, 2, 3, 4], [5, 6, 7])]
    torch.testing.assert_close(torch.cat(parts), forward.logits, rtol=1e-4, atol=1e-4)


def test_of_dynaprompts_candidates_those_are_taken_that_both_rankings_prefer() -> None:
    """Worked by hand: entropies fall from prompt 0 to 3; prompt 1 is the oldest, at place 1; 0 and 3 differ most."""
    height = torch.tensor([1.0, 2.0, 3.0, 4.0])  # of the one class that stands out: the higher, the surer
    logits = torch.zeros(4, 3, 5)
    logits[:, :, 0] = height[:, None]
    logits[3, 1:, 0] -= 0.5
    assert choose(logits, oldest=1) == [3, 1]  # the candidate 3 alone is in the first of the second ranking
    assert choose(logits, oldest=0) == [0]  # nothing stands before it in the second ranking
    logits[1, 1:, 0] -= 0.1
    assert choose(logits[[0, 2, 1, 3]], oldest=1) == [3, 1]


def test_a_teacher_with_a_closed_text_tower_is_named() -> None:
    with pytest.raises(UsageError, match="Teacher fake cannot tune its prompt"):
        create_method("tpt", SMALL).predict(make_batch(1))


def test_marginal_entropy_is_that_of_the_mean_prediction() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 1.0]])
    mean = logits.softmax(1).mean(0)
    torch.testing.assert_close(marginal_entropy(logits), -(mean * mean.log()).sum())


# --- ZERO -------------------------------------------------------------------------------------------------------------


def views_voting(*choices: tuple[int, float]) -> Tensor:
    """Probabilities over four classes: each view's class and how sure it is of it."""
    rows = torch.tensor([[(1 - sure) / 3] * 4 for _, sure in choices])
    for row, (choice, sure) in zip(rows, choices, strict=True):
        row[choice] = sure
    return rows


def test_confident_views_vote() -> None:
    views = views_voting((0, 0.4), (1, 0.9), (1, 0.8), (2, 0.85), (0, 0.5), (0, 0.45))
    assert zero_votes(views, 0.5).tolist() == [0, 2, 1, 0]


def test_a_tie_goes_to_the_most_confident_of_the_remaining_views() -> None:
    # Classes 1 and 2 have a vote each. The surest remaining view is for 3, which is not tied; the next for 2.
    views = views_voting((1, 0.95), (2, 0.9), (1, 0.5), (3, 0.8), (2, 0.7), (0, 0.4))
    assert zero_votes(views, 0.34).tolist() == [0, 1, 2, 0]
    assert zero_votes(views[[5, 2, 0, 3, 1, 4]], 0.34).tolist() == [0, 1, 2, 0]


def test_a_tie_that_no_remaining_view_breaks_goes_by_the_most_confident_view() -> None:
    views = views_voting((2, 0.9), (1, 0.95), (3, 0.5))
    assert zero_votes(views, 0.67).tolist() == [0, 2, 1, 0]


def test_votes_as_logits_keep_the_winner_and_the_shares() -> None:
    views = views_voting((1, 0.95), (1, 0.9), (0, 0.9), (3, 0.5), (3, 0.4))
    votes = torch.tensor([1.0, 2.0, 0.0, 0.0])
    logits = vote_logits(votes, views)
    torch.testing.assert_close(logits.exp().sum(), torch.tensor(1.0))
    torch.testing.assert_close(logits.softmax(0), (votes + views.mean(0)) / 4)
    assert logits.argsort(descending=True).tolist() == [1, 0, 3, 2]


# --- TDA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURE_STREAMS)
def test_a_stream_method_depends_on_the_order_and_forgets_on_reset(name: str) -> None:
    teacher = FakeTeacher(dim=16)
    method: Any = create_method(name, SMALL)
    forward = method.predict(make_batch(12, teacher, stream_length=12)).logits
    method.reset()
    assert torch.equal(method.predict(make_batch(12, teacher, stream_length=12)).logits, forward)
    method.reset()
    turned = make_batch(12, teacher, order=list(range(11, -1, -1)), stream_length=12)
    backward = method.predict(turned).logits.flip(0)
    assert not torch.allclose(backward, forward, atol=1e-3)
    method.reset()
    parts = (make_batch(12, teacher, order=part, stream_length=12) for part in ([0, 1, 2, 3, 4], [*range(5, 12)]))
    split = [method.predict(part).logits for part in parts]
    torch.testing.assert_close(torch.cat(split), forward, rtol=1e-5, atol=1e-5)


def test_the_cache_keeps_the_most_confident_of_each_class() -> None:
    cache = Cache(3, shots=2, beta=5.0)
    axis = torch.eye(2)
    assert torch.equal(cache.logits(axis[0]), torch.zeros(3))
    value = torch.tensor([0, 2])
    cache.update(0, 0.9, axis[0], value)
    cache.update(0, 0.5, axis[1], value)
    cache.update(0, 0.7, axis[1], value)  # takes the place of 0.9
    cache.update(0, 0.8, axis[0], value)  # more uncertain than both that are kept
    expected = 2 * torch.exp(torch.tensor(-5.0))
    torch.testing.assert_close(cache.logits(axis[0]), torch.stack([expected, expected * 0, expected]))
    torch.testing.assert_close(cache.logits(axis[1]), torch.tensor([2.0, 0.0, 2.0]))


def test_tda_by_hand_on_one_image() -> None:
    features = normalize(torch.tensor([[2.0, 1.0], [0.0, 1.0], [-1.0, 0.2]]), dim=1)
    head = ZeroShotHead(labels=("a", "b", "c"), features=features, logit_scale=2.0)
    token = torch.tensor([[3.0, 3.0]])
    batch: Any = SimpleNamespace(head=head, tokens=lambda: token)
    logits = head.logits(token)[0]
    probabilities = logits.softmax(0)
    share = float(-(probabilities * probabilities.log()).sum()) / np.log2(3)
    assert 0.2 < share < 0.5
    expected = logits + 2 * torch.nn.functional.one_hot(logits.argmax(), 3) - 0.117 * (probabilities > 0.03).float()
    torch.testing.assert_close(create_method("tda").predict(batch).logits[0], expected)


def test_the_runs_number_of_locations_is_used_recorded_and_named() -> None:
    for options, spec, queries, name in (
        ({}, "apm", None, "apm"),
        ({"queries": 9}, "apm", 9, "apm[queries=9]"),
        ({"queries": 9}, "apm:queries=5", 5, "apm[queries=5]"),
        ({"queries": 9}, "apm:queries=all", None, "apm[queries=all]"),
        ({"queries": "auto"}, "apm", FEWER["small"], f"apm[queries={FEWER['small']}]"),
        ({"queries": "auto"}, "apm:distil=both", None, "apm[both]"),
    ):
        method = create_method(spec, run_options(preset="small", steps=2, **options))
        assert (method.settings["queries"], method.name) == (queries, name)
    few, every = (
        create_method("apm", run_options(preset="small", steps=2, queries=queries)).predict(make_batch(1))
        for queries in (9, "all")
    )
    assert not torch.equal(few.logits, every.logits)
    with pytest.raises(UsageError, match='queries is "0"'):
        create_method("apm", run_options(queries=0))
