"""Votes recover known shares, rankings give the expected pairs, careless raters get low weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import EventFactory, digest

from deleatur.feedback import events, votes
from deleatur.feedback.events import EventRow
from deleatur.feedback.simulated import OracleImage, Panel, sample_raters, simulate_answers
from deleatur.storage import files

Table = Callable[..., pd.DataFrame]


def test_votes_count_yes_and_no(event: EventFactory, table: Table) -> None:
    labels = ["yes", "yes", "no", "unsure", "skip"]
    answers = table(*(event(f"e{i}", rater=f"r{i}", answer=a) for i, a in enumerate(labels)))
    [row] = votes.vote_table(answers, votes.rater_table(answers)).to_dict("records")
    assert (row["item"], row["prompt"], row["seed"]) == (digest("p0"), "a prompt", 7)
    assert [row[c] for c in ("raters", "yes", "no", "unsure", "skip")] == [3, 2, 1, 1, 1]
    assert row["mean"] == pytest.approx(2 / 3)


def test_without_any_weight_the_vote_is_the_share(event: EventFactory, table: Table) -> None:
    answers = table(*(event(f"e{i}", rater=f"r{i}", answer=a) for i, a in enumerate(["yes", "yes", "no"])))
    [row] = votes.vote_table(answers, votes.rater_table(answers).assign(weight=0.0)).to_dict("records")
    assert (row["weight"], row["vote"]) == (0, pytest.approx(2 / 3))


def test_only_yes_and_no_are_judgements_and_one_simulated_answer_marks_a_rater(
    event: EventFactory, table: Table
) -> None:
    labels = {"yes": "app", "no": "simulated:x", "unsure": "app", "skip": "app"}
    questions = enumerate(labels.items())
    answers = table(*(event(f"e{i}", items=(digest(f"p{i}"),), answer=a, source=s) for i, (a, s) in questions))
    [row] = votes.rater_table(answers).to_dict("records")
    assert (row["answers"], row["judgements"], row["unsure"], row["skip"]) == (4, 2, 1, 1)
    assert row["simulated"]
    assert votes.rater_agreement(answers, "weapon")["value"] is None, "no question has two judgements"


def test_image_without_yes_or_no_has_no_vote(event: EventFactory, table: Table) -> None:
    answers = table(event(answer="unsure"))
    [row] = votes.vote_table(answers, votes.rater_table(answers)).to_dict("records")
    assert (row["raters"], row["weight"]) == (0, 0)
    assert np.isnan(row["vote"])
    assert np.isnan(row["mean"])


def test_vote_shares_computed_by_hand(event: EventFactory, table: Table, tmp_path: Path) -> None:
    """Yes, yes, no: two thirds. Ranked and X: half. X and X: zero. Skipped: missing."""
    answers = table(
        *(
            event(f"b{i}", rater=f"r{i}", items=(digest("binary"),), answer=a)
            for i, a in enumerate(["yes", "yes", "no"])
        ),
        event("s", items=(digest("skipped"),), answer="skip"),
        event("k0", kind="rank", concept="weapon", rater="r0", ranks=(1, 2, None, 3, 4)),
        event("k1", kind="rank", concept="weapon", rater="r1", ranks=(2, None, None, 1, None)),
    )
    files.write_table(tmp_path / "answers.parquet", answers, events.EVENT_SCHEMA)
    answers = files.read_table(tmp_path / "answers.parquet")
    equal_weights = votes.rater_table(answers).assign(weight=1.0)
    shares = votes.vote_shares(answers, equal_weights)
    assert shares[digest("binary")] == pytest.approx(2 / 3)
    assert [shares[digest(f"p{i}")] for i in range(5)] == [1, 0.5, 0, 1, 0.5]
    assert digest("skipped") not in shares.index
    assert len(shares) == 6


def test_ranking_of_five_gives_ten_pairs(event: EventFactory, table: Table) -> None:
    answers = table(event(kind="rank", ranks=(2, 1, 3, 5, 4)))
    pair_table = votes.pair_table(answers, votes.rater_table(answers))
    assert len(pair_table) == 10
    order = [digest(f"p{i}") for i in (1, 0, 2, 4, 3)]
    rank = {item: i for i, item in enumerate(order)}
    assert all(rank[high] < rank[low] for high, low in zip(pair_table["higher"], pair_table["lower"], strict=True))


@pytest.mark.parametrize("through_parquet", [False, True])
@pytest.mark.parametrize(("num_x", "pairs"), [(1, 10), (2, 9), (3, 7), (4, 4), (5, 0)])
def test_x_ranks_below_every_number_and_forms_no_pair_with_x(
    event: EventFactory, table: Table, tmp_path: Path, num_x: int, pairs: int, through_parquet: bool
) -> None:
    ranks = (None,) * num_x + tuple(range(1, 6 - num_x))
    answers = table(event(kind="rank", ranks=ranks))
    if through_parquet:
        files.write_table(tmp_path / "answers.parquet", answers, events.EVENT_SCHEMA)
        answers = files.read_table(tmp_path / "answers.parquet")
    pair_table = votes.pair_table(answers, votes.rater_table(answers))
    assert len(pair_table) == pairs
    assert not set(pair_table["higher"]) & {digest(f"p{i}") for i in range(num_x)}


def simulated(panel: Panel, n: int = 400) -> tuple[pd.DataFrame, np.ndarray, dict[str, bool]]:
    """Answers about n images, the oracle's probabilities, and whether each rater is careless."""
    rng = np.random.default_rng(11)
    oracle = rng.random(n)
    images = [OracleImage(digest(f"s{i}"), f"prompt {i % 20}", i, float(o)) for i, o in enumerate(oracle)]
    panel_raters = sample_raters(panel, rng)
    feedback = simulate_answers("weapon", "binary", images, panel_raters, panel, rng, model_version="base")
    answers = events.to_frame([EventRow("s.jsonl", i, e) for i, e in enumerate(feedback, 1)])
    return answers, oracle, {r.name: r.careless for r in panel_raters}


