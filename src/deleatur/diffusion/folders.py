"""Checks of model folders that read configs and headers but no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deleatur.errors import ModelError

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate(address: str, file: str = "config.json") -> Path | None:
    """The folder of a model, given by its path or hub id; None for a hub id that is not in the local cache.

    `file` is a file that the folder has to contain. Raises ModelError when there is no such folder.
    """
    folder = Path(address)
    if folder.is_dir():
        require_file(folder, file)
        return folder
    # Where a folder of the owner's name exists, a path was meant.
    if HUB_ID.fullmatch(address) and not Path(folder.parts[0]).is_dir():
        from huggingface_hub import constants, try_to_load_from_cache

        if isinstance(cached := try_to_load_from_cache(address, file), str):
            return Path(cached).parent
        if not constants.HF_HUB_OFFLINE:
            return None
    raise ModelError(f"no folder {address}", hint=folder_hint(address))


def require_file(folder: Path, *names: str) -> None:
    """Raises ModelError unless one of these files is in the folder."""
    if not any((folder / name).is_file() for name in names):
        raise ModelError(f"{folder}: expected {' or '.join(names)}, which is missing", hint=folder_hint(folder))


def check_network(folder: Path) -> dict[str, Any]:
    """The config of a network. Raises ModelError unless it has complete weights as safetensors."""
    try:
        weights = list(_weight_files(folder))
        for path in weights:
            with safe_open(path, framework="pt"):  # reads the header and compares the file's size with it
                pass
        config: dict[str, Any] = dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as e:
        raise ModelError(f"{folder} is damaged: {e}", hint=folder_hint(folder)) from e
    if not weights:
        raise ModelError(f"{folder}: expected weights as safetensors, found none", hint=folder_hint(folder))
    return config


def check_pipeline(folder: Path) -> None:
    """Raises ModelError unless all parts of a Stable Diffusion pipeline are complete."""
    for name in ("unet", "vae", "text_encoder"):
        check_network(folder / name)
    require_file(folder / "tokenizer", *TOKENIZER_FILES)
    require_file(folder / "scheduler", "scheduler_config.json")


def check_clip(folder: Path) -> None:
    """Raises ModelError unless a CLIP model, its tokenizer and its image processor are complete."""
    check_network(folder)
    require_file(folder, *PROCESSOR_FILES)
    require_file(folder, *TOKENIZER_FILES)


def classifier_labels(folder: Path) -> tuple[str, ...]:
    """The labels of a classifier by class index. Raises ModelError unless the classifier is complete."""
    config = check_network(folder)
    require_file(folder, *PROCESSOR_FILES)
    labels = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # the default of transformers
    return tuple(labels[i] for i in sorted(labels, key=int))


def folder_hint(folder: Path | str) -> str:
    return f"put a complete folder at {folder} or name another one in params.yaml, then: deleatur check"


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that the libraries would load."""
    for stem in ("model", "diffusion_pytorch_model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file():
            yield single
        elif index.is_file():
            yield from {folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
