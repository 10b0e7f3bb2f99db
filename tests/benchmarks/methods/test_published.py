"""The two protocols: what is published is used for its data set, and named in records and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from apm.benchmarks.datasets import DATASETS
from apm.benchmarks.methods import REGISTRY, MethodOptions, create_method
from apm.benchmarks.methods.base import make_settings
from apm.benchmarks.methods.published import IMAGENETS, OTHERS, AsPublished, Published
from apm.benchmarks.runs.records import Records
from apm.benchmarks.runs.timed_batch import TimedBatch
from apm.benchmarks.store.reader import wanted_views
from apm.benchmarks.tables.build import make_tables
from apm.benchmarks.tables.trust import make_trust
from apm.errors import UsageError
from apm.images.crops import view_generator
from apm.labels import prompt_templates
from apm.test_time.augmix import OPERATIONS, mixed
from apm.test_time.views import augmented_view
from apm.text.descriptors import Descriptors, described_head, read_descriptors
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.made_runs import make_dataset, make_run
from tests.benchmarks.methods.made import CLASSES, full_spec, make_batch, pictures
from tests.fakes import FakeTeacher

MEAN = {"mode": "mean", "views": 64, "min_area": 0.08, "keep": 0.1}
"""TDA's settings where its authors take confident views."""
PUBLISHED = MethodOptions(protocol="published")


def begun(spec: str, dataset: str, **options: Any) -> AsPublished:
    method = create_method(spec, MethodOptions(protocol="published", **options))
    assert isinstance(method, AsPublished)
    method.begin(dataset)
    return method


@pytest.mark.parametrize(
    ("spec", "dataset", "expected"),
    [
        ("tda", "imagenet", {}),
        ("tda", "imagenet-sketch", {"positive_alpha": 2.363, "positive_beta": 7.45, **MEAN}),
        ("tda", "imagenet-v2", {"positive_alpha": 1.0, "positive_beta": 8.0, **MEAN}),
        ("tda", "imagenet-a", MEAN),
        ("tda", "food101", {"positive_alpha": 1.0, "positive_beta": 1.0}),
        ("boostadapter", "food101", {"positive_alpha": 1.0, "positive_beta": 1.0, "extra": 3, "mode": "image"}),
        ("boostadapter", "imagenet-a", {"extra": 3, "mode": "mean"}),
        ("boostadapter", "dtd", {"positive_alpha": 2.0, "positive_beta": 3.0, "extra": 0, "mode": "image"}),
        ("dpe", "imagenet-a", {"alpha": 6.0, "beta": 5.0, "lr": 3e-4, "align": 2.5, "answer": "mean"}),
        ("dpe", "eurosat", {"alpha": 3.0, "beta": 8.0, "lr": 5e-5, "align": 0.2, "answer": "image", "views": 1}),
        ("onzeta", "caltech101", {"alpha": 0.0, "beta": 0.4}),
        ("onzeta", "imagenet-r", {"beta": 0.8}),
        ("ctpt", "pets", {"dispersion": 50.0}),
        ("dmn", "folder", {"views": 32}),
        ("tps", "pets", {"lr": 1e-3}),
        ("rlcf:reward=embedded", "pets", {"steps": 5}),
    ],
)
def test_a_data_set_has_its_own_settings(spec: str, dataset: str, expected: dict[str, Any]) -> None:
    method = begun(spec, dataset)
    used = dict(method.used)
    del used["prompts"]
    used.pop("view_policy", None)
    assert used == pytest.approx(expected)
    inner = dict(method._method.settings)
    assert {name: inner[name] for name in expected} == pytest.approx(expected)
    others = dict(create_method(spec).settings)
    assert {k: v for k, v in inner.items() if k not in expected} == {k: others[k] for k in inner if k not in expected}


@pytest.mark.parametrize("name", [*REGISTRY])
def test_what_is_published_names_known_settings_and_data_sets(name: str) -> None:
    published = getattr(REGISTRY[name], "published", Published())
    assert published.source
    for key, values in published.by_dataset.items():
        assert key in (IMAGENETS, OTHERS, *DATASETS)
        known = {**create_method(full_spec(name)).settings, **begun(full_spec(name), key)._method.settings}
        assert set(values) <= set(known)
    assert set(published.settings) <= set(create_method(full_spec(name)).settings)
    method = create_method(full_spec(name), PUBLISHED)
    for dataset in DATASETS:
        method.begin(dataset)  # type: ignore[attr-defined]


