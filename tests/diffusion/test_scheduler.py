"""Scheduler configs: followed as StableDiffusionPipeline follows them, or refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, PNDMScheduler, StableDiffusionPipeline

from deleatur.diffusion import encode, pipelines
from deleatur.diffusion.model import load
from deleatur.diffusion.sample import initial_noise, sample
from deleatur.diffusion.scheduler import noise_schedule
from deleatur.errors import ModelError
from deleatur.guides.cfg import CFG


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("models") / "pipeline")


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def configure(folder: Path, **options: Any) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "linspace"},
        {"set_alpha_to_one": True},
        {"steps_offset": 0},
        {"clip_sample": True},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ],
)
def test_images_equal_those_of_a_pipeline_with_the_same_scheduler_config(
    pipeline: Path, options: dict[str, Any]
) -> None:
    configure(pipeline, **options)
    model = load(str(pipeline), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of options that the pipeline replaces
        theirs = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("a cat", num_inference_steps=6, latents=initial_noise(model, [7]), output_type="pil").images[0]
    guide = CFG()
    c, conditions = encode.encode_text(model, ["a cat"]), guide.conditions(model, [])
    [image] = sample(model, c, [7], guide=guide, conditions=conditions, steps=6, batch_size=1)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1


def test_another_sampler_of_the_same_family_is_replaced_by_ddim_with_its_betas() -> None:
    theirs = PNDMScheduler(beta_start=0.001, beta_end=0.02, beta_schedule="scaled_linear", skip_prk_steps=True)
    schedule = noise_schedule({**theirs.config, "_class_name": "PNDMScheduler"})
    assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod)
    assert schedule.final_alpha_cumprod == float(theirs.final_alpha_cumprod)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "got FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "got EDMEulerScheduler"),
        ({"_class_name": "LCMScheduler"}, "expected one of DDIMScheduler, .*, got LCMScheduler"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type to be discrete"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas to be False"),
        ({"prediction_type": "sample"}, "prediction_type to be epsilon or v_prediction, got sample"),
        ({"prediction_type": "flow_prediction"}, "got flow_prediction"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule to be linear or .*, got sigmoid"),
        ({"timestep_spacing": "karras"}, "timestep_spacing to be leading or trailing or linspace"),
        ({"thresholding": True}, "thresholding to be False"),
        ({"rescale_betas_zero_snr": True}, "v_prediction where the last ᾱ is 0"),
        ({"trained_betas": [0.1] * 10}, "1000 betas between 0 and 1, got 10"),
        ({"beta_end": 1.5}, "1000 betas between 0 and 1"),
        ({"beta_start": "x"}, "valid betas"),
        ({"num_train_timesteps": 0}, "expected"),
    ],
)
def test_other_schedules_are_refused_by_name(pipeline: Path, options: dict[str, Any], message: str) -> None:
    configure(pipeline, **options)
    for read in (pipelines.check_pipeline, lambda folder: load(str(folder), device="cpu")):
        with pytest.raises(ModelError, match=message) as error:
            read(pipeline)
        assert str(pipeline) in str(error.value)
        assert "Stable Diffusion 1.x or 2.x" in error.value.hint


def test_the_shipped_schedulers_are_supported() -> None:
    assert noise_schedule(DDIMScheduler().config).num_timesteps == 1000
