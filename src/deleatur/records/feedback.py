"""Rating events, and the summary of those that were ingested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

FeedbackKind = Literal["binary", "rank"]


@dataclass(frozen=True)
class FeedbackEvent:
    """One answer of one rater. Append-only: a correction or a withdrawal is a new event that names the old one.

    `items` are SHA-256 digests of the rated images: one for a yes/no question, M for a ranking.
    `ranks` are aligned with `items`: 1 shows the concept most; None means "not at all" (the "X" of a ranking screen).
    """

    event_id: str
    concept: str
    kind: FeedbackKind
    items: tuple[str, ...]
    prompt: str
    seed: int
    model_version: str
    rater: str
    """Salted hash; no personal data."""
    answer: Literal["yes", "no", "unsure", "skip", "ranked", "withdrawn"]
    source: str
    """System that recorded the event; starts with "simulated" for simulated raters."""
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
    """Id of the event that this one corrects or withdraws."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of a concept's raters, see `votes.rater_agreement`."""

    value: float | None
    """None: undefined, such as with one rater."""


@dataclass(frozen=True)
class ConceptCounts:
    """What was ingested about one concept."""

    events: int
    voted_images: int
    pairs: int
    agreement: Agreement


@dataclass(frozen=True)
class QuarantineCounts:
    """What was ingested and cannot be used."""

    rows: int


@dataclass(frozen=True)
class FeedbackSummary:
    """The fields that later stages read of the summary that `ingest` writes; it has more, for people."""

    feedback: str
    """Digest of the events."""
    simulated: bool
    events: int
    quarantined: QuarantineCounts
    concepts: Mapping[str, ConceptCounts]
