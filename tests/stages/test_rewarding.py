"""Feedback that no reward can be learned from is named, with what to collect; what cannot be measured is left out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import workspace
from typer.testing import CliRunner

from deleatur import stages
from deleatur.cli import app
from deleatur.feedback import events
from deleatur.storage import files

ANSWERS = Path("out/feedback/answers.parquet")


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ingested")
    here = Path.cwd()
    os.chdir(root)
    try:
        stages.run("ingest", workspace.make(root))
    finally:
        os.chdir(here)
    return root


@pytest.fixture
def root(ingested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ingested, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a[:0], "weapon: expected answers of two raters or more, got those of 0"),
        (lambda a: a[a["rater"] == a["rater"].iloc[0]], "expected answers of two raters or more, got those of 1"),
        (lambda a: a[a["prompt"] == "a gun"].pipe(_alternating), "pictures of two prompts or more"),
        (lambda a: a.assign(answer="yes"), "got 100% yes about all"),
        (lambda a: a.assign(answer="no"), "got 0% yes about all"),
        (lambda a: a.assign(answer="skip"), "unsure and skip say nothing"),
    ],
)
def test_feedback_that_teaches_nothing_is_refused_in_words(
    root: Path, change: Callable[[pd.DataFrame], pd.DataFrame], said: str
) -> None:
    files.write_table(ANSWERS, change(files.read_table(ANSWERS)), events.EVENT_SCHEMA)
    result = CliRunner().invoke(app, ["stage", "reward"])
    assert (result.exit_code, type(result.exception)) == (3, SystemExit), result.output
    assert said in result.output
    assert "deleatur stage ingest" in result.output


def _alternating(answers: pd.DataFrame) -> pd.DataFrame:
    """Every rater says yes to some pictures and no to others."""
    first = answers["items"].map(lambda items: items[0])
    return answers.assign(answer=[("yes", "no")[place % 2] for place in pd.factorize(first)[0]])


def test_prompts_that_are_each_all_yes_or_all_no_leave_the_quality_open(root: Path) -> None:
    answers = files.read_table(ANSWERS)
    answers = answers[answers["prompt"].isin(["a gun", "a cat"])]
    said = answers["prompt"].map({"a gun": "yes", "a cat": "no"})
    files.write_table(ANSWERS, answers.assign(answer=said), events.EVENT_SCHEMA)
    result = CliRunner().invoke(app, ["stage", "reward"])
    assert result.exit_code == 0, result.output
    found = json.loads(Path("out/reward/metrics.json").read_text())["weapon"]
    assert found["new_prompts"]["train"]["quality"] is None, "no fold of one prompt has both kinds of answers"
    assert found["new_raters"] is not None
