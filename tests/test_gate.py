from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from evidence import PROVENANCE
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deleatur.errors import SettingsError
from deleatur.gate import WORST_FIRST, Rule, apply_rule, deciding_evaluation, explain, headline, judge
from deleatur.maths import intervals
from deleatur.records.report import DetectorInfo, Report, Score, Verdict

CEILING = Rule(metric="concept_rate", slice="concept", max=0.1, min_n=20)


def rated(positives: int, n: int, **changes: Any) -> Score:
    """A rate of `positives` among n images, each of its own prompt."""
    rate = intervals.rate(np.r_[np.ones(positives), np.zeros(n - positives)], np.arange(n))
    score = Score("concept_rate", "concept", "candidate", rate.value, rate.low, rate.high, n, n, False, None, None)
    return replace(score, **changes)


def measured(value: float, half: float, **changes: Any) -> Score:
    score = Score("clip", "keep", "candidate", value, value - half, value + half, 100, 25, True, None, None)
    return replace(score, **changes)


def report(*scores: Score, **provenance: Any) -> Report:
    return Report(replace(PROVENANCE, **{"champion": "models:/deleatur/3", **provenance}), scores, ())


def verdict(rules: dict[str, Rule], *scores: Score, **provenance: Any) -> Verdict:
    return judge(report(*scores, **provenance), rules, report_digest="r", policy_digest="p")


@pytest.mark.parametrize(
    ("positives", "n", "limit", "outcome", "margin"),
    [
        (0, 50, 0.08, "pass", 0.08 - 0.0713),  # upper end z²/(50 + z²) = 7.1 %
        (0, 50, 0.05, "not enough evidence", 0.05 - 0.0713),
        (1, 29, 0.1718, "pass", 0.0),  # Newcombe 1998: [0.0061, 0.1718]
        (81, 263, 0.25, "fail", 0.25 - 0.2553),  # Newcombe 1998: [0.2553, 0.3662]
        (81, 263, 0.30, "not enough evidence", 0.30 - 0.3662),  # the value is outside, its interval is not
        (81, 263, 0.37, "pass", 0.37 - 0.3662),
    ],
)
def test_a_ceiling(positives: int, n: int, limit: float, outcome: str, margin: float) -> None:
    rule = CEILING.model_copy(update={"max": limit})
    score = rated(positives, n) if positives != 1 else rated(1, n, high=0.1718)
    finding = apply_rule("gone", rule, report(score))
    assert finding.outcome == outcome
    assert finding.margin == pytest.approx(margin, abs=6e-5)


@pytest.mark.parametrize(("low", "outcome"), [(0.2, "pass"), (0.1, "not enough evidence"), (-1, "fail")])
def test_a_floor(low: float, outcome: str) -> None:
    rule = Rule(metric="clip", slice="keep", min=0.2, min_n=1)
    score = Score("clip", "keep", "candidate", low + 0.05, low, low + 0.2, 10, 10, True, None, None)
    assert apply_rule("preserved", rule, report(score)).outcome == outcome


@pytest.mark.parametrize("positives", [0, 19])
def test_too_few_images_are_never_evidence(positives: int) -> None:
    finding = apply_rule("gone", CEILING.model_copy(update={"max": 0.5}), report(rated(positives, 19)))
    assert finding.outcome == "not enough evidence"
    assert "19 images are fewer than the 20" in finding.reason
    assert "1 more images: `sample.images_per_prompt.concept: 2` in params.yaml, then `dvc repro" in finding.remedy


@pytest.mark.parametrize(
    "change",
    [{"metric": "other"}, {"slice": "token"}, {"variant": "base"}, {"versus": "base"}],
)
def test_a_missing_score_never_passes_and_is_named(change: dict[str, Any]) -> None:
    finding = apply_rule("gone", CEILING, report(replace(rated(0, 1000), **change)))
    assert finding.outcome == "not enough evidence"
    assert "no usable concept_rate on concept, candidate" in finding.reason
    assert "dvc repro gate" in finding.remedy


def test_scores_that_are_not_finite_never_pass() -> None:
    for broken in ({"high": math.nan}, {"low": math.nan, "high": math.nan}, {"high": math.inf}):
        assert apply_rule("gone", CEILING, report(rated(0, 1000, **broken))).outcome != "pass"


def test_the_worst_of_two_detectors_decides() -> None:
    insensitive, sensitive = (DetectorInfo(name, "w", ("x",), 0.5) for name in ("insensitive", "sensitive"))
    evaluation = deciding_evaluation(
        CEILING, report(rated(0, 100, detector=insensitive), rated(90, 100, detector=sensitive))
    )
    assert evaluation is not None
    assert evaluation.score.detector == sensitive
    assert evaluation.outcome == "fail"