def test_votes_recover_known_shares() -> None:
    panel = Panel(raters=60, per_question=60, sharpness=1, spread=0, careless=0, unsure=0, skip=0)
    answers, oracle, _ = simulated(panel, n=60)
    vote_table = votes.vote_table(answers, votes.rater_table(answers))
    # Sixty coins of one share: standard deviation at most 0.065. s_j varies a little from rater to rater.
    assert np.abs(vote_table["mean"] - oracle).mean() < 0.06
    assert np.abs(vote_table["vote"] - oracle).mean() < 0.06


def test_careless_raters_get_low_weights_and_the_weighted_vote_beats_the_mean() -> None:
    answers, oracle, careless = simulated(Panel(raters=10, per_question=5, careless=0.4))
    raters = votes.rater_table(answers)
    is_careless = raters["rater"].map(careless).astype(bool)
    assert is_careless.sum() == 4
    assert raters.loc[is_careless, "weight"].max() < 0.5 * raters.loc[~is_careless, "weight"].min()
    assert raters.loc[is_careless, "agreement"].max() < raters.loc[~is_careless, "agreement"].min()
    vote_table, truth = votes.vote_table(answers, raters), oracle > 0.5
    assert ((vote_table["vote"] > 0.5) == truth).mean() > ((vote_table["mean"] > 0.5) == truth).mean() + 0.02
    expected = 1 / (1 + (1 / oracle - 1) ** 2)  # σ(2·logit o), the share without careless raters
    assert ((vote_table["vote"] - expected) ** 2).mean() < 0.8 * ((vote_table["mean"] - expected) ** 2).mean()
    assert votes.rater_agreement(answers, "weapon")["value"] > 0.1


def test_votes_of_a_subset_use_only_its_answers() -> None:
    answers, _, _ = simulated(Panel(), n=50)
    half = answers[answers["rater"] < sorted(answers["rater"].unique())[6]]
    raters = votes.rater_table(half)
    assert set(raters["rater"]) == set(half["rater"])
    assert votes.vote_table(half, raters)["raters"].sum() == half["answer"].isin(["yes", "no"]).sum()


def test_careless_raters_get_low_weights_in_rankings() -> None:
    rng, panel = np.random.default_rng(5), Panel(raters=6, per_question=6, careless=1 / 3, cut=0)
    oracle = rng.random(100)
    images = [OracleImage(digest(f"s{i}"), f"prompt {i % 4}", i, float(o)) for i, o in enumerate(oracle)]
    panel_raters = sample_raters(panel, rng)
    feedback = simulate_answers("style", "rank", images, panel_raters, panel, rng, model_version="base")
    answers = events.to_frame([EventRow("s.jsonl", i, e) for i, e in enumerate(feedback, 1)])
    raters, careless = votes.rater_table(answers), {r.name: r.careless for r in panel_raters}
    is_careless = raters["rater"].map(careless).astype(bool)
    assert raters.loc[is_careless, "weight"].max() < raters.loc[~is_careless, "weight"].min()
    assert 0.1 < votes.rater_agreement(answers, "style")["value"] < 1
    ordered = votes.pair_table(answers, raters)
    truth = {s.item: s.oracle for s in images}
    is_correct = ordered["higher"].map(truth) > ordered["lower"].map(truth)
    assert np.average(is_correct, weights=ordered["weight"]) > is_correct.mean() > 0.6


def test_no_answers_give_empty_tables(table: Table, tmp_path: Path) -> None:
    answers = table()
    raters = votes.rater_table(answers)
    for name, empty_table, schema in [
        ("raters", raters, votes.RATER_SCHEMA),
        ("votes", votes.vote_table(answers, raters), votes.VOTE_SCHEMA),
        ("pairs", votes.pair_table(answers, raters), votes.PAIR_SCHEMA),
    ]:
        files.write_table(tmp_path / name, empty_table, schema)
        assert list(files.read_table(tmp_path / name).columns) == schema.names
    assert votes.rater_agreement(answers, "weapon")["value"] is None
