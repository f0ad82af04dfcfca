"""What Prometheus is told: read back by Prometheus' own parser, from real ledgers, registries and runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from urllib.request import urlopen

import finished
import pytest
import registry
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from registry import asking, passes

from deleatur.config.settings import Settings
from deleatur.operations.exporter import SOURCES, Exporter, people
from deleatur.operations.exporter import released as published
from deleatur.records.report import Report, Verdict
from deleatur.registry import approval, rollback
from deleatur.registry.decisions import registry_of
from deleatur.registry.mlflow_client import CHAMPION, LAST, local
from deleatur.runtime import event_log
from deleatur.stages import register
from deleatur.storage import dvc, files, json_records

Told = dict[str, dict[tuple[str, ...], float]]
"""Series → label values, in the order of their names → value."""


def parsed(text: str) -> Told:
    found: Told = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            mine = found.setdefault(sample.name.removeprefix("deleatur_"), {})
            assert labels not in mine, f"{sample.name} {labels} is told twice"
            mine[labels] = sample.value
    return found


def told(params: Path = Path("params.yaml")) -> Told:
    asked = CollectorRegistry()
    asked.register(Exporter(params))
    return parsed(generate_latest(asked).decode())


def one(found: Told, name: str) -> float:
    [value] = found[name].values()
    return value


@pytest.fixture
def empty(tmp_path: Path, shared: Path) -> Iterator[Settings]:
    """A project that has run nothing."""
    settings = registry.make(shared, tmp_path)
    with chdir(tmp_path):
        yield settings


@pytest.fixture(scope="module")
def released(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose chain has run and whose verdict is registered; what it says before that."""
    root = tmp_path_factory.mktemp("released")
    settings = finished.copy(shared, root)
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(dvc, "status", lambda root: {})
        (root / "before.json").write_text(generate().decode())
        register.run(settings)
        yield root


def generate() -> bytes:
    asked = CollectorRegistry()
    asked.register(Exporter(Path("params.yaml")))
    return generate_latest(asked)


def test_a_release_shows(released: Path) -> None:
    before, after = parsed((released / "before.json").read_text()), told()
    assert "alias_version" not in before
    assert one(before, "reports_waiting") == 48
    assert after["alias_version"] == {(CHAMPION,): 1}
    assert one(after, "reports_waiting") == 0, "what is live was made from them"
    assert after["report_to_release_seconds_count"] == {("weapon",): 48}
    assert one(after, "champion_simulated") == 1
    assert one(after, "verdict_live") == 1
    assert abs(time.time() - one(after, "alias_since_timestamp_seconds")) < 600
    assert set(after["readable"].values()) == {1.0}
    assert set(after["readable"]) == {("settings",), *((name,) for name in SOURCES)}


def test_report_and_verdict_are_told_as_they_stand_in_their_files(released: Path) -> None:
    report = json_records.read(Path("out/report/report.json"), Report)
    verdict = json_records.read(Path("out/verdict/verdict.json"), Verdict)
    found = told()
    assert len(found["score"]) == len(report.scores)
    [score] = [
        s
        for s in report.scores
        if (s.metric, s.slice, s.side, s.versus) == ("clip_score", "unseen", "candidate", "base")
    ]
    labels = ("weapon", "clip", "clip_score", "candidate", "unseen", "base")
    for name, value in (("score", score.value), ("score_low", score.low), ("score_high", score.high)):
        assert found[name][labels] == value
    assert found["score_pictures"][labels] == score.n
    assert found["rule_margin"] == {(f.rule,): f.margin for f in verdict.findings}
    assert one(found, "verdict") == 1
    assert found["feedback_rows"] == {("used",): 96, ("quarantined",): 0}
    assert sum(found["feedback_answers"].values()) == 96


