"""What is measured, and how it is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch takes seconds to import; a verdict is read without it
    pass
from deleatur.records.sampling import Side

Outcome = Literal["pass", "fail", "not enough evidence"]


WORST_FIRST: tuple[Outcome, ...] = ("fail", "not enough evidence", "pass")


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
