"""A concept that nobody rated is erased by its words, and the report says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import workspace

from deleatur import stages
from deleatur.artifacts.evidence import collect_evidence
from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.operations.preflight import check
from deleatur.records.report import Report, Verdict
from deleatur.storage import files, json_records, samples, tensors

CHAIN = ("ingest", "reward", "invert", "erase", "attack", "sample", "evaluate", "gate")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """By words, with the whole feedback folder removed."""
    monkeypatch.chdir(tmp_path)
    settings = specified_by(workspace.create(tmp_path), "words")
    shutil.rmtree("feedback")
    return settings


def specified_by(settings: Settings, source: str) -> Settings:
    return settings.model_copy(update={"erase": settings.erase.model_copy(update={"source": source})})


def report(settings: Settings) -> Report:
    return json_records.read(settings.paths.report / "report.json", Report)


def test_the_pipeline_runs_without_any_feedback(settings: Settings) -> None:
    assert check(settings)
    for name in CHAIN:
        stages.run(name, settings)
    assert len(files.read_table(settings.paths.feedback / "answers.parquet")) == 0
    assert files.read_json(settings.paths.reward / "metrics.json")["weapon"].startswith("skipped: weapon: expected")
    assert files.read_json(settings.paths.tokens / "metrics.json") == {"weapon": []}
    assert "skipped" in files.read_json(settings.paths.attacks / "record.json")["weapon"]
    assert tensors.load_delta(settings.paths.delta / tensors.DELTA_FILE).concepts == ("weapon",)
    evaluations = files.read_json(settings.paths.delta / "evaluations.json")
    assert all(0 <= e["concept"] <= 1 for e in evaluations)

    roles = set(samples.read_listing(settings.paths.samples)["role"])
    assert {"concept", "word", "neighbour", "unseen"} <= roles
    assert not {"token", "attack"} & roles
    report_ = report(settings)
    assert any("No person rated images of weapon" in note for note in report_.notes)
    assert not any("Question to the raters of weapon" in note for note in report_.notes)
    assert not report_.provenance.simulated
    metrics = {score.metric for score in report_.scores}
    assert "concept_rate" in metrics
    assert "held_out_reward" not in metrics
    verdict = json_records.read(settings.paths.verdict / "verdict.json", Verdict)
    assert "No person rated" in (settings.paths.verdict / "report.html").read_text("utf-8")
    evidence = collect_evidence(settings, report_, verdict, "")
    assert evidence.tags["feedback_until"] == ""


def test_too_little_feedback_is_no_obstacle_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = specified_by(workspace.create(tmp_path), "words")
    source = Path("feedback/weapon.jsonl")
    lines = source.read_text("utf-8").splitlines()
    rater = json.loads(lines[0])["rater"]
    source.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["rater"] == rater), "utf-8")
    for name in CHAIN[:-1]:
        stages.run(name, settings)
    [note] = [note for note in report(settings).notes if "Ratings of weapon were not used" in note]
    assert "two raters or more, got those of 1" in note


def test_tokens_still_need_feedback(settings: Settings) -> None:
    by_token = specified_by(settings, "token")
    for refused in (lambda: check(by_token), lambda: stages.run("ingest", by_token)):
        with pytest.raises(DataError, match="expected feedback at"):
            refused()