def test_what_stands_behind_the_name_wins_over_what_is_published() -> None:
    method = begun("tda:positive_alpha=9", "pets")
    assert method.used["positive_alpha"] == 9.0 and method.used["positive_beta"] == 7.0
    assert method.settings["positive_alpha"] == 9.0 and method.settings["positive_beta"] == "by data set"


def test_the_answers_are_those_of_the_same_settings_and_prompts() -> None:
    teacher = FakeTeacher(dim=16)
    batch = make_batch(6, teacher)
    tda = begun("tda", "pets")
    plain = create_method("tda:positive_alpha=2,positive_beta=7")
    assert torch.equal(tda.predict(batch).logits, plain.predict(make_batch(6, teacher)).logits)
    dmn = begun("dmn", "pets")
    again = make_batch(6, teacher)
    before = again.head
    answer = dmn.predict(again)
    assert again.head is before and not again.augmix
    again.head = ZeroShotHead.build(teacher, CLASSES, prompt_templates("simple"))
    assert torch.equal(answer.logits, create_method("dmn:views=32").predict(again).logits)
    assert dmn.own_prompt(before.templates) == "[simple: 7 prompts] {}"
    assert dmn.own_prompt(prompt_templates("simple")) is None and tda.own_prompt(before.templates) is None


def test_a_stream_starts_new_with_each_data_set() -> None:
    teacher = FakeTeacher(dim=16)
    method = begun("tda", "pets")
    first = method.predict(make_batch(6, teacher)).logits
    method.begin("dtd")
    assert not torch.equal(method.predict(make_batch(6, teacher)).logits, first)
    method.begin("pets")
    method.reset()
    assert torch.equal(method.predict(make_batch(6, teacher)).logits, first)


def test_augmix_views_are_used_where_the_authors_do_and_plain_ones_are_kept_apart() -> None:
    teacher = FakeTeacher(dim=16)
    batch = make_batch(2, teacher)
    plain = batch.views(5).clone()
    fine, imagenet = begun("zero:views=5", "pets"), begun("zero:views=5", "imagenet")
    assert (fine.used["view_policy"], imagenet.used["view_policy"]) == ("AugMix", "crops")
    other = fine.predict(batch).logits
    assert torch.equal(batch.views(5), plain)
    with batch.under(head=batch.head, augmix=True):
        augmented = batch.views(5)
        assert torch.equal(create_method("zero:views=5").predict(batch).logits, other)
        assert torch.equal(batch.view_pixels(0, 5)[0], teacher.preprocess(batch.images[0]))
    assert torch.equal(augmented[:, 0], plain[:, 0]) and not torch.allclose(augmented[:, 1:], plain[:, 1:])