def test_nothing_harmful_no_person_and_no_picture_is_in_a_label(released: Path) -> None:
    text = generate().decode()
    events = [json.loads(line) for path in Path("feedback").glob("*.jsonl") for line in path.read_text().splitlines()]
    for event in events:
        for secret in (event["prompt"], event["rater"], event["event_id"], *event["items"]):
            assert f'"{secret}"' not in text
    known = {*Settings.load().concepts, *Settings.load().gate.rules, *Settings.load().evaluate.metrics}
    values = {value for f in text_string_to_metric_families(text) for s in f.samples for value in s.labels.values()}
    assert known <= values | {"frechet"}
    assert all(re.fullmatch(r"[\w+. -]{0,60}", value) for value in values), values
    assert len(text.splitlines()) < 1000


def test_what_cannot_be_read_is_a_series_and_all_else_stays(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("out/report/report.json")
    whole = path.read_text()
    path.write_text("{}")
    try:
        found = told()
    finally:
        path.write_text(whole)
    assert found["readable"]["report",] == 0
    assert "score" not in found
    assert sum(found["readable"].values()) == len(found["readable"]) - 1
    assert found["alias_version"] == {(CHAMPION,): 1}
    assert "report cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["report", "verdict", "feedback"])
def test_what_nobody_has_made_yet_is_no_trouble(released: Path, tmp_path: Path, folder: str) -> None:
    hidden = Path("out", folder).rename(tmp_path / folder)
    try:
        found = told()
    finally:
        hidden.rename(Path("out", folder))
    assert set(found["readable"].values()) == {1.0}
    assert {"report": "score", "verdict": "verdict", "feedback": "feedback_rows"}[folder] not in found


def test_damaged_evidence_is_told_without_its_content(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("out/feedback/summary.json")
    whole = path.read_text()
    path.write_text('{"quarantined": {"rows": "an unkind word"}}')
    try:
        found = told()
    finally:
        path.write_text(whole)
    assert found["readable"]["feedback",] == 0
    said = capsys.readouterr().err
    assert "feedback cannot be read" in said
    assert "unkind" not in said


def test_weights_that_were_changed_are_noticed_at_the_next_look(
    released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told()["files_verified"] == {(CHAMPION,): 1}
    assert told()["signed"] == {(CHAMPION,): 0}, "no key is configured"
    place = Path(local("models:/deleatur@champion", "pipeline"))
    weights = next(place.rglob("unet/*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        assert told()["files_verified"] == {(CHAMPION,): 1}, "it looks once an hour"
        monkeypatch.setattr(published, "_looked", {})
        assert told()["files_verified"] == {(CHAMPION,): 0}
    finally:
        weights.write_bytes(whole)
        published._looked.clear()


def test_a_changed_ledger_is_a_series(empty: Settings) -> None:
    passes(empty, "a")
    assert one(told(), "ledger_intact") == 1
    path = empty.register_.ledger
    path.write_text(path.read_text().replace('"who":"', '"who":"Not ', 1))
    found = told()
    assert one(found, "ledger_intact") == 0
    assert found["readable"]["ledger",] == 1, "to be broken is something that can be read"


def test_a_ledger_of_another_registry_is_noticed(empty: Settings, shared: Path) -> None:
    passes(empty, "a")
    assert one(told(), "ledger_known") == 1
    lines = empty.register_.ledger.read_bytes().splitlines(keepends=True)
    empty.register_.ledger.write_bytes(b"".join(lines[:-1]))
    assert one(told(), "ledger_known") == 0
    assert one(told(), "ledger_intact") == 1, "a chain cannot tell that its end is missing"


def test_an_alias_that_was_moved_by_hand_is_noticed(empty: Settings) -> None:
    first, second = passes(empty, "a"), passes(empty, "b")
    found = told()
    assert found["alias_version"] == {(CHAMPION,): int(second), (LAST,): int(first)}
    assert set(found["alias_as_decided"].values()) == {1.0}
    moved = registry_of(empty)
    moved.client.set_registered_model_alias(moved.model, CHAMPION, first)
    assert told()["alias_as_decided"] == {(CHAMPION,): 0, (LAST,): 1}


def test_an_approval_and_a_rollback_show(empty: Settings) -> None:
    passes(empty, "a")
    assert one(told(), "champion_approved") == 0
    version = passes(asking(empty), "b")
    assert told()["alias_version"][("challenger",)] == int(version)
    approval.promote(asking(empty), version, "Ada")
    assert one(told(), "champion_approved") == 1
    rollback.rollback(empty, "Ada", "it draws swords")
    found = told()
    assert found["alias_version"] == {(CHAMPION,): 1, ("quarantined",): 2}
    assert one(found, "quarantined_versions") == 1
    assert found["decisions_total"]["rollback",] == 1
    assert one(found, "champion_approved") == 0, "nobody approved the version before"


def test_reports_wait_again_when_what_learned_from_them_is_taken_back(
    empty: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = ("2025-01-01", "2025-01-03", "2025-01-05")
    lines = [{"concept": "ink", "answer": a, "created_at": f"{day}T00:00:00Z"} for day in days for a in ("yes", "no")]
    source = Path("feedback/a.jsonl")
    files.write_lines(source, [*map(json.dumps, lines), "no JSON", "{}"])
    until = {"1": "2025-01-02T00:00:00+00:00", "2": "2025-01-04T00:00:00+00:00"}
    monkeypatch.setattr(people, "_made_from", lambda registry, version: (frozenset({"ink"}), until[version]))
    passes(empty, "a")
    passes(empty, "b")
    assert told()["reports_waiting"]["ink",] == 1
    assert told()["reports_oldest_timestamp_seconds"] == {("ink",): 1736035200}
    assert told()["report_to_release_seconds_count"]["ink",] == 2
    rollback.rollback(empty, "Ada", "it draws swords")
    assert told()["reports_waiting"]["ink",] == 2
    assert told()["report_to_release_seconds_count"]["ink",] == 2, "that it was fixed for a while stays so"
    with source.open("a") as file:
        file.write(json.dumps(lines[0]) + "\n")
    assert told()["feedback_answers"]["yes", "ink"] == 4, "what was appended is read"
    with source.open("a") as file:
        file.writelines(json.dumps(lines[0] | {"answer": answer}) + "\n" for answer in ("a whole sentence", ["yes"]))
    assert set(told()["feedback_answers"]) == {("yes", "ink"), ("no", "ink")}, "a label is a word of ours"


def test_a_registry_that_does_not_answer_is_a_series(empty: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    passes(empty, "a")
    params = Path("params.yaml")
    params.write_text(re.sub(r"tracking_uri: .*", "tracking_uri: http://127.0.0.1:9", params.read_text()))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = told()
    assert found["readable"]["registry",] == 0
    assert found["alias_version"] == {(CHAMPION,): 1}, "the ledger says what was decided"


def test_without_a_decision_no_registry_is_made(empty: Settings, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").unlink()
    told()
    assert not (tmp_path / "mlflow.db").exists()


def test_settings_that_do_not_validate_are_a_series(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1")
    assert told(tmp_path / "params.yaml")["readable"] == {("settings",): 0}


def test_runs_are_counted_by_how_they_ended(empty: Settings) -> None:
    folder = empty.paths.state
    for what in ("began", "done", "began", "began", "resumed", "stopped", "began"):
        event_log.write(
            folder, "erase", what, seconds=2.0 if what in ("done", "stopped") else 0.0, lost=7 * (what == "resumed")
        )
    found = told()
    assert found["stage_runs_total"] == {("done", "erase"): 1, ("killed", "erase"): 1, ("stopped", "erase"): 1}
    assert one(found, "stage_seconds_total") == 4
    assert one(found, "stage_last_seconds") == 2
    assert one(found, "steps_lost_total") == 7
    assert set(found["stage_began_timestamp_seconds"]) == {("erase",)}
    event_log.write(folder, "erase", "failed")
    assert not told().get("stage_began_timestamp_seconds")


@pytest.mark.slow
def test_the_command_answers_until_it_is_asked_to_stop(empty: Settings) -> None:
    passes(empty, "a")
    command = [sys.executable, "-m", "deleatur", "exporter", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stderr is not None
        address = process.stderr.readline().strip()
        try:
            with urlopen(address, timeout=60) as answer:
                assert parsed(answer.read().decode())["alias_version"] == {(CHAMPION,): 1}
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
