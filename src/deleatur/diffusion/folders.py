"""Folders of networks, looked at without reading a tensor: are they there, are they whole, what does a config say?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deleatur.errors import ModelError

PREPARED_BY = ("preprocessor_config.json", "processor_config.json")
WORDS = ("tokenizer.json", "vocab.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find(address: str, file: str = "config.json") -> Path | None:
    """The folder that an address names, or where a hub's files lie since they were fetched; None where only the hub
    can tell. `file` is what such a folder has to hold. Raises ModelError when there is none.
    """
    folder = Path(address)
    if folder.is_dir():
        demand(folder, file)
        return folder
    # With a folder of the owner's name here, it is a path that was meant.
    if HUB_ID.fullmatch(address) and not Path(folder.parts[0]).is_dir():
        from huggingface_hub import constants, try_to_load_from_cache

        if isinstance(fetched := try_to_load_from_cache(address, file), str):
            return Path(fetched).parent
        if not constants.HF_HUB_OFFLINE:
            return None
    raise ModelError(f"no folder {address}", hint=remedy(address))


def demand(folder: Path, *names: str) -> None:
    """Raises ModelError unless one of these files is in the folder."""
    if not any((folder / name).is_file() for name in names):
        raise ModelError(f"{folder}: expected {' or '.join(names)} in it, which is not there", hint=remedy(folder))


def network(folder: Path) -> dict[str, Any]:
    """The config of a network, with whole weights beside it. Raises ModelError."""
    try:
        weights = list(_weights(folder))
        for path in weights:
            with safe_open(path, framework="pt"):  # reads the header, and that as many bytes follow as it says
                pass
        config: dict[str, Any] = dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as e:
        raise ModelError(f"{folder} is damaged: {e}", hint=remedy(folder)) from e
    if not weights:
        raise ModelError(f"{folder}: expected weights as safetensors, and there are none", hint=remedy(folder))
    return config


def pipeline(folder: Path) -> None:
    """Raises ModelError unless all parts of a Stable Diffusion pipeline are there and whole."""
    for name in ("unet", "vae", "text_encoder"):
        network(folder / name)
    demand(folder / "tokenizer", *WORDS)
    demand(folder / "scheduler", "scheduler_config.json")


def clip(folder: Path) -> None:
    """Raises ModelError unless a CLIP model is there with what prepares pictures and texts for it."""
    network(folder)
    demand(folder, *PREPARED_BY)
    demand(folder, *WORDS)


def classes(folder: Path) -> tuple[str, ...]:
    """The labels of a classifier, in their order. Raises ModelError unless it is there and whole."""
    config = network(folder)
    demand(folder, *PREPARED_BY)
    named = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # what transformers takes where nothing is said
    return tuple(named[i] for i in sorted(named, key=int))


def remedy(folder: Path | str) -> str:
    return f"put a whole folder at {folder} or name another one in params.yaml, then: deleatur check"


def _weights(folder: Path) -> Iterator[Path]:
    """The files that the libraries would read."""
    for stem in ("model", "diffusion_pytorch_model"):
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if whole.is_file():
            yield whole
        elif index.is_file():
            yield from {folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
