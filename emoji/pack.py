"""Export the trained networks to `../models/` in half precision, as folders that diffusers and transformers load.

Each folder is written under a temporary name and then renamed, so that it is never incomplete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import classify
import clip
import text
import torch
import unet
import vae
from common import MODELS, WORK, load, params
from diffusers import StableDiffusionPipeline
from transformers import CLIPImageProcessor, CLIPProcessor, ViTImageProcessor

NORMALIZATION = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def save_pipeline(folder: Path) -> None:
    net = unet.build_unet()
    net.load_state_dict(load(WORK / "unet.pt")["average"])
    words, encoder = text.load_trained()
    StableDiffusionPipeline(
        vae=vae.load_trained(polished=True),
        text_encoder=encoder,
        tokenizer=words,
        unet=net,
        scheduler=unet.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(folder)


def save_clip(folder: Path) -> None:
    words, model = clip.load_trained()
    size = params("data")["size"]
    model.half().save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **NORMALIZATION
    )
    CLIPProcessor(image_processor=processor, tokenizer=words).save_pretrained(folder)


def classifier_saver(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        size = 2 * params("data")["size"]
        classify.load_trained(kind).half().save_pretrained(folder)
        ViTImageProcessor(size={"height": size, "width": size}, resample=2, **NORMALIZATION).save_pretrained(folder)

    return write


def set_float32(folder: Path) -> None:
    """Set transformers' configs to float32: stored in half precision, weights load as float32, as in diffusers."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if "dtype" in config:
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def replace_folder(name: str, write: Callable[[Path], None]) -> None:
    fresh, old, target = MODELS / f".{name}.new", MODELS / f".{name}.old", MODELS / name
    shutil.rmtree(fresh, ignore_errors=True)
    write(fresh)
    set_float32(fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    MODELS.mkdir(exist_ok=True)
    parts = {"pipeline": save_pipeline, "clip": save_clip} | {kind: classifier_saver(kind) for kind in classify.KINDS}
    for name, write in parts.items():
        state = load(WORK / f"{'unet' if name == 'pipeline' else name}.pt")
        if state is None or not state.get("finished", True):
            print(f"{name}: not trained yet, left as it is")
            continue
        replace_folder(name, write)
        print(f"{name}: {sum(f.stat().st_size for f in (MODELS / name).rglob('*') if f.is_file()):,} bytes")
    packed = {str(f.relative_to(MODELS)): f for f in sorted(MODELS.rglob("*")) if f.is_file()}
    print(f"together: {sum(f.stat().st_size for f in packed.values()):,} bytes")
    digests = {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in packed.items()}
    (WORK / "packed.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main()
