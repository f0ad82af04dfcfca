"""Digests of models: of everything on disk that affects images, wherever it is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from deleatur.detectors.classifier import Classifier
from deleatur.diffusion.clip import load_clip
from deleatur.diffusion.model import assemble, digest_module, digest_parts, digest_tensors, load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "elsewhere"))


def nudge(part: str) -> Callable[[Path], None]:
    """Changes one weight of a network."""

    def change(folder: Path) -> None:
        [file] = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        name = sorted(n for n, t in tensors.items() if t.is_floating_point())[0]
        tensors[name].view(-1)[0] += 1e-3
        save_file(tensors, file, metadata={"format": "pt"})

    return change


def rewrite(file: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def drop_a_merge(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["model"]["merges"].pop()
    path.write_text(json.dumps(vocabulary))


def test_digests_do_not_depend_on_location_or_precision(saved: Path, copy: Path) -> None:
    rewrite("unet/config.json", _diffusers_version="0.0.1", _name_or_path="another/name")(copy)
    first = load(str(saved), device="cpu")
    for dtype in ("float32", "bfloat16"):
        again = load(str(copy), dtype=dtype, device="cpu")
        assert (again.unet_digest, again.text_encoder_digest, again.pipeline_digest) == (
            first.unet_digest,
            first.text_encoder_digest,
            first.pipeline_digest,
        )
    assert again.dtype == torch.bfloat16
    assert first.unet_digest == digest_module(first.unet)


@pytest.mark.parametrize(
    "change",
    [
        nudge("vae"),
        nudge("text_encoder"),
        rewrite("vae/config.json", scaling_factor=0.2),
        rewrite("scheduler/scheduler_config.json", beta_end=0.013),
        rewrite("scheduler/scheduler_config.json", steps_offset=0),
        rewrite("unet/config.json", attention_head_dim=4),
        rewrite("text_encoder/config.json", hidden_act="gelu"),
        drop_a_merge,
    ],
)
def test_a_change_outside_the_unet_changes_the_pipeline_digest_only(
    change: Callable[[Path], None], saved: Path, copy: Path
) -> None:
    change(copy)
    first, other = load(str(saved), device="cpu"), load(str(copy), device="cpu")
    assert other.pipeline_digest != first.pipeline_digest
    assert other.unet_digest == first.unet_digest, "a delta still applies"


def test_changed_unet_weights_change_the_unet_digest(saved: Path, copy: Path) -> None:
    nudge("unet")(copy)
    first, other = load(str(saved), device="cpu"), load(str(copy), device="cpu")
    assert other.unet_digest != first.unet_digest
    assert other.pipeline_digest != first.pipeline_digest


def test_a_classifiers_digest_covers_its_weights_and_its_preprocessing(tmp_path: Path) -> None:
    folder = tiny.save_classifier(tmp_path / "judge", ("gun", "cat"))
    first = Classifier(path=str(folder)).load().weights
    assert Classifier(path=str(shutil.copytree(folder, tmp_path / "copy")), batch_size=3).load().weights == first
    net, processor = AutoModelForImageClassification.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert first == digest_parts(net, processor)
    digests = {first}
    for change in (
        rewrite("preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]),
        rewrite("config.json", id2label={"0": "cat", "1": "gun"}),
        nudge("."),
    ):
        change(folder)
        digests.add(Classifier(path=str(folder)).load().weights)
    assert len(digests) == 4


def test_the_digest_of_clip_does_not_change_by_use(tmp_path: Path) -> None:
    clip = load_clip(str(tiny.save_clip(tmp_path / "clip")))
    clip.embed_texts(["a cat"])
    assert digest_parts(clip.model, clip.processor.tokenizer, clip.processor.image_processor) == clip.digest


def test_a_digest_covers_names_types_and_shapes_and_not_the_order() -> None:
    """All of these have the same 16 bytes."""
    zeros = torch.zeros(2, 2)
    different = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.reshape(4)},
        {"a": zeros.int()},
        {"a": zeros[0], "b": zeros[1]},
    ]
    assert len({digest_tensors(tensors) for tensors in different}) == len(different)
    one, two = torch.ones(1), torch.ones(2)
    assert digest_tensors({"a": one, "b": two}) == digest_tensors({"b": two, "a": one})


def test_assembled_networks_are_frozen_and_in_evaluation_mode() -> None:
    parts: dict[str, Any] = tiny.parts()
    networks = [parts[name].train() for name in ("unet", "vae", "text_encoder")]
    assemble(**parts)
    for network in networks:
        assert not any(module.training for module in network.modules())
        assert not any(p.requires_grad for p in network.parameters())


def test_clip_embeddings_are_those_of_transformers(tmp_path: Path) -> None:
    from PIL import Image

    clip = load_clip(str(tiny.save_clip(tmp_path / "clip")))
    images, texts = [Image.new("RGB", (16, 16), (90 * i, 200, 9)) for i in range(2)], ["a cat", "ink"]
    inputs = clip.processor(text=texts, images=images, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = clip.model(**inputs)
    assert torch.allclose(clip.embed_images(images), expected.image_embeds, atol=1e-6)
    assert torch.allclose(clip.embed_texts(texts), expected.text_embeds, atol=1e-6)
    assert expected.text_embeds.norm(dim=-1) == pytest.approx([1.0, 1.0], abs=1e-6)


def test_clip_embeddings_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    from PIL import Image

    clip = load_clip(str(tiny.save_clip(tmp_path / "clip")))
    images = [Image.new("RGB", (16, 16), (7 * i, 255 - 5 * i, i)) for i in range(35)]
    texts = [f"a {word}" for word in tiny.WORDS] * 3
    assert torch.equal(clip.embed_images(images)[33:], clip.embed_images(images[33:]))
    assert torch.equal(clip.embed_texts(texts)[33:], clip.embed_texts(texts[33:]))
    in_batch, alone = (
        torch.cat([layers[-1][:n] for layers, n in clip.patch_features(s)]) for s in (images, images[33:])
    )
    assert torch.equal(in_batch[33:], alone)
    assert clip.embed_images([]).shape == (0, 8)
    assert clip.embed_texts([]).shape == (0, 8)
