"""Checks of model folders; a folder that does not load is a ModelError with a hint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from safetensors.torch import load_file, save_file

from deleatur.detectors.classifier import Classifier
from deleatur.diffusion import architecture, folders, pipelines
from deleatur.diffusion.clip import load_clip
from deleatur.diffusion.model import load
from deleatur.errors import ModelError, ServiceError

LABELS = tuple(f"kind {i}" for i in range(12))
LOADERS: dict[str, Callable[[Path], Any]] = {
    "pipeline": lambda folder: load(str(folder)),
    "clip": lambda folder: load_clip(str(folder)),
    "judge": lambda folder: Classifier(path=str(folder)).load().detect([Image.new("RGB", (16, 16))]),
}
CHECKS: dict[str, Callable[[Path], Any]] = {
    "pipeline": pipelines.check_pipeline,
    "clip": folders.check_clip,
    "judge": folders.classifier_labels,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.save_pipeline(root / "pipeline")
    tiny.save_clip(root / "clip")
    tiny.save_classifier(root / "judge", LABELS)
    return root


@pytest.mark.parametrize("name", LOADERS)
def test_complete_folders_pass_the_check_and_load(models: Path, name: str) -> None:
    CHECKS[name](models / name)
    LOADERS[name](models / name)


def test_labels_are_in_the_order_of_class_indices(models: Path) -> None:
    assert Classifier(path=str(models / "judge")).read_labels() == LABELS, "ten comes after nine, not after one"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def junk(path: Path) -> None:
    path.write_bytes(b"junk")


def drop_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path, metadata={"format": "pt"})


def change_a_shape(path: Path) -> None:
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.ndim > 1)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, path, metadata={"format": "pt"})


WEIGHTS = (
    "pipeline/unet/diffusion_pytorch_model.safetensors",
    "pipeline/vae/diffusion_pytorch_model.safetensors",
    "pipeline/text_encoder/model.safetensors",
    "clip/model.safetensors",
    "judge/model.safetensors",
)


@pytest.mark.parametrize("file", WEIGHTS)
@pytest.mark.parametrize("damage", [truncate, junk, drop_a_tensor, change_a_shape])
def test_damaged_weights_never_load(models: Path, tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    name = file.partition("/")[0]
    shutil.copytree(models / name, tmp_path / name)
    damage(tmp_path / file)
    with pytest.raises(ModelError, match=str(tmp_path / name)) as error:
        LOADERS[name](tmp_path / name)
    assert "deleatur check" in error.value.hint
    if damage in (truncate, junk):
        with pytest.raises(ModelError, match="damaged"):
            CHECKS[name](tmp_path / name)


@pytest.mark.parametrize("file", ["pipeline/text_encoder/config.json", "clip/config.json", "judge/config.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_an_invalid_config_is_refused(models: Path, tmp_path: Path, file: str, content: str) -> None:
    name = file.partition("/")[0]
    shutil.copytree(models / name, tmp_path / name)
    (tmp_path / file).write_text(content)
    for read in (CHECKS[name], LOADERS[name]):
        with pytest.raises(ModelError, match=str(tmp_path / name)):
            read(tmp_path / name)


def test_a_missing_shard_is_refused(models: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(models / "judge", tmp_path / "judge")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(ModelError, match="model-2"):
        folders.check_network(folder)
    shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")
    folders.check_network(folder)


@pytest.mark.parametrize("address", ["nowhere", "nowhere/at/all", "models/none", "./owner/name", "/nowhere", ""])
def test_a_path_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError):
        folders.locate(address)


def test_a_hub_id_is_looked_up_in_the_local_cache_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert folders.locate("owner/never-fetched") is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="owner/never-fetched"):
        folders.locate("owner/never-fetched")
    snapshot = tmp_path / "cache" / "models--owner--name" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert folders.locate("owner/name") == snapshot


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def pipeline(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models / "pipeline", tmp_path / "pipeline"))


def refusal(folder: Path) -> ModelError:
    """The error of the check, which loading raises too."""
    with pytest.raises(ModelError) as error:
        pipelines.check_pipeline(folder)
    with pytest.raises(ModelError) as again:
        load(str(folder), device="cpu")
    assert str(again.value) == str(error.value)
    assert error.value.hint
    return error.value


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("StableDiffusionXLPipeline", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}),
        ("StableDiffusion3Pipeline", {"unet": [None, None], "transformer": ["diffusers", "SD3Transformer2DModel"]}),
        ("FluxPipeline", {"unet": [None, None], "transformer": ["diffusers", "FluxTransformer2DModel"]}),
        ("PixArtAlphaPipeline", {"text_encoder": ["transformers", "T5EncoderModel"]}),
    ],
)
def test_a_pipeline_of_another_family_is_named(pipeline: Path, name: str, parts: dict[str, Any]) -> None:
    edit(pipeline / "model_index.json", _class_name=name, **parts)
    shutil.rmtree(pipeline / "unet")  # such a folder has none, which is no damage
    error = refusal(pipeline)
    assert name in str(error)
    assert "expected a Stable Diffusion 1.x or 2.x pipeline" in str(error)
    assert all(entry[1] in str(error) for entry in parts.values() if entry[1])


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("unet", {"sample_size": [4, 8]}, r"square sample_size of the UNet, got \[4, 8\]"),
        ("unet", {"sample_size": None}, "square sample_size of the UNet, got None"),
        ("unet", {"sample_size": [4]}, r"square sample_size of the UNet, got \[4\]"),
        ("unet", {"sample_size": [[4], [4]]}, r"square sample_size of the UNet, got \[\[4\], \[4\]\]"),
        ("unet", {"sample_size": 0}, "square sample_size of the UNet, got 0"),
        ("unet", {"in_channels": 9}, "out_channels to be 9"),
        ("unet", {"in_channels": "4"}, "whole number of in_channels of the UNet, got 4"),
        ("vae", {"scaling_factor": None}, "positive scaling_factor of the VAE, got None"),
        ("unet", {"out_channels": 8}, "out_channels to be 4, the UNet's in_channels, got 8"),
        ("vae", {"latent_channels": 16}, "latent_channels to be 4"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type text_time"),
        ("unet", {"cross_attention_dim": 1024}, "cross_attention_dim to be 16, the text encoder's width, got 1024"),
    ],
)
def test_parts_of_another_shape_are_refused_by_name(
    pipeline: Path, file: str, values: dict[str, Any], message: str
) -> None:
    edit(pipeline / file / "config.json", **values)
    error = refusal(pipeline)
    with pytest.raises(ModelError, match=message):
        raise error


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("text_encoder/config.json", '{"max_position_embeddings": null}', "max_position_embeddings .* got None"),
        ("text_encoder/config.json", '{"max_position_embeddings": "x"}', "max_position_embeddings .* got x"),
        ("text_encoder/config.json", "[]", "config.json: expected a JSON object, got list"),
        ("tokenizer/tokenizer.json", "{}", "tokenizer is damaged: tokenizer.json"),
    ],
)
def test_text_limits_of_damaged_files_are_refused(pipeline: Path, file: str, content: str, message: str) -> None:
    (pipeline / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        pipelines.TextLimits.from_folder(pipeline)


@pytest.mark.parametrize("labels", [["gun", "bow"], {"gun": 0}, {"0": "gun", "2": "bow"}])
def test_labels_without_a_class_index_each_are_refused(models: Path, tmp_path: Path, labels: Any) -> None:
    folder = Path(shutil.copytree(models / "judge", tmp_path / "judge"))
    edit(folder / "config.json", id2label=labels)
    with pytest.raises(ModelError, match=r"judge is damaged: config.json"):
        folders.classifier_labels(folder)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"])
def test_a_link_to_a_missing_file_is_named(pipeline: Path, file: str) -> None:
    """As in a cache of the Hub that was cleaned up."""
    (pipeline / file).unlink()
    (pipeline / file).symlink_to("blobs/0123")
    assert f"{pipeline / file} links to blobs/0123, which is missing" in str(refusal(pipeline))


def test_a_square_list_is_a_sample_size(pipeline: Path) -> None:
    expected = load(str(pipeline), device="cpu").latent_shape
    edit(pipeline / "unet" / "config.json", sample_size=[4, 4])
    pipelines.check_pipeline(pipeline)
    assert load(str(pipeline), device="cpu").latent_shape == expected == (4, 4, 4)
    assert architecture.from_folder(pipeline).latent_shape == expected
    assert architecture.latent_shape({"sample_size": 64}) == (4, 64, 64), "4 channels are the default of diffusers"


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json"])
@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "pointer of Git LFS", "lfs pull"),
        ("<!DOCTYPE html><html>Sign in</html>", "is a web page: its download failed", "deleatur check"),
        ("", "is empty: its download failed", "deleatur check"),
    ],
)
def test_a_file_that_was_not_downloaded_is_named(
    pipeline: Path, file: str, content: str, message: str, hint: str
) -> None:
    (pipeline / file).write_text(content)
    error = refusal(pipeline)
    assert str(pipeline / file) in str(error)
    assert message in str(error)
    assert hint in error.hint


def test_weights_of_a_variant_are_named_and_the_hint_converts_them(pipeline: Path) -> None:
    weights = pipeline / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("model.fp16.safetensors"))
    error = refusal(pipeline)
    assert "expected weights as safetensors, found model.fp16.safetensors alone" in str(error)
    command = error.hint.removeprefix('python -c "').partition('"')[0]
    assert "variant='fp16'" in command
    exec(command)
    pipelines.check_pipeline(pipeline)


def test_pickled_weights_are_named(pipeline: Path) -> None:
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    error = refusal(pipeline)
    assert "found diffusion_pytorch_model.bin alone" in str(error)
    assert "from diffusers import UNet2DConditionModel" in error.hint
    assert "variant" not in error.hint


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("pytorch_model.bin", "safety_checker: expected weights as safetensors, found pytorch_model.bin alone"),
        ("", "none"),
    ],
)
def test_a_safety_checker_that_could_not_be_exported_is_named(pipeline: Path, weights: str, message: str) -> None:
    edit(pipeline / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    (pipeline / "safety_checker").mkdir()
    config = {"architectures": ["StableDiffusionSafetyChecker"]}
    (pipeline / "safety_checker" / "config.json").write_text(json.dumps(config))
    if weights:
        (pipeline / "safety_checker" / weights).write_bytes(b"a pickle")
    error = refusal(pipeline)
    assert message in str(error)
    if weights:
        assert "from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusion" in error.hint


def test_a_missing_feature_extractor_is_named(pipeline: Path) -> None:
    edit(pipeline / "model_index.json", feature_extractor=["transformers", "CLIPImageProcessor"])
    assert "feature_extractor: expected preprocessor_config.json" in str(refusal(pipeline))


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_a_checkpoint_in_one_file_is_named_with_a_command_that_converts_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    for address in (tmp_path / name, tmp_path):
        with pytest.raises(ModelError, match=f"{name} alone.* got a checkpoint in one file") as error:
            load(str(address), device="cpu")
        assert f"from_single_file('{tmp_path / name}')" in error.value.hint


def test_an_unreachable_hub_is_an_error_after_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Port 9 of this machine refuses connections, as a network without a route to the Hub does."""
    import huggingface_hub
    from huggingface_hub import constants, hf_api

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hf_api, "ENDPOINT", "http://127.0.0.1:9", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    offline: list[bool] = []
    snapshot_download = huggingface_hub.snapshot_download

    def recorded(*arguments: Any, local_files_only: bool, **options: Any) -> str:
        offline.append(local_files_only)
        return str(snapshot_download(*arguments, local_files_only=local_files_only, **options))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", recorded)
    with pytest.raises(ServiceError, match="owner/name is not on this disk, and the Hub does not answer") as error:
        load("owner/name", device="cpu")
    assert offline == [True], "after one failed request, no file is requested, which would be retried for a minute"
    assert "hf download owner/name" in error.value.hint
