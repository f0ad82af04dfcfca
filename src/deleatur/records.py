"""The values that travel between rooms. Frozen, typed, without behaviour beyond what their own fields decide."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # torch takes seconds to import; a verdict is read without it
    from PIL.Image import Image
    from torch import Tensor

Kind = Literal["binary", "rank"]
Outcome = Literal["pass", "fail", "not enough evidence"]
WORST_FIRST: tuple[Outcome, ...] = ("fail", "not enough evidence", "pass")
Given = Literal["words", "token"]
"""What a concept was given in."""
Side = Literal["base", "champion", "candidate"]
Role = Literal["concept", "word", "token", "attack", "neighbour", "keep", "unseen"]
"""What a prompt is there for. word, token: the concept's own words and soft tokens, alone; others come from files."""


@dataclass(frozen=True)
class Feedback:
    """One answer of one rater. Append-only: a correction or a withdrawal is a new event naming the old one.

    `items` are SHA-256 digests of the rated pictures: one for a yes/no question, M for a ranking.
    `ranks` are aligned with `items`: 1 shows the concept most; None is the "X" of a ranking screen (not at all).
    """

    event_id: str
    concept: str
    kind: Kind
    items: tuple[str, ...]
    prompt: str
    seed: int
    model_version: str
    rater: str
    """Salted hash; no personal data."""
    answer: Literal["yes", "no", "unsure", "skip", "ranked", "withdrawn"]
    source: str
    """Where it came from; starts with "simulated" for simulated raters."""
    created_at: str
    """UTC, ISO 8601."""
    consent_version: str
    ranks: tuple[int | None, ...] | None = None
    labels: tuple[str, ...] = ()
    severity: int | None = None
    reason: str | None = None
    seconds_spent: float | None = None
    unblurred: bool | None = None
    replaces: str | None = None
    """The event id that this one corrects or withdraws."""


@dataclass(frozen=True)
class SoftToken:
    """What HFI learns: rows of the text encoder's *input* embedding table.

    `vectors` is (m, v, d): m tokens that each stand alone, v consecutive rows each, d the embedding width.
    """

    concept: str
    vectors: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def placeholders(self) -> tuple[str, ...]:
        """What people type: `<weapon-1>`, `<weapon-2>`, …"""
        return tuple(f"<{self.concept}-{i}>" for i in range(1, len(self.vectors) + 1))


@dataclass(frozen=True)
class Pictures:
    """What raters said of pictures: `marked` show the concept, `passed` do not."""

    marked: Sequence[Image]
    passed: Sequence[Image]


@dataclass(frozen=True)
class Concept:
    """A concept as the networks see it. Words and soft tokens give the same kind of value.

    pieces:   n prompts (before, description, after), text fragments and soft rows (v, d); each stands alone
    states:   (n, L, d) their text-encoder states
    content:  n tuples, the positions of the concept's own tokens in each sentence
    end:      n positions of the end-of-text token
    pictures: for methods that learn from pictures instead of descriptions
    """

    name: str
    source: Given
    texts: tuple[str, ...]
    pieces: tuple[tuple[str | Tensor, ...], ...]
    states: Tensor
    content: tuple[tuple[int, ...], ...]
    end: tuple[int, ...]
    pictures: Pictures | None = None


@dataclass(frozen=True, eq=False)
class LowRank(Mapping[str, "Tensor"]):
    """Differences of many matrices that read the same input, each made when it is asked for: up[name] @ down.

    up: (o, r) by name, down: (r, d), in fp32. Instead of o·d numbers for each matrix, o·r, and r·d for all of them.
    """

    up: Mapping[str, Tensor]
    down: Tensor

    def __getitem__(self, name: str) -> Tensor:
        # In float64, so that the order in which a machine adds up does not show in the fp32 result.
        return (self.up[name].double() @ self.down.double()).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.up)

    def __len__(self) -> int:
        return len(self.up)


@dataclass(frozen=True)
class Delta:
    """What an eraser gives back: differences of weights against one base model, never a whole model."""

    tensors: Mapping[str, Tensor]
    """Parameter name of the UNet → difference, in fp32. LowRank where they are, in memory and on disk."""
    base: str
    """Digest of the UNet the differences belong to."""
    method: str
    settings: Mapping[str, Any]
    concepts: tuple[str, ...]
    record: Mapping[str, Any] = field(default_factory=dict)
    """How the run went: steps, stop reason, curves. Not part of the identity."""
    one_step: int | None = None
    """The noise level from which the weights draw a picture in one unguided call; None: they are the sampler's."""


