"""The networks that settings name, loaded."""

from __future__ import annotations

from pathlib import Path

from deleatur.config.settings import Settings
from deleatur.diffusion.clip import Clip, load_clip
from deleatur.diffusion.model import Model, load
from deleatur.storage import remote


def local_path(settings: Settings, address: str, part: str = "pipeline") -> str:
    """Where it lies on this disk, or its name on a hub; models:/… is looked up where we register, and its files are
    those that were registered, signed where keys are configured. Raises ModelError where they are not.
    """
    if not address.startswith("models:/"):
        return remote.local(address)
    from deleatur.registry import mlflow_client, verify

    mlflow_client.use(settings.register_.tracking_uri)
    found = mlflow_client.local(address, part)
    verify.demand(settings, address, Path(found), part)
    return found


def base_model(settings: Settings) -> Model:
    return load(local_path(settings, settings.base.model), dtype=settings.base.dtype, device=settings.base.device)


def clip_model(settings: Settings) -> Clip:
    return load_clip(local_path(settings, settings.reward.clip), settings.base.device)
