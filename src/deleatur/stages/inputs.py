"""What several stages read: the base model, methods by name, prompts, tokens, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ValidationError
from torch import Tensor

from deleatur import plug
from deleatur.diffusion import encode
from deleatur.diffusion.features import Clip, load_clip
from deleatur.diffusion.load import Model, load
from deleatur.diffusion.sample import encode_pictures
from deleatur.errors import DataError, SettingsError
from deleatur.feedback.reward import Head
from deleatur.guides import Guide
from deleatur.inversion import Inverter
from deleatur.io import images, tables, tensors
from deleatur.io.objects import local
from deleatur.records import Concept, Prompt, Role, SoftToken
from deleatur.settings import Settings, explain, merged

M = TypeVar("M", bound=BaseModel)

DELTA = "delta.safetensors"
PLAIN = "cfg"
"""The guide that plain diffusers draws with."""


def method(shelf: str, base: type[M], name: str, numbers: Mapping[str, Any], where: str) -> M:
    """The method `name` of a shelf with its numbers. Raises SettingsError naming each wrong key."""
    found = plug.find(shelf, name, base)
    try:
        return found(**numbers)
    except ValidationError as e:
        raise SettingsError(explain(e, f"params.yaml, {where} ({name})"), hint=f"deleatur methods {shelf}") from e


def numbers_of(section: BaseModel, *known: str) -> dict[str, Any]:
    """The method's own numbers of a section: all but `method` and the keys the section itself knows."""
    return {k: v for k, v in section.model_dump().items() if k not in ("method", *known)}


def guide(settings: Settings) -> Guide:
    """Raises SettingsError for one that the sampler would finish without."""
    found = method("guides", Guide, settings.guide.method, numbers_of(settings.guide), "guide")
    late = {name: found.starts(name) for name in settings.targets if found.starts(name) >= settings.sample.steps}
    if late:
        names, first = ", ".join(late), min(late.values())
        raise SettingsError(
            f"guide ({settings.guide.method}) steers away from {names} from step {first} on (its warm_up), and the "
            f"sampler's steps are 0 to {settings.sample.steps - 1}: it would do nothing",
            hint="lower the guide's warm_up, or raise sample.steps; then: deleatur check",
        )
    return found


def inverter(settings: Settings, concept: str) -> Inverter:
    """The inversion method with the concept's own numbers over those of `invert`."""
    numbers = merged(numbers_of(settings.invert), settings.concepts[concept].invert)
    return method("inversion", Inverter, settings.invert.method, numbers, f"invert, for concept {concept}")


def model(settings: Settings) -> Model:
    return load(local(settings.base.model), dtype=settings.base.dtype, device=settings.base.device)


def clip(settings: Settings) -> Clip:
    return load_clip(local(settings.reward.clip), settings.base.device)


def prompts(path: Path, split: str, concept: str) -> list[Prompt]:
    """The prompts of one file and split. Raises DataError naming file and row."""
    frame = tables.read_csv(path)
    missing = {"id", "text", "label", "role", "split"} - set(frame.columns)
    if missing:
        raise DataError(f"{path}: the columns {', '.join(sorted(missing))} are missing", hint="see prompts/README.md")
    out = []
    for row, line in zip(frame.to_dict("records"), range(2, len(frame) + 2), strict=True):
        if row["role"] not in get_args(Role):
            raise DataError(f"{path}, line {line}: role {row['role']!r} is none of {', '.join(get_args(Role))}")
        if row["split"] == split:
            asks = concept if row["role"] == "concept" else ""
            out.append(Prompt(row["id"], row["text"], row["role"], row["label"], asks))
    return out


def to_preserve(settings: Settings) -> list[str]:
    """What fine-tuning erasers hold on to: preserved prompts, and the neighbours that must survive. Dev split only.

    Neighbours are the fewer and lie the nearest, so they are repeated until they are about half of the list.
    """
    written = prompts(settings.paths.prompts, "dev", "")
    written += [p for n in settings.targets for p in prompts(settings.concepts[n].prompts, "dev", n)]
    keep, near = ([p.text for p in written if p.role == role] for role in ("keep", "neighbour"))
    return keep + near * max(1, round(len(keep) / max(len(near), 1)))


def token(settings: Settings, concept: str) -> SoftToken:
    return tensors.load_token(settings.paths.tokens / concept)


def concept(settings: Settings, model: Model, name: str) -> Concept:
    """The concept as `erase.source` says: by its soft tokens, or by its words."""
    spec = settings.concepts[name]
    if settings.erase.source == "words":
        return encode.concept_from_words(model, name, spec.words, spec.sentences)
    return encode.concept_from_token(model, token(settings, name), spec.sentences)


def head(settings: Settings, concept: str, which: str) -> Head:
    """r_ψ: "train" made the token, "held_out" may judge."""
    found, facts = tensors.load(settings.paths.reward / f"{concept}.safetensors")
    return Head({n.split("/", 1)[1]: t for n, t in found.items() if n.startswith(f"{which}/")}, facts["rank"])


def present(head: Head, features: Tensor) -> Tensor:
    """Whether raters would see the concept: vote share of at least one half, or above the mean of the ranked pool."""
    return head(features) >= (0.0 if head.rank else 0.5)


class Pool:
    """The rated pictures of one concept, in the order of their digests."""

    def __init__(self, settings: Settings, name: str) -> None:
        answers = tables.read_table(settings.paths.feedback / "answers.parquet")
        self.answers = answers[answers["concept"] == name]
        # A ranking screen's pictures share its prompt.
        asked = zip(self.answers["items"], self.answers["prompt"], strict=True)
        prompt = {d: p for items, p in asked for d in items}
        found = {p.sha256: p for p in images.read_shards(settings.paths.feedback) if p.sha256 in prompt}
        digests = sorted(found)
        self.row = {d: i for i, d in enumerate(digests)}
        self.pictures = [images.decode(found[d].image) for d in digests]
        self.prompt = [prompt[d] for d in digests]

    def groups(self) -> NDArray[np.int64]:
        """(n,) the number of each picture's prompt, for cross-validation that keeps a prompt together."""
        return np.unique(self.prompt, return_inverse=True)[1]


def latents(model: Model, pictures: Sequence[Image.Image], batch: int = 64) -> Tensor:
    """z₀ of pictures (n, C, H, W)."""
    return torch.cat([encode_pictures(model, pictures[i : i + batch]) for i in range(0, len(pictures), batch)])
