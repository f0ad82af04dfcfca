"""Which evaluations of a training are acceptable."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from scipy import stats

from deleatur.training.early_stopping import Evaluation, acceptable, certain_drop, describe

BASE = [1.0, 0.8, 1.2, 1.0]


def row(step: int, scores: list[float], concept: float = 0.5) -> dict[str, Any]:
    return {"step": step, **asdict(Evaluation(concept, float(np.mean(scores)), 1.0, scores))}


def test_a_drop_counts_as_far_as_it_exceeds_noise() -> None:
    """By hand: differences .4, 0, .4, 0 have mean .2, standard deviation .2309 and standard error .1155."""
    noisy = row(1, [0.6, 0.8, 0.8, 1.0])
    assert certain_drop(row(0, BASE), noisy) == pytest.approx(0.2 - 1.645 * 0.11547, abs=1e-5)
    even = row(2, [score - 0.2 for score in BASE])
    assert certain_drop(row(0, BASE), even) == pytest.approx(0.2)
    assert acceptable([row(0, BASE), noisy, even], 0.1) == [noisy]


def test_the_bound_is_that_of_a_paired_test() -> None:
    """With many prompts, the normal bound is the t-test's."""
    rng = np.random.default_rng(0)
    before = rng.normal(0.5, 0.1, 400)
    after = before - rng.normal(0.06, 0.2, 400)
    interval = stats.ttest_rel(before, after).confidence_interval(0.9)
    bound = certain_drop(row(0, list(before)), row(1, list(after)))
    assert bound * before.mean() == pytest.approx(interval.low, abs=2e-4)


@pytest.mark.parametrize("scores", [[], [0.9]])
def test_without_scores_by_prompt_the_mean_alone_counts(scores: list[float]) -> None:
    base, last = asdict(Evaluation(1.0, 0.5)), asdict(Evaluation(0.1, 0.44, 1.0, scores))
    assert certain_drop(base, last) == pytest.approx(0.12)


def test_evaluations_are_described_with_their_drop_and_its_error() -> None:
    lines = describe([row(0, BASE, 0.97), row(120, [0.6, 0.8, 0.8, 1.0], 0.1)]).splitlines()
    assert lines[1:] == [
        "  step 0: concept 0.970, preserved 1.000, contrast 1.000",
        "  step 120: concept 0.100, preserved 0.800 (-20.0 ± 11.5 %), contrast 1.000",
    ]
