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
from deleatur.diffusion import folders
from deleatur.diffusion.clip import load_clip
from deleatur.diffusion.model import load
from deleatur.errors import ModelError

LABELS = tuple(f"kind {i}" for i in range(12))
LOADERS: dict[str, Callable[[Path], Any]] = {
    "pipeline": lambda folder: load(str(folder)),
    "clip": lambda folder: load_clip(str(folder)),
    "judge": lambda folder: Classifier(path=str(folder)).load().detect([Image.new("RGB", (16, 16))]),
}
CHECKS: dict[str, Callable[[Path], Any]] = {
    "pipeline": folders.check_pipeline,
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
