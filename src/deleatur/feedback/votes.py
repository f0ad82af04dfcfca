"""Current answers → votes per image, ordered pairs per ranking screen, and the reliability of each rater.

Every function takes the table of answers (`events.EVENT_SCHEMA`), complete or filtered: for a subset of the raters,
everything is computed from their answers alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from deleatur.maths import agreement

VOTE_SCHEMA = pa.schema(
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
PAIR_SCHEMA = pa.schema(
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
RATER_SCHEMA = pa.schema(
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


def vote_table(answers: pd.DataFrame, raters: pd.DataFrame) -> pd.DataFrame:
    """One row per concept and image of a yes/no question.

    raters: number of yes and no answers; `unsure` and `skip` are counted separately
    mean:   share of yes
    vote:   share of yes with rater j weighted by w_j = max(0, 2p_j − 1):  Σ w_j v_j / Σ w_j;  `mean` if Σ w = 0
    weight: Σ w_j, the equivalent number of perfect raters

    `vote` is a weighted share, not the posterior of the EM, so that a debatable image keeps an intermediate value.
    Without any yes or no, `mean` and `vote` are missing.
    """
    rows = answers[answers["kind"] == "binary"]
    rows = rows.assign(item=rows["items"].map(lambda items: items[0]), w=_weights(rows, raters))
    rows = rows.assign(**{a: (rows["answer"] == a).astype("int64") for a in ("yes", "no", "unsure", "skip")})
    rows = rows.assign(wy=rows["w"] * rows["yes"], weight=rows["w"] * (rows["yes"] + rows["no"]))
    first = dict.fromkeys(("prompt", "seed", "model_version"), "first")
    sums = dict.fromkeys(("yes", "no", "unsure", "skip", "wy", "weight"), "sum")
    table = rows.groupby(["concept", "item"], sort=False).agg(first | sums).reset_index()
    table["raters"] = table["yes"] + table["no"]
    table["mean"] = table["yes"] / table["raters"].where(table["raters"] > 0)
    table["vote"] = (table["wy"] / table["weight"].where(table["weight"] > 0)).fillna(table["mean"])
    return table[list(VOTE_SCHEMA.names)]


def vote_shares(answers: pd.DataFrame, raters: pd.DataFrame) -> pd.Series[float]:
    """Image → weighted share of its raters who see the concept: a yes, or any rank but "X" in a ranking.

    Images without a yes, a no or a rank are left out.
    """
    ranked = answers[answers["answer"] == "ranked"].explode(["items", "ranks"])
    answer = np.where(ranked["ranks"].isna(), "no", "yes")
    as_binary = ranked.assign(kind="binary", answer=answer, items=ranked["items"].map(lambda item: [item]))
    table = vote_table(pd.concat([answers, as_binary]), raters).dropna(subset=["vote"])
    return table.set_index("item")["vote"]


def pair_table(answers: pd.DataFrame, raters: pd.DataFrame) -> pd.DataFrame:
    """All ordered pairs of each ranking: `higher` shows the concept more than `lower`.

    M images give M(M−1)/2 pairs. "X" ranks below every number; two images with an X form no pair.
    """
    pairs = _ordered_pairs(answers)
    return pairs.assign(weight=_weights(pairs, raters))[list(PAIR_SCHEMA.names)]


def rater_table(answers: pd.DataFrame) -> pd.DataFrame:
    """One row per concept and rater: number of answers, agreement with the other raters, and weight.

    A judgement is a yes or no about an image, or the order of two images of a screen.
    compared:  number of judgements that other raters made too
    agreement: share of these that match the majority of the others; missing without any
    accuracy:  p_j of the one-coin model of Dawid and Skene, fitted per concept
    weight:    max(0, 2p_j − 1)
    """
    judgements = _judgements(answers)
    fits = [_reliability(rows) for _, rows in judgements.groupby("concept", sort=False)]
    fit = pd.concat(fits) if fits else pd.DataFrame(columns=["concept", "rater", *RELIABILITY_COLUMNS])
    counts = answers.assign(
        unsure=answers["answer"] == "unsure",
        skip=answers["answer"] == "skip",
        simulated=answers["source"].str.startswith("simulated"),
    )
    table = counts.groupby(["concept", "rater"], sort=False).agg(
        simulated=("simulated", "any"),
        answers=("answer", "size"),
        unsure=("unsure", "sum"),
        skip=("skip", "sum"),
        median_seconds=("seconds_spent", "median"),
    )
    table = table.reset_index().merge(fit, on=["concept", "rater"], how="left")
    # A rater without a judgement has the prior's accuracy.
    prior = agreement.PRIOR_CORRECT / (agreement.PRIOR_CORRECT + agreement.PRIOR_INCORRECT)
    table["accuracy"] = table["accuracy"].astype("float64").fillna(prior)
    table["weight"] = agreement.vote_weight(table["accuracy"].to_numpy())
    table[["judgements", "compared"]] = table[["judgements", "compared"]].astype("float64").fillna(0).astype("int64")
    return table[list(RATER_SCHEMA.names)]


def rater_agreement(answers: pd.DataFrame, concept: str) -> dict[str, Any]:
    """Agreement on a concept: Krippendorff's α of yes/no answers, or mean Kendall τ of rankings; None if undefined."""
    rows = answers[answers["concept"] == concept]
    if (rows["kind"] == "rank").any():
        tau, n = agreement.mean_kendall_tau(_aligned_rankings(rows))
        return {"statistic": "mean pairwise Kendall tau-b", "value": _nan_to_none(tau), "rater_pairs": n}
    judgements = _judgements(rows)
    questions, shared = _factorize(judgements["question"]), judgements["question"].duplicated(keep=False)
    value = agreement.krippendorff_alpha(questions, judgements["vote"].to_numpy(np.int64))
    n = judgements["question"][shared].nunique()
    return {"statistic": "Krippendorff alpha, nominal", "value": _nan_to_none(value), "shared_images": n}


