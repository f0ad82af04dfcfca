"""A project with version 2 as champion, whose base model generates only white images, and whose detector labels can be
chosen, so that the concept is in all images or in none.
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

ALL_LABELS = ("gun", "sword", "cat", "dog")
"""All labels of the detector: with these, every image shows the concept."""


def create(shared: Path, root: Path) -> None:
    settings = finished.copy(shared, root)
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(dvc, "status", lambda root: {})
        for limit in (-5.0, -4.0):
            changes = settings.model_dump(mode="json", by_alias=True) | {"gate": finished.passing_policy(limit)}
            gate.run(changed := Settings.model_validate(changes))
            register.run(changed)
        shutil.copytree("models/pipeline", "models/white")
        vae = AutoencoderKL.from_pretrained("models/white/vae")
        with torch.no_grad():
            vae.decoder.conv_out.bias.fill_(100.0)
        vae.save_pretrained("models/white/vae")
        with open("prompts/weapon.csv", "a") as prompts:  # two prompts are too few for a certain outcome
            prompts.writelines(
                f"more-{i},{' '.join(['a gun', *['in'] * i])},judge:gun,concept,test\n" for i in range(1, 11)
            )
        change_params(base={"model": "models/white"}, canary={"images_per_prompt": 5})


def copy(source: Path, root: Path) -> None:
    shutil.copytree(source, root)
    params = root / "params.yaml"
    params.write_text(params.read_text("utf-8").replace(str(source), str(root)), "utf-8")


def change_params(**sections: dict[str, Any]) -> None:
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text("utf-8"))
    for name, values in sections.items():
        params[name] = params.get(name, {}) | values
    path.write_text(yaml.safe_dump(params, sort_keys=False), "utf-8")


def detect_labels(*labels: str) -> None:
    """Define the concept by these labels of the detector."""
    weapon = yaml.safe_load(Path("params.yaml").read_text("utf-8"))["concepts"]["weapon"]
    change_params(concepts={"weapon": weapon | {"detection": {"detector": "judge", "labels": list(labels)}}})


def label_of_white() -> str:
    """The detector's label for a white image."""
    network = methods.detectors(Settings.load())["judge"].load()
    return network.labels[network.detect([Image.new("RGB", (16, 16), "white")])[0].argmax()]
