"""What the exporter serves: read back by Prometheus' own parser, from real ledgers, registries and runs."""

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
from registry import register_pass, requiring_approval

from deleatur.config.settings import Settings
from deleatur.operations.exporter import SOURCES, Exporter, feedback, releases
from deleatur.records.report import Report, Verdict
from deleatur.registry import approval, rollback
from deleatur.registry.decisions import open_registry
from deleatur.registry.mlflow_registry import CHAMPION, LAST_KNOWN_GOOD
from deleatur.registry.model_files import local_folder
from deleatur.runtime import event_log
from deleatur.stages import register
from deleatur.storage import dvc, files, json_records

Scrape = dict[str, dict[tuple[str, ...], float]]
"""Series → label values, in the order of their names → value."""


def parsed(text: str) -> Scrape:
    metrics: Scrape = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            values = metrics.setdefault(sample.name.removeprefix("deleatur_"), {})
            assert labels not in values, f"{sample.name} {labels} occurs twice"
            values[labels] = sample.value
    return metrics


def scrape(params: Path = Path("params.yaml")) -> Scrape:
    registry_ = CollectorRegistry()
    registry_.register(Exporter(params))
    return parsed(generate_latest(registry_).decode())


def single_value(metrics: Scrape, name: str) -> float:
    [value] = metrics[name].values()
    return value


@pytest.fixture
def empty(tmp_path: Path, shared: Path) -> Iterator[Settings]:
    """A project that has run nothing."""
    settings = registry.create(shared, tmp_path)
    with chdir(tmp_path):
        yield settings


