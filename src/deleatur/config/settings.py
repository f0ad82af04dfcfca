"""params.yaml → one frozen, typed `Settings`. Sections are stage names, plus what several stages share.

Every number lives in params.yaml; the defaults below exist only where leaving a number out is the usual case.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from deleatur import plugins
from deleatur.errors import SettingsError
from deleatur.gate import Rule
from deleatur.records.feedback import Kind
from deleatur.records.sampling import Role

Between = Annotated[float, Field(gt=0, lt=1)]
"""A share that is neither nothing nor all."""
Word = Annotated[str, Field(pattern=r"\S")]
Name = Annotated[str, Field(pattern=r"^\w[\w-]*$")]
"""What files are named after."""
Numbers = dict[str, Any]
"""A method's own numbers, which its class on the shelf validates."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Choice(Section):
    """Which method of a shelf is used. The numbers of this one, and of any other, stand under the method's own name: to
    use another method, change `method` and nothing else.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    shelf: ClassVar[str]
    method: str

    @model_validator(mode="after")
    def on_the_shelf(self) -> Choice:
        known = plugins.names(self.shelf)
        if self.method not in known:
            raise ValueError(f"method {self.method!r} is none of {', '.join(known)}")
        demand_methods(self.shelf, self.model_extra or {})
        return self

    @property
    def named(self) -> tuple[str, ...]:
        """The method that is used, then the others that numbers are given for."""
        return tuple(dict.fromkeys([self.method, *(self.model_extra or {})]))

    def numbers(self, method: str) -> Numbers:
        return dict((self.model_extra or {}).get(method, {}))


def demand_methods(shelf: str, given: Mapping[str, Any]) -> None:
    """Raises ValueError where a key is no method of the shelf, or what stands under it no mapping."""
    known = plugins.names(shelf)
    for key, numbers in given.items():
        if key not in known:
            raise ValueError(
                f"{key!r} is not a key here; the numbers of a method stand under its name, "
                f"as in {known[0]}: {{{key}: …}}, and there is {', '.join(known)}"
            )
        if not isinstance(numbers, Mapping):
            raise ValueError(f"{key}: expected the method's numbers, {{name: value}}, got {numbers!r}")


class Base(Section):
    model: str
    """Anything diffusers loads as a Stable Diffusion 1.x/2.x pipeline: a folder, a hub id, s3://…, models:/…"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What networks compute in; trained tensors are float32 either way. In float16 small gradients would vanish."""
    device: str = "auto"
    """auto: CUDA when there is one."""


class Paths(Section):
    """Where each stage writes, and where what people bring lies."""

    models: Path
    """Folder of local networks, whose content DVC watches."""
    feedback: Path
    data_docs: Path
    """What Great Expectations says of the feedback, to be read in a browser."""
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

    @model_validator(mode="after")
    def apart(self) -> Paths:
        """A stage empties the folder that it writes, so nothing else may lie in it."""
        for (name, path), (other, inner) in permutations(self, 2):
            if name in self.written and _inside(inner, path):
                raise ValueError(f"{other} lies in {name}, {path}, which a stage empties: keep them apart")
        return self

    @property
    def written(self) -> dict[str, Path]:
        """What stages write, and empty before they do."""
        return {name: path for name, path in self if name not in BROUGHT}

    def demand(self, brought: Mapping[str, Path]) -> None:
        """Raises ValueError where what a stage empties holds what people brought, or lies outside the project."""
        for name, path in self.written.items():
            if not _inside(path, Path()):
                raise ValueError(f"paths.{name}: expected a folder of the project, which a stage may empty, got {path}")
            for what, place in brought.items():
                if _inside(place, path) or (what in OURS and _inside(path, place)):
                    raise ValueError(f"paths.{name} is {path}, which a stage empties, and {what} lies there")


BROUGHT = ("models", "prompts")
OURS = {name: Path(name) for name in (".git", ".dvc", "params.yaml", "dvc.yaml")}
"""What git keeps besides is asked of git, by who empties: `io.tables.emptied`."""


def _inside(inner: Path, outer: Path) -> bool:
    return Path(os.path.abspath(inner)).is_relative_to(os.path.abspath(outer))


