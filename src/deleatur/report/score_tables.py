"""Scores grouped into the tables of the HTML report, one per metric and detector."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import get_args

from markupsafe import Markup

from deleatur.gate import RuleEvaluation
from deleatur.records.report import DetectorInfo, Score
from deleatur.records.sampling import Role, Variant
from deleatur.report import plots


@dataclass(frozen=True)
class ScoreRow:
    """One score as text, and its interval plot."""

    score: Score
    value: str
    low: str
    high: str
    plot: Markup


@dataclass(frozen=True)
class ScoreTable:
    """All scores of one metric by one detector that share an axis: absolute values, or paired differences."""

    metric: str
    detector: DetectorInfo | None
    is_paired: bool
    higher_is_better: bool
    ticks: Markup
    slices: tuple[tuple[str, tuple[ScoreRow, ...]], ...]


def score_tables(scores: Sequence[Score], evaluations: Sequence[RuleEvaluation]) -> Iterator[ScoreTable]:
    """Metrics in the order of the role they are first measured on. evaluations: whose limits are drawn as well."""
    first = {s.metric: min(reading_order(other) for other in scores if other.metric == s.metric) for s in scores}

    def table_key(score: Score) -> tuple[object, ...]:
        return first[score.metric], score.metric, repr(score.detector), score.versus is not None

    for (*_, is_paired), group in groupby(sorted(scores, key=table_key), table_key):
        rows = sorted(group, key=reading_order)
        thresholds = {s: sorted({threshold(e) for e in evaluations if e.score == s}) for s in rows}
        values = [x for s in rows for x in (s.low, s.high, *thresholds[s])]
        limits = plots.axis_limits([*values, 0.0] if is_paired else values)
        slices = tuple(
            (name, tuple(_score_row(s, limits, thresholds[s]) for s in of_slice))
            for name, of_slice in groupby(rows, lambda s: s.slice)
        )
        ticks = plots.axis_ticks(limits)
        yield ScoreTable(rows[0].metric, rows[0].detector, bool(is_paired), rows[0].higher_is_better, ticks, slices)


def rule_plot(evaluation: RuleEvaluation) -> Markup:
    """The score that decides a rule, with the rule's limit."""
    score, limit = evaluation.score, threshold(evaluation)
    values = [score.low, score.high, limit, *([0.0] if score.versus else [])]
    return plots.interval(score, plots.axis_limits(values), [limit], captions=True)


def threshold(evaluation: RuleEvaluation) -> float:
    """The strictest limit of the rule, in the units of the score."""
    return evaluation.sign * evaluation.limits[0]


def reading_order(score: Score) -> tuple[int, str, int]:
    """The concept first, then what must survive; the base model before the candidate."""
    role = score.slice.split("/")[0]
    roles: tuple[str, ...] = get_args(Role)
    return roles.index(role) if role in roles else len(roles), score.slice, get_args(Variant).index(score.variant)


def _score_row(score: Score, limits: tuple[float, float], thresholds: Sequence[float]) -> ScoreRow:
    digits = plots.decimals(limits)
    value, low, high = (f"{x:.{digits}f}".replace("-", "−") for x in (score.value, score.low, score.high))
    return ScoreRow(score, value, low, high, plots.interval(score, limits, thresholds))
