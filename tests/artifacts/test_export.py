"""The exported pipeline has every component of the base model, its safety checker among them."""

from __future__ import annotations

import json
import runpy
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import workspace
from diffusers import EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from full_disk import max_file_size
from transformers import CLIPConfig, CLIPImageProcessor

from deleatur.artifacts.export import export, export_version
from deleatur.config.settings import Settings
from deleatur.diffusion import encode
from deleatur.diffusion.sample import initial_noise, sample
from deleatur.guides.cfg import CFG
from deleatur.records.model import Delta
from deleatur.registry import mlflow_registry
from deleatur.runtime import models
from deleatur.storage import tensors


def safety_checker() -> StableDiffusionSafetyChecker:
    """A checker that flags every image: all of its thresholds are negative."""
    config = CLIPConfig(
        vision_config={
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        projection_dim=8,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-2.0)
    return checker


@pytest.mark.parametrize("has_checker", [True, False])
def test_exported_and_served_pipeline_have_the_base_models_safety_checker(
    has_checker: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: Settings = workspace.create(tmp_path)
    base = Path(settings.base.model)
    checker = safety_checker() if has_checker else None
    shutil.rmtree(base)
    StableDiffusionPipeline(
        **tiny.parts(),
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size=16, crop_size=16) if has_checker else None,
        requires_safety_checker=has_checker,
    ).save_pretrained(base)
    delta = Delta({}, models.base_model(settings).unet_digest, "keep", {}, ("weapon",))
    tensors.save_delta(settings.paths.delta / tensors.DELTA_FILE, delta)
    export(settings, tmp_path / "exported")

    index = [json.loads((folder / "model_index.json").read_text()) for folder in (base, tmp_path / "exported")]
    names = [{k: v for k, v in i.items() if not k.startswith("_")} for i in index]
    assert names[0] == names[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow recommends other type hints
        generator = runpy.run_path(str(mlflow_registry.MODEL_CODE))["ImageGenerator"]()
    generator.load_context(SimpleNamespace(artifacts={"pipeline": str(tmp_path / "exported")}))
    for pipeline in (StableDiffusionPipeline.from_pretrained(tmp_path / "exported"), generator.pipeline):
        assert (pipeline.safety_checker is not None) == has_checker
        assert pipeline.config.requires_safety_checker == has_checker
        if checker:
            loaded = pipeline.safety_checker.state_dict()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in checker.state_dict().items())


@pytest.mark.parametrize("scheduler", [PNDMScheduler, EulerDiscreteScheduler])
def test_an_exported_pipeline_samples_as_judged_whatever_the_base_models_scheduler(
    scheduler: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings: Settings = workspace.create(tmp_path)
    base = Path(settings.base.model)
    options = {"beta_start": 0.001, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "steps_offset": 1}
    shutil.rmtree(base / "scheduler")
    scheduler(**options).save_pretrained(base / "scheduler")
    index = json.loads((base / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", scheduler.__name__]
    (base / "model_index.json").write_text(json.dumps(index))
    model = models.base_model(settings)
    tensors.save_delta(settings.paths.delta / tensors.DELTA_FILE, Delta({}, model.unet_digest, "keep", {}, ("weapon",)))
    export(settings, tmp_path / "exported")

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "exported", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    z, guide = initial_noise(model, [7]), CFG()
    expected = pipeline("a cat", num_inference_steps=5, latents=z, output_type="pil").images[0]
    c, conditions = encode.encode_text(model, ["a cat"]), guide.conditions(model, [])
    [image] = sample(model, c, [7], guide=guide, conditions=conditions, steps=5, batch_size=1)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_an_export_to_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").mkdir()
    (tmp_path / "version" / "weights").write_bytes(bytes(5000))
    monkeypatch.setattr(models, "local_path", lambda settings, address: str(tmp_path / "version"))
    with pytest.raises(OSError, match="File too large"), max_file_size(1000):
        export_version(Settings.load(workspace.ROOT / "params.yaml"), "1", tmp_path / "exported")
    assert [path.name for path in tmp_path.iterdir()] == ["version"]
