"""Confidence intervals against hand calculations and published examples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from deleatur.maths import intervals

Z = 1.959963984540054


def unclustered(n: int) -> np.ndarray:
    """One cluster per image."""
    return np.arange(n)


def successes(k: int, n: int) -> np.ndarray:
    return np.r_[np.ones(k), np.zeros(n - k)]


def paired(gained: int, lost: int, n: int) -> np.ndarray:
    return np.r_[np.ones(gained), -np.ones(lost), np.zeros(n - gained - lost)]


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 50, 0.0, Z**2 / (50 + Z**2)),  # 7.1 %: at p = 0 the upper end is z²/(n + z²)
        (50, 50, 50 / (50 + Z**2), 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(k: int, n: int, low: float, high: float) -> None:
    interval = intervals.rate(successes(k, n), unclustered(n))
    assert interval.value == k / n
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=6e-5)


def test_design_effect_by_hand() -> None:
    # ȳ = 1/2, cluster sums of deviations 1 and −1: 2/1 · (1 + 1)/16 = 1/4, over s²/n = (1/3)/4
    assert intervals.design_effect(np.array([1.0, 1, 0, 0]), np.array([7, 7, 3, 3])) == pytest.approx(3)


def test_design_effect_is_one_without_clusters_and_n_with_one_cluster() -> None:
    values = np.array([0.0, 1, 1, 0, 1])
    assert intervals.design_effect(values, unclustered(5)) == pytest.approx(1)
    assert intervals.design_effect(values, np.zeros(5, int)) == 5


def test_identical_images_of_a_prompt_count_once() -> None:
    ten = successes(4, 10)
    fifty = np.repeat(ten, 5)
    assert intervals.mean(fifty, np.repeat(unclustered(10), 5)).low == pytest.approx(
        intervals.mean(ten, unclustered(10)).low
    )
    assert intervals.effective_size(fifty, np.repeat(unclustered(10), 5)) < 10


def test_fewer_prompts_widen_the_interval_even_at_rate_zero() -> None:
    highs = [intervals.rate(np.zeros(50), np.arange(50) % prompts).high for prompts in (50, 25, 5, 2, 1)]
    assert highs == sorted(highs)
    assert highs[0] == pytest.approx(0.0713, abs=1e-4)
    t49, t4 = stats.t.ppf(0.975, [49, 4])
    assert highs[2] == pytest.approx(Z**2 / (50 * (t49 / t4) ** 2 + Z**2))
    assert highs[-1] == pytest.approx(Z**2 / (1 + Z**2))


def test_mean_is_the_textbook_t_interval() -> None:
    values = np.array([2.0, 4, 4, 5, 7, 8])  # mean 5, s² = 24/5
    half = stats.t.ppf(0.975, 5) * math.sqrt(24 / 5 / 6)
    interval = intervals.mean(values, unclustered(6))
    assert (interval.value, interval.low, interval.high) == pytest.approx((5, 5 - half, 5 + half))


def test_mean_of_one_prompt_has_an_infinite_interval() -> None:
    assert intervals.mean(np.array([1.0, 2, 3]), np.zeros(3, int)).high == math.inf


def test_difference_is_bonett_and_price() -> None:
    # The example of statpsych::ci.prop.ps (f00 12, f01 4, f10 26, f11 6): 0.44, [0.2548067, 0.6251933]
    interval = intervals.difference(paired(26, 4, 48), unclustered(48))
    assert interval.value == pytest.approx(22 / 48)
    assert (interval.low, interval.high) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)


def test_zero_differences_still_have_a_width() -> None:
    interval = intervals.difference(np.zeros(50), unclustered(50))
    half = Z * math.sqrt(2 / 52 / 52)  # p̃ = 1/52 each, centre 0
    assert (interval.value, interval.low, interval.high) == pytest.approx((0, -half, half))


def test_difference_of_continuous_values_is_the_t_interval() -> None:
    values = np.array([0.1, -0.2, 0.3, 0.05])
    assert intervals.difference(values, unclustered(4)) == intervals.mean(values, unclustered(4))


@given(st.data(), st.integers(2, 60), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_intervals_contain_their_value_and_stay_in_range(data: st.DataObject, n: int, level: float) -> None:
    clusters = np.array(data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)))
    values = np.array(data.draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=n, max_size=n)))
    for interval, least in (
        (intervals.rate(np.abs(values), clusters, level), 0),
        (intervals.difference(values, clusters, level), -1),
    ):
        assert least <= interval.low <= interval.value <= interval.high <= 1
        assert interval.low < interval.high


@given(st.integers(1, 200), st.data())
def test_more_positives_never_lower_either_end(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n - 1))
    less, more = intervals.rate(successes(k, n), unclustered(n)), intervals.rate(successes(k + 1, n), unclustered(n))
    assert less.low <= more.low
    assert less.high <= more.high


@pytest.mark.parametrize(("k", "n", "limit"), [(0, 50, 0.05), (2, 100, 0.05), (10, 40, 0.4), (30, 100, 0.2)])
def test_sample_size_to_reach_is_the_smallest_that_decides(k: int, n: int, limit: float) -> None:
    interval, p = intervals.rate(successes(k, n), unclustered(n)), k / n
    end = interval.high if p < limit else interval.low
    size = intervals.sample_size_to_reach(p, end, limit, n, proportion=True)
    assert size is not None

    def clears(size: int) -> bool:
        centre, half = p + Z**2 / (2 * size), Z * math.sqrt(p * (1 - p) / size + Z**2 / (4 * size**2))
        low, high = (centre - half) / (1 + Z**2 / size), (centre + half) / (1 + Z**2 / size)
        return high <= limit if p < limit else low >= limit

    assert clears(size)
    assert not clears(size - 1)


def test_sample_size_of_a_mean_grows_quadratically() -> None:
    assert intervals.sample_size_to_reach(-0.01, -0.05, -0.03, 100, proportion=False) == 400
    assert intervals.sample_size_to_reach(0.3, 0.4, 0.3, 100, proportion=False) is None
    assert intervals.sample_size_to_reach(0.3, 0.4, 0.2, 100, proportion=False) is None
