"""One body per shelf: every method that stands on a shelf keeps the shelf's promise, whoever wrote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import counting
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from deleatur import plugins
from deleatur.attacks import Attack, AttackContext, AttackTarget
from deleatur.config.catalogue import SHELVES, catalogue
from deleatur.detectors import Detector
from deleatur.diffusion import encode
from deleatur.diffusion.clip import load_clip
from deleatur.diffusion.model import Model, digest_module
from deleatur.diffusion.overlay import edited_weights
from deleatur.diffusion.predict import Weights
from deleatur.diffusion.sample import denoise, initial_noise, sample
from deleatur.erasers import Eraser
from deleatur.guides import Guide
from deleatur.inversion import InversionContext, InversionData, Inverter
from deleatur.metrics import Detections, EvaluationSet, Metric, RewardScores, SetMetric
from deleatur.records.model import Concept, Delta, RatedImages, SoftToken
from deleatur.records.sampling import Prompt
from deleatur.storage.tensors import load, load_delta, save, save_delta
from deleatur.training.finetune import ErasureContext, Progress, Reading
from deleatur.training.parameters import select
from deleatur.training.textual_inversion import templates_of

LOOP: dict[str, Any] = {"iterations": 3, "batch_size": 2}
SMALL: dict[str, dict[str, Any]] = {
    "sdd": {"order": "single", "training": {**LOOP, "lr": 1e-3, "sampler_steps": 3}},
    "esd": {"training": {**LOOP, "lr": 1e-3, "sampler_steps": 3}},
    "abo": {
        "alternatives": {"weapon": "cat", "style": ""},
        "training": {**LOOP, "lr": 1e-3, "sampler_steps": 3, "pool_size": 4},
    },
    "safegen": {"training": {**LOOP, "lr": 1e-3}},
    "sfd": {"training": {**LOOP, "lr": 1e-3}},
    "hfi": {"num_tokens": 2, "top_k": 4, "training": LOOP},
    "textual_inversion": {"training": LOOP},
    "concept_inversion": {"training": LOOP},
}
"""Numbers that make a method quick; a method that is quick as it is needs no line."""


def make(shelf: str, name: str, base: type[Any], **more: Any) -> Any:
    return plugins.load(shelf, name, base)(**SMALL.get(name, {}), **more)


def rated(concept: Concept) -> Concept:
    return replace(concept, images=RatedImages(pictures(4), pictures(3)))


@pytest.mark.parametrize("name", plugins.names("erasers"))
def test_erasers(model: Model, name: str, tmp_path: Path) -> None:
    eraser: Eraser = make("erasers", name, Eraser)
    eraser.fits(["weapon"])
    concepts = [rated(encode.concept_from_words(model, "weapon", ["gun", "sword"]))]
    keep = encode.encode_text(model, ["", "a cat"])
    before = digest_module(model.unet)
    one, same = (eraser.erase(model, concepts, ErasureContext(1, keep)) for _ in range(2))
    assert digest_module(model.unet) == before, "the given model is untouched"
    assert set(one.tensors) <= eraser.touches(model), "only declared parameters are in the delta"
    assert one.tensors.keys() == same.tensors.keys()
    assert all(torch.equal(one.tensors[n], same.tensors[n]) for n in one.tensors), "same seed, same delta"
    save_delta(tmp_path / "d.safetensors", one)
    again = load_delta(tmp_path / "d.safetensors")
    assert all(torch.equal(one.tensors[n], again.tensors[n]) for n in one.tensors), "round trip through disk"
    assert (again.base, again.method, again.concepts) == (model.unet_digest, name, ("weapon",))
    assert one.one_step == again.one_step == eraser.one_step
    save_delta(tmp_path / "e.safetensors", same)
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()
    edited_weights(model, again)


@pytest.mark.parametrize("name", plugins.names("erasers"))
def test_erasers_take_words_and_tokens_together_look_and_go_on(model: Model, name: str, tmp_path: Path) -> None:
    """Two concepts, one in words and one in soft tokens; looked at after every step; left after the first, and gone
    on with from what it saved.
    """
    vectors = torch.randn(2, 1, tiny.WIDTH, generator=torch.Generator().manual_seed(0))
    concepts = [
        rated(encode.concept_from_words(model, "weapon", ["gun"], ["a {}"])),
        rated(encode.concept_from_token(model, SoftToken("style", vectors), ["a {}", "{}"])),
    ]
    own = SMALL.get(name, {})
    looking = (
        {"training": {**own["training"], "eval_every": 1, "max_preserved_drop": 10.0}} if "training" in own else {}
    )
    eraser: Eraser = plugins.load("erasers", name, Eraser)(**{**own, **looking})
    keep, path = encode.encode_text(model, ["", "a cat"]), tmp_path / "state.safetensors"
    looks: list[int] = []

    def probe(weights: Weights) -> Reading:
        looks.append(len(weights))
        return Reading(1.0, 1.0)

    def on_step(p: Progress) -> None:
        if p.state and not path.exists():
            save(path, p.state.tensors(), p.state.numbers())

    whole = eraser.erase(model, concepts, ErasureContext(1, keep, on_step=on_step, probe=probe))
    assert whole.concepts == ("weapon", "style")
    if path.exists():
        assert looks == [0, *[len(eraser.touches(model))] * LOOP["iterations"]], "the base, then what was trained"
        again = eraser.erase(model, concepts, ErasureContext(1, keep, probe=probe, state=load(path)))
        assert all(torch.equal(whole.tensors[n], again.tensors[n]) for n in whole.tensors), "the same bits"
        assert (again.record["curve"], again.record["looks"]) == (whole.record["curve"], whole.record["looks"])


@pytest.mark.parametrize("name", plugins.names("erasers"))
def test_erasers_take_what_they_say(model: Model, name: str) -> None:
    """Rows with gradient to one, those without as far as chance lets them; trained numbers exactly."""
    numbers = SMALL.get(name, {})
    if "training" in numbers:
        numbers = {**numbers, "training": {**numbers["training"], "iterations": 20}}
    eraser: Eraser = plugins.load("erasers", name, Eraser)(**numbers)
    concept = encode.concept_from_words(model, "weapon", ["gun", "sword"])
    with counting.rows() as took:
        delta = eraser.erase(model, [rated(concept)], ErasureContext(1, encode.encode_text(model, ["", "a cat"])))
    work = eraser.work("words")
    assert took["backward"] == work.backward
    assert took["deep"] <= work.deep
    assert took["forward"] == pytest.approx(work.forward, rel=0.2)
    assert took["wide"] <= work.wide
    named = select(model.unet, work.train) if work.train else {}
    assert set(delta.tensors) <= set(named)
    assert sum(p.numel() for p in delta.tensors.values()) == sum(named[n].numel() for n in delta.tensors)


@pytest.mark.parametrize("name", plugins.names("guides"))
def test_guides(model: Model, name: str) -> None:
    guide: Guide = make("guides", name, Guide)
    rows = guide.conditions(model, spoken(model))
    assert all(r.shape[1:] == encode.encode_text(model, [""]).shape[1:] for r in rows.values())
    g = torch.Generator().manual_seed(0)
    run = [
        (torch.randn(3, 4, 4, 4, generator=g), {n: torch.randn(3, 4, 4, 4, generator=g) for n in rows})
        for _ in range(14)
    ]

    def combined(of: slice) -> list[torch.Tensor]:
        state, out = None, []
        for step, (eps_p, eps) in enumerate(run):
            one, state = guide.combine(step, eps_p[of], {n: e[of] for n, e in eps.items()}, state)
            out.append(one)
        return out

    whole = combined(slice(None))
    assert all(torch.equal(a, b) for a, b in zip(whole, combined(slice(None)), strict=True)), "no hidden state"
    for i in range(3):
        alone = combined(slice(i, i + 1))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True)), "no row looks at another"


@pytest.mark.parametrize("k", range(3))
@pytest.mark.parametrize("name", plugins.names("guides"))
def test_a_guide_takes_the_predictions_that_it_says_however_many_words_a_concept_has(
    model: Model, name: str, k: int
) -> None:
    guide: Guide = make("guides", name, Guide)
    concepts = [encode.concept_from_words(model, f"c{i}", ["gun", "sword", "cat"]) for i in range(k)]
    c, conditions = encode.encode_text(model, ["a dog"]), guide.conditions(model, concepts)
    with counting.rows() as rows, counting.calls() as calls:
        sample(model, c, [1], guide=guide, conditions=conditions, steps=3, batch=1)
    assert (calls[counting.UNET], rows["forward"]) == (3, 3 * guide.predictions_per_step(k)), "one network call a step"


def spoken(model: Model) -> list[Concept]:
    """One concept in words, one in soft tokens."""
    rows = torch.stack([encode.word_embedding(model, "sword")[None] + 1, encode.word_embedding(model, "cat")[None] - 1])
    return [
        encode.concept_from_words(model, "weapon", ["gun"]),
        encode.concept_from_token(model, SoftToken("ink", rows, {})),
    ]


def steered(model: Model, guide: Guide, concepts: list[Concept], delta: Delta | None = None) -> torch.Tensor:
    c, conditions = encode.encode_text(model, ["a dog", "a gun", "a cat"]), guide.conditions(model, concepts)
    return denoise(
        model, initial_noise(model, [1, 2, 3]), c, conditions, guide, 12, edited_weights(model, delta) if delta else {}
    )


NEUTRAL: dict[str, dict[str, Any]] = {"sld": {"strength": 0}, "sega": {"edit": {"strength": 0}}}
"""Numbers that switch a guide off. The others are off without a concept only, or are plain guidance themselves."""


@pytest.mark.parametrize("name", plugins.names("guides"))
def test_a_guide_without_a_concept_or_switched_off_is_plain_guidance_to_the_bit(model: Model, name: str) -> None:
    plain = steered(model, make("guides", "cfg", Guide), [])
    assert torch.equal(plain, steered(model, make("guides", name, Guide), []))
    if name in NEUTRAL:
        off: Guide = make("guides", name, Guide, **NEUTRAL[name])
        assert torch.equal(plain, steered(model, off, spoken(model)))


@pytest.mark.parametrize("name", [n for n in plugins.names("guides") if n != "cfg"])
def test_a_guide_steers_away_from_words_and_from_tokens_on_any_weights(model: Model, name: str) -> None:
    guide, plain = make("guides", name, Guide), make("guides", "cfg", Guide)
    moved = {n: 0.1 * torch.ones_like(p) for n, p in model.unet.named_parameters() if "attn2" in n}
    delta = Delta(moved, model.unet_digest, "test", {}, ())
    for concept in spoken(model):
        assert not torch.equal(steered(model, plain, [concept]), steered(model, guide, [concept]))
        assert not torch.equal(steered(model, plain, [concept], delta), steered(model, guide, [concept], delta))
    assert not torch.equal(steered(model, guide, spoken(model)), steered(model, guide, spoken(model), delta))


def pictures(n: int = 5, size: int = 24) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_classifier(tmp_path_factory.mktemp("judge"), ("gun", "cat"))


@pytest.mark.parametrize("name", plugins.names("detectors"))
def test_detectors(name: str, classifier: Path) -> None:
    more = {"path": str(classifier)} if name == "classifier" else {}
    whole: Detector = make("detectors", name, Detector, **more)
    small: Detector = make("detectors", name, Detector, batch=2, **more)
    shown = pictures()
    one, other = whole.load(), small.load()
    all_at_once, reversed_ = one.detect(shown), one.detect(shown[::-1])
    assert all_at_once.shape == (5, len(one.labels))
    assert np.allclose(all_at_once, other.detect(shown), atol=1e-5), "batch size is irrelevant"
    assert np.array_equal(all_at_once[::-1], reversed_), "order is kept"
    assert np.array_equal(all_at_once[3:4], one.detect(shown[3:4])), "and company is irrelevant"
    assert len(one.weights) == 64, "the weights' digest is known before anything is detected"
    assert (one.weights, one.labels) == (other.weights, other.labels)
    assert whole.read_labels() == one.labels, "told without loading"
    assert whole.model_dump() == small.model_dump(), "nor is it part of what scores are kept under"
    assert one.detect([]).shape == (0, len(one.labels))


@pytest.fixture(scope="session")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    clip = load_clip(str(tiny.save_clip(tmp_path_factory.mktemp("clip"))))
    asks = [("gun", "concept", "weapon"), ("cat", "unseen", "")] * 5
    prompts = [Prompt(f"p{i}", f"a {thing}", role, f"judge:{thing}", c) for i, (thing, role, c) in enumerate(asks)]  # type: ignore[arg-type]
    shown = pictures(10)
    from deleatur.detectors.nudenet import NudeNet

    nudenet = NudeNet().load()
    right = np.array([[1, 0] if p.label == "judge:gun" else [0, 1] for p in prompts], np.float32)
    return EvaluationSet(
        prompts,
        [p.id for p in prompts],
        lambda keys: [shown[int(key[1:])] for key in keys],
        {
            "judge": Detections(("gun", "cat"), right, "w" * 64, "judge"),
            "nudenet": Detections(nudenet.labels, nudenet.detect(shown), nudenet.weights, "nudenet"),
        },
        clip.embed_images(shown),
        clip,
        {"weapon": ("judge", ("gun",))},
        {"weapon": RewardScores(torch.linspace(0, 1, 10), "h" * 64)},
    )


@pytest.mark.parametrize("name", plugins.names("metrics"))
def test_metrics(name: str, gallery: EvaluationSet) -> None:
    metric: Metric = make("metrics", name, Metric)
    needed = metric.required_labels(gallery.prompts, gallery.concept_labels)
    assert all(label in gallery.detections[detector].labels for detector, label in needed)
    asked_for = {detector: gallery.detections[detector] for detector, _ in needed}
    metric.values(replace(gallery, detections=asked_for), gallery)  # reads no detector that it does not ask for
    assert isinstance(metric.higher_is_better, bool)
    values = metric.values(gallery, gallery)
    assert values.shape == (10,)
    made_by = metric.detector(gallery)
    assert made_by is not None
    assert made_by.weights
    known = values[~np.isnan(values)]
    if isinstance(metric, SetMetric):
        assert metric.of_set(gallery.features, gallery.features) == pytest.approx(0, abs=1e-6)
    elif metric.is_rate:
        assert set(known) <= {0.0, 1.0}
    assert isinstance(metric, SetMetric) or len(known) > 0


@pytest.mark.parametrize("name", plugins.names("metrics"))
def test_a_metrics_values_depend_on_their_own_rows_and_on_what_it_reads(name: str, gallery: EvaluationSet) -> None:
    metric: Metric = make("metrics", name, Metric)
    base = gallery.select(range(10)[::-1])
    values = metric.values(gallery, base)
    for rows in ([3], [7, 2, 4]):
        assert np.array_equal(metric.values(gallery.select(rows), base.select(rows)), values[rows], equal_nan=True)

    blank = {n: replace(s, scores=s.scores[:, ::-1], identity="other") for n, s in gallery.detections.items()}
    for other in (
        replace(gallery, prompts=[replace(p, text="a sword") for p in gallery.prompts]),
        replace(gallery, prompts=[replace(p, label="judge:sword") for p in gallery.prompts]),
        replace(gallery, prompts=[replace(p, concept="") for p in gallery.prompts]),
        replace(gallery, concept_labels={"weapon": ("judge", ("cat",))}),
        replace(gallery, detections=blank),
        replace(gallery, rewards={"weapon": RewardScores(torch.zeros(10), "other")}),
    ):
        changed = ~np.isclose(metric.values(other, base), values, rtol=0, atol=1e-9, equal_nan=True)
        for row in np.flatnonzero(changed):
            assert metric.cache_inputs(other, row) != metric.cache_inputs(gallery, row), (
                "what it was kept under says so"
            )


def test_the_held_out_head_is_named_beside_the_features_it_reads(gallery: EvaluationSet) -> None:
    made_by = make("metrics", "held_out_reward", Metric).detector(gallery)
    assert made_by.name.split("+") == ["clip", "held-out head of weapon"]
    assert made_by.weights.split("+") == [gallery.clip.digest, "h" * 64]


KNOWN = {"concept_rate": 1.0, "recognition": 1.0, "perceptual": 0.0, "nudity": 0.0}


@pytest.mark.parametrize(("name", "expected"), KNOWN.items())
def test_metrics_with_a_known_answer(name: str, expected: float, gallery: EvaluationSet) -> None:
    """The gallery is recognised perfectly, equals itself, and is noise to NudeNet."""
    values = make("metrics", name, Metric).values(gallery, gallery)
    assert np.nanmean(values) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", plugins.names("inversion"))
def test_inverters(model: Model, name: str) -> None:
    inverter: Inverter = make("inversion", name, Inverter)
    z = torch.randn(6, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    rated = InversionData(
        z,
        torch.linspace(0.5, 1, 6),
        torch.eye(6),
        False,
        torch.zeros(6, dtype=torch.bool),
        templates_of("object", [""] * 6),
    )
    before = digest_module(model.text_encoder), digest_module(model.unet)
    start = encode.word_embedding(model, "object")
    looked: list[int] = []

    def look(vectors: torch.Tensor) -> list[float]:
        looked.append(len(vectors))
        return [0.0] * len(vectors)

    with counting.rows() as took:
        tokens = inverter.invert(model, rated, start, InversionContext(0, look))
    work = inverter.work()
    assert (took["forward"], took["backward"], took["deep"]) == (0, work.backward, work.deep)
    assert (sum(looked), len(tokens)) == (work.looks * work.found, work.found)
    assert all(t.vectors.shape[1:] == start.shape for t in tokens)
    assert any(not torch.equal(t.vectors[0], start) for t in tokens)
    assert (digest_module(model.text_encoder), digest_module(model.unet)) == before


@pytest.mark.parametrize("name", plugins.names("attacks"))
def test_attacks(model: Model, name: str) -> None:
    attack: Attack = make("attacks", name, Attack)
    assert attack.access in ("prompts", "text_encoder", "white_box", "original_model")
    z = torch.randn(4, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    target = AttackTarget(
        model, {}, "weapon", z, encode.word_embedding(model, "object"), templates_of("style", ["cat"] * 4)
    )
    steps: list[int] = []
    with counting.rows() as took:
        found = attack.attack(target, AttackContext(0, lambda p: steps.append(p.step)))
    work = attack.work()
    assert (took["forward"], took["backward"], took["deep"]) == (work.forward, work.backward, work.deep)
    assert len(found.vectors) <= work.found
    assert found.vectors.ndim == 3
    assert steps == list(range(1, len(steps) + 1)), "every step is told of"
    assert min(found.budget.values()) > 0


def test_every_method_names_its_source_and_explains_its_numbers() -> None:
    for shelf, methods in catalogue(None).items():
        assert set(methods) == set(plugins.names(shelf)), shelf
        assert all(m["source"] for m in methods.values())
        silent = [
            (m, n) for m, told in methods.items() for n, number in told["numbers"].items() if not number["meaning"]
        ]
        assert not silent


def test_a_shelfs_files_never_import_each_other() -> None:
    for shelf in SHELVES:
        folder = Path(plugins.__file__).parent / shelf
        for file in folder.glob("*.py"):
            text = file.read_text("utf-8")
            others = [n for n in plugins.names(shelf) if n != file.stem]
            assert not [n for n in others if f"deleatur.{shelf}.{n}" in text], file.name