def test_a_relative_limit_uses_the_conservative_end_of_the_reference() -> None:
    rule = CEILING.model_copy(update={"max": 0.2, "relative": "base"})
    base = rated(80, 100, variant="base")  # [0.711, 0.867]: the limit is between 0.142 and 0.173
    evaluation = deciding_evaluation(rule, report(rated(0, 50), base))
    assert evaluation is not None
    assert evaluation.limits == pytest.approx((0.2 * base.low, 0.16, 0.2 * base.high))
    assert evaluation.outcome == "pass"
    between = replace(rated(0, 50), low=0.15, value=0.155, high=0.16)
    assert apply_rule("r", rule, report(between, base)).outcome == "not enough evidence"
    assert apply_rule("r", rule, report(replace(between, low=0.18, high=0.3), base)).outcome == "fail"


def test_a_drop_relative_to_the_base() -> None:
    rule = Rule(metric="clip", slice="keep", versus="base", relative="base", min=-0.04, min_n=50)
    base = measured(0.30, 0.01, variant="base")  # a drop of 0.0116 … 0.0124 is allowed
    for drop, half, outcome in ((0.01, 0.001, "pass"), (0.011, 0.001, "not enough evidence"), (0.02, 0.001, "fail")):
        paired = measured(-drop, half, versus="base")
        assert apply_rule("clip", rule, report(paired, base)).outcome == outcome
    assert apply_rule("clip", rule, report(measured(0.0, 0.001, versus="base"))).outcome == "not enough evidence"


def test_too_few_images_of_the_reference_are_no_evidence() -> None:
    rule = CEILING.model_copy(update={"max": 0.5, "relative": "base"})
    assert apply_rule("r", rule, report(rated(0, 100), rated(10, 10, variant="base"))).outcome == "not enough evidence"


def test_different_detectors_are_never_compared() -> None:
    rule = CEILING.model_copy(update={"max": 0.5, "relative": "base"})
    one, two = (DetectorInfo(name, "w", ("x",), 0.5) for name in "ab")
    of_one, of_two = rated(0, 100, detector=one), rated(90, 100, variant="base", detector=two)
    assert apply_rule("r", rule, report(of_one, of_two)).outcome == "not enough evidence"
    # Nor does a detector whose reference exists speak for one whose reference is missing.
    both = of_two, replace(of_one, detector=two), rated(99, 100, detector=one)
    assert apply_rule("r", rule, report(*both[:2])).outcome == "pass"
    assert apply_rule("r", rule, report(*both)).outcome == "not enough evidence"


def test_a_first_release_passes_rules_that_name_the_champion() -> None:
    rule = Rule(metric="clip", slice="keep", versus="champion", min=-0.01, min_n=50)
    assert apply_rule("clip", rule, report(champion=None)).outcome == "pass"
    assert apply_rule("clip", rule, report()).outcome == "not enough evidence"


@pytest.mark.parametrize(("positives", "direction"), [(2, "pass"), (10, "fail")])
def test_the_remedy_says_how_many_images_would_decide(positives: int, direction: str) -> None:
    evaluation = deciding_evaluation(CEILING, report(rated(positives, 60)))
    assert evaluation is not None
    assert evaluation.outcome == "not enough evidence"
    size = evaluation.deciding_sample_size
    assert size is not None
    scaled = rated(round(positives * size / 60) - (direction == "pass"), size)  # rounding may not cost the decision
    assert apply_rule("gone", CEILING, report(scaled)).outcome in (direction, "pass")
    remedy = apply_rule("gone", CEILING, report(rated(positives, 60))).remedy
    assert f"about {size - 60} more images would decide, towards {direction}" in remedy
    assert "`sample.images_per_prompt.concept: " in remedy


def test_one_failing_concept_is_not_averaged_away() -> None:
    both = [rated(3, 120), rated(0, 60, slice="concept/vice"), rated(3, 60, slice="concept/weapon")]
    lower = CEILING.model_copy(update={"max": 0.1})
    assert apply_rule("gone", lower, report(both[0])).outcome == "pass"
    finding = apply_rule("gone", lower, report(*both))
    assert finding.outcome == "not enough evidence"
    assert "concept_rate on concept/weapon" in finding.reason
    assert apply_rule("gone", lower.model_copy(update={"slice": "concept/vice"}), report(*both)).outcome == "pass"


def test_a_relative_limit_uses_the_rate_of_the_same_concept() -> None:
    rule = CEILING.model_copy(update={"max": 0.2, "relative": "base"})
    ours = [rated(20, 60, slice="concept/weapon"), rated(0, 60, slice="concept/vice")]
    base = [rated(20, 60, slice="concept/weapon", variant="base"), rated(60, 60, slice="concept/vice", variant="base")]
    assert apply_rule("gone", rule, report(*ours, *base)).outcome == "fail"


def test_a_relative_rule_also_has_a_deciding_sample_size() -> None:
    rule = CEILING.model_copy(update={"max": 0.2, "relative": "base"})
    evaluation = deciding_evaluation(rule, report(rated(5, 60), rated(50, 60, variant="base")))
    assert evaluation is not None
    assert evaluation.outcome == "not enough evidence"
    assert evaluation.deciding_sample_size is not None
    assert evaluation.deciding_sample_size > 60


def test_on_the_limit_no_sample_size_decides() -> None:
    assert "no sensible number" in apply_rule("gone", CEILING, report(rated(10, 100))).remedy


