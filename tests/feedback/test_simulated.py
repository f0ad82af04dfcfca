"""Simulated raters produce ordinary events, deterministic per seed and marked as simulated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import digest

from deleatur.errors import DataError
from deleatur.feedback import events
from deleatur.feedback.simulated import OracleImage, Panel, sample_raters, simulate_answers
from deleatur.records.feedback import FeedbackEvent, FeedbackKind


def answers(kind: FeedbackKind, panel: Panel, *, n: int = 60, prompts: int = 4, seed: int = 1) -> list[FeedbackEvent]:
    rng = np.random.default_rng(seed)
    images = [OracleImage(digest(f"s{i}"), f"prompt {i % prompts}", i, (i + 0.5) / n) for i in range(n)]
    return simulate_answers("c", kind, images, sample_raters(panel, rng), panel, rng, model_version="base")


@pytest.mark.parametrize("kind", ["binary", "rank"])
def test_the_same_seed_gives_the_same_events(kind: FeedbackKind) -> None:
    first = answers(kind, Panel())
    assert first == answers(kind, Panel())
    assert first != answers(kind, Panel(), seed=2)
    assert all(e.source.startswith("simulated:") for e in first)
    assert len({e.event_id for e in first}) == len(first)
    parsed = events.parse({"s.jsonl": [events.to_json(e).encode() for e in first]})
    assert [row.event for row in parsed.rows] == first


@pytest.mark.parametrize("kind", ["binary", "rank"])
def test_an_answer_does_not_shift_the_random_numbers_of_the_next(kind: FeedbackKind) -> None:
    """With and without skips, the same raters see the same images at the same times."""
    some, none = (answers(kind, Panel(skip=skip, unsure=0.0)) for skip in (0.5, 0.0))
    assert any(e.answer == "skip" for e in some)
    for skipped, answered in zip(some, none, strict=True):
        result = {"answer": answered.answer, "ranks": answered.ranks}
        assert replace(skipped, **result) == answered
        assert skipped.answer in ("skip", answered.answer)


def test_each_image_is_rated_by_per_question_raters() -> None:
    feedback = answers("binary", Panel(raters=7, per_question=4))
    assert set(Counter(e.items for e in feedback).values()) == {4}
    assert len({(e.items, e.rater) for e in feedback}) == len(feedback)
    assert len({e.rater for e in feedback}) == 7


def test_unsure_and_skip_occur_at_their_rates() -> None:
    panel = Panel(unsure=0.3, skip=0.1, careless=0, per_question=12)
    share = Counter(e.answer for e in answers("binary", panel, n=300))
    assert share["skip"] / share.total() == pytest.approx(0.1, abs=0.02)
    assert share["unsure"] / share.total() == pytest.approx(0.2, abs=0.02)  # the mean of 4·o·(1−o) over [0, 1] is 2/3


def test_screens_have_five_images_of_one_prompt_and_x_below_the_cut() -> None:
    feedback = [e for e in answers("rank", Panel(skip=0, careless=0, cut=0.3), n=62) if e.ranks]
    assert {len(e.items) for e in feedback} == {5}
    assert {len(set(e.items)) for e in feedback} == {5}
    index = {digest(f"s{i}"): i for i in range(62)}
    for e in feedback:
        assert e.ranks is not None
        assert {f"prompt {index[item] % 4}" for item in e.items} == {e.prompt}
        assert [r is None for r in e.ranks] == [(index[item] + 0.5) / 62 < 0.3 for item in e.items]
        ranks = [r for r in e.ranks if r is not None]
        assert sorted(ranks) == list(range(1, len(ranks) + 1))


def test_ranking_needs_two_images_of_a_prompt() -> None:
    with pytest.raises(DataError, match="two or more images"):
        answers("rank", Panel(), n=3, prompts=3)


def test_careless_raters_answer_at_random_and_fast() -> None:
    panel, rng = Panel(raters=4, per_question=4, careless=0.5, unsure=0, skip=0), np.random.default_rng(0)
    raters = sample_raters(panel, rng)
    images = [OracleImage(digest(f"s{i}"), "prompt", i, 0.999) for i in range(200)]
    feedback = simulate_answers("c", "binary", images, raters, replace(panel, spread=0), rng, model_version="base")
    for rater in raters:
        answers_of_rater = [e for e in feedback if e.rater == rater.name]
        yes_share = np.mean([e.answer == "yes" for e in answers_of_rater])
        seconds = np.median([e.seconds_spent for e in answers_of_rater])
        assert (0.35 < yes_share < 0.65 and seconds < 1) if rater.careless else (yes_share > 0.97 and seconds > 2)
