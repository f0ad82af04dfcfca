"""Agreement coefficients against published examples; unreliable raters lose weight."""

from __future__ import annotations

import krippendorff
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from deleatur.maths import agreement

# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): B, two observers, worked by hand; D, four, with gaps.
B = ["0100000010", "1110010000"]
D = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
# The example of the encyclopedia's article: three coders, fifteen units, with gaps.
E = [".....34121133.3", "1.213343.......", "..21344.21133.4"]


def ratings(lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(unit, int(c)) for line in lines for unit, c in enumerate(line) if c != "."]
    units, values = np.array(pairs).T
    return units, values


@pytest.mark.parametrize(("lines", "published"), [(B, 0.095), (D, 0.743), (E, 0.691)])
def test_alpha_equals_the_published_value(lines: list[str], published: float) -> None:
    assert agreement.krippendorff_alpha(*ratings(lines)) == pytest.approx(published, abs=5e-4)


def test_alpha_of_perfect_agreement_and_undefined_cases() -> None:
    assert agreement.krippendorff_alpha(*ratings(["0110", "0110"])) == 1
    assert agreement.krippendorff_alpha(*ratings(["01", "10"])) < 0
    assert np.isnan(agreement.krippendorff_alpha(*ratings(["01..", "..10"])))  # no unit was rated twice
    assert np.isnan(agreement.krippendorff_alpha(*ratings(["11", "11"])))  # all values equal
    assert np.isnan(agreement.krippendorff_alpha(np.array([], int), np.array([], int)))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=60))
def test_alpha_equals_the_package_krippendorff(rated: list[tuple[int, int]]) -> None:
    units, values = np.array(rated).T
    counts = np.zeros((10, 3))
    np.add.at(counts, (units, values), 1)
    shared = counts[counts.sum(1) >= 2]
    assume(np.count_nonzero(shared.sum(0)) > 1)
    known = krippendorff.alpha(value_counts=shared, level_of_measurement="nominal")
    assert agreement.krippendorff_alpha(units, values) == pytest.approx(known)


def test_kendall_tau_of_rankings() -> None:
    same, reverse, one_x = np.array([1.0, 2, 3]), np.array([3.0, 2, 1]), np.array([1, 2, np.inf])
    crossed = np.full(3, np.inf)
    assert agreement.mean_kendall_tau([[same, same]]) == (pytest.approx(1), 1)
    assert agreement.mean_kendall_tau([[same, reverse], [same, one_x]]) == (pytest.approx(0), 2)
    assert agreement.mean_kendall_tau([[same, reverse, same]])[0] == pytest.approx(-1 / 3)
    value, pairs = agreement.mean_kendall_tau([[same, crossed], [reverse]])
    assert np.isnan(value)
    assert pairs == 0


def test_kendall_tau_equals_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.permutation(5) + 1.0, rng.permutation(5) + 1.0
        a[rng.random(5) < 0.3], b[:1] = np.inf, np.inf
        known = stats.kendalltau(np.nan_to_num(a, posinf=9), np.nan_to_num(b, posinf=9)).statistic
        assert agreement.mean_kendall_tau([[a, b]])[0] == pytest.approx(known, nan_ok=True)


def crowd(accuracy: list[float], n: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Votes of all raters on all questions, and the true answers."""
    rng = np.random.default_rng(3)
    truth = rng.random(n) < 0.4
    correct = rng.random((len(accuracy), n)) < np.array(accuracy)[:, None]
    rater, question = np.indices(correct.shape)
    return question.ravel(), rater.ravel(), (correct == truth).astype(float).ravel(), truth


def test_one_coin_recovers_each_raters_accuracy() -> None:
    accuracy = [0.95, 0.85, 0.75, 0.5]
    *data, truth = crowd(accuracy)
    fit = agreement.one_coin(*data)
    assert fit.accuracy == pytest.approx(accuracy, abs=0.08)
    assert agreement.vote_weight(fit.accuracy)[3] < 0.2 < 0.4 < agreement.vote_weight(fit.accuracy)[2]
    assert ((fit.truth > 0.5) == truth).mean() > 0.93


def test_one_coin_is_a_fixed_point_of_both_steps_of_em() -> None:
    """Bayes' rule and the prior of four correct answers of five, written out vote by vote."""
    questions, raters, votes, _ = crowd([0.9, 0.6, 0.8], n=6)
    fit = agreement.one_coin(questions, raters, votes)
    for j, p in enumerate(fit.accuracy):
        agree = [
            mu if vote else 1 - mu
            for mu, vote in zip(fit.truth[questions[raters == j]], votes[raters == j], strict=True)
        ]
        assert p == pytest.approx((sum(agree) + 4) / (len(agree) + 5), abs=1e-6)
    for i, mu in enumerate(fit.truth):
        pi = (fit.truth.sum() + 1) / (len(fit.truth) + 2)
        yes, no = pi, 1 - pi
        for j, vote in zip(raters[questions == i], votes[questions == i], strict=True):
            p = fit.accuracy[j]
            yes, no = (yes * p, no * (1 - p)) if vote else (yes * (1 - p), no * p)
        assert mu == pytest.approx(yes / (yes + no), abs=1e-5)


def test_few_votes_leave_a_new_rater_near_the_prior() -> None:
    fit = agreement.one_coin(np.array([0]), np.array([0]), np.array([1.0]))
    assert 0.7 < fit.accuracy[0] < 0.9
    assert agreement.vote_weight(np.array([0.2, 0.5, 1.0])).tolist() == [0, 0, 1]


def test_leave_one_out_agreement_excludes_the_raters_own_vote() -> None:
    questions, raters = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 2, 0, 1, 2])
    share, compared = agreement.leave_one_out_agreement(questions, raters, np.array([1.0, 1, 0, 1, 0, 1]))
    # On question 0, raters 0 and 1 each see a tie of the other two; rater 2 disagrees with both.
    assert share.tolist() == [0.25, 0.25, 0.0]
    assert compared.tolist() == [2, 2, 1]
    agreement_share, comparisons = agreement.leave_one_out_agreement(np.array([0]), np.array([0]), np.array([1.0]))
    assert np.isnan(agreement_share[0])
    assert comparisons.tolist() == [0]
