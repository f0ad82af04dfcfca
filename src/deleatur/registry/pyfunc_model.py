"""The registered model as MLflow serves it: prompts and seeds in, PNG images out.

MLflow copies this file into the model and executes the copy ("models from code"). It therefore never imports deleatur,
and the folder that it loads is a plain diffusers pipeline.
"""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import mlflow
import pandas as pd
import torch


class ImageGenerator(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow has no types for its base class
    """Input columns: prompt, seed. Params: steps, guidance. Output: one PNG per row, as base64 text."""

    def load_context(self, context: Any) -> None:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for log in (diffusers_logging, transformers_logging):
            log.disable_progress_bar()  # it would end up in the server's log
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            context.artifacts["pipeline"], use_safetensors=True, local_files_only=True
        ).to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Generates each row on its own, from a CPU generator of its seed: batching never changes an image."""

        options = params or {}
        rows = zip(model_input["prompt"], model_input["seed"], strict=True)
        return [self._generate(str(prompt), int(seed), **options) for prompt, seed in rows]

    def _generate(self, prompt: str, seed: int, steps: int = 30, guidance: float = 7.5) -> str:
        [image] = self.pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images
        png = BytesIO()
        image.save(png, "PNG")
        return base64.b64encode(png.getvalue()).decode()


mlflow.models.set_model(ImageGenerator())
