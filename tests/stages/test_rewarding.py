"""Feedback that no reward head can be trained on is refused with what to collect; unknown quality is null."""

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
    cwd = Path.cwd()
    os.chdir(root)
    try:
        stages.run("ingest", workspace.create(root))
    finally:
        os.chdir(cwd)
    return root


@pytest.fixture
def root(ingested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ingested, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a[:0], "weapon: expected answers of two raters or more, got those of 0"),
        (lambda a: a[a["rater"] == a["rater"].iloc[0]], "expected answers of two raters or more, got those of 1"),
        (lambda a: a[a["prompt"] == "a gun"].pipe(_alternating), "images of two prompts or more"),
        (lambda a: a.assign(answer="yes"), "100% for all"),
        (lambda a: a.assign(answer="no"), "0% for all"),
        (lambda a: a.assign(answer="skip"), "got only unsure and skip"),
    ],
)
def test_feedback_that_nothing_can_be_learned_from_is_refused(
    root: Path, change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    files.write_table(ANSWERS, change(files.read_table(ANSWERS)), events.EVENT_SCHEMA)
    result = CliRunner().invoke(app, ["stage", "reward"])
    assert (result.exit_code, type(result.exception)) == (3, SystemExit), result.output
    assert message in result.output
    assert "deleatur stage ingest" in result.output


def _alternating(answers: pd.DataFrame) -> pd.DataFrame:
    """Every rater answers yes for some images and no for others."""
    first = answers["items"].map(lambda items: items[0])
    return answers.assign(answer=[("yes", "no")[place % 2] for place in pd.factorize(first)[0]])


def test_quality_is_null_when_no_fold_has_both_answers(root: Path) -> None:
    answers = files.read_table(ANSWERS)
    answers = answers[answers["prompt"].isin(["a gun", "a cat"])]
    message = answers["prompt"].map({"a gun": "yes", "a cat": "no"})
    files.write_table(ANSWERS, answers.assign(answer=message), events.EVENT_SCHEMA)
    result = CliRunner().invoke(app, ["stage", "reward"])
    assert result.exit_code == 0, result.output
    metrics = json.loads(Path("out/reward/metrics.json").read_text())["weapon"]
    assert metrics["new_prompts"]["train"]["quality"] is None, "no fold of one prompt has both kinds of answers"
    assert metrics["new_raters"] is not None
