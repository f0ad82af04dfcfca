"""What MLflow's pages say about the registered model and its versions, in Markdown.

Links are relative to MLflow's pages and therefore valid under every address of the server.
"""

from __future__ import annotations

import textwrap
from urllib.parse import quote

from deleatur.markdown import escape_markdown
from deleatur.registry.ledger import Entry, Ledger
from deleatur.registry.mlflow_registry import CHALLENGER, CHAMPION, LAST_KNOWN_GOOD, QUARANTINED

MODEL_CARD = "model_card.md"
"""Path among the artifacts of a run."""

MAX_LENGTH, MAX_SUMMARY, MAX_REASON = 5000, 3000, 300
"""Characters that MLflow's database holds of a description, and how many of them a summary and a reason may take."""
DECISIONS = "\n\n**Decisions** (all of them: `deleatur history`)\n\n"


def run_link(experiment_id: str, run_id: str) -> str:
    return f"#/experiments/{experiment_id}/runs/{run_id}"


def version_description(summary: str, run: str) -> str:
    """The description of a new version, without decisions.

    summary: of the verdict, in Markdown; its last lines are dropped if it is too long. run: link to the run.
    """
    lines = summary.splitlines()
    while len("\n".join(lines)) > MAX_SUMMARY:
        del lines[-1]
    links = f"[Report]({run}/artifacts/verdict/report.html) · [model card]({run}/artifacts/{MODEL_CARD}) · [run]({run})"
    return "\n".join([*lines, "", links]) + DECISIONS


def decision_lines(entry: Entry) -> dict[str, str]:
    """Version → what a decision means for it."""
    decided = {entry.version: entry.event} if entry.version else {}
    if entry.event in ("rollback", "quarantine") and (version := entry.aliases.get(QUARANTINED)):
        decided[version] = "quarantine"
    actor = escape_markdown(entry.actor)
    reason = escape_markdown(textwrap.shorten(entry.reason, MAX_REASON, placeholder=" …"))
    suffix = f"{f': {reason}' if reason else ''} (line {entry.number} of the ledger)"
    return {version: f"* {_time(entry)}, {event} by {actor}{suffix}" for version, event in decided.items()}


def with_decision(description: str, line: str) -> str:
    """The description with another decision, once. The oldest decisions are dropped if it becomes too long."""
    before, _, listed = description.partition(DECISIONS)
    lines = [*(listed_line for listed_line in listed.splitlines() if listed_line != line), line]
    while len(text := before + DECISIONS + "\n".join(lines)) > MAX_LENGTH and len(lines) > 1:
        del lines[0]
    return text


def model_description(model: str, recorded: Ledger) -> str:
    """The description of the registered model: which version is live, what the aliases mean, where to read more."""
    aliases, address = recorded.aliases, f"models:/{model}"

    def version(alias: str) -> str:
        number = aliases[alias]
        return f"[version {number}](#/models/{quote(model, safe='')}/versions/{number})"

    live = f"{version(CHAMPION)} is live: `{address}@{CHAMPION}`" if CHAMPION in aliases else "no version is live"
    lines = [f"**{CHAMPION}**: {live}"]
    if CHALLENGER in aliases:
        approve = f"deleatur approve {aliases[CHALLENGER]} --as NAME --reason WHY"
        lines.append(f"**{CHALLENGER}**: {version(CHALLENGER)} passed and awaits approval: `{approve}`")
    if LAST_KNOWN_GOOD in aliases:
        back = "deleatur rollback --as NAME --reason WHY"
        lines.append(f"**{LAST_KNOWN_GOOD}**: {version(LAST_KNOWN_GOOD)} was live before; `{back}` makes it live again")
    if QUARANTINED in aliases:
        lines.append(f"**{QUARANTINED}**: {version(QUARANTINED)} was quarantined last, and never goes live again")
    last = f", {_time(recorded.entries[-1])}" if recorded.entries else ""
    listed = "\n".join(f"* {line}" for line in lines)
    return (
        "A text-to-image model with concepts erased by deleatur. "
        f"As of line {recorded.head.number} of the ledger{last}:\n\n{listed}\n\n"
        "Every version has passed its release policy. Its description has the verdict, the concepts with their rates "
        "before and after, links to report and model card, and the decisions about it; digests, settings and scores "
        "are in its source run and source model.\n\n"
        "Aliases are moved by commands, which the ledger records, and not on this page: `deleatur history` shows who "
        "decided what, `deleatur report` the latest report, `deleatur verify VERSION` whether a version's files are "
        "those that were evaluated."
    )


def _time(entry: Entry) -> str:
    return f"{entry.time[:16].replace('T', ' ')} UTC"
