"""Feedback events → the answers in effect: corrections replace, withdrawals remove, the latest answer counts.

A withdrawal always counts, whatever its time, its place in the files and its other fields. It removes the rater's whole
chain of corrections that the named answer is in, and no answer that this chain superseded comes back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from deleatur.feedback.events import EventRow, QuarantineRow, parse_utc, reject
from deleatur.records.feedback import FeedbackEvent


@dataclass(frozen=True)
class ResolvedEvents:
    """Feedback events after corrections and withdrawals have been applied."""

    events: list[EventRow]
    """Valid events in their order, replaced answers and withdrawals included."""
    answers: list[EventRow]
    """Answers in effect."""
    rejected: list[QuarantineRow]


def resolve(
    rows: Sequence[EventRow], invalid: Collection[EventRow], quarantined_ids: Collection[str]
) -> ResolvedEvents:
    """Matches corrections and withdrawals with the answers that they name.

    rows: all parsed events. invalid: answers among them that violate an expectation; every other one has a valid time.
    quarantined_ids: ids of rejected lines; an event that replaces one of them corrects it, so it is valid.
    """
    skipped = {(row.file, row.line) for row in invalid}
    # A withdrawal may repeat the id of the answer that it withdraws: the id then names the answer.
    positions = {row.event.event_id: i for i, row in enumerate(rows) if row.is_withdrawal}
    positions |= {row.event.event_id: i for i, row in enumerate(rows) if not row.is_withdrawal}
    usable = {i for i, row in enumerate(rows) if (row.file, row.line) not in skipped}
    valid, rejected = list[EventRow](), list[QuarantineRow]()
    for i in sorted(usable):
        row, old = rows[i], rows[i].event.replaces
        position = positions.get(old) if old is not None else None
        if position is not None and (position in usable or row.is_withdrawal):
            problem = _replacement_problem(row.event, i, rows[position].event, position)
        elif old is None or position is not None or old in quarantined_ids:
            problem = None
        else:
            problem = "replaces: the event_id of an earlier answer", f"no event {old}"
        if problem is None:
            valid.append(row)
        else:
            remedy = CHANGE_REPLACES if old in positions else ADD_SOURCE
            rejected.append(reject(row, "replaces", *problem, remedy))
    parents = {row.event.event_id: row.event.replaces for row in rows if not row.is_withdrawal and row.event.replaces}
    return ResolvedEvents(valid, _in_effect(valid, parents), rejected)


CHANGE_REPLACES = "put the event_id of the rater's own earlier answer in replaces"
ADD_SOURCE = "add the file with that event to ingest.sources"


def _replacement_problem(
    new: FeedbackEvent, position: int, old: FeedbackEvent, old_position: int
) -> tuple[str, str] | None:
    """(expected, got) when `new` may not replace `old`, else None."""
    if new.answer == "withdrawn" and old.answer == "withdrawn":
        return "replaces: the event_id of an answer", f"{new.replaces}, a withdrawal"
    if new.rater != old.rater:
        return "the event_id of an answer by the same rater", "another rater's answer"
    if "withdrawn" in (new.answer, old.answer):
        return None
    if new.concept != old.concept or sorted(new.items) != sorted(old.items):
        return "a correction about the same concept and images", "an answer about other ones"
    # Time, then position, is a strict order, so corrections cannot form a cycle.
    if _order_key(new, position) <= _order_key(old, old_position):
        return "a correction newer than the corrected event", f"{new.created_at}, not after {old.created_at}"
    return None


def _order_key(event: FeedbackEvent, position: int) -> tuple[datetime, int]:
    created_at = parse_utc(event.created_at)
    assert created_at is not None, "answers with an invalid time are not resolved"
    return created_at, position


def _in_effect(rows: Sequence[EventRow], parents: Mapping[str, str]) -> list[EventRow]:
    """The latest answer of each rater to each question, without replaced and withdrawn ones.

    A rater may answer a question again without `replaces`; the newer answer counts.
    """
    first_of_chain = _chain_roots(parents)
    withdrawn = {
        (row.event.rater, first_of_chain.get(row.event.replaces, row.event.replaces))
        for row in rows
        if row.is_withdrawal and row.event.replaces
    }
    answers = [row for row in rows if not row.is_withdrawal]
    replaced = {row.event.replaces for row in answers}
    latest = dict[tuple[str, str, tuple[str, ...]], int]()
    for i, row in enumerate(answers):
        e = row.event
        question = (e.concept, e.rater, tuple(sorted(e.items)))
        previous = latest.get(question)
        if e.event_id not in replaced and (
            previous is None or _order_key(e, i) > _order_key(answers[previous].event, previous)
        ):
            latest[question] = i
    current = [answers[i] for i in sorted(latest.values())]
    chains = [(row.event.rater, first_of_chain.get(row.event.event_id, row.event.event_id)) for row in current]
    return [row for row, chain in zip(current, chains, strict=True) if chain not in withdrawn]


def _chain_roots(parents: Mapping[str, str]) -> dict[str, str]:
    """Event id → the first event of its chain of corrections. Of a cycle, which only invalid events form, any event."""
    roots = dict[str, str]()
    for start in parents:
        path, node = dict[str, None](), start
        while node in parents and node not in roots and node not in path:
            path[node] = None
            node = parents[node]
        roots |= dict.fromkeys(path, roots.get(node, node))
    return roots
