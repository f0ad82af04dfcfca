"""Loading of a checkpoint as one `Model`. All sizes come from its configs; nothing assumes 768, 77 or 64."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deleatur.diffusion.architecture import latent_shape
from deleatur.diffusion.folders import download, folder_hint
from deleatur.diffusion.pipelines import check_pipeline
from deleatur.diffusion.scheduler import noise_schedule
from deleatur.errors import DeleaturError, ModelError, SettingsError
from deleatur.maths.finite import require_finite
from deleatur.maths.noise import NoiseSchedule

METADATA_KEYS = frozenset({"transformers_version", "architectures", "dtype", "torch_dtype"})
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Model:
    """A frozen Stable Diffusion 1.x/2.x model. Edited weights are passed separately and never change it."""

    unet: nn.Module
    vae: Any
    text_encoder: Any
    tokenizer: Any
    schedule: NoiseSchedule
    unet_digest: str
    """SHA-256 over the UNet's parameters as stored, whatever precision they are used in; the base of deltas."""
    text_encoder_digest: str
    pipeline_digest: str
    """SHA-256 over everything that generates an image: all networks, their configs, tokenizer and scheduler."""
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def max_tokens(self) -> int:
        """L, tokens per prompt; 77 for Stable Diffusion."""
        return int(self.text_encoder.config.max_position_embeddings)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent, for example (4, 64, 64)."""
        return latent_shape(cast(Any, self.unet.config))

    @property
    def image_size(self) -> int:
        """Width and height of an image."""
        return int(self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1))


def digest_module(module: nn.Module) -> str:
    """SHA-256 over names, types and bytes of a module's state, whatever file format it was loaded from."""
    return digest_tensors(module.state_dict())


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of named tensors."""
    h = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        t = tensor.detach().cpu().contiguous()
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}".encode())
        h.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return h.hexdigest()


def digest_parts(*parts: Any) -> str:
    """SHA-256 over everything that determines what loaded parts compute: weights, configurations, vocabularies.

    Independent of where they were loaded from and of the library version that wrote their files.
    """
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            h.update(digest_module(part).encode())
        named = [type(part).__name__, _plain(_configuration(part))]
        h.update(json.dumps(named, sort_keys=True, default=str).encode())
    return h.hexdigest()


def _configuration(part: Any) -> Any:
    if hasattr(part, "backend_tokenizer"):
        vocabulary = json.loads(part.backend_tokenizer.to_str())
        return {k: v for k, v in vocabulary.items() if k not in ("padding", "truncation")}  # state of the last call
    config = getattr(part, "config", part)
    return config if isinstance(config, Mapping) else config.to_dict()


def _plain(value: Any) -> Any:
    """A configuration without metadata of the library that wrote or loaded it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in METADATA_KEYS and not str(k).startswith("_")}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def silence_libraries() -> None:
    """Switches off progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def resolve_device(name: str) -> torch.device:
    """The device; "auto" is CUDA if available. Raises SettingsError if this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:  # a build without CUDA fails by assertion
        cause = str(e).splitlines()[0]
        raise SettingsError(
            f"device: expected auto, cpu, cuda or cuda:N of this machine, got {name!r}: {cause}",
            hint="set it to auto in params.yaml, then: deleatur check",
        ) from e
    return device


@contextmanager
def load_errors(path: str, what: str) -> Iterator[None]:
    """Turns exceptions of the libraries that load `path` into a ModelError."""
    try:
        yield
    except DeleaturError:
        raise
    except Exception as e:  # a damaged file can raise anything: OSError, SafetensorError, TypeError, …
        raise ModelError(f"{path} does not load as {what}: {e}", hint=folder_hint(path)) from e


def from_pretrained(cls: Any, path: str, **options: Any) -> Any:
    """Loads a network. Raises ModelError if a weight is not finite, and ValueError if tensors are missing,
    which the libraries would initialise at random.
    """
    net, info = cls.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{len(missing)} tensors are not in its files: {missing[0]}, …")
    for name, tensor in net.state_dict().items():
        require_finite(tensor, f"{path}, {options.get('subfolder', 'weights')}: {name}")
    return net


def load(path: str, *, dtype: str = "float32", device: str = "auto") -> Model:
    """Loads a folder or hub id in the layout of `StableDiffusionPipeline`.

    Raises ModelError if a part is missing or is not of the Stable Diffusion 1.x/2.x family.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    silence_libraries()
    target = resolve_device(device)
    folder = download(path, "model_index.json")
    check_pipeline(folder)
    path = str(folder)
    with load_errors(path, "a Stable Diffusion 1.x/2.x pipeline with safetensors"):
        unet = from_pretrained(UNet2DConditionModel, path, subfolder="unet")
        vae = from_pretrained(AutoencoderKL, path, subfolder="vae")
        text = from_pretrained(CLIPTextModel, path, subfolder="text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        scheduler = DDIMScheduler.from_pretrained(path, subfolder="scheduler")
    return assemble(unet, vae, text, tokenizer, scheduler, dtype=DTYPES[dtype], device=target)


def load_unet(path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Loads only the UNet of a pipeline folder, in the memory layout that `load` uses."""
    from diffusers import UNet2DConditionModel

    with load_errors(path, "a UNet"):
        unet = from_pretrained(UNet2DConditionModel, path, subfolder="unet", torch_dtype=dtype).eval()
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
    """Builds a Model from loaded parts."""
    target = device or torch.device("cpu")
    # Before the cast: a training in bfloat16 and an export in fp32 refer to the same model.
    unet_digest, text_encoder_digest = digest_module(unet), digest_module(text_encoder)
    weights = {"unet": unet_digest, "text_encoder": text_encoder_digest}
    pipeline_digest = digest_parts(weights, unet.config, vae, text_encoder.config, tokenizer, scheduler)
    for part in (unet, vae, text_encoder):
        # Channels last: convolutions are a third faster on a CPU, and it suits tensor cores.
        part.to(target, memory_format=torch.channels_last).eval().requires_grad_(False)
        if next(part.parameters()).dtype != dtype:
            part.to(dtype)
    return Model(
        unet,
        vae,
        text_encoder,
        tokenizer,
        noise_schedule(scheduler.config),
        unet_digest,
        text_encoder_digest,
        pipeline_digest,
        target,
    )
