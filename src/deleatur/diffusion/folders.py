"""Checks of model folders that read configs and headers but no weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deleatur.errors import LFS_POINTER, ModelError, ServiceError

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_TIMEOUT = 10.0
"""Seconds until the Hub counts as unreachable."""
HUB_FILES = {
    "allow_patterns": ["*.json", "*.txt", "model*.safetensors", "*/model*.safetensors", "*/diffusion*.safetensors"],
    "ignore_patterns": ["*.fp16*", "*.non_ema*"],
}
"""Files of a Hub repository that the libraries load."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")


def locate(address: str, file: str = "config.json") -> Path | None:
    """The folder of a model, given by its path or hub id; None for a hub id that is not in the local cache.

    `file` is a file that the folder has to contain. Raises ModelError if there is no such folder.
    """
    path = Path(address)
    if path.is_file():
        raise _no_folder(path, file)
    if path.is_dir():
        weights = sorted(p for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
        if weights and not any((path / name).is_file() for name in (file, "config.json")):
            raise _no_folder(weights[0], file)
        require_any_file(path, file)
        return path
    if _is_hub_id(address):
        from huggingface_hub import constants, try_to_load_from_cache

        if isinstance(cached := try_to_load_from_cache(address, file), str):
            return Path(cached).parent
        if not constants.HF_HUB_OFFLINE:
            return None
    raise ModelError(f"no folder {address}", hint=folder_hint(address))


def download(address: str, file: str = "config.json") -> Path:
    """As `locate`, and downloads what is missing of a hub id. Raises ServiceError if the Hub does not answer."""
    if (folder := locate(address, file)) and not _is_hub_id(address):
        return folder
    from huggingface_hub import HfApi, errors, snapshot_download

    failure = ""
    try:
        # One request with a timeout: the libraries would retry every file for most of a minute.
        HfApi().model_info(address, timeout=HUB_TIMEOUT)
    except errors.RepositoryNotFoundError as e:
        raise ModelError(
            f"{address} is neither a folder here nor a model on the Hub that you may read",
            hint="correct base.model in params.yaml or, for a private or gated model: hf auth login",
        ) from e
    except Exception as e:  # exceptions of the HTTP library, which differs between versions of the Hub's
        failure = f"{type(e).__name__}: {e}"
    try:
        return Path(snapshot_download(address, local_files_only=bool(failure), **HUB_FILES))
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as e:
        raise ServiceError(
            f"{address} is not on this disk, and the Hub does not answer ({failure or e})",
            hint=f"on a machine with a network: hf download {address} --local-dir FOLDER; then set it in params.yaml",
        ) from e


def _is_hub_id(address: str) -> bool:
    # If there is a folder of the owner's name, a path was meant.
    return bool(HUB_ID.fullmatch(address)) and not Path(Path(address).parts[0]).is_dir()


def _no_folder(weights: Path, file: str) -> ModelError:
    """Weights without the configs that a folder with `file` has."""
    message = f"{weights} alone: expected a folder with {file}"
    if file != "model_index.json":
        return ModelError(message, hint=folder_hint(weights.parent))
    code = f"StableDiffusionPipeline.from_single_file('{weights}').save_pretrained('FOLDER')"
    return ModelError(
        f"{message}, in the layout of diffusers, got a checkpoint in one file",
        hint=f'python -c "from diffusers import *; {code}"; then set FOLDER in params.yaml',
    )


def require_any_file(folder: Path, *names: str) -> None:
    """Raises ModelError unless one of these files is in the folder, with content of its kind."""
    paths = [folder / name for name in names]
    files = [path for path in paths if path.is_file()]
    if not files:
        for path in paths:
            if path.is_symlink():
                raise ModelError(f"{path} links to {path.readlink()}, which is missing", hint=folder_hint(folder))
        raise ModelError(f"{folder}: expected {' or '.join(names)}, which is missing", hint=folder_hint(folder))
    _check_content(files[0])


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file. Raises ModelError unless it is an object."""
    require_any_file(path.parent, path.name)
    with damage_errors(path):
        config = json.loads(path.read_text("utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"expected a JSON object, got {type(config).__name__}")
        return config


@contextmanager
def damage_errors(path: Path) -> Iterator[None]:
    """Raises what reading a config or tokenizer raises as ModelError: the file is damaged, or its values are of other
    types than the libraries write.
    """
    try:
        yield
    except ModelError:
        raise
    except Exception as e:  # tokenizers raises no narrower class
        raise ModelError(f"{path.parent} is damaged: {path.name}: {e}", hint=folder_hint(path.parent)) from e


def check_network(folder: Path) -> dict[str, Any]:
    """The config of a network. Raises ModelError unless it has complete weights as safetensors."""
    config = read_json(folder / "config.json")
    if not (weights := list(_weight_files(folder))):
        raise _no_weights(folder, config)
    for path in weights:
        require_any_file(path.parent, path.name)
        try:
            with safe_open(path, framework="pt"):  # reads the header and compares the file's size with it
                pass
        except (OSError, SafetensorError) as e:
            raise ModelError(f"{folder} is damaged: {path.name}: {e}", hint=folder_hint(folder)) from e
    return config


def _check_content(path: Path) -> None:
    """Raises ModelError for files that were never downloaded: pointers of Git LFS, error pages, empty files."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith(LFS_POINTER):
        raise ModelError(f"{path} is a pointer of Git LFS, not the file", hint=f"git -C {path.parent} lfs pull")
    if not start or start.startswith((b"<!doctype", b"<html")):
        content = "a web page" if start else "empty"
        raise ModelError(f"{path} is {content}: its download failed", hint=folder_hint(path.parent))


def _no_weights(folder: Path, config: Mapping[str, Any]) -> ModelError:
    """Says which other weights a network's folder has, and how to convert them in place."""
    message = f"{folder}: expected weights as safetensors, found "
    if not (others := sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)):
        return ModelError(f"{message}none", hint=folder_hint(folder))
    library = "diffusers" if "_class_name" in config else "transformers"
    name = config.get("_class_name") or (config.get("architectures") or ["AutoModel"])[0]
    if name == "StableDiffusionSafetyChecker":
        library = "diffusers.pipelines.stable_diffusion.safety_checker"
    variant = others[0].split(".")[1]
    options = f", variant='{variant}'" if others[0].count(".") == 2 else ""
    code = f"from {library} import {name} as M; M.from_pretrained('{folder}'{options}).save_pretrained('{folder}')"
    return ModelError(f"{message}{', '.join(others)} alone", hint=f'python -c "{code}"; then: deleatur check')


