"""params.yaml → one frozen, typed `Settings`. Sections are stage names, plus what several stages share.

Every number lives in params.yaml; the defaults below exist only where leaving a number out is the usual case.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deleatur.errors import SettingsError
from deleatur.gate import Rule
from deleatur.records import Kind, Role

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Base(Section):
    model: str
    """Anything diffusers loads as a Stable Diffusion 1.x/2.x pipeline: a folder, a hub id, s3://…, models:/…"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    """auto: CUDA when there is one."""


class Paths(Section):
    """Where each stage writes, and where what people bring lies."""

    models: Path
    """Folder of local networks, whose content DVC watches."""
    feedback: Path
    reward: Path
    tokens: Path
    delta: Path
    attacks: Path
    state: Path
    """What long stages save as they go. No output of a stage: DVC would remove it before the stage runs again."""
    shots: Path
    scores: Path
    report: Path
    verdict: Path
    prompts: Path


class Found(Section):
    """What counts as the concept in a picture: a detector and the labels of it that count."""

    detector: str
    labels: tuple[str, ...]


class ConceptSpec(Section):
    kind: Kind
    initial: str
    """Word whose embedding row the soft tokens start from."""
    words: tuple[str, ...]
    """What the text-only baselines call it."""
    guideline: str
    """What raters are told."""
    prompts: Path
    """CSV: id, text, label, role, split."""
    found: Found
    templates: Literal["object", "style"] = "object"
    """The kind of sentences that soft tokens are learned in."""
    invert: dict[str, Any] = Field(default_factory=dict)
    """Numbers of `invert` that are others for this concept: an object family has many kinds, a style has one."""
    sentences: tuple[str, ...] = ("{}",)
    """Sentences in which erasers and guides meet each word or token; alone, as in the papers, unless said otherwise.
    What is erased in the sentence people write goes further than what is erased alone."""

    @field_validator("sentences")
    @classmethod
    def one_place(cls, sentences: tuple[str, ...]) -> tuple[str, ...]:
        if not sentences or any(s.count("{}") != 1 for s in sentences):
            raise ValueError("sentences is a list, and each has {} once, where the word or token goes")
        return sentences


class Ingest(Section):
    sources: tuple[str, ...]
    """JSON-lines files of feedback events, each with a picture archive beside it; globs allowed."""
    min_raters: int = 1
    """Pictures with fewer answers are kept but flagged in the summary."""


class Reward(Section):
    clip: str
    hidden: int
    dropout: Share
    lr: float
    weight_decay: float
    epochs: int
    folds: int
    held_out_raters: Share
    """Share of raters whose answers train only the head that judges, never the one that trains the token."""


class Invert(Section):
    method: str
    model_config = ConfigDict(frozen=True, extra="allow")  # the rest is checked by the method's own class


class Erase(Section):
    method: str
    source: Literal["token", "words"]
    model_config = ConfigDict(frozen=True, extra="allow")


class Guide(Section):
    method: str
    model_config = ConfigDict(frozen=True, extra="allow")


class Attack(Section):
    methods: dict[str, dict[str, Any]]


class Sample(Section):
    split: Literal["dev", "test", "proof"]
    per_prompt: dict[Role, int]
    steps: int
    batch: int
    """Pictures per network call: changes speed and memory, nothing else."""
    champion: str | None
    """Registry URI of the model in production, for example models:/deleatur@champion; none: first release."""
    shard: int = 256

    @field_validator("champion")
    @classmethod
    def pinned(cls, champion: str | None) -> str | None:
        if champion and "@" in champion:
            raise ValueError("name a version (models:/deleatur/3): an alias can move without anybody noticing")
        return champion


class Evaluate(Section):
    detectors: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    level: Share = 0.95
    blur_sheet: bool = True
    """Blur the concept's pictures on the before/after sheet; the page has them blurred until clicked in any case."""


class Gate(Section):
    rules: dict[str, Rule]


class Register(Section):
    tracking_uri: str
    experiment: str
    model: str
    approval: bool
    """True: a pass becomes `challenger` and a person promotes it. False: it becomes `champion` at once."""


class Settings(Section):
    seed: int
    base: Base
    paths: Paths
    targets: tuple[str, ...]
    """Which of the concepts this run erases."""
    concepts: dict[str, ConceptSpec]
    ingest: Ingest
    reward: Reward
    invert: Invert
    erase: Erase
    guide: Guide
    attack: Attack
    sample: Sample
    evaluate: Evaluate
    gate: Gate
    register_: Register = Field(alias="register")  # `register` is a method of every abstract class

    @field_validator("targets")
    @classmethod
    def some_target(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("name at least one concept to erase")
        return targets

    @model_validator(mode="after")
    def known_targets(self) -> Settings:
        unknown = set(self.targets) - set(self.concepts)
        if unknown:
            raise ValueError(f"targets name concepts that are not defined: {', '.join(sorted(unknown))}")
        return self

    @classmethod
    def load(cls, path: Path = Path("params.yaml")) -> Settings:
        """Reads and validates; the methods' own numbers are validated by `methods()`.

        Raises SettingsError naming the file and each key that is wrong.
        """
        if not path.is_file():
            raise SettingsError(f"no {path} here", hint="cd to the project's root (the folder with dvc.yaml)")
        try:
            return cls.model_validate(yaml.safe_load(path.read_text("utf-8")))
        except yaml.YAMLError as e:
            raise SettingsError(f"{path} is not YAML: {e}", hint="deleatur check") from e
        except ValidationError as e:
            raise SettingsError(explain(e, str(path)), hint="deleatur check") from e


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, mappings merged key by key."""
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def explain(error: ValidationError, where: str) -> str:
    """A pydantic error as lines a person can act on: key, what is wrong, what came."""
    lines = [
        f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg']}"
        + ("" if e["type"] in ("missing", "extra_forbidden") else f" (got {e['input']!r})")
        for e in error.errors()
    ]
    return "\n".join([f"{where} has {len(lines)} problem(s):", *lines])
