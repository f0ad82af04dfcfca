"""Simulated raters: an oracle's probabilities → ordinary feedback events, careless raters included.

They make it possible to run and test the pipeline without people. Their `source` always starts with "simulated:", and
every summary, report and verdict derived from them is marked as simulated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deleatur.errors import DataError
from deleatur.records.feedback import FeedbackEvent, FeedbackKind

Array = NDArray[np.float64]

CLOCK_START = datetime(2024, 1, 1, 9, tzinfo=UTC)  # fixed, so that the same seed gives the same bytes
SOURCE = "simulated:logistic"


@dataclass(frozen=True)
class Panel:
    """The panel of raters and their reliability.

    A careful rater j says yes with probability σ(s_j · logit(o) + b_j), where o is the oracle's probability: the sign
    of s_j·logit(o) + b_j + logistic noise. With sharpness 1 and spread 0 the share of yes is the oracle's probability.
    """

    raters: int = 12
    per_question: int = 3
    """Raters per image or ranking screen."""
    sharpness: float = 2.0
    """Median of s_j over the raters (log-normal, σ 0.25)."""
    spread: float = 0.3
    """Standard deviation of the bias b_j, in logits."""
    careless: float = 0.1
    """Share of the raters who answer at random."""
    unsure: float = 0.1
    """Probability of "unsure" at an oracle of 0.5; it falls to 0 towards the sure ends, as 4·o·(1−o)."""
    skip: float = 0.02
    """Probability of "skip"."""
    screen: int = 5
    """Images on a ranking screen (M)."""
    cut: float = 0.2
    """Images with an oracle probability below this get an X in a ranking."""


@dataclass(frozen=True)
class Rater:
    name: str
    """A hash, like the one of a human rater."""
    sharpness: float
    bias: float
    careless: bool


@dataclass(frozen=True)
class OracleImage:
    """An image to rate: its digest, the prompt and seed it was sampled from, and the oracle's probability."""

    item: str
    prompt: str
    seed: int
    oracle: float


def sample_raters(panel: Panel, rng: np.random.Generator) -> list[Rater]:
    """Samples the panel's raters, including which of them are careless."""
    careless = rng.permutation(panel.raters) < round(panel.careless * panel.raters)
    sharpness = panel.sharpness * np.exp(rng.normal(0, 0.25, panel.raters))
    bias = rng.normal(0, panel.spread, panel.raters) if panel.spread else np.zeros(panel.raters)
    names = [hashlib.sha256(rng.bytes(16)).hexdigest()[:32] for _ in range(panel.raters)]
    columns = zip(names, sharpness, bias, careless, strict=True)
    return [Rater(name, float(s), float(b), bool(c)) for name, s, b, c in columns]


def simulate_answers(
    concept: str,
    kind: FeedbackKind,
    images: Sequence[OracleImage],
    raters: Sequence[Rater],
    panel: Panel,
    rng: np.random.Generator,
    *,
    model_version: str,
) -> list[FeedbackEvent]:
    """Simulates the panel's answers, in the order of a simulated clock. Deterministic given the generator's state.

    binary: each image is shown to `per_question` raters
    rank:   images of one prompt form screens of `screen`; each screen is shown to `per_question` raters, who order it
            by score + Gumbel noise (Plackett–Luce)
    """
    screens = [[s] for s in images] if kind == "binary" else list(_sample_screens(images, panel.screen, rng))
    events, clock = list[FeedbackEvent](), CLOCK_START
    for screen in screens:
        assigned = rng.choice(len(raters), size=min(panel.per_question, len(raters)), replace=False)
        for rater in (raters[j] for j in assigned):
            seconds = _sample_seconds(rater, len(screen), rng)
            clock += timedelta(seconds=max(1, round(seconds)))
            base = FeedbackEvent(
                event_id=rng.bytes(16).hex(),
                concept=concept,
                kind=kind,
                items=tuple(s.item for s in screen),
                prompt=screen[0].prompt,
                seed=screen[0].seed,
                model_version=model_version,
                rater=rater.name,
                answer="skip",
                source=SOURCE,
                created_at=clock.isoformat().replace("+00:00", "Z"),
                consent_version="simulated",
                seconds_spent=seconds,
            )
            events.append(replace(base, **_sample_answer(kind, screen, rater, panel, rng)))
    return events


def _sample_answer(
    kind: FeedbackKind, screen: Sequence[OracleImage], rater: Rater, panel: Panel, rng: np.random.Generator
) -> dict[str, Any]:
    """The fields in which the answer differs from a skip."""
    o = np.array([s.oracle for s in screen]).clip(1e-6, 1 - 1e-6)
    # Always sampled, so that one answer does not shift the random numbers of the next.
    u, noise = rng.random(2), rng.gumbel(size=len(screen))
    if u[0] < panel.skip:
        return {}
    if not rater.careless and kind == "binary" and u[0] < panel.skip + panel.unsure * 4 * o[0] * (1 - o[0]):
        return {"answer": "unsure"}
    score = np.zeros(len(screen)) if rater.careless else rater.sharpness * np.log(o / (1 - o)) + rater.bias
    if kind == "binary":
        return {"answer": "yes" if u[1] < 1 / (1 + np.exp(-score[0])) else "no"}
    return {"answer": "ranked", "ranks": _ranks(score + noise, np.zeros(len(o)) if rater.careless else panel.cut - o)}


def _ranks(scores: Array, below_cut: Array) -> tuple[int | None, ...]:
    """Ranks by score, 1 for the highest; "X" (None) where `below_cut` is positive."""
    is_x = below_cut > 0
    order = np.where(is_x, -np.inf, scores).argsort()[::-1]
    ranks = order.argsort() + 1
    return tuple(None if x else int(r) for x, r in zip(is_x, ranks, strict=True))


def _sample_seconds(rater: Rater, num_images: int, rng: np.random.Generator) -> float:
    """Log-normal around 3 s per image; a careless rater needs a fifth of that."""
    return round(float((0.6 if rater.careless else 3.0) * num_images * np.exp(rng.normal(0, 0.4))), 1)


def _sample_screens(images: Sequence[OracleImage], size: int, rng: np.random.Generator) -> Iterator[list[OracleImage]]:
    """Shuffled images of one prompt, `size` per screen; the last screen is filled up with images already shown."""
    by_prompt = dict[str, list[OracleImage]]()
    for image in images:
        by_prompt.setdefault(image.prompt, []).append(image)
    for group in by_prompt.values():
        if len(group) < 2:
            raise DataError(
                "expected two or more images of each prompt for a ranking, got one", hint="sample more per prompt"
            )
        shuffled = [group[i] for i in rng.permutation(len(group))]
        for start in range(0, len(shuffled), size):
            end = min(start + size, len(shuffled))
            yield shuffled[max(0, end - size) : end]