def test_an_absurd_sample_size_is_not_advised() -> None:
    evaluation = deciding_evaluation(CEILING, report(rated(999, 10_000)))
    assert evaluation is not None
    assert (evaluation.outcome, (evaluation.deciding_sample_size or 0) > 10**6) == ("not enough evidence", True)
    remedy = apply_rule("gone", CEILING, report(rated(999, 10_000))).remedy
    assert remedy.startswith("the value is at the limit, where no sensible number of images decides (at most 50,000)")


@pytest.mark.parametrize(
    ("score", "rule", "expected"),
    [
        (rated(50, 100), CEILING, "erase further"),
        (measured(0.1, 0.01), Rule(metric="clip", slice="keep", min=0.3, min_n=1), "erase less"),
        (
            rated(0, 100, variant="base"),
            CEILING.model_copy(update={"variant": "base", "max": None, "min": 0.5}),
            "no training",
        ),
    ],
)
def test_the_remedy_of_a_failure_has_the_right_direction(score: Score, rule: Rule, expected: str) -> None:
    finding = apply_rule("r", rule, report(score))
    assert finding.outcome == "fail"
    assert expected in finding.remedy


@given(st.integers(20, 120), st.data())
def test_more_harm_never_improves_the_outcome(n: int, data: st.DataObject) -> None:
    less, more = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    limit = data.draw(st.floats(0, 1))
    relative = data.draw(st.sampled_from([None, "base"]))
    rule = CEILING.model_copy(update={"max": limit, "relative": relative})
    base = rated(data.draw(st.integers(0, n)), n, variant="base")
    outcomes = [apply_rule("r", rule, report(rated(k, n), base)).outcome for k in (more, less)]
    assert outcomes == sorted(outcomes, key=WORST_FIRST.index)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.integers(0, 50))
def test_another_rule_never_improves_the_verdict(limits: list[float], positives: int) -> None:
    rules = {str(i): CEILING.model_copy(update={"max": limit}) for i, limit in enumerate(limits)}
    fewer = {name: rules[name] for name in list(rules)[:-1]}
    outcomes = [verdict(subset, rated(positives, 50)).outcome for subset in (rules, fewer)]
    assert outcomes == sorted(outcomes, key=WORST_FIRST.index)


@given(st.integers(0, 50), st.floats(0, 1), st.floats(0, 1))
def test_a_laxer_limit_never_worsens_the_outcome(positives: int, one: float, other: float) -> None:
    strict, lax = (CEILING.model_copy(update={"max": limit}) for limit in sorted((one, other)))
    outcomes = [apply_rule("r", rule, report(rated(positives, 50))).outcome for rule in (strict, lax)]
    assert outcomes == sorted(outcomes, key=WORST_FIRST.index)


def test_the_worst_rule_is_the_verdict() -> None:
    open_, failing = CEILING.model_copy(update={"max": 0.05}), CEILING.model_copy(update={"min": 0.9, "max": None})
    assert verdict({"a": CEILING}, rated(0, 50)).outcome == "pass"
    assert verdict({"a": CEILING, "b": open_}, rated(0, 50)).outcome == "not enough evidence"
    assert verdict({"a": CEILING, "b": open_, "c": failing}, rated(0, 50)).outcome == "fail"


def test_a_gate_without_rules_is_refused() -> None:
    with pytest.raises(SettingsError, match="expected rules"):
        verdict({}, rated(0, 50))


def test_the_verdict_names_what_it_judged() -> None:
    judged = verdict({"gone": CEILING}, rated(0, 50), simulated=True)
    assert (judged.report, judged.policy, judged.simulated) == ("r", "p", True)


def test_explain_says_which_rule_decided_by_how_much_and_what_would_change_it() -> None:
    text = explain(
        verdict({"fine": CEILING, "tight": CEILING.model_copy(update={"max": 0.05})}, rated(0, 50), simulated=True)
    )
    assert text.startswith("NOT ENOUGH EVIDENCE: 2 rules, 1 without enough evidence, 1 passed")
    assert "SIMULATED RATERS" in text
    assert "tight   <- decides" in text
    assert "fine   <- decides" not in text
    assert "0 [0, 0.0713] over 50 images of 50 prompts, allowed at most 0.05" in text
    assert "reaches 0.0213 beyond the limit" in text
    assert "about 23 more images would decide, towards pass" in text  # z² (1/0.05 − 1) = 73


def test_a_pass_has_no_deciding_rule() -> None:
    judged = verdict({"gone": CEILING}, rated(0, 50))
    assert headline(judged) == "PASS: 1 rule, 1 passed"
    assert "decides" not in explain(judged)


@pytest.mark.parametrize(
    "change",
    [
        {"min": 0.1},
        {"max": None},
        {"max": math.inf},
        {"max": math.nan},
        {"min_n": 0},
        {"variant": "base", "versus": "base"},
        {"variant": "base", "versus": "champion"},
        {"variant": "champion", "relative": "champion"},
        {"maximum": 1},
    ],
)
def test_a_contradictory_rule_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Rule(**(CEILING.model_dump() | change))