@dataclass(frozen=True)
class Prompt:
    """One line of the evaluation set."""

    id: str
    text: str
    role: Role
    label: str
    """What a detector should find in the picture: a class name of the judge."""
    concept: str = ""
    """For the roles concept, word, token and attack: which concept it asks for."""


@dataclass(frozen=True)
class Recipe:
    """All that decides a picture. Which side or prompt it is drawn for does not, nor what is drawn beside it."""

    pipeline: str
    """Digest of the base model as it lies on disk: every network, its configuration, tokenizer and scheduler."""
    precision: str
    weights: str
    """Digest of the UNet's tensors that were laid over the base model's."""
    states: str
    """Digest of the prompt as the text encoder gives it."""
    conditions: str
    """Digest of the sentences that the guide runs beside the prompt, in the same form."""
    guidance: str
    """The guide and its numbers, as JSON."""
    steps: int
    noise_seed: int
    code: str
    """Digest of the sources and of the versions of the libraries that drew it."""

    @property
    def key(self) -> str:
        """The picture's name."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shot:
    """One picture of the evaluation."""

    side: Side
    prompt: Prompt
    index: int
    """The picture's number among those of its prompt."""
    recipe: Recipe


@dataclass(frozen=True)
class Detector:
    """What made a number: without every one of these fields a report does not validate."""

    name: str
    weights: str
    """SHA-256 over the network's weights and what prepares its input; several are joined by "+", as their names are."""
    labels: tuple[str, ...]
    """The labels that count."""
    cutoff: float


@dataclass(frozen=True)
class Score:
    """One number with its interval and what made it."""

    metric: str
    slice: str
    """Which pictures: a role, or role/concept."""
    side: Side
    value: float
    low: float
    high: float
    n: int
    prompts: int
    higher_is_better: bool
    versus: Side | None
    """None: an absolute number. Otherwise the mean paired difference side − versus, from equal noise."""
    detector: Detector | None
    """None: no network made it. Like `versus` it has no default: a score that leaves it out does not validate."""


@dataclass(frozen=True)
class Identity:
    """What went in. A report without one of these fields does not validate."""

    base: str
    """Digest of the UNet, which the delta belongs to."""
    pipeline: str
    """Digest of the whole base model that drew the pictures, see `Recipe`."""
    delta: str
    pictures: str
    """Digest of the recipes of all pictures of all sides."""
    feedback: str
    tokens: str
    prompts: str
    settings: str
    seed: int
    seeds_rule: str
    sampler: str
    guide: str
    concepts: tuple[str, ...]
    concept_source: str
    """"token" (HFI) or "words"."""
    method: str
    preserve: bool
    """Whether our keep-loss was added to the paper's loss."""
    simulated: bool
    """Whether any of the feedback came from simulated raters."""
    champion: str | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    identity: Identity
    scores: Sequence[Score]
    notes: Sequence[str]
    """What a reader must know to read the numbers right."""


@dataclass(frozen=True)
class Finding:
    """One rule of the policy, applied."""

    rule: str
    outcome: Outcome
    reason: str
    margin: float | None
    """How far inside the limit the deciding end of the interval is; negative: outside. None: nothing was compared."""
    remedy: str


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    findings: Sequence[Finding]
    report: str
    """Digest of the report that was judged."""
    policy: str
    """Digest of the gate section."""
    simulated: bool


@dataclass(frozen=True)
class Look:
    """One concept in pictures that a version drew once more."""

    concept: str
    outcome: Outcome
    """fail: it is back."""
    reason: str
    scores: Sequence[Score]
    """Of the version, and of the untouched model, which shows whether the detector sees anything. None where the
    concept is not known any more."""


@dataclass(frozen=True)
class Canary:
    """What a version that was live drew, some time after its release."""

    version: str
    time: str
    """UTC, ISO 8601."""
    looks: Sequence[Look]

    @property
    def outcome(self) -> Outcome:
        return min((look.outcome for look in self.looks), key=WORST_FIRST.index)

    @property
    def breach(self) -> str:
        """Why the version must not stay; empty: it may."""
        return "; ".join(f"{look.concept} is back: {look.reason}" for look in self.looks if look.outcome == "fail")
