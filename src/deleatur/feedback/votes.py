"""Current answers → votes per picture, ordered pairs per screen, and how far each rater can be trusted.

Everything takes the table of answers (`events.SCHEMA`), whole or filtered: the tables of some raters only are made
from their answers only.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from deleatur.maths import agreement as statistics

VOTES = pa.schema(
    {
        "concept": pa.string(),
        "item": pa.string(),
        "prompt": pa.string(),
        "seed": pa.int64(),
        "model_version": pa.string(),
        "raters": pa.int64(),
        "yes": pa.int64(),
        "no": pa.int64(),
        "unsure": pa.int64(),
        "skip": pa.int64(),
        "mean": pa.float64(),
        "vote": pa.float64(),
        "weight": pa.float64(),
    }
)
PAIRS = pa.schema(
    {
        "concept": pa.string(),
        "event_id": pa.string(),
        "rater": pa.string(),
        "prompt": pa.string(),
        "higher": pa.string(),
        "lower": pa.string(),
        "weight": pa.float64(),
    }
)
RATERS = pa.schema(
    {
        "concept": pa.string(),
        "rater": pa.string(),
        "simulated": pa.bool_(),
        "answers": pa.int64(),
        "judgements": pa.int64(),
        "unsure": pa.int64(),
        "skip": pa.int64(),
        "median_seconds": pa.float64(),
        "agreement": pa.float64(),
        "compared": pa.int64(),
        "accuracy": pa.float64(),
        "weight": pa.float64(),
    }
)


def votes(answers: pd.DataFrame, raters: pd.DataFrame) -> pd.DataFrame:
    """One row per concept and picture of a yes/no question.

    raters: how many said yes or no; `unsure` and `skip` are counted beside, they are no votes
    mean:   share of yes
    vote:   the same, each rater j weighted by w_j = max(0, 2p_j − 1):  Σ w_j v_j / Σ w_j;  the plain mean if Σ w = 0
    weight: Σ w_j, the number of perfect raters that the vote is worth

    A weighted share and not the posterior of the EM: the share of a debatable picture stays debatable.
    Without any yes or no, `mean` and `vote` are missing.
    """
    rows = answers[answers["kind"] == "binary"]
    rows = rows.assign(item=rows["items"].map(lambda items: items[0]), w=_weights(rows, raters))
    rows = rows.assign(**{a: (rows["answer"] == a).astype("int64") for a in ("yes", "no", "unsure", "skip")})
    rows = rows.assign(wy=rows["w"] * rows["yes"], weight=rows["w"] * (rows["yes"] + rows["no"]))
    first = dict.fromkeys(("prompt", "seed", "model_version"), "first")
    sums = dict.fromkeys(("yes", "no", "unsure", "skip", "wy", "weight"), "sum")
    found = rows.groupby(["concept", "item"], sort=False).agg(first | sums).reset_index()
    found["raters"] = found["yes"] + found["no"]
    found["mean"] = found["yes"] / found["raters"].where(found["raters"] > 0)
    found["vote"] = (found["wy"] / found["weight"].where(found["weight"] > 0)).fillna(found["mean"])
    return found[list(VOTES.names)]


def seen(answers: pd.DataFrame, raters: pd.DataFrame) -> pd.Series[float]:
    """Picture → weighted share of its raters who see the concept there: a yes, or in a ranking any place but "X".

    Pictures that nobody judged are left out.
    """
    ranked = answers[answers["answer"] == "ranked"].explode(["items", "ranks"])
    yes = np.where(ranked["ranks"].isna(), "no", "yes")
    one_by_one = ranked.assign(kind="binary", answer=yes, items=ranked["items"].map(lambda item: [item]))
    found = votes(pd.concat([answers, one_by_one]), raters).dropna(subset=["vote"])
    return found.set_index("item")["vote"]


def pairs(answers: pd.DataFrame, raters: pd.DataFrame) -> pd.DataFrame:
    """All ordered pairs of each ranking: `higher` shows the concept more than `lower`.

    M pictures give M(M−1)/2 pairs. "X" stands below every number, and two X-s make no pair.
    """
    found = _pairs(answers)
    return found.assign(weight=_weights(found, raters))[list(PAIRS.names)]


def raters(answers: pd.DataFrame) -> pd.DataFrame:
    """One row per concept and rater: how much they answered, how well it fits the others, what it counts.

    A judgement is a yes or no about a picture, or the order of two pictures of a screen.
    agreement: share of judgements that most of the others who judged the same share (`compared` of them); missing
               when there were no others
    accuracy:  p_j of the one-coin model of Dawid and Skene, fitted per concept
    weight:    max(0, 2p_j − 1)
    """
    judged = _judgements(answers)
    fits = [_fit(rows) for _, rows in judged.groupby("concept", sort=False)]
    fit = pd.concat(fits) if fits else pd.DataFrame(columns=["concept", "rater", *FIT])
    counts = answers.assign(
        unsure=answers["answer"] == "unsure",
        skip=answers["answer"] == "skip",
        simulated=answers["source"].str.startswith("simulated"),
    )
    found = counts.groupby(["concept", "rater"], sort=False).agg(
        simulated=("simulated", "any"),
        answers=("answer", "size"),
        unsure=("unsure", "sum"),
        skip=("skip", "sum"),
        median_seconds=("seconds_spent", "median"),
    )
    found = found.reset_index().merge(fit, on=["concept", "rater"], how="left")
    # Whoever only ever skipped has shown nothing yet: the prior's accuracy.
    prior = statistics.RIGHT / (statistics.RIGHT + statistics.WRONG)
    found["accuracy"] = found["accuracy"].astype("float64").fillna(prior)
    found["weight"] = statistics.weight(found["accuracy"].to_numpy())
    found[["judgements", "compared"]] = found[["judgements", "compared"]].astype("float64").fillna(0).astype("int64")
    return found[list(RATERS.names)]


def agreement(answers: pd.DataFrame, concept: str) -> dict[str, Any]:
    """One number for a concept: Krippendorff's α of yes and no, or the mean Kendall τ of rankings; None if unknown."""
    rows = answers[answers["concept"] == concept]
    if (rows["kind"] == "rank").any():
        tau, n = statistics.mean_tau(_screens(rows))
        return {"measure": "mean pairwise Kendall tau-b", "value": _known(tau), "rater_pairs": n}
    judged = _judgements(rows)
    questions, shared = _codes(judged["question"]), judged["question"].duplicated(keep=False)
    value = statistics.alpha(questions, judged["vote"].to_numpy(np.int64))
    n = judged["question"][shared].nunique()
    return {"measure": "Krippendorff alpha, nominal", "value": _known(value), "shared_pictures": n}


