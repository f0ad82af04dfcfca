"""Votes recover known shares, rankings give the pairs they should, careless raters count little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Make, digest

from deleatur.feedback import events, votes
from deleatur.feedback.events import Row
from deleatur.feedback.simulated import Panel, Shown, rate, recruit
from deleatur.storage import files

Table = Callable[..., pd.DataFrame]


def test_votes_count_what_is_a_vote(event: Make, table: Table) -> None:
    given = ["yes", "yes", "no", "unsure", "skip"]
    answers = table(*(event(f"e{i}", rater=f"r{i}", answer=a) for i, a in enumerate(given)))
    [row] = votes.votes(answers, votes.raters(answers)).to_dict("records")
    assert (row["item"], row["prompt"], row["seed"]) == (digest("p0"), "a prompt", 7)
    assert [row[c] for c in ("raters", "yes", "no", "unsure", "skip")] == [3, 2, 1, 1, 1]
    assert row["mean"] == pytest.approx(2 / 3)


def test_a_picture_that_everybody_skips_has_no_vote(event: Make, table: Table) -> None:
    answers = table(event(answer="unsure"))
    [row] = votes.votes(answers, votes.raters(answers)).to_dict("records")
    assert (row["raters"], row["weight"]) == (0, 0)
    assert np.isnan(row["vote"])
    assert np.isnan(row["mean"])


def test_what_raters_see_in_a_picture_by_hand(event: Make, table: Table, tmp_path: Path) -> None:
    """Yes, yes, no: two thirds. Ranked second and X: half. X and X: nobody. Skipped: nothing is known."""
    answers = table(
        *(
            event(f"b{i}", rater=f"r{i}", items=(digest("asked"),), answer=a)
            for i, a in enumerate(["yes", "yes", "no"])
        ),
        event("s", items=(digest("skipped"),), answer="skip"),
        event("k0", kind="rank", concept="weapon", rater="r0", ranks=(1, 2, None, 3, 4)),
        event("k1", kind="rank", concept="weapon", rater="r1", ranks=(2, None, None, 1, None)),
    )
    files.write_table(tmp_path / "answers.parquet", answers, events.SCHEMA)
    answers = files.read_table(tmp_path / "answers.parquet")
    equal = votes.raters(answers).assign(weight=1.0)
    seen = votes.seen(answers, equal)
    assert seen[digest("asked")] == pytest.approx(2 / 3)
    assert [seen[digest(f"p{i}")] for i in range(5)] == [1, 0.5, 0, 1, 0.5]
    assert digest("skipped") not in seen.index
    assert len(seen) == 6


def test_a_full_screen_of_five_gives_ten_pairs(event: Make, table: Table) -> None:
    answers = table(event(kind="rank", ranks=(2, 1, 3, 5, 4)))
    found = votes.pairs(answers, votes.raters(answers))
    assert len(found) == 10
    order = [digest(f"p{i}") for i in (1, 0, 2, 4, 3)]
    places = {item: place for place, item in enumerate(order)}
    assert all(places[high] < places[low] for high, low in zip(found["higher"], found["lower"], strict=True))


@pytest.mark.parametrize("through_a_file", [False, True])
@pytest.mark.parametrize(("crossed", "pairs"), [(1, 10), (2, 9), (3, 7), (4, 4), (5, 0)])
def test_x_is_below_every_number_and_pairs_with_no_x(
    event: Make, table: Table, tmp_path: Path, crossed: int, pairs: int, through_a_file: bool
) -> None:
    ranks = (None,) * crossed + tuple(range(1, 6 - crossed))
    answers = table(event(kind="rank", ranks=ranks))
    if through_a_file:
        files.write_table(tmp_path / "answers.parquet", answers, events.SCHEMA)
        answers = files.read_table(tmp_path / "answers.parquet")
    found = votes.pairs(answers, votes.raters(answers))
    assert len(found) == pairs
    assert not set(found["higher"]) & {digest(f"p{i}") for i in range(crossed)}


def simulated(panel: Panel, n: int = 400) -> tuple[pd.DataFrame, np.ndarray, dict[str, bool]]:
    """Answers about n pictures, what the oracle thinks of them, and who was careless."""
    rng = np.random.default_rng(11)
    oracle = rng.random(n)
    shown = [Shown(digest(f"s{i}"), f"prompt {i % 20}", i, float(o)) for i, o in enumerate(oracle)]
    who = recruit(panel, rng)
    found = rate("weapon", "binary", shown, who, panel, rng, model_version="base")
    answers = events.table([Row("s.jsonl", i, e) for i, e in enumerate(found, 1)])
    return answers, oracle, {r.name: r.careless for r in who}


def test_votes_recover_known_shares() -> None:
    panel = Panel(raters=60, per_question=60, sharpness=1, spread=0, careless=0, unsure=0, skip=0)
    answers, oracle, _ = simulated(panel, n=60)
    found = votes.votes(answers, votes.raters(answers))
    # Sixty coins of one share: standard deviation at most 0.065. s_j varies a little from rater to rater.
    assert np.abs(found["mean"] - oracle).mean() < 0.06
    assert np.abs(found["vote"] - oracle).mean() < 0.06


def test_careless_raters_are_visible_and_the_weighted_vote_beats_the_plain_mean() -> None:
    answers, oracle, careless = simulated(Panel(raters=10, per_question=5, careless=0.4))
    raters = votes.raters(answers)
    bad = raters["rater"].map(careless).astype(bool)
    assert bad.sum() == 4
    assert raters.loc[bad, "weight"].max() < 0.5 * raters.loc[~bad, "weight"].min()
    assert raters.loc[bad, "agreement"].max() < raters.loc[~bad, "agreement"].min()
    found, truth = votes.votes(answers, raters), oracle > 0.5
    assert ((found["vote"] > 0.5) == truth).mean() > ((found["mean"] > 0.5) == truth).mean() + 0.02
    careful = 1 / (1 + (1 / oracle - 1) ** 2)  # σ(2·logit o), what the share would be without the careless
    assert ((found["vote"] - careful) ** 2).mean() < 0.8 * ((found["mean"] - careful) ** 2).mean()
    assert votes.agreement(answers, "weapon")["value"] > 0.1


def test_votes_of_some_raters_come_from_their_answers_only() -> None:
    answers, _, _ = simulated(Panel(), n=50)
    half = answers[answers["rater"] < sorted(answers["rater"].unique())[6]]
    raters = votes.raters(half)
    assert set(raters["rater"]) == set(half["rater"])
    assert votes.votes(half, raters)["raters"].sum() == half["answer"].isin(["yes", "no"]).sum()


def test_rankings_show_careless_raters_too() -> None:
    rng, panel = np.random.default_rng(5), Panel(raters=6, per_question=6, careless=1 / 3, cut=0)
    oracle = rng.random(100)
    shown = [Shown(digest(f"s{i}"), f"prompt {i % 4}", i, float(o)) for i, o in enumerate(oracle)]
    who = recruit(panel, rng)
    found = rate("style", "rank", shown, who, panel, rng, model_version="base")
    answers = events.table([Row("s.jsonl", i, e) for i, e in enumerate(found, 1)])
    raters, careless = votes.raters(answers), {r.name: r.careless for r in who}
    bad = raters["rater"].map(careless).astype(bool)
    assert raters.loc[bad, "weight"].max() < raters.loc[~bad, "weight"].min()
    assert 0.1 < votes.agreement(answers, "style")["value"] < 1
    ordered = votes.pairs(answers, raters)
    truth = {s.item: s.oracle for s in shown}
    right = ordered["higher"].map(truth) > ordered["lower"].map(truth)
    assert np.average(right, weights=ordered["weight"]) > right.mean() > 0.6


def test_no_answers_give_empty_tables(table: Table, tmp_path: Path) -> None:
    answers = table()
    raters = votes.raters(answers)
    for name, found, schema in [
        ("raters", raters, votes.RATERS),
        ("votes", votes.votes(answers, raters), votes.VOTES),
        ("pairs", votes.pairs(answers, raters), votes.PAIRS),
    ]:
        files.write_table(tmp_path / name, found, schema)
        assert list(files.read_table(tmp_path / name).columns) == schema.names
    assert votes.agreement(answers, "weapon")["value"] is None
