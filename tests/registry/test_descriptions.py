"""Descriptions on MLflow's pages: what they say, that nothing from outside is markup, and that they fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from deleatur.registry import descriptions, ledger
from deleatur.registry.descriptions import MAX_LENGTH, decision_lines, version_description, with_decision
from deleatur.registry.ledger import Entry, Ledger, LedgerPosition

RUN = "#/experiments/1/runs/abc"


def entry(
    event: ledger.DecisionKind, number: int = 7, version: str | None = "2", reason: str = "", **aliases: str
) -> Entry:
    time = "2026-11-30T20:01:29+00:00"
    return Entry(number, time, event, version, "Ada", "ada@host", reason, "w", "e", "f", aliases, "0" * 64)


def recorded(**aliases: str) -> Ledger:
    last = entry("promotion", **aliases)
    return Ledger(Path("ledger.jsonl"), ledger.GENESIS, (last,), (LedgerPosition(7, "h"),))


def test_version_links_to_report_and_model_card_and_lists_decisions_once() -> None:
    text = version_description("PASS: weapon 0.97 → 0.03", RUN)
    assert text.splitlines()[0] == "PASS: weapon 0.97 → 0.03"
    assert f"[Report]({RUN}/artifacts/verdict/report.html)" in text
    assert f"[model card]({RUN}/artifacts/model_card.md)" in text
    [(version, line)] = decision_lines(entry("approval", reason="looked *twice* <b>")).items()
    assert (version, line) == (
        "2",
        r"* 2026-11-30 20:01 UTC, approval by Ada: looked \*twice\* &lt;b&gt; (line 7 of the ledger)",
    )
    for _ in range(2):  # a killed process repeats it
        text = with_decision(text, line)
    assert text.count("approval by Ada") == 1
    assert text.endswith(line)


def test_rollback_is_shown_on_both_versions() -> None:
    lines = decision_lines(entry("rollback", version="1", reason="seen", quarantined="2", champion="1"))
    assert {version: line.split(",")[1] for version, line in lines.items()} == {
        "1": " rollback by Ada: seen (line 7 of the ledger)",
        "2": " quarantine by Ada: seen (line 7 of the ledger)",
    }
    assert decision_lines(entry("registration", version=None)) == {}, "a verdict that failed has no version"


def test_long_summaries_reasons_and_histories_fit_into_mlflow() -> None:
    text = version_description("\n".join(["PASS: many concepts", *("* a concept" * 20 for _ in range(99))]), RUN)
    assert "[Report]" in text
    for number in range(99):
        [line] = decision_lines(entry("expiry", number, reason="because " * 99)).values()
        text = with_decision(text, line)
        assert len(text) <= MAX_LENGTH
    assert text.startswith("PASS: many concepts\n")
    assert text.endswith("(line 98 of the ledger)"), "the oldest decisions gave way"


@pytest.mark.parametrize(
    ("aliases", "contained", "missing"),
    [
        ({}, ("no version is live",), ("approve", "rollback")),
        ({"champion": "2"}, ("[version 2](#/models/a%20b/versions/2) is live",), ("approve", "rollback")),
        (
            {"champion": "2", "last_known_good": "1", "challenger": "4", "quarantined": "3"},
            ("deleatur approve 4", "[version 1]", "[version 3]", "deleatur rollback", "`models:/a b@champion`"),
            (),
        ),
    ],
)
def test_registered_model_names_the_live_version_and_the_next_commands(
    aliases: dict[str, str], contained: tuple[str, ...], missing: tuple[str, ...]
) -> None:
    text = descriptions.model_description("a b", recorded(**aliases))
    assert all(part in text for part in (*contained, "As of line 7 of the ledger, 2026-11-30 20:01 UTC"))
    assert not any(f"deleatur {part}" in text for part in missing)
    assert len(text) <= MAX_LENGTH