FIT = ("judgements", "agreement", "compared", "accuracy")


def _fit(judged: pd.DataFrame) -> pd.DataFrame:
    """Reliability of the raters of one concept."""
    questions, (codes, names) = _codes(judged["question"]), pd.factorize(judged["rater"])
    data = questions, codes.astype(np.int64), judged["vote"].to_numpy(np.float64)
    share, compared = statistics.leave_one_out(*data)
    columns = [np.bincount(codes), share, compared, statistics.one_coin(*data).accuracy]
    return pd.DataFrame({"concept": judged["concept"].iloc[0], "rater": names, **dict(zip(FIT, columns, strict=True))})


def _judgements(answers: pd.DataFrame) -> pd.DataFrame:
    """Every yes or no, and every ordered pair as a yes or no: does the picture of the smaller digest show more?"""
    binary = answers[(answers["kind"] == "binary") & answers["answer"].isin(["yes", "no"])]
    binary = binary.assign(question=binary["items"].map(lambda items: items[0]), vote=binary["answer"] == "yes")
    ranked = _pairs(answers)
    small, large = np.minimum(ranked["higher"], ranked["lower"]), np.maximum(ranked["higher"], ranked["lower"])
    ranked = ranked.assign(question=small + " " + large, vote=ranked["higher"] == small)
    columns = ["concept", "question", "rater", "vote"]
    return pd.concat([binary[columns], ranked[columns]], ignore_index=True)


def _pairs(answers: pd.DataFrame) -> pd.DataFrame:
    ranked = answers[answers["answer"] == "ranked"]
    columns = ["concept", "event_id", "rater", "prompt"]
    found = [
        (*who, *((a, b) if rank_a < rank_b else (b, a)))
        for *who, items, ranks in ranked[[*columns, "items", "ranks"]].itertuples(index=False, name=None)
        for (a, rank_a), (b, rank_b) in combinations(zip(items, _numbers(ranks), strict=True), 2)
        if rank_a != rank_b
    ]
    return pd.DataFrame(found, columns=[*columns, "higher", "lower"], dtype="str")


def _numbers(ranks: Iterable[float | None]) -> list[float]:
    """Ranks with "X" (None, or NaN once it has been through a file) below every number."""
    return [np.inf if pd.isna(rank) else float(rank) for rank in ranks]


def _screens(answers: pd.DataFrame) -> list[list[statistics.Array]]:
    """Rankings of the same pictures, aligned by picture."""
    ranked = answers[answers["answer"] == "ranked"]
    screens = dict[tuple[str, ...], list[statistics.Array]]()
    for items, ranks in zip(ranked["items"], ranked["ranks"], strict=True):
        by_item = sorted(zip(items, _numbers(ranks), strict=True))
        screens.setdefault(tuple(i for i, _ in by_item), []).append(np.array([r for _, r in by_item]))
    return list(screens.values())


def _weights(rows: pd.DataFrame, raters: pd.DataFrame) -> pd.Series[float]:
    """The weight of each row's rater for the row's concept."""
    weights = raters.set_index(["concept", "rater"])["weight"]
    index = pd.MultiIndex.from_frame(rows[["concept", "rater"]])
    return pd.Series(weights.reindex(index).to_numpy(np.float64), index=rows.index)


def _codes(values: pd.Series[Any]) -> statistics.Codes:
    return pd.factorize(values)[0].astype(np.int64)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value