@pytest.fixture(scope="module")
def released(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project whose chain has run and whose verdict is registered; what it says before that."""
    root = tmp_path_factory.mktemp("released")
    settings = finished.copy(shared, root)
    with pytest.MonkeyPatch.context() as patch, chdir(root):
        patch.setattr(dvc, "status", lambda root: {})
        (root / "before.json").write_text(exposition().decode())
        register.run(settings)
        yield root


def exposition() -> bytes:
    registry_ = CollectorRegistry()
    registry_.register(Exporter(Path("params.yaml")))
    return generate_latest(registry_)


def test_a_release_is_exported(released: Path) -> None:
    before, after = parsed((released / "before.json").read_text()), scrape()
    assert "alias_version" not in before
    assert single_value(before, "reports_waiting") == 48
    assert after["alias_version"] == {(CHAMPION,): 1}
    assert single_value(after, "reports_waiting") == 0, "what is live was made from them"
    assert after["report_to_release_seconds_count"] == {("weapon",): 48}
    assert single_value(after, "champion_simulated") == 1
    assert single_value(after, "verdict_live") == 1
    assert abs(time.time() - single_value(after, "alias_since_timestamp_seconds")) < 600
    assert set(after["readable"].values()) == {1.0}
    assert set(after["readable"]) == {("settings",), *((name,) for name in SOURCES)}


def test_report_and_verdict_are_exported_as_in_their_files(released: Path) -> None:
    report = json_records.read(Path("out/report/report.json"), Report)
    verdict = json_records.read(Path("out/verdict/verdict.json"), Verdict)
    metrics = scrape()
    assert len(metrics["score"]) == len(report.scores)
    [score] = [
        s
        for s in report.scores
        if (s.metric, s.slice, s.variant, s.versus) == ("clip_score", "unseen", "candidate", "base")
    ]
    labels = ("weapon", "clip", "clip_score", "unseen", "candidate", "base")
    for name, value in (("score", score.value), ("score_low", score.low), ("score_high", score.high)):
        assert metrics[name][labels] == value
    assert metrics["score_images"][labels] == score.n
    assert metrics["rule_margin"] == {(f.rule,): f.margin for f in verdict.findings}
    assert single_value(metrics, "verdict") == 1
    assert metrics["feedback_rows"] == {("used",): 96, ("quarantined",): 0}
    assert sum(metrics["feedback_answers"].values()) == 96


def test_labels_hold_no_prompt_person_or_image(released: Path) -> None:
    text = exposition().decode()
    events = [json.loads(line) for path in Path("feedback").glob("*.jsonl") for line in path.read_text().splitlines()]
    for event in events:
        for secret in (event["prompt"], event["rater"], event["event_id"], *event["items"]):
            assert f'"{secret}"' not in text
    known = {*Settings.load().concepts, *Settings.load().gate.rules, *Settings.load().evaluate.metrics}
    values = {value for f in text_string_to_metric_families(text) for s in f.samples for value in s.labels.values()}
    assert known <= values | {"frechet"}
    assert all(re.fullmatch(r"[\w+. -]{0,60}", value) for value in values), values
    assert len(text.splitlines()) < 1000


def test_an_unreadable_source_is_a_series_and_all_others_stay(
    released: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("out/report/report.json")
    content = path.read_text()
    path.write_text("{}")
    try:
        metrics = scrape()
    finally:
        path.write_text(content)
    assert metrics["readable"]["report",] == 0
    assert "score" not in metrics
    assert sum(metrics["readable"].values()) == len(metrics["readable"]) - 1
    assert metrics["alias_version"] == {(CHAMPION,): 1}
    assert "report cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["report", "verdict", "feedback"])
def test_a_missing_output_is_no_error(released: Path, tmp_path: Path, folder: str) -> None:
    hidden = Path("out", folder).rename(tmp_path / folder)
    try:
        metrics = scrape()
    finally:
        hidden.rename(Path("out", folder))
    assert set(metrics["readable"].values()) == {1.0}
    assert {"report": "score", "verdict": "verdict", "feedback": "feedback_rows"}[folder] not in metrics


def test_a_damaged_file_is_logged_without_its_content(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("out/feedback/summary.json")
    content = path.read_text()
    path.write_text('{"quarantined": {"rows": "an unkind word"}}')
    try:
        metrics = scrape()
    finally:
        path.write_text(content)
    assert metrics["readable"]["feedback",] == 0
    logged = capsys.readouterr().err
    assert "feedback cannot be read" in logged
    assert "unkind" not in logged


def test_modified_weights_are_noticed_within_the_hour(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scrape()["files_verified"] == {(CHAMPION,): 1}
    assert scrape()["signed"] == {(CHAMPION,): 0}, "no key is configured"
    place = Path(local_folder("models:/deleatur@champion", "pipeline"))
    weights = next(place.rglob("unet/*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert scrape()["files_verified"] == {(CHAMPION,): 1}, "it looks once an hour"
        monkeypatch.setattr(releases, "_verified", {})
        assert scrape()["files_verified"] == {(CHAMPION,): 0}
    finally:
        weights.write_bytes(content)
        releases._verified.clear()


def test_a_modified_ledger_is_a_series(empty: Settings) -> None:
    register_pass(empty, "a")
    assert single_value(scrape(), "ledger_intact") == 1
    path = empty.register_.ledger
    path.write_text(path.read_text().replace('"actor":"', '"actor":"Not ', 1))
    metrics = scrape()
    assert single_value(metrics, "ledger_intact") == 0
    assert metrics["readable"]["ledger",] == 1, "to be broken is something that can be read"


def test_a_truncated_ledger_is_noticed(empty: Settings, shared: Path) -> None:
    register_pass(empty, "a")
    assert single_value(scrape(), "ledger_known") == 1
    lines = empty.register_.ledger.read_bytes().splitlines(keepends=True)
    empty.register_.ledger.write_bytes(b"".join(lines[:-1]))
    assert single_value(scrape(), "ledger_known") == 0
    assert single_value(scrape(), "ledger_intact") == 1, "a chain cannot tell that its end is missing"


def test_an_alias_moved_by_hand_is_noticed(empty: Settings) -> None:
    first, second = register_pass(empty, "a"), register_pass(empty, "b")
    metrics = scrape()
    assert metrics["alias_version"] == {(CHAMPION,): int(second), (LAST_KNOWN_GOOD,): int(first)}
    assert set(metrics["alias_as_decided"].values()) == {1.0}
    moved = open_registry(empty)
    moved.client.set_registered_model_alias(moved.model, CHAMPION, first)
    assert scrape()["alias_as_decided"] == {(CHAMPION,): 0, (LAST_KNOWN_GOOD,): 1}


def test_an_approval_and_a_rollback_are_exported(empty: Settings) -> None:
    register_pass(empty, "a")
    assert single_value(scrape(), "champion_approved") == 0
    version = register_pass(requiring_approval(empty), "b")
    assert scrape()["alias_version"][("challenger",)] == int(version)
    approval.promote(requiring_approval(empty), version, "Ada")
    assert single_value(scrape(), "champion_approved") == 1
    rollback.rollback(empty, "Ada", "it draws swords")
    metrics = scrape()
    assert metrics["alias_version"] == {(CHAMPION,): 1, ("quarantined",): 2}
    assert single_value(metrics, "quarantined_versions") == 1
    assert metrics["decisions_total"]["rollback",] == 1
    assert single_value(metrics, "champion_approved") == 0, "nobody approved the version before"


def test_reports_wait_again_after_a_rollback(empty: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    days = ("2025-01-01", "2025-01-03", "2025-01-05")
    lines = [{"concept": "ink", "answer": a, "created_at": f"{day}T00:00:00Z"} for day in days for a in ("yes", "no")]
    lines += [lines[-2] | {"event_id": "e"}, lines[-1] | {"answer": "withdrawn", "replaces": "e"}]
    lines += [lines[0] | {"created_at": "2999-01-01T00:00:00Z"}]
    source = Path("feedback/a.jsonl")
    files.write_lines(source, [*map(json.dumps, lines), "no JSON", "{}"])
    trained_until = {"1": "2025-01-02T00:00:00+00:00", "2": "2025-01-04T00:00:00+00:00"}
    monkeypatch.setattr(
        feedback, "_version_sources", lambda registry, version: (frozenset({"ink"}), trained_until[version])
    )
    register_pass(empty, "a")
    register_pass(empty, "b")
    assert scrape()["reports_waiting"]["ink",] == 1, "neither the withdrawn report nor the one from the future waits"
    assert scrape()["reports_oldest_timestamp_seconds"] == {("ink",): 1736035200}
    assert scrape()["report_to_release_seconds_count"]["ink",] == 2
    rollback.rollback(empty, "Ada", "it draws swords")
    assert scrape()["reports_waiting"]["ink",] == 2
    assert scrape()["report_to_release_seconds_count"]["ink",] == 2, "that it was fixed for a while stays so"
    with source.open("a") as file:
        file.write(json.dumps(lines[0]) + "\n")
    assert scrape()["feedback_answers"]["yes", "ink"] == 5, "what was appended is read"
    with source.open("a") as file:
        file.writelines(json.dumps(lines[0] | {"answer": answer}) + "\n" for answer in ("a content sentence", ["yes"]))
    assert set(scrape()["feedback_answers"]) == {("yes", "ink"), ("no", "ink"), ("withdrawn", "ink")}, (
        "a label is a word of ours"
    )


def test_an_unreachable_registry_is_a_series(empty: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    register_pass(empty, "a")
    params = Path("params.yaml")
    params.write_text(re.sub(r"tracking_uri: .*", "tracking_uri: http://127.0.0.1:9", params.read_text()))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    metrics = scrape()
    assert metrics["readable"]["registry",] == 0
    assert metrics["alias_version"] == {(CHAMPION,): 1}, "the ledger says what was decided"


def test_without_a_decision_no_registry_is_created(empty: Settings, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").unlink()
    scrape()
    assert not (tmp_path / "mlflow.db").exists()


def test_invalid_settings_are_a_series(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("seed: 1")
    assert scrape(tmp_path / "params.yaml")["readable"] == {("settings",): 0}


def test_runs_are_counted_by_outcome(empty: Settings) -> None:
    folder = empty.paths.checkpoints
    for kind in ("started", "done", "started", "started", "resumed", "interrupted", "started"):
        event_log.append(
            folder, "erase", kind, seconds=2.0 if kind in ("done", "interrupted") else 0.0, lost=7 * (kind == "resumed")
        )
    metrics = scrape()
    assert metrics["stage_runs_total"] == {("done", "erase"): 1, ("killed", "erase"): 1, ("interrupted", "erase"): 1}
    assert single_value(metrics, "stage_seconds_total") == 4
    assert single_value(metrics, "stage_last_seconds") == 2
    assert single_value(metrics, "steps_lost_total") == 7
    assert set(metrics["stage_began_timestamp_seconds"]) == {("erase",)}
    event_log.append(folder, "erase", "failed")
    assert not scrape().get("stage_began_timestamp_seconds")


@pytest.mark.slow
def test_the_exporter_serves_until_sigterm(empty: Settings) -> None:
    register_pass(empty, "a")
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