def test_an_augmix_view_depends_on_seed_image_and_number_alone_and_resembles_its_crop() -> None:
    (image,) = pictures(1)
    common: dict[str, Any] = {"seed": 0, "sample_id": "a", "size": 32, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    one = augmented_view(image, 3, augmix=True, **common)
    assert torch.equal(one, augmented_view(image, 3, augmix=True, **common))
    assert not torch.equal(one, augmented_view(image, 4, augmix=True, **common))
    crop = augmented_view(image, 3, **common)
    others = [augmented_view(image, number, **common) for number in range(10, 20)]
    assert 0 < (one - crop).abs().mean() < min((one - other).abs().mean() for other in others)
    assert one.shape == (3, 32, 32) and one.abs().max() <= 1.0 + 1e-6
    for operation in OPERATIONS:
        assert operation(image, 0.05).size == image.size
    flat = mixed(image, view_generator(0, "a", 0), (0.0,) * 3, (1.0,) * 3)
    assert flat.min() >= 0 and flat.max() <= 1 + 1e-6  # the weights are a mixture's


def test_records_and_tables_name_the_protocol(tmp_path: Path) -> None:
    dataset = make_dataset(name="pets")
    methods = [create_method(spec, PUBLISHED) for spec in ("tda", "dmn", "zero:views=3")]
    make_run(tmp_path / "published", methods, dataset, protocol="published")
    make_run(tmp_path / "common", [create_method("tda")], dataset)
    published, common = Records.open(tmp_path / "published"), Records.open(tmp_path / "common")
    config, cell = published.run["config"], published.cells["pets"]
    assert (config["protocol"], common.run["config"]["protocol"]) == ("published", "common")
    assert cell["published"]["tda"] == {"positive_alpha": 2.0, "positive_beta": 7.0, "prompts": "own"}
    assert cell["published"]["dmn"]["prompts"] == "simple" and cell["own_prompts"] == {
        "dmn": "[simple: 7 prompts] {}",
    }
    assert config["methods"]["tda"]["positive_beta"] == "by data set"
    (table,) = make_tables([published, common])
    names = [row.method for row in table.rows if row.kind == "ours" and row.method.startswith("tda")]
    assert any("protocol=published" in name for name in names) and len(names) == 2
    assert [note.split(":")[0] for note in table.notes if note.startswith("Protocol")] == [
        "Protocol common",
        "Protocol published",
    ]
    with pytest.raises(UsageError, match='protocol: "common" before, "published" now'):
        make_run(tmp_path / "common", [create_method("tda", PUBLISHED)], dataset, protocol="published")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(UsageError, match='Did you mean "published"'):
        create_method("tda", MethodOptions(protocol="publishd"))


def test_published_settings_are_read_like_any_others() -> None:
    from apm.benchmarks.methods.tda import TDASettings

    options = MethodOptions(published={"positive_alpha": 3.0})
    assert make_settings(TDASettings, "tda", options, positive_alpha=1.0).positive_alpha == 3.0


# --- LLM descriptors --------------------------------------------------------------------------------------------------


def descriptors_of(path: Path, classes: Sequence[str], *words: str) -> Descriptors:
    path.write_text(json.dumps({name.upper(): [f"{name}, which {word}." for word in words] for name in classes}))
    return read_descriptors(path)


@pytest.mark.parametrize("name", ["dmn", "dpe", "tps"])
def test_descriptors_are_used_by_the_methods_whose_authors_use_them(name: str, tmp_path: Path) -> None:
    teacher = FakeTeacher(dim=16)
    said = descriptors_of(tmp_path / "pets.json", CLASSES, "runs", "is green", "sleeps")
    spec = f"{name}:views=4,keep=0.5"
    method, without = begun(spec, "pets", descriptors={"pets": said}), begun(spec, "pets")
    batch = make_batch(4, teacher)
    before = batch.head
    answer, plain = method.predict(batch).logits, without.predict(make_batch(4, teacher)).logits
    assert batch.head is before and not torch.allclose(answer, plain, atol=1e-2)
    published: Published = method._published
    templates = tuple(method._templates(before.templates))
    combination = "apart" if name == "tps" else "together"
    own = make_batch(4, teacher)
    with own.under(head=described_head(teacher, CLASSES, templates, said, combination), augmix=name == "tps"):
        inner = create_method(spec, MethodOptions(published=published.values("pets")))
        torch.testing.assert_close(inner.predict(own).logits, answer)
    assert method.settings["descriptors"] == "yes" and without.settings["descriptors"] == "no"
    assert str(method.settings["published"]).endswith("; with LLM descriptors")
    assert str(without.settings["published"]).endswith("; without LLM descriptors")
    assert method.used["descriptors_sha256"] == said.digest and "descriptors" not in without.used
    assert "and LLM descriptors] {}" in str(method.own_prompt(before.templates))


def test_other_methods_take_no_notice_of_descriptors(tmp_path: Path) -> None:
    users = [name for name, make in REGISTRY.items() if getattr(make, "published", Published()).descriptors]
    assert set(users) == {"dmn", "dpe", "tps"}
    said = descriptors_of(tmp_path / "pets.json", CLASSES, "runs")
    method, without = begun("tda", "pets", descriptors={"pets": said}), begun("tda", "pets")
    assert (method.described, method.settings, method.used) == (None, without.settings, without.used)
    batch, other = make_batch(2), make_batch(2)
    assert torch.equal(method.predict(batch).logits, without.predict(other).logits)


def test_files_of_two_data_sets_with_the_same_classes_are_kept_apart(tmp_path: Path) -> None:
    one, other = (descriptors_of(tmp_path / f"{word}.json", CLASSES, word) for word in ("runs", "sleeps"))
    method = begun("dmn", "pets", descriptors={"pets": one, "dtd": other})
    batch = make_batch(3, FakeTeacher(dim=16))
    first = method.predict(batch).logits
    method.begin("dtd")
    method.reset()
    assert not torch.allclose(method.predict(batch).logits, first, atol=1e-2)
    method.begin("pets")
    method.reset()
    assert torch.equal(method.predict(batch).logits, first)


def test_records_and_tables_say_which_descriptors_were_used(tmp_path: Path) -> None:
    dataset = make_dataset(name="pets")
    said = descriptors_of(tmp_path / "cupl.json", dataset.class_names, "runs", "sleeps")
    specs = ("zero-shot", "dmn:views=2")

    def run(folder: str, descriptors: Descriptors | None) -> Any:
        given = {} if descriptors is None else {"pets": descriptors}
        options = MethodOptions(protocol="published", descriptors=given)
        make_run(tmp_path / folder, [create_method(spec, options) for spec in specs], dataset, protocol="published")
        return Records.open(tmp_path / folder)

    have, have_not = run("with", said), run("without", None)
    assert have.run["config"]["cells"]["pets"]["descriptors"] == said.digest
    assert "descriptors" not in have_not.run["config"]["cells"]["pets"]
    assert have.cells["pets"]["published"]["dmn[views=2]"]["descriptors"] == "cupl.json"
    assert have.cells["pets"]["own_prompts"] == {"dmn[views=2]": "[simple: 7 prompts and LLM descriptors] {}"}
    (table,) = make_tables([have, have_not])
    names = [row.method for row in table.rows if row.kind == "ours"]
    assert names == ["zero-shot", "dmn[views=2] (descriptors=yes)", "zero-shot", "dmn[views=2] (descriptors=no)"]
    digest = said.digest[:12]
    (note,) = [note for note in table.notes if note.startswith("LLM descriptors")]
    assert note == (
        f"LLM descriptors of classes from cupl.json (SHA-256 {digest}…): dmn[views=2] on pets, in {tmp_path / 'with'}."
    )
    assert any(note in trust.notes for trust in make_trust([table]))
    for folder, other in (("with", None), ("without", said)):
        with pytest.raises(UsageError, match="descriptors"):
            run(folder, other)
    changed = descriptors_of(tmp_path / "cupl.json", dataset.class_names, "runs", "sleeps", "is new")
    with pytest.raises(UsageError, match=f"of the classes: SHA-256 {digest}… before, SHA-256 .*… now"):
        run("with", changed)
    fewer = descriptors_of(tmp_path / "fewer.json", dataset.class_names[1:], "runs")
    with pytest.raises(UsageError, match=r'pets: fewer.json describes 2 classes, but not 1 of the 3 asked for: "cat"'):
        run("fewer", fewer)
    assert not (tmp_path / "fewer" / "run.json").exists()


def test_the_texts_of_a_method_are_no_images_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, encode = TimedBatch.measure, FakeTeacher.encode_text
    measuring: list[bool] = [False]
    during: list[bool] = []

    def measure(batch: TimedBatch, work: Any) -> Any:
        measuring[0] = True
        try:
            return measured(batch, work)
        finally:
            measuring[0] = False

    def encode_text(teacher: FakeTeacher, texts: Sequence[str]) -> torch.Tensor:
        during.append(measuring[0])
        return encode(teacher, texts)

    monkeypatch.setenv("APM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TimedBatch, "measure", measure)
    monkeypatch.setattr(FakeTeacher, "encode_text", encode_text)
    make_run(tmp_path / "run", [create_method("dmn:views=1", PUBLISHED)], make_dataset(2), protocol="published")
    assert len(during) > 1 and not any(during)


def test_views_in_a_store_are_those_of_the_data_sets_of_the_run() -> None:
    methods = [create_method(name, PUBLISHED) for name in ("tda", "dpe", "zero", "boostadapter", "ttl")]
    assert wanted_views(methods, ["pets"]) == {"dpe": (1, 0.08), "zero": (1, 0.08), "boostadapter": (64, 0.08)}
    wanted = wanted_views(methods, ["pets", "imagenet"])
    assert wanted == {"dpe": (1, 0.08), "zero": (64, 0.08), "boostadapter": (64, 0.08)}
    plain = [create_method(name) for name in ("tda", "tda:mode=mean,views=9", "dpe")]
    assert wanted_views(plain, ["pets"]) == {"tda[mode=mean,views=9]": (9, 0.08), "dpe": (64, 0.08)}
