"""The registered model as anybody serves it: prompts and seeds in, PNG pictures out.

MLflow copies this file into the model and runs it from there ("models from code"), so it stands alone: it never
imports deleatur, and the folder it loads is one that plain diffusers loads just as well.
"""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import mlflow
import pandas as pd
import torch


class Drawer(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow has no types for its base class
    """Input columns: prompt, seed. Params: steps, guidance. Output: one PNG a row, as base64 text."""

    def load_context(self, context: Any) -> None:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

        for log in (diffusers_logging, transformers_logging):
            log.disable_progress_bar()  # reading a few files is not worth a bar in a server's log
        self.pipeline = StableDiffusionPipeline.from_pretrained(
            context.artifacts["pipeline"],
            use_safetensors=True,
            local_files_only=True,
            safety_checker=None,
            requires_safety_checker=False,
        ).to("cuda" if torch.cuda.is_available() else "cpu")
        self.pipeline.set_progress_bar_config(disable=True)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """Draws each row by itself, from a CPU generator of its own seed: no answer depends on who else asked."""
        numbers = params or {}
        rows = zip(model_input["prompt"], model_input["seed"], strict=True)
        return [self._draw(str(prompt), int(seed), **numbers) for prompt, seed in rows]

    def _draw(self, prompt: str, seed: int, steps: int = 30, guidance: float = 7.5) -> str:
        [picture] = self.pipeline(
            prompt,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images
        png = BytesIO()
        picture.save(png, "PNG")
        return base64.b64encode(png.getvalue()).decode()


mlflow.models.set_model(Drawer())
