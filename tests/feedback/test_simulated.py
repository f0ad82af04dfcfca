"""Simulated raters give ordinary events, the same ones for the same seed, and never hide what they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import digest

from deleatur.errors import DataError
from deleatur.feedback import events
from deleatur.feedback.simulated import Panel, Shown, rate, recruit
from deleatur.records.feedback import Feedback, Kind


def answers(kind: Kind, panel: Panel, *, n: int = 60, prompts: int = 4, seed: int = 1) -> list[Feedback]:
    rng = np.random.default_rng(seed)
    shown = [Shown(digest(f"s{i}"), f"prompt {i % prompts}", i, (i + 0.5) / n) for i in range(n)]
    return rate("c", kind, shown, recruit(panel, rng), panel, rng, model_version="base")


@pytest.mark.parametrize("kind", ["binary", "rank"])
def test_the_same_seed_gives_the_same_events(kind: Kind) -> None:
    first = answers(kind, Panel())
    assert first == answers(kind, Panel())
    assert first != answers(kind, Panel(), seed=2)
    assert all(e.source.startswith("simulated:") for e in first)
    assert len({e.event_id for e in first}) == len(first)
    parsed = events.parse({"s.jsonl": [events.to_json(e).encode() for e in first]})
    assert [row.event for row in parsed.rows] == first


def test_each_picture_is_seen_by_so_many_raters() -> None:
    found = answers("binary", Panel(raters=7, per_question=4))
    assert set(Counter(e.items for e in found).values()) == {4}
    assert len({(e.items, e.rater) for e in found}) == len(found)
    assert len({e.rater for e in found}) == 7


def test_unsure_and_skip_come_at_their_rates() -> None:
    panel = Panel(unsure=0.3, skip=0.1, careless=0, per_question=12)
    share = Counter(e.answer for e in answers("binary", panel, n=300))
    assert share["skip"] / share.total() == pytest.approx(0.1, abs=0.02)
    assert share["unsure"] / share.total() == pytest.approx(0.2, abs=0.02)  # the mean of 4·o·(1−o) over [0, 1] is 2/3


def test_screens_hold_five_pictures_of_one_prompt_and_cross_out_what_is_under_the_cut() -> None:
    found = [e for e in answers("rank", Panel(skip=0, careless=0, cut=0.3), n=62) if e.ranks]
    assert {len(e.items) for e in found} == {5}
    assert {len(set(e.items)) for e in found} == {5}
    of = {digest(f"s{i}"): i for i in range(62)}
    for e in found:
        assert e.ranks is not None
        assert {f"prompt {of[item] % 4}" for item in e.items} == {e.prompt}
        assert [r is None for r in e.ranks] == [(of[item] + 0.5) / 62 < 0.3 for item in e.items]
        numbers = [r for r in e.ranks if r is not None]
        assert sorted(numbers) == list(range(1, len(numbers) + 1))


def test_a_ranking_needs_two_pictures_of_a_prompt() -> None:
    with pytest.raises(DataError, match="two or more pictures"):
        answers("rank", Panel(), n=3, prompts=3)


def test_careless_raters_ignore_the_picture_and_hurry() -> None:
    panel, rng = Panel(raters=4, per_question=4, careless=0.5, unsure=0, skip=0), np.random.default_rng(0)
    who = recruit(panel, rng)
    sure = [Shown(digest(f"s{i}"), "prompt", i, 0.999) for i in range(200)]
    found = rate("c", "binary", sure, who, replace(panel, spread=0), rng, model_version="base")
    for rater in who:
        own = [e for e in found if e.rater == rater.name]
        yes = np.mean([e.answer == "yes" for e in own])
        seconds = np.median([e.seconds_spent for e in own])
        assert (0.35 < yes < 0.65 and seconds < 1) if rater.careless else (yes > 0.97 and seconds > 2)
