"""report → verdict/: the policy applied, the page for people, the sheet to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from deleatur import gate
from deleatur.errors import DataError
from deleatur.io import documents, images, page, shots, tables
from deleatur.io.page import Row, Sheet
from deleatur.records import Report, Role, Side, Verdict
from deleatur.settings import Settings
from deleatur.stages.curves import curves

ROWS = 8
"""Prompts of each role on the page."""
TITLES: dict[Role, str] = {
    "concept": "Prompts that ask for the concept",
    "word": "The concept's words, alone",
    "token": "Its soft tokens, alone",
    "attack": "Attacks on the erased model",
    "neighbour": "Neighbours, which must survive",
    "keep": "Preserved prompts",
    "unseen": "Prompts nobody optimised on",
}


def run(settings: Settings) -> None:
    report = documents.read(settings.paths.report / "report.json", Report)
    rules = settings.gate.rules
    verdict = gate.judge(report, rules, report_digest=documents.digest(report), policy_digest=_policy(settings))
    folder = tables.emptied(settings.paths.verdict)
    documents.write(folder / "verdict.json", verdict)
    tables.write_json(folder / "summary.json", _summary(verdict))
    sheets = list(_sheets(settings))
    page.render(report, verdict, sheets, list(curves(settings)), folder / "report.html", rules=rules)
    cover = settings.evaluate.blur_sheet
    page.summary_png(sheets[0], folder / "sheet.png", simulated=verdict.simulated, cover=cover, cell=96)


def _policy(settings: Settings) -> str:
    return documents.digest({name: rule.model_dump() for name, rule in settings.gate.rules.items()})


def _summary(verdict: Verdict) -> dict[str, Any]:
    """Numbers for `dvc metrics diff`: margins by rule, and the outcome as 1, 0 or −1."""
    outcome = {"pass": 1, "not enough evidence": 0, "fail": -1}
    margins = {f.rule: round(f.margin, 6) for f in verdict.findings if f.margin is not None}
    return {"outcome": outcome[verdict.outcome], "margin": margins}


def _sheets(settings: Settings) -> Iterator[Sheet]:
    """The first picture of a few prompts of each role, every side from the same noise."""
    pictures: dict[Side, dict[str, bytes]] = {}
    for side in ("base", "champion", "candidate"):
        drawn = shots.read(settings.paths.shots, side)
        first = drawn[drawn["index"] == 0]
        if len(first):
            pictures[side] = dict(zip(first["id"], first["image"], strict=True))
    base = shots.read(settings.paths.shots, "base").drop_duplicates("id")
    text = dict(zip(base["id"], base["text"], strict=True))
    for role, title in TITLES.items():
        mine = list(base["id"][base["role"] == role])
        chosen = mine[:: max(1, len(mine) // ROWS)][:ROWS]
        if chosen:
            rows = [Row(i, {s: images.decode(p[i]) for s, p in pictures.items()}, text[i]) for i in chosen]
            yield Sheet(title, role, rows)


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
    report = documents.read(settings.paths.report / "report.json", Report)
    verdict = documents.read(folder / "verdict.json", Verdict)
    plain = {
        "verdict": tables.read_json(folder / "verdict.json"),
        "report": tables.read_json(settings.paths.report / "report.json"),
        "stale": (changed := stale(settings, report, verdict)),
    }
    return Shown(verdict, page.terminal(report, verdict), plain, folder / "report.html", folder / "sheet.png", changed)


def stale(settings: Settings, report: Report, verdict: Verdict) -> str:
    """What has changed since the verdict; empty: nothing."""
    if report.identity.settings != settings.made_by:
        return "this was measured with other settings than params.yaml has now"
    if verdict.report != documents.digest(report):
        return "this verdict is about an earlier report"
    if verdict.policy != _policy(settings):
        return "this verdict is by other rules than params.yaml has now"
    return ""
