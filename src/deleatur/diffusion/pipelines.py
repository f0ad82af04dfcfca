"""Which pipeline folders are supported: checks of their configs, without reading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deleatur.diffusion.architecture import latent_shape
from deleatur.diffusion.folders import (
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    check_network,
    damage_errors,
    read_json,
    require_any_file,
    unsupported,
)
from deleatur.diffusion.scheduler import noise_schedule
from deleatur.errors import error_context
from deleatur.maths.noise import NoiseSchedule

COMPONENTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""Part of a Stable Diffusion pipeline → its class."""
OPTIONAL_NETWORKS = {"safety_checker", "image_encoder"}
OPTIONAL = ("scheduler", "feature_extractor", *OPTIONAL_NETWORKS)
EXTRA_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "encoder_hid_dim",
)
"""Config keys of UNets that are conditioned on more than timestep and text, such as SDXL's."""


def check_pipeline(folder: Path) -> None:
    """Raises ModelError unless the folder is a complete Stable Diffusion 1.x or 2.x pipeline."""
    classes = _check_components(folder)
    unet, vae, text = (check_network(folder / name) for name in ("unet", "vae", "text_encoder"))
    require_any_file(folder / "tokenizer", *TOKENIZER_FILES)
    for name in OPTIONAL_NETWORKS & classes.keys():  # the exported pipeline has them too
        check_network(folder / name)
    if "feature_extractor" in classes:
        require_any_file(folder / "feature_extractor", *PROCESSOR_FILES)
    with error_context(str(folder)):
        _check_shapes(unet, vae, text)
    read_schedule(folder)


def read_schedule(folder: Path) -> NoiseSchedule:
    """The noise schedule of a pipeline's folder. Raises ModelError if it is not supported."""
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    with error_context(f"{folder}/scheduler"):
        return noise_schedule(config)


def _check_components(folder: Path) -> Mapping[str, str]:
    """Part → class, as model_index.json names them. Raises ModelError unless they are those of Stable Diffusion."""
    index = read_json(folder / "model_index.json")
    classes = {
        name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]
    }
    other = [name for name in classes if name not in (*COMPONENTS, *OPTIONAL)]
    other += [name for name, known in COMPONENTS.items() if name in classes and classes[name] not in known]
    missing = [name for name in COMPONENTS if name not in classes]
    if other or missing:
        parts = [f"{name} {classes[name]}" for name in other] + [f"no {name}" for name in missing]
        raise unsupported(
            "a Stable Diffusion 1.x or 2.x pipeline, with UNet2DConditionModel, AutoencoderKL and one CLIPTextModel",
            f"{index.get('_class_name')} in {folder}, with {', '.join(parts)}",
        )
    return classes


def _check_shapes(unet: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raises ModelError unless the parts fit together, and the UNet needs no other inputs."""
    channels = latent_shape(unet)[0]
    if extra := [key for key in EXTRA_INPUTS if unet.get(key) is not None]:
        raise unsupported("a UNet that is conditioned on timestep and text alone", f"{extra[0]} {unet[extra[0]]}")
    for what, got in (
        ("the UNet's out_channels", unet.get("out_channels", 4)),
        ("the VAE's latent_channels", vae.get("latent_channels", 4)),
    ):
        if got != channels:  # inpainting, depth and learned variances have other numbers
            raise unsupported(f"{what} to be {channels}, the UNet's in_channels", got)
    scaling_factor = vae.get("scaling_factor", 0.18215)
    if not isinstance(scaling_factor, int | float) or not scaling_factor > 0:
        raise unsupported("a positive scaling_factor of the VAE", scaling_factor)
    if (width := text.get("hidden_size", 512)) != unet.get("cross_attention_dim", 1280):
        raise unsupported(
            f"the UNet's cross_attention_dim to be {width}, the text encoder's width", unet.get("cross_attention_dim")
        )


@dataclass(frozen=True)
class TextLimits:
    """The tokenizer of a pipeline or a CLIP model, and the tokens that its text encoder takes, without any weights."""

    tokenizer: Any
    max_tokens: int

    @classmethod
    def from_folder(cls, folder: Path) -> TextLimits:
        return cls._read(read_json(folder / "text_encoder" / "config.json"), folder / "tokenizer")

    @classmethod
    def from_clip(cls, folder: Path) -> TextLimits:
        return cls._read(read_json(folder / "config.json").get("text_config") or {}, folder)

    @classmethod
    def _read(cls, config: Mapping[str, Any], tokenizer: Path) -> TextLimits:
        # 77 is the default of CLIPTextConfig, which configs may leave out.
        max_tokens = config.get("max_position_embeddings", 77)
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise unsupported("a whole number of max_position_embeddings of the text encoder", max_tokens)
        with damage_errors(path := tokenizer / "tokenizer.json"):
            if path.is_file():
                return cls(_FastTokenizer(path), max_tokens)
            from transformers.models.clip.tokenization_clip import CLIPTokenizer

            return cls(CLIPTokenizer.from_pretrained(str(tokenizer)), max_tokens)


class _FastTokenizer:
    """The token ids of CLIPTokenizer, without importing transformers, which takes a second."""

    bos_token_id = eos_token_id = unk_token_id = pad_token_id = 0  # a length counts them, whatever their ids

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