class Found(Section):
    """What counts as the concept in a picture: a detector and the labels of it that count."""

    detector: str
    labels: tuple[str, ...] = Field(min_length=1)


class ConceptSpec(Section):
    kind: Kind
    initial: Word
    """Word whose embedding row the soft tokens start from."""
    words: tuple[Word, ...] = Field(min_length=1)
    """What the text-only baselines call it."""
    guideline: str
    """What raters are told."""
    prompts: Path
    """CSV: id, text, label, role, split."""
    found: Found
    templates: Literal["object", "style"] = "object"
    """The kind of sentences that soft tokens are learned in."""
    invert: dict[str, Numbers] = Field(default_factory=dict)
    """Numbers of `invert` that are others for this concept, under the method's name as there: an object family has many
    kinds, a style has one."""
    sentences: tuple[str, ...] = ("{}",)
    """Sentences in which erasers and guides meet each word or token; alone, as in the papers, unless said otherwise.
    What is erased in the sentence people write goes further than what is erased alone."""

    @field_validator("sentences")
    @classmethod
    def one_place(cls, sentences: tuple[str, ...]) -> tuple[str, ...]:
        if not sentences or any(s.count("{}") != 1 for s in sentences):
            raise ValueError("sentences is a list, and each has {} once, where the word or token goes")
        return sentences

    @field_validator("invert", mode="before")
    @classmethod
    def known_methods(cls, invert: Any) -> Any:
        if isinstance(invert, Mapping):
            demand_methods(Invert.shelf, invert)
        return invert


class Ingest(Section):
    sources: tuple[str, ...] = Field(min_length=1)
    """JSON-lines files of feedback events, each with a picture archive beside it; globs allowed."""
    min_raters: PositiveInt = 1
    """Pictures with fewer answers are kept but flagged in the summary."""


class Reward(Section):
    clip: str
    """Folder or hub id of the CLIP model whose features the head reads."""
    hidden: PositiveInt
    dropout: float = Field(ge=0, lt=1)
    lr: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    epochs: PositiveInt
    folds: int = Field(gt=1)
    held_out_raters: Between
    """Share of raters whose answers train only the head that judges, never the one that trains the token."""


class Invert(Choice):
    shelf: ClassVar[str] = "inversion"


class Erase(Choice):
    shelf: ClassVar[str] = "erasers"
    source: Literal["token", "words"]


class Guide(Choice):
    shelf: ClassVar[str] = "guides"


class Attack(Section):
    methods: dict[str, Numbers]
    """All of them are used."""


Split = Literal["dev", "test", "proof"]


class Sample(Section):
    split: Split
    per_prompt: dict[Role, NonNegativeInt]
    steps: PositiveInt
    batch: PositiveInt
    """Pictures per network call: changes speed and memory, and a pixel by one of its 256 levels at most."""
    champion: str | None
    """Registry URI of the model in production, for example models:/deleatur/3; none: first release."""
    shard: PositiveInt = 256

    @field_validator("champion")
    @classmethod
    def pinned(cls, champion: str | None) -> str | None:
        if champion and "@" in champion:
            raise ValueError("name a version (models:/deleatur/3): an alias can move without anybody noticing")
        if champion and not re.fullmatch(r"models:/[^/]+/\d+", champion):
            raise ValueError("expected a version of the registry, models:/NAME/NUMBER")
        return champion


class Evaluate(Section):
    detectors: dict[str, Numbers]
    metrics: dict[str, Numbers]
    level: Between = 0.95
    blur_sheet: bool = True
    """Blur the concept's pictures on the before/after sheet; the page has them blurred until clicked in any case."""


class Gate(Section):
    rules: dict[str, Rule] = Field(min_length=1)


