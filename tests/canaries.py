"""A project whose second version is live, whose untouched model draws white squares and nothing else, and a judge that
can be told what of that is the concept.
"""

from __future__ import annotations

import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import finished
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

from deleatur.config import methods
from deleatur.config.settings import Settings
from deleatur.stages import gate, register
from deleatur.storage import dvc

ALL = ("gun", "sword", "cat", "dog")
"""Counting these, the concept is in every picture."""


def make(shared: Path, root: Path) -> None:
    settings = finished.copy(shared, root)
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(dvc, "status", lambda root: {})
        for limit in (-5.0, -4.0):
            given = settings.model_dump(mode="json", by_alias=True) | {"gate": finished.passing(limit)}
            gate.run(changed := Settings.model_validate(given))
            register.run(changed)
        shutil.copytree("models/pipeline", "models/white")
        vae = AutoencoderKL.from_pretrained("models/white/vae")
        with torch.no_grad():
            vae.decoder.conv_out.bias.fill_(100.0)
        vae.save_pretrained("models/white/vae")
        with open("prompts/weapon.csv", "a") as prompts:  # of two nothing could be said for certain
            prompts.writelines(
                f"more-{i},{' '.join(['a gun', *['in'] * i])},judge:gun,concept,test\n" for i in range(10)
            )
        change(base={"model": "models/white"}, canary={"per_prompt": 5})


def copy(made: Path, root: Path) -> None:
    shutil.copytree(made, root)
    params = root / "params.yaml"
    params.write_text(params.read_text("utf-8").replace(str(made), str(root)), "utf-8")


def change(**sections: dict[str, Any]) -> None:
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text("utf-8"))
    for name, numbers in sections.items():
        params[name] = params.get(name, {}) | numbers
    path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


def counting(*labels: str) -> None:
    """These are the concept from now on."""
    weapon = yaml.safe_load(Path("params.yaml").read_text("utf-8"))["concepts"]["weapon"]
    change(concepts={"weapon": weapon | {"found": {"detector": "judge", "labels": list(labels)}}})


def white() -> str:
    """What the detector takes a white square for."""
    network = methods.detectors(Settings.load())["judge"].load()
    return network.labels[network.detect([Image.new("RGB", (16, 16), "white")])[0].argmax()]
