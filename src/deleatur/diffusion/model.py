"""A checkpoint on disk → one `Model` value. Sizes are read from its configs; nothing assumes 768, 77 or 64."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deleatur.diffusion.folders import remedy
from deleatur.errors import ModelError, SettingsError
from deleatur.maths.noise import Schedule

NOTES = frozenset({"transformers_version", "architectures", "dtype", "torch_dtype"})
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """A Stable Diffusion 1.x/2.x model, frozen. Edited weights never enter it: they are passed beside it."""

    unet: nn.Module
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: Schedule
    digest: str
    """SHA-256 over the UNet's parameters as they lie on disk, whatever precision they are used in: what a delta belongs
    to."""
    text_digest: str
    pipeline: str
    """SHA-256 over all that draws a picture: every network, its configuration, tokenizer and scheduler."""
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def length(self) -> int:
        """L, tokens per prompt; 77 for Stable Diffusion."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, for example (4, 64, 64)."""
        config: Any = self.unet.config
        return int(config.in_channels), int(config.sample_size), int(config.sample_size)

    @property
    def pixels(self) -> int:
        """Width and height of a picture."""
        return int(self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, types and bytes of a module's state: the same for every file format it came from."""
    return digest(module.state_dict())


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of named tensors."""
    h = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        t = tensor.detach().cpu().contiguous()
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def identify(*parts: Any) -> str:
    """SHA-256 over all that decides what loaded parts compute: weights, configurations, vocabularies.

    The same wherever they were loaded from, and whoever wrote their files.
    """
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            h.update(fingerprint(part).encode())
        named = [type(part).__name__, _plain(_configuration(part))]
        h.update(json.dumps(named, sort_keys=True, default=str).encode())
    return h.hexdigest()


def _configuration(part: Any) -> Any:
    if hasattr(part, "backend_tokenizer"):
        vocabulary = json.loads(part.backend_tokenizer.to_str())
        return {k: v for k, v in vocabulary.items() if k not in ("padding", "truncation")}  # the last call left these
    config = getattr(part, "config", part)
    return config if isinstance(config, Mapping) else config.to_dict()


def _plain(value: Any) -> Any:
    """A configuration without the notes of whoever loaded or wrote it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in NOTES and not str(k).startswith("_")}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def quiet() -> None:
    """Loading bars for files of milliseconds, and advice about torchvision, are not for our users."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def device_of(name: str) -> torch.device:
    """Raises SettingsError when this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # a build without CUDA fails by assertion
        said = str(e).splitlines()[0]
        raise SettingsError(
            f"device: expected auto, cpu, cuda, cuda:1 or the like of this machine, got {name!r}: {said}",
            hint="set it to auto in params.yaml, then: deleatur check",
        ) from e
    return device


@contextmanager
def loading(path: str, what: str) -> Iterator[None]:
    """Inside, whatever the libraries make of what lies at `path` becomes a ModelError."""
    try:
        yield
    except Exception as e:  # what a damaged file leads to is anybody's guess: OSError, SafetensorError, TypeError, …
        raise ModelError(f"{path} does not load as {what}: {e}", hint=remedy(path)) from e


def whole(kind: Any, path: str, **how: Any) -> Any:
    """A network all of whose tensors come from its files: the libraries would draw what is missing at random."""
    net, told = kind.from_pretrained(path, use_safetensors=True, output_loading_info=True, **how)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{len(missing)} tensors are not in its files: {missing[0]}, …")
    return net


def load(path: str, *, dtype: str = "float32", device: str = "auto") -> Model:
    """A folder or hub id in the layout of `StableDiffusionPipeline` as a frozen Model.

    Raises ModelError when a part is missing or is not of the Stable Diffusion 1.x/2.x family.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    quiet()
    place, kind = device_of(device), DTYPES[dtype]
    with loading(path, "a Stable Diffusion 1.x/2.x pipeline with safetensors"):
        unet = whole(UNet2DConditionModel, path, subfolder="unet")
        vae = whole(AutoencoderKL, path, subfolder="vae")
        text = whole(CLIPTextModel, path, subfolder="text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
    return assemble(unet, vae, text, tokenizer, scheduler, dtype=kind, device=place)


def load_unet(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """The UNet of a pipeline folder alone, as `load` would place it."""
    from diffusers import UNet2DConditionModel

    with loading(path, "a UNet"):
        unet = whole(UNet2DConditionModel, path, subfolder="unet", torch_dtype=dtype).eval()
    unet.to(device, memory_format=torch.channels_last)
    return unet


def assemble(
    unet: Any,
    vae: Any,
    text_encoder: Any,
    tokenizer: Any,
    scheduler: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Model:
    """Parts already in memory as a frozen Model."""
    place = device or torch.device("cpu")
    # Before the cast: an export in fp32 and a training in bfloat16 are about the same model.
    own, text = fingerprint(unet), fingerprint(text_encoder)
    weights = {"unet": own, "text_encoder": text}
    everything = identify(weights, unet.config, vae, text_encoder.config, tokenizer, scheduler)
    for part in (unet, vae, text_encoder):
        # Channels last: convolutions are a third faster on a CPU, and what tensor cores want.
        part.to(place, memory_format=torch.channels_last).eval().requires_grad_(False)
        if next(part.parameters()).dtype != dtype:
            part.to(dtype)
    config = scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ModelError(f"the scheduler predicts {config.prediction_type!r}; epsilon or v_prediction were expected")
    schedule = Schedule(
        scheduler.alphas_cumprod,
        float(scheduler.final_alpha_cumprod),
        config.steps_offset,
        config.prediction_type,
    )
    return Model(unet, vae, text_encoder, tokenizer, schedule, own, text, everything, place)
