"""What a model is known by: the whole of it, as it lies on disk, wherever that is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from deleatur.detectors.classifier import Classifier
from deleatur.diffusion.clip import load_clip
from deleatur.diffusion.model import fingerprint, identify, load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "elsewhere"))


def nudge(part: str) -> Callable[[Path], None]:
    """One number of a network's weights."""

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


def forget_a_merge(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["model"]["merges"].pop()
    path.write_text(json.dumps(vocabulary))


def test_it_is_known_by_the_same_name_elsewhere_and_in_any_precision(saved: Path, own: Path) -> None:
    rewrite("unet/config.json", _diffusers_version="0.0.1", _name_or_path="somebody/else")(own)
    first = load(str(saved), device="cpu")
    for dtype in ("float32", "bfloat16"):
        again = load(str(own), dtype=dtype, device="cpu")
        assert (again.digest, again.text_digest, again.pipeline) == (first.digest, first.text_digest, first.pipeline)
    assert again.dtype == torch.bfloat16
    assert first.digest == fingerprint(first.unet)


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
        forget_a_merge,
    ],
)
def test_whatever_draws_otherwise_is_another_pipeline_by_the_same_unet(
    change: Callable[[Path], None], saved: Path, own: Path
) -> None:
    change(own)
    first, other = load(str(saved), device="cpu"), load(str(own), device="cpu")
    assert other.pipeline != first.pipeline
    assert other.digest == first.digest, "a delta still fits it"


def test_other_weights_of_the_unet_are_another_unet(saved: Path, own: Path) -> None:
    nudge("unet")(own)
    first, other = load(str(saved), device="cpu"), load(str(own), device="cpu")
    assert other.digest != first.digest
    assert other.pipeline != first.pipeline


def test_a_classifier_is_known_by_its_weights_and_by_what_prepares_its_pictures(tmp_path: Path) -> None:
    folder = tiny.save_classifier(tmp_path / "judge", ("gun", "cat"))
    first = Classifier(path=str(folder)).load().weights
    assert Classifier(path=str(shutil.copytree(folder, tmp_path / "copy")), batch=3).load().weights == first
    net, processor = AutoModelForImageClassification.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    assert first == identify(net, processor)
    names = {first}
    for change in (
        rewrite("preprocessor_config.json", image_mean=[0.1, 0.2, 0.3]),
        rewrite("config.json", id2label={"0": "cat", "1": "gun"}),
        nudge("."),
    ):
        change(folder)
        names.add(Classifier(path=str(folder)).load().weights)
    assert len(names) == 4


def test_clip_is_known_by_the_same_name_after_it_was_used(tmp_path: Path) -> None:
    clip = load_clip(str(tiny.save_clip(tmp_path / "clip")))
    clip.texts(["a cat"])
    assert identify(clip.model, clip.processor.tokenizer, clip.processor.image_processor) == clip.digest


def test_clip_says_the_same_of_a_picture_or_prompt_in_any_company(tmp_path: Path) -> None:
    from PIL import Image

    clip = load_clip(str(tiny.save_clip(tmp_path / "clip")))
    shown = [Image.new("RGB", (16, 16), (7 * i, 255 - 5 * i, i)) for i in range(35)]
    texts = [f"a {word}" for word in tiny.WORDS] * 3
    assert torch.equal(clip.pictures(shown)[33:], clip.pictures(shown[33:]))
    assert torch.equal(clip.texts(texts)[33:], clip.texts(texts[33:]))
    whole, alone = (torch.cat([layers[-1][:n] for layers, n in clip.layers(s)]) for s in (shown, shown[33:]))
    assert torch.equal(whole[33:], alone)
    assert clip.pictures([]).shape == (0, 8)
    assert clip.texts([]).shape == (0, 8)
