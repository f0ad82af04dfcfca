"""Fixtures for feedback events: `event("e1", answer="no")` is a valid answer with these fields overridden."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from types import CodeType
from typing import Any

import jinja2
import pandas as pd
import pytest

from deleatur.feedback import events
from deleatur.feedback.events import EventRow
from deleatur.records.feedback import FeedbackEvent

EventFactory = Callable[..., FeedbackEvent]
COMPILE = jinja2.Environment.compile
COMPILED: dict[tuple[Any, ...], CodeType] = {}


def digest(name: str) -> str:
    return sha256(name.encode()).hexdigest()


@pytest.fixture(autouse=True)
def templates_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Great Expectations compiles the templates of its Data Docs for every page, a third of a validation's time."""

    def compile_once(environment: jinja2.Environment, source: str, *args: Any, **options: Any) -> CodeType:
        key = (environment.autoescape is True, source, *args)
        if key not in COMPILED:
            COMPILED[key] = COMPILE(environment, source, *args, **options)
        return COMPILED[key]

    monkeypatch.setattr(jinja2.Environment, "compile", compile_once)


@pytest.fixture
def event() -> EventFactory:
    def make(event_id: str = "e1", **changes: Any) -> FeedbackEvent:
        ranked = changes.get("kind") == "rank"
        defaults = {
            "event_id": event_id,
            "concept": "style" if ranked else "weapon",
            "kind": "binary",
            "items": tuple(digest(f"p{i}") for i in range(5 if ranked else 1)),
            "prompt": "a prompt",
            "seed": 7,
            "model_version": "base",
            "rater": "r1",
            "answer": "ranked" if ranked else "yes",
            "ranks": (1, 2, 3, 4, 5) if ranked else None,
            "source": "test",
            "created_at": "2024-05-01T10:00:00Z",
            "consent_version": "1",
            "seconds_spent": 2.0,
        }
        return FeedbackEvent(**{**defaults, **changes})

    return make


@pytest.fixture
def table() -> Callable[..., pd.DataFrame]:
    """Builds the table of these events."""
    return lambda *feedback: events.to_frame([EventRow("a.jsonl", i, e) for i, e in enumerate(feedback, 1)])
