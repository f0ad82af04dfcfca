"""Each violation is reported by its rule, with the violating rows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from browsing import started
from conftest import EventFactory, digest

from deleatur.feedback import expectations
from deleatur.feedback.expectations import ValidationResult

Table = Callable[..., pd.DataFrame]
NOW = datetime(2026, 1, 1, tzinfo=UTC)
AVAILABLE = [digest(f"p{i}") for i in range(5)]


@pytest.fixture
def check(table: Table, tmp_path: Path) -> Callable[..., ValidationResult]:
    return lambda *feedback: expectations.validate(
        table(*feedback), {"weapon": "binary", "style": "rank"}, AVAILABLE, tmp_path / "docs", now=NOW
    )


VIOLATIONS = {
    "event id given": {"event_id": ""},
    "concept": {"concept": "wepon"},
    "kind": {"concept": "style"},
    "answer": {"answer": "ranked"},
    "items": {"items": (digest("p0"), digest("p1"))},
    "digest": {"items": ("0" * 63,)},
    "ranks": {"ranks": (1,)},
    "image": {"items": (digest("gone"),)},
    "time": {"created_at": "yesterday"},
    "seconds": {"seconds_spent": -1.0},
    "rater": {"rater": "Jane Doe"},
    "source": {"source": ""},
    "model_version": {"model_version": ""},
    "consent_version": {"consent_version": ""},
}


def test_each_violation_is_reported_by_its_rule(
    event: EventFactory, check: Callable[..., ValidationResult], tmp_path: Path
) -> None:
    """All of them in one table among valid rows: many violations of one rule must not hide another."""
    bad_events = [event(**{"event_id": f"bad {rule}", **changes}) for rule, changes in VIOLATIONS.items()]
    checked = check(event("good 1"), *bad_events, event("good 2", kind="rank"), event("twice"), event("twice"))
    rules = {rule["rule"]: rule for rule in checked.summary["rules"]}
    assert set(rules) == {"event id", *VIOLATIONS}
    assert rules["event id"]["event_ids"] == ["twice", "twice"]
    for position, (rule, changes) in enumerate(VIOLATIONS.items(), 1):
        assert changes.get("event_id", f"bad {rule}") in rules[rule]["event_ids"]
        assert position in {v.position for v in checked.violations if v.rule == rule}
    assert {v.position for v in checked.violations}.isdisjoint({0, len(VIOLATIONS) + 1})
    assert all(v.expected and v.remedy for v in checked.violations)
    assert not checked.summary["success"]
    assert "Jane" not in "".join(v.got for v in checked.violations)
    assert (tmp_path / "docs" / "index.html").is_file()


P0, P1, P2 = (digest(f"p{i}") for i in range(3))
ITEMS = {
    "a question about one": (True, "binary", (P0,)),
    "about none": (False, "binary", ()),
    "about two": (False, "binary", (P0, P1)),
    "a ranking of two": (True, "rank", (P0, P1)),
    "of one": (False, "rank", (P0,)),
    "of one twice": (False, "rank", (P0, P1, P0)),
}


@pytest.mark.parametrize(("fits", "kind", "items"), ITEMS.values(), ids=ITEMS.keys())
def test_questions_are_about_one_image_and_rankings_about_two_or_more(
    event: EventFactory, table: Table, fits: bool, kind: str, items: tuple[str, ...]
) -> None:
    columns = expectations.derive_columns(table(event(kind=kind, items=items)), {}, AVAILABLE, NOW)
    assert columns["items_fit"].tolist() == [fits]


@pytest.mark.parametrize(
    ("item", "fits"), [("0" * 64, True), ("0" * 63, False), ("0" * 65, False), ("A" * 64, False), ("g" * 64, False)]
)
def test_a_digest_has_exactly_64_lower_case_digits(event: EventFactory, table: Table, item: str, fits: bool) -> None:
    columns = expectations.derive_columns(table(event(items=(P0, item))), {}, AVAILABLE, NOW)
    assert columns["digests_fit"].tolist() == [fits]
    assert columns["missing"].tolist() == [1], "P0 is in the archive"


RANKS = {
    "five": (True, (5, 4, 3, 2, 1)),
    "some X": (True, (1, None, 2, None, None)),
    "all X": (True, (None,) * 5),
    "gaps": (True, (1, None, 5, None, None)),
    "twice": (False, (1, 1, 2, 3, 4)),
    "too high": (False, (1, 2, 3, 4, 6)),
    "zero": (False, (0, 1, 2, 3, 4)),
    "too few": (False, (1, 2, 3, 4)),
    "none": (False, None),
}


def test_ranks_are_distinct_numbers_up_to_m_or_x(event: EventFactory, check: Callable[..., ValidationResult]) -> None:
    checked = check(*(event(name, kind="rank", ranks=ranks) for name, (_, ranks) in RANKS.items()))
    [rule] = [rule for rule in checked.summary["rules"] if rule["rule"] == "ranks"]
    assert rule["event_ids"] == [name for name, (is_valid, _) in RANKS.items() if not is_valid]


@pytest.mark.parametrize("created_at", ["2026-01-03T00:00:00Z", "2999-01-01T00:00:00Z", "9999-12-31T23:59:59Z"])
def test_event_of_the_future_is_a_violation(
    event: EventFactory, check: Callable[..., ValidationResult], created_at: str
) -> None:
    [violation] = check(event("e1"), event("e2", created_at=created_at)).violations
    assert (violation.position, violation.rule, violation.got) == (1, "time", f"created_at {created_at!r}")


def test_messages_quote_plain_values(event: EventFactory, check: Callable[..., ValidationResult]) -> None:
    checked = check(event("e1", seconds_spent=-1.0), event("e2", kind="rank", ranks=(1, 1, 2, 3, None)))
    assert {v.rule: v.got for v in checked.violations} == {
        "seconds": "seconds_spent -1.0",
        "ranks": "ranks [1, 1, 2, 3, None]",
    }


BLANK = ("event_id", "source", "model_version", "consent_version")


@pytest.mark.parametrize("field", BLANK)
def test_blank_is_empty(event: EventFactory, check: Callable[..., ValidationResult], field: str) -> None:
    assert len(check(event(**{field: " \t"})).violations) == 1


HOSTILE = (
    "<img src=x onerror=alert(1)>",
    '"><script>alert(2)</script>',
    "' onmouseover='alert(3)",
    "</script><script>alert(4)</script>",
    "{{7*7}} $PARAMETER ${v__0} %s",
    "&lt;img src=x onerror=alert(5)&gt;",
)
FIELDS = ("event_id", "concept", "rater", "source", "model_version", "consent_version", "created_at", "prompt")


def test_no_value_is_executed_by_a_browser_that_shows_the_data_docs(
    event: EventFactory, check: Callable[..., ValidationResult], tmp_path: Path
) -> None:
    bad = [
        event(**{"event_id": f"e{i} {f}", "concept": "wepon", f: text})
        for i, text in enumerate(HOSTILE)
        for f in FIELDS
    ]
    bad += [event(f"items {i}", items=(text,), reason=text, labels=(text,)) for i, text in enumerate(HOSTILE)]
    assert len({v.position for v in check(*bad).violations}) == len(bad)
    pages = sorted((tmp_path / "docs").rglob("*.html"))
    assert len(pages) >= 3
    with started() as browser:
        page = browser.new_page()
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.route("http*://**", lambda route: route.abort())
        page.goto("data:text/html,<img src=x onerror=alert(0)>")
        while not dialogs:
            page.wait_for_timeout(20)
        assert dialogs == ["0"], "a script of this kind is noticed"
        for path in pages:
            page.goto(path.as_uri(), wait_until="domcontentloaded")
            page.evaluate("document.querySelectorAll('*').forEach(e => e.dispatchEvent(new Event('mouseover')))")
            assert page.locator("img[src=x]").count() == 0
            assert page.locator("[onmouseover]").count() == 0
            # Scripts of the page would have run before one that is added last.
            page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=alert(2)>')")
            while dialogs[-1] != "2":
                page.wait_for_timeout(20)
            assert dialogs.pop() == "2"
            assert dialogs == ["0"], "no script of the page has run"
        assert "img src=x onerror=alert(1)" in page.content(), "values are displayed"


def test_empty_table_is_valid(check: Callable[..., ValidationResult]) -> None:
    assert check().summary["success"]