def check_clip(folder: Path) -> None:
    """Raises ModelError unless a CLIP model, its tokenizer and its image processor are complete."""
    if (kind := check_network(folder).get("model_type")) != "clip":
        raise ModelError(f"{folder}: expected a CLIP model, got model_type {kind}", hint=folder_hint(folder))
    require_any_file(folder, *PROCESSOR_FILES)
    require_any_file(folder, *TOKENIZER_FILES)


def classifier_labels(folder: Path) -> tuple[str, ...]:
    """The labels of a classifier by class index. Raises ModelError unless the classifier is complete."""
    config = check_network(folder)
    require_any_file(folder, *PROCESSOR_FILES)
    labels = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}  # the default of transformers
    with damage_errors(folder / "config.json"):
        if not isinstance(labels, dict) or sorted(map(int, labels)) != list(range(len(labels))):
            raise ValueError("id2label: expected a label for each class index from 0")
        return tuple(str(labels[i]) for i in sorted(labels, key=int))


def unsupported(expected: str, got: object) -> ModelError:
    """The error for a complete model of another family."""
    hint = "set base.model to a Stable Diffusion 1.x or 2.x model in params.yaml, then: deleatur check"
    return ModelError(f"expected {expected}, got {got}", hint=hint)


def folder_hint(folder: Path | str) -> str:
    """The next command for a model folder that is missing or incomplete."""
    return f"put a complete folder at {folder} or name another one in params.yaml, then: deleatur check"


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that the libraries would load."""
    for stem in ("model", "diffusion_pytorch_model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file() or single.is_symlink():
            yield single
        elif index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise ModelError(f"{folder} is damaged: {index.name} has no weight_map", hint=folder_hint(folder))
            yield from sorted({folder / name for name in shards.values()})