RELIABILITY_COLUMNS = ("judgements", "agreement", "compared", "accuracy")


def _reliability(judgements: pd.DataFrame) -> pd.DataFrame:
    """Reliability of the raters of one concept."""
    questions, (codes, names) = _factorize(judgements["question"]), pd.factorize(judgements["rater"])
    data = questions, codes.astype(np.int64), judgements["vote"].to_numpy(np.float64)
    share, compared = agreement.leave_one_out_agreement(*data)
    columns = [np.bincount(codes), share, compared, agreement.one_coin(*data).accuracy]
    reliability = dict(zip(RELIABILITY_COLUMNS, columns, strict=True))
    return pd.DataFrame({"concept": judgements["concept"].iloc[0], "rater": names, **reliability})


def _judgements(answers: pd.DataFrame) -> pd.DataFrame:
    """Every yes/no answer, and every ordered pair as one: does the image with the smaller digest show more?"""
    binary = answers[(answers["kind"] == "binary") & answers["answer"].isin(["yes", "no"])]
    binary = binary.assign(question=binary["items"].map(lambda items: items[0]), vote=binary["answer"] == "yes")
    ranked = _ordered_pairs(answers)
    first, second = np.minimum(ranked["higher"], ranked["lower"]), np.maximum(ranked["higher"], ranked["lower"])
    ranked = ranked.assign(question=first + " " + second, vote=ranked["higher"] == first)
    columns = ["concept", "question", "rater", "vote"]
    return pd.concat([binary[columns], ranked[columns]], ignore_index=True)


def _ordered_pairs(answers: pd.DataFrame) -> pd.DataFrame:
    ranked = answers[answers["answer"] == "ranked"]
    columns = ["concept", "event_id", "rater", "prompt"]
    pairs = [
        (*event, *((a, b) if rank_a < rank_b else (b, a)))
        for *event, items, ranks in ranked[[*columns, "items", "ranks"]].itertuples(index=False, name=None)
        for (a, rank_a), (b, rank_b) in combinations(zip(items, _ranks_as_floats(ranks), strict=True), 2)
        if rank_a != rank_b
    ]
    return pd.DataFrame(pairs, columns=[*columns, "higher", "lower"], dtype="str")


def _ranks_as_floats(ranks: Iterable[float | None]) -> list[float]:
    """Ranks as floats, "X" (None, or NaN after a round trip through Parquet) as infinity."""
    return [np.inf if pd.isna(rank) else float(rank) for rank in ranks]


def _aligned_rankings(answers: pd.DataFrame) -> list[list[agreement.Array]]:
    """Rankings grouped by their set of images, aligned by image."""
    ranked = answers[answers["answer"] == "ranked"]
    screens = dict[tuple[str, ...], list[agreement.Array]]()
    for items, ranks in zip(ranked["items"], ranked["ranks"], strict=True):
        by_item = sorted(zip(items, _ranks_as_floats(ranks), strict=True))
        screens.setdefault(tuple(i for i, _ in by_item), []).append(np.array([r for _, r in by_item]))
    return list(screens.values())


def _weights(rows: pd.DataFrame, raters: pd.DataFrame) -> pd.Series[float]:
    """The weight of each row's rater for the row's concept."""
    weights = raters.set_index(["concept", "rater"])["weight"]
    index = pd.MultiIndex.from_frame(rows[["concept", "rater"]])
    return pd.Series(weights.reindex(index).to_numpy(np.float64), index=rows.index)


def _factorize(values: pd.Series[Any]) -> agreement.Codes:
    return pd.factorize(values)[0].astype(np.int64)


def _nan_to_none(value: float) -> float | None:
    return None if np.isnan(value) else value
