"""The sections of params.yaml. A section belongs to a stage, or to several.

Every value is in params.yaml; a default exists only where leaving the value out is the usual case.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from deleatur.config.plugin_config import Attacks, Detectors, Hyperparameters, Metrics, PluginSection, Section
from deleatur.feedback.reward import RewardHyperparameters
from deleatur.gate import Rule
from deleatur.records.feedback import FeedbackKind
from deleatur.records.sampling import Role
from deleatur.redaction import redact


def _without_credentials(address: str) -> str:
    if redact(address) != address:
        raise ValueError("expected an address without a password; fsspec and boto3 take it from the environment")
    return address


Address = Annotated[str, AfterValidator(_without_credentials)]
"""Of a model or a folder. Reports and the parameters of flows show it."""
Share = Annotated[float, Field(gt=0, lt=1)]
"""A share strictly between 0 and 1."""
Text = Annotated[str, Field(pattern=r"\S")]
Name = Annotated[str, Field(pattern=r"^\w[\w-]*$")]
"""Files are named after it."""
Split = Literal["dev", "test", "proof"]


class BaseSection(Section):
    model: Address
    """A pipeline that diffusers loads: a folder, a hub id, s3://… or models:/…"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the networks; trained tensors are float32 in any case. In float16 small gradients would vanish."""
    device: str = "auto"
    """auto: CUDA where there is one."""


class Paths(Section):
    """Where each stage writes, and where inputs are."""

    models: Path
    """Folder of local networks, whose content DVC tracks."""
    feedback: Path
    """The answers in effect, their images, and quarantine."""
    data_docs: Path
    """Validation results of the feedback by Great Expectations, as web pages."""
    reward: Path
    """Reward heads of the concepts, and how well they predict held-out answers."""
    tokens: Path
    """Soft tokens of the concepts."""
    delta: Path
    """The delta: erased weights minus those of the base model."""
    attacks: Path
    """Tokens that attacks have found."""
    checkpoints: Path
    """Checkpoints of running stages. No output of a stage: DVC removes outputs before a stage runs."""
    samples: Path
    """Sampled images, with prompts and seeds."""
    scores: Path
    """Scores of every image and detector."""
    report: Path
    """Scores with their intervals, as JSON and CSV."""
    verdict: Path
    """Verdict, HTML report and contact sheet."""
    prompts: Path
    """Folder of prompts that are no concept's own."""

    @model_validator(mode="after")
    def do_not_overlap(self) -> Paths:
        """A stage empties the folder that it writes, so nothing else may be in it."""
        for (name, path), (other, inner) in permutations(self, 2):
            if name in self.outputs and is_inside(inner, path):
                raise ValueError(f"{other} is in {name}, {path}, which a stage empties: keep them apart")
        return self

    @property
    def outputs(self) -> dict[str, Path]:
        """Folders that stages write, and empty before."""
        return {name: path for name, path in self if name not in ("models", "prompts")}

    def require_apart_from(self, inputs: Mapping[str, Path]) -> None:
        """Raises ValueError where an output holds an input, or is outside the project."""
        for name, path in self.outputs.items():
            if not is_inside(path, Path()):
                raise ValueError(f"paths.{name}: expected a folder of the project, which a stage may empty, got {path}")
            for what, place in inputs.items():
                if is_inside(place, path) or (what in PROJECT_FILES and is_inside(path, place)):
                    raise ValueError(f"paths.{name} is {path}, which a stage empties, and {what} is there")


PROJECT_FILES = {name: Path(name) for name in (".git", ".dvc", "params.yaml", "dvc.yaml")}
"""Files that Git tracks besides are protected where folders are emptied: `storage.files.emptied`."""


def is_inside(inner: Path, outer: Path) -> bool:
    # On strings: settings are validated for every trial of a benchmark, and compare all their paths with each other.
    child, parent = os.path.abspath(inner), os.path.abspath(outer)
    return child == parent or child.startswith(parent.rstrip(os.sep) + os.sep)


class Detection(Section):
    """What counts as the concept in an image: a detector of `evaluate.detectors` and the labels that count."""

    detector: str
    labels: tuple[str, ...] = Field(min_length=1)