class Register(Section):
    tracking_uri: Word
    experiment: Word
    model: Annotated[str, Field(pattern=r"^[^/:@']+$")]
    approval: bool
    """True: a pass becomes `challenger` and a person promotes it. False: it becomes `champion` at once."""
    approval_days: PositiveInt = 14
    """A challenger that waits longer has to be judged anew: policy, feedback or champion may have changed."""
    trusted_keys: tuple[Path, ...] = ()
    """Public keys, in PEM, of those who may sign a version. None: unsigned ones are let through, and said to be."""
    ledger: Path = Path("ledger.jsonl")
    """Who released what, and took it back: one file for one registry. Whoever releases needs this very file: where
    several machines do, it lies on a volume they share."""

    @field_validator("tracking_uri")
    @classmethod
    def has_a_registry(cls, uri: str) -> str:
        if not re.match(r"(sqlite|(postgresql|mysql|mssql)(\+\w+)?|https?|databricks)(:|$)", uri):
            raise ValueError("expected sqlite:///FILE, postgresql://…, mysql://…, mssql://…, http(s)://… or databricks")
        return uri


class Variant(Section):
    """A row of the comparison that is no method as params.yaml has it: what of these sections is other there."""

    erase: Numbers = Field(default_factory=dict)
    guide: Numbers = Field(default_factory=dict)

    @field_validator("erase")
    @classmethod
    def source_is_of_the_row(cls, erase: Numbers) -> Numbers:
        if "source" in erase:
            raise ValueError("leave out source: a row is told by words, and with hfi+ before its name by tokens")
        return erase


