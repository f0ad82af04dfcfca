"""Networks without weights, built on the meta device from their configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from deleatur.diffusion.folders import read_json, unsupported


@dataclass(frozen=True)
class Architecture:
    """The networks of a model, on the meta device."""

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module

    @property
    def decoder(self) -> nn.Module:
        """The part of the VAE that turns latents into images."""
        return cast(nn.Module, self.vae.decoder)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return latent_shape(cast(Any, self.unet.config))

    @property
    def text_states_shape(self) -> tuple[int, int]:
        """(L, d): tokens per prompt, width of the text-encoder states."""
        config: Any = self.unet.config
        text: Any = self.text_encoder.config
        return int(text.max_position_embeddings), int(config.cross_attention_dim)

    def unet_input_shapes(self, rows: int) -> tuple[tuple[int, ...], ...]:
        """Shapes of the UNet's inputs: latents, timestep, text-encoder states."""
        return ((rows, *self.latent_shape), (), (rows, *self.text_states_shape))

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for net in (self.unet, self.vae, self.text_encoder) for p in net.parameters())


def latent_shape(unet_config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of a latent. Raises ModelError unless its height and width are equal."""
    size = unet_config.get("sample_size")
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or height < 1 or height != width:
        raise unsupported("a square sample_size of the UNet", size)
    channels = unet_config.get("in_channels", 4)
    if not isinstance(channels, int) or channels < 1:
        raise unsupported("a whole number of in_channels of the UNet", channels)
    return channels, height, height


STABLE_DIFFUSION: dict[str, dict[str, Any]] = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
    },
}
"""Configs of Stable Diffusion 1.4, where they differ from the defaults of diffusers and transformers."""


def from_configs(configs: Mapping[str, Mapping[str, Any]]) -> Architecture:
    """Builds the networks from the configs of "unet", "vae" and "text_encoder"."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(dict(configs["unet"]))
        vae = AutoencoderKL.from_config(dict(configs["vae"]))
        text = CLIPTextModel(CLIPTextConfig.from_dict(dict(configs["text_encoder"])))
    return Architecture(*(net.eval().requires_grad_(False) for net in (unet, vae, text)))


@cache
def stable_diffusion() -> Architecture:
    """The networks of Stable Diffusion 1.4."""
    return from_configs(STABLE_DIFFUSION)


def from_folder(folder: Path) -> Architecture:
    """Builds the networks of a pipeline folder without reading its weights."""
    names = ("unet", "vae", "text_encoder")
    return from_configs({name: read_json(folder / name / "config.json") for name in names})