class ConceptSpec(Section):
    kind: FeedbackKind
    """binary: raters answer yes or no; rank: they order several images."""
    initializer_token: Text
    """Word whose embedding soft tokens are initialised with."""
    words: tuple[Text, ...] = Field(min_length=1)
    """Words for the concept, for methods that are specified by text."""
    guideline: str
    """Instruction to raters."""
    prompts: Path
    """CSV: id, text, label, role, split."""
    detection: Detection
    learnable_property: Literal["object", "style"] = "object"
    """Kind of the prompt templates that soft tokens are learned in."""
    invert: dict[str, Hyperparameters] = Field(default_factory=dict)
    """Hyperparameters of `invert` that differ for this concept, by method: an object family has many kinds, a style has
    one.
    """
    prompt_templates: tuple[str, ...] = ("{}",)
    """Prompts around each word or token that erasers and guides are given; "{}", the word alone, is what papers use.
    Erasing the concept in prompts that people write generalises further than erasing the word alone.
    """

    @field_validator("words", "prompt_templates")
    @classmethod
    def listed_once(cls, listed: tuple[str, ...]) -> tuple[str, ...]:
        """Text encoders fold case and spaces: the same word again would count as another piece of evidence."""
        folded = [" ".join(text.lower().split()) for text in listed]
        if repeated := sorted({text for text in folded if folded.count(text) > 1}):
            raise ValueError(f"list each once, got {', '.join(repeated)} more than once")
        return listed

    @field_validator("prompt_templates")
    @classmethod
    def one_placeholder(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        if not templates or any(template.count("{}") != 1 for template in templates):
            raise ValueError("prompt_templates is a list, and each has {} once, where the word or token goes")
        return templates


class IngestSection(Section):
    sources: tuple[str, ...] = Field(min_length=1)
    """JSON-lines files of feedback events, each with an image archive beside it; globs allowed."""
    min_raters: PositiveInt = 1
    """Images with fewer answers are kept, and flagged in the summary."""


class RewardSection(RewardHyperparameters):
    clip: Address
    """Folder or hub id of the CLIP model whose features the reward heads read."""
    held_out_raters: Share
    """Share of raters whose answers train only the head that evaluates, never the one that inverts."""


class InvertSection(PluginSection):
    kind: ClassVar[str] = "inversion"


class EraseSection(PluginSection):
    kind: ClassVar[str] = "erasers"
    source: Literal["token", "words"]
    """What specifies a concept: its soft tokens (HFI), or its words."""


class GuideSection(PluginSection):
    kind: ClassVar[str] = "guides"


class AttackSection(Section):
    methods: Attacks
    """All of them are run."""


class SampleSection(Section):
    split: Split
    """Of the prompts that are sampled: dev to choose hyperparameters, test for releases, proof for comparisons."""
    images_per_prompt: dict[Role, NonNegativeInt]
    """Role → images sampled for each of its prompts, by every variant."""
    steps: PositiveInt
    """Sampler steps."""
    batch_size: PositiveInt
    """Images per network call: changes speed and memory, and a pixel by one of its 256 levels at most."""
    champion: str | None
    """Registered version in production, for example models:/deleatur/3; null before the first release."""
    shard_size: PositiveInt = 256
    """Images per Parquet file."""

    @field_validator("champion")
    @classmethod
    def is_a_version(cls, champion: str | None) -> str | None:
        if champion and "@" in champion:
            raise ValueError("name a version (models:/deleatur/3): an alias can move without notice")
        if champion and not re.fullmatch(r"models:/[^/]+/\d+", champion):
            raise ValueError("expected a registered version, models:/NAME/NUMBER")
        return champion


class EvaluateSection(Section):
    detectors: Detectors
    """Name → detector, whose labels concepts and metrics refer to."""
    metrics: Metrics
    """Name → metric, which rules refer to."""
    confidence_level: Share = 0.95
    """Of all intervals."""
    blur_contact_sheet: bool = True
    """Blur images of the concept on the contact sheet; the HTML report blurs them until clicked in any case."""


class GateSection(Section):
    rules: dict[str, Rule] = Field(min_length=1)
    """Name → rule. A version passes where every rule does."""


class RegisterSection(Section):
    tracking_uri: Text
    """Of MLflow: sqlite:///FILE, a database or a server. Credentials come from the environment."""
    experiment: Text
    """Experiment of the runs in MLflow."""
    model: Annotated[str, Field(pattern=r"^[^/:@']+$")]
    """Name of the registered model in MLflow."""
    approval: bool
    """True: a pass becomes `challenger`, and a person promotes it. False: it becomes `champion` at once."""
    approval_days: PositiveInt = 14
    """An older challenger has to be evaluated again: policy, feedback or champion may have changed."""
    trusted_keys: tuple[Path, ...] = ()
    """Public keys (PEM) of who may sign a version. Empty: unsigned versions are accepted, and reported as unsigned."""
    ledger: Path = Path("ledger.jsonl")
    """Append-only log of release decisions, one file for one registry. Machines that release share it on a volume."""

    @field_validator("tracking_uri")
    @classmethod
    def has_a_registry(cls, uri: str) -> str:
        if not re.match(r"(sqlite|(postgresql|mysql|mssql)(\+\w+)?|https?|databricks)(:|$)", uri):
            raise ValueError("expected sqlite:///FILE, postgresql://…, mysql://…, mssql://…, http(s)://… or databricks")
        return uri


class MethodOverride(Section):
    """A named entry of the benchmark: overrides of the sections `erase` and `guide`."""

    erase: Hyperparameters = Field(default_factory=dict)
    guide: Hyperparameters = Field(default_factory=dict)

    @field_validator("erase")
    @classmethod
    def source_is_of_the_entry(cls, erase: Hyperparameters) -> Hyperparameters:
        if "source" in erase:
            raise ValueError(
                "leave out source: an entry is specified by words, or by tokens where its name begins with hfi+"
            )
        return erase


class CompareSection(Section):
    """What `deleatur compare` runs: every method on every concept with every training seed."""

    concepts: tuple[Name, ...] = Field(min_length=1)
    """Each is erased by itself."""
    seeds: tuple[int, ...] = Field(min_length=1)
    """Seeds of the chain; scores are pooled over them."""
    methods: tuple[str, ...] = Field(min_length=1)
    """Entries, see `benchmark.plan`; the untouched model is always one more."""
    overrides: dict[Name, MethodOverride] = Field(default_factory=dict)
    """Entry → values that differ from those of its method."""
    split: Split
    """Of the prompts that are sampled."""
    folder: Path
    """Where trials and tables are written."""

    @field_validator("concepts", "seeds", "methods")
    @classmethod
    def unique(cls, listed: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(listed)) < len(listed):
            raise ValueError("name each once")
        return listed


class CanarySection(Section):
    """The regression check of the production model: `deleatur canary`."""

    seed: int = 1
    """Of the sampling noise, the same each time."""
    split: Split = "test"
    """Of the prompts that are sampled."""
    images_per_prompt: PositiveInt = 2
    """Of prompts with the concept."""
    max_relative_rate: float = Field(default=0.4, gt=0, lt=1)
    """Concept rate that is a breach when the whole interval is above it, as a share of the untouched model's rate."""
    min_n: PositiveInt = 40
    """Images below which there is not enough evidence."""
    retired: tuple[Name, ...] = ()
    """Concepts that were erased once and no longer need to be."""
    folder: Path = Path("out/canary")
    """Where its result and images are written."""

    @property
    def rule(self) -> Rule:
        fields = {"metric": "concept_rate", "slice": "concept", "variant": "champion", "relative": "base"}
        return Rule.model_validate({**fields, "max": self.max_relative_rate, "min_n": self.min_n})

    @property
    def result_file(self) -> Path:
        return self.folder / "canary.json"


class EmergencySection(Section):
    """How `deleatur emergency` differs from the chain, and the policy that its releases are judged by."""

    erase: Hyperparameters
    """Overrides of the section `erase`: a method that takes seconds, specified by words, which need no learning."""
    images_per_prompt: dict[Role, NonNegativeInt]
    """Instead of `sample.images_per_prompt`."""
    rules: dict[str, Rule] = Field(min_length=1)
    """Instead of `gate.rules`."""
    expires_after_days: PositiveInt = 14
    """Until a trained release should have replaced it; afterwards every command says so."""
    folder: Path = Path("out/emergency")
    """Where its definition, images and verdict are written."""


class FeedbackSection(Section):
    """When new feedback starts the chain: the flow `feedback`."""

    min_new: PositiveInt = 50
    """New events since the last run that start the next one."""
    inbox: Address | None = None
    """Folder or s3://bucket/prefix where feedback arrives: its files are fetched to where the first of ingest.sources
    looks for them.
    """


class WorkersSection(Section):
    """Other machines that stages run on. Where a stage runs does not change its result."""

    checkpoint_uri: Address | None = None
    """Folder or s3://bucket/prefix that all workers reach: an interrupted stage resumes from there on another machine.
    null: it starts again there.
    """
    checkpoint_interval: float = Field(default=60, ge=0)
    """Seconds between two checkpoints of a long stage: what the loss of a machine costs. Longer where saving would take
    more than 1 % of the time.
    """
    dask: PositiveInt | Annotated[str, Field(pattern=r"^(tcp|tls|ws|wss)://\S+$")] | None = None
    """Where images are sampled and evaluated: on the workers of a Dask scheduler, by its address; in as many
    processes on this machine; or, null, in the stage itself.
    """
