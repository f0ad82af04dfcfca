"""Answers of raters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch takes seconds to import; a verdict is read without it
    pass


Kind = Literal["binary", "rank"]


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
