"""Loads the networks that params.yaml names."""

from __future__ import annotations

from deleatur.config.settings import Settings
from deleatur.diffusion.clip import Clip, load_clip
from deleatur.diffusion.model import Model, load
from deleatur.storage import remote


def local_path(settings: Settings, address: str, part: str = "pipeline") -> str:
    """Local folder of an address, or its name on a hub. Files of models:/… are those that were registered, and signed
    where keys are configured; otherwise raises ModelError.
    """
    if not address.startswith("models:/"):
        return remote.local_path(address)
    from deleatur.registry.verify import verified_folder

    return str(verified_folder(settings, address, part))


def base_model(settings: Settings) -> Model:
    return load(local_path(settings, settings.base.model), dtype=settings.base.dtype, device=settings.base.device)


def clip_model(settings: Settings) -> Clip:
    return load_clip(local_path(settings, settings.reward.clip), settings.base.device)
