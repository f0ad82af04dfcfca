"""The newest report and verdict, and whether they are still about what params.yaml says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from deleatur.config.settings import Settings
from deleatur.errors import DataError
from deleatur.records.report import Report, Verdict
from deleatur.report import page
from deleatur.storage import files, json_records


@dataclass(frozen=True)
class Shown:
    """What the command line shows of the newest verdict."""

    verdict: Verdict
    table: RenderableType
    plain: dict[str, Any]
    page: Path
    sheet: Path
    stale: str
    """What has changed since; empty: nothing."""


def show(params: Path) -> Shown:
    """Reads what the chain last wrote. Raises DataError when it has not run."""
    settings = Settings.load(params)
    folder = settings.paths.verdict
    if not (folder / "verdict.json").is_file():
        raise DataError(f"no verdict in {folder}: the chain has not run to its end", hint="deleatur demo")
    report = json_records.read(settings.paths.report / "report.json", Report)
    verdict = json_records.read(folder / "verdict.json", Verdict)
    plain = {
        "verdict": files.read_json(folder / "verdict.json"),
        "report": files.read_json(settings.paths.report / "report.json"),
        "stale": (changed := stale(settings, report, verdict)),
    }
    return Shown(verdict, page.terminal(report, verdict), plain, folder / "report.html", folder / "sheet.png", changed)


def stale(settings: Settings, report: Report, verdict: Verdict) -> str:
    """What has changed since the verdict; empty: nothing."""
    if report.identity.settings != settings.made_by:
        return "this was measured with other settings than params.yaml has now"
    if verdict.report != json_records.digest(report):
        return "this verdict is about an earlier report"
    if verdict.policy != policy_digest(settings):
        return "this verdict is by other rules than params.yaml has now"
    return ""


def policy_digest(settings: Settings) -> str:
    return json_records.digest({name: rule.model_dump() for name, rule in settings.gate.rules.items()})
