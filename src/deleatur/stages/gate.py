"""report → verdict/: the policy applied, the page for people, the sheet to look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deleatur import gate
from deleatur.config.settings import Settings
from deleatur.records.report import Report, Verdict
from deleatur.records.sampling import Role, Side
from deleatur.report import page
from deleatur.report.curves import curves
from deleatur.report.latest import policy_digest
from deleatur.report.page import Row, Sheet
from deleatur.storage import files, images, json_records, samples

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
    report = json_records.read(settings.paths.report / "report.json", Report)
    rules = settings.gate.rules
    verdict = gate.judge(
        report, rules, report_digest=json_records.digest(report), policy_digest=policy_digest(settings)
    )
    folder = files.emptied(settings.paths.verdict)
    json_records.write(folder / "verdict.json", verdict)
    files.write_json(folder / "summary.json", _summary(verdict))
    sheets = list(_sheets(settings))
    page.render(report, verdict, sheets, list(curves(settings)), folder / "report.html", rules=rules)
    cover = settings.evaluate.blur_sheet
    page.summary_png(sheets[0], folder / "sheet.png", simulated=verdict.simulated, cover=cover, cell=96)


def _summary(verdict: Verdict) -> dict[str, Any]:
    """Numbers for `dvc metrics diff`: margins by rule, and the outcome as 1, 0 or −1."""
    outcome = {"pass": 1, "not enough evidence": 0, "fail": -1}
    margins = {f.rule: round(f.margin, 6) for f in verdict.findings if f.margin is not None}
    return {"outcome": outcome[verdict.outcome], "margin": margins}


def _sheets(settings: Settings) -> Iterator[Sheet]:
    """The first picture of a few prompts of each role, every side from the same noise."""
    pictures: dict[Side, dict[str, bytes]] = {}
    for side in ("base", "champion", "candidate"):
        drawn = samples.read(settings.paths.shots, side)
        first = drawn[drawn["index"] == 0]
        if len(first):
            pictures[side] = dict(zip(first["id"], first["image"], strict=True))
    base = samples.read(settings.paths.shots, "base").drop_duplicates("id")
    text = dict(zip(base["id"], base["text"], strict=True))
    for role, title in TITLES.items():
        mine = list(base["id"][base["role"] == role])
        chosen = mine[:: max(1, len(mine) // ROWS)][:ROWS]
        if chosen:
            rows = [Row(i, {s: images.decode(p[i]) for s, p in pictures.items()}, text[i]) for i in chosen]
            yield Sheet(title, role, rows)
