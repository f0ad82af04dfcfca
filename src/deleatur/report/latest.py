"""The newest report and verdict, and whether they still match params.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Report, Verdict
from deleatur.report.terminal import summary
from deleatur.storage import files, json_records


@dataclass(frozen=True)
class LatestReport:
    """The newest verdict with its report, for the command line."""

    verdict: Verdict
    summary: RenderableType
    json: dict[str, Any]
    html: Path
    contact_sheet: Path
    stale: str
    """Why the report is out of date; empty: it is not."""


def latest_report(params: Path) -> LatestReport:
    """Reads the results of the last run of the pipeline. Raises DataError if it has not run to its end."""
    settings = Settings.load(params)
    folder = settings.paths.verdict
    if not (folder / "verdict.json").is_file():
        raise DataError(f"no verdict in {folder}: the pipeline has not run to its end", hint="deleatur demo")
    report = json_records.read(settings.paths.report / "report.json", Report)
    verdict = json_records.read(folder / "verdict.json", Verdict)
    json = {
        "verdict": files.read_json(folder / "verdict.json"),
        "report": files.read_json(settings.paths.report / "report.json"),
        "stale": (reason := stale_reason(settings, report, verdict)),
    }
    table = summary(report, verdict)
    return LatestReport(verdict, table, json, folder / "report.html", folder / "contact_sheet.png", reason)


def stale_reason(settings: Settings, report: Report, verdict: Verdict) -> str:
    """What has changed in params.yaml since the verdict; empty: nothing."""
    if report.provenance.settings != settings.digest:
        return "the settings in params.yaml have changed since this report"
    if verdict.report != json_records.digest(report):
        return "the report is newer than this verdict"
    if verdict.policy != policy_digest(settings):
        return "the rules in params.yaml have changed since this verdict"
    return ""


def policy_digest(settings: Settings) -> str:
    """Digest of the gate's rules, `Verdict.policy`."""
    return json_records.digest({name: rule.model_dump() for name, rule in settings.gate.rules.items()})
