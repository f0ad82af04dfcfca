"""Measured scores, and the verdict on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deleatur.records.sampling import Variant

Outcome = Literal["pass", "fail", "not enough evidence"]


WORST_FIRST: tuple[Outcome, ...] = ("fail", "not enough evidence", "pass")


@dataclass(frozen=True)
class DetectorInfo:
    """The detector behind a score. A report that lacks one of these fields does not validate."""

    name: str
    weights: str
    """SHA-256 over the network's weights and its preprocessing; several are joined by "+", as their names are."""
    labels: tuple[str, ...]
    """The labels that count as a detection."""
    cutoff: float


@dataclass(frozen=True)
class Score:
    """One measured value with its confidence interval."""

    metric: str
    slice: str
    """Which images it was measured on: a role, or role/concept."""
    variant: Variant
    value: float
    low: float
    high: float
    n: int
    prompts: int
    higher_is_better: bool
    versus: Variant | None
    """None: an absolute value. Otherwise the mean paired difference variant − versus, from equal noise."""
    detector: DetectorInfo | None
    """None: no network was involved. Like `versus` it has no default: a score that omits it does not validate."""


@dataclass(frozen=True)
class Provenance:
    """Everything that went into a report. A report that lacks one of these fields does not validate."""

    base: str
    """Digest of the UNet, which the delta applies to."""
    pipeline: str
    """Digest of the complete base model that generated the images, see `Recipe`."""
    delta: str
    images: str
    """Digest of the recipes of all images of all variants."""
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
    """"token" (soft tokens) or "words"."""
    method: str
    preserve: bool
    """Whether a preservation loss was added to the method's published loss."""
    simulated: bool
    """Whether any of the feedback came from simulated raters."""
    champion: str | None
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """The scores of one evaluation."""

    provenance: Provenance
    scores: Sequence[Score]
    notes: Sequence[str]
    """Caveats for reading the scores."""


@dataclass(frozen=True)
class Finding:
    """The result of one rule of the release policy."""

    rule: str
    outcome: Outcome
    reason: str
    margin: float | None
    """How far inside the limit the deciding end of the interval is; negative: outside. None: nothing was compared."""
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """The decision on a report: the findings of all rules, and the worst of their outcomes."""

    outcome: Outcome
    findings: Sequence[Finding]
    report: str
    """Digest of the judged report."""
    policy: str
    """Digest of the gate section."""
    simulated: bool


@dataclass(frozen=True)
class ConceptCheck:
    """The canary's check of one concept on newly sampled images of a released version."""

    concept: str
    outcome: Outcome
    """fail: the concept is back."""
    reason: str
    scores: Sequence[Score]
    """Of the version, and of the base model, which shows whether the detector still works. Empty if the concept is
    no longer configured."""


@dataclass(frozen=True)
class CanaryResult:
    """The canary's checks of one released version."""

    version: str
    time: str
    """UTC, ISO 8601."""
    checks: Sequence[ConceptCheck]

    @property
    def outcome(self) -> Outcome:
        return min((check.outcome for check in self.checks), key=WORST_FIRST.index)

    @property
    def breach(self) -> str:
        """Why the version must be taken out of production; empty if it may stay."""
        return "; ".join(f"{check.concept} is back: {check.reason}" for check in self.checks if check.outcome == "fail")
