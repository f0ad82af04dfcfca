"""`deleatur explain` and `deleatur report` on a finished project."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import finished
import pytest
import yaml
from typer.testing import CliRunner, Result

from deleatur.cli import app
from deleatur.config.settings import Settings
from deleatur.records.report import Report, Verdict
from deleatur.stages import gate
from deleatur.storage import json_records


def run(*arguments: str) -> Result:
    # One wide line per sentence: what a terminal would fold is not what is tested.
    return CliRunner(env={"COLUMNS": "300"}).invoke(app, [*arguments])


def judge(settings: Settings, **rule: Any) -> None:
    """The same evidence under another policy."""
    [(name, limits)] = finished.passing_policy()["rules"].items()  # type: ignore[attr-defined]
    changed = settings.model_dump(mode="json", by_alias=True) | {"gate": {"rules": {name: limits | rule}}}
    gate.run(Settings.model_validate(changed))


VERDICTS = [
    ({"min": -5.0}, "pass", 0),
    ({"min": 5.0}, "fail", 10),
    ({"min_n": 10**6}, "not enough evidence", 11),
    ({"metric": "not_measured"}, "not enough evidence", 11),
]


@pytest.mark.parametrize(("rule", "outcome", "code"), VERDICTS)
def test_explain_ends_with_the_verdict(done: Settings, rule: dict[str, Any], outcome: str, code: int) -> None:
    judge(done, **rule)
    result = run("explain")
    assert result.exit_code == code, result.output
    assert outcome in result.output.lower()
    assert "images_match_prompts" in result.output
    as_json = run("explain", "--json")
    assert as_json.exit_code == code
    verdict = json.loads(as_json.stdout)
    assert verdict["outcome"] == outcome
    assert [f["outcome"] for f in verdict["findings"]] == [outcome]


def test_explain_has_the_margin_and_the_reason(done: Settings) -> None:
    judge(done, min=5.0)
    verdict = json_records.read(done.paths.verdict / "verdict.json", Verdict)
    [finding] = verdict.findings
    assert finding.margin is not None
    assert finding.margin < 0
    assert finding.reason in re.sub(r"\s+", " ", run("explain").output)


def test_report_shows_every_metric_and_paths_that_exist(done: Settings) -> None:
    result = run("report")
    assert result.exit_code == 0, result.output
    assert "PASS" in result.output
    report = json_records.read(done.paths.report / "report.json", Report)
    for metric in {score.metric for score in report.scores}:
        assert metric in result.output
    paths = dict(re.findall(r"^(HTML report|Contact sheet): +(\S+)$", result.output, re.MULTILINE))
    assert set(paths) == {"HTML report", "Contact sheet"}
    assert "<h1>Pass</h1>" in Path(paths["HTML report"]).read_text("utf-8")
    assert Path(paths["Contact sheet"]).read_bytes().startswith(b"\x89PNG")


def test_report_as_json_has_verdict_and_report(done: Settings) -> None:
    result = run("report", "--json")
    assert result.exit_code == 0
    output = json.loads(result.output)
    verdict, report = (
        json_records.decode(json.dumps(output[kind.__name__.lower()]).encode(), kind, "") for kind in (Verdict, Report)
    )
    assert verdict == json_records.read(done.paths.verdict / "verdict.json", Verdict)
    assert report == json_records.read(done.paths.report / "report.json", Report)
    assert verdict.report == json_records.digest(report)


def test_report_succeeds_on_a_failing_verdict(done: Settings) -> None:
    judge(done, min=5.0)
    result = run("report")
    assert (result.exit_code, "FAIL" in result.output) == (0, True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"gate": finished.passing_policy(-6.0)}, "the rules in params.yaml have changed since this verdict"),
        ({"seed": 43}, "the settings in params.yaml have changed since this report"),
    ],
)
def test_results_of_other_settings_are_marked(done: Settings, changes: dict[str, Any], reason: str) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text("utf-8")) | changes
    Path("params.yaml").write_text(yaml.safe_dump(params), "utf-8")
    outputs = [run("report").stderr, run("explain").stderr, json.loads(run("report", "--json").stdout)["stale"]]
    assert all(reason in output and bool(reason) == bool(output) for output in outputs), outputs
    assert run("export", "erased").stdout.splitlines()[1].startswith("Verdict: pass" + (", but " if reason else ""))


def test_the_export_of_unjudged_weights_says_so(done: Settings) -> None:
    shutil.rmtree(done.paths.verdict)
    assert "Verdict: none: these weights were not judged" in run("export", "erased").stdout
