"""Methods on features against recorded outputs of the published ones; see `goldens` for other files than our own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from apm.benchmarks.methods import Batch, create_method
from apm.benchmarks.methods.dota import ClassGaussians, DOTASettings
from apm.benchmarks.methods.features import most_confident
from apm.benchmarks.methods.oga import CachedGaussians
from apm.benchmarks.methods.onzeta import OnlineProxies, OnZetaSettings
from apm.benchmarks.methods.tps import TPSSettings, tune_shift
from apm.errors import UsageError
from apm.text.zeroshot import ZeroShotHead
from tests.benchmarks.goldens import close, golden_files, read_golden
from tests.places import GOLDEN

Golden = Mapping[str, Tensor]


def answers(spec: str, features: Tensor, text: Tensor, *, at_a_time: int = 1000) -> tuple[Tensor, Any]:
    """The logits of a method told features (B, V, D) in the place of images, and the method."""
    names = tuple(f"class {index}" for index in range(len(text)))
    head = ZeroShotHead(labels=names, features=text, logit_scale=100.0)
    method = create_method(spec)
    parts = []
    for part in features.split(at_a_time):
        stand_in: Any = SimpleNamespace(
            head=head,
            tokens=lambda part=part: part[:, 0],
            views=lambda count, min_area, part=part: part[:, :count],
            stream_length=len(features),
        )
        assert all(hasattr(Batch, name) for name in ("tokens", "views"))
        parts.append(method.predict(stand_in).logits)
    return torch.cat(parts), method


def spec_of(name: str, **settings: Any) -> str:
    values = [f"{key}={value.item() if isinstance(value, Tensor) else value}" for key, value in settings.items()]
    return f"{name}:{','.join(values)}"


def check_tps(golden: Golden) -> None:
    views, text = golden["views"], golden["text_features"]
    count = views.shape[1]
    for key, settings in (
        ("logits", {}),
        ("logits_3steps", {"steps": 3}),
        ("logits_lr1e3", {"lr": 1e-3}),
        ("logits_shared", {"shared": True}),
    ):
        close(answers(spec_of("tps", views=count, **settings), views, text)[0], golden[key])
    templates = normalize(golden["template_features"].mean(dim=1), dim=1)
    close(answers(f"tps:views={count}", views, templates)[0], golden["logits_templates"])
    for key, shared, share in (("shift", False, 1e-4), ("shift_shared", True, 1e-3)):
        shifts = [tune_shift(one, text, 100.0, TPSSettings(shared=shared)) for one in views]
        close(torch.stack(shifts), golden[key], share)


def check_dmn(golden: Golden) -> None:
    views, text = golden["views"], golden["text_features"]
    close((100 * views[:, 0] @ text.T).softmax(dim=1), golden["zero_shot"])
    for suffix in ("", "_small", "_noviews"):
        count = 1 if suffix == "_noviews" else views.shape[1]
        shots = int(golden["memory_size" + suffix])
        logits, method = answers(f"dmn:views={count},shots={shots}", views, text)
        close(2 * logits.softmax(dim=1), golden["probabilities" + suffix])  # the published sum of two distributions
        close(logits.exp() - golden["zero_shot"], golden["dynamic" + suffix])
        known = method.memory.entropies
        assert [len(row) for row in known] == golden["counts" + suffix].tolist()
        padded = torch.tensor([[*row, *[0.0] * (shots - len(row))] for row in known])
        close(padded, golden["entropies" + suffix])


def check_boostadapter(golden: Golden) -> None:
    views, text = golden["views"], golden["text_features"]
    for suffix in ("_image", "_mean", "_mean_delta0"):
        given = {f"positive_{key}": golden[key + suffix] for key in ("alpha", "beta")}
        mode = "image" if suffix == "_image" else "mean"
        spec = spec_of("boostadapter", views=views.shape[1], mode=mode, extra=golden["delta" + suffix], **given)
        close(answers(spec, views, text)[0], golden["logits" + suffix])


def check_onzeta(golden: Golden) -> None:
    stream, text = golden["stream"], golden["text_features"]
    for suffix, settings, rows in (
        ("", {}, None),
        ("_beta04", {"beta": golden["beta_beta04"]}, None),
        ("_alpha0", {"alpha": golden["alpha_alpha0"]}, None),
        ("_published_cw", {"proxy_rate": golden["cw_published_cw"]}, 15),  # later rows are chaotic
    ):
        spec = spec_of("onzeta", **{"proxy_rate": golden["cw"], **settings})
        logits = answers(spec, stream.unsqueeze(1), text)[0]
        close(logits.softmax(dim=1)[:rows], golden["probabilities" + suffix][:rows])
    state = OnlineProxies(text, 100.0, len(stream), OnZetaSettings(proxy_rate=float(golden["cw"])))
    close(torch.stack([state.step(feature)[1] for feature in stream]), golden["text_label"])


def check_ecalp(golden: Golden) -> None:
    logits, method = answers("ecalp", golden["stream"].unsqueeze(1), golden["text_features"])
    close(logits / method.settings["scale"], golden["scores"])
    close(logits.softmax(dim=1), golden["probabilities"])


def check_dpe(golden: Golden) -> None:
    views, text = golden["views"], golden["text_features"]
    for suffix, answer in (("", "image"), ("_a", "mean")):
        assert golden["text" + suffix] == golden["image" + suffix]
        given = {key: golden[key + suffix] for key in ("alpha", "beta", "align")}
        spec = spec_of("dpe", views=views.shape[1], lr=golden["text" + suffix], answer=answer, **given)
        logits, method = answers(spec, views, text)
        close(logits, golden["logits" + suffix])
        known = [[entropy for entropy, _ in method.state.cache.entries(owner)] for owner in range(len(text))]
        assert [len(row) for row in known] == golden["cache_counts" + suffix].tolist()
        published = golden[f"cache_entropies{suffix}_or_nan"]
        for row, expected in zip(known, published, strict=True):
            torch.testing.assert_close(torch.tensor(row), expected[~expected.isnan()], rtol=1e-4, atol=1e-6)


def check_dota(golden: Golden) -> None:
    views, text = golden["views"], golden["text_features"]
    for suffix in ("", "_text_init", "_single"):
        given = {key: golden[key + suffix] for key in ("epsilon", "sigma", "rho", "eta")}
        start = "none" if suffix == "_text_init" else golden["initial_mean"]
        count = 1 if suffix == "_single" else views.shape[1]
        logits, method = answers(spec_of("dota", views=count, initial_mean=start, **given), views, text)
        close(logits, golden["logits" + suffix])
        close(method.state.means, golden["mu" + suffix])
        close(method.state.counts, golden["count" + suffix])
        torch.testing.assert_close(method.state.covariance_sum.float(), method.state.covariances.sum(dim=0))
        settings = DOTASettings(
            min_mass=0,
            initial_mean=None if start == "none" else float(start),
            **{key: float(value) for key, value in given.items()},
        )
        state = ClassGaussians(text, settings)
        discriminants, weights = [], []
        for one in views[:, :count]:
            logits = 100 * one @ text.T
            kept = most_confident(logits, settings.keep)
            discriminants.append(state.discriminant(one[kept].mean(dim=0)))
            weights.append(state.weight(len(kept)))
            state.fit(one[kept], logits[kept].softmax(dim=1))
        close(torch.stack(discriminants), golden["dota_logits" + suffix])
        close(torch.tensor(weights), golden["weight" + suffix])
        close(state.covariances.mean(dim=0), golden["covariance" + suffix])


def check_oga(golden: Golden) -> None:
    stream, text = golden["stream"], golden["text_features"]
    close(answers("oga", stream.unsqueeze(1), text)[0].softmax(dim=1), golden["probabilities"])
    for suffix in ("", "_batch", "_shots2"):
        state = CachedGaussians(text, int(golden["shots" + suffix]))
        likelihoods, probabilities = [], []
        for part in stream.split(int(golden["batch" + suffix])):
            logits = 100 * part @ text.T
            state.update(part, logits.softmax(dim=1))
            likelihoods.append(state.log_likelihood(part))
            probabilities.append((logits.log_softmax(dim=1) + golden["tau"] * likelihoods[-1]).softmax(dim=1))
        close(torch.cat(likelihoods), golden["log_likelihood" + suffix])
        close(torch.cat(probabilities), golden["probabilities" + suffix])
        assert state.counts.tolist() == golden["counts" + suffix].tolist()
        close(state.means, golden["mus" + suffix])
        close(state.precision, golden["inv_cov" + suffix])


def slow_tda(views: Tensor, text: Tensor, alpha: float, beta: float, negative_alpha: float) -> np.ndarray:
    """TDA on the means of confident views, written from its description alone: (B, V, D) and (C, D) to (B, C)."""

    def softmax(rows: np.ndarray) -> np.ndarray:
        raised = np.exp(rows - rows.max(axis=-1, keepdims=True))
        return raised / raised.sum(axis=-1, keepdims=True)

    def entropy(row: np.ndarray) -> float:
        return float(-(row * np.log(row)).sum())

    words = text.double().numpy()
    positive: dict[int, list[tuple[float, np.ndarray]]] = {}
    negative: dict[int, list[tuple[float, np.ndarray, np.ndarray]]] = {}

    def enter(cache: dict[int, list[Any]], owner: int, entry: Any, size: int) -> None:
        entries = cache.setdefault(owner, [])
        if len(entries) < size:
            entries.append(entry)
        elif entry[0] < entries[-1][0]:
            entries[-1] = entry
        entries.sort(key=lambda one: one[0])

    answers = []
    for image in views.double().numpy():
        logits = 100 * image @ words.T
        order = np.argsort([entropy(softmax(row)) for row in logits], kind="stable")[: max(1, int(0.1 * len(image)))]
        feature, mean_logits = image[order].mean(axis=0), logits[order].mean(axis=0)
        probabilities = softmax(logits[order]).mean(axis=0)
        doubt, owner = entropy(probabilities), int(mean_logits.argmax())
        enter(positive, owner, (doubt, feature), 3)
        if 0.2 < doubt / np.log2(len(words)) < 0.5:
            enter(negative, owner, (doubt, feature, (probabilities > 0.03) & (probabilities < 1.0)), 2)
        answer = mean_logits.copy()
        for label, entries in positive.items():
            answer[label] += sum(alpha * np.exp(-beta * (1 - feature @ key)) for _, key in entries)
        for entries_of in negative.values():
            for _, key, marked in entries_of:
                answer -= negative_alpha * np.exp(-(1 - feature @ key)) * marked
        answers.append(answer)
    return np.array(answers)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 5.0), (2.363, 7.45)])
def test_tda_of_confident_views_is_what_a_slow_one_written_apart_gives(alpha: float, beta: float) -> None:
    golden = read_golden(GOLDEN / "boostadapter_seed0.npz")
    views, text = golden["views"], golden["text_features"]
    spec = f"tda:mode=mean,views={views.shape[1]},positive_alpha={alpha},positive_beta={beta}"
    ours = answers(spec, views, text)[0]
    expected = slow_tda(views, text, alpha, beta, 0.117)
    torch.testing.assert_close(ours, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)
    assert np.abs(expected - slow_tda(views, text, alpha, beta, 0.0)).max() > 0.05  # the negative cache has a say
    assert np.abs(expected - slow_tda(views, text, 0.0, beta, 0.117)).max() > 0.5
    image = answers(f"tda:positive_alpha={alpha},positive_beta={beta}", views, text)[0]
    assert not torch.allclose(image, ours, atol=0.1)


def test_an_image_with_a_broken_view_leaves_nothing_in_tdas_caches() -> None:
    golden = read_golden(GOLDEN / "boostadapter_seed0.npz")
    views, text = golden["views"].clone(), golden["text_features"]
    others = [index for index in range(len(views)) if index != 3]
    expected = answers("tda:mode=mean,views=32", views[others], text)[0]
    views[3, 5] = torch.nan
    ours = answers("tda:mode=mean,views=32", views, text)[0]
    assert ours[3].isnan().all() and torch.equal(ours[others], expected)


def test_tda_of_images_has_no_settings_of_views() -> None:
    image, mean = create_method("tda"), create_method("tda:mode=mean")
    assert set(mean.settings) - set(image.settings) == {"mode", "views", "min_area", "keep"}
    with pytest.raises(UsageError, match="without mode=mean: add that, or leave out views and keep"):
        create_method("tda:views=8,keep=0.2")
    with pytest.raises(UsageError, match=r'Unknown mode "means"\. Did you mean "mean"'):
        create_method("tda:mode=means")
    with pytest.raises(UsageError, match="keep is 0"):
        create_method("tda:mode=mean,keep=0")


CHECKS: dict[str, Callable[[Golden], None]] = {
    "tps": check_tps,
    "dmn": check_dmn,
    "boostadapter": check_boostadapter,
    "onzeta": check_onzeta,
    "ecalp": check_ecalp,
    "dpe": check_dpe,
    "dota": check_dota,
    "oga": check_oga,
}
FILES = [(name, path) for name in CHECKS for path in golden_files(name)]


@pytest.mark.parametrize(("name", "path"), FILES, ids=[path.stem for _, path in FILES])
def test_published_outputs_are_met(name: str, path: Path) -> None:
    CHECKS[name](read_golden(path))


@pytest.mark.parametrize("name", [*CHECKS])
def test_how_a_stream_is_cut_into_batches_changes_nothing(name: str) -> None:
    golden = read_golden(GOLDEN / f"{name}_seed0.npz")
    text = golden["text_features"]
    features = (golden["views"] if "views" in golden else golden["stream"].unsqueeze(1))[:30]
    whole, pieces = (answers(name, features, text, at_a_time=size)[0] for size in (30, 7))
    assert torch.equal(whole, pieces)
    backwards = answers(name, features.flip(0), text)[0].flip(0)
    assert torch.allclose(backwards, whole, rtol=1e-4, atol=1e-4) is (name == "tps")
