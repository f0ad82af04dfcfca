"""report → verdict/: the outcome of the policy, an HTML report and a contact sheet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from deleatur import gate
from deleatur.config.settings import Settings
from deleatur.maths.subsets import stratified
from deleatur.records.report import Report, Verdict
from deleatur.records.sampling import Role, Variant
from deleatur.report.contact_sheet import ContactSheet, PromptRow, write_contact_sheet
from deleatur.report.curves import training_curves
from deleatur.report.latest import policy_digest
from deleatur.report.page import write_html
from deleatur.storage import files, images, json_records, samples

PROMPTS_PER_ROLE = 8
"""Prompts of each role on the contact sheets."""
TITLES: dict[Role, str] = {
    "concept": "Prompts that ask for the concept",
    "word": "The concept's words, alone",
    "token": "Its soft tokens, alone",
    "attack": "Attacks on the erased model",
    "neighbour": "Neighbours, which must survive",
    "keep": "Preserved prompts",
    "unseen": "Prompts that no training step used",
}


def run(settings: Settings) -> None:
    report = json_records.read(settings.paths.report / "report.json", Report)
    rules = settings.gate.rules
    verdict = gate.judge(
        report, rules, report_digest=json_records.digest(report), policy_digest=policy_digest(settings)
    )
    with files.replace_folder(settings.paths.verdict) as folder:
        json_records.write(folder / "verdict.json", verdict)
        files.write_json(folder / "summary.json", _summary(verdict))
        sheets = list(_contact_sheets(settings))
        curves, path, base = list(training_curves(settings)), folder / "report.html", settings.base.model
        write_html(report, verdict, sheets, curves, path, base_model=base, rules=rules)
        path, cover = folder / "contact_sheet.png", settings.evaluate.blur_contact_sheet
        write_contact_sheet(sheets[0], path, simulated=verdict.simulated, cover=cover, cell_size=96)


def _summary(verdict: Verdict) -> dict[str, Any]:
    """Values for `dvc metrics diff`: margins by rule, and the outcome as 1, 0 or −1."""
    outcome = {"pass": 1, "not enough evidence": 0, "fail": -1}
    margins = {f.rule: round(f.margin, 6) for f in verdict.findings if f.margin is not None}
    return {"outcome": outcome[verdict.outcome], "margin": margins}


def _contact_sheets(settings: Settings) -> Iterator[ContactSheet]:
    """Per role, the first image of a few prompts, of every variant from the same noise."""
    encoded: dict[Variant, dict[str, bytes]] = {}
    for variant in get_args(Variant):
        of_variant = samples.read(settings.paths.samples, variant)
        first = of_variant[of_variant["index"] == 0]
        if len(first):
            encoded[variant] = dict(zip(first["id"], first["image"], strict=True))
    base = samples.read(settings.paths.samples, "base").drop_duplicates("id")
    text_of = dict(zip(base["id"], base["text"], strict=True))
    for role, title in TITLES.items():
        of_role = base[base["role"] == role]
        label_of = dict(zip(of_role["id"], of_role["label"], strict=True))
        shown = stratified(list(label_of), PROMPTS_PER_ROLE, str, label_of.__getitem__)
        if shown:
            rows = [PromptRow(i, {v: images.decode(e[i]) for v, e in encoded.items()}, text_of[i]) for i in shown]
            yield ContactSheet(title, role, rows)
