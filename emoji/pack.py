"""Write what is trained so far to `../models/`, in half precision, as folders that diffusers and transformers load.

Each folder is written beside its place and then renamed, so that a reader never meets half of one.
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
from common import WEIGHTS, WORK, load, params
from diffusers import StableDiffusionPipeline
from transformers import CLIPImageProcessor, CLIPProcessor, ViTImageProcessor

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def pipeline(folder: Path) -> None:
    net = unet.build()
    net.load_state_dict(load(WORK / "unet.pt")["average"])
    words, encoder = text.trained()
    StableDiffusionPipeline(
        vae=vae.trained(polished=True),
        text_encoder=encoder,
        tokenizer=words,
        unet=net,
        scheduler=unet.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16).save_pretrained(folder)


def likeness(folder: Path) -> None:
    words, model = clip.trained()
    size = params("data")["size"]
    model.half().save_pretrained(folder)
    picture = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **HALF)
    CLIPProcessor(image_processor=picture, tokenizer=words).save_pretrained(folder)


def classifier(kind: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        size = 2 * params("data")["size"]
        classify.trained(kind).half().save_pretrained(folder)
        ViTImageProcessor(size={"height": size, "width": size}, resample=2, **HALF).save_pretrained(folder)

    return write


def widen(folder: Path) -> None:
    """Say "float32" in transformers' configs: stored in half, loaded in single precision, as diffusers does unasked."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        if "dtype" in config:
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def place(name: str, write: Callable[[Path], None]) -> None:
    fresh, old, target = WEIGHTS / f".{name}.new", WEIGHTS / f".{name}.old", WEIGHTS / name
    shutil.rmtree(fresh, ignore_errors=True)
    write(fresh)
    widen(fresh)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    WEIGHTS.mkdir(exist_ok=True)
    parts = {"pipeline": pipeline, "clip": likeness} | {kind: classifier(kind) for kind in classify.KINDS}
    for name, write in parts.items():
        state = load(WORK / f"{'unet' if name == 'pipeline' else name}.pt")
        if state is None or not state.get("finished", True):
            print(f"{name}: not trained yet, left as it is")
            continue
        place(name, write)
        print(f"{name}: {sum(f.stat().st_size for f in (WEIGHTS / name).rglob('*') if f.is_file()):,} bytes")
    made = {str(f.relative_to(WEIGHTS)): f for f in sorted(WEIGHTS.rglob("*")) if f.is_file()}
    print(f"together: {sum(f.stat().st_size for f in made.values()):,} bytes")
    digests = {name: hashlib.sha256(f.read_bytes()).hexdigest() for name, f in made.items()}
    (WORK / "packed.json").write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    main()
