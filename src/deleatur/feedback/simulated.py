"""Raters made of dice: an oracle's probabilities → ordinary feedback events, careless raters included.

They exist so that the chain can be tried and tested without asking anybody. Their `source` always starts with
"simulated:", every summary, report and verdict made from them says so.
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
from deleatur.records.feedback import Feedback, Kind

Array = NDArray[np.float64]

STARTED = datetime(2024, 1, 1, 9, tzinfo=UTC)  # a made-up clock, so that the same seed gives the same bytes
SOURCE = "simulated:logistic"


@dataclass(frozen=True)
class Panel:
    """Who is asked, and how good they are.

    A careful rater j says yes with probability σ(s_j · logit(o) + b_j), o being the oracle's probability: the sign of
    s_j·logit(o) + b_j + logistic noise. With sharpness 1 and spread 0 the share of yes is the oracle's probability.
    """

    raters: int = 12
    per_question: int = 3
    """How many of them see each picture or screen."""
    sharpness: float = 2.0
    """Median of s_j over the raters (log-normal, σ 0.25)."""
    spread: float = 0.3
    """Standard deviation of the bias b_j, in logits."""
    careless: float = 0.1
    """Share of raters who answer at random."""
    unsure: float = 0.1
    """Probability of "unsure" at an oracle of 0.5; it falls to 0 towards the sure ends, as 4·o·(1−o)."""
    skip: float = 0.02
    screen: int = 5
    """Pictures on a ranking screen (M)."""
    cut: float = 0.2
    """Pictures whose oracle is below get an X in a ranking."""


@dataclass(frozen=True)
class Rater:
    name: str
    """A hash, like that of a person."""
    sharpness: float
    bias: float
    careless: bool


@dataclass(frozen=True)
class Shown:
    """One picture that was rated: its digest, the recipe it came from, and what the oracle thinks of it."""

    item: str
    prompt: str
    seed: int
    oracle: float


def recruit(panel: Panel, rng: np.random.Generator) -> list[Rater]:
    """The panel's raters; which of them are careless is drawn too."""
    careless = rng.permutation(panel.raters) < round(panel.careless * panel.raters)
    sharpness = panel.sharpness * np.exp(rng.normal(0, 0.25, panel.raters))
    bias = rng.normal(0, panel.spread, panel.raters) if panel.spread else np.zeros(panel.raters)
    names = [hashlib.sha256(rng.bytes(16)).hexdigest()[:32] for _ in range(panel.raters)]
    columns = zip(names, sharpness, bias, careless, strict=True)
    return [Rater(name, float(s), float(b), bool(c)) for name, s, b, c in columns]


def rate(
    concept: str,
    kind: Kind,
    shown: Sequence[Shown],
    raters: Sequence[Rater],
    panel: Panel,
    rng: np.random.Generator,
    *,
    model_version: str,
) -> list[Feedback]:
    """What the raters answer, in the order of a made-up clock. The same generator state gives the same events.

    binary: each picture is seen by `per_question` of the raters
    rank:   pictures of one prompt make screens of `screen`; each screen is seen by `per_question` of the raters, who
            order it by score + Gumbel noise (Plackett–Luce)
    """
    screens = [[s] for s in shown] if kind == "binary" else list(_screens(shown, panel.screen, rng))
    found, clock = list[Feedback](), STARTED
    for screen in screens:
        seen_by = rng.choice(len(raters), size=min(panel.per_question, len(raters)), replace=False)
        for rater in (raters[j] for j in seen_by):
            seconds = _seconds(rater, len(screen), rng)
            clock += timedelta(seconds=max(1, round(seconds)))
            base = Feedback(
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
            found.append(replace(base, **_answer(kind, screen, rater, panel, rng)))
    return found


def _answer(
    kind: Kind, screen: Sequence[Shown], rater: Rater, panel: Panel, rng: np.random.Generator
) -> dict[str, Any]:
    """What differs from a skip."""
    o = np.array([s.oracle for s in screen]).clip(1e-6, 1 - 1e-6)
    dice, noise = rng.random(2), rng.gumbel(size=len(screen))  # drawn always, so that one answer shifts no other
    if dice[0] < panel.skip:
        return {}
    if not rater.careless and kind == "binary" and dice[0] < panel.skip + panel.unsure * 4 * o[0] * (1 - o[0]):
        return {"answer": "unsure"}
    score = np.zeros(len(screen)) if rater.careless else rater.sharpness * np.log(o / (1 - o)) + rater.bias
    if kind == "binary":
        return {"answer": "yes" if dice[1] < 1 / (1 + np.exp(-score[0])) else "no"}
    return {"answer": "ranked", "ranks": _ranks(score + noise, np.zeros(len(o)) if rater.careless else panel.cut - o)}


def _ranks(noisy: Array, under: Array) -> tuple[int | None, ...]:
    """1 for the highest, "X" (None) where `under` is positive."""
    crossed = under > 0
    order = np.where(crossed, -np.inf, noisy).argsort()[::-1]
    place = order.argsort() + 1
    return tuple(None if x else int(r) for x, r in zip(crossed, place, strict=True))


def _seconds(rater: Rater, pictures: int, rng: np.random.Generator) -> float:
    """Log-normal around 3 s a picture; who does not look is done in a fifth of that."""
    return round(float((0.6 if rater.careless else 3.0) * pictures * np.exp(rng.normal(0, 0.4))), 1)


def _screens(shown: Sequence[Shown], size: int, rng: np.random.Generator) -> Iterator[list[Shown]]:
    """Shuffled pictures of one prompt, `size` a screen; the last one is filled up with pictures shown before."""
    prompts = dict[str, list[Shown]]()
    for s in shown:
        prompts.setdefault(s.prompt, []).append(s)
    for pictures in prompts.values():
        if len(pictures) < 2:
            raise DataError(
                "a ranking needs two or more pictures of each prompt, got one", hint="sample more per prompt"
            )
        mixed = [pictures[i] for i in rng.permutation(len(pictures))]
        for start in range(0, len(mixed), size):
            end = min(start + size, len(mixed))
            yield mixed[max(0, end - size) : end]