class Compare(Section):
    """What `deleatur compare` puts side by side: every row for every concept, with every training seed."""

    concepts: tuple[Name, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    """Rows, see `stages.compare.plan`; the untouched model is always one more."""
    variants: dict[Name, Variant] = Field(default_factory=dict)
    split: Split
    """Of the prompts that are drawn."""
    folder: Path

    @field_validator("concepts", "seeds", "methods")
    @classmethod
    def once(cls, listed: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(listed)) < len(listed):
            raise ValueError("name each once")
        return listed


class Canary(Section):
    """What is live, drawn again and again: `deleatur canary`."""

    seed: int = 1
    """Of the noise, which is the same each time."""
    split: Split = "test"
    per_prompt: PositiveInt = 2
    max: float = Field(default=0.4, gt=0, lt=1)
    """Concept rate that is a breach when the whole interval lies above it: a share of the untouched model's."""
    min_n: PositiveInt = 40
    retired: tuple[Name, ...] = ()
    """Concepts that were erased once, and that nobody minds any more."""
    folder: Path = Path("out/canary")

    @property
    def rule(self) -> Rule:
        of = {"metric": "concept_rate", "slice": "concept", "side": "champion", "relative": "base"}
        return Rule.model_validate({**of, "max": self.max, "min_n": self.min_n})

    @property
    def result(self) -> Path:
        return self.folder / "canary.json"


class Emergency(Section):
    """What `deleatur emergency` does otherwise than the chain, and the policy that its releases are judged by."""

    erase: Numbers
    """Over the section `erase`: a method that takes seconds, told by words, which nobody has to learn first."""
    per_prompt: dict[Role, NonNegativeInt]
    """Pictures, as in `sample.per_prompt`."""
    rules: dict[str, Rule] = Field(min_length=1)
    """Instead of `gate.rules`."""
    days: PositiveInt = 14
    """Until a trained release should have replaced it; then it is said everywhere."""
    folder: Path = Path("out/emergency")


class Feedback(Section):
    """When new feedback starts the chain: the flow `feedback`."""

    min_new: PositiveInt = 50
    """Events that were not there at the last run. Fewer wait for more."""
    inbox: str | None = None
    """Folder or s3://bucket/prefix that feedback arrives in: its files are fetched to where the first of ingest.sources
    looks for them."""


class Workers(Section):
    """Other machines that stages run on. Where work is done changes nothing of its result."""

    state: str | None = None
    """Folder or s3://bucket/prefix that all of them reach: what a stopped stage goes on from where another machine
    takes over. None: it starts anew there."""
    save_every: float = Field(default=60, ge=0)
    """Seconds from one saving of a long stage to the next, which is what a machine costs that vanishes. More where
    saving would take more than 1 % of the time."""
    dask: PositiveInt | Annotated[str, Field(pattern=r"^(tcp|tls|ws|wss)://\S+$")] | None = None
    """Who draws pictures and looks at them: the processes of a Dask scheduler, by its address; as many processes on
    this machine; or, None, the stage itself."""


BESIDE = frozenset({"compare", "canary", "emergency", "feedback", "workers"})
"""Sections that no result of the chain depends on."""


class Settings(Section):
    seed: int
    base: Base
    paths: Paths
    targets: tuple[str, ...]
    """Which of the concepts this run erases."""
    concepts: dict[Name, ConceptSpec]
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
    compare: Compare | None = None
    """Left out where nothing is compared."""
    canary: Canary = Canary()
    emergency: Emergency | None = None
    """Left out where nothing is released but by the chain."""
    feedback: Feedback = Feedback()
    workers: Workers = Workers()

    @property
    def made_by(self) -> str:
        """SHA-256 of what was given and can change a result. The policy and the registry judge and release it; they are
        no part of it, and neither is when it is made, on which machines, where it lies, what it is compared with or how
        it is watched.
        """
        given = self.model_dump(mode="json", exclude={*BESIDE, "gate", "register_", "paths"}, exclude_unset=True)
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()

    @field_validator("targets")
    @classmethod
    def some_target(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets or len(set(targets)) < len(targets):
            raise ValueError("name at least one concept to erase, and each once")
        return targets

    @model_validator(mode="after")
    def known_targets(self) -> Settings:
        named = {"targets": self.targets} | ({"compare.concepts": self.compare.concepts} if self.compare else {})
        for where, names in named.items():
            if unknown := set(names) - set(self.concepts):
                raise ValueError(f"{where} name concepts that are not defined: {', '.join(sorted(unknown))}")
        return self

    @model_validator(mode="after")
    def nothing_brought_is_emptied(self) -> Settings:
        sources = {f"the source {s} of ingest": Path(re.split(r"[*?\[]", s)[0]) for s in self.ingest.sources}
        prompts = {f"the prompt file of {name}": spec.prompts for name, spec in self.concepts.items()}
        self.paths.demand(OURS | sources | prompts | {"the ledger (register.ledger)": self.register_.ledger})
        others = {f"paths.{n}": p for n, p in self.paths} | OURS | sources | prompts
        if self.compare:
            _demand_apart("compare.folder", self.compare.folder, others)
        _demand_apart("canary.folder", self.canary.folder, others)
        if self.emergency:
            _demand_apart("emergency.folder", self.emergency.folder, others)
        return self

    @classmethod
    def load(cls, path: Path = Path("params.yaml")) -> Settings:
        """Reads and validates; the methods' own numbers are validated by `methods()`.

        Raises SettingsError naming the file and each key that is wrong.
        """
        if not path.is_file():
            raise SettingsError(f"no {path} here", hint="cd to the project's root (the folder with dvc.yaml)")
        again = "deleatur check" if path == Path("params.yaml") else f"deleatur check --params {path}"
        try:
            given = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as e:  # ValueError: not UTF-8, or a date that there is not
            raise SettingsError(f"{path} is not YAML in UTF-8: {e}", hint=f"mend {path}, then: {again}") from e
        return cls.of(given, str(path), f"correct {path}, then: {again}")

    @classmethod
    def of(cls, given: Any, where: str, hint: str = "deleatur check") -> Settings:
        """Raises SettingsError naming `where` and each key that is wrong."""
        try:
            return cls.model_validate(given)
        except ValidationError as e:
            raise SettingsError(explain(e, where), hint=hint) from e


def _demand_apart(what: str, folder: Path, others: Mapping[str, Path]) -> None:
    """It is emptied, or folders within it are; nothing else may be there, nor it in anything else."""
    if not _inside(folder, Path()):
        raise ValueError(f"{what}: expected a folder of the project, got {folder}")
    for name, path in others.items():
        if _inside(path, folder) or _inside(folder, path):
            raise ValueError(f"{what} is {folder}, and {name} is {path}: keep them apart")


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
        f"  {'.'.join(map(str, e['loc'])) or '(top)'}: {e['msg'].removeprefix('Value error, ')}{_got(e)}"
        for e in error.errors()
    ]
    return "\n".join([f"{where} has {len(lines)} problem(s):", *lines])


def _got(problem: Any) -> str:
    """Not where it is a whole section, nor where the message is about what is missing or too many."""
    told = problem["type"] in ("missing", "extra_forbidden") or isinstance(problem["input"], Mapping)
    return "" if told else f" (got {problem['input']!r})"
